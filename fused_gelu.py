"""The MLP's GELU in one kernel with its bias, the gradient of the bias made on the way; or made again, not kept.

    python fused_gelu.py                                        plain against fused and recomputed, with errors
    python fused_gelu.py --tokens 4096 --width 1024             other sizes
    python llm_train.py --gelu fused                            train with it

Between the two products of an MLP (width to 4 x width and back) lie a bias and GELU(x) = x Phi(x). PyTorch keeps two
tensors of tokens x 4 width for the backward pass, GELU's input and its output (which the second product needs for its
weight's gradient), and reads the largest gradient of a block twice: for GELU's gradient and for the sum over the tokens
that is the gradient of the bias.

plain       nn.GELU; the reference.
fused       one kernel forward; one backward, which sums the bias's gradient while it makes GELU's. Keeps the same.
recomputed  fused, and the backward pass makes GELU's output again, for one more write: 8 x width bytes a token and
            block less in 16 bits (16 in fp32). The block at work has it, beside two gradients of its size: where the
            peak is there and not in the loss, two blocks' worth less is saved.

The result is the plain one within rounding. In 16 bits Phi comes from a polynomial with an absolute error below 3e-7
that shares its exponential with the derivative; in fp32 it is erf itself. The kernels are Triton; without a GPU
PyTorch's operators compute the same, one after the other: that takes more time. It does not help where the products
take nearly all the time (wide models); recomputed saves little beside blocks that are checkpointed as a whole.

Source of the polynomial: Abramowitz and Stegun 1964, Handbook of Mathematical Functions, 7.1.26. Recomputing cheap
operators only: Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, 2205.05198.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from precision import AUTOCAST_DTYPES, autocast, set_precision
from technique_bench import Cost, Study, compare, measure
from utils import GIB, SettingsError, parse_settings, run_script, setting

GELUS = ("plain", "fused", "recomputed")
ROWS, COLUMNS, STEP_ROWS, WARPS = 128, 512, 4, 4  # of a program: its rows, its columns, rows at a time, its warps


@cache
def triton_kernels() -> tuple[Callable[..., None], Callable[..., None]]:
    """Forward and backward kernel launchers; a program has ROWS rows of COLUMNS columns."""
    import triton
    from triton import language as tl

    @triton.jit
    def normal_cdf(x, EXACT: tl.constexpr):
        """Phi(x) and exp(-x^2 / 2), both fp32."""
        bell = tl.exp(-0.5 * x * x)
        if EXACT:
            phi = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
        else:
            t = 1.0 / (1.0 + 0.2316418882663604 * tl.abs(x))  # 0.3275911 / sqrt(2)
            tail = 0.530702715 * t - 0.7265760135  # halves of the published coefficients: erfc / 2 is the tail
            tail = tail * t + 0.7107068705
            tail = tail * t - 0.142248368
            tail = (tail * t + 0.127414796) * t * bell
            phi = tl.where(x < 0, tail, 1.0 - tail)
        return phi, bell

    @triton.jit
    def bias_gelu_kernel(
        values_pointer, bias_pointer, result_pointer, count, width,
        EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP_ROWS: tl.constexpr,
    ):  # fmt: skip
        across = tl.cdiv(width, COLUMNS)  # programs side by side; one axis, because the second ends at 65,535
        columns = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
        bias = tl.load(bias_pointer + columns, mask=columns < width, other=0.0).to(tl.float32)
        for begin in range(0, ROWS, STEP_ROWS):
            rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + begin + tl.arange(0, STEP_ROWS)
            places = rows[:, None] * width + columns[None, :]
            inside = (rows < count)[:, None] & (columns < width)[None, :]
            x = tl.load(values_pointer + places, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
            phi, _ = normal_cdf(x, EXACT)
            tl.store(result_pointer + places, x * phi, mask=inside)

    @triton.jit
    def bias_gelu_backward_kernel(
        gradient_pointer, values_pointer, bias_pointer, result_pointer, gelu_pointer, sums_pointer, count, width,
        EXACT: tl.constexpr, AGAIN: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP_ROWS: tl.constexpr,
    ):  # fmt: skip
        across = tl.cdiv(width, COLUMNS)  # programs side by side; one axis, because the second ends at 65,535
        columns = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
        bias = tl.load(bias_pointer + columns, mask=columns < width, other=0.0).to(tl.float32)
        sums = tl.zeros((STEP_ROWS, COLUMNS), dtype=tl.float32)
        for begin in range(0, ROWS, STEP_ROWS):
            rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + begin + tl.arange(0, STEP_ROWS)
            places = rows[:, None] * width + columns[None, :]
            inside = (rows < count)[:, None] & (columns < width)[None, :]
            x = tl.load(values_pointer + places, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
            gradient = tl.load(gradient_pointer + places, mask=inside, other=0.0).to(tl.float32)
            phi, bell = normal_cdf(x, EXACT)
            if AGAIN:
                tl.store(gelu_pointer + places, x * phi, mask=inside)
            gradient *= phi + x * bell * 0.3989422804014327  # 1 / sqrt(2 pi)
            tl.store(result_pointer + places, gradient, mask=inside)
            sums += gradient
        place = (tl.program_id(0) // across).to(tl.int64) * width + columns
        tl.store(sums_pointer + place, tl.sum(sums, axis=0), mask=columns < width)

    def sizes(*tensors: torch.Tensor) -> tuple[int, int, int, tuple[int], dict[str, Any]]:
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError("the kernels of GELU need contiguous tensors")
        count, width = tensors[0].shape
        down = triton.cdiv(count, ROWS)
        blocks = {"ROWS": ROWS, "COLUMNS": COLUMNS, "STEP_ROWS": STEP_ROWS, "num_warps": WARPS}
        constants = blocks | {"EXACT": tensors[0].dtype == torch.float32}
        return count, width, down, (triton.cdiv(width, COLUMNS) * down,), constants

    def forward(values: torch.Tensor, bias: torch.Tensor, result: torch.Tensor) -> None:
        count, width, _, grid, constants = sizes(values, bias)
        bias_gelu_kernel[grid](values, bias, result, count, width, **constants)

    def backward(
        gradient: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, result: torch.Tensor, gelu: torch.Tensor
    ) -> torch.Tensor:
        count, width, down, grid, constants = sizes(values, bias, gradient)
        sums = torch.empty(down, width, dtype=torch.float32, device=values.device)
        tensors = (gradient, values, bias, result, gelu, sums)
        bias_gelu_backward_kernel[grid](*tensors, count, width, AGAIN=gelu.numel() > 0, **constants)
        return sums.sum(0)

    return forward, backward


# Operators of their own, so that torch.compile leaves them whole. Every tensor is contiguous, (rows, columns).


@torch.library.custom_op("memory_lab::bias_gelu", mutates_args=())
def bias_gelu_operator(values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU(values + bias) in the dtype of the values, computed in fp32."""
    if values.is_cuda and values.numel():
        result = torch.empty_like(values)
        with torch.cuda.device(values.device):
            triton_kernels()[0](values, bias, result)
        return result
    return F.gelu(values.float() + bias.float()).to(values.dtype)


