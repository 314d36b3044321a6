"""The chunked and fused losses: values and gradients of the full one, in every chunk size, precision and reduction."""

import json

import pytest
import torch
import torch.nn.functional as F

import cross_entropy
from cross_entropy import (
    LOSSES,
    add_product,
    linear_cross_entropy,
    softmax_gradient,
    softmax_gradient_for_compile,
    unsupported_reason,
)
from memory_tracker import MemoryTracker
from precision import autocast
from technique_bench import relative_error
from utils import GIB, SettingsError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOKENS, WIDTH, VOCAB = 37, 16, 50


def tensors(device=CPU, dtype=torch.float32, tokens=TOKENS, width=WIDTH, vocab_size=VOCAB):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=generator).to(device, dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab_size, (tokens,), generator=generator).to(device)


def exact(hidden, weight, targets, reduction="mean", scale=1.0):
    """Loss and both gradients in fp64, by PyTorch."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, targets, reduction=reduction)
    (loss * scale).backward()
    return [loss.detach(), hidden.grad, weight.grad]


def result(loss, hidden, weight, targets, precision="fp32", scale=1.0, **options):
    hidden.grad = weight.grad = None
    with autocast(precision, hidden.device):
        if loss == "full":
            value = cross_entropy.cross_entropy(F.linear(hidden, weight), targets)
        else:
            value = linear_cross_entropy(hidden, weight, targets, loss=loss, **options)
    (value * scale).backward()
    return [value.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_chunks_give_the_loss_and_the_gradients(chunk, reduction):
    problem = tensors()
    own = result("chunked", *problem, reduction=reduction, chunk_tokens=chunk, scale=0.7)
    assert relative_error(own, exact(*problem, reduction, 0.7)) < 2e-6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_16_bits_no_worse_than_the_full_loss(precision):
    problem = tensors()
    reference = exact(*problem)
    full, own = (result(loss, *problem, precision=precision) for loss in ("full", "chunked"))
    assert [x.dtype for x in own] == [x.dtype for x in full]
    for mine, plain, right in zip(own, full, reference, strict=True):
        assert relative_error([mine], [right]) <= 2 * relative_error([plain], [right]) + 1e-3


def test_bf16_parameters_sum_their_gradient_in_fp32():
    """1,000 chunks of one token: a bf16 sum would lose the last ones."""
    hidden, weight, targets = tensors(dtype=torch.bfloat16, tokens=1000)
    value, _, gradient = result("chunked", hidden, weight, targets, chunk_tokens=1)
    right = exact(hidden, weight, targets)
    assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert relative_error([gradient], [right[2]]) < 4e-3


def test_large_gradient_scale_does_not_underflow_in_fp16():
    """What a gradient scaler multiplies with arrives after the products, so it must not be needed inside them."""
    problem = tensors(tokens=2000)
    plain, scaled = (result("chunked", *problem, precision="fp16", scale=scale) for scale in (1.0, 2.0**16))
    assert relative_error([scaled[1] / 2**16], [plain[1]]) < 1e-6
    assert relative_error([plain[1]], [exact(*problem)[1]]) < 5e-3


@pytest.mark.parametrize("function", [softmax_gradient, softmax_gradient_for_compile])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_softmax_of_a_chunk(function, dtype):
    logits = (10 * torch.randn(6, 40, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[0, 3] = 300.0  # exp would overflow
    targets = torch.tensor([3, 0, 5, 39, 5, 7])
    exact_logits = logits.double().requires_grad_()
    losses = F.cross_entropy(exact_logits, targets, reduction="none")
    losses.sum().backward()
    own = function(logits, targets)
    assert own.dtype == torch.float32 and torch.allclose(own.double(), losses, atol=2e-5)
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    assert (logits.double() - exact_logits.grad).abs().max() < bound


def test_without_gradients_there_are_none(monkeypatch):
    """Also none on the way: the head is a parameter, which asks for its gradient even then."""
    hidden, weight, targets = tensors()
    weight = torch.nn.Parameter(weight.detach())
    monkeypatch.setattr(cross_entropy, "softmax_gradient", None)
    with torch.no_grad():
        value = linear_cross_entropy(hidden, weight, targets, loss="chunked", reduction="sum", chunk_tokens=7)
    assert not value.requires_grad and value.dtype == torch.float64
    assert abs(value.item() - exact(hidden, weight, targets, "sum")[0].item()) < 1e-4
    with pytest.raises(TypeError, match="not callable"):  # with gradients it is needed
        linear_cross_entropy(hidden, weight, targets, loss="chunked")


def test_only_the_gradient_that_is_wanted():
    hidden, weight, targets = tensors()
    right = exact(hidden, weight, targets)
    value = linear_cross_entropy(hidden, weight.detach(), targets, loss="chunked")
    value.backward()
    assert relative_error([hidden.grad], [right[1]]) < 2e-6


def test_a_second_backward_is_an_error():
    hidden, weight, targets = tensors()
    value = linear_cross_entropy(hidden, weight, targets, loss="chunked")
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"can run once|modified by an inplace operation"):
        value.backward()


def test_leading_dimensions_are_batch_and_tokens():
    hidden, weight, targets = tensors(tokens=36)
    flat = linear_cross_entropy(hidden, weight, targets, loss="chunked")
    shaped = linear_cross_entropy(hidden.view(4, 9, WIDTH), weight, targets.view(4, 9), loss="chunked")
    assert flat.item() == shaped.item()


def test_the_peak_is_a_chunk_of_logits():
    """Without the full loss's 12 bytes a logit: 4 a logit of one chunk, the gradients, and little else."""
    tokens, vocab, chunk = 2048, 4096, 128
    hidden, weight, targets = tensors(tokens=tokens, vocab_size=vocab)
    module = torch.nn.Module()
    module.held = torch.nn.ParameterList([hidden, weight])

    def peak(loss, **options):
        tracker = MemoryTracker(CPU, roots=(module,))
        with tracker.step(1), tracker.phase("step"):
            result(loss, hidden, weight, targets, **options)
        row = tracker.summary()["step"]
        hidden.grad = weight.grad = None
        return (row["peak_allocated_gib"] - row["start_allocated_gib"]) * GIB

    gradients = 4 * WIDTH * (tokens + vocab)
    assert 12 * tokens * vocab <= peak("full") < 12 * tokens * vocab * 1.05 + gradients
    assert 4 * chunk * vocab <= peak("chunked", chunk_tokens=chunk) < 6 * chunk * vocab + 2 * gradients


