"""Precision, checkpointing and the decoder: parameter counts, bitwise gradients, parity of the attention kernels."""

import pytest
import torch
import torch.nn.functional as F

import precision
from attention import flash_attn_error
from precision import autocast, make_scaler, set_precision, unsupported_reason
from transformer_based_llm import (
    MODEL_SIZES,
    TransformerLM,
    model_config,
    model_summary,
)
from utils import SettingsError, count_matmul_parameters, count_parameters

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = {"num_layers": 2, "embedding_dim": 32, "num_heads": 4, "context_length": 24, "vocab_size": 50}


def small_model(device: str = "cpu", **options) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(model_config("tiny", **(SMALL | options))).to(device)


def gradients(model: TransformerLM, precision_name: str = "fp32", seed: int = 1) -> list[torch.Tensor]:
    device = next(model.parameters()).device
    ids = torch.randint(50, (3, 25), generator=torch.Generator().manual_seed(2)).to(device)
    torch.manual_seed(seed)
    with autocast(precision_name, device):
        logits = model(ids[:, :-1])
    F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
    return [parameter.grad for parameter in model.parameters()]


# -- the decoder -------------------------------------------------------------------------------------------------------


def test_parameter_count_of_gpt2():
    with torch.device("meta"):
        model = TransformerLM(model_config("gpt2"))
    assert count_parameters(model) == 134_367_744
    assert count_matmul_parameters(model) == 12 * (4 * 768**2 + 2 * 768 * 3072) + 768 * 32_000
    summary = model_summary(model)
    assert "parameters: 134,367,744" in summary and "weight (2304, 768)" in summary
    assert "head" in summary and "weight (32000, 768)" in summary


@pytest.mark.parametrize(
    ("size", "layers", "width", "heads"), [("gpt2-medium", 24, 1024, 16), ("gpt2-large", 36, 1280, 20)]
)
def test_larger_sizes_are_those_of_the_gpt2_family(size, layers, width, heads):
    config = model_config(size)
    assert (config.num_layers, config.embedding_dim, config.num_heads, config.head_dim) == (layers, width, heads, 64)


def test_biases_are_where_the_parameter_count_says():
    block = small_model().blocks[0]
    assert block.attention.qkv.bias is None and block.attention.output.bias is None
    assert block.mlp.expand.bias is not None and block.mlp.contract.bias is not None
    assert small_model().head.bias is None


def test_no_token_sees_a_later_one():
    model = small_model()
    ids = torch.randint(50, (1, 24))
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] + 1) % 50
    a, b = model(ids), model(changed)
    assert torch.equal(a[:, :10], b[:, :10])
    assert not torch.allclose(a[:, 10:], b[:, 10:])


def test_shorter_input_than_the_context():
    assert small_model()(torch.zeros(2, 7, dtype=torch.long)).shape == (2, 7, 50)


@pytest.mark.parametrize("name", [*MODEL_SIZES["tiny"]])
def test_sizes_below_one_are_errors(name):
    with pytest.raises(SettingsError, match=f"--{name} must be at least 1"):
        model_config("tiny", **{name: 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_dim": 100, "num_heads": 3}, "not divisible"),
        ({"dropout": 1.0}, "--dropout"),
        ({"dropout": -0.1}, "--dropout"),
    ],
)
def test_wrong_shapes_are_errors(options, message):
    with pytest.raises(SettingsError, match=message):
        model_config("tiny", **options)


def test_unknown_size_is_an_error():
    with pytest.raises(SettingsError, match="--model_size huge is unknown"):
        model_config("huge")


@pytest.mark.parametrize("device", DEVICES)
def test_eager_and_sdpa_train_the_same_model(device):
    """The same weights under two kernels: gradients equal within rounding of fp32."""
    for a, b in zip(
        gradients(small_model(device, attention_backend="eager")),
        gradients(small_model(device, attention_backend="sdpa")),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(flash_attn_error() is not None, reason="flash-attn is not installed with its kernels")
@pytest.mark.parametrize("window", [(-1, -1), (5, 0)])
def test_gpu_flash_attn_trains_the_same_model_as_eager(window):
    """Against fp32, bf16 with flash-attn errs at most twice as much as bf16 with textbook attention."""
    shape = {"embedding_dim": 128, "num_heads": 2, "attention_window": window}
    exact = gradients(small_model("cuda", attention_backend="eager", **shape))
    eager = gradients(small_model("cuda", attention_backend="eager", **shape), "bf16")
    flash = gradients(small_model("cuda", attention_backend="flash_attn", **shape), "bf16")
    for reference, plain, ours in zip(exact, eager, flash, strict=True):
        assert (ours - reference).norm() <= 2 * (plain - reference).norm() + 1e-6


# -- gradient checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision_name", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_checkpointing_gives_bitwise_equal_gradients(device, dropout, precision_name, backend):
    plain, checkpointed = (
        gradients(
            small_model(device, dropout=dropout, attention_backend=backend, gradient_checkpointing=method),
            precision_name,
        )
        for method in ("none", "block")
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_dropout_does_something_or_the_test_above_proves_little():
    model = small_model(dropout=0.1)
    first = [gradient.clone() for gradient in gradients(model, seed=1)]
    model.zero_grad(set_to_none=True)
    assert not all(torch.equal(a, b) for a, b in zip(first, gradients(model, seed=2), strict=True))


def test_checkpointing_keeps_only_block_inputs():
    """Bytes that autograd keeps after the forward pass: one input a block instead of everything inside it."""
    kept = {}
    for use in (False, True):
        model = small_model(gradient_checkpointing="block" if use else "none", num_layers=6)
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.zeros(3, 24, dtype=torch.long))
        kept[use] = sum(storages.values())
    assert kept[True] < kept[False] / 3


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_changes_the_matrix_products_and_nothing_else(name, dtype):
    model = small_model()
    with autocast(name, CPU):
        assert model(torch.zeros(1, 4, dtype=torch.long)).dtype == dtype
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_only_fp16_scales_gradients():
    assert make_scaler("fp16", CPU).is_enabled()
    assert not any(make_scaler(name, CPU).is_enabled() for name in ("fp32", "tf32", "bf16"))


def test_precision_sets_the_mode_of_matrix_products(monkeypatch):
    set_precision("fp32", CPU)
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    set_precision("tf32", torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "high"
    set_precision("fp32", CPU)


@pytest.mark.parametrize("name", ["bf16", "tf32"])
def test_old_gpus_refuse(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    with pytest.raises(SettingsError, match=f"--precision {name} cannot run here: Tesla T4"):
        set_precision(name, torch.device("cuda"))
    assert unsupported_reason("fp16", torch.device("cuda")) is None


def test_precision_main_lists_every_precision(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["precision.py", "--width", "64", "--repeats", "1"])
    assert precision.main() == 0
    output = capsys.readouterr().out
    assert all(name in output for name in precision.PRECISIONS)
