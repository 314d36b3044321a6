"""The Llama kind of decoder: parameter counts, parity with transformers, rotary positions, grouped queries, FLOPs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import transformer_based_llm
from attention import attention
from precision import autocast
from transformer_based_llm import MODEL_SIZES, RotaryPositions, TransformerLM, model_config, model_summary
from utils import SettingsError, count_matmul_parameters, count_parameters, training_flops_per_token

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {
    "num_layers": 2, "embedding_dim": 64, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 96, "context_length": 24,
    "vocab_size": 50,
}  # fmt: skip


def small_llama(**options) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(model_config("llama-tiny", **(SHAPE | options)))


def token_ids(rows: int = 3, tokens: int = 24) -> torch.Tensor:
    return torch.randint(50, (rows, tokens), generator=torch.Generator().manual_seed(2))


def meta_model(size: str) -> TransformerLM:
    with torch.device("meta"):
        return TransformerLM(model_config(size))


# --- Sizes ------------------------------------------------------------------------------------------------------------


def test_the_courses_model_has_its_parameters():
    model = meta_model("llama-8b")
    assert count_parameters(model) == 8_053_329_920
    assert count_parameters(model) - model.token_embedding.weight.numel() == 7_516_459_008
    # int(2/3 x 4 x 4096) = 10,922; x 1.3 = 14,198; the next multiple of 1024.
    assert 1024 * math.ceil(int(1.3 * int(2 / 3 * 4 * 4096)) / 1024) == 14_336 == MODEL_SIZES["llama-8b"]["mlp_dim"]


def test_the_two_of_about_a_billion():
    # A block of llama-1b: qkv 2048 x 3072, output 2048 x 2048, gate and up 2048 x 16384, down 8192 x 2048, two norms.
    block = 2048 * 3072 + 2048**2 + 2048 * 16384 + 8192 * 2048 + 2 * 2048
    assert count_parameters(meta_model("llama-1b")) == 16 * block + 2 * 32000 * 2048 + 2048 == 1_104_218_112
    wide, course = meta_model("llama-1b-wide"), meta_model("llama-8b")
    assert 1.0e9 < count_parameters(wide) < 1.2e9
    shapes = [{n: p.shape for n, p in model.blocks[0].named_parameters()} for model in (wide, course)]
    assert shapes[0] == shapes[1] and len(wide.blocks) == 4


def test_gpt2_xl():
    config = model_config("gpt2-xl")
    assert (config.num_layers, config.embedding_dim, config.num_heads, config.head_dim) == (48, 1600, 25, 64)


def test_no_biases_one_table_of_rotations_and_none_in_the_state():
    model = small_llama()
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert len({id(block.rotate) for block in model.blocks}) == 1
    assert not any("cosines" in name or "sines" in name for name in model.state_dict())
    assert "(tokens" not in model_summary(model) and "RMSNorm" in model_summary(model)


# --- The function -----------------------------------------------------------------------------------------------------


def huggingface_twin(model: TransformerLM) -> LlamaForCausalLM:
    """transformers' Llama with the same weights."""
    config = model.config
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embedding_dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.context_length,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rope_theta=config.rope_theta,  # older versions read it here
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = {
        "model.embed_tokens": model.token_embedding.weight,
        "model.norm": model.final_norm.weight,
        "lm_head": model.head.weight,
    }
    for place, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.split((queries, keys, keys))
        gate, up = block.mlp.expand.weight.chunk(2)
        own = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
            "self_attn.o_proj": block.attention.output.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
            "mlp.down_proj": block.mlp.contract.weight, "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.mlp_norm.weight,
        }  # fmt: skip
        weights |= {f"model.layers.{place}.{name}": weight for name, weight in own.items()}
    twin.load_state_dict({f"{name}.weight": weight.detach().clone() for name, weight in weights.items()})
    return twin


