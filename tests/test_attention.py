"""Every attention backend against a brute-force mask in fp64: outputs, gradients, windows, layouts, refusals.

What runs where and what `auto` picks is in test_attention_support.py.
"""

import functools
import itertools
import math
import shutil
import statistics
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

import attention
import attention_kernels
import attention_support
from attention import attention as attend
from attention import packed_attention
from attention_kernels import KernelObserver, observe_kernel, score_bias
from attention_support import BACKENDS, FULL, SDPA_KERNELS, choose_backend, unsupported_reason
from memory_tracker import LiveTensorCounter
from utils import SettingsError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOKENS = 37
TWO_SIDED = [(3, 2), (-1, 0), (0, 0), (2, -1)]
ON_CPU = ["eager", "sdpa", "sdpa_math", "sdpa_flash", "auto"]  # with gradients; flex comes without, further down


def windows_of(tokens: int) -> list[tuple[int, int]]:
    """Windows to the left at every edge case; the last one hides nothing under a causal mask."""
    return [(left, 0) for left in sorted({0, 1, 5, tokens - 2, tokens - 1, tokens}) if left >= 0]


pytestmark = pytest.mark.usefixtures("one_thread")


# ----------------------------------------------------------------------------------------------------------- yardsticks


@functools.lru_cache(maxsize=256)
def visible(tokens: int, causal: bool, window: tuple[int, int]) -> torch.Tensor:
    """(tokens, tokens): the mask written out key by key, without a line of attention.py."""
    left, right = window
    rows = []
    for i in range(tokens):
        first = 0 if left < 0 else i - left
        last = tokens if right < 0 else i + right
        rows.append([first <= j <= last and not (causal and j > i) for j in range(tokens)])
    return torch.tensor(rows)


def plain(q, k, v, mask, scale):
    """Plain PyTorch in the dtype of its inputs; in fp64 it is the truth, in that of the backend the yardstick."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    scores = scores.masked_fill(~mask.to(scores.device), float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def output_and_gradients(function, tensors, upstream):
    """Output, dq, dk, dv; the leaves keep the strides of `tensors`. Without upstream the output alone."""
    leaves = [x.detach().requires_grad_(upstream is not None) for x in tensors]
    output = function(*leaves)
    if upstream is None:
        return [output]
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@functools.lru_cache(maxsize=64)
def reference(device, dtype, causal, window, head_dim, tokens, scale):
    """The inputs (q, k, v, upstream), and output and gradients of the truth and of plain PyTorch."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, tokens, 3, head_dim, generator=generator).to(device, dtype) for _ in range(4)]
    mask, scale = visible(tokens, causal, window), head_dim**-0.5 if scale is None else scale

    def function(*x):
        return plain(*x, mask, scale)

    exact = output_and_gradients(function, [x.double() for x in inputs[:3]], inputs[3].double())
    return inputs, exact, output_and_gradients(function, inputs[:3], inputs[3])


def assert_accurate(ours, exact, yardstick):
    """Error against fp64 at most twice that of plain PyTorch in the same dtype, plus one rounding of the dtype.

    In fp32 it is 16 roundings, 2e-6: a fused kernel takes a score's gradient as the difference of two dot products,
    which is rounded where plain PyTorch has an exact 0 (one token: 6 roundings seen). In 16 bits those are fp32 inside.
    """
    for name, a, b, c in zip(("output", "dq", "dk", "dv"), ours, yardstick, exact, strict=False):
        assert a.shape == c.shape
        error = (a.double() - c).abs().max()
        rounding = torch.finfo(b.dtype).eps * (16 if b.dtype == torch.float32 else 1)
        allowed = 2 * (b.double() - c).abs().max() + rounding
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def check(backend, device, dtype, causal, window, head_dim=16, tokens=TOKENS, scale=None, gradients=True):
    (q, k, v, upstream), exact, yardstick = reference(device, dtype, causal, window, head_dim, tokens, scale)
    ours = output_and_gradients(
        lambda *x: attend(*x, backend=backend, causal=causal, window=window, softmax_scale=scale),
        (q, k, v),
        upstream if gradients else None,
    )
    assert all(a.dtype == dtype for a in ours)
    assert_accurate(ours, exact, yardstick)


def assert_same_up_to_rounding(ours, others, exact, yardstick):
    """Two roundings of the largest number, or (another stride may mean another matmul kernel) twice plain PyTorch's."""
    for a, b, c, d in zip(ours, others, yardstick, exact, strict=False):
        roundings = 2 * torch.finfo(a.dtype).eps * b.abs().max().clamp(min=1)
        assert (a - b).abs().max() <= max(roundings, 2 * (c.double() - d).abs().max())


