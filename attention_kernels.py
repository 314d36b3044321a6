"""The attention backends themselves, and the one definition of causal and window that all of them are held against.

attention.py puts one function in front of them, checks what it is given and says why one cannot run. Shapes and
arguments are those of `attention.attention`: q, k, v (batch, tokens, heads, head_dim) to an output of the same shape.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

from attention_support import FULL, SDPA_KERNELS

# --------------------------------------------------------------------------------------------------------------------
# One definition of causal and window
# --------------------------------------------------------------------------------------------------------------------


def visible_keys(query: torch.Tensor, key: torch.Tensor, causal: bool, window: tuple[int, int]) -> torch.Tensor:
    """Whether the query at one position sees the key at another; positions broadcast against each other."""
    left, right = window
    distance = query - key
    seen = distance == distance
    if causal or right >= 0:
        seen = seen & (distance >= -(0 if causal else right))
    if left >= 0:
        seen = seen & (distance <= left)
    return seen


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # kept for later calls, which may need gradients
def score_bias(
    tokens: int, causal: bool, window: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """(tokens, tokens): 0 where query (row) sees key (column), -inf elsewhere."""
    place = torch.arange(tokens, device=device)
    hidden = ~visible_keys(place[:, None], place[None, :], causal, window)
    return torch.zeros(tokens, tokens, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


# --------------------------------------------------------------------------------------------------------------------
# The backends: q, k, v (batch, tokens, heads, head_dim) to an output of the same shape
# --------------------------------------------------------------------------------------------------------------------


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


def sdpa_attention(backend, q, k, v, causal, dropout_p, softmax_scale):
    """PyTorch's scaled_dot_product_attention, with one kernel forced unless `backend` is sdpa."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, heads, tokens, head_dim)
    options = {"scale": softmax_scale, "enable_gqa": k.shape[1] != q.shape[1]}
    if backend == "sdpa":
        output = F.scaled_dot_product_attention(q, k, v, None, dropout_p, causal, **options)
    else:
        with sdpa_kernel(SDPA_KERNELS[backend]):
            output = F.scaled_dot_product_attention(q, k, v, None, dropout_p, causal, **options)
    return output.transpose(1, 2)  # (batch, tokens, heads, head_dim)


def flash_attn_attention(q, k, v, causal, window, dropout_p, softmax_scale):
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


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def sequence_starts(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    """(batch + 1,): where each sequence begins when all lie one after another, as varlen kernels want it."""
    return torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)


def varlen_attention(q, k, v, causal, window, softmax_scale):
    """torch.nn.attention.varlen on equal lengths; its (left, 0) is a causal window."""
    from torch.nn.attention.varlen import varlen_attn

    batch, tokens, heads, head_dim = q.shape
    starts = sequence_starts(batch, tokens, q.device)
    q, k, v = (x.reshape(batch * tokens, heads, head_dim) for x in (q, k, v))
    window = (window[0], 0) if causal else window
    output = varlen_attn(q, k, v, starts, starts, tokens, tokens, scale=softmax_scale, window_size=window)
    return output.view(batch, tokens, heads, head_dim)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    # One kernel for each shape and mask; after 8 of them PyTorch would give up by default.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def flex_block_mask(tokens: int, causal: bool, window: tuple[int, int], device: torch.device):
    """The tiles of 128 that flex attention works on and their mask; None where every query sees every key."""
    from torch.nn.attention.flex_attention import create_block_mask

    if not causal and window == FULL:
        return None

    def mask(batch, head, query, key):
        return visible_keys(query, key, causal, window)

    return create_block_mask(mask, None, None, tokens, tokens, device=device)


def flex_attention(q, k, v, causal, window, softmax_scale):
    block_mask = flex_block_mask(q.shape[1], causal, window, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, heads, tokens, head_dim)
    observers = _get_current_dispatch_mode_stack()
    if observers:
        # A compiled function cannot run under a dispatch mode (observe_kernel, the tensor counter without a GPU): the
        # modes are off inside and see the output only.
        for observer in observers:
            if isinstance(observer, KernelObserver):
                observer.kernels.add("flex_attention (compiled)")
        with _disable_current_modes():
            output = _compiled_flex()(q, k, v, block_mask=block_mask, scale=softmax_scale)
    else:
        output = _compiled_flex()(q, k, v, block_mask=block_mask, scale=softmax_scale)
    return output.transpose(1, 2)  # (batch, tokens, heads, head_dim)


def use_flash_implementation(wanted: str | None) -> None:
    """Make PyTorch's flash operators run FlashAttention-3 ("FA3") or -4 ("FA4"), or its own kernel (None)."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if current == wanted:
        return
    if wanted is None:
        torch.nn.attention.restore_flash_attention_impl()
    else:
        torch.nn.attention.activate_flash_attention_impl(wanted)


# --------------------------------------------------------------------------------------------------------------------
# Which kernel ran
# --------------------------------------------------------------------------------------------------------------------


class KernelObserver(TorchDispatchMode):
    """Notes which attention operators PyTorch really dispatches to."""

    SIGNS = ("scaled_dot_product", "flash_attn", "_flash_attention", "varlen_attn", "short_attention")

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "_safe_softmax" in name:  # only PyTorch's unfused scaled_dot_product_attention calls it
            self.kernels.add("scaled_dot_product_attention, unfused (matmul, softmax, matmul)")
        if any(sign in name for sign in self.SIGNS) and "backward" not in name:
            implementation = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
            replaced = name.startswith(("aten.", "torch_attn.")) and ("flash" in name or "varlen" in name)
            suffix = f" ({implementation})" if implementation and replaced else ""
            self.kernels.add(name.removesuffix(".default") + suffix)
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
