"""Every attention backend against a brute-force mask in fp64: outputs, gradients, windows, layouts, refusals."""

import pytest
import torch

import attention
from attention import (
    FULL,
    choose_flash_backend,
    observe_kernel,
    packed_attention,
    parse_window,
    score_bias,
    unsupported_reason,
)
from attention import (
    attention as attend,
)
from utils import SettingsError

CPU = torch.device("cpu")
TOKENS = 37
WINDOWS = [(0, 0), (1, 0), (5, 0), (TOKENS - 2, 0), (TOKENS - 1, 0), (TOKENS, 0)]


def device_of(backend: str) -> torch.device:
    return torch.device("cuda") if backend.startswith("cuda:") else CPU


def brute_force(q, k, v, causal, window, scale):
    """Attention in fp64 with the mask written out key by key."""
    tokens = q.shape[1]
    left, right = window
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        for j in range(tokens):
            after = causal and j > i
            too_old = left >= 0 and j < i - left
            too_new = right >= 0 and j > i + right
            visible[i, j] = not (after or too_old or too_new)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    scores = scores.masked_fill(~visible.to(scores.device), float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def plain_sdpa(q, k, v, causal, window, scale):
    """Plain PyTorch in the dtype of its inputs: matmul, mask, softmax, matmul; the yardstick of the 2x rule."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale + score_bias(q.shape[1], causal, window, q.dtype, q.device)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def output_and_gradients(function, tensors, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    output = function(*leaves)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def check(backend, device, dtype, causal, window, head_dim=16, tokens=TOKENS, scale=None):
    """Error against fp64 at most twice that of plain PyTorch in the same dtype, plus one rounding of the dtype."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(2, tokens, 3, head_dim, generator=generator).to(device, dtype) for _ in range(4))
    true_scale = head_dim**-0.5 if scale is None else scale
    exact = output_and_gradients(
        lambda *x: brute_force(*x, causal, window, true_scale), [x.double() for x in (q, k, v)], upstream.double()
    )
    plain = output_and_gradients(lambda *x: plain_sdpa(*x, causal, window, true_scale), (q, k, v), upstream)
    ours = output_and_gradients(
        lambda *x: attend(*x, backend=backend, causal=causal, window=window, softmax_scale=scale), (q, k, v), upstream
    )
    for name, a, b, c in zip(("output", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        error, allowed = (a.double() - c).abs().max(), 2 * (b.double() - c).abs().max() + torch.finfo(dtype).eps
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "sdpa_flash"])
def test_matches_brute_force(backend, causal, dtype):
    check(backend, CPU, dtype, causal, FULL)


@pytest.mark.parametrize("window", [*WINDOWS, (3, 2), (-1, 0)])
@pytest.mark.parametrize("causal", [True, False])
def test_eager_window_matches_brute_force(window, causal):
    check("eager", CPU, torch.float32, causal, window)


def test_a_window_of_64_0_is_65_keys():
    visible = score_bias(100, True, (64, 0), torch.float32, CPU) == 0
    assert visible.sum(-1).tolist() == [min(i + 1, 65) for i in range(100)]


def test_softmax_scale_is_used():
    check("eager", CPU, torch.float32, True, FULL, scale=0.5)
    check("sdpa", CPU, torch.float32, True, FULL, scale=0.5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_packed_equals_separate(backend):
    qkv = torch.randn(2, 9, 3, 4, 8)
    assert torch.equal(packed_attention(qkv, backend=backend), attend(*qkv.unbind(2), backend=backend))


def test_eager_dropout_drops_and_keeps_the_mean():
    q, k = torch.zeros(1, 64, 1, 8), torch.zeros(1, 64, 1, 8)
    v = torch.ones(1, 64, 1, 8)
    torch.manual_seed(0)
    output = attend(q, k, v, backend="eager", causal=False, dropout_p=0.5)
    assert output.std() > 0.01
    assert abs(output.mean() - 1) < 0.1


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash"])
def test_sdpa_refuses_a_window(backend):
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(SettingsError, match=r"attention_window needs attention_backend flash_attn"):
        attend(q, q, q, backend=backend, window=(2, 0))
    assert "has no window" in unsupported_reason(backend, CPU, torch.float32, (2, 0))


def test_unknown_backend_is_an_error():
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(SettingsError, match="unknown"):
        attend(q, q, q, backend="flash")


@pytest.mark.parametrize("text", ["64", "a,b", "1,2,3", "-2,0", "64,", "1.5,0", ""])
def test_bad_window(text):
    with pytest.raises(SettingsError, match="attention_window"):
        parse_window(text)


def test_good_window():
    assert parse_window("64,0") == parse_window("(64, 0)") == (64, 0)
    assert parse_window(None) == FULL


def test_observed_kernel_is_the_one_that_ran():
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    names = {}
    for backend in ("eager", "sdpa_flash"):
        with observe_kernel() as observer:
            attend(q, q, q, backend=backend)
        names[backend] = observer.name
    assert names["eager"].startswith("eager")
    assert "scaled_dot_product_flash_attention" in names["sdpa_flash"]


def pretend_gpu(monkeypatch, capability, package):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(attention, "flash_attn_error", lambda: None if package else "flash-attn is not installed")


@pytest.mark.parametrize(
    ("capability", "package", "dtype", "window", "expected"),
    [
        ((9, 0), True, torch.bfloat16, FULL, "flash_attn"),
        ((9, 0), True, torch.bfloat16, (64, 0), "flash_attn"),
        ((8, 0), False, torch.bfloat16, FULL, "sdpa_flash"),
        ((8, 6), False, torch.float16, FULL, "sdpa_flash"),
    ],
)
def test_choice_of_the_flash_kernel(monkeypatch, capability, package, dtype, window, expected):
    pretend_gpu(monkeypatch, capability, package)
    assert choose_flash_backend(torch.device("cuda"), dtype, window, 64) == expected


@pytest.mark.parametrize(
    ("capability", "package", "dtype", "window", "reason"),
    [
        ((7, 5), True, torch.float16, FULL, "compute capability 8.0"),
        ((9, 0), True, torch.float32, FULL, "bf16 or fp16"),
        ((9, 0), False, torch.bfloat16, (64, 0), "not installed"),
    ],
)
def test_no_flash_kernel_says_why(monkeypatch, capability, package, dtype, window, reason):
    pretend_gpu(monkeypatch, capability, package)
    with pytest.raises(SettingsError, match=reason):
        choose_flash_backend(torch.device("cuda"), dtype, window, 64)


# ------------------------------------------------------------------------------------------------------------ on a GPU

gpu = pytest.mark.gpu
needs_flash_attn = pytest.mark.skipif(
    attention.flash_attn_error() is not None, reason="flash-attn is not installed with its kernels"
)


@gpu
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [37, 256])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "sdpa_flash", "flash_attn"])
def test_gpu_matches_brute_force(backend, tokens, causal, head_dim):
    cuda = torch.device("cuda")
    if backend == "flash_attn" and attention.flash_attn_error():
        pytest.skip("flash-attn is not installed")
    check(backend, cuda, torch.bfloat16, causal, FULL, head_dim, tokens)


@gpu
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", ["eager", "flash_attn"])
def test_gpu_window_matches_brute_force(backend, window):
    if backend == "flash_attn" and attention.flash_attn_error():
        pytest.skip("flash-attn is not installed")
    check(backend, torch.device("cuda"), torch.bfloat16, True, window, 64)


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
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = layer(inputs)
        output.backward(upstream.to(output.dtype))
        results.append([output, inputs.grad, *(parameter.grad for parameter in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@gpu
@needs_flash_attn
def test_gpu_observed_kernel_of_flash_attn():
    q = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with observe_kernel() as observer:
        attend(q, q, q, backend="flash_attn")
    assert "flash_attn" in observer.name