def test_fp16_products_do_not_overflow():
    """One target for all and large hidden states: the sum over a chunk is beyond fp16's 65,504."""
    tokens = 30_000
    hidden = torch.full((tokens, 4), 4.0).requires_grad_()
    weight, targets = torch.zeros(8, 4).requires_grad_(), torch.zeros(tokens, dtype=torch.int64)
    own = result("chunked", hidden, weight, targets, precision="fp16", chunk_tokens=tokens)
    assert relative_error(own, exact(hidden, weight, targets)) < 2e-3


def test_add_product_sums_16_bit_products():
    left, right = torch.randn(8, 5).bfloat16(), torch.randn(5, 6).bfloat16()
    total = add_product(torch.ones(8, 6), left, right)
    assert total.dtype == torch.float32 and torch.allclose(total, 1 + (left @ right).float(), atol=1e-2)
    assert torch.equal(add_product(None, left, right), (left @ right).float())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_hidden_states_that_are_not_contiguous(precision):
    hidden, weight, targets = tensors(dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    turned = hidden.detach().T.contiguous().T.requires_grad_()
    weight = weight.detach().to(turned.dtype).requires_grad_()
    own = result("chunked", turned, weight, targets, precision, chunk_tokens=5)
    assert not turned.is_contiguous()
    assert relative_error(own, exact(turned, weight, targets)) < (2e-6 if precision == "fp32" else 2e-2)


def test_refusals(monkeypatch):
    assert [unsupported_reason(loss, CPU) is None for loss in LOSSES] == [True, True, False]
    hidden, weight, targets = tensors()
    with pytest.raises(SettingsError, match=r"--loss fused cannot run here: .* need a GPU; take --loss chunked"):
        linear_cross_entropy(hidden, weight, targets, loss="fused")
    monkeypatch.setattr(cross_entropy, "find_spec", lambda name: None)
    assert "uv sync --extra liger" in unsupported_reason("fused", CUDA)
    assert unsupported_reason("chunked", CUDA) is None


def test_main_measures_every_variant(tmp_path, monkeypatch, capsys):
    sizes = ["--tokens", "256", "--width", "16", "--vocab_size", "512", "--chunk_tokens", "32", "--repeats", "2"]
    words = ["cross_entropy.py", *sizes, "--output_folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    assert cross_entropy.main() == 0
    info = json.loads((tmp_path / "techniques" / "cross_entropy" / "run.json").read_text())
    rows = {row["variant"]: row for row in info["results"]["rows"]}
    assert rows["chunked"]["saved_gib"] > 0 and rows["chunked"]["exactness"] == "within rounding"
    assert rows["chunked"]["saved_gib"] == pytest.approx(rows["chunked"]["formula_saved_gib"], rel=0.1)
    assert len(info["results"]["break_even"]) == 2 and "chunked is faster" in capsys.readouterr().out


def test_main_says_when_a_variant_is_wrong(tmp_path, monkeypatch, capsys):
    def wrong(logits, targets):
        losses = softmax_gradient(logits, targets)
        logits.mul_(1.1)
        return losses

    monkeypatch.setattr(cross_entropy, "softmax_gradient", wrong)
    sizes = ["--tokens", "64", "--width", "16", "--vocab_size", "64", "--chunk_tokens", "32", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["cross_entropy.py", *sizes, "--output_folder", str(tmp_path)])
    assert cross_entropy.main() == 1
    assert "error beyond rounding: chunked" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("vocab_size", [1000, 32000, 70000])
def test_gpu_chunks_are_as_exact_as_the_full_loss(precision, compiled, vocab_size):
    problem = tensors(CUDA, tokens=300, width=64, vocab_size=vocab_size)
    right = exact(*problem)
    full = result("full", *problem, precision=precision)
    own = result("chunked", *problem, precision=precision, chunk_tokens=128, compiled=compiled)
    for mine, plain, truth in zip(own, full, right, strict=True):
        assert relative_error([mine], [truth]) <= 2 * relative_error([plain], [truth]) + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [7, 1024, 32000, 65536])
def test_gpu_triton_kernel_is_the_plain_function(dtype, vocab_size):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (5 * torch.randn(33, vocab_size, device=CUDA, generator=generator)).to(dtype)
    targets = torch.randint(vocab_size, (33,), device=CUDA, generator=generator)
    plain, own = logits.clone(), logits.clone()
    losses = softmax_gradient(plain, targets)
    seen = cross_entropy.triton_softmax_gradient()(own, targets)
    assert torch.allclose(seen, losses, atol=2e-5, rtol=1e-5)
    assert torch.allclose(own.float(), plain.float(), atol=1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_a_second_backward_is_an_error(compiled):
    """Also where a kernel writes behind autograd's back."""
    hidden, weight, targets = tensors(CUDA)
    value = linear_cross_entropy(hidden, weight, targets, loss="chunked", compiled=compiled)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"can run once|modified by an inplace operation"):
        value.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16),
                                    (torch.bfloat16, torch.bfloat16)])  # fmt: skip
