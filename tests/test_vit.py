"""vit.py: the course project's sizes, fused = textbook attention, FLOPs, checkpointing with DeCAtt, pruned heads."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vit
from checkpointing import PreNormBlock, run_blocks
from decatt import textbook_decorrelation
from head_pruning import attention_layers, remove_heads
from mixed_resolution import centre_positions, uniform_tokens
from precision import autocast
from utils import SettingsError, count_parameters
from vit import DropPath, ViT, compiled_by_parts, flops_per_image, head_outputs, vit_config

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = {
    "num_tokens": 16, "patch_values": 12, "num_classes": 5, "num_layers": 3, "embedding_dim": 16, "num_heads": 4,
    "mlp_dim": 24,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(device: str = "cpu", **options) -> ViT:
    torch.manual_seed(0)
    return ViT(vit_config("small", **(SMALL | options))).to(device)


def small_batch(device: str = "cpu", images: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches (images, 16, 12) and their centres, of pictures of 8 x 8."""
    pixels = torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    tokens = uniform_tokens(pixels.to(device), 2)
    return tokens.patches, tokens.centres


def loss_of(result) -> torch.Tensor:
    """Squares of the logits, and DeCAtt's term if there is one."""
    logits, term = result if isinstance(result, tuple) else (result, 0.0)
    return logits.square().mean() + 10 * term


def outcome(model: ViT, *, precision: str = "fp32", function=None) -> list[torch.Tensor]:
    """Logits, DeCAtt's term if there is one, and every gradient; the same random numbers each time."""
    patches, centres = small_batch(model.embedding.weight.device.type)
    patches = patches.to(model.embedding.weight.dtype)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with autocast(precision, patches.device):
        result = (model if function is None else function)(patches, centres)
    loss_of(result).backward()
    outputs = list(result) if isinstance(result, tuple) else [result]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [tensor.detach().clone() for tensor in (*outputs, *gradients)]


def same_weights(model: ViT, **options) -> ViT:
    other = small_model(model.embedding.weight.device.type, **options)
    other.load_state_dict(model.state_dict())
    return other


def relative(values, reference) -> list[float]:
    pairs = zip(values, reference, strict=True)
    return [((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)).item() for a, b in pairs]


# --- Shape ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "classes", "parameters"),
    [("small", 10, 4_197_994), ("large", 10, 11_965_642), ("small", 100, 4_206_724), ("large", 100, 11_983_012)],
)
def test_the_sizes_of_the_course_project(size, classes, parameters):
    with torch.device("meta"):
        model = ViT(vit_config(size, num_classes=classes))
    assert count_parameters(model) == parameters and model.head[-1].out_features == classes
    assert model.config.sequence_length == 65 and model.config.head_dim == 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 3}, "--embedding_dim 16 is not divisible by --num_heads 3"),
        ({"num_heads": 0}, "--num_heads must be at least 1, not 0"),
        ({"num_layers": 0}, "--num_layers must be at least 1, not 0"),
        ({"mlp_dim": -1}, "--mlp_dim must be at least 1, not -1"),
        ({"embedding_dim": 0}, "--embedding_dim must be at least 1, not 0"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and below 1, not 1.0"),
        ({"attention_dropout": -0.1}, "--attention_dropout must be at least 0"),
        ({"drop_path": float("nan")}, "--drop_path must be at least 0"),
        ({"pool": "max"}, "--pool max is unknown; choose one of class, mean"),
        ({"positions": "rotary"}, "--positions rotary is unknown; choose one of learned, centres"),
        ({"head": "deep"}, "--head deep is unknown"),
        ({"initialisation": "zeros"}, "--initialisation zeros is unknown; choose one of scaled, pytorch"),
        ({"positions": "centres", "embedding_dim": 18, "num_heads": 2}, "needs an --embedding_dim that 4 divides"),
        ({"positions": "centres", "embedding_dim": 4}, "at least 8, not 4"),
        ({"embedding_dim": 1, "num_heads": 1}, "--head mlp halves the width; raise --embedding_dim or use --head lin"),
        ({"decorrelated_layers": 4}, "--decatt_layers must be from 1 to the 3 layers of the model, not 4"),
        ({"decorrelated_layers": 1, "num_heads": 1}, "--decatt_weight needs at least two heads to decorrelate"),
    ],
)
def test_impossible_shapes_are_one_sentence(options, words):
    with pytest.raises(SettingsError) as error:
        vit_config("small", **(SMALL | options))
    message = str(error.value)
    assert words in message and "\n" not in message and ". " not in message and not message.endswith(".")


