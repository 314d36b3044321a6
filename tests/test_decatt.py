"""decatt.py: known values, the textbook's value and gradients, what autograd keeps, any layout, the compiler, main."""

import json
import sys
from pathlib import Path

import pytest
import torch

import decatt
from decatt import HeadGram, decorrelation, head_correlation, textbook_decorrelation
from utils import SettingsError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE = (3, 7, 4, 5)  # images, tokens, heads, head_dim


pytestmark = pytest.mark.usefixtures("one_thread")


def random_heads(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or SHAPE, generator=generator).to(device, dtype)


def term_and_gradient(function, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads = heads.detach().requires_grad_()
    term = function(heads)
    (gradient,) = torch.autograd.grad(1000 * term, heads)
    return term.detach(), gradient


# --- Known values -----------------------------------------------------------------------------------------------------


def test_identical_heads_are_one_and_orthogonal_ones_zero():
    one = random_heads(3, 7, 1, 5)
    assert decorrelation(one.expand(3, 7, 4, 5)).item() == pytest.approx(1, abs=1e-6)
    assert decorrelation(one * torch.tensor([1.0, -2.0, 0.5])[:, None]).item() == pytest.approx(1, abs=1e-6)
    orthogonal = torch.zeros(2, 6, 3, 4)
    for head in range(3):
        orthogonal[:, 2 * head : 2 * head + 2, head] = random_heads(2, 2, 4, seed=head)  # tokens of its own
    assert decorrelation(orthogonal).item() == 0
    mixed = torch.cat([one, one, torch.zeros(3, 7, 1, 5)], 2)  # one of three pairs is identical
    assert decorrelation(mixed).item() == pytest.approx(1 / 3, abs=1e-6)


@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 8), (9, 4), (65, 16)])
def test_random_heads_are_one_over_their_numbers(tokens, head_dim):
    """C^2 of two directions is Beta(1/2, (n - 1) / 2) distributed: mean 1 / n, variance 2 (n - 1) / (n^2 (n + 2))."""
    n, images, heads = tokens * head_dim, 2000, 3
    pairs = images * heads * (heads - 1) / 2  # pairs of one image are independent
    deviation = (2 * (n - 1) / (n**2 * (n + 2)) / pairs) ** 0.5
    assert abs(decorrelation(random_heads(images, tokens, heads, head_dim)).item() - 1 / n) < 4 * deviation


def test_scale_and_order_of_heads_do_not_matter():
    heads = random_heads()
    term = decorrelation(heads).item()
    scaled = heads * torch.tensor([1e-3, 7.0, 1.0, 2e4])[:, None]
    assert decorrelation(scaled).item() == pytest.approx(term, rel=1e-5)
    assert decorrelation(heads[:, :, [2, 0, 3, 1]]).item() == pytest.approx(term, rel=1e-6)
    assert decorrelation(heads[:, [6, 5, 4, 3, 2, 1, 0]]).item() == pytest.approx(term, rel=1e-5)  # tokens of all heads
    assert decorrelation(heads[[2, 1, 0]]).item() == pytest.approx(term, rel=1e-6)
    turned = heads.clone()
    turned[:, :, 1] = turned[:, :, 1].flip(1)  # tokens of one head: another correlation
    assert decorrelation(turned).item() != pytest.approx(term, rel=1e-2)


def test_correlation_by_hand():
    heads = random_heads()
    flat = heads.transpose(1, 2).flatten(2).numpy()
    found = head_correlation(heads)
    assert found.shape == (3, 4, 4) and found.dtype == torch.float32
    for image in range(3):
        for i in range(4):
            for j in range(4):
                a, b = flat[image, i], flat[image, j]
                expected = (a @ b) / ((a @ a) * (b @ b)) ** 0.5
                assert found[image, i, j].item() == pytest.approx(expected, abs=1e-5)


def test_errors_are_sentences():
    with pytest.raises(SettingsError, match="at least two of them; raise --num_heads"):
        decorrelation(random_heads(2, 3, 1, 4))
    for function in (decorrelation, head_correlation):
        with pytest.raises(SettingsError, match=r"head_correlation wants head outputs .* not \(2, 3, 4\)"):
            function(random_heads(2, 3, 4))


