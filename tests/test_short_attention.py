"""short_attention.py: the kernels in Triton's interpreter, the backend's refusals, and on a GPU the whole of it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import short_attention
from attention import attention, packed_attention
from attention_kernels import observe_kernel
from attention_support import FULL, choose_backend, sequences_refusal, unsupported_reason
from short_attention import shape_refusal
from utils import SettingsError

ROOT = Path(__file__).parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

INTERPRETED = """
import torch, short_attention
from attention import attention, packed_attention
from attention_kernels import eager_attention, observe_kernel

def inside(function, name):  # what the function found around it; the interpreter looks among the module's names only
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents

forward, _ = short_attention.triton_kernels()
short_attention.weights_of = inside(inside(forward, "forward_kernel").fn, "weights_of")
shapes = [(2, 42, 3, 8), (3, 16, 2, 16), (2, 5, 1, 20), (1, 33, 2, 64), (1, 64, 1, 16)]
for heads_a_program in (1, 2):
    short_attention.HEADS_A_PROGRAM = heads_a_program
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 1e-3)):  # the interpreter multiplies no bf16
        for causal in (False, True):
            for sequences, tokens, heads, head_dim in shapes:
                torch.manual_seed(0)
                qkv = torch.randn(sequences, tokens, 3, heads, head_dim).to(dtype).requires_grad_()
                gradient = torch.randn(sequences, tokens, heads, head_dim).to(dtype)
                exact = qkv.detach().double().requires_grad_()
                expected = eager_attention(*exact.unbind(2), causal, (-1, -1), 0.0, 0.3)
                expected.backward(gradient.double())
                with observe_kernel() as observer:
                    output = packed_attention(qkv, backend="short", causal=causal, softmax_scale=0.3)
                assert observer.name == "memory_lab.short_attention", observer.name
                output.backward(gradient)
                separate = attention(*qkv.detach().unbind(2), backend="short", causal=causal, softmax_scale=0.3)
                assert torch.equal(separate, output)
                for own, right in ((output, expected), (qkv.grad, exact.grad)):
                    error = ((own.double() - right).norm() / right.norm()).item()
                    assert error < bound, (dtype, causal, sequences, tokens, heads, head_dim, error)

def double(x):
    return packed_attention(x, backend="short", causal=False) * 2

qkv = torch.randn(2, 7, 3, 2, 8, requires_grad=True)
plain = double(qkv)
plain.sum().backward()
expected, qkv.grad = qkv.grad, None
compiled = torch.compile(double, backend="aot_eager", fullgraph=True)(qkv)
compiled.sum().backward()
assert torch.equal(compiled, plain) and torch.equal(qkv.grad, expected)
empty = torch.randn(0, 7, 3, 2, 8, requires_grad=True)
packed_attention(empty, backend="short", causal=False).sum().backward()
assert empty.grad.shape == empty.shape
"""


def test_kernels_in_tritons_interpreter():
    """The kernels themselves without a GPU: tiles that are not full, several heads a program, under the compiler."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    words = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_what_does_not_fit_is_refused():
    assert shape_refusal(torch.bfloat16, 128, 128) is None and shape_refusal(torch.float32, 64, 64) is None
    assert "up to 128 tokens, not 129" in shape_refusal(torch.float16, 129, 8)
    assert "up to 64 tokens in fp32, not 65" in shape_refusal(torch.float32, 65, 8)
    assert "up to 128 wide, not 136" in shape_refusal(torch.bfloat16, 8, 136)
    assert "not torch.float64" in shape_refusal(torch.float64, 8, 8)


def test_without_a_gpu_it_is_an_error_and_nothing_else_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    qkv = torch.randn(2, 7, 3, 2, 8)
    with pytest.raises(SettingsError, match="short needs an NVIDIA GPU; take attention_backend sdpa"):
        packed_attention(qkv, backend="short", causal=False)
    with pytest.raises(SettingsError, match="short needs an NVIDIA GPU"):
        attention(*qkv.unbind(2), backend="short", causal=False)
    with pytest.raises(SettingsError, match="has no window"):
        packed_attention(qkv, backend="short", causal=False, window=(3, 0))
    with pytest.raises(SettingsError, match="short has no attention dropout"):
        packed_attention(qkv, backend="short", causal=False, dropout_p=0.1)
    monkeypatch.setattr("sys.argv", ["short_attention.py"])
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="short needs an NVIDIA GPU"):
            short_attention.main()