def test_an_unknown_size():
    with pytest.raises(SettingsError, match="--model_size huge is unknown; choose one of small, large, tiny"):
        vit_config("huge")


def test_every_shape_setting_changes_the_model():
    base = small_model()
    patches, centres = small_batch()
    for options in (
        {"num_layers": 2}, {"embedding_dim": 32}, {"num_heads": 2}, {"mlp_dim": 16}, {"dropout": 0.5}, {"pool": "mean"},
        {"attention_dropout": 0.5}, {"drop_path": 0.5}, {"positions": "centres"}, {"head": "linear"},
        {"final_norm": False}, {"patch_norm": True}, {"initialisation": "pytorch"}, {"num_classes": 6},
    ):  # fmt: skip
        model = small_model(**options)
        torch.manual_seed(3)
        first, second = base(patches, centres), model(patches, centres)
        assert first.shape != second.shape or not torch.equal(first, second), options


@pytest.mark.parametrize("positions", ["learned", "centres"])
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_pools_and_positions(pool, positions):
    model = small_model(pool=pool, positions=positions).eval()
    patches, centres = small_batch()
    assert model(patches, centres).shape == (6, 5) and model(patches, centres).dtype == torch.float32
    hidden = model.tokens(patches, centres)
    assert hidden.shape == (6, 16 + (pool == "class"), 16)
    assert (model.class_token is None) == (pool == "mean") and (model.positions is None) == (positions == "centres")
    own = model.embedding_norm(model.embedding(patches))
    if positions == "learned":
        front = [model.class_token.expand(6, 1, 16)] if pool == "class" else []
        expected = torch.cat([*front, own], 1) + model.positions
    else:
        expected = own + centre_positions(centres, 16)
        if pool == "class":
            expected = torch.cat([model.class_token.expand(6, 1, 16), expected], 1)
    assert torch.allclose(hidden, expected, atol=1e-6)
    for block in model.blocks:
        hidden = block(hidden)
    read = model.final_norm(hidden)
    read = read[:, 0] if pool == "class" else read.mean(1)
    assert torch.allclose(model(patches, centres), model.head(read), atol=1e-6)
    # The order of patches does not matter if each keeps its centre; it does for positions in a row.
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = model(patches[:, order], centres[:, order])
    assert torch.allclose(moved, model(patches, centres), atol=1e-5) == (positions == "centres")


def test_a_block_by_hand():
    """x + attention(norm(x)), then x + mlp(norm(x)), one head at a time."""
    model = small_model().eval()
    block, x = model.blocks[1], torch.randn(2, 9, 16)
    normed = block.attention_norm(x)
    q, k, v = (normed @ block.attention.qkv.weight.T + block.attention.qkv.bias).split(16, -1)
    heads = []
    for head in range(4):
        part = slice(4 * head, 4 * head + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ v[..., part])
    expected = x + block.attention.output(torch.cat(heads, -1))
    expected = expected + block.contract(nn.functional.gelu(block.expand(block.mlp_norm(expected))))
    assert torch.allclose(block(x), expected, atol=1e-6)


def test_initialisation():
    """`scaled`: sqrt(2 / (5 width)), smaller by sqrt(2 layers) where a block writes; `pytorch`: what layers do."""
    shape = {"num_layers": 4, "embedding_dim": 96, "num_heads": 3, "mlp_dim": 160, "patch_values": 48}
    torch.manual_seed(0)
    model = ViT(vit_config("small", **shape))
    deviation = (2 / (5 * 96)) ** 0.5

    def check(weight, expected):
        assert weight.mean().abs() < 5 * expected / weight.numel() ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=5 / (2 * weight.numel()) ** 0.5)

    for block in model.blocks:
        check(block.attention.qkv.weight, deviation)
        check(block.expand.weight, deviation)
        check(block.attention.output.weight, deviation / 8**0.5)
        check(block.contract.weight, deviation / 8**0.5)
    check(model.head[0].weight, deviation)
    check(model.embedding.weight, 48**-0.5)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert all(bias.abs().max() == 0 for bias in biases)
    assert 0.7 < model.class_token.std() < 1.3 and 0.66 < model.positions.std() < 0.76
    waves = vit.centre_positions(4 * torch.rand(1, 50, 2), 96)
    assert waves.square().mean().sqrt().item() == pytest.approx(model.positions.square().mean().sqrt().item(), rel=0.05)
    torch.manual_seed(0)
    plain = ViT(vit_config("small", **shape, initialisation="pytorch"))
    torch.manual_seed(5)
    linear = nn.Linear(96, 288)
    assert plain.blocks[0].attention.qkv.weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.02)
    assert plain.blocks[0].attention.qkv.bias.abs().max() > 0
    assert 0.7 < plain.class_token.std() < 1.3 and 0.015 < plain.positions.std() < 0.025


