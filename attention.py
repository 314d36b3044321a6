"""Attention behind one function: the textbook form, PyTorch's fused kernels, flash-attn, varlen and flex attention.

    python attention.py                          what runs here, what cannot and why, then a 20-second table
    python attention.py --context_length 2048    longer sequences
    python attention_benchmark.py                the whole comparison, with controls

Textbook attention writes the scores of every query with every key: layers x heads x context bytes a token, 6 times over
under autocast (an fp32 softmax and its 16-bit copy), which grows with the square of the context. A fused kernel
(FlashAttention) works on tiles in fast memory and keeps only the output and one log-sum-exp a query: 4 bytes a head and
token. It computes the same function.

A window (left, right) lets query i see the keys i - left ... i + right, both ends included, so (64, 0) is 65 keys. Over
a fused kernel a window saves compute and no memory at all, and only where it skips whole tiles of 128: at a context of
256 a window of 64 skips none. It needs a kernel made for it: `flash_attn`, `varlen` (part of PyTorch) or `flex`.
`eager` masks the scores it holds anyway and serves as the reference; PyTorch's scaled_dot_product_attention has no
window, and a mask in its place would switch its flash kernel off, so asking for one is an error here.

Which backend runs where, and what `auto` picks, is in `attention_support.py`.

Sources: Dao 2023, FlashAttention-2, arXiv 2307.08691; Beltagy et al. 2020, Longformer, arXiv 2004.05150 (windows).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attention_kernels import (
    KernelObserver,
    eager_attention,
    flash_attn_attention,
    flex_attention,
    observe_kernel,
    sdpa_attention,
    use_flash_implementation,
    varlen_attention,
)
from attention_support import (
    BACKENDS,
    FLASH_IMPLEMENTATIONS,
    FULL,
    SDPA_KERNELS,
    SHARES_HEADS,
    WINDOWED,
    WITHOUT_DROPOUT,
    choose_backend,
    flash_attn_error,
    flash_attn_wheel,
    unsupported_reason,
    window_refusal,
)
from memory_tracker import MemoryTracker
from run_folder import StepClock
from short_attention import short_attention
from utils import SettingsError, device_name, is_out_of_memory, parse_settings, percentile, run_script, setting

# --------------------------------------------------------------------------------------------------------------------
# The seam: every model of the lab calls one of these two functions
# --------------------------------------------------------------------------------------------------------------------


KERNEL_ERRORS = (RuntimeError, ImportError, ValueError, TypeError, AttributeError)  # what a kernel's refusal looks like


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    backend: str,
    causal: bool = True,
    window: tuple[int, int] = FULL,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """softmax(q k^T x scale) v with one layout for every backend.

    Args:
        q, k, v: (batch, tokens, heads, head_dim), all three of one shape; or k and v with fewer heads, each of which
            num_heads / num_kv_heads heads of q look at (GQA). SHARES_HEADS read them as they are, in 16 bits; for every
            other backend k and v are repeated: (2 x num_heads x head_dim) numbers a token more.
        backend: one of BACKENDS, which runs or raises (nothing else is put in its place), or auto, which takes what
            `choose_backend` says. `observe_kernel` tells the caller which kernel ran.
        causal: a query sees no later key.
        window: (left, right) keys before and after; -1 is unlimited.
        dropout_p: probability of dropping an attention weight (pass 0 in evaluation).
        softmax_scale: 1 / sqrt(head_dim) if None.

    Returns:
        (batch, tokens, heads, head_dim), in the dtype of q (eager and SDPA under autocast: the autocast type).

    Raises:
        SettingsError: an unknown backend or one that cannot run here with these tensors: reason and remedy.
    """
    if q.shape != k.shape or q.shape != v.shape or q.dim() != 4:
        fewer_heads = q.dim() == 4 and k.shape == v.shape == (*q.shape[:2], k.shape[2], q.shape[3])
        if not fewer_heads or k.shape[2] < 1 or q.shape[2] % k.shape[2]:
            shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
            raise SettingsError(
                "attention wants q, k and v of one shape (batch, tokens, heads, head_dim), or k and v with a number of "
                f"heads that divides q's, not {shapes}"
            )
    if backend == "auto":
        q, k, v = (x.to(_kernel_dtype(x)) for x in (q, k, v))  # as autocast does for PyTorch's own kernels
        backend = _auto(q, (q, k, v), causal, window, dropout_p, packed=False)
    if window != FULL and backend in BACKENDS and backend not in WINDOWED:
        raise SettingsError(window_refusal(backend))
    if dropout_p > 0 and backend in WITHOUT_DROPOUT:
        raise SettingsError(unsupported_reason(backend, q.device, q.dtype, window, q.shape[-1], dropout_p=dropout_p))
    # In fp32 a GPU has one fused kernel, which cannot share; PyTorch would take the unfused form without a word.
    shares = backend in SHARES_HEADS and not (q.is_cuda and q.dtype == torch.float32)
    if k.shape[2] != q.shape[2] and not shares:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    try:
        if backend == "eager":
            return eager_attention(q, k, v, causal, window, dropout_p, softmax_scale)
        if backend == "flash_attn":
            return flash_attn_attention(q, k, v, causal, window, dropout_p, softmax_scale)
        if backend == "flex":
            return flex_attention(q, k, v, causal, window, softmax_scale)
        if backend == "short":
            return short_attention(torch.stack((q, k, v), dim=2), causal, softmax_scale)
        if backend == "sdpa" or backend in SDPA_KERNELS or backend == "varlen":
            use_flash_implementation(None)
            if backend == "varlen":
                return varlen_attention(q, k, v, causal, window, softmax_scale)
            return sdpa_attention(backend, q, k, v, causal, dropout_p, softmax_scale)
        if backend in FLASH_IMPLEMENTATIONS:
            reason = None if q.is_cuda else _refusal(backend, q, k, v, causal, window, dropout_p)
            if reason is not None:  # without this check PyTorch's CPU kernel would answer in its place
                raise SettingsError(f"attention_backend {backend} cannot run here: {reason}")
            use_flash_implementation(FLASH_IMPLEMENTATIONS[backend][0])
            if window != FULL:
                return varlen_attention(q, k, v, causal, window, softmax_scale)
            return sdpa_attention("sdpa_flash", q, k, v, causal, dropout_p, softmax_scale)
    except (torch.OutOfMemoryError, SettingsError):
        raise
    except KERNEL_ERRORS as error:
        # Only now, when it went wrong, is it worth the time to find out why.
        reason = _refusal(backend, q, k, v, causal, window, dropout_p)
        if reason is None and any(x.stride(-1) != 1 for x in (q, k, v)):
            reason = "the numbers of a head must lie side by side in memory; copy q, k and v with .contiguous() first"
        if reason is None:
            raise
        raise SettingsError(f"attention_backend {backend} cannot run here: {reason}") from error
    raise SettingsError(f"attention_backend {backend} is unknown; choose one of auto, {', '.join(BACKENDS)}")


def flash_attn_runs() -> bool:
    """Whether flash-attn can be imported; a constant for torch.compile (`prepare_for_compile`)."""
    return flash_attn_error() is None


def profiled_kernel(step: Callable[[], Any], *, compiled: bool) -> str:
    """The attention operators that a training step runs, compiled or not (`observe_kernel` cannot see into the former).

    Args:
        step: forward and backward pass.
        compiled: what to call products and a softmax that no fused operator stands for.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    names = {event.key for event in profile.key_averages()} - {"aten::scaled_dot_product_attention"}  # it only chooses
    chosen = {name for name in names if any(sign in name for sign in KernelObserver.SIGNS)}
    fused = sorted(name.replace("::", ".") for name in chosen if "backward" not in name.lower())
    return ", ".join(fused) or f"matmul, softmax, matmul ({'compiled' if compiled else 'eager'})"