# ----------------------------------------------------------------------------------------------------------- on any CPU


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("head_dim", [8, 12, 16, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_matches_brute_force_for_every_head_dim(backend, causal, dtype, head_dim):
    check(backend, CPU, dtype, causal, FULL, head_dim)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("tokens", [1, 2, 37, 129, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_matches_brute_force_for_every_length(backend, causal, dtype, tokens):
    for head_dim in (12, 64, 80):
        check(backend, CPU, dtype, causal, FULL, head_dim, tokens)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("tokens", [1, 2, 37, 129, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_windows_match_brute_force(backend, causal, dtype, tokens):
    for window in [*windows_of(tokens), *TWO_SIDED]:
        check(backend, CPU, dtype, causal, window, 16, tokens)


@pytest.mark.parametrize("head_dim", [8, 12, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_windows_match_brute_force_for_every_head_dim(head_dim, dtype):
    for causal, window in itertools.product((True, False), ((5, 0), (3, 2))):
        check("eager", CPU, dtype, causal, window, head_dim)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_softmax_scale_is_used(backend, dtype):
    for scale in (0.5, 0.03):
        check(backend, CPU, dtype, True, FULL, scale=scale)


def test_a_window_of_64_0_is_65_keys():
    shown = score_bias(100, True, (64, 0), torch.float32, CPU) == 0
    assert shown.sum(-1).tolist() == [min(i + 1, 65) for i in range(100)]


@pytest.mark.parametrize("backend", ["eager", "sdpa", "sdpa_math"])
def test_dropout_drops_and_keeps_the_mean(backend):
    check_dropout(backend, CPU, torch.float32)


def check_dropout(backend, device, dtype):
    q, v = torch.zeros(1, 64, 1, 64, device=device, dtype=dtype), torch.ones(1, 64, 1, 64, device=device, dtype=dtype)
    torch.manual_seed(0)
    output = attend(q, q, v, backend=backend, causal=False, dropout_p=0.5)[..., 0].float()
    assert output.std() > 0.01
    assert abs(output.mean() - 1) < 0.1
    assert torch.equal(attend(q, q, v, backend=backend, causal=False), v)


@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_decides_the_dtype_of_the_output(backend):
    q = torch.randn(1, 4, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(q, q, q, backend=backend).dtype == torch.bfloat16
    assert attend(q, q, q, backend=backend).dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("window", [FULL, (5, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_auto_casts_as_autocast_does(dtype, window, packed):
    """A kernel that autocast knows nothing of gets the type of autocast too; the gradients come back in fp32."""

    def run(leaf):
        options = {"backend": "auto", "window": window}
        return packed_attention(leaf, **options) if packed else attend(*leaf.unbind(2), **options)

    torch.manual_seed(0)
    qkv, upstream = torch.randn(2, TOKENS, 3, 2, 16), torch.randn(2, TOKENS, 2, 16)
    full, half = qkv.clone().requires_grad_(), qkv.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output = run(full)
    expected = run(half)
    assert output.dtype == expected.dtype == dtype
    assert torch.equal(output, expected)
    output.backward(upstream.to(dtype))
    expected.backward(upstream.to(dtype))
    assert full.grad.dtype == torch.float32
    assert torch.equal(full.grad, half.grad.float())
    assert torch.equal(run(qkv.to(dtype)), expected)  # no autocast, nothing cast
    with torch.autocast("cpu", dtype=dtype), torch.autocast("cpu", enabled=False):
        assert run(qkv).dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_every_kernel_that_auto_picks_gets_the_type_of_autocast(monkeypatch, flash_attn_calls, packed):
    """flash-attn has no rule for autocast of its own."""
    seen = []
    package = sys.modules["flash_attn"]
    for name in ("flash_attn_func", "flash_attn_qkvpacked_func"):
        function = getattr(package, name)
        monkeypatch.setattr(
            package, name, lambda *x, f=function, **options: seen.extend(y.dtype for y in x) or f(*x, **options)
        )
    monkeypatch.setattr(attention, "choose_backend", lambda *args, **options: ("flash_attn", "because"))
    qkv = torch.randn(1, 4, 3, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed_attention(qkv, backend="auto") if packed else attend(*qkv.unbind(2), backend="auto")
    assert seen == [torch.bfloat16] * (1 if packed else 3)


def test_auto_leaves_fp64_alone_as_autocast_does():
    q = torch.randn(1, 4, 2, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(q, q, q, backend="sdpa").dtype == torch.float64
        assert attend(q, q, q, backend="auto").dtype == torch.float64


# --------------------------------------------------------------------------- Layouts: the same numbers at other strides


def parts_of_packed(q, k, v):
    return torch.stack((q, k, v), dim=2).unbind(2)


def heads_before_tokens(q, k, v):
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]


def every_second_token(q, k, v):
    """Parts of sequences more than twice as long, with rubbish between their tokens."""
    views = []
    for x in (q, k, v):
        batch, tokens, *rest = x.shape
        views.append(torch.full((batch, 2 * tokens + 3, *rest), 7.0, device=x.device, dtype=x.dtype)[:, 3::2])
        views[-1].copy_(x)
    return views


LAYOUTS = (parts_of_packed, heads_before_tokens, every_second_token)


def check_layout(backend, device, dtype, causal, window, layout, head_dim, tokens=TOKENS):
    """At other strides: as accurate as contiguous tensors, and the same up to rounding."""
    (q, k, v, upstream), exact, yardstick = reference(device, dtype, causal, window, head_dim, tokens, None)
    views = layout(q, k, v)
    assert all(torch.equal(a, b) and not a.is_contiguous() for a, b in zip(views, (q, k, v), strict=True))

    def function(*x):
        return attend(*x, backend=backend, causal=causal, window=window)

    contiguous = output_and_gradients(function, (q, k, v), upstream)
    ours = output_and_gradients(function, views, upstream)
    assert_accurate(ours, exact, yardstick)
    assert_same_up_to_rounding(ours, contiguous, exact, yardstick)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_layouts_give_the_same_numbers(backend, causal, dtype, layout):
    for head_dim in (12, 64):
        check_layout(backend, CPU, dtype, causal, FULL, layout, head_dim)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [(5, 0), (3, 2)])
def test_layouts_give_the_same_numbers_with_a_window(backend, window, layout):
    check_layout(backend, CPU, torch.float32, False, window, layout, 16)


def check_expanded_upstream(backend, device, dtype):
    """A sum hands back one number expanded to the whole shape: a gradient of stride 0."""
    q, k, v, _ = reference(device, dtype, True, FULL, 64, TOKENS, None)[0]
    upstream = torch.ones((), device=device, dtype=dtype).expand_as(q)
    mask = visible(TOKENS, True, FULL)
    exact, yardstick = (
        output_and_gradients(lambda *x: plain(*x, mask, 1 / 8), [x.to(kind) for x in (q, k, v)], upstream)
        for kind in (torch.float64, dtype)
    )
    assert_accurate(output_and_gradients(lambda *x: attend(*x, backend=backend), (q, k, v), upstream), exact, yardstick)


@pytest.mark.parametrize("backend", ON_CPU)
def test_upstream_gradient_of_stride_0(backend):
    check_expanded_upstream(backend, CPU, torch.float32)


# --------------------------------------------------------------------------------------------------------------- Packed


def check_packed(backend, device, dtype, causal, window, head_dim=64, tokens=TOKENS, gradients=True):
    """One packed tensor: as accurate as three contiguous ones, and the same up to rounding, its gradient too."""
    (q, k, v, upstream), exact, yardstick = reference(device, dtype, causal, window, head_dim, tokens, None)
    options = {"backend": backend, "causal": causal, "window": window}
    separate = output_and_gradients(lambda *x: attend(*x, **options), (q, k, v), upstream if gradients else None)
    qkv = torch.stack((q, k, v), dim=2).requires_grad_(gradients)
    output = packed_attention(qkv, **options)
    packed = [output.detach()]
    if gradients:
        output.backward(upstream)
        packed += qkv.grad.unbind(2)
    assert_accurate(packed, exact, yardstick)
    if device == CPU or backend != "auto":  # on a GPU `auto` may take another kernel for a packed tensor
        assert_same_up_to_rounding(packed, separate, exact, yardstick)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_packed_gives_the_same_numbers(backend, causal, dtype):
    check_packed(backend, CPU, dtype, causal, FULL)
    if backend in ("eager", "auto"):
        check_packed(backend, CPU, dtype, causal, (5, 0))
        check_packed(backend, CPU, dtype, causal, (3, 2))


def test_packed_passes_every_option_on(monkeypatch):
    seen = {}
    monkeypatch.setattr(attention, "attention", lambda q, k, v, **options: seen.update(options) or q)
    options = {"backend": "eager", "causal": False, "window": (3, 1), "dropout_p": 0.25, "softmax_scale": 0.7}
    packed_attention(torch.zeros(1, 4, 3, 2, 8), **options)
    assert seen == options


# ----------------------------------------- flash-attn and varlen without a GPU: what they are called with, by stand-ins


@pytest.fixture
def flash_attn_calls(monkeypatch):
    """A flash_attn package that computes on any device and notes its options."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, deterministic):
        calls.append(("separate", dropout_p, softmax_scale, causal, window_size, deterministic))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return plain(q, k, v, visible(q.shape[1], causal, window_size), scale)

    def flash_attn_qkvpacked_func(qkv, *args, **options):
        output = flash_attn_func(*qkv.unbind(2), *args, **options)
        calls[-1] = ("packed", *calls[-1][1:])
        return output

    package = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_qkvpacked_func=flash_attn_qkvpacked_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention, "flash_attn_error", lambda: None)
    return calls


@pytest.mark.parametrize("window", [FULL, (5, 0), (3, 2)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_call_of_flash_attn(monkeypatch, flash_attn_calls, causal, window):
    check("flash_attn", CPU, torch.float32, causal, window)
    check("flash_attn", CPU, torch.float32, causal, window, scale=0.3)
    check_packed("flash_attn", CPU, torch.float32, causal, window)
    assert [call[0] for call in flash_attn_calls] == ["separate", "separate", "separate", "packed"]
    assert all(call[3:] == (causal, window, False) for call in flash_attn_calls)
    flash_attn_calls.clear()
    qkv = torch.zeros(1, 4, 3, 2, 8)
    options = {"causal": causal, "window": window, "dropout_p": 0.25, "softmax_scale": 0.7}
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    packed_attention(qkv, backend="flash_attn", **options)
    attend(*qkv.unbind(2), backend="flash_attn", **options)
    assert flash_attn_calls == [(kind, 0.25, 0.7, causal, window, True) for kind in ("packed", "separate")]


@pytest.fixture
def varlen_calls(monkeypatch):
    """torch.nn.attention.varlen on any device; it has no causal flag, a window with nothing to the right is one."""
    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        calls.append(window_size)
        assert query.dim() == 3 and cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
        ends = cu_seq_q.tolist()
        assert (ends[0], ends[-1], max_q) == (0, len(query), max_k)
        assert {end - begin for begin, end in itertools.pairwise(ends)} == {max_q}
        mask, scale = visible(max_q, False, tuple(window_size)), query.shape[-1] ** -0.5 if scale is None else scale
        parts = [
            plain(query[None, begin:end], key[None, begin:end], value[None, begin:end], mask, scale)[0]
            for begin, end in itertools.pairwise(ends)
        ]
        return torch.cat(parts)

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
    return calls


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_call_of_varlen(varlen_calls, causal):
    for tokens in (1, TOKENS):
        for window in [FULL, *windows_of(tokens), *TWO_SIDED]:
            check("varlen", CPU, torch.float32, causal, window, tokens=tokens)
    check("varlen", CPU, torch.float32, causal, FULL, scale=0.3)
    for layout in LAYOUTS:
        check_layout("varlen", CPU, torch.float32, causal, (5, 0), layout, 16)
    check_packed("varlen", CPU, torch.float32, causal, (3, 2))
    assert not causal or all(right == 0 for _, right in varlen_calls)


# ----------------------------------------------------------------------------------------------------------------- flex


@pytest.mark.parametrize("tokens", [1, 2, 37, 129, 200, 300])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_mask_of_flex(causal, tokens):
    """The mask is the one of brute force, and of its tiles exactly those are worked on that hold a visible key."""
    from torch.nn.attention.flex_attention import create_mask

    for window in [FULL, (64, 0), *windows_of(tokens), *TWO_SIDED]:
        block_mask = attention_kernels.flex_block_mask(tokens, causal, window, CPU)
        if not causal and window == FULL:
            assert block_mask is None
            continue
        expected = visible(tokens, causal, window)
        mask = create_mask(block_mask.mask_mod, 1, 1, tokens, tokens, device="cpu")[0, 0]
        assert torch.equal(mask, expected)
        size = block_mask.BLOCK_SIZE[0]
        tiles = math.ceil(tokens / size)
        edge = [slice(size * i, size * (i + 1)) for i in range(tiles)]
        touched = [[bool(expected[rows, columns].any()) for columns in edge] for rows in edge]
        assert block_mask.to_dense()[0, 0].bool().tolist() == touched
        for row, count in enumerate(block_mask.full_kv_num_blocks[0, 0].tolist()):  # tiles where no mask is looked at
            for column in block_mask.full_kv_indices[0, 0, row, :count].tolist():
                assert expected[edge[row], edge[column]].all()


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """flex attention without its compilation: plain PyTorch under the mask it is handed."""
    from torch.nn.attention.flex_attention import create_mask

    def flex(q, k, v, block_mask, scale):
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
        if block_mask is not None:
            mask = create_mask(block_mask.mask_mod, 1, 1, q.shape[2], q.shape[2], device="cpu")[0, 0]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return plain(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale).transpose(1, 2)

    monkeypatch.setattr(attention_kernels, "_compiled_flex", lambda: flex)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_call_of_flex(uncompiled_flex, causal):
    for window in [FULL, (5, 0), (TOKENS - 1, 0), *TWO_SIDED]:
        check("flex", CPU, torch.float32, causal, window)
    check("flex", CPU, torch.float32, causal, FULL, scale=0.3)
    for layout in LAYOUTS:
        check_layout("flex", CPU, torch.float32, causal, (5, 0), layout, 16)


# ------------------------------------------------------------------------------------- what is kept from call to call


@pytest.fixture
def nothing_kept():
    """The caches as in a new process; what a stand-in left in them is forgotten afterwards too."""
    cached = (score_bias, attention_kernels.sequence_starts, attention_kernels.flex_block_mask)
    for function in cached:
        function.cache_clear()
    yield cached
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("backend", ["eager", "auto", "varlen", "flex"])
def test_evaluation_first_and_training_after_it(nothing_kept, varlen_calls, uncompiled_flex, backend, mode):
    """What is kept was first made without gradients, and training goes on with it."""
    q, k, v = (torch.randn(1, TOKENS, 2, 16) for _ in range(3))
    for causal, window in ((True, FULL), (True, (5, 0)), (False, (3, 2))):
        with mode():
            first = attend(q, k, v, backend=backend, causal=causal, window=window)
        check(backend, CPU, torch.float32, causal, window)
        assert torch.equal(attend(q, k, v, backend=backend, causal=causal, window=window), first)


def test_nothing_kept_is_of_inference_mode(nothing_kept):
    with torch.inference_mode():
        kept = [
            score_bias(8, True, (2, 0), torch.float32, CPU),
            attention_kernels.sequence_starts(2, 8, CPU),
            attention_kernels.flex_block_mask(8, True, (2, 0), CPU).kv_num_blocks,
            attention_kernels.flex_block_mask(8, True, (2, 0), CPU).kv_indices,
        ]
        assert torch.is_inference_mode_enabled() and torch.zeros(1).is_inference()
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in kept)
    assert [function.cache_info().currsize for function in nothing_kept] == [1, 1, 1]


def no_cpp_compiler() -> str | None:
    from torch._inductor import config

    wanted = [name for name in (config.cpp.cxx if isinstance(config.cpp.cxx, tuple) else (config.cpp.cxx,)) if name]
    found = [name for name in [*wanted, "g++", "clang++", "c++"] if shutil.which(name)]
    return None if found else f"torch's inductor finds no C++ compiler here (tried {', '.join(wanted)})"


@pytest.mark.timeout(280)
def test_compiled_flex_matches_brute_force():
    """The one test that compiles flex on a CPU (some 45 s): three tiles a side, of which the window hides some."""
    if no_cpp_compiler():
        pytest.skip(no_cpp_compiler())
    tokens, window = 300, (64, 0)
    check("flex", CPU, torch.float32, True, window, tokens=tokens, gradients=False)
    q, k, v, _ = reference(CPU, torch.float32, True, window, 16, tokens, None)[0]
    alone = attend(q, k, v, backend="flex", window=window)
    with observe_kernel() as observer, LiveTensorCounter() as counter:
        observed = attend(q, k, v, backend="flex", window=window)
    assert torch.equal(alone, observed)
    assert observer.name == "flex_attention (compiled)"
    assert counter.peak_bytes >= observed.untyped_storage().nbytes()


# ------------------------------------------------------------------------------------------------------------- refusals

NO_WINDOW = (
    r"attention_window needs attention_backend flash_attn, varlen or flex .without a GPU: eager.; {} has no window"
)
NO_DROPOUT = r"{} has no attention dropout; set --dropout 0 or take attention_backend sdpa or flash_attn"
NO_GPU = (
    r"attention_backend {0} cannot run here: {0} needs an NVIDIA GPU; "
    r"take attention_backend sdpa, or eager for a window$"
)
FLEX_ON_CPU = (
    r"attention_backend flex cannot run here: flex has no backward pass on a CPU; "
    r"take attention_backend sdpa, or eager for a window$"
)
FORCED = ["sdpa_efficient", "sdpa_cudnn", "flash_attn", "flash_attn_3", "flash_attn_4", "varlen"]
REFUSALS = [  # backend, options, the sentence
    *((name, {"window": (2, 0)}, NO_WINDOW) for name in ("sdpa", *SDPA_KERNELS)),
    *((name, {"window": (2, 0), "dropout_p": 0.1}, NO_WINDOW) for name in ("sdpa", *SDPA_KERNELS)),
    *((name, {"dropout_p": 0.1}, NO_DROPOUT) for name in ("varlen", "flex", "flash_attn_3", "flash_attn_4")),
    *((name, {"dropout_p": 0.1, "window": (2, 0)}, NO_DROPOUT) for name in ("varlen", "flex", "flash_attn_3")),
    *((name, {}, NO_GPU) for name in FORCED),
    *((name, {"window": (2, 0)}, NO_GPU) for name in FORCED if not name.startswith("sdpa")),
    *((name, {"dropout_p": 0.1}, NO_GPU) for name in ("sdpa_efficient", "sdpa_cudnn", "flash_attn")),
    ("sdpa_flash", {"dropout_p": 0.1}, r"has no dropout on a CPU; set --dropout 0 or take attention_backend sdpa"),
    pytest.param("flex", {}, FLEX_ON_CPU),
    pytest.param("flex", {"window": (2, 0)}, FLEX_ON_CPU),
    ("flash", {}, r"attention_backend flash is unknown; choose one of auto, eager, sdpa, .*flash_attn, .*flex"),
    ("flash", {"window": (2, 0), "dropout_p": 0.1}, r"attention_backend flash is unknown; choose one of auto, eager"),
]


@pytest.mark.parametrize(("backend", "options", "sentence"), REFUSALS)
def test_what_cannot_run_says_why(backend, options, sentence):
    q = torch.zeros(1, 4, 1, 16, requires_grad=True)
    with pytest.raises(SettingsError, match=sentence.format(backend)) as caught:
        attend(q, q, q, backend=backend, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match=sentence.format(backend)):
        packed_attention(torch.zeros(1, 4, 3, 1, 16, requires_grad=True), backend=backend, **options)


@pytest.mark.parametrize("window", [FULL, (2, 0)])
@pytest.mark.parametrize("backend", ["varlen", "flex", "flash_attn_3", "flash_attn_4"])
def test_dropout_is_not_left_out(monkeypatch, backend, window):
    """Refused before anything runs, on a machine where the backend would run."""
    for name in ("varlen_attention", "flex_attention", "sdpa_attention", "use_flash_implementation"):
        monkeypatch.setattr(attention, name, lambda *args: pytest.fail("ran without dropout"))
    q = torch.zeros(1, 4, 1, 16)
    with pytest.raises(SettingsError, match=NO_DROPOUT.format(backend)):
        attend(q, q, q, backend=backend, window=window, dropout_p=0.1)
    with pytest.raises(SettingsError, match=NO_DROPOUT.format(backend)):
        packed_attention(torch.zeros(1, 4, 3, 1, 16), backend=backend, window=window, dropout_p=0.1)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("change", [(1, 5, 2, 8), (1, 4, 3, 8), (1, 4, 0, 8), (1, 4, 2, 16), (2, 4, 2, 8)])
def test_three_tensors_of_one_shape(backend, change):
    q, other = torch.zeros(1, 4, 2, 8), torch.zeros(change)
    for tensors in ((q, other, other), (q, other, q), (q, q, other)):
        with pytest.raises(SettingsError, match=r"attention wants q, k and v of one shape .*\(1, 4, 2, 8\)"):
            attend(*tensors, backend=backend)


@pytest.mark.parametrize("shape", [(4, 2, 8), (1, 1, 4, 2, 8)])
def test_three_tensors_of_four_dimensions(shape):
    q = torch.zeros(shape)
    with pytest.raises(SettingsError, match=r"\(batch, tokens, heads, head_dim\).* not .*4, 2, 8"):
        attend(q, q, q, backend="sdpa")


@pytest.mark.parametrize("backend", ["sdpa", "flash_attn", "auto"])
@pytest.mark.parametrize("shape", [(1, 4, 2, 8), (1, 4, 2, 2, 8), (1, 3, 4, 2, 8), (1, 1, 4, 3, 2, 8)])
def test_packed_tensor_of_another_shape(backend, shape):
    with pytest.raises(SettingsError, match=r"packed_attention wants \(batch, tokens, 3, heads, head_dim\), not"):
        packed_attention(torch.zeros(shape), backend=backend)


@pytest.mark.parametrize("window", [FULL, (2, 0)])
def test_varlen_of_a_torch_before_its_window_is_a_refusal(monkeypatch, window):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise AssertionError

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
    q = torch.zeros(1, 4, 1, 16)
    with pytest.raises(SettingsError, match=NO_GPU.format("varlen")) as caught:
        attend(q, q, q, backend="varlen", window=window)
    assert isinstance(caught.value.__cause__, TypeError)
    attention_support.varlen_error.cache_clear()
    try:  # and on a GPU, where the version is what is wrong
        monkeypatch.setattr(attention, "unsupported_reason", lambda *args, **options: attention_support.varlen_error())
        with pytest.raises(SettingsError, match=r"cannot run here: varlen has its window since torch 2\.11, this is"):
            attend(q, q, q, backend="varlen", window=window)
    finally:
        attention_support.varlen_error.cache_clear()


NOT_SIDE_BY_SIDE = (
    r"attention_backend {} cannot run here: the numbers of a head must lie side by side in memory; "
    r"copy q, k and v with \.contiguous\(\) first$"
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # what PyTorch says before it refuses
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_layout_that_a_kernel_cannot_read_says_why(number):
    """Every fused kernel of PyTorch wants the numbers of a head side by side."""
    tensors = [torch.zeros(1, 4, 1, 16) for _ in range(3)]
    tensors[number] = torch.zeros(1, 4, 1, 32)[..., ::2]
    with pytest.raises(SettingsError, match=NOT_SIDE_BY_SIDE.format("sdpa_flash")) as caught:
        attend(*tensors, backend="sdpa_flash")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert attend(*(x.contiguous() for x in tensors), backend="sdpa_flash").shape == (1, 4, 1, 16)
    assert attend(*tensors, backend="sdpa").shape == attend(*tensors, backend="eager").shape == (1, 4, 1, 16)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_reason_that_is_known_goes_before_the_layout():
    q = torch.zeros(1, 4, 1, 32)[..., ::2]
    with pytest.raises(SettingsError, match="sdpa_flash has no dropout on a CPU; set --dropout 0"):
        attend(q, q, q, backend="sdpa_flash", dropout_p=0.1)


INSIDE = {  # backend: the function that runs it
    "eager": "eager_attention",
    **dict.fromkeys(("sdpa", "sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn"), "sdpa_attention"),
    "flash_attn": "flash_attn_attention",
    "varlen": "varlen_attention",
    "flex": "flex_attention",
}


def raising(error):
    def function(*args, **options):
        raise error

    return function


@pytest.mark.parametrize("backend", INSIDE)
def test_out_of_memory_passes_through(monkeypatch, backend):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    monkeypatch.setattr(attention, INSIDE[backend], raising(error))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        attend(*[torch.zeros(1, 4, 1, 16)] * 3, backend=backend)
    assert caught.value is error


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, NotImplementedError, TypeError, AttributeError])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "sdpa_math", "sdpa_flash", "flex"])
def test_an_error_of_another_kind_passes_through(monkeypatch, backend, kind):
    error = kind("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(attention, INSIDE[backend], raising(error))
    with pytest.raises(kind) as caught:
        attend(*[torch.zeros(1, 4, 1, 16)] * 3, backend=backend)
    assert caught.value is error


@pytest.mark.parametrize("kind", [RuntimeError, ImportError, ValueError, TypeError, AttributeError])
@pytest.mark.parametrize("backend", ["sdpa_efficient", "sdpa_cudnn", "flash_attn", "varlen"])
def test_every_error_of_what_cannot_run_here_is_a_refusal(monkeypatch, backend, kind):
    """An old torch lacks a module, a function or an argument."""
    error = kind("no such thing")
    monkeypatch.setattr(attention, INSIDE[backend], raising(error))
    with pytest.raises(SettingsError, match=NO_GPU.format(backend)) as caught:
        attend(*[torch.zeros(1, 4, 1, 16)] * 3, backend=backend)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_errors_of_the_packed_kernel_pass_through(monkeypatch, flash_attn_calls, kind):
    error = kind("CUDA error")
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_qkvpacked_func", raising(error))
    if kind is RuntimeError:  # on a GPU that can run it, that is
        monkeypatch.setattr(attention, "unsupported_reason", lambda *args, **options: None)
    with pytest.raises(kind) as caught:
        packed_attention(torch.zeros(1, 4, 3, 1, 16), backend="flash_attn")
    assert caught.value is error


def test_the_packed_kernel_says_why_it_cannot_run(monkeypatch, flash_attn_calls):
    error = RuntimeError("no kernel image")
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_qkvpacked_func", raising(error))
    with pytest.raises(SettingsError, match=NO_GPU.format("flash_attn")) as caught:
        packed_attention(torch.zeros(1, 4, 3, 1, 16), backend="flash_attn")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("limit", [1, 10_000])
def test_a_budget_of_live_tensors_is_kept(limit):
    """Scores of 64 x 64 are beyond it, and running out of memory is not mistaken for a refusal."""
    q = torch.zeros(1, 64, 1, 8)
    with LiveTensorCounter(limit), pytest.raises(torch.OutOfMemoryError, match="live tensors need"):
        attend(q, q, q, backend="eager")


# ---------------------------------------------------------------------------------------------- FlashAttention-3 and -4


@pytest.fixture
def implementations(monkeypatch):
    """PyTorch's registry of flash kernels without any: which one is on, and every switch."""
    state = SimpleNamespace(active=None, switches=[], ran=[])

    def switch(name):
        state.switches.append(name)
        state.active = name

    for name, function in {
        "current_flash_attention_impl": lambda: state.active,
        "activate_flash_attention_impl": switch,
        "restore_flash_attention_impl": lambda: switch(None),
    }.items():
        monkeypatch.setattr(torch.nn.attention, name, function, raising=False)
    # The kernels themselves are not at hand: note what would run, and under which of them.
    monkeypatch.setattr(attention, "unsupported_reason", lambda *args, **options: None)
    monkeypatch.setattr(attention, "sdpa_attention", lambda name, q, *rest: state.ran.append((name, state.active)) or q)
    monkeypatch.setattr(attention, "varlen_attention", lambda q, *rest: state.ran.append(("varlen", state.active)) or q)
    return state


def test_flash_attn_3_is_switched_on_once_and_off_again(implementations):
    q = torch.zeros(1, 4, 1, 16)
    for _ in range(3):
        attend(q, q, q, backend="flash_attn_3")
    assert implementations.switches == ["FA3"]
    assert implementations.ran == [("sdpa_flash", "FA3")] * 3
    attend(q, q, q, backend="flash_attn_3", window=(2, 0))
    assert implementations.ran[-1] == ("varlen", "FA3")
    attend(q, q, q, backend="flash_attn_4")
    assert implementations.switches == ["FA3", "FA4"]
    assert implementations.ran[-1] == ("sdpa_flash", "FA4")


@pytest.mark.parametrize("backend", ["sdpa", *SDPA_KERNELS, "varlen"])
def test_every_other_kernel_of_pytorch_is_its_own(implementations, backend):
    q = torch.zeros(1, 4, 1, 16)
    attend(q, q, q, backend=backend)
    assert implementations.switches == []
    for _ in range(2):
        attend(q, q, q, backend="flash_attn_3")
        attend(q, q, q, backend=backend)
        attend(q, q, q, backend=backend)
    assert implementations.switches == ["FA3", None] * 2
    assert implementations.ran[-1] == (backend, None)


@pytest.mark.parametrize("backend", ["flash_attn_3", "flash_attn_4"])
def test_a_torch_without_a_registry_is_a_refusal(monkeypatch, backend):
    for name in ("current", "activate", "restore"):
        monkeypatch.delattr(torch.nn.attention, f"{name}_flash_attention_impl", raising=False)
    q = torch.zeros(1, 4, 1, 16)
    attend(q, q, q, backend="sdpa_flash")
    with pytest.raises(SettingsError, match=NO_GPU.format(backend)):
        attend(q, q, q, backend=backend)
    # On a GPU the check comes after the attempt, which then is an AttributeError.
    reasons = iter([None, "this torch cannot activate it"])
    monkeypatch.setattr(attention, "unsupported_reason", lambda *args, **options: next(reasons))
    with pytest.raises(SettingsError, match=f"{backend} cannot run here: this torch cannot activate it") as caught:
        attend(q, q, q, backend=backend)
    assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize("window", [FULL, (2, 0)])
@pytest.mark.parametrize("backend", ["flash_attn_3", "flash_attn_4"])
def test_flash_attn_3_and_4_are_refused_on_a_cpu_before_anything_is_activated(monkeypatch, backend, window):
    """Activated, they would leave PyTorch's CPU kernel to answer in their place."""
    for name in ("activate_flash_attention_impl", "restore_flash_attention_impl"):
        monkeypatch.setattr(torch.nn.attention, name, lambda *args: pytest.fail("switched"), raising=False)
    for name in ("use_flash_implementation", "sdpa_attention", "varlen_attention"):
        monkeypatch.setattr(attention, name, lambda *args: pytest.fail("ran"))
    q = torch.zeros(1, 4, 1, 16)
    with pytest.raises(SettingsError, match=NO_GPU.format(backend)):
        attend(q, q, q, backend=backend, window=window)
    with pytest.raises(SettingsError, match=NO_GPU.format(backend)):
        packed_attention(torch.zeros(1, 4, 3, 1, 16), backend=backend, window=window)


def test_a_kernel_that_is_not_there_leaves_the_others_alone():
    """Without pretence: the refusal switches nothing."""
    q = torch.randn(1, 4, 1, 16)
    before = attend(q, q, q, backend="sdpa_flash")
    for backend in ("flash_attn_3", "flash_attn_4"):
        with pytest.raises(SettingsError, match=NO_GPU.format(backend)):
            attend(q, q, q, backend=backend)
    assert getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)() is None
    assert torch.equal(before, attend(q, q, q, backend="sdpa_flash"))


# ----------------------------------------------------------------------------------------------------------------- auto


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [FULL, (5, 0), (3, 2)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_auto_is_the_backend_it_chooses(causal, window, packed):
    torch.manual_seed(0)
    qkv = torch.randn(2, TOKENS, 3, 2, 16)
    upstream = torch.randn(2, TOKENS, 2, 16)
    chosen, _ = choose_backend(CPU, torch.float32, window, 16, tokens=TOKENS, causal=causal, packed=packed)
    assert chosen == ("sdpa" if window == FULL else "eager")
    results = []
    for backend in ("auto", chosen):
        leaf = qkv.clone().requires_grad_()
        options = {"backend": backend, "causal": causal, "window": window}
        output = packed_attention(leaf, **options) if packed else attend(*leaf.unbind(2), **options)
        output.backward(upstream)
        results.append((output, leaf.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def choices(monkeypatch):
    """What `auto` hands to choose_backend, which says eager."""
    seen = []

    def choose(device, dtype, window, head_dim, **options):
        seen.append({"device": device, "dtype": dtype, "window": window, "head_dim": head_dim, **options})
        return "eager", "because"

    monkeypatch.setattr(attention, "choose_backend", choose)
    return seen


@pytest.mark.parametrize("packed", [False, True])
def test_auto_asks_with_what_it_is_given(choices, packed):
    qkv = torch.randn(2, 9, 3, 2, 16)

    def call(**options):
        packed_attention(qkv, backend="auto", **options) if packed else attend(
            *qkv.unbind(2), backend="auto", **options
        )
        return choices[-1]

    expected = {
        "device": CPU, "dtype": torch.float32, "window": FULL, "head_dim": 16, "tokens": 9, "causal": True,
        "packed": packed, "dropout_p": 0.0, "training": False,
    }  # fmt: skip
    assert call() == expected
    assert call(causal=False, window=(3, 1)) == expected | {"causal": False, "window": (3, 1)}
    assert call(dropout_p=0.25) == expected | {"dropout_p": 0.25}
    qkv.requires_grad_()
    assert call() == expected | {"training": True}
    with torch.no_grad():
        assert call() == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call() == expected | {"dtype": torch.bfloat16, "training": True}
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        assert call() == expected | {"dtype": torch.float16}


def test_a_backend_by_name_is_not_chosen(choices):
    q = torch.randn(1, 4, 2, 16)
    attend(q, q, q, backend="sdpa")
    packed_attention(torch.randn(1, 4, 3, 2, 16), backend="sdpa")
    assert choices == []


# ----------------------------------------------------------------------------------------------------- observed kernels


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("eager", "eager"),
        ("sdpa_math", "scaled_dot_product_attention, unfused"),
        ("sdpa", "scaled_dot_product_flash_attention"),
        ("sdpa_flash", "scaled_dot_product_flash_attention"),
        ("auto", "scaled_dot_product_flash_attention"),
    ],
)
def test_observed_kernel_is_the_one_that_ran(backend, name):
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    with observe_kernel() as observer:
        attend(q, q, q, backend=backend)
    assert isinstance(observer, KernelObserver)
    assert name in observer.name
    assert ("scaled_dot_product" in observer.name) == ("scaled_dot_product" in name)


def test_observed_kernels_are_all_that_ran():
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    with observe_kernel() as observer:
        attend(q, q, q, backend="sdpa_flash").sum().backward()
        attend(q, q, q, backend="eager")
    assert "backward" not in observer.name and "flash_attention" in observer.name


def test_observed_kernel_names_the_implementation(monkeypatch):
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False)
    monkeypatch.setattr(attention, "use_flash_implementation", lambda wanted: None)
    q = torch.randn(1, 8, 2, 16)
    with observe_kernel() as observer:
        attend(q, q, q, backend="sdpa_flash")
    assert "flash_attention" in observer.name and observer.name.endswith("(FA3)")


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        ("aten._scaled_dot_product_flash_attention.default", "aten._scaled_dot_product_flash_attention (FA3)"),
        ("aten._flash_attention_forward.default", "aten._flash_attention_forward (FA3)"),
        ("torch_attn._varlen_attn.default", "torch_attn._varlen_attn (FA3)"),
        ("aten._scaled_dot_product_efficient_attention.default", "aten._scaled_dot_product_efficient_attention"),
        ("aten._scaled_dot_product_cudnn_attention.default", "aten._scaled_dot_product_cudnn_attention"),
        ("flash_attn._flash_attn_forward.default", "flash_attn._flash_attn_forward"),
        ("flash_attn_3.fwd.default", "flash_attn_3.fwd"),
        ("aten._flash_attention_backward.default", "eager (matmul, softmax, matmul)"),
        ("aten.mm.default", "eager (matmul, softmax, matmul)"),
    ],
)
def test_only_operators_of_pytorch_are_replaced_by_flash_attn_3(monkeypatch, operator, name):
    """The flash-attn package keeps its own kernel whatever PyTorch's operators run."""

    class Operator:
        def __str__(self):
            return operator

        def __call__(self, *args, **kwargs):
            return args, kwargs

    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False)
    observer = KernelObserver()
    assert observer.__torch_dispatch__(Operator(), (), (1, 2), {"x": 3}) == ((1, 2), {"x": 3})
    assert observer.name == name
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: None, raising=False)
    observer = KernelObserver()
    observer.__torch_dispatch__(Operator(), ())
    assert observer.name == name.removesuffix(" (FA3)")


def test_flex_runs_under_observers(monkeypatch):
    """A compiled function cannot run under a dispatch mode: none is on inside, and both see what they can."""
    inside = []

    def flex(q, k, v, block_mask, scale):
        inside.append(len(attention_kernels._get_current_dispatch_mode_stack()))
        return torch.zeros_like(q)

    monkeypatch.setattr(attention_kernels, "_compiled_flex", lambda: flex)
    q = torch.randn(1, 8, 2, 16)
    attend(q, q, q, backend="flex")
    with observe_kernel() as observer:
        output = attend(q, q, q, backend="flex")
    assert observer.name == "flex_attention (compiled)"
    assert output.shape == q.shape
    with LiveTensorCounter() as counter:
        output = attend(q, q, q, backend="flex")
    assert output.shape == q.shape
    assert counter.peak_bytes >= output.untyped_storage().nbytes()
    with LiveTensorCounter(), observe_kernel() as observer:
        attend(q, q, q, backend="flex")
        attend(q, q, q, backend="sdpa_flash")
    assert "flex_attention (compiled)" in observer.name and "flash_attention" in observer.name
    assert inside == [0] * 4
    assert attention_kernels._get_current_dispatch_mode_stack() == []


# ---------------------------------------------------------------------------------------------- the script and the seam


def test_the_script_prints_a_verdict_and_a_row_for_each(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    size = ["--batch_size", "1", "--context_length", "16", "--num_heads", "2", "--head_dim", "16", "--seconds", "0.01"]
    monkeypatch.setattr("sys.argv", ["attention.py", *size])
    assert attention.main() == 0
    verdicts, table = capsys.readouterr().out.split("\n\n")
    able = [line.split()[0] for line in verdicts.splitlines() if " runs: " in line]
    unable = [line.split()[0] for line in verdicts.splitlines() if " cannot run: " in line]
    assert able == ["eager", "sdpa", "sdpa_math", "sdpa_flash"]
    assert sorted([*able, *unable]) == sorted(BACKENDS)
    assert "auto with no window (context 1024, training): sdpa" in verdicts
    assert "auto with a window (context 1024, training): eager" in verdicts
    assert [line.split()[0] for line in table.splitlines()[3:]] == able


@pytest.mark.parametrize("wrong", [["--num_heads", "0"], ["--seconds", "0"]])
def test_the_script_refuses_nonsense(monkeypatch, wrong):
    monkeypatch.setattr("sys.argv", ["attention.py", *wrong])
    with pytest.raises(SettingsError, match=wrong[0]):
        attention.main()


def test_the_seam_costs_less_than_30_microseconds():
    """On tensors so small that nothing else takes time; the best of several tries, each a difference of medians."""
    q, k, v = (torch.randn(1, 8, 1, 8) for _ in range(3))
    direct = [x.transpose(1, 2) for x in (q, k, v)]

    def one_try() -> float:
        through, without = [], []
        for _ in range(300):
            begin = time.perf_counter()
            attend(q, k, v, backend="sdpa")
            middle = time.perf_counter()
            F.scaled_dot_product_attention(*direct, is_causal=True)
            end = time.perf_counter()
            through.append(middle - begin)
            without.append(end - middle)
        return statistics.median(through) - statistics.median(without)

    with torch.no_grad():
        assert min(one_try() for _ in range(5)) < 30e-6


# ------------------------------------------------------------------------------------------------------------- on a GPU

gpu = pytest.mark.gpu
needs_flash_attn = pytest.mark.skipif(
    attention_support.flash_attn_error() is not None, reason="flash-attn is not installed with its kernels"
)
ON_GPU = ["eager", "sdpa", *SDPA_KERNELS, "flash_attn", "varlen", "auto"]  # flex compiles: few shapes, further down
BF16 = torch.bfloat16


def refusal(backend, dtype=BF16, window=FULL, head_dim=64, **options):
    return None if backend == "auto" else unsupported_reason(backend, CUDA, dtype, window, head_dim, **options)


def skip_if_refused(backend, dtype=BF16, window=FULL, head_dim=64, **options):
    reason = refusal(backend, dtype, window, head_dim, **options)
    if reason is not None:
        pytest.skip(reason)


@gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("tokens", [37, 256])
@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_gpu_matches_brute_force(backend, tokens, causal, head_dim):
    skip_if_refused(backend, head_dim=head_dim, causal=causal, tokens=tokens)
    check(backend, CUDA, BF16, causal, FULL, head_dim, tokens)


@gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_gpu_one_token(backend, causal):
    able = [size for size in (8, 16, 32, 64, 128) if refusal(backend, head_dim=size, causal=causal, tokens=1) is None]
    for head_dim in able:
        check(backend, CUDA, BF16, causal, FULL, head_dim, 1)
    if not able:
        skip_if_refused(backend, causal=causal, tokens=1)


@gpu
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_gpu_other_dtypes(backend, dtype):
    skip_if_refused(backend, dtype, tokens=TOKENS)
    check(backend, CUDA, dtype, True, FULL, 64)


@gpu
@pytest.mark.parametrize("backend", ["eager", "flash_attn", "varlen", "auto"])
@pytest.mark.parametrize("window", windows_of(TOKENS))
def test_gpu_window_matches_brute_force(backend, window):
    skip_if_refused(backend, window=window, tokens=TOKENS)
    for causal in (True, False):
        check(backend, CUDA, BF16, causal, window, 64)


@gpu
@pytest.mark.parametrize("backend", ["eager", "flash_attn", "varlen"])
@pytest.mark.parametrize("tokens", [1, 256])
def test_gpu_window_matches_brute_force_at_other_lengths(backend, tokens):
    skip_if_refused(backend, window=(5, 0), tokens=tokens)
    for causal, window in itertools.product((True, False), windows_of(tokens)):
        check(backend, CUDA, BF16, causal, window, 64, tokens)


@gpu
@pytest.mark.parametrize("backend", ["eager", "flash_attn", "varlen"])
@pytest.mark.parametrize("window", TWO_SIDED)
def test_gpu_two_sided_window_matches_brute_force(backend, window):
    skip_if_refused(backend, window=window, causal=False, tokens=TOKENS)
    for head_dim in (8, 64, 128):
        check(backend, CUDA, BF16, False, window, head_dim)


@gpu
@pytest.mark.parametrize(("causal", "window"), [(True, FULL), (False, FULL), (True, (5, 0)), (True, (TOKENS - 1, 0))])
def test_gpu_flex_matches_brute_force(causal, window):
    """Each of them is compiled, forward and backward: some 5 s."""
    skip_if_refused("flex", window=window, causal=causal, tokens=TOKENS)
    check("flex", CUDA, BF16, causal, window, 64)


@gpu
@pytest.mark.parametrize("backend", ON_GPU)
def test_gpu_layouts_give_the_same_numbers(backend):
    skip_if_refused(backend, tokens=TOKENS)
    for layout, causal in itertools.product(LAYOUTS, (True, False)):
        check_layout(backend, CUDA, BF16, causal, FULL, layout, 64)
    check_expanded_upstream(backend, CUDA, BF16)


@gpu
@pytest.mark.parametrize("backend", ["eager", "flash_attn", "varlen"])
def test_gpu_layouts_give_the_same_numbers_with_a_window(backend):
    skip_if_refused(backend, window=(5, 0), tokens=TOKENS)
    for layout in LAYOUTS:
        check_layout(backend, CUDA, BF16, True, (5, 0), layout, 64)
        check_layout(backend, CUDA, BF16, False, (3, 2), layout, 64)


@gpu
@pytest.mark.parametrize("backend", [*ON_GPU, "flex"])
def test_gpu_packed_gives_the_same_numbers(backend):
    skip_if_refused(backend, tokens=TOKENS)
    check_packed(backend, CUDA, BF16, True, FULL)
    if backend != "flex":
        check_packed(backend, CUDA, BF16, False, FULL)
        check_packed(backend, CUDA, BF16, True, FULL, head_dim=128, tokens=256)


@gpu
@pytest.mark.parametrize("backend", ["eager", "flash_attn", "varlen", "auto"])
def test_gpu_packed_gives_the_same_numbers_with_a_window(backend):
    skip_if_refused(backend, window=(5, 0), tokens=TOKENS)
    check_packed(backend, CUDA, BF16, True, (5, 0))
    check_packed(backend, CUDA, BF16, False, (3, 2))


@gpu
@pytest.mark.parametrize("backend", [name for name in ON_GPU if name not in ("varlen", "auto")])
def test_gpu_dropout_drops_and_keeps_the_mean(backend):
    skip_if_refused(backend, causal=False, dropout_p=0.5, tokens=64)
    check_dropout(backend, CUDA, BF16)


@gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [FULL, (5, 0)])
def test_gpu_auto_is_the_backend_it_chooses(window, packed):
    qkv = torch.randn(2, 256, 3, 4, 64, device="cuda", dtype=BF16, requires_grad=True)
    chosen, _ = choose_backend(CUDA, BF16, window, 64, tokens=256, packed=packed)
    outputs = [
        packed_attention(qkv, backend=backend, window=window)
        if packed
        else attend(*qkv.unbind(2), backend=backend, window=window)
        for backend in ("auto", chosen)
    ]
    assert torch.equal(*outputs)


@gpu
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("sdpa_flash", "scaled_dot_product_flash_attention"),
        ("sdpa_efficient", "scaled_dot_product_efficient_attention"),
        ("sdpa_cudnn", "scaled_dot_product_cudnn_attention"),
        ("flash_attn", "flash_attn"),
        ("varlen", "varlen_attn"),
    ],
)
def test_gpu_observed_kernel_is_the_one_that_ran(backend, name):
    skip_if_refused(backend, tokens=64)
    q = torch.randn(1, 64, 2, 64, device="cuda", dtype=BF16, requires_grad=True)
    with observe_kernel() as observer:
        attend(q, q, q, backend=backend)
    assert name in observer.name


@gpu
@needs_flash_attn
@pytest.mark.parametrize("window", [FULL, (64, 0)])
def test_gpu_layer_equals_the_mha_of_flash_attn(window):
    """Our attention layer and flash_attn.modules.mha.MHA on copied weights: the same numbers, gradients too."""
    from flash_attn.modules.mha import MHA

    from transformer_based_llm import CausalSelfAttention, model_config

    config = model_config("gpt2", attention_backend="flash_attn", attention_window=window)
    torch.manual_seed(0)
    ours = CausalSelfAttention(config).cuda()
    theirs = MHA(
        config.embedding_dim,
        config.num_heads,
        qkv_proj_bias=False,
        out_proj_bias=False,
        causal=True,
        window_size=window,
        use_flash_attn=True,
        device="cuda",
    )
    theirs.load_state_dict({"Wqkv.weight": ours.qkv.weight, "out_proj.weight": ours.output.weight})
    x = torch.randn(4, 256, config.embedding_dim, device="cuda")
    upstream = torch.randn_like(x)
    results = []
    for layer in (ours, theirs):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cuda", dtype=BF16):
            output = layer(inputs)
        output.backward(upstream.to(output.dtype))
        results.append([output, inputs.grad, *(parameter.grad for parameter in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("backend", ["flash_attn", "sdpa_cudnn"])
def test_gpu_seam_costs_less_than_2_percent(backend):
    """Forward and backward through the seam and without it, in turn: 10 blocks of 20 iterations each."""
    skip_if_refused(backend, tokens=1024)
    torch.manual_seed(0)
    shape = (32, 1024, 32, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3))
    upstream = torch.randn(shape, device="cuda", dtype=BF16)

    def through():
        return attend(q, k, v, backend=backend)

    if backend == "flash_attn":
        from flash_attn import flash_attn_func

        def without():
            return flash_attn_func(q, k, v, causal=True)

    else:

        def without():
            with sdpa_kernel(SDPA_KERNELS[backend]):
                output = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
            return output.transpose(1, 2)

    def block(function) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            torch.autograd.grad(function(), (q, k, v), upstream)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    times = {through: [], without: []}
    for function in times:  # warms up
        block(function)
    for number in range(10):
        for function in (through, without) if number % 2 else (without, through):
            times[function].append(block(function))
    ratio = statistics.median(times[through]) / statistics.median(times[without])
    assert ratio <= 1.02, f"{ratio:.4f}"