def test_drop_path():
    """In expectation the branch; whole images at a time; nothing in evaluation."""
    torch.manual_seed(0)
    drop, branch = DropPath(0.25), torch.randn(4000, 3, 2)
    dropped = drop(branch)
    gone = (dropped == 0).all(2).all(1)
    assert torch.allclose(dropped[~gone], branch[~gone] / 0.75)
    assert abs(gone.float().mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    ones = drop(torch.ones(20_000, 1, 1)).mean().item()
    assert ones == pytest.approx(1, abs=4 * (0.25 / 0.75 / 20_000) ** 0.5)
    assert drop.eval()(branch) is branch and DropPath(0.0)(branch) is branch
    model = small_model(drop_path=0.3)
    assert [block.drop_path.kept.item() for block in model.blocks] == pytest.approx([1, 0.85, 0.7])
    assert small_model(drop_path=0.3, num_layers=1).blocks[0].drop_path.kept == 1
    patches, centres = small_batch()
    assert not torch.equal(model(patches, centres), model(patches, centres))
    model.eval()
    assert torch.equal(model(patches, centres), small_model().eval()(patches, centres))


@pytest.mark.parametrize("device", DEVICES)
def test_the_residual_stream_is_in_16_bits_under_autocast(device):
    model, seen = small_model(device, decorrelated_layers=1), []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda module, inputs, output: seen.append(output[0].dtype))
        block.mlp_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    patches, centres = small_batch(device)
    with autocast("bf16", torch.device(device)):
        logits, term = model(patches, centres)
    assert seen == [torch.bfloat16] * 6 and logits.dtype == term.dtype == torch.float32


# --- Textbook = fused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash", "sdpa_math"])
def test_fused_attention_is_the_same_function(backend):
    options = {"decorrelated_layers": 2}
    vanilla = small_model(attention_backend="eager", **options)
    exact = outcome(same_weights(vanilla, attention_backend="eager", **options).double())
    theirs = relative(outcome(vanilla), exact)
    own = relative(outcome(same_weights(vanilla, attention_backend=backend, **options)), exact)
    assert all(mine <= 2 * other + 2e-5 for mine, other in zip(own, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "short"])
def test_gpu_fused_attention_is_the_same_function(backend):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    options = {"decorrelated_layers": 2, "embedding_dim": 32}  # heads of 8
    vanilla = small_model("cuda", attention_backend="eager", **options)
    exact = outcome(same_weights(vanilla, attention_backend="eager", **options).double())
    theirs = relative(outcome(vanilla, precision="bf16"), exact)
    own = relative(outcome(same_weights(vanilla, attention_backend=backend, **options), precision="bf16"), exact)
    assert own[0] <= 2 * theirs[0] + 1e-5 and max(own) <= 2 * max(theirs) + 1e-5


# --- FLOPs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_flops_by_hand_and_by_pytorch(pool):
    """Textbook attention has two products, which the counter sees."""
    model = small_model(attention_backend="eager", pool=pool)
    tokens = 16 + (pool == "class")
    blocks = 3 * (4 * 16 * 16 + 2 * 16 * 24)
    by_hand = tokens * (6 * blocks + 12 * 3 * 16 * tokens) + 6 * 16 * (12 * 16) + 6 * (16 * 8 + 8 * 5)
    assert flops_per_image(model) == by_hand
    patches, centres = small_batch(images=2)
    with FlopCounterMode(display=False) as counter:
        loss_of(model(patches, centres)).backward()
    # PyTorch counts no gradient of the patches, which nobody needs: 2 x 12 x 16 for each.
    assert counter.get_total_flops() == pytest.approx(2 * (by_hand - 16 * 2 * 12 * 16), rel=1e-9)


