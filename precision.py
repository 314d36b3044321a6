"""Numeric precision of training: fp32, TF32, BF16 and FP16 autocast, and FP8 matrix products through torchao.

    python precision.py                  the precisions this machine can run, each timed and checked against fp64
    python precision.py --width 4096     larger matrices
    python fp8_benchmark.py              from which width on FP8 pays: products, linear layers, whole blocks (a GPU)

fp32   everything in 32 bits, tensor cores off: the reference.
tf32   32-bit tensors; matrix products read 10 bits of mantissa. Saves no memory, only time (Ampere and newer).
bf16   autocast: matrix products and attention in bfloat16 (8 bits of mantissa, fp32's range), norms, softmax, loss in
       fp32, parameters and optimizer states stay fp32. Saved activations shrink by about half; autocast adds a
       16-bit copy of every weight it multiplies with (2 bytes a parameter).
fp16   autocast with float16 (11 bits of mantissa, small range): gradients need a scaler that skips steps on overflow.
fp8    bf16 autocast in which linear layers round both operands of each product to 8 bits, forward and backward, with
       scales taken from the largest value at that moment. Tensor cores do twice the bf16 rate; finding the largest
       value and casting cost passes over memory, which only large matrices pay back, and only compiled. Do not count on
       less memory: torchao's layer keeps its 16-bit input for the backward pass (the compiler may keep the 8-bit copy
       instead). Recipes, from fast to exact:
         tensorwise          one scale a tensor; e4m3 (4 bits of mantissa), gradients e5m2 (3 bits)
         rowwise             one scale a row, power of two; e4m3 everywhere
         rowwise_with_gw_hp  rowwise, but the product that makes the weight's gradient stays 16-bit

When it does not help: the residual stream and everything of the optimizer stay fp32, so a model whose memory is
parameters rather than activations saves nothing (16 bytes a parameter become 18). FP8 loses against bf16 where layers
are narrow: `--fp8_layers large` leaves those out.

The loss is always computed on fp32 logits: under autocast, F.cross_entropy on bf16 logits would round the log
probabilities to 8 bits (PyTorch's autocast lists; https://docs.pytorch.org/docs/stable/amp.html).
Sources: Micikevicius et al. 2017, Mixed Precision Training, arXiv 1710.03740; Kalamkar et al. 2019, arXiv 1905.12322;
Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433; torchao.float8, which does the work
(https://docs.pytorch.org/ao/stable/workflows/training.html).
"""

import dataclasses
import functools
import importlib
import importlib.util
import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from technique_bench import measure, relative_error
from utils import SettingsError, parse_settings, run_script, setting

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")  # of every trainer; llm_train.py has fp8 beside them
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
FP8_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
FP8_LAYERS = ("all", "large")
FP8_MULTIPLE = 16  # every side of an FP8 product must be a multiple of it (torch.nn.functional.scaled_mm)


def unsupported_reason(precision: str, device: torch.device) -> str | None:
    """Why this device cannot train in this precision; None if it can. For fp8 see also `fp8_unsupported_reason`."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        if precision in ("tf32", "bf16") and capability < (8, 0):
            return (
                f"{name} (compute capability {capability[0]}.{capability[1]}) has no {precision} units; 8.0 is needed"
            )
    elif precision == "tf32":
        return "tf32 is a mode of NVIDIA tensor cores, and this machine has none"
    return None


def fp8_unsupported_reason(device: torch.device, compiled: bool, emulated: bool) -> str | None:
    """Why FP8 products cannot run here, a sentence that ends with what to change; None if they can."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed; install it with `uv sync --extra torchao`"
    if emulated:
        return None
    remedy = "take --precision bf16, or --fp8_emulation true to see what the rounding does (slow, no memory saved)"
    if device.type != "cuda":
        return f"FP8 products need an NVIDIA GPU of compute capability 8.9 or newer, and there is none; {remedy}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, and FP8 units need 8.9; {remedy}"
    if not compiled:
        return (
            "without compiling, each cast to 8 bits is several kernels and a step slower than in bf16; "
            "add --use_compile true"
        )
    return None


