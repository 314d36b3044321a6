"""The loss without all the logits: a chunk of tokens at a time, with its gradients made on the way.

    python cross_entropy.py                                     full against chunked on this machine, with errors
    python cross_entropy.py --tokens 4096 --vocab_size 50000    other sizes
    python llm_train.py --loss chunked                          train with it

The head turns hidden states (tokens, width) into logits (tokens, vocabulary), and the loss of each token needs its row
alone. Held all at once, the logits cost 12 bytes each at the peak: the log-probabilities, the gradient of the loss by
them, and the gradient of the logits, all in fp32 (under autocast 2 more for the 16-bit logits while fp32 copies are
made). For 32,000 tokens and 32,000 entries that is 11.4 GiB, the peak of the whole training step.

chunked  PyTorch alone: for `chunk_tokens` tokens at a time the logits, the losses, and at once the gradients of the
         hidden states and of the head's weight, which is all that the backward pass needs. No product is computed
         twice. Peak: 6 bytes a logit of one chunk (4 compiled), the gradient of the hidden states and an fp32 gradient
         of the weight.
fused    liger-kernel's fused linear cross entropy: the same idea with a Triton kernel (a GPU), its own chunk size.
full     the reference: every logit at once.

The result is that of `full` within rounding: fp32 sums come in another order; in 16 bits the gradient of the logits is
rounded before it is scaled by 1 / tokens instead of after. It does not help where the logits are not the peak: a small
vocabulary, few tokens, or so many layers that their activations outweigh it. Without gradients (an evaluation) no
gradient is made, and all that lives is one chunk of logits and their log-probabilities in fp32.

PyTorch 2.13 and newer has the same idea as F.linear_cross_entropy(..., options=LinearCrossEntropyOptions()); the script
measures it where it is there. Source: Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models, arXiv
2411.09009; Hsu et al. 2024, Liger Kernel, arXiv 2410.10989.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from precision import AUTOCAST_DTYPES, autocast, set_precision
from technique_bench import Cost, Study, compare, measure
from utils import GIB, SettingsError, parse_settings, run_script, setting

LOSSES = ("full", "chunked", "fused")
CHUNK_TOKENS = 2048


def unsupported_reason(loss: str, device: torch.device) -> str | None:
    """Why this loss cannot run on this device; None if it can."""
    if loss != "fused":
        return None
    if device.type != "cuda":
        return "liger-kernel's kernels are Triton and need a GPU; take --loss chunked"
    if find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (uv sync --extra liger); or take --loss chunked"
    return None


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """The reference, on logits that exist: in fp32 whatever their dtype.

    Args:
        logits: (..., vocabulary).
        targets: (...) int64.
        reduction: mean or sum.

    Returns:
        fp32 scalar, nats.
    """
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction=reduction)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    loss: str,
    reduction: str = "mean",
    chunk_tokens: int = CHUNK_TOKENS,
    compiled: bool = False,
) -> torch.Tensor:
    """The head's product and the loss in one, without all the logits at once.

    Args:
        hidden_states: (..., width), what the head would be given.
        weight: (vocabulary, width), the head's.
        targets: (...) int64 in [0, vocabulary), one for each hidden state; there is no index to ignore.
        loss: chunked or fused. Under autocast the products run in its type, as the head's would.
        reduction: mean or sum.
        chunk_tokens: rows of logits that live at a time (chunked; liger-kernel chooses its own).
        compiled: a fused kernel for the softmax of a chunk instead of PyTorch's operators one by one (chunked).

    Returns:
        Scalar in nats: fp32, or fp64 without gradients (chunked). Its backward pass may run once.

    Raises:
        SettingsError: this loss cannot run here.
    """
    hidden_states, targets = hidden_states.flatten(0, -2), targets.flatten()
    device = hidden_states.device
    reason = unsupported_reason(loss, device)
    if reason is not None:
        raise SettingsError(f"--loss {loss} cannot run here: {reason}")
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if not torch.is_grad_enabled():  # a parameter would still ask for its gradient
        hidden_states, weight = hidden_states.detach(), weight.detach()
    with torch.autocast(device.type, enabled=False):
        if loss == "fused":
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            # The sum, divided below: the mean would divide the gradient of the logits while it is in 16 bits, where
            # fp16 loses most of it before any gradient scaler can help.
            total = liger_fused_linear_cross_entropy(
                hidden_states.to(dtype), weight.to(dtype), targets, reduction="sum", accum_dtype=torch.float32
            )
        else:
            total = ChunkedCrossEntropy.apply(hidden_states, weight, targets, dtype, chunk_tokens, compiled)
    return total / len(targets) if reduction == "mean" else total


def softmax_gradient(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The losses of a chunk; its logits become their own gradient: softmax - one-hot, not yet scaled.

    Args:
        logits: (chunk, vocabulary), overwritten.
        targets: (chunk,) int64.

    Returns:
        (chunk,) fp32, nats.
    """
    work = logits.float()  # a copy unless the logits are fp32 already
    work -= work.amax(dim=1, keepdim=True)
    losses = -work.gather(1, targets[:, None])[:, 0]
    work.exp_()
    sums = work.sum(dim=1, keepdim=True)
    losses += sums[:, 0].log()
    work /= sums
    work.scatter_add_(1, targets[:, None], torch.full_like(sums, -1.0))
    if work is not logits:
        logits.copy_(work)
    return losses