def test_flops_of_other_heads_and_after_pruning():
    linear = small_model(head="linear")
    assert flops_per_image(linear) == flops_per_image(small_model()) + 6 * (16 * 5 - 16 * 8 - 8 * 5)
    model = small_model()
    before = flops_per_image(model)
    remove_heads(attention_layers(model)[1], [0])
    assert before - flops_per_image(model) == pytest.approx(17 * (6 * 4 * 16 * 4 + 12 * 4 * 17))


# --- DeCAtt -----------------------------------------------------------------------------------------------------------


def test_the_term_is_the_mean_over_the_first_layers_and_only_in_training():
    patches, centres = small_batch()
    plain = small_model()
    assert isinstance(plain(patches, centres), torch.Tensor)
    for layers in (1, 2, 3):
        model = small_model(decorrelated_layers=layers)
        logits, term = model(patches, centres)
        assert term.shape == () and torch.equal(logits, plain(patches, centres))
        model.eval()
        assert torch.equal(model(patches, centres), logits)
        outputs = head_outputs(model, patches, centres)[:layers]
        expected = torch.stack([textbook_decorrelation(output.double()) for output in outputs]).mean()
        assert term.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_terms_gradient_reaches_these_layers_and_those_below(layers):
    """It enters at the heads' outputs: no output projection or MLP of the last decorrelated layer, nothing above."""
    model = small_model(decorrelated_layers=layers)
    model(*small_batch())[1].backward()
    for place, block in enumerate(model.blocks):
        reached = block.attention.qkv.weight.grad is not None
        assert reached == (place < layers)
        if reached:
            grown = block.attention.qkv.weight.grad.view(3, 16, 16).norm(dim=(1, 2))
            assert (grown > 0).all()  # queries, keys and values
        for weight in (block.attention.output.weight, block.expand.weight, block.contract.weight):
            assert (weight.grad is not None) == (place < layers - 1)
    assert model.embedding.weight.grad is not None and model.head[0].weight.grad is None