def set_precision(precision: str, device: torch.device) -> None:
    """Check that the device can run the precision and set the matrix products' mode for the process.

    Raises:
        SettingsError: the device has no such units.
    """
    reason = unsupported_reason(precision, device)
    if reason is not None:
        raise SettingsError(f"--precision {precision} cannot run here: {reason}; choose another --precision")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of the forward pass: autocast for bf16 and fp16, nothing for fp32 and tf32."""
    if precision in AUTOCAST_DTYPES:
        return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[precision])
    return nullcontext()


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The gradient scaler: real for fp16, a disabled one that passes values through for every other precision."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


# --------------------------------------------------------------------------------------------------------------------
# FP8
# --------------------------------------------------------------------------------------------------------------------


def import_torchao(module: str) -> Any:
    """A module of torchao, without the warning that newer versions of PyTorch write about how it registers things."""
    log = logging.getLogger("torch.utils._pytree")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return importlib.import_module(module)
    finally:
        log.setLevel(level)


def fp8_skip_reason(recipe: str, inputs: int, outputs: int, layers: str) -> str | None:
    """Why a linear layer of this shape stays in 16 bits; None if it is converted.

    Args:
        layers: "all" converts whatever the hardware can multiply, "large" leaves out the shapes that torchao's filter
            for H100 leaves out as too small to gain (its float8_linear_utils.py; it has no rule of its own for
            rowwise_with_gw_hp, which gets that of rowwise).
    """
    if inputs % FP8_MULTIPLE or outputs % FP8_MULTIPLE:
        return f"{FP8_MULTIPLE} does not divide {inputs} and {outputs}"
    if layers == "large":
        if recipe == "tensorwise":
            small = inputs <= 4096 and outputs <= 1024
        else:
            small = outputs <= 2048 or inputs <= 1024 or (outputs <= 4096 and inputs <= 2048)
        if small:
            return f"{inputs} to {outputs} is small for {recipe}"
    return None


def fp8_config(recipe: str, emulated: bool = False) -> Any:
    """torchao's Float8LinearConfig of a recipe."""
    config = import_torchao("torchao.float8").Float8LinearConfig.from_recipe_name(recipe)
    return dataclasses.replace(config, emulate=emulated)


def convert_to_fp8(
    model: nn.Module,
    recipe: str = "tensorwise",
    *,
    layers: str = "all",
    skip: Callable[[str], str | None] = lambda name: None,
    emulated: bool = False,
) -> dict[str, Any]:
    """Let a model's linear layers multiply in FP8, in place; their parameters stay the same tensors.

    Args:
        recipe: one of FP8_RECIPES.
        layers: one of FP8_LAYERS, see `fp8_skip_reason`.
        skip: name of a linear layer to the reason why it is to stay in 16 bits, or None.
        emulated: the same rounding on any device, the products in fp32 (on a CPU under autocast: in bf16). Slower.

    Returns:
        What was done, ready for JSON: recipe, layers, emulated, `converted` and `kept` (one row for layers that differ
        in a number of their name alone: name, inputs, outputs, count and, for those kept, why) and `converted_share`
        of the parameters of all linear layers.

    Raises:
        SettingsError: no layer is converted.
    """
    rows: dict[str, dict[tuple, int]] = {"converted": {}, "kept": {}}
    parameters = {"converted": 0, "kept": 0}
    converted_names = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        shape = (module.in_features, module.out_features)
        why = skip(name) or fp8_skip_reason(recipe, *shape, layers)
        kind = "kept" if why else "converted"
        key = (re.sub(r"\b\d+\b", "*", name), *shape, why)
        rows[kind][key] = rows[kind].get(key, 0) + 1
        parameters[kind] += module.weight.numel()
        if not why:
            converted_names.add(name)
    if not converted_names:
        reasons = "; ".join(f"{name}: {why}" for name, _, _, why in rows["kept"])
        raise SettingsError(
            f"--precision fp8 has no layer to convert ({reasons or 'no linear layers'}); use --precision bf16"
            + (" or --fp8_layers all" if layers == "large" else "")
        )
    import_torchao("torchao.float8").convert_to_float8_training(
        model, module_filter_fn=lambda module, name: name in converted_names, config=fp8_config(recipe, emulated)
    )
    if emulated:  # torchao casts the input itself, but asks for CUDA's autocast alone
        for name, module in model.named_modules():
            if name in converted_names:
                module.register_forward_pre_hook(cast_as_autocast)
    named = ("name", "inputs", "outputs", "why")
    return {
        "recipe": recipe,
        "layers": layers,
        "emulated": emulated,
        "converted_share": round(parameters["converted"] / sum(parameters.values()), 4),
        **{
            kind: [
                {field: value for field, value in zip(named, key, strict=True) if value} | {"count": count}
                for key, count in found.items()
            ]
            for kind, found in rows.items()
        },
    }