def softmax_gradient_for_compile(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`softmax_gradient` written so that the compiler makes two passes over the 16-bit logits and no fp32 copy."""
    work = logits.float()
    picked = work.gather(1, targets[:, None])[:, 0]
    log_sums = work.logsumexp(dim=1)
    one_hot = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    logits.copy_((work - log_sums[:, None]).exp() - one_hot.float())
    return log_sums - picked


SCALE_ELEMENTS = 2**22  # that are scaled at a time
BLOCK, WARPS = 16384, 16  # columns that a program of the kernel holds at a time, and its warps


@cache
def triton_softmax_gradient() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`softmax_gradient` as one Triton kernel, a row a program; the second time a row is read it is in the cache."""
    import triton
    from triton import language as tl

    @triton.jit
    def chunk_loss_kernel(logits_pointer, targets_pointer, losses_pointer, vocab_size, stride, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        logits_pointer += row * stride
        target = tl.load(targets_pointer + row)
        picked = tl.load(logits_pointer + target).to(tl.float32)
        largest = -float("inf")
        total = 0.0
        for begin in range(0, vocab_size, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            values = tl.load(logits_pointer + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
            before = largest
            largest = tl.maximum(largest, tl.max(values, axis=0))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(values - largest), axis=0)
        log_sum = tl.log(total) + largest
        tl.debug_barrier()  # every thread has read its row, and `picked`, before any overwrites it
        for begin in range(0, vocab_size, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            inside = columns < vocab_size
            values = tl.load(logits_pointer + columns, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(values - log_sum) - tl.where(columns == target, 1.0, 0.0)
            tl.store(logits_pointer + columns, gradient, mask=inside)
        tl.store(losses_pointer + row, log_sum - picked)

    def run(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
        chunk_loss_kernel[(len(logits),)](
            logits, targets, losses, logits.shape[1], logits.stride(0), BLOCK=block, num_warps=WARPS
        )
        return losses

    return run


@cache
def triton_scale() -> Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]:
    """values * factor in one pass, in place or into another dtype; PyTorch's own reads a factor on the GPU slowly."""
    import triton
    from triton import language as tl

    @triton.jit
    def chunk_scale_kernel(source_pointer, result_pointer, factor_pointer, count, BLOCK: tl.constexpr):
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < count
        values = tl.load(source_pointer + places, mask=inside).to(tl.float32)
        tl.store(result_pointer + places, values * tl.load(factor_pointer), mask=inside)

    def run(values: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        result = values if values.dtype == dtype else torch.empty_like(values, dtype=dtype)
        programs = (triton.cdiv(values.numel(), 4096),)
        chunk_scale_kernel[programs](values, result, factor, values.numel(), BLOCK=4096, num_warps=8)
        return result

    return run


def scale(values: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values * factor, rounded once, in place where the dtype stays."""
    if values.dtype != dtype:
        return torch.mul(values, factor, out=torch.empty_like(values, dtype=dtype))
    if dtype == torch.float32:
        return values.mul_(factor)
    for part in values.view(-1).split(SCALE_ELEMENTS):  # mul_ would first round a factor on the GPU to 16 bits
        part.copy_(part.float().mul_(factor))
    return values


@cache
def compiled_softmax_gradient(device_type: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The Triton kernel on a GPU, what torch.compile makes on a CPU."""
    if device_type == "cuda":
        return triton_softmax_gradient()
    return torch.compile(softmax_gradient_for_compile, fullgraph=True)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the tokens' losses; both gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
        chunk_tokens: int,
        compiled: bool,
    ) -> torch.Tensor:
        """hidden_states (tokens, width), weight (vocabulary, width), targets (tokens,) -> fp32 scalar."""
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        gradient = compiled_softmax_gradient(weight.device.type) if compiled else softmax_gradient
        head = weight.to(dtype)
        with_gradients = need_hidden or need_weight
        total = torch.zeros((), dtype=torch.float32 if with_gradients else torch.float64, device=weight.device)
        grad_hidden = None
        if need_hidden:
            grad_hidden = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        grad_weight = None  # summed in fp32 over the chunks, whatever the parameters are
        for begin in range(0, len(hidden_states), chunk_tokens):
            rows = slice(begin, begin + chunk_tokens)
            inputs = hidden_states[rows].to(dtype)
            logits = inputs @ head.T  # (chunk, vocabulary)
            if not with_gradients:
                total += F.cross_entropy(logits.float(), targets[rows], reduction="sum")
                continue
            total += gradient(logits, targets[rows]).sum()  # logits hold their gradient now
            if grad_hidden is not None:
                grad_hidden[rows] = logits @ head
            if need_weight:
                grad_weight = add_product(grad_weight, logits.T, inputs)
            del logits  # otherwise they would live beside those of the next chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.compiled, ctx.used = weight.dtype, compiled, False
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale what the forward pass made, in place."""
        if ctx.used:
            raise RuntimeError("the backward pass of the chunked loss can run once: it scales its gradients in place")
        ctx.used = True
        grad_hidden, grad_weight = ctx.saved_tensors
        multiply = triton_scale() if ctx.compiled and grad_output.is_cuda else scale
        if grad_hidden is not None:
            grad_hidden = multiply(grad_hidden, grad_output, grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = multiply(grad_weight, grad_output, ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """total + left @ right in fp32, in place.

    On a GPU the product of 16-bit matrices is not rounded in between (PyTorch 2.8 and newer). Elsewhere that of bf16
    matrices is, and fp16 matrices, whose product could overflow, are multiplied in fp32.

    Args:
        total: (rows, columns) fp32; None begins a sum.
        left: (rows, inner), right: (inner, columns), both of one dtype.
    """
    if left.dtype == torch.float32:
        return left @ right if total is None else total.addmm_(left, right)
    if left.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        if total is None:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    product = left.float() @ right.float() if left.dtype == torch.float16 else left @ right
    return product.float() if total is None else total.add_(product)


# --------------------------------------------------------------------------------------------------------------------
# The technique alone
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Settings of `python cross_entropy.py`."""

    tokens: int | None = setting(None, "tokens in the batch (default: 32,000, 2,048 without a GPU)")
    width: int | None = setting(None, "width of the hidden states (default: 768, 128 without a GPU)")
    vocab_size: int | None = setting(None, "entries of the vocabulary (default: 32,000, 8,000 without a GPU)")
    chunk_tokens: int | None = setting(None, "tokens whose logits live at a time (default: 2,048, 256 without a GPU)")
    precision: str | None = setting(None, "fp32 or bf16 (default: bf16, fp32 without a GPU)", ["fp32", "bf16"])
    use_compile: bool | None = setting(None, "also compiled variants (default: with a GPU)")
    repeats: int = setting(10, "timed steps of each variant")
    output_folder: str = setting("outputs", "folder of all results")


def recomputed(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
    """The loss in chunks under torch.utils.checkpoint: every PyTorch has it, and the head's product runs twice."""

    def of_chunk(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return cross_entropy(F.linear(rows, weight), wanted, "sum")

    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return sum(checkpoint(of_chunk, *piece, use_reentrant=False) for piece in pieces) / len(targets)


def built_in(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
    """PyTorch's own (2.13 and newer); it does not cast under autocast by itself."""
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return F.linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets, options=options)


def variants(settings: Settings, device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    """Name -> function of (hidden states, weight, targets), in the order of the table."""
    chunk = settings.chunk_tokens

    def full(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(F.linear(hidden, weight), targets)

    def of(loss: str, compiled: bool = False, tokens: int = chunk) -> Callable[..., torch.Tensor]:
        return lambda hidden, weight, targets: linear_cross_entropy(
            hidden, weight, targets, loss=loss, chunk_tokens=tokens, compiled=compiled
        )

    found = {"full": full, "chunked": of("chunked"), f"chunked, {4 * chunk:,} tokens": of("chunked", tokens=4 * chunk)}
    found["chunks recomputed (checkpoint)"] = lambda *tensors: recomputed(*tensors, chunk)
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy"] = lambda *tensors: built_in(*tensors, chunk)
    if unsupported_reason("fused", device) is None:
        found["fused (liger-kernel)"] = of("fused")
    else:
        print(f"fused: {unsupported_reason('fused', device)}")
    if settings.use_compile:
        found["full, compiled"] = torch.compile(full)
        found["chunked, compiled"] = of("chunked", compiled=True)
        found[f"chunked, compiled, {4 * chunk:,} tokens"] = of("chunked", compiled=True, tokens=4 * chunk)
    return found


class Problem:
    """Hidden states, weight and targets of one size, and a step that makes the loss and both gradients."""

    def __init__(self, tokens: int, width: int, vocab_size: int, precision: str, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
        # 2 / sqrt(width): logits with a standard deviation of 2, losses like those of a model in training
        weight = torch.randn(vocab_size, width, generator=generator) * 2 / width**0.5
        self.weight = weight.to(device).requires_grad_()
        self.targets = torch.randint(vocab_size, (tokens,), generator=generator).to(device)
        self.precision, self.device = precision, device

    def result(self, function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        """Loss, gradient of the hidden states and gradient of the weight."""
        self.hidden.grad = self.weight.grad = None
        with autocast(self.precision, self.device):
            loss = function(self.hidden, self.weight, self.targets)
        loss.backward()
        return [loss.detach(), self.hidden.grad, self.weight.grad]

    def cost(
        self, function: Callable[..., torch.Tensor], repeats: int, warm_up: int = 2, compiled: bool = False
    ) -> Cost:
        """Peak and time of the loss and its backward pass."""

        def step() -> None:
            self.result(function)
            self.hidden.grad = self.weight.grad = None

        module = torch.nn.Module()
        module.weight, module.hidden = (
            torch.nn.Parameter(self.weight.detach()),
            torch.nn.Parameter(self.hidden.detach()),
        )
        return measure(step, self.device, roots=(module,), repeats=repeats, warm_up=warm_up, compiled=compiled)


def bytes_at_peak(variant: str, tokens: int, width: int, vocab_size: int, chunk: int, half: bool) -> float:
    """The formula: bytes above hidden states, weight and targets that a variant of the table needs at its peak."""
    unit = 2 if half else 4
    copies = 2 * vocab_size * width + 2 * tokens * width if half else 0
    gradients = 4 * vocab_size * width + 4 * tokens * width
    if variant == "full":
        return 12 * tokens * vocab_size + copies
    logits = chunk * vocab_size * ((unit + 4) if half else 4)
    return logits + gradients + (2 * vocab_size * width if half else 0)


def main() -> int:
    """Full against chunked: peak, time and error; then the vocabulary from which on chunks pay."""
    settings = parse_settings(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    defaults = {"tokens": (2048, 32000), "width": (128, 768), "vocab_size": (8000, 32000), "chunk_tokens": (256, 2048)}
    for name, values in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, values[gpu])
    settings.precision = settings.precision or ("bf16" if gpu else "fp32")
    settings.use_compile = gpu if settings.use_compile is None else settings.use_compile
    for name in (*defaults, "repeats"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    set_precision(settings.precision, device)
    study = Study("cross_entropy", settings, device)
    sizes = (settings.tokens, settings.width, settings.vocab_size)
    problem = Problem(*sizes, settings.precision, device)
    half = settings.precision in AUTOCAST_DTYPES
    found = variants(settings, device)

    exact = Problem(*sizes, "fp32", device).result(found["full"])
    full = [tensor.clone() for tensor in problem.result(found["full"])]
    formula = bytes_at_peak("full", *sizes, settings.chunk_tokens, half)
    for name, function in found.items():
        exactness, error = compare(problem.result(function), full, exact)
        chunk = settings.chunk_tokens * (4 if f"{4 * settings.chunk_tokens:,}" in name else 1)
        saved = None
        if name.startswith("chunked"):
            saved = (formula - bytes_at_peak("chunked", *sizes, chunk, half)) / GIB
        cost = problem.cost(function, settings.repeats, compiled="compiled" in name)
        if name == "full":
            study.add(name, cost, error=error)
        else:
            compiled = "compiled" in name and name != "full, compiled"
            base = "full, compiled" if compiled else "full"
            saved = None if compiled else saved  # the formula of `full` is not that of the compiled one
            study.add(name, cost, baseline=base, exactness=exactness, error=error, formula_saved_gib=saved)
    peak_and_time = {}

    def costs(tokens: int, vocab_size: int) -> list[Cost]:
        if (tokens, vocab_size) not in peak_and_time:
            here = Problem(tokens, settings.width, vocab_size, settings.precision, device)
            peak_and_time[tokens, vocab_size] = [here.cost(found[name], 3, 1) for name in ("full", "chunked")]
        return peak_and_time[tokens, vocab_size]

    def saves_memory(vocab_size: int) -> bool:
        whole, pieces = costs(settings.tokens, vocab_size)
        return pieces.status == "ok" and (whole.status == "oom" or pieces.peak_gib < 0.9 * whole.peak_gib)

    def saves_time(tokens: int) -> bool:
        whole, pieces = costs(tokens, settings.vocab_size)
        return pieces.status == "ok" and (whole.status == "oom" or pieces.ms < whole.ms)

    vocabularies = [settings.vocab_size // 2**power for power in range(7, -1, -1)]
    question = f"chunked needs at least 10 % less memory at {settings.tokens:,} tokens"
    study.ask(question, "entries", saves_memory, [size for size in vocabularies if size >= 16], 16)
    counts = [settings.tokens // 2**power for power in range(6, -1, -1)]
    question = f"chunked is faster at {settings.vocab_size:,} entries"
    study.ask(question, "tokens", saves_time, [count for count in counts if count >= 16], settings.tokens // 64 or 16)
    return study.finish(lambda name: name.startswith(("chunked", "fused")))  # what the trainer uses


if __name__ == "__main__":
    run_script(main)