def test_it_is_the_function_of_transformers():
    model = small_llama()
    for name, parameter in model.named_parameters():  # larger than at the start, so that scores and gates differ
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    twin, ids = huggingface_twin(model), token_ids()
    ours, theirs = model(ids), twin(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    q = twin.model.layers[0].self_attn.q_proj.weight.grad
    torch.testing.assert_close(model.blocks[0].attention.qkv.weight.grad[: len(q)], q, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        model.token_embedding.weight.grad, twin.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-5
    )


def test_rotary_positions_are_complex_rotations():
    rotate = RotaryPositions(head_dim=8, context_length=16, theta=100.0)
    heads = torch.randn(2, 16, 3, 8, dtype=torch.float64).float()
    pairs = torch.complex(heads[..., :4].double(), heads[..., 4:].double())
    speeds = 100.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turns = torch.polar(torch.ones(16, 4, dtype=torch.float64), torch.outer(torch.arange(16.0).double(), speeds))
    turned = pairs * turns[:, None]
    torch.testing.assert_close(rotate(heads), torch.cat((turned.real, turned.imag), dim=-1).float())


def test_a_score_depends_on_the_distance_alone():
    rotate = RotaryPositions(head_dim=16, context_length=32, theta=500_000.0)
    q, k = torch.randn(16), torch.randn(16)
    turned_q, turned_k = (rotate(x.expand(1, 32, 1, 16))[0, :, 0] for x in (q, k))
    scores = turned_q @ turned_k.T  # (query, key)
    for distance in (0, 1, 7):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
    assert (scores.diagonal(-7)[0] - scores.diagonal()[0]).abs() > 1e-3


def test_no_token_sees_a_later_one():
    model, ids = small_llama(), token_ids()
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 50
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.allclose(before[:, 12:], after[:, 12:])


def test_rotations_stay_fp32_with_bf16_parameters():
    model = small_llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert model.blocks[0].rotate.cosines.dtype == torch.float32
    assert model(token_ids()).dtype == torch.bfloat16


# --- Grouped queries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("eager", "cpu"),
        ("sdpa", "cpu"),
        *[
            pytest.param(name, "cuda", marks=pytest.mark.gpu)
            for name in ("sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flash_attn", "varlen", "flex")
        ],
    ],
)
def test_fewer_heads_of_keys_are_repeated_ones(backend, device):
    from attention_support import unsupported_reason

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if (reason := unsupported_reason(backend, torch.device(device), dtype)) is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 128, 8, 64, generator=generator).to(device, dtype).requires_grad_()
    k, v = (torch.randn(2, 128, 2, 64, generator=generator).to(device, dtype).requires_grad_() for _ in range(2))
    weights = torch.randn(2, 128, 8, 64, generator=generator).to(device, dtype)
    output = attention(q, k, v, backend=backend)
    repeated = attention(q, k.repeat_interleave(4, 2), v.repeat_interleave(4, 2), backend="eager")
    found, expected = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (output, repeated))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if device == "cpu" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(output, repeated, **tolerance)
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other.float()).norm() <= (1e-4 if device == "cpu" else 0.02) * other.float().norm()


@pytest.mark.gpu
def test_fp32_on_a_gpu_keeps_a_fused_kernel():
    from attention_kernels import observe_kernel

    q = torch.randn(1, 256, 8, 64, device="cuda")
    k = v = torch.randn(1, 256, 2, 64, device="cuda")
    with observe_kernel() as observer:
        attention(q, k, v, backend="sdpa")
    assert "unfused" not in observer.name and "efficient" in observer.name


@pytest.mark.parametrize("heads", [(8, 3, 3), (8, 2, 4), (2, 8, 8)])
def test_heads_that_do_not_divide_are_an_error(heads):
    q, k, v = (torch.zeros(1, 4, count, 8) for count in heads)
    with pytest.raises(SettingsError, match="a number of heads that divides q's"):
        attention(q, k, v, backend="eager")


# --- With the lab's techniques ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["block", "every_k", "selective"])
def test_checkpointing_gives_the_same_gradients(method):
    found = []
    for chosen in ("none", method):
        model = small_llama(gradient_checkpointing=chosen)
        F.cross_entropy(model(token_ids())[:, :-1].flatten(0, 1), token_ids()[:, 1:].flatten()).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("size", "options", "words"),
    [
        ("llama-tiny", {"num_kv_heads": 3}, "--num_heads 4 is not divisible by --num_kv_heads 3"),
        ("llama-tiny", {"mlp_dim": 0}, "--mlp_dim must be at least 1, not 0"),
        ("llama-tiny", {"embedding_dim": 20}, "turn pairs of numbers"),
        ("llama-tiny", {"gelu": "fused"}, "--gelu fused has no effect on a llama"),
        ("tiny", {"num_kv_heads": 2}, "--num_kv_heads has no effect on a transformer"),
    ],
)
def test_wrong_shapes_are_a_sentence(size, options, words):
    with pytest.raises(SettingsError, match=words):
        model_config(size, **options)


def test_main_describes_every_size(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["transformer_based_llm.py", "--model_size", "llama-1b"])
    assert transformer_based_llm.main() == 0
    assert "parameters: 1,104,218,112" in capsys.readouterr().out


# --- FLOPs, counted by PyTorch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["llama-tiny", "tiny"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_our_flops_are_those_pytorch_counts(size, precision):
    """Textbook attention has exactly two products forward and four backward, as the formula says."""
    shape = {name: value for name, value in SHAPE.items() if name in MODEL_SIZES[size]}
    config = model_config(size, **shape, attention_backend="eager")
    torch.manual_seed(0)
    model, ids = TransformerLM(config), token_ids()
    with FlopCounterMode(display=False) as counter, autocast(precision, torch.device("cpu")):
        model(ids).float().sum().backward()
    ours = training_flops_per_token(count_matmul_parameters(model), 2, 64, 24) * ids.numel()
    assert counter.get_total_flops() == ours


def test_flops_by_hand():
    # llama-1b, context 4096: 6 x 1,038,614,528 = 6,231,687,168 and 12 x 16 x 2048 x 4096 = 1,610,612,736.
    matmul = count_matmul_parameters(meta_model("llama-1b"))
    assert matmul == 1_038_614_528
    assert training_flops_per_token(matmul, 16, 2048, 4096) == 6_231_687_168 + 1_610_612_736
    # The course's model: 6 x 7,516,192,768 + 12 x 32 x 4096 x 4096 = 51.54 GFLOP a token.
    course = count_matmul_parameters(meta_model("llama-8b"))
    assert training_flops_per_token(course, 32, 4096, 4096) == pytest.approx(51.54e9, rel=1e-4)
