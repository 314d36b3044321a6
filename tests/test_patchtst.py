"""patchtst.py: the published sizes, textbook = fused attention, agreement with transformers' PatchTSTForPrediction."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PatchTSTConfig, PatchTSTForPrediction

import patchtst
import patchtst_benchmark
from patchtst import PatchTST, flops_per_window, patchtst_config
from precision import autocast
from utils import SettingsError, count_parameters

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ETTH = {"embedding_dim": 16, "num_heads": 4, "ffn_dim": 128}
SMALL = {"context_length": 48, "horizon": 12, "embedding_dim": 16, "num_heads": 4, "ffn_dim": 32}


def small_model(device="cpu", variant="official", **options) -> PatchTST:
    torch.manual_seed(0)
    return PatchTST(patchtst_config(variant, **(SMALL | options))).to(device)


def small_batch(device="cpu", batch=5, channels=3):
    generator = torch.Generator().manual_seed(1)
    rows = 5 + torch.randn(batch, 60, channels, generator=generator).cumsum(1)
    return rows[:, :48].to(device), rows[:, 48:].to(device)


@pytest.mark.parametrize(
    ("options", "parameters", "tokens"),
    [
        (ETTH, 81_728, 42),
        (ETTH | {"horizon": 720}, 501_680, 42),
        ({}, 921_184, 42),
        ({"horizon": 720}, 4_276_432, 42),
        ({"context_length": 512}, None, 64),
    ],
)
def test_the_official_sizes(options, parameters, tokens):
    with torch.device("meta"):
        model = PatchTST(patchtst_config("official", **options))
    assert model.config.num_patches == tokens
    assert parameters is None or count_parameters(model) == parameters


def test_the_size_of_the_course_project():
    """1,118,048 parameters, of which transformers counts the 42 x 128 fixed positions."""
    with torch.device("meta"):
        model = PatchTST(patchtst_config("transformers"))
    assert model.config.num_patches == 42 and count_parameters(model) == 1_118_048 - 42 * 128


def test_patches_by_hand():
    """Official: the end repeated by the stride. transformers: the oldest rows left out."""
    series = torch.arange(50.0)[None]
    official = small_model(context_length=50, patch_length=16, patch_stride=8).patches(series)
    assert official.shape == (1, 6, 16) == (1, (50 - 16) // 8 + 2, 16)
    assert official[0, 0].tolist() == list(range(16)) and official[0, 4, 0] == 32
    assert official[0, 5].tolist() == [*range(40, 50), *[49.0] * 6]
    other = small_model(variant="transformers", context_length=50, patch_length=12, patch_stride=12).patches(series)
    assert other.shape == (1, 4, 12) and other[0, 0, 0] == 2 and other[0, 3, 11] == 49


def test_channels_do_not_see_each_other():
    model = small_model().eval()
    inputs, _ = small_batch()
    before = model(inputs)
    inputs[:, :, 1] = torch.randn(5, 48)
    after = model(inputs)
    assert torch.equal(before[:, :, [0, 2]], after[:, :, [0, 2]]) and not torch.equal(before[:, :, 1], after[:, :, 1])


def test_forecasts_follow_level_and_scale():
    """Instance normalisation: a x series + b is forecast as a x forecast + b."""
    model = small_model().double().eval()
    inputs = small_batch()[0].double()
    shifted = model(1000 * inputs - 70)
    assert torch.allclose(shifted, 1000 * model(inputs) - 70, rtol=1e-4, atol=1e-1)
    flat = model(torch.full((1, 48, 1), 3.0).double())
    assert torch.isfinite(flat).all() and (flat - 3).abs().max() < 0.05


def test_batch_norm_counts_every_token_of_every_channel():
    norm = patchtst.TokenBatchNorm(16)
    x = torch.randn(15, 7, 16) * 3 + 1
    out = norm(x)
    assert out.mean((0, 1)).abs().max() < 1e-5 and (out.var((0, 1), unbiased=False) - 1).abs().max() < 1e-3


def test_every_shape_setting_changes_the_model():
    base = small_model()
    inputs, _ = small_batch()
    for options in (
        {"norm": "layer"}, {"norm_position": "pre"}, {"positions": "sincos"}, {"num_layers": 2}, {"patch_length": 8},
        {"patch_stride": 4}, {"num_heads": 2}, {"ffn_dim": 16}, {"dropout": 0.5}, {"head_dropout": 0.5},
        {"embedding_dim": 32}, {"horizon": 6},
    ):  # fmt: skip
        model = small_model(**options)
        torch.manual_seed(3)
        first = base(inputs)
        torch.manual_seed(3)
        second = model(inputs)
        assert first.shape != second.shape or not torch.equal(first, second), options


def test_two_dropouts_are_one():
    """The official code drops the attention branch twice: (1 - p)^2 is kept."""
    assert small_model(dropout=0.3).layers[0].attention_dropout.p == pytest.approx(0.51)
    assert small_model(dropout=0.3, dropout_twice=False).layers[0].attention_dropout.p == pytest.approx(0.3)
    assert isinstance(small_model(dropout=0.0).layers[0].attention_dropout, nn.Identity)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 3}, "--embedding_dim 16 is not divisible by --num_heads 3"),
        ({"num_heads": 0}, "--num_heads must be at least 1"),
        ({"patch_length": 49}, "--patch_length 49 is longer than --context_length 48"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and below 1"),
        ({"norm": "group"}, "--norm group is unknown"),
        ({"embedding_dim": 15, "num_heads": 5, "positions": "sincos"}, "needs an even --embedding_dim"),
    ],
)
def test_impossible_shapes(options, words):
    with pytest.raises(SettingsError, match=words):
        patchtst_config("official", **(SMALL | options))
    with pytest.raises(SettingsError, match="--model_variant tiny is unknown"):
        patchtst_config("tiny")


# --- Textbook = fused -------------------------------------------------------------------------------------------------


def result(model, precision="fp32"):
    """Forecast and every gradient of the MSE."""
    inputs, targets = (part.to(next(model.parameters()).dtype) for part in small_batch(model.head.weight.device))
    model.zero_grad(set_to_none=True)
    with autocast(precision, inputs.device):
        forecast = model(inputs)
    (forecast - targets).square().mean().backward()
    return [forecast.detach(), *(parameter.grad for parameter in model.parameters())]


def relative(values, reference):
    pairs = zip(values, reference, strict=True)
    return [((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)).item() for a, b in pairs]


def same_weights(model, **options):
    other = small_model(model.head.weight.device, **options)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("norm_position", ["post", "pre"])
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash", "sdpa_math"])
def test_fused_attention_is_the_same_function(backend, norm_position):
    """Output and all gradients, bidirectional: a causal fused variant, as in the course project, would fail here."""
    options = {"dropout": 0.0, "norm_position": norm_position}
    vanilla = small_model(attention_backend="eager", **options)
    fused = same_weights(vanilla, attention_backend=backend, **options)
    exact = result(same_weights(vanilla, attention_backend="eager", **options).double())
    theirs, own = relative(result(vanilla), exact), relative(result(fused), exact)
    assert all(mine <= 2 * other + 1e-5 for mine, other in zip(own, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "short"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_gpu_fused_attention_is_the_same_function(backend, precision):
    if precision == "fp32" and backend not in ("sdpa_efficient", "short"):
        pytest.skip("has no fp32 kernel")
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    options = {"dropout": 0.0, "embedding_dim": 32}  # heads of 8
    vanilla = small_model("cuda", attention_backend="eager", **options)
    fused = same_weights(vanilla, attention_backend=backend, **options)
    exact = result(same_weights(vanilla, attention_backend="eager", **options).double())
    theirs, own = relative(result(vanilla, precision), exact), relative(result(fused, precision), exact)
    assert own[0] <= 2 * theirs[0] + 1e-5
    assert max(own) <= 2 * max(theirs) + 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_the_residual_stream_is_in_16_bits_under_autocast(device):
    model, seen = small_model(device, dropout=0.0), []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with autocast("bf16", torch.device(device)):
        forecast = model(small_batch(device)[0])
    assert seen == [torch.bfloat16] * 3 and forecast.dtype == torch.float32


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("context_length", [48, 50])
def test_agrees_with_transformers(device, norm, pre_norm, context_length):
    """Copied weights: forecasts in training and evaluation, loss and every gradient."""
    torch.manual_seed(0)
    config = PatchTSTConfig(
        num_input_channels=3, context_length=context_length, patch_length=12, patch_stride=12, prediction_length=12,
        d_model=16, num_attention_heads=4, ffn_dim=32, num_hidden_layers=3, pooling_type=None, scaling="std",
        norm_type=f"{norm}norm", pre_norm=pre_norm,
    )  # fmt: skip
    theirs = PatchTSTForPrediction(config).double().to(device)
    for module in theirs.modules():  # norms that do nothing would hide a wrong one
        if isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    ours = PatchTST(
        patchtst_config(
            "transformers", context_length=context_length, horizon=12, embedding_dim=16, num_heads=4, ffn_dim=32,
            norm=norm, norm_position="pre" if pre_norm else "post", head_dropout=0.0, attention_backend="sdpa",
        )
    ).double().to(device)  # fmt: skip
    patchtst_benchmark.copy_weights(ours, theirs)
    generator = torch.Generator().manual_seed(5)
    rows = (3 + torch.randn(4, context_length + 12, 3, generator=generator).cumsum(1)).double().to(device)
    inputs, targets = rows.split([context_length, 12], dim=1)
    ours.eval(), theirs.eval()
    expected = theirs(past_values=inputs).prediction_outputs
    assert torch.allclose(ours(inputs).double(), expected, atol=1e-5)  # the forecast itself is returned in fp32
    ours.train(), theirs.train()
    answer = theirs(past_values=inputs, future_values=targets)
    answer.loss.backward()
    loss = (ours(inputs) - targets).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(answer.loss.item(), rel=1e-5)
    checked = 0
    for name, own, others in patchtst_benchmark.parameter_pairs(ours, theirs):
        expected = torch.cat([other.grad for other in others])
        assert torch.allclose(own.grad, expected, atol=1e-5 * expected.abs().max().item() + 1e-6), name
        checked += own.numel()
    assert checked == count_parameters(ours)


def test_sincos_positions_are_transformers():
    config = PatchTSTConfig(context_length=512, patch_length=12, patch_stride=12, d_model=128)
    theirs = PatchTSTForPrediction(config).model.encoder.positional_encoder.position_enc
    assert torch.allclose(patchtst.sincos_positions(42, 128), theirs, atol=1e-6)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def test_flops_by_hand_and_by_pytorch():
    """81,728 parameters less embeddings of positions, norms and biases; textbook attention has two products."""
    model = PatchTST(patchtst_config("official", **ETTH, dropout=0.0, attention_backend="eager"))
    body = 16 * 16 + 3 * (4 * 16 * 16 + 2 * 16 * 128)
    by_hand = 42 * (6 * body + 12 * 3 * 16 * 42) + 6 * 42 * 16 * 96
    assert flops_per_window(model, 1) == by_hand and flops_per_window(model, 7) == 7 * by_hand
    inputs = torch.randn(2, 336, 3)
    with FlopCounterMode(display=False) as counter:
        model(inputs).square().mean().backward()
    # PyTorch counts no gradient of the patches, which nobody needs: 2 x 16 x 16 a token.
    assert counter.get_total_flops() == pytest.approx(2 * (3 * by_hand - 3 * 42 * 2 * 16 * 16), rel=1e-9)


def test_main_prints_the_model(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["patchtst.py", "--model_variant", "transformers"])
    assert patchtst.main() == 0
    out = capsys.readouterr().out
    assert "42 tokens a channel" in out and "1,112,672" in out