METHODS = [("block", 2), ("every_k", 2), ("every_k", 3), ("selective", 2), ("selective_matmul", 2)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(("method", "every"), METHODS)
def test_checkpointing_is_bitwise_with_the_term(method, every, random, device):
    """Logits, the term and every gradient; with dropout and drop_path the random state is restored."""
    noise = {"dropout": 0.2, "drop_path": 0.4} if random else {}
    options = {"decorrelated_layers": 2, "attention_backend": "sdpa", **noise}
    plain = small_model(device, **options)
    expected = outcome(plain)
    other = same_weights(plain, gradient_checkpointing=method, checkpoint_every=every, **options)
    calls = []
    other.blocks[0].register_forward_pre_hook(lambda module, inputs: calls.append(1))
    found = outcome(other)
    assert len(calls) == 2  # it did run again
    assert len(found) == len(expected) == 2 + len(list(plain.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", ["block", "every_k"])
def test_checkpointing_is_bitwise_with_attention_dropout(method):
    options = {"decorrelated_layers": 3, "attention_dropout": 0.3, "attention_backend": "eager"}
    plain = small_model(**options)
    found = outcome(same_weights(plain, gradient_checkpointing=method, **options))
    assert all(torch.equal(a, b) for a, b in zip(found, outcome(plain), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 3])
def test_gpu_offloaded_inputs_with_the_term(layers):
    options = {"decorrelated_layers": layers, "dropout": 0.2}
    plain = small_model("cuda", **options)
    found = outcome(same_weights(plain, gradient_checkpointing="offload", **options))
    assert all(torch.equal(a, b) for a, b in zip(found, outcome(plain), strict=True))


def test_checkpointing_changes_nothing_in_evaluation():
    model = small_model(gradient_checkpointing="block", decorrelated_layers=2).eval()
    patches, centres = small_batch()
    assert torch.equal(model(patches, centres), small_model().eval()(patches, centres))


@pytest.mark.parametrize("method", ["none", "block", "every_k", "selective"])
def test_blocks_without_terms_need_no_list(method):
    torch.manual_seed(0)
    blocks, inputs = [PreNormBlock(16, 4) for _ in range(3)], torch.randn(2, 5, 16)
    expected = inputs
    for block in blocks:
        expected = block(expected)
    assert torch.equal(run_blocks(blocks, inputs, method), expected)
    terms: list[torch.Tensor] = []
    assert torch.equal(run_blocks(blocks, inputs, method, terms=terms), expected) and terms == []


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_is_the_same_function(device):
    torch.compiler.reset()
    model = small_model(device, decorrelated_layers=2, positions="centres")
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    expected, found = outcome(model), outcome(model, function=compiled)
    assert len(found) == len(expected) and max(relative(found, expected)) < 1e-4
    torch.compiler.reset()


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_by_parts_is_the_same_function_and_blocks_share_their_code(device):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = small_model(device, num_layers=7, decorrelated_layers=3, positions="centres", drop_path=1e-9)
    compiled = compiled_by_parts(model, "inductor" if device == "cuda" else "aot_eager")
    expected, found = outcome(model), outcome(model, function=compiled)
    assert len(found) == len(expected) and max(relative(found, expected)) < 1e-4
    # the embedding; blocks with the term and without, the first without drop_path
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    torch.compiler.reset()


# --- Heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decorrelated", [0, 2])
def test_head_outputs_are_what_the_output_projections_are_given(decorrelated):
    model = small_model(decorrelated_layers=decorrelated).eval()
    patches, centres = small_batch()
    seen = []
    handles = [
        layer.output.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        for layer in attention_layers(model)
    ]
    model(patches, centres)
    for handle in handles:
        handle.remove()
    outputs = head_outputs(model, patches, centres)
    assert [output.shape for output in outputs] == [(6, 17, 4, 4)] * 3
    assert all(torch.equal(output.flatten(2), given) for output, given in zip(outputs, seen, strict=True))
    assert not outputs[0].requires_grad


def test_cut_heads_are_masked_heads():
    """Structural = masked: logits, and the gradients of weights that both have whole."""
    model = small_model(initialisation="pytorch").double()
    patches, centres = small_batch()
    patches = patches.double()
    whole = model(patches, centres)
    pruned = {}
    for mode in ("structural", "masked"):
        other = copy.deepcopy(model)
        for layer, heads in zip(attention_layers(other), ([1], [0, 3], []), strict=True):
            remove_heads(layer, heads, mode=mode)
        logits = other(patches, centres)
        logits.square().mean().backward()
        pruned[mode] = (other, logits)
    cut, masked = (pruned[mode][0] for mode in ("structural", "masked"))
    assert torch.allclose(pruned["structural"][1], pruned["masked"][1], atol=1e-6)  # logits are fp32
    assert not torch.allclose(pruned["structural"][1], whole, atol=1e-4)
    assert torch.allclose(cut.blocks[1].expand.weight.grad, masked.blocks[1].expand.weight.grad, rtol=1e-4, atol=1e-9)
    assert torch.allclose(cut.embedding.weight.grad, masked.embedding.weight.grad, rtol=1e-4, atol=1e-9)
    assert count_parameters(masked) == count_parameters(model)
    assert count_parameters(model) - count_parameters(cut) == 3 * (4 * 4 * 16 + 3 * 4)  # three heads of width 4
    assert [len(output[0, 0]) for output in head_outputs(cut.eval(), patches, centres)] == [3, 2, 4]


def test_a_pruned_model_still_returns_the_term():
    model = small_model(decorrelated_layers=3)
    for layer in attention_layers(model):
        remove_heads(layer, [0, 2])
    logits, term = model(*small_batch())
    assert logits.shape == (6, 5) and 0 < term.item() < 1
    loss_of((logits, term)).backward()


def test_main_prints_the_model(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vit.py", "--model_size", "large", "--num_classes", "100"])
    assert vit.main() == 0
    out = capsys.readouterr().out
    assert "65 tokens; parameters: 11,983,012" in out and "logits (images, 100)" in out
    monkeypatch.setattr("sys.argv", ["vit.py"])
    assert vit.main() == 0 and "parameters: 4,197,994" in capsys.readouterr().out
