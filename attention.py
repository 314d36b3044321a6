"""Attention behind one function: the textbook form, PyTorch's fused kernels and the flash-attn package.

    python attention.py                          what can run on this machine, what cannot and why, and a small table
    python attention.py --context_length 2048    longer sequences

Textbook attention writes the scores of every query with every key: layers x heads x context bytes a token, 6 times over
under autocast (an fp32 softmax and its 16-bit copy), which grows with the square of the context. A fused kernel
(FlashAttention) works on tiles in fast memory and keeps only the output and one log-sum-exp a query: 4 bytes a head and
token. It computes the same function.

A window (left, right) lets query i see the keys i - left ... i + right, both ends included, so (64, 0) is 65 keys. Over
a fused kernel a window saves compute and no memory at all, and only where it skips whole tiles of 128: at a context of
256 a window of 64 skips none. It needs a kernel made for it: `flash_attn`. `eager` masks the scores it holds anyway and
serves as the reference; PyTorch's scaled_dot_product_attention has no window, and a mask in its place would switch its
flash kernel off, so asking for one is an error here.

Sources: Dao 2023, FlashAttention-2, arXiv 2307.08691; Beltagy et al. 2020, Longformer, arXiv 2004.05150 (windows).
"""

import functools
import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from memory_tracker import MemoryTracker
from utils import SettingsError, parse_settings, percentile, run_script, setting

BACKENDS = ("eager", "sdpa", "sdpa_flash", "flash_attn")
FULL = (-1, -1)  # no window: every key that the causal rule allows
INSTALL_FLASH_ATTN = "install it with `uv sync --extra flash` (Linux, NVIDIA GPU, CUDA 12 or newer)"


@functools.cache
def flash_attn_error() -> str | None:
    """Why the flash-attn package cannot be imported with its kernels; None if it can."""
    try:
        importlib.import_module("flash_attn_2_cuda")
        importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError as error:
        return f"flash-attn is not installed with its kernels ({' '.join(str(error).split())}); {INSTALL_FLASH_ATTN}"
    return None


def unsupported_reason(
    backend: str, device: torch.device, dtype: torch.dtype, window: tuple[int, int] = FULL, head_dim: int = 64
) -> str | None:
    """Why a backend cannot run on this device with these tensors; None if it can.

    Args:
        backend: one of BACKENDS.
        device: where the tensors lie.
        dtype: of q, k and v as they reach the kernel (under autocast: the autocast type).
        window: (left, right) as defined above; -1 is unlimited.
        head_dim: width of a head.
    """
    if window != FULL and backend in ("sdpa", "sdpa_flash"):
        return f"attention_window needs attention_backend flash_attn; {backend} has no window"
    half = dtype in (torch.bfloat16, torch.float16)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if backend == "sdpa_flash" and device.type == "cuda":
        if not half:
            return f"PyTorch's flash kernel runs in bf16 or fp16, not {dtype}; change --precision"
        if capability < (8, 0):
            return f"PyTorch's flash kernel needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        if head_dim > 256:
            return f"PyTorch's flash kernel takes heads up to 256 wide, not {head_dim}"
    if backend == "flash_attn":
        if device.type != "cuda":
            return "flash-attn needs an NVIDIA GPU"
        if flash_attn_error() is not None:
            return flash_attn_error()
        if capability < (8, 0):
            return f"flash-attn needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        if not half:
            return f"flash-attn's kernels run in bf16 or fp16, not {dtype}; change --precision"
        if head_dim > 256 or head_dim % 8:
            return f"flash-attn takes heads up to 256 wide in steps of 8, not {head_dim}"
    return None


def choose_flash_backend(device: torch.device, dtype: torch.dtype, window: tuple[int, int], head_dim: int) -> str:
    """What `--use_flash_attention true` means here: flash-attn if it can run, else PyTorch's own flash kernel.

    Raises:
        SettingsError: neither can run; the sentence holds both reasons.
    """
    reasons = []
    for backend in ("flash_attn", "sdpa_flash"):
        reason = unsupported_reason(backend, device, dtype, window, head_dim)
        if reason is None:
            return backend
        reasons.append(reason)
    raise SettingsError(f"--use_flash_attention true cannot run here: {'; '.join(reasons)}")


def parse_window(text: str | None) -> tuple[int, int]:
    """Read "64,0" as (64, 0); None is no window.

    Raises:
        SettingsError: not two whole numbers from -1 (unlimited) up.
    """
    if text is None:
        return FULL
    try:
        left, right = (int(part) for part in text.strip("() ").split(","))
    except ValueError:
        left = right = -2
    if left < -1 or right < -1:
        raise SettingsError(f"--attention_window {text} is not two whole numbers from -1 up such as 64,0")
    return left, right