@pytest.mark.parametrize("zeros", [1, 4])
def test_heads_that_are_all_zeros(zeros):
    heads = random_heads()
    heads[:, :, :zeros] = 0
    term, gradient = term_and_gradient(decorrelation, heads)
    assert term.isfinite() and gradient.isfinite().all() and gradient[:, :, :zeros].abs().max() == 0
    kept = 4 - zeros
    expected = textbook_decorrelation(heads[:, :, zeros:]).item() * kept * (kept - 1) / 12 if kept > 1 else 0
    assert term.item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert head_correlation(heads)[:, 0].abs().max() == 0


# --- The textbook -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [SHAPE, (2, 65, 3, 8), (1, 1, 2, 3)])
def test_value_and_gradient_are_the_textbooks(shape, device):
    heads = random_heads(*shape, device=device)
    heads = heads + heads.mean(2, keepdim=True)  # correlated
    term, gradient = term_and_gradient(decorrelation, heads)
    exact, expected = term_and_gradient(textbook_decorrelation, heads.double())
    assert term.dtype == torch.float32 and term.item() == pytest.approx(exact.item(), rel=1e-5)
    assert gradient.dtype == heads.dtype and gradient.shape == heads.shape
    assert torch.allclose(gradient.double(), expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item() + 1e-4)


def test_gradient_of_the_gram_matrix_by_differences(monkeypatch):
    """autograd's own check in fp64, with the cast to fp32 taken away."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    heads = random_heads(2, 3, 3, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(HeadGram.apply, (heads,))
    assert torch.autograd.gradcheck(decorrelation, (heads,))


def test_descending_the_term_decorrelates():
    heads = (random_heads() + 2 * random_heads(3, 7, 1, 5, seed=1)).requires_grad_()
    optimizer = torch.optim.SGD([heads], lr=50.0)
    before = decorrelation(heads).item()
    for _ in range(50):
        optimizer.zero_grad()
        decorrelation(heads).backward()
        optimizer.step()
    assert before > 0.3 and decorrelation(heads).item() < 0.2 * before


# --- Layouts, chunks, precision, memory -------------------------------------------------------------------------------


def layouts() -> dict[str, torch.Tensor]:
    """The same numbers as views of other storages."""
    heads = random_heads()
    packed = torch.zeros(3, 7, 3, 4, 5)
    packed[:, :, 2] = heads
    return {
        "qkv slice": packed[:, :, 2],
        "heads before tokens": heads.transpose(1, 2).contiguous().transpose(1, 2),
        "every second image": heads.repeat_interleave(2, 0)[::2],
        "head_dim first": heads.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    }


@pytest.mark.parametrize("name", list(layouts()))
def test_any_layout(name):
    view = layouts()[name]
    assert not view.is_contiguous() and torch.equal(view, random_heads())
    term, gradient = term_and_gradient(decorrelation, random_heads())
    found, own = term_and_gradient(decorrelation, view)
    assert found.item() == pytest.approx(term.item(), rel=1e-6) and torch.allclose(own, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("numbers", [1, 140, 300])
def test_chunks_of_images_change_nothing(monkeypatch, numbers):
    """140 numbers an image: one at a time, one, and two of them."""
    heads = random_heads()
    whole = term_and_gradient(decorrelation, heads)
    calls, gram = [], decatt._gram
    monkeypatch.setattr(decatt, "_gram", lambda part: calls.append(len(part)) or gram(part))
    monkeypatch.setattr(decatt, "CHUNK_NUMBERS", numbers)
    found = term_and_gradient(decorrelation, heads)
    assert calls == ([2, 1] if numbers == 300 else [1, 1, 1])
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_fp32(dtype, device):
    """bf16 squares of 4,096 numbers, added up in bf16, would stay at 256; those of fp16 would be infinite."""
    heads = 30 * random_heads(2, 64, 3, 64, dtype=dtype, device=device) + 20
    gram = HeadGram.apply(heads)
    flat = heads.double().transpose(1, 2).flatten(2)
    assert gram.dtype == torch.float32 and torch.allclose(gram.double(), flat @ flat.transpose(1, 2), rtol=1e-5)
    term, gradient = term_and_gradient(decorrelation, heads)
    exact, expected = term_and_gradient(textbook_decorrelation, heads.double())
    assert term.item() == pytest.approx(exact.item(), rel=1e-5) and gradient.dtype == dtype
    error = (gradient.double() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps
    with torch.autocast(device, dtype=torch.bfloat16):
        assert decorrelation(heads).item() == pytest.approx(term.item(), rel=1e-6)


def kept_bytes(function, heads: torch.Tensor) -> tuple[int, int]:
    """Bytes that autograd keeps for the backward pass: in the input's storage, and in others."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        term = function(heads)
    assert term.requires_grad
    own = storages.pop(heads.untyped_storage().data_ptr(), 0)
    return own, sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_but_the_input_itself(dtype):
    heads = random_heads(4, 65, 3, 16, dtype=dtype).requires_grad_()
    own, others = kept_bytes(decorrelation, heads)
    assert own == heads.numel() * heads.element_size()
    assert others <= 6 * 4 * (4 * 3 * 3)  # a few matrices of (images, heads, heads) in fp32
    longer = random_heads(4, 650, 3, 16, dtype=dtype).requires_grad_()
    assert kept_bytes(decorrelation, longer)[1] == others  # nothing grows with the tokens
    _, textbook = kept_bytes(textbook_decorrelation, heads)
    assert textbook >= 2 * 4 * heads.numel()  # the copy in fp32, and the copy of unit length


