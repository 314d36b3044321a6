"""Optimizers that hold less: 8-bit states, bf16 parameters with or without a master copy, the step inside backward.

    python optimizers.py                              every variant on a stack of linear layers: bytes, time, difference
    python optimizers.py --num_layers 128 --width 1024   134 M parameters, the default with a GPU

What training holds beside the activations, bytes a parameter (parameters + gradients + states):

    adamw, adam                  4 + 4 + 8 = 16     in backward 12   two fp32 moments
    adamw_8bit                   4 + 4 + 2 = 10     in backward  6   moments as 8-bit codes, a scale for 256 of them
    adamw, bf16_master           2 + 2 + 12 = 16    in backward 14   fp32 master copy and moments: no byte saved alone
    adamw, bf16_stochastic       2 + 2 + 4 = 8      in backward  6   everything bf16, written with stochastic rounding
    adamw_8bit, bf16_stochastic  2 + 2 + 2 = 6      in backward  4

bf16 keeps 8 bits of mantissa: an update below 1/512 of a weight is rounded away, and with beta2 = 0.999 the second
moment stands still too. Stochastic rounding goes up with the probability of what was cut off, so the mean is kept.
"In backward" steps each parameter as soon as its gradient is complete and drops the gradient: no two gradients coexist.

When it does not help: where the activations are the peak. The saving is fixed, bytes x parameters, and in-backward
saves nothing once the gradients fit into the space the freed activations leave. bf16_master saves activations (the
model computes in bf16 without autocast's copies), not states. Only in-backward and adamw's own variants are exact.

Sources: Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861 (torchao's AdamW8bit);
Zamirai et al. 2020, Revisiting BFloat16 Training, arXiv 2010.06192; Lv et al. 2023 (LOMO), arXiv 2306.09782.
"""

import functools
import gc
import importlib.util
import os
import shutil
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

import precision
from low_precision_adamw import LowPrecisionAdamW, to_bfloat16
from run_folder import StepClock
from technique_bench import Cost, Study, measure, relative_error
from utils import GIB, SettingsError, parse_settings, percentile, run_script, setting

OPTIMIZERS = ("adamw", "adam", "adamw_8bit")
PARAMETERS = ("fp32", "bf16_master", "bf16_stochastic")


def unsupported_reason(name: str, parameters: str, in_backward: bool, device: torch.device) -> str | None:
    """Why this choice cannot run here, a sentence that ends with what to change; None if it can.

    Args:
        in_backward: part of the choice; every optimizer here can run in backward, so it is never the reason.
    """
    if name not in OPTIMIZERS or parameters not in PARAMETERS:
        return f"optimizer {name} with parameters {parameters} is unknown; choose {OPTIMIZERS} and {PARAMETERS}"
    if name == "adam" and parameters != "fp32":
        return f"{parameters} is an AdamW step (decoupled weight decay), adam has none; use --optimizer adamw"
    if name == "adamw_8bit" and parameters == "bf16_master":
        return (
            "adamw_8bit keeps no fp32 master copy; use --parameters bf16_stochastic or fp32, or bf16_master with adamw"
        )
    if parameters != "fp32" and (reason := precision.unsupported_reason("bf16", device)) is not None:
        return f"{reason}; use --parameters fp32"
    if name == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
        return "adamw_8bit needs the torchao package; install it with: uv sync --extra torchao"
    triton = name == "adamw_8bit" or parameters != "fp32"
    if device.type == "cuda" and triton and importlib.util.find_spec("triton") is None:
        return "the optimizer's kernel needs the triton package (part of PyTorch on Linux); use --optimizer adamw"
    if device.type == "cuda" and triton and not has_compiler("CC", "gcc", "clang", "cc"):
        return "Triton needs a C compiler to start its kernels; install gcc, or use --optimizer adamw in fp32"
    if device.type == "cpu" and name == "adamw_8bit" and not has_compiler("CXX", "g++", "clang++"):
        return "torchao compiles adamw_8bit's step with a C++ compiler and there is none; install g++"
    return None


def has_compiler(variable: str, *commands: str) -> bool:
    """Whether the compiler an environment variable names, or else one of the usual commands, is there."""
    wanted = (os.environ[variable].split()[0],) if os.environ.get(variable, "").strip() else commands
    return any(shutil.which(command) for command in wanted)


