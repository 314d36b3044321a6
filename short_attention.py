"""Attention for short sequences: one program a head, the whole sequence in one tile, nothing kept but q, k and v.

    python short_attention.py                                  against the other kernels: time, peak, error; from how
                                                               many tokens on they win (an NVIDIA GPU)
    python patchtst_train.py --attention_backend short         in training

FlashAttention's kernels are made for long contexts: they walk over tiles of 64 or 128 keys, round heads narrower than
32 up, keep output and log-sum-exp for the backward pass and need a pass of their own before it. A PatchTST sequence has
42 tokens and heads of 8: one tile, mostly padding. Here a program loads q, k and v of one head once, has all scores in
registers, and writes the output; the backward pass loads them again and makes the gradients of q, k and v in one go,
straight into the packed layout of one linear layer, so that autograd joins nothing.

Kept for the backward pass: q, k and v, 6 x heads x head_dim bytes a token in bf16, and nothing else (flash attention:
8 x heads x head_dim + 4 x heads; textbook attention: 6 x heads x tokens on top).

When it does not help: towards 128 tokens, where the tile no longer fits into registers (more is refused); where the
projections around it take the time. No window, no dropout.

Tried and dropped: 65 to 80 tokens as a tile of 64 and a tail of 16 rows, 6,400 scores a head instead of 16,384. On an
H100 that was no faster for heads of 64, as in `vit.py`.

Method: Dao et al. 2022, FlashAttention, arXiv 2205.14135 (recomputed scores), with one tile.
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from utils import SettingsError, parse_settings, read_rising, run_script, setting

MAX_TOKENS, MAX_HEAD_DIM = 128, 128
HEADS_A_PROGRAM = 1  # of one sequence, one after another
WARPS = {16: 1, 32: 1, 64: 4, 128: 8}  # by the side of the tile


def short_attention_refusal(dtype: torch.dtype, tokens: int, head_dim: int) -> str | None:
    """Why the kernel cannot take this dtype and shape, or nothing at all without Triton; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "short needs the triton package (part of PyTorch on Linux); take attention_backend sdpa"
    return shape_refusal(dtype, tokens, head_dim)