def prepare_for_compile() -> None:
    """Let torch.compile take the answer of `flash_attn_runs` instead of tracing the imports that it tries.

    Called before compiling, and not at import: it loads the compiler, which takes seconds.
    """
    torch.compiler.assume_constant_result(flash_attn_runs)


def packed_attention(
    qkv: torch.Tensor,
    *,
    backend: str,
    causal: bool = True,
    window: tuple[int, int] = FULL,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """`attention` on one tensor (batch, tokens, 3, heads, head_dim), as one linear layer makes it.

    flash-attn and `short` have a kernel for this layout that writes one gradient tensor; for every other backend
    autograd joins the three gradients, a copy of 12 bytes read and written for each of heads x head_dim x tokens in 16
    bits. Options and result as in `attention`.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise SettingsError(f"packed_attention wants (batch, tokens, 3, heads, head_dim), not {tuple(qkv.shape)}")
    if backend == "auto":
        qkv = qkv.to(_kernel_dtype(qkv))
        backend = _auto(qkv, (qkv,), causal, window, dropout_p, packed=True)
    in_place = backend == "flash_attn" and flash_attn_runs()
    if in_place or (backend == "short" and window == FULL and dropout_p == 0):
        try:
            if backend == "short":
                return short_attention(qkv, causal, softmax_scale)
            from flash_attn import flash_attn_qkvpacked_func

            return flash_attn_qkvpacked_func(
                qkv,
                dropout_p=dropout_p,
                softmax_scale=softmax_scale,
                causal=causal,
                window_size=window,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )
        except torch.OutOfMemoryError:
            raise
        except KERNEL_ERRORS as error:
            reason = _refusal(backend, qkv, qkv, qkv, causal, window, dropout_p)
            if reason is None:
                raise
            raise SettingsError(f"attention_backend {backend} cannot run here: {reason}") from error
    q, k, v = qkv.unbind(2)
    return attention(
        q, k, v, backend=backend, causal=causal, window=window, dropout_p=dropout_p, softmax_scale=softmax_scale
    )


def _kernel_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which x reaches a kernel: that of autocast where it is on (which leaves fp64 alone)."""
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def _auto(x, inputs, causal, window, dropout_p, packed):
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return choose_backend(
        x.device,
        _kernel_dtype(x),
        window,
        x.shape[-1],
        tokens=x.shape[1],
        causal=causal,
        packed=packed,
        dropout_p=dropout_p,
        training=training,
    )[0]


def _refusal(backend, q, k, v, causal, window, dropout_p):
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    return unsupported_reason(
        backend,
        q.device,
        _kernel_dtype(q) if backend.startswith("sdpa") else q.dtype,
        window,
        q.shape[-1],
        causal=causal,
        dropout_p=dropout_p,
        training=training,
        tokens=q.shape[1],
    )


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Settings of `python attention.py`."""

    batch_size: int | None = setting(None, "sequences (default: 16 on a GPU, 4 without)")
    context_length: int | None = setting(None, "tokens in a sequence (default: 1024 on a GPU, 512 without)")
    num_heads: int = setting(12, "heads")
    head_dim: int = setting(64, "width of a head")
    dtype: str = setting("bf16", "of q, k and v", ["bf16", "fp16", "fp32"])
    seconds: float = setting(20.0, "time for the table, shared by the backends that run (compilation comes on top)")


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def print_support(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Print for each backend whether it can train here, or why not; returns those that can."""
    version = f"torch {torch.__version__}, CUDA {torch.version.cuda}" if device.type == "cuda" else torch.__version__
    print(f"{device_name(device)}, {version}")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        print(f"compute capability {major}.{minor}, cuDNN {torch.backends.cudnn.version()}")
    able = []
    for backend, what in BACKENDS.items():
        reason = unsupported_reason(backend, device, dtype, FULL, head_dim)
        if reason is None:
            able.append(backend)
        print(f"  {backend:<15}{'runs: ' + what if reason is None else 'cannot run: ' + reason}")
    if flash_attn_error() is not None:
        print(f"  flash-attn package: {flash_attn_error()}")
        print(f"  its wheel for this Python and torch, if there is one, is called {flash_attn_wheel()}")
    for label, window in (("no window", FULL), ("a window", (64, 0))):
        choice, why = choose_backend(device, dtype, window, head_dim, tokens=1024)
        print(f"  auto with {label} (context 1024, training): {choice} ({why})")
    return able


def main() -> int:
    """Print what can run here and why not, then time forward and backward of each backend against an fp32 reference."""
    settings = parse_settings(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size, context_length = (16, 1024) if device.type == "cuda" else (4, 512)
    batch_size = batch_size if settings.batch_size is None else settings.batch_size
    context_length = context_length if settings.context_length is None else settings.context_length
    if min(batch_size, context_length, settings.num_heads, settings.head_dim) < 1:
        raise SettingsError("--batch_size, --context_length, --num_heads and --head_dim must be at least 1")
    if not (settings.seconds > 0 and math.isfinite(settings.seconds)):
        raise SettingsError("--seconds must be positive")
    dtype = DTYPES[settings.dtype]
    shape = (batch_size, context_length, settings.num_heads, settings.head_dim)
    able = print_support(device, dtype, settings.head_dim)

    try:
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
        first = [x[:1].float() for x in inputs[:3]]
        reference = eager_attention(*first, True, FULL, 0.0, None)  # of the first sequence
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reference = None
    if reference is None:
        raise SettingsError("the reference does not fit into memory; lower --context_length or --batch_size")
    print(f"\n{settings.dtype}, causal, batch {shape[0]}, context {shape[1]}, {shape[2]} heads of {shape[3]}")
    print(f"{'':<15}{'forward and backward, ms':>26}")
    print(f"{'backend':<15}{'median':>10}{'20th-80th':>16}{'n':>6}{'peak MiB':>10}{'out error':>10}  kernel")
    for backend in able:
        try:
            print(table_row(backend, inputs, reference, settings.seconds / len(able)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            print(f"{backend:<15}{'oom':>10}")
    return 0


def table_row(backend: str, inputs: list[torch.Tensor], reference: torch.Tensor, seconds: float) -> str:
    """One line of the table: time over `seconds`, peak above the inputs, error in the first sequence."""
    device = inputs[0].device
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    with observe_kernel() as observer:
        error = (attention(q, k, v, backend=backend)[:1].float() - reference).abs().max().item()
    attention(q, k, v, backend=backend).backward(inputs[3])  # warms up, compiles
    q.grad = k.grad = v.grad = None
    tracker = MemoryTracker(device)
    with tracker.step(1), tracker.phase("attention"):
        attention(q, k, v, backend=backend).backward(inputs[3])
    row = tracker.summary()["attention"]
    peak = 1024 * (row["peak_allocated_gib"] - row["start_allocated_gib"])
    clock, times, end = StepClock(device), [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        q.grad = k.grad = v.grad = None
        clock.start()
        attention(q, k, v, backend=backend).backward(inputs[3])
        clock.stop()
        times += clock.read()
    spread = f"{percentile(times, 20):.2f}-{percentile(times, 80):.2f}"
    return (
        f"{backend:<15}{percentile(times, 50):>10.2f}{spread:>16}{len(times):>6}{peak:>10.1f}{error:>10.1e}"
        f"  {observer.name}"
    )


if __name__ == "__main__":
    run_script(main)