def make_optimizer(
    name: str,
    model_parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    device: torch.device,
    parameters: str = "fp32",
    in_backward: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer, whose `state` holds all it keeps.

    Args:
        name: adamw (one fused kernel on a GPU), adam (the decay as L2, as in the plwiki lab) or adamw_8bit.
        model_parameters: on `device`, without gradients; with bf16_* they become bf16 here, in place.
        parameters: fp32, bf16_master (the fp32 values go on as the master copy) or bf16_stochastic.
        in_backward: see OptimizerInBackward, also for what it cannot be combined with.

    Raises:
        SettingsError: the choice makes no sense or cannot run here.
    """
    reason = unsupported_reason(name, parameters, in_backward, device)
    if reason is not None:
        raise SettingsError(reason)
    model_parameters = list(model_parameters)
    if name == "adamw_8bit" and not any(p.numel() >= 4096 and p.numel() % 256 == 0 for p in model_parameters):
        raise SettingsError(
            "--optimizer adamw_8bit has no effect: torchao keeps states of tensors below 4,096 numbers, or of a number "
            "that 256 does not divide, in full, and this model has no others; use --optimizer adamw"
        )
    options = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "adamw_8bit":
        if parameters == "bf16_stochastic":
            for parameter in model_parameters:
                to_bfloat16(parameter)
        optimizer = adamw_8bit_class()(
            model_parameters, **options, bf16_stochastic_round=parameters == "bf16_stochastic"
        )
    elif parameters != "fp32":
        optimizer = LowPrecisionAdamW(model_parameters, **options, master=parameters == "bf16_master")
    elif name == "adamw":
        optimizer = torch.optim.AdamW(model_parameters, **options, fused=device.type == "cuda")
    else:
        optimizer = torch.optim.Adam(model_parameters, **options)
    return OptimizerInBackward(optimizer) if in_backward else optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Change the learning rate of every group; where it is a tensor (torchao's), that tensor is filled."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def state_bytes_per_parameter(name: str, parameters: str, in_backward: bool) -> float:
    """Bytes held for a parameter between backward and step: itself, its gradient, its states.

    In backward no gradient is held (at the peak there is one, of one tensor). 8-bit states have one fp32 scale for 256
    codes; their 1 KiB table a state and the tensors below 4096 elements, which stay whole, are left out.
    """
    value = 4 if parameters == "fp32" else 2
    moment = 1 + 4 / 256 if name == "adamw_8bit" else 2 if parameters == "bf16_stochastic" else 4
    return value + (0 if in_backward else value) + 2 * moment + (4 if parameters == "bf16_master" else 0)


# --------------------------------------------------------------------------------------------------------------------
# 8-bit states, and the step inside backward
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def adamw_8bit_class() -> type[torch.optim.Optimizer]:
    """torchao's AdamW8bit, made to run under the memory tracker.

    Its states are subclasses of Tensor that wrap uint8 codes, fp32 scales (one for 256) and a table of 256 values; only
    tensors of 4096 elements or more that 256 divides get them. Its step is compiled by torch.compile, tensor shape by
    tensor shape, when it first runs, and lr is a tensor: change it with `param_groups[0]["lr"].fill_()`.
    """
    AdamW8bit = precision.import_torchao("torchao.optim").AdamW8bit
    warnings.filterwarnings("ignore", message="OptimState8bit does not implement")  # a hint to torchao's authors

    class TrackedAdamW8bit(AdamW8bit):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            """One step. torch.compile refuses to run under a counting mode, so it is left for that long."""
            counters = _get_current_dispatch_mode_stack()
            with _disable_current_modes():
                super().step(closure)
            for counter in (counter for counter in counters if hasattr(counter, "add_all")):
                counter.add_all((self,))  # the states made in the first step

    return TrackedAdamW8bit


class OptimizerInBackward(torch.optim.Optimizer):
    """Runs an optimizer's step for each parameter within the backward pass and drops the gradient at once.

    No two gradients coexist: 4 bytes a parameter less (2 in bf16); under FSDP those of a block do. The result is
    bitwise that of the same optimizer after the backward pass. `step()` does nothing, `state`, `param_groups`,
    `state_dict` and `load_state_dict` are the inner optimizer's. Every backward pass is a step, so whoever trains must
    refuse accumulation over micro-batches, gradient clipping (no norm over all gradients is ever known) and fp16's
    gradient scaler (it would be skipped).

    Args:
        inner: steps all its parameters; hooks call it for one at a time, until this object is deleted.
    """

    def __init__(self, inner: torch.optim.Optimizer):
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        super().__init__(parameters, {})
        self.inner, self.state, self.param_groups = inner, inner.state, inner.param_groups
        self.place = {p: index for index, group in enumerate(inner.param_groups) for p in group["params"]}
        reference = weakref.ref(self)  # a parameter must not keep its former optimizer's states alive

        def hook(parameter: torch.Tensor) -> None:
            reference().step_parameter(parameter)

        for parameter in parameters:
            handle = parameter.register_post_accumulate_grad_hook(hook)
            weakref.finalize(self, handle.remove)

    def step_parameter(self, parameter: torch.Tensor) -> None:
        """The inner optimizer's step for one parameter, whose gradient is dropped."""
        groups = self.inner.param_groups
        self.inner.param_groups = [{**groups[self.place[parameter]], "params": [parameter]}]
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = groups
        parameter.grad = None

    def step(self, closure: Any = None) -> None:
        """Nothing: the backward pass has made the step."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self.state, self.param_groups = self.inner.state, self.inner.param_groups


# --------------------------------------------------------------------------------------------------------------------
# What each saves and costs
# --------------------------------------------------------------------------------------------------------------------

VARIANTS = (  # optimizer, parameters, in backward
    ("adamw", "fp32", False),
    ("adam", "fp32", False),
    ("adamw_8bit", "fp32", False),
    ("adamw", "fp32", True),
    ("adamw", "bf16_master", False),
    ("adamw", "bf16_stochastic", False),
    ("adamw_8bit", "bf16_stochastic", False),
    ("adamw", "bf16_stochastic", True),
    ("adamw_8bit", "bf16_stochastic", True),
)
COMPARED_STEPS = 10
ROUNDING = 1e-4  # largest relative error of a tensor's change that fp32 rounding explains over those steps
SMALL = 0.05  # a saving below this part of the peak is called none


@dataclass
class Settings:
    """Settings of `python optimizers.py`."""

    num_layers: int | None = setting(None, "linear layers (default: 128 with a GPU, 32 without)")
    width: int | None = setting(None, "width of a layer (default: 1024 with a GPU, 256 without)")
    batch_size: int = setting(16, "tokens in a batch of the table; few, so that the optimizer is what is seen")
    break_even_layers: int | None = setting(None, "layers for the break-even questions (default: all, 4 without a GPU)")
    repeats: int = setting(5, "timed steps")
    learning_rate: float = setting(0.001, "learning rate")
    weight_decay: float = setting(0.1, "weight decay")
    output_folder: str = setting("outputs", "folder of all results")


class Stack(nn.Module):
    """Residual linear layers of one width; hidden states (tokens, width)."""

    def __init__(self, num_layers: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_layers))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = hidden_states + layer(F.gelu(hidden_states)) / len(self.layers) ** 0.5
        return hidden_states


@dataclass
class Trial:
    """A stack with one variant's optimizer, the same initial weights and data for all of them."""

    settings: Settings
    device: torch.device
    variant: tuple[str, str, bool]
    num_layers: int
    tokens: int

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (2, self.tokens, self.settings.width)
        torch.manual_seed(0)
        self.model = Stack(self.num_layers, self.settings.width).to(self.device)
        name, parameters, in_backward = self.variant
        self.optimizer = make_optimizer(
            name,
            self.model.parameters(),
            learning_rate=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            device=self.device,
            parameters=parameters,
            in_backward=in_backward,
        )
        dtype = next(self.model.parameters()).dtype
        self.inputs, self.targets = torch.randn(shape, generator=generator).to(self.device, dtype)
        self.before, self.after, self.steps = self.values(), [], 0

    def values(self) -> list[torch.Tensor]:
        """A copy of the weights on the host, in fp32: the master copy where there is one."""
        kept = [self.optimizer.state.get(p, {}).get("master", p) for p in self.model.parameters()]
        return [value.detach().to("cpu", torch.float32, copy=True) for value in kept]

    def forward_and_backward(self) -> None:
        (self.model(self.inputs) - self.targets).square().mean().backward()

    def step(self) -> None:
        self.forward_and_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.steps == COMPARED_STEPS:
            self.after = self.values()

    def measure(self, warm_up: int, repeats: int) -> Cost:
        roots = (self.model, self.optimizer)
        return measure(self.step, self.device, roots=roots, warm_up=warm_up, repeats=repeats)

    def optimizer_alone_ms(self) -> float:
        """Median of the optimizer's step on gradients that stay."""
        self.forward_and_backward()
        clock = StepClock(self.device)
        for _ in range(self.settings.repeats):
            clock.start()
            self.optimizer.step()
            clock.stop()
        return percentile(clock.read(), 50)

    def change(self) -> list[torch.Tensor]:
        """What the first COMPARED_STEPS steps changed each weight by."""
        return [after - before for after, before in zip(self.after, self.before, strict=True)]


def clean_up(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    """One row a variant, then from how many tokens on two of them no longer pay."""
    settings = parse_settings(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    defaults = {"num_layers": (32, 128), "width": (256, 1024)}
    defaults["break_even_layers"] = (4, settings.num_layers or 128)
    for name, values in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, values[on_gpu])
    if min(settings.num_layers, settings.break_even_layers, settings.batch_size, settings.repeats) < 1:
        raise SettingsError("--num_layers, --break_even_layers, --batch_size and --repeats must be at least 1")
    if settings.width < 64:
        raise SettingsError("--width must be at least 64: smaller weights have no 8-bit states")
    study = Study("optimizers", settings, device)
    count = settings.num_layers * settings.width**2
    print(f"{count:,} parameters in {settings.num_layers} tensors, {settings.batch_size} tokens in a batch")
    reference: list[torch.Tensor] = []
    for variant in VARIANTS:
        name, parameters, in_backward = variant
        words = f"{name}{'' if parameters == 'fp32' else ' ' + parameters}{' in backward' if in_backward else ''}"
        baseline = "adamw" if study.rows else None
        saved = (state_bytes_per_parameter(*VARIANTS[0]) - state_bytes_per_parameter(*variant)) * count / GIB
        reason = unsupported_reason(*variant, device)
        if reason is not None:
            study.add(words, Cost("unsupported"), baseline=baseline, formula_saved_gib=saved, note=reason)
            continue
        trial = Trial(settings, device, variant, settings.num_layers, settings.batch_size)
        cost = trial.measure(COMPARED_STEPS, settings.repeats)
        exactness, error, note = None, None, ""
        if cost.status == "ok":
            note = "" if in_backward else f"step alone {trial.optimizer_alone_ms():.2f} ms"
            if baseline is None:
                reference = trial.change()
            elif reference:
                error = relative_error(trial.change(), reference)
                exactness = "bitwise" if error == 0 else "within rounding" if error < ROUNDING else "changed"
        del trial
        clean_up(device)
        study.add(
            words,
            cost,
            exactness=exactness,
            error=error,
            baseline=baseline,
            formula_saved_gib=saved if baseline else None,
            note=note,
        )

    @functools.cache
    def peak(variant: tuple[str, str, bool], tokens: int) -> float:
        cost = Trial(settings, device, variant, settings.break_even_layers, tokens).measure(2, 1)
        clean_up(device)
        if cost.status != "ok":
            raise SettingsError(f"out of memory with {tokens} tokens; lower --break_even_layers or --width")
        return cost.peak_gib

    for variant, words in ((VARIANTS[3], "the step inside backward"), (VARIANTS[2], "8-bit states")):
        if unsupported_reason(*variant, device) is not None:
            continue
        study.ask(
            f"saving of {words}: less than {SMALL:.0%} of the peak with weights {settings.width} x {settings.width}",
            "tokens in a batch",
            lambda tokens, variant=variant: 1 - peak(variant, tokens) / peak(VARIANTS[0], tokens) < SMALL,
            [settings.width * 2**power // 4 for power in range(8)],
            settings.width // 8,
        )
    study.save(parameters=count, compared_steps=COMPARED_STEPS)
    return 0


if __name__ == "__main__":
    run_script(main)