@functools.lru_cache(maxsize=8)
def score_bias(
    tokens: int, causal: bool, window: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """(tokens, tokens): 0 where query (row) sees key (column), -inf elsewhere; one definition of causal and window."""
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)[None, :]
    left, right = window
    hidden = torch.zeros(tokens, tokens, dtype=torch.bool, device=device)
    if causal or right >= 0:
        hidden |= distance < -(0 if causal else right)
    if left >= 0:
        hidden |= distance > left
    return torch.zeros(tokens, tokens, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def eager_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    window: tuple[int, int],
    dropout_p: float,
    softmax_scale: float | None,
) -> torch.Tensor:
    """Textbook attention: all scores in memory, softmax in fp32. Shapes as in `attention`."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, heads, tokens, head_dim)
    scores = torch.matmul(q * scale, k.transpose(2, 3))  # (batch, heads, tokens, tokens)
    if causal or window != FULL:
        # Added in place: the backward pass of a sum needs neither operand, so no second score tensor is kept.
        scores.add_(score_bias(q.shape[2], causal, window, scores.dtype, scores.device))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    del scores
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    output = torch.matmul(weights, v)
    return output.transpose(1, 2)  # (batch, tokens, heads, head_dim)


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
        q, k, v: (batch, tokens, heads, head_dim), the same number of tokens.
        backend: one of BACKENDS; it runs or raises, nothing else is put in its place.
        causal: a query sees no later key.
        window: (left, right) keys before and after; -1 is unlimited.
        dropout_p: probability of dropping an attention weight (pass 0 in evaluation).
        softmax_scale: 1 / sqrt(head_dim) if None.

    Returns:
        (batch, tokens, heads, head_dim), in the dtype of q (eager under autocast: the autocast type).

    Raises:
        SettingsError: an unknown backend, or a window that the backend does not have.
    """
    if backend == "eager":
        return eager_attention(q, k, v, causal, window, dropout_p, softmax_scale)
    if backend == "flash_attn":
        from flash_attn import flash_attn_func

        # Reproducible runs ask for it; the price is a slower backward pass at long contexts.
        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash_attn_func(
            q,
            k,
            v,
            dropout_p=dropout_p,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window,
            deterministic=deterministic,
        )
    if backend not in ("sdpa", "sdpa_flash"):
        raise SettingsError(f"attention_backend {backend} is unknown; choose one of {', '.join(BACKENDS)}")
    if window != FULL:
        raise SettingsError(f"attention_window needs attention_backend flash_attn; {backend} has no window")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, heads, tokens, head_dim)
    arguments = {"dropout_p": dropout_p, "is_causal": causal, "scale": softmax_scale}
    if backend == "sdpa_flash":
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            output = F.scaled_dot_product_attention(q, k, v, **arguments)
    else:
        output = F.scaled_dot_product_attention(q, k, v, **arguments)
    return output.transpose(1, 2)  # (batch, tokens, heads, head_dim)


def packed_attention(qkv: torch.Tensor, *, backend: str, **options: Any) -> torch.Tensor:
    """`attention` on one tensor (batch, tokens, 3, heads, head_dim), as one linear layer makes it.

    flash-attn has a kernel for this layout that writes one gradient tensor instead of three that must be joined; every
    other backend gets views of the three parts. Options and result as in `attention`.
    """
    if backend == "flash_attn":
        from flash_attn import flash_attn_qkvpacked_func

        return flash_attn_qkvpacked_func(
            qkv,
            dropout_p=options.get("dropout_p", 0.0),
            softmax_scale=options.get("softmax_scale"),
            causal=options.get("causal", True),
            window_size=options.get("window", FULL),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, backend=backend, **options)


class KernelObserver(TorchDispatchMode):
    """Notes which attention kernels PyTorch really dispatches to."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if ("scaled_dot_product" in name or "flash_attn" in name) and "backward" not in name:
            self.kernels.add(name.removesuffix(".default"))
        return func(*args, **(kwargs or {}))

    @property
    def name(self) -> str:
        """The operators seen, in one string; no fused kernel seen means textbook attention (eager)."""
        return ", ".join(sorted(self.kernels)) or "eager (matmul, softmax, matmul)"


@contextmanager
def observe_kernel() -> Iterator[KernelObserver]:
    """Run a forward pass inside to learn which kernel really ran; slow, so for one step only."""
    with KernelObserver() as observer:
        yield observer


@dataclass
class Settings:
    """Settings of `python attention.py`."""

    batch_size: int = setting(4, "sequences")
    context_length: int = setting(512, "tokens in a sequence")
    num_heads: int = setting(12, "heads")
    head_dim: int = setting(64, "width of a head")
    repeats: int = setting(10, "timed repeats of forward and backward")


def main() -> int:
    """Print what can run here and why not, then time forward and backward of each backend against an fp32 reference."""
    settings = parse_settings(Settings)
    if min(settings.batch_size, settings.context_length, settings.num_heads, settings.head_dim, settings.repeats) < 1:
        raise SettingsError("--batch_size, --context_length, --num_heads, --head_dim and --repeats must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    shape = (settings.batch_size, settings.context_length, settings.num_heads, settings.head_dim)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    reference = eager_attention(*(x.float() for x in inputs[:3]), True, FULL, 0.0, None)
    print(f"bf16, causal, batch {shape[0]}, context {shape[1]}, {shape[2]} heads of {shape[3]}, forward and backward")
    print(f"{'backend':<12}{'ms':>9}{'peak MiB':>10}{'error':>10}  kernel")
    for backend in BACKENDS:
        reason = unsupported_reason(backend, device, dtype, FULL, settings.head_dim)
        if reason is not None:
            print(f"{backend:<12}cannot run: {reason}")
            continue
        q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
        with observe_kernel() as observer:
            error = (attention(q, k, v, backend=backend).float() - reference).abs().max().item()
        tracker = MemoryTracker(device)
        with tracker.step(1), tracker.phase("attention"):
            attention(q, k, v, backend=backend).backward(inputs[3])
        row = tracker.summary()["attention"]
        peak = 1024 * (row["peak_allocated_gib"] - row["start_allocated_gib"])
        times = []
        for _ in range(settings.repeats):
            begin = time.perf_counter()
            attention(q, k, v, backend=backend).backward(inputs[3])
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - begin))
        print(f"{backend:<12}{percentile(times, 50):>9.2f}{peak:>10.1f}{error:>10.1e}  {observer.name}")
    return 0


if __name__ == "__main__":
    run_script(main)