def cast_as_autocast(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A linear layer's input in the type that autocast would give it (a forward hook)."""
    kind = inputs[0].device.type
    return (inputs[0].to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else inputs


def describe_fp8(record: dict[str, Any]) -> str:
    """What `convert_to_fp8` returned, as one line for the log."""

    def listed(kind: str) -> str:
        words = [
            f"{row['count']} x {row['name']} ({row['inputs']} to {row['outputs']}"
            + (f": {row['why']})" if "why" in row else ")")
            for row in record[kind]
        ]
        return ", ".join(words) or "none"

    emulated = " (emulated: its time and memory say nothing about FP8)" if record["emulated"] else ""
    return (
        f"fp8 {record['recipe']}{emulated}: {record['converted_share']:.1%} of the linear layers' parameters, "
        f"{listed('converted')}; in 16 bits: {listed('kept')}"
    )


@dataclass
class Settings:
    """Settings of `python precision.py`."""

    width: int = setting(1024, "width of the square matrices that are multiplied")
    repeats: int = setting(10, "timed products for each precision")


def main() -> int:
    """Time a matrix product in every precision and compare it with the product in fp64."""
    settings = parse_settings(Settings)
    if settings.width < 1 or settings.repeats < 1:
        raise SettingsError("--width and --repeats must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(settings.width, settings.width, generator=generator).to(device) for _ in range(2))
    exact = left.double() @ right.double()
    print(f"{'precision':<24}{'ms':>9}{'TFLOP/s':>10}{'relative error':>17}")
    for precision in PRECISIONS:
        reason = unsupported_reason(precision, device)
        if reason is not None:
            print(f"{precision:<24}{reason}")
            continue
        set_precision(precision, device)

        def multiply(precision: str = precision) -> torch.Tensor:
            with autocast(precision, device):
                return left @ right

        cost = measure(multiply, device, repeats=settings.repeats)
        print(row(precision, cost.ms, settings.width, relative_error([multiply()], [exact])))
    missing = importlib.util.find_spec("torchao") is None
    if missing or settings.width % FP8_MULTIPLE:
        reason = f"needs a width that {FP8_MULTIPLE} divides, not {settings.width}"
        print(f"{'fp8':<24}{fp8_unsupported_reason(device, True, True) if missing else reason}")
        return 0
    for recipe in FP8_RECIPES:
        emulated = fp8_unsupported_reason(device, True, False) is not None
        layer = nn.Sequential(nn.Linear(settings.width, settings.width, bias=False, device=device))
        layer[0].weight = nn.Parameter(right.T.to(torch.bfloat16).contiguous())
        convert_to_fp8(layer, recipe, emulated=emulated)
        inputs = left.to(torch.bfloat16)
        milliseconds = None
        if not emulated:
            layer = torch.compile(layer, fullgraph=True)
            forward = functools.partial(layer, inputs)
            milliseconds = measure(forward, device, repeats=settings.repeats, compiled=True).ms
        print(row(f"fp8 {recipe}", milliseconds, settings.width, relative_error([layer(inputs)], [exact])))
        if emulated and recipe == FP8_RECIPES[-1]:
            print("fp8 was emulated: this machine has no FP8 units, so there is no time to show")
    return 0


def row(name: str, milliseconds: float | None, width: int, error: float) -> str:
    """A line of the table; without a time there is no rate."""
    if milliseconds is None:
        return f"{name:<24}{'-':>9}{'-':>10}{error:>17.1e}"
    return f"{name:<24}{milliseconds:>9.3f}{2 * width**3 / milliseconds / 1e9:>10.2f}{error:>17.1e}"


if __name__ == "__main__":
    run_script(main)