def shape_refusal(dtype: torch.dtype, tokens: int, head_dim: int) -> str | None:
    """Why the tile of a sequence does not fit; None if it does. Without tensor cores, in fp32, less fits."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"short's kernels run in bf16, fp16 or fp32, not {dtype}; change --precision"
    half = dtype != torch.float32
    words = "" if half else " in fp32"
    most_tokens, widest = (MAX_TOKENS, MAX_HEAD_DIM) if half else (MAX_TOKENS // 2, MAX_HEAD_DIM // 2)
    if tokens > most_tokens:
        return f"short takes up to {most_tokens} tokens{words}, not {tokens}; take attention_backend auto"
    if head_dim > widest:
        return f"short takes heads up to {widest} wide{words}, not {head_dim}; change --num_heads or --embedding_dim"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU, as the tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# --------------------------------------------------------------------------------------------------------------------
# The kernels
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def triton_kernels() -> tuple[Callable, Callable]:
    """(forward, backward); made at the first call, because importing Triton takes time and needs Linux."""
    import triton
    import triton.language as tl

    @triton.jit
    def weights_of(q, k, rows, tokens, scale, T: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr):
        """Softmax of the scores of a tile in fp32; rows beyond the sequence hold numbers that nobody reads."""
        scores = tl.dot(q, tl.trans(k), input_precision="ieee" if EXACT else "tf32") * scale
        columns = tl.arange(0, T)
        seen = (columns < tokens)[None, :] & (rows >= 0)[:, None]
        if CAUSAL:
            seen = seen & (rows[:, None] >= columns[None, :])
        scores = tl.where(seen, scores, float("-inf"))
        scores = tl.exp2((scores - tl.max(scores, 1)[:, None]) * 1.4426950408889634)
        return scores / tl.sum(scores, 1)[:, None]

    @triton.jit
    def forward_kernel(
        q_pointer, k_pointer, v_pointer, output_pointer, tokens, heads, scale,
        sequence_stride, token_stride, head_stride, output_sequence, output_token, output_head,
        T: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr,
        CAUSAL: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        groups = tl.cdiv(heads, HEADS)
        sequence = (tl.program_id(0) // groups).to(tl.int64)
        rows, dims = tl.arange(0, T), tl.arange(0, D)
        for number in range(HEADS):
            head = tl.program_id(0) % groups * HEADS + number
            mine = (dims < HEAD_DIM) & (head + dims // HEAD_DIM < heads)  # the last program may have fewer heads
            inside = (rows < tokens)[:, None] & mine[None, :]
            places = sequence * sequence_stride + rows[:, None] * token_stride + head * head_stride + dims[None, :]
            q = tl.load(q_pointer + places, mask=inside, other=0.0)
            k = tl.load(k_pointer + places, mask=inside, other=0.0)
            v = tl.load(v_pointer + places, mask=inside, other=0.0)
            weights = weights_of(q, k, rows, tokens, scale, T, CAUSAL, EXACT)
            output = tl.dot(weights.to(v.dtype), v, input_precision="ieee" if EXACT else "tf32")
            places = sequence * output_sequence + rows[:, None] * output_token + head * output_head + dims[None, :]
            tl.store(output_pointer + places, output.to(v.dtype), mask=inside)

    @triton.jit
    def backward_kernel(
        gradient_pointer, q_pointer, k_pointer, v_pointer, dq_pointer, dk_pointer, dv_pointer, tokens, heads, scale,
        sequence_stride, token_stride, head_stride, gradient_sequence, gradient_token, gradient_head,
        T: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr,
        CAUSAL: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        groups = tl.cdiv(heads, HEADS)
        sequence = (tl.program_id(0) // groups).to(tl.int64)
        rows, dims = tl.arange(0, T), tl.arange(0, D)
        for number in range(HEADS):
            head = tl.program_id(0) % groups * HEADS + number
            mine = (dims < HEAD_DIM) & (head + dims // HEAD_DIM < heads)  # the last program may have fewer heads
            inside = (rows < tokens)[:, None] & mine[None, :]
            places = sequence * sequence_stride + rows[:, None] * token_stride + head * head_stride + dims[None, :]
            q = tl.load(q_pointer + places, mask=inside, other=0.0)
            k = tl.load(k_pointer + places, mask=inside, other=0.0)
            v = tl.load(v_pointer + places, mask=inside, other=0.0)
            theirs = (
                sequence * gradient_sequence + rows[:, None] * gradient_token + head * gradient_head + dims[None, :]
            )
            gradient = tl.load(gradient_pointer + theirs, mask=inside, other=0.0)
            weights = weights_of(q, k, rows, tokens, scale, T, CAUSAL, EXACT)
            dv = tl.dot(tl.trans(weights).to(v.dtype), gradient, input_precision="ieee" if EXACT else "tf32")
            dweights = tl.dot(gradient, tl.trans(v), input_precision="ieee" if EXACT else "tf32")
            dscores = weights * (dweights - tl.sum(weights * dweights, 1)[:, None]) * scale
            dscores = dscores.to(v.dtype)
            dq = tl.dot(dscores, k, input_precision="ieee" if EXACT else "tf32")
            dk = tl.dot(tl.trans(dscores), q, input_precision="ieee" if EXACT else "tf32")
            tl.store(dq_pointer + places, dq.to(v.dtype), mask=inside)
            tl.store(dk_pointer + places, dk.to(v.dtype), mask=inside)
            tl.store(dv_pointer + places, dv.to(v.dtype), mask=inside)

    def constants(qkv: torch.Tensor, causal: bool) -> dict[str, Any]:
        tokens, head_dim = qkv.shape[1], qkv.shape[-1]
        tile = max(16, triton.next_power_of_2(tokens))
        return {
            "T": tile,
            "D": max(16, triton.next_power_of_2(head_dim)),
            "HEAD_DIM": head_dim,
            "HEADS": HEADS_A_PROGRAM,
            "CAUSAL": causal,
            "EXACT": qkv.dtype == torch.float32,
            "num_warps": WARPS[tile],
        }

    def grid(qkv: torch.Tensor) -> tuple[int]:
        return (qkv.shape[0] * triton.cdiv(qkv.shape[3], HEADS_A_PROGRAM),)

    def forward(qkv: torch.Tensor, output: torch.Tensor, causal: bool, scale: float) -> None:
        q, k, v = qkv.unbind(2)
        strides = (q.stride(0), q.stride(1), q.stride(2), output.stride(0), output.stride(1), output.stride(2))
        numbers = (qkv.shape[1], qkv.shape[3], scale)
        forward_kernel[grid(qkv)](q, k, v, output, *numbers, *strides, **constants(qkv, causal))

    def backward(gradient: torch.Tensor, qkv: torch.Tensor, dqkv: torch.Tensor, causal: bool, scale: float) -> None:
        q, k, v = qkv.unbind(2)
        strides = (q.stride(0), q.stride(1), q.stride(2), gradient.stride(0), gradient.stride(1), gradient.stride(2))
        numbers = (qkv.shape[1], qkv.shape[3], scale)
        tensors = (gradient, q, k, v, *dqkv.unbind(2))
        backward_kernel[grid(qkv)](*tensors, *numbers, *strides, **constants(qkv, causal))

    return forward, backward


# Operators of their own, so that torch.compile leaves them whole. Registered by the plain interface of torch.library:
# torch.library.custom_op checks aliases at every call, which costs as much host time as launching the kernel.

torch.library.define("memory_lab::short_attention", "(Tensor qkv, bool causal, float scale) -> Tensor")
torch.library.define(
    "memory_lab::short_attention_backward", "(Tensor gradient, Tensor qkv, bool causal, float scale) -> Tensor"
)


@torch.library.impl("memory_lab::short_attention", ("cuda", "cpu"))
def forward(qkv: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """(sequences, tokens, 3, heads, head_dim) -> (sequences, tokens, heads, head_dim)"""
    if shape_refusal(qkv.dtype, qkv.shape[1], qkv.shape[-1]) is not None or not (qkv.is_cuda or interpreted()):
        raise ValueError(f"short attention has no kernel for {qkv.dtype} {tuple(qkv.shape)} on {qkv.device}")
    qkv = qkv.contiguous()
    output = qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:])
    if qkv.numel():
        triton_kernels()[0](qkv, output, causal, scale)
    return output


@torch.library.impl("memory_lab::short_attention_backward", ("cuda", "cpu"))
def backward(gradient: torch.Tensor, qkv: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """Gradient of the output, and qkv, to the gradient of qkv in one tensor of its shape."""
    qkv = qkv.contiguous()
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    dqkv = torch.empty_like(qkv)
    if qkv.numel():
        triton_kernels()[1](gradient, qkv, dqkv, causal, scale)
    return dqkv


@torch.library.register_fake("memory_lab::short_attention")
def _(qkv: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    return qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:])


@torch.library.register_fake("memory_lab::short_attention_backward")
def _(gradient: torch.Tensor, qkv: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)


def keep(ctx: Any, inputs: tuple[torch.Tensor, bool, float], output: torch.Tensor) -> None:
    qkv, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(qkv)


def differentiate(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    operator = torch.ops.memory_lab.short_attention_backward
    return operator(gradient, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


torch.library.register_autograd("memory_lab::short_attention", differentiate, setup_context=keep)


def short_attention(qkv: torch.Tensor, causal: bool, softmax_scale: float | None = None) -> torch.Tensor:
    """softmax(q k^T x scale) v of short sequences.

    Args:
        qkv: (sequences, tokens, 3, heads, head_dim), bf16, fp16 or fp32; tokens up to MAX_TOKENS.
        causal: a query sees no later key.
        softmax_scale: 1 / sqrt(head_dim) if None.

    Returns:
        (sequences, tokens, heads, head_dim)

    Raises:
        ValueError: no GPU, too many tokens, too wide heads or another dtype.
    """
    scale = qkv.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return torch.ops.memory_lab.short_attention(qkv, causal, scale)


# --------------------------------------------------------------------------------------------------------------------
# The technique alone
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Settings of `python short_attention.py`; the defaults are PatchTST's at batch 512 with 7 channels."""

    sequences: int = setting(3584, "sequences")
    tokens: int = setting(42, "tokens of a sequence")
    num_heads: int = setting(16, "heads")
    head_dim: int = setting(8, "width of a head")
    causal: bool = setting(False, "causal attention")
    precision: str = setting("bf16", "of q, k and v", ["bf16", "fp16", "fp32"])
    backends: str | None = setting(None, "kernels to compare with, separated by commas (default: all that run here)")
    break_even_tokens: str = setting("8,16,24,32,42,49,64,65,96,128", "rising; as many tokens in every batch")
    rounds: int = setting(5, "measurements of each kernel, in turn")
    repeats: int = setting(10, "timed steps of a measurement")
    output_folder: str = setting("outputs", "folder of all results")


