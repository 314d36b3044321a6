"""The MLP with fused or recomputed GELU: values and gradients of the plain one, bytes as the formula says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_gelu
from fused_gelu import GELUS, bias_gelu_backward_operator, bias_gelu_operator, kept_bytes_per_token, mlp
from precision import autocast
from technique_bench import relative_error
from transformer_based_llm import TransformerLM, model_config
from utils import GIB, SettingsError

ROOT = Path(__file__).parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def layers(device=CPU, width=24, dtype=torch.float32):
    torch.manual_seed(1)
    pair = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    for layer in pair:
        nn.init.normal_(layer.bias)  # a bias of nothing would hide a wrong one
        nn.init.normal_(layer.weight, std=2 / layer.in_features**0.5)
    return [layer.to(device, dtype) for layer in pair]


def hidden_states(device=CPU, width=24, dtype=torch.float32, shape=(3, 7)):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, width, generator=generator).to(device, dtype).requires_grad_()


def result(gelu, pair, hidden, precision="fp32", function=mlp):
    """Output and all gradients; the output's gradient is random and not contiguous."""
    hidden.grad = None
    for layer in pair:
        layer.zero_grad()
    with autocast(precision, hidden.device):
        output = function(hidden, *pair, gelu)
    generator = torch.Generator().manual_seed(4)
    gradient = torch.randn(output.T.shape if output.dim() == 2 else output.mT.shape, generator=generator)
    output.backward(gradient.to(output).mT)
    return [output.detach(), hidden.grad, *(p.grad for layer in pair for p in (layer.weight, layer.bias))]


def exact(pair, hidden):
    """The definition in fp64: x Phi(x) between two products."""
    doubles = [nn.Linear(layer.in_features, layer.out_features).to(hidden.device, torch.float64) for layer in pair]
    for double, layer in zip(doubles, pair, strict=True):
        double.load_state_dict(layer.state_dict())

    def definition(x, expand, contract, gelu):
        inside = expand(x)
        return contract(inside * 0.5 * torch.erfc(-inside / 2**0.5))

    return result("plain", doubles, hidden.detach().double().requires_grad_(), function=definition)


def no_worse_than_plain(pair, hidden, gelu, precision, slack):
    right = exact(pair, hidden)
    plain, own = ([x.clone() for x in result(name, pair, hidden, precision)] for name in ("plain", gelu))
    assert [x.dtype for x in own] == [x.dtype for x in plain]
    for mine, theirs, truth in zip(own, plain, right, strict=True):
        assert relative_error([mine], [truth]) <= 2 * relative_error([theirs], [truth]) + slack


