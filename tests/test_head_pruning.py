"""head_pruning.py: masked = structural, optimizer states are cut alike, importance by its definition."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import head_pruning
from attention_kernels import eager_attention
from head_pruning import (
    AttentionBlock,
    attention_layers,
    bake_masks,
    head_numbers,
    importance,
    lowest,
    remove_heads,
    static_choice,
)
from optimizers import make_optimizer
from patchtst import PatchTST, patchtst_config
from transformer_based_llm import TransformerLM, model_config
from utils import SettingsError, count_parameters

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
REMOVED = ([1], [0, 3], [])  # of each of three layers


class Encoder(nn.Module):
    """A ViT-like encoder: class token, pre-norm blocks with attention that follows the lab's convention."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 32) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.blocks = nn.ModuleList(AttentionBlock(32, 4, "sdpa", causal=False) for _ in range(3))
        self.head = nn.Linear(32, 10)

    def forward(self, patches):
        hidden = torch.cat([self.token.expand(len(patches), 1, 32), patches], dim=1)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            hidden = hidden + block(norm(hidden))
        return self.head(hidden[:, 0])


def problem(kind: str, device="cpu"):
    """(model, inputs, loss of an output) of the forecaster, the decoder or an encoder as a ViT has it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if kind == "patchtst":
        shape = {
            "context_length": 48,
            "horizon": 12,
            "embedding_dim": 32,
            "num_heads": 4,
            "ffn_dim": 32,
            "dropout": 0.0,
        }
        model = PatchTST(patchtst_config("official", **shape))
        inputs = torch.randn(6, 48, 2, generator=generator)
    elif kind == "decoder":
        sizes = {"num_layers": 3, "embedding_dim": 32, "num_heads": 4, "context_length": 24, "vocab_size": 50}
        model = TransformerLM(model_config("tiny", **sizes))
        inputs = torch.randint(50, (6, 24), generator=generator)
    else:
        model, inputs = Encoder(), torch.randn(6, 16, 32, generator=generator)
    for layer in attention_layers(model):
        for linear in (layer.qkv, layer.output):
            if linear.bias is not None:
                nn.init.normal_(linear.bias)  # a bias of nothing would hide a wrong one
    model, inputs = model.double().to(device), inputs.to(device)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return model, inputs, lambda output: output.double().square().mean()


def gradients(model, inputs, loss):
    model.zero_grad(set_to_none=True)
    output = model(inputs)
    loss(output).backward()
    return output.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


KINDS = ["patchtst", "decoder", "encoder"]


# --- Masked = structural ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_cut_heads_are_masked_heads(kind, device):
    """Output, and every gradient that both have, to rounding of fp64; and removing something changes the output."""
    model, inputs, loss = problem(kind, device)
    whole, _ = gradients(model, inputs, loss)
    cut, masked = copy.deepcopy(model), copy.deepcopy(model)
    for mode, pruned in (("structural", cut), ("masked", masked)):
        for layer, heads in zip(attention_layers(pruned), REMOVED, strict=True):
            remove_heads(layer, heads, mode=mode)
    output, own = gradients(cut, inputs, loss)
    gated, theirs = gradients(masked, inputs, loss)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if kind == "patchtst" else {"rtol": 1e-9, "atol": 1e-12}  # fp32 forecast
    assert torch.allclose(output, gated, **tolerance) and not torch.allclose(output, whole, atol=1e-4)
    names = {id(module): name for name, module in cut.named_modules()}
    layers = {names[id(layer)]: (layer, heads) for layer, heads in zip(attention_layers(cut), REMOVED, strict=True)}
    for name, gradient in own.items():
        expected = theirs[name]
        where, _, parameter = name.rpartition(".")
        where, _, linear = where.rpartition(".")
        if where in layers and linear in ("qkv", "output") and layers[where][1]:
            kept = torch.tensor([head for head in range(4) if head not in layers[where][1]])
            if linear == "qkv":
                expected = expected.view(3, 4, 8, -1)[:, kept].reshape(gradient.shape)
            elif parameter == "weight":
                expected = expected.view(32, 4, 8)[:, kept].reshape(gradient.shape)
        assert torch.allclose(gradient, expected, **tolerance), name
    for layer, heads in zip(attention_layers(masked), REMOVED, strict=True):
        if heads:  # a masked head gets no gradient, so it cannot grow back
            assert layer.output.weight.grad.view(32, 4, 8)[:, heads].abs().max() == 0
            assert layer.qkv.weight.grad.view(3, 4, 8, 32)[:, heads].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_makes_the_model_smaller_and_masking_does_not(kind):
    model, inputs, _ = problem(kind)
    before = count_parameters(model)
    masked = copy.deepcopy(model)
    for layer, heads in zip(attention_layers(masked), REMOVED, strict=True):
        remove_heads(layer, heads, mode="masked")
    assert count_parameters(masked) == before
    for layer, heads in zip(attention_layers(model), REMOVED, strict=True):
        remove_heads(layer, heads)
    biases = 3 * 8 if kind != "decoder" else 0
    assert before - count_parameters(model) == 3 * (4 * 8 * 32 + biases)  # three heads of width 8
    first = attention_layers(model)[1]
    assert first.num_heads == 2 and head_numbers(first) == [1, 2] and first.qkv.out_features == 3 * 16
    assert first.output.in_features == 16 and first.qkv.weight.shape == (48, 32)
    assert model(inputs).shape == masked(inputs).shape


@pytest.mark.parametrize("mode", head_pruning.MODES)
def test_heads_keep_their_first_numbers_over_several_removals(mode):
    model, inputs, _ = problem("encoder")
    at_once = copy.deepcopy(model)
    for layer in attention_layers(model):
        remove_heads(layer, [1], mode=mode)
        remove_heads(layer, [2], mode=mode)
        assert head_numbers(layer) == [0, 3]
        with pytest.raises(SettingsError, match=r"heads \[1\] are not among the heads that are left: \[0, 3\]"):
            remove_heads(layer, [1], mode=mode)
        with pytest.raises(SettingsError, match="would leave none"):
            remove_heads(layer, [0, 3], mode=mode)
    for layer in attention_layers(at_once):
        remove_heads(layer, [1, 2], mode=mode)
    assert torch.allclose(model(inputs), at_once(inputs), atol=1e-12)


def test_masks_can_be_written_into_the_weights():
    model, inputs, _ = problem("encoder")
    plain = copy.deepcopy(model)
    for layer in attention_layers(model):
        remove_heads(layer, [0, 2], mode="masked")
    bake_masks(model)
    plain.load_state_dict(model.state_dict())  # the mask itself is no part of it
    assert torch.allclose(model(inputs), plain(inputs), atol=1e-12)
    assert attention_layers(plain)[0].output.weight.view(32, 4, 8)[:, [0, 2]].abs().max() == 0


def test_modes_do_not_mix_and_wrong_ones_are_named():
    layer = attention_layers(problem("encoder")[0])[0]
    remove_heads(layer, [0], mode="masked")
    with pytest.raises(SettingsError, match="masked heads already"):
        remove_heads(layer, [1], mode="structural")
    with pytest.raises(SettingsError, match="--prune_mode zeroed is unknown"):
        remove_heads(layer, [1], mode="zeroed")
    with pytest.raises(SettingsError, match="this model has none"):
        attention_layers(nn.Linear(2, 2))


def test_the_compiler_sees_a_mask_that_came_later():
    """Compiled, masked, compiled again: a mask by a hook would be passed over."""
    model, inputs, _ = problem("encoder")
    before = torch.compile(model, dynamic=False)(inputs)
    for layer in attention_layers(model):
        remove_heads(layer, [0, 2], mode="masked")
    after = torch.compile(model, dynamic=False)(inputs)
    assert torch.allclose(after, model(inputs), atol=1e-9) and not torch.allclose(after, before, atol=1e-4)
    for layer in attention_layers(model):
        remove_heads(layer, [1], mode="masked")
    again = torch.compile(model, dynamic=False)(inputs)
    assert torch.allclose(again, model(inputs), atol=1e-9) and not torch.allclose(again, after, atol=1e-4)


# --- The optimizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_if_the_heads_had_never_been_updated(kind):
    """Steps, removal, steps: the cut model follows the masked one, moments included (no decay: masked weights rest)."""
    results = {}
    for mode in head_pruning.MODES:
        model, inputs, loss = problem(kind)
        options = {"learning_rate": 1e-2, "weight_decay": 0.0, "device": CPU}
        optimizer = make_optimizer("adamw", model.parameters(), **options)
        for step in range(6):
            if step == 3:
                for layer, heads in zip(attention_layers(model), REMOVED, strict=True):
                    remove_heads(layer, heads, mode=mode, optimizer=optimizer)
                assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
                    id(parameter) for parameter in model.parameters()
                }
            optimizer.zero_grad(set_to_none=True)
            loss(model(inputs)).backward()
            optimizer.step()
        results[mode] = model(inputs).detach()
        if mode == "structural":
            weight = attention_layers(model)[1].qkv.weight
            state = optimizer.state[weight]
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == weight.shape and state["step"] == 6
            assert len(optimizer.state) == len(list(model.parameters()))
    tolerance = 1e-4 if kind == "patchtst" else 1e-9  # its forecast is fp32
    assert torch.allclose(results["structural"], results["masked"], atol=tolerance)


def test_rows_of_the_state_are_those_of_the_kept_heads():
    model, inputs, loss = problem("encoder")
    optimizer = torch.optim.AdamW(model.parameters())
    loss(model(inputs)).backward()
    optimizer.step()
    layer = attention_layers(model)[0]
    rows = optimizer.state[layer.qkv.weight]["exp_avg"].view(3, 4, 8, 32)[:, [0, 2]].reshape(48, 32).clone()
    columns = optimizer.state[layer.output.weight]["exp_avg_sq"].view(32, 4, 8)[:, [0, 2]].reshape(32, 16).clone()
    remove_heads(layer, [1, 3], optimizer=optimizer)
    assert torch.equal(optimizer.state[layer.qkv.weight]["exp_avg"], rows)
    assert torch.equal(optimizer.state[layer.output.weight]["exp_avg_sq"], columns)


def test_the_master_copy_of_bf16_parameters_is_cut_too():
    model, inputs, loss = problem("encoder")
    model, inputs = model.float(), inputs.float()
    options = {"learning_rate": 1e-2, "weight_decay": 0.0, "device": CPU, "parameters": "bf16_master"}
    optimizer = make_optimizer("adamw", model.parameters(), **options)
    loss(model(inputs.bfloat16())).backward()
    optimizer.step()
    layer = attention_layers(model)[0]
    master = optimizer.state[layer.output.weight]["master"].view(32, 4, 8)[:, [0, 1]].reshape(32, 16).clone()
    remove_heads(layer, [2, 3], optimizer=optimizer)
    assert torch.equal(optimizer.state[layer.output.weight]["master"], master)
    optimizer.zero_grad()
    loss(model(inputs.bfloat16())).backward()
    optimizer.step()


def test_optimizers_that_cannot_be_cut_say_so():
    model, _, _ = problem("encoder")
    options = {"learning_rate": 1e-2, "weight_decay": 0.0, "device": CPU}
    optimizer = make_optimizer("adamw", model.parameters(), in_backward=True, **options)
    with pytest.raises(SettingsError, match="prune without it"):
        remove_heads(attention_layers(model)[0], [0], optimizer=optimizer)


# --- Importance -------------------------------------------------------------------------------------------------------


def test_gradient_importance_is_the_derivative_of_a_gate():
    """E_x |dL / d gate_h|, with gates put in by hand and differentiated sample by sample."""
    model, inputs, _ = problem("encoder")
    targets = torch.arange(6) % 10

    def gated_loss(gates, x, y):
        hidden = torch.cat([model.token.expand(1, 1, 32), x[None]], dim=1)
        for norm, block, gate in zip(model.norms, model.blocks, gates, strict=True):
            qkv = block.qkv(norm(hidden)).view(1, 17, 3, 4, 8)
            mixed = eager_attention(*qkv.unbind(2), False, (-1, -1), 0.0, None) * gate[:, None]
            hidden = hidden + block.output(mixed.reshape(1, 17, 32))
        return F.cross_entropy(model.head(hidden[:, 0]), y[None])

    expected = torch.zeros(3, 4, dtype=torch.float64)
    for x, y in zip(inputs, targets, strict=True):
        gates = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
        expected += torch.autograd.grad(gated_loss(gates, x, y), gates)[0].abs() / 6
    expected = expected / expected.norm(dim=1, keepdim=True)
    batches = [(inputs[:2], targets[:2]), (inputs[2:4], targets[2:4]), (inputs[4:], targets[4:])]
    scores = importance(model, "gradient", batches, lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
    assert torch.allclose(torch.stack(scores).double(), expected, rtol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weight_norm_importance_by_hand():
    model, _, _ = problem("encoder")
    layer = attention_layers(model)[0]
    q, k, v = layer.qkv.weight.detach().view(3, 4, 8, 32)
    expected = torch.stack(
        [
            q[head].norm() + k[head].norm() + v[head].norm() + layer.output.weight[:, 8 * head : 8 * head + 8].norm()
            for head in range(4)
        ]
    )
    score = importance(model, "weight_norm")[0]
    assert torch.allclose(score.double(), (expected / expected.norm()).detach(), rtol=1e-5)


def test_scoring_leaves_the_model_as_it_was():
    """Weights, BatchNorm's running statistics, training modes, and no hook stays."""
    model, inputs, loss = problem("patchtst")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.layers[1].eval()
    importance(model, "gradient", [inputs, inputs + 1], lambda batch: loss(model(batch)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not model.layers[1].training and model.layers[0].training
    assert not any(layer.output._forward_pre_hooks for layer in attention_layers(model))


@pytest.mark.parametrize("mode", head_pruning.MODES)
@pytest.mark.parametrize("kind", head_pruning.IMPORTANCES)
def test_a_head_that_does_nothing_is_the_least_important_and_the_rest_is_scored_again(mode, kind):
    model, inputs, loss = problem("encoder")
    for place, layer in enumerate(attention_layers(model)):
        with torch.no_grad():  # head 2 writes nothing, and head 0 of the first layer next to nothing
            layer.output.weight[:, 16:24] = 0
            layer.qkv.weight.view(3, 4, 8, 32)[:, 2] *= 0.01
            if place == 0:
                layer.output.weight[:, :8] *= 1e-3
                layer.qkv.weight.view(3, 4, 8, 32)[:, 0] *= 0.02
    for expected in ([2, 2, 2], [0, None, None]):
        scores = importance(model, kind, [inputs], lambda batch: loss(model(batch)))
        for layer, score, head in zip(attention_layers(model), scores, expected, strict=True):
            assert len(score) == len(head_numbers(layer)) and score.norm().item() == pytest.approx(1, rel=1e-5)
            if head is not None:
                assert lowest(score, layer, 1) == [head]
                remove_heads(layer, [head], mode=mode)
    assert head_numbers(attention_layers(model)[0]) == [1, 3]


def test_unknown_importance_and_no_data():
    model, _, _ = problem("encoder")
    with pytest.raises(SettingsError, match="--prune_importance magnitude is unknown"):
        importance(model, "magnitude")
    with pytest.raises(SettingsError, match="at least one batch"):
        importance(model, "gradient", [], lambda batch: batch)


def test_static_choices():
    assert static_choice("static_conservative", 16, 3, 5, 7) == [0, 1, 2]
    drawn = [static_choice("static_random", 16, 5, layer, seed) for layer in range(3) for seed in range(3)]
    assert drawn == [static_choice("static_random", 16, 5, layer, seed) for layer in range(3) for seed in range(3)]
    assert len({tuple(heads) for heads in drawn}) == 9 and all(len(set(heads)) == 5 for heads in drawn)
    with pytest.raises(SettingsError, match="--prune dynamic is unknown"):
        static_choice("dynamic", 16, 5, 0, 0)


# --- The script -------------------------------------------------------------------------------------------------------


def run_main(monkeypatch, folder, *more):
    words = ["--sequences", "8", "--tokens", "12", "--num_heads", "4", "--rounds", "2", "--repeats", "2", *more]
    monkeypatch.setattr("sys.argv", ["head_pruning.py", *words, "--output_folder", str(folder)])
    return head_pruning.main()


def test_main_measures_masked_and_cut_heads(tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, tmp_path, "--widths", "32,64") == 0
    info = json.loads((tmp_path / "techniques" / "head_pruning" / "run.json").read_text())
    rows = {row["variant"]: row for row in info["results"]["rows"]}
    assert list(rows)[:2] == ["all heads", "all heads, again"] and len(rows) == 6
    for name, row in rows.items():
        if "of 4" in name:
            assert row["exactness"] in ("bitwise", "within rounding")
    cut, masked = rows["2 of 4 structural"], rows["2 of 4 masked"]
    assert cut["peak_gib"] < masked["peak_gib"] and cut["saved_gib"] > 0 >= masked["saved_gib"]
    assert "half of the heads cut is clearly faster" in capsys.readouterr().out
    assert {row["width"] for row in info["results"]["widths"]} >= {32, 64}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--widths", "24"], "--widths 24 must be rising numbers, multiples of 16"),
        (["--widths", "a"], "must be rising numbers, multiples of 16"),
        (["--num_heads", "1"], "--num_heads must be at least 2"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_wrong_settings(tmp_path, monkeypatch, more, words):
    with pytest.raises(SettingsError, match=words):
        run_main(monkeypatch, tmp_path, *more)