def test_a_slice_of_qkv_is_kept_as_that_storage():
    qkv = random_heads(4, 65, 3, 3, 16).requires_grad_()
    own, others = kept_bytes(lambda whole: decorrelation(whole[:, :, 2]), qkv)
    assert own == 4 * qkv.numel() and others <= 6 * 4 * (4 * 3 * 3)


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        assert not decorrelation(random_heads().requires_grad_()).requires_grad


# --- The compiler and the script --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_is_the_same_function(device):
    """In one graph; a GPU's with the compiler's own kernels."""
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(decorrelation, fullgraph=True, dynamic=False, backend=backend)
    heads = random_heads(device=device)
    term, gradient = term_and_gradient(decorrelation, heads)
    found, own = term_and_gradient(compiled, heads)
    assert found.item() == pytest.approx(term.item(), rel=1e-5)
    assert torch.allclose(own, gradient, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


TINY = ["--batch_size=2", "--tokens=5", "--num_heads=2", "--head_dim=4", "--rounds=2", "--repeats=1"]


def main(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["decatt.py", *map(str, words)])
    return decatt.main()


def test_main_leaves_its_rows(tmp_path, monkeypatch, capsys):
    assert main(monkeypatch, *TINY, "--use_compile=false", f"--output_folder={tmp_path}") == 0
    path = json.loads(capsys.readouterr().out.splitlines()[-1])["run"]
    with (Path(path) / "run.json").open() as file:
        results = json.load(file)["results"]
    rows = {row["variant"]: row for row in results["rows"]}
    assert list(rows) == ["attention", "with the textbook term", "with the term"]
    assert rows["with the term"]["exactness"] in ("bitwise", "within rounding")
    assert rows["with the textbook term"]["formula_saved_gib"] == pytest.approx(-8 * 2 * 5 * 2 * 4 / 2**30, abs=1e-4)
    assert all(row["status"] == "ok" for row in rows.values())
    assert all(len(times) == 2 for times in results["ms_of_rounds"].values())


def test_the_term_costs_less_memory_than_the_textbook(tmp_path, monkeypatch, capsys):
    sizes = ["--batch_size=16", "--tokens=65", "--num_heads=3", "--head_dim=64", "--rounds=1", "--repeats=1"]
    assert main(monkeypatch, *sizes, "--use_compile=false", f"--output_folder={tmp_path}") == 0
    path = json.loads(capsys.readouterr().out.splitlines()[-1])["run"]
    with (Path(path) / "run.json").open() as file:
        saved = {row["variant"]: row["saved_gib"] for row in json.load(file)["results"]["rows"]}
    assert saved["with the textbook term"] < saved["with the term"] <= 1e-3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num_heads=1"], "--num_heads must be at least 2"),
        (["--tokens=0"], "--tokens must be at least 1, not 0"),
        (["--batch_size=0"], "--batch_size must be at least 1, not 0"),
        (["--repeats=0"], "--repeats must be at least 1, not 0"),
    ],
)
def test_wrong_settings(tmp_path, monkeypatch, words, sentence):
    with pytest.raises(SettingsError, match=sentence):
        main(monkeypatch, *TINY, *words, f"--output_folder={tmp_path}")
    assert not list(tmp_path.iterdir())