def main() -> int:
    """Forward and backward of every kernel for packed q, k and v; then the tokens from which on another one wins."""
    from attention import DTYPES, packed_attention  # which import this file
    from attention_kernels import eager_attention
    from attention_support import BACKENDS, FULL, unsupported_reason
    from technique_bench import Study, clearly_faster, compare, interleaved, middle

    settings = parse_settings(Settings)
    for name in ("sequences", "tokens", "num_heads", "head_dim", "rounds", "repeats"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = read_rising("break_even_tokens", settings.break_even_tokens, most=MAX_TOKENS)
    dtype, causal = DTYPES[settings.precision], settings.causal
    options = {"causal": causal, "tokens": max(settings.tokens, *sizes)}
    refusal = unsupported_reason("short", device, dtype, FULL, settings.head_dim, **options)
    if refusal is not None:
        raise SettingsError(refusal)
    options["tokens"] = settings.tokens
    reasons = {name: unsupported_reason(name, device, dtype, FULL, settings.head_dim, **options) for name in BACKENDS}
    own = [name for name, reason in reasons.items() if reason is None and name not in ("sdpa", "flex")]
    if settings.backends is not None:
        own = settings.backends.split(",")
        wrong = [name for name in own if reasons.get(name, "it is unknown") is not None]
        if wrong:
            raise SettingsError(f"--backends {wrong[0]} cannot run here: {reasons.get(wrong[0], 'it is unknown')}")
    names = list(dict.fromkeys(["eager", *own, "short"]))
    study = Study("short_attention", settings, device)
    shape = f"{settings.sequences:,} sequences of {settings.tokens} tokens, {settings.num_heads} heads of "
    print(f"{shape}{settings.head_dim}, {settings.precision}, {'causal' if causal else 'every key seen'}")

    def problem(sequences: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        shape = (sequences, tokens, 4, settings.num_heads, settings.head_dim)
        qkv, gradient = torch.randn(shape, device=device, generator=generator).to(dtype).split([3, 1], dim=2)
        return qkv.contiguous().requires_grad_(), gradient.squeeze(2).contiguous()

    def result(name: str, qkv: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
        qkv.grad = None
        if name == "exact":
            output = eager_attention(*qkv.unbind(2), causal, FULL, 0.0, None)
        else:
            output = packed_attention(qkv, backend=name, causal=causal)
        output.backward(gradient)
        return [output.detach(), qkv.grad]

    def steps(qkv: torch.Tensor, gradient: torch.Tensor) -> dict[str, tuple[Callable[[], None], tuple[Any, ...]]]:
        def step(name: str) -> Callable[[], None]:
            def run() -> None:
                packed_attention(qkv, backend=name, causal=causal).backward(gradient)
                qkv.grad = None

            return run

        return {name: (step(name), ()) for name in names}

    measure = {"rounds": settings.rounds, "repeats": settings.repeats}
    qkv, gradient = problem(settings.sequences, settings.tokens)
    few = slice(0, max(1, settings.sequences // 16))
    part, part_gradient = qkv[few].detach().clone().requires_grad_(), gradient[few]
    exact = result("exact", part.detach().double().requires_grad_(), part_gradient.double())
    plain = [value.clone() for value in result("eager", part, part_gradient)]
    costs = interleaved(steps(qkv, gradient), device, **measure)
    for name in names:
        exactness, error = compare(result(name, part, part_gradient), plain, exact)
        base = None if name == "eager" else "eager"
        study.add(name, middle(costs[name]), exactness=None if base is None else exactness, error=error, baseline=base)
    times: list[dict[str, Any]] = []

    def overtaken(tokens: int) -> bool:
        many = max(1, settings.sequences * settings.tokens // tokens)
        found = interleaved(steps(*problem(many, tokens)), device, **measure)
        times.append({"tokens": tokens, "sequences": many, "ms": {k: [c.ms for c in v] for k, v in found.items()}})
        best = min((name for name in names if name != "short"), key=lambda name: middle(found[name]).ms or float("inf"))
        return not clearly_faster(found["short"], found[best])

    words = f"another kernel is as fast as short, {settings.num_heads} heads of {settings.head_dim}"
    study.ask(words, "tokens", overtaken, sizes, MAX_TOKENS)
    return study.finish(times=sorted(times, key=lambda row: row["tokens"]))


if __name__ == "__main__":
    sys.modules["short_attention"] = sys.modules[
        "__main__"
    ]  # attention.py imports this file: one copy of the operators
    run_script(main)