def test_gpu_scale_is_the_plain_product(dtypes):
    values = torch.randn(777, 33, device=CUDA).to(dtypes[0])
    factor = torch.tensor(0.37, device=CUDA)
    expected = (values.float() * factor).to(dtypes[1])
    kept = values.data_ptr()
    for function in (cross_entropy.scale, cross_entropy.triton_scale()):
        own = function(values.clone(), factor, dtypes[1])
        assert own.dtype == dtypes[1] and torch.equal(own, expected)
    same = cross_entropy.triton_scale()(values, factor, dtypes[1])
    assert (same.data_ptr() == kept) == (dtypes[0] == dtypes[1])


@pytest.mark.gpu
@pytest.mark.skipif(cross_entropy.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gpu_fused_is_as_exact_as_the_full_loss(precision, reduction):
    problem = tensors(CUDA, tokens=300, width=64, vocab_size=1000)
    right = exact(*problem, reduction)
    own = result("fused", *problem, precision=precision, reduction=reduction)
    full = result("full", *problem, precision=precision)
    plain_right = exact(*problem)
    for mine, plain, truth, plain_truth in zip(own, full, right, plain_right, strict=True):
        bound = 2 * relative_error([plain], [plain_truth]) + 2e-3
        assert relative_error([mine], [truth]) <= bound


@pytest.mark.gpu
def test_gpu_weight_gradient_is_summed_in_fp32():
    total = None
    left, right = (torch.randn(64, 64, device=CUDA).bfloat16() for _ in range(2))
    exact_sum = 0
    for _ in range(50):
        total = add_product(total, left, right)
        exact_sum = exact_sum + left.double() @ right.double()
    assert relative_error([total], [exact_sum]) < 1e-5