@pytest.mark.parametrize("gelu", ["fused", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_values_and_gradients(gelu, precision):
    no_worse_than_plain(layers(), hidden_states(), gelu, precision, 1e-6)


@pytest.mark.parametrize("gelu", ["fused", "recomputed"])
def test_bf16_parameters(gelu):
    no_worse_than_plain(layers(dtype=torch.bfloat16), hidden_states(dtype=torch.bfloat16), gelu, "fp32", 1e-6)


@pytest.mark.parametrize("gelu", ["fused", "recomputed"])
def test_operators_are_well_formed(gelu):
    """PyTorch's own check of custom operators: schema, fake tensors, what torch.compile relies on."""
    values, bias = torch.randn(5, 12), torch.randn(12)
    torch.library.opcheck(bias_gelu_operator, (values, bias))
    torch.library.opcheck(bias_gelu_backward_operator, (values, values, bias, gelu == "recomputed"))


@pytest.mark.parametrize("gelu", ["fused", "recomputed"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_is_the_same(gelu, checkpointed):
    pair, hidden = layers(), hidden_states()

    def function(hidden, expand, contract, gelu):
        if checkpointed:
            return checkpoint(mlp, hidden, expand, contract, gelu, use_reentrant=False)
        return mlp(hidden, expand, contract, gelu)

    plain = [x.clone() for x in result("plain", pair, hidden)]
    own = result(gelu, pair, hidden, function=torch.compile(function, fullgraph=True))
    assert relative_error(own, plain) < 1e-6


def test_recomputed_keeps_the_values_only():
    width, tokens = 64, 500
    pair, hidden = layers(width=width), hidden_states(width=width, shape=(tokens,))
    kept = {}
    for gelu in GELUS:
        found = {}

        def note(tensor, found=found):
            found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = mlp(hidden, *pair, gelu)
        kept[gelu] = sum(size for size in found.values() if size == tokens * 4 * width * 4)
        del output
    assert kept == {gelu: tokens * kept_bytes_per_token(gelu, width, 4) for gelu in GELUS}
    assert kept["plain"] == kept["fused"] == 2 * kept["recomputed"]


@pytest.mark.parametrize("method", ["block", "selective", "selective_matmul", "every_k"])
@pytest.mark.parametrize("gelu", ["fused", "recomputed"])
def test_model_with_checkpointing(method, gelu):
    gradients = []
    for checkpointing, name in (("none", "plain"), (method, gelu)):
        torch.manual_seed(0)
        model = TransformerLM(model_config("tiny", gelu=name, gradient_checkpointing=checkpointing))
        ids = torch.randint(2048, (2, 16), generator=torch.Generator().manual_seed(1))
        model(ids).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert relative_error(gradients[1], gradients[0]) < 2e-6


@pytest.mark.parametrize("gelu", GELUS)
def test_nothing_in_the_batch(gelu):
    pair, hidden = layers(), hidden_states(shape=(0, 7))
    assert mlp(hidden, *pair, gelu).shape == (0, 7, 24)


INTERPRETED = """
import torch, fused_gelu
forward, backward = fused_gelu.triton_kernels()

def inside(function, name):  # what the function found around it; the interpreter looks among the module's names only
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents

fused_gelu.normal_cdf = inside(inside(forward, "bias_gelu_kernel").fn, "normal_cdf")
for dtype in (torch.float32, torch.bfloat16):
    for count, width in ((130, 520), (5, 1030)):
        values, gradient = torch.randn(2, count, width).to(dtype).unbind()
        bias = torch.randn(width)
        result, slope, again = (torch.full_like(values, torch.nan) for _ in range(3))
        forward(values, bias, result)
        sums = backward(gradient, values, bias, slope, again)
        x = (values.double() + bias.double()).requires_grad_()
        truth = torch.nn.functional.gelu(x)
        truth.backward(gradient.double())
        unit = torch.finfo(dtype).eps
        for own, right in ((result, truth), (again, truth), (slope, x.grad), (sums, x.grad.sum(0))):
            assert torch.allclose(own.double(), right, rtol=4 * unit, atol=2e-5), (dtype, count, width)
"""


def test_kernels_in_tritons_interpreter():
    """The kernels themselves without a GPU: rows and columns that fill no block, several programs."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    words = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_unknown_gelu():
    with pytest.raises(SettingsError, match="gelu tanh is unknown; choose one of plain, fused, recomputed"):
        mlp(hidden_states(), *layers(), "tanh")


def run_main(monkeypatch, folder, *more):
    words = ["--tokens", "512", "--width", "32", "--num_layers", "3", "--repeats", "2", "--use_compile", "false", *more]
    monkeypatch.setattr("sys.argv", ["fused_gelu.py", *words, "--output_folder", str(folder)])
    return fused_gelu.main()


def test_main_measures_every_variant(tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, tmp_path) == 0
    info = json.loads((tmp_path / "techniques" / "fused_gelu" / "run.json").read_text())
    rows = {row["variant"]: row for row in info["results"]["rows"]}
    assert set(rows) == set(GELUS)
    assert {rows[name]["exactness"] for name in ("fused", "recomputed")} <= {"bitwise", "within rounding"}
    assert rows["recomputed"]["saved_gib"] > 0
    assert rows["recomputed"]["formula_saved_gib"] == pytest.approx(512 * 4 * 32 * 4 / GIB, abs=1e-4)
    assert "fused is faster at width 32" in capsys.readouterr().out


def test_main_says_when_a_variant_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fused_gelu.BiasGelu, "backward", staticmethod(lambda ctx, g: (g, ctx.saved_tensors[1])))
    assert run_main(monkeypatch, tmp_path) == 1
    assert "error beyond rounding: fused" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["tokens", "width", "num_layers", "repeats"])
def test_main_refuses_nothing(flag, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=f"--{flag} must be at least 1, not 0"):
        run_main(monkeypatch, tmp_path, f"--{flag}", "0")


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("gelu", ["fused", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(1,), (127,), (3, 129), (5, 256)])
def test_gpu_values_and_gradients(gelu, precision, shape):
    """Rows and columns (4 x 88 = 352) that fill no block of the kernel, too."""
    for width in (64, 88):
        pair, hidden = layers(CUDA, width), hidden_states(CUDA, width, shape=shape)
        no_worse_than_plain(pair, hidden, gelu, precision, 1e-5 if precision == "fp32" else 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_kernels_over_the_whole_range(dtype):
    """Every size of GELU's input from -12 to 12 and beyond, value and derivative, against fp64."""
    values = torch.cat([torch.linspace(-12, 12, 2**16), torch.tensor([-3e4, -100.0, 0.0, -0.0, 100.0, 3e4] * 2)])
    values = values.to(CUDA, dtype).view(-1, 1).expand(-1, 4).contiguous()
    bias = torch.tensor([0.0, 0.25, -0.5, 1.0], device=CUDA)
    own = bias_gelu_operator(values, bias)
    slope, bias_gradient, again = bias_gelu_backward_operator(torch.ones_like(values), values, bias, True)
    x = (values.double() + bias.double()).requires_grad_()
    truth = x * 0.5 * torch.erfc(-x / 2**0.5)
    truth.sum().backward()
    unit = torch.finfo(dtype).eps / 2
    assert torch.equal(own, again)
    assert ((own.double() - truth).abs() <= truth.abs() * unit * 1.01 + 2e-6).all()
    assert ((slope.double() - x.grad).abs() <= x.grad.abs() * unit * 1.01 + 2e-6).all()
    assert torch.allclose(bias_gradient.double(), x.grad.sum(0), rtol=1e-4)


@pytest.mark.gpu
def test_gpu_recomputed_saves_what_the_formula_says():
    width, tokens, count = 256, 8192, 4
    peaks = {}
    for gelu in GELUS:
        model = fused_gelu.MLPs(count, width).to(CUDA)
        hidden = torch.randn(tokens, width, device=CUDA, requires_grad=True)
        for _ in range(2):  # the first one makes cuBLAS's workspace
            torch.cuda.reset_peak_memory_stats()
            with autocast("bf16", CUDA):
                output = model(hidden, gelu)
            output.sum().backward()
            peaks[gelu] = torch.cuda.max_memory_allocated()
            del output
            hidden.grad = None
            model.zero_grad()
    saved = (count - 2) * tokens * 4 * width * 2
    assert peaks["fused"] - peaks["recomputed"] == pytest.approx(saved, rel=0.05)
    assert peaks["fused"] <= 1.01 * peaks["plain"]