@bias_gelu_operator.register_fake
def _(values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values)


@torch.library.custom_op("memory_lab::bias_gelu_backward", mutates_args=())
def bias_gelu_backward_operator(
    gradient: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the values (their dtype) and of the bias (its dtype), and GELU's output if `again`, else empty."""
    gelu = torch.empty_like(values) if again else values.new_empty(0)
    if values.is_cuda and values.numel():
        result = torch.empty_like(values)
        with torch.cuda.device(values.device):
            sums = triton_kernels()[1](gradient, values, bias, result, gelu)
        return result, sums.to(bias.dtype), gelu
    x = values.float() + bias.float()
    if again:
        gelu = F.gelu(x).to(values.dtype)
    result = torch.ops.aten.gelu_backward(gradient.float(), x)
    return result.to(values.dtype), result.sum(0).to(bias.dtype), gelu


@bias_gelu_backward_operator.register_fake
def _(
    gradient: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gelu = torch.empty_like(values) if again else values.new_empty(0)
    return torch.empty_like(values), torch.empty_like(bias), gelu


class BiasGelu(torch.autograd.Function):
    """GELU(values + bias); keeps the values."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """values (rows, columns), bias (columns,) -> (rows, columns)"""
        ctx.save_for_backward(values, bias)
        return bias_gelu_operator(values, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, bias = ctx.saved_tensors
        return bias_gelu_backward_operator(gradient.contiguous(), values, bias, False)[:2]


class BiasGeluLinear(torch.autograd.Function):
    """GELU(values + bias) @ weight.T + second_bias; keeps the values and makes GELU's output again."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, second_bias: torch.Tensor
    ) -> torch.Tensor:
        """values (rows, inside), bias (inside,), weight (columns, inside), second_bias (columns,) -> (rows, columns)"""
        ctx.save_for_backward(values, bias, weight)
        ctx.second_dtype = second_bias.dtype
        gelu = bias_gelu_operator(values, bias)
        return torch.addmm(second_bias.to(gelu.dtype), gelu, weight.to(gelu.dtype).T)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values, bias, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        inner = gradient @ weight.to(gradient.dtype)
        grad_values, grad_bias, gelu = bias_gelu_backward_operator(inner, values, bias, True)
        grad_weight = (gradient.T @ gelu).to(weight.dtype)
        return grad_values, grad_bias, grad_weight, gradient.sum(0, dtype=torch.float32).to(ctx.second_dtype)


def mlp(hidden_states: torch.Tensor, expand: nn.Linear, contract: nn.Linear, gelu: str) -> torch.Tensor:
    """contract(GELU(expand(hidden_states))).

    Args:
        hidden_states: (..., width).
        expand, contract: with biases; width -> inside -> width. Under autocast they run in its type. Unless plain,
            their weights are used and their hooks are not called.
        gelu: plain, fused or recomputed; the latter two can be differentiated once.

    Returns:
        (..., width).

    Raises:
        SettingsError: another `gelu`.
    """
    if gelu not in GELUS:
        raise SettingsError(f"gelu {gelu} is unknown; choose one of {', '.join(GELUS)}")
    if gelu == "plain":
        return contract(F.gelu(expand(hidden_states)))
    shape = hidden_states.shape
    values = F.linear(hidden_states.reshape(-1, shape[-1]), expand.weight)
    with torch.autocast(values.device.type, enabled=False):
        if gelu == "recomputed":
            result = BiasGeluLinear.apply(values, expand.bias, contract.weight, contract.bias)
            return result.view(*shape[:-1], contract.out_features)
        between = BiasGelu.apply(values, expand.bias)
    return contract(between).view(*shape[:-1], contract.out_features)


def kept_bytes_per_token(gelu: str, width: int, activation_bytes: int) -> int:
    """Bytes a token and block between the two products that live until the backward pass."""
    return (1 if gelu == "recomputed" else 2) * 4 * width * activation_bytes


# --------------------------------------------------------------------------------------------------------------------
# The technique alone
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Settings of `python fused_gelu.py`."""

    tokens: int | None = setting(None, "tokens in the batch (default: 32,000, 2,048 without a GPU)")
    width: int | None = setting(None, "width of the hidden states (default: 768, 128 without a GPU)")
    num_layers: int = setting(4, "MLPs one after another")
    precision: str | None = setting(None, "fp32 or bf16 (default: bf16, fp32 without a GPU)", ["fp32", "bf16"])
    use_compile: bool | None = setting(None, "also compiled variants (default: with a GPU)")
    repeats: int = setting(20, "timed steps of each variant")
    output_folder: str = setting("outputs", "folder of all results")


class MLPs(nn.Module):
    """num_layers times x + mlp(x)."""

    def __init__(self, num_layers: int, width: int):
        super().__init__()
        self.expand = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(num_layers))
        self.contract = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(num_layers))

    def forward(self, hidden: torch.Tensor, gelu: str) -> torch.Tensor:
        """(tokens, width) -> (tokens, width)"""
        for expand, contract in zip(self.expand, self.contract, strict=True):
            hidden = hidden + mlp(hidden, expand, contract, gelu)
        return hidden


class Problem:
    """MLPs and hidden states of one size, and a step that makes every gradient."""

    def __init__(self, tokens: int, width: int, num_layers: int, precision: str, device: torch.device):
        torch.manual_seed(0)
        self.model = MLPs(num_layers, width).to(device)
        self.hidden = torch.randn(tokens, width).to(device).requires_grad_()
        self.precision, self.device = precision, device

    def result(self, function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        """Output and the gradients of the hidden states and of every parameter, for the gradient 2 x output."""
        self.hidden.grad = None
        self.model.zero_grad()
        with autocast(self.precision, self.device):
            output = function(self.model, self.hidden)
        output.float().square().sum().backward()
        return [output.detach(), self.hidden.grad, *(parameter.grad for parameter in self.model.parameters())]

    def cost(
        self, function: Callable[..., torch.Tensor], repeats: int, warm_up: int = 2, compiled: bool = False
    ) -> Cost:
        """Peak and time of forward and backward pass."""

        def step() -> None:
            self.result(function)
            self.hidden.grad = None
            self.model.zero_grad()

        self.model.register_buffer("hidden", self.hidden.detach(), persistent=False)
        return measure(step, self.device, roots=(self.model,), repeats=repeats, warm_up=warm_up, compiled=compiled)


def main() -> int:
    """Plain against fused and recomputed: peak, time and error; then the tokens from which on fused pays."""
    settings = parse_settings(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    for name, values in {"tokens": (2048, 32000), "width": (128, 768)}.items():
        if getattr(settings, name) is None:
            setattr(settings, name, values[gpu])
    settings.precision = settings.precision or ("bf16" if gpu else "fp32")
    settings.use_compile = gpu if settings.use_compile is None else settings.use_compile
    for name in ("tokens", "width", "num_layers", "repeats"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    set_precision(settings.precision, device)
    study = Study("fused_gelu", settings, device)
    sizes = (settings.tokens, settings.width, settings.num_layers)
    problem = Problem(*sizes, settings.precision, device)
    activation = 2 if settings.precision in AUTOCAST_DTYPES else 4

    def variant(gelu: str) -> Callable[..., torch.Tensor]:
        return lambda model, hidden: model(hidden, gelu)

    found = {gelu: variant(gelu) for gelu in GELUS}
    if settings.use_compile:
        found |= {f"{gelu}, compiled": torch.compile(variant(gelu)) for gelu in GELUS}
    exact = Problem(*sizes, "fp32", device).result(found["plain"])
    plain = [tensor.clone() for tensor in problem.result(found["plain"])]
    for name, function in found.items():
        exactness, error = compare(problem.result(function), plain, exact)
        compiled = "compiled" in name
        cost = problem.cost(function, settings.repeats, compiled=compiled)
        if name == "plain":
            study.add(name, cost, error=error)
            continue
        kept = [kept_bytes_per_token(gelu, settings.width, activation) for gelu in ("plain", name.split(",")[0])]
        study.add(
            name,
            cost,
            baseline="plain, compiled" if compiled and name != "plain, compiled" else "plain",
            exactness=exactness,
            error=error,
            formula_saved_gib=(kept[0] - kept[1]) * settings.tokens * (settings.num_layers - 2) / GIB,
        )

    def faster(tokens: int) -> bool:
        here = Problem(tokens, settings.width, settings.num_layers, settings.precision, device)
        plain, fused = (here.cost(variant(gelu), 5, 1) for gelu in ("plain", "fused"))
        return fused.status == "ok" and (plain.status == "oom" or fused.ms < plain.ms)

    counts = [settings.tokens // 2**power for power in range(6, -1, -1)]
    counts = [count for count in counts if count >= 16]
    if counts:
        study.ask(f"fused is faster at width {settings.width:,}", "tokens", faster, counts, settings.tokens // 64 or 16)
    return study.finish()


if __name__ == "__main__":
    run_script(main)