def test_auto_takes_it_for_narrow_heads_of_short_sequences(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("attention_support.pytorch_refusal", lambda *arguments: None)
    monkeypatch.setattr("attention_support.flash_attn_error", lambda: None)
    choose_backend.cache_clear()

    def chosen(tokens=42, head_dim=8, dtype=torch.bfloat16, packed=True, causal=False):
        options = {"tokens": tokens, "packed": packed, "causal": causal}
        return choose_backend(CUDA, dtype, FULL, head_dim, **options)[0]

    assert chosen() == "short"
    assert chosen(tokens=65) == chosen(head_dim=64) == chosen(packed=False) == "sdpa_efficient"
    assert chosen(dtype=torch.float32) == "sdpa_efficient"
    choose_backend.cache_clear()


def test_the_number_of_sequences_that_kernels_take():
    for backend in ("sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attn"):
        assert sequences_refusal(backend, CUDA, 65535) is None
        assert "at most 65,535 sequences at once, not 65,536" in sequences_refusal(backend, CUDA, 65536)
        assert sequences_refusal(backend, CPU, 65536) is None
    for backend in ("eager", "sdpa_efficient", "short"):
        assert sequences_refusal(backend, CUDA, 10**6) is None


# --- On a GPU ---------------------------------------------------------------------------------------------------------

SHAPES = [
    (64, 42, 16, 8),
    (8, 65, 6, 64),
    (6, 80, 3, 128),
    (5, 7, 3, 20),
    (4, 64, 4, 4),
    (3, 128, 2, 64),
    (70000, 8, 1, 16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_values_and_gradients(shape, causal, dtype):
    """At most twice the error of textbook attention in the same dtype; more sequences than a grid's axis has."""
    sequences, tokens, heads, head_dim = shape
    if shape_refusal(dtype, tokens, head_dim) is not None:
        pytest.skip("refused in fp32")
    torch.manual_seed(0)
    qkv = torch.randn(sequences, tokens, 3, heads, head_dim, device=CUDA, dtype=dtype).requires_grad_()
    gradient = torch.randn(sequences, tokens, heads, head_dim, device=CUDA, dtype=dtype)

    def result(x, backend):
        x.grad = None
        output = packed_attention(x, backend=backend, causal=causal)
        output.backward(gradient.to(x.dtype))
        return output.detach().double(), x.grad.double()

    exact = result(qkv.detach().double().requires_grad_(), "eager")
    plain, own = result(qkv, "eager"), result(qkv, "short")
    for mine, theirs, right in zip(own, plain, exact, strict=True):
        assert (mine - right).norm() <= 2 * (theirs - right).norm() + 1e-6 * right.norm()


@pytest.mark.gpu
def test_gpu_keeps_nothing_but_its_input():
    qkv = torch.randn(512, 42, 3, 16, 8, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    packed_attention(qkv, backend="short", causal=False)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = packed_attention(qkv, backend="short", causal=False)
    assert torch.cuda.memory_allocated() - before == output.numel() * 2


@pytest.mark.gpu
def test_gpu_compiled_in_a_model():
    from patchtst import PatchTST, patchtst_config

    torch.manual_seed(0)
    model = PatchTST(patchtst_config("official", attention_backend="short", dropout=0.0)).to(CUDA)
    exact = PatchTST(patchtst_config("official", attention_backend="eager", dropout=0.0)).to(CUDA)
    exact.load_state_dict(model.state_dict())
    inputs = torch.randn(4, 336, 2, device=CUDA)

    def result(called: torch.nn.Module, parameters: Iterator[torch.nn.Parameter]) -> list[torch.Tensor]:
        forecast = called(inputs)
        return [forecast.detach(), *torch.autograd.grad(forecast.float().square().mean(), list(parameters))]

    with torch.autocast("cuda", torch.bfloat16):
        with observe_kernel() as observer:
            plain = result(model, model.parameters())
        own = result(torch.compile(model, dynamic=False, fullgraph=True), model.parameters())
    assert "short_attention" in observer.name
    right = result(exact, exact.parameters())
    names = ["forecast", *(name for name, _ in model.named_parameters())]
    for name, mine, theirs, value in zip(names, own, plain, right, strict=True):
        # no more than twice the error of the same model without the compiler; gradients of biases before a batch norm
        # are 0 but for rounding, so that theirs is all error
        assert (mine - value).norm() <= 2 * (theirs - value).norm() + 1e-3 * value.norm(), name


@pytest.mark.gpu
def test_gpu_main_compares_kernels(tmp_path, monkeypatch):
    words = ["--sequences", "256", "--rounds", "2", "--repeats", "3", "--break_even_tokens", "16,42"]
    monkeypatch.setattr("sys.argv", ["short_attention.py", *words, "--output_folder", str(tmp_path)])
    assert short_attention.main() == 0
    info = json.loads((tmp_path / "techniques" / "short_attention" / "run.json").read_text())
    rows = {row["variant"]: row for row in info["results"]["rows"]}
    assert {"eager", "short", "sdpa_efficient"} <= set(rows)
    assert rows["short"]["exactness"] in ("bitwise", "within rounding") and rows["short"]["saved_gib"] > 0
    assert unsupported_reason("short", CUDA, torch.bfloat16, FULL, 8, tokens=42) is None
