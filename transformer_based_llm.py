"""Two decoders: a GPT-2-like one (134,367,744 parameters as `gpt2`) and the Llama kind, pre-norm, with an untied head.

    python transformer_based_llm.py                        summary of the tiny model: modules, shapes, parameters
    python transformer_based_llm.py --model_size gpt2      the 134 M model of the plwiki lab
    python transformer_based_llm.py --model_size llama-1b  1.1 G parameters, context 4096

`transformer` has LayerNorm, learned positions (an nn.Embedding) and a GELU MLP of 4 x width. Differences from GPT-2
(Radford et al. 2019), chosen so that the parameter count is that of the lab this one repeats: the head is not tied to
the token embedding and has no bias, the four attention projections have no bias; the MLP and the LayerNorms have one.

`llama` (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288) has RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467),
rotary positions in every layer (Su et al. 2021, arXiv 2104.09864), fewer heads of keys and values than of queries (GQA:
Ainslie et al. 2023, arXiv 2305.13245), a SwiGLU MLP (Shazeer 2020, arXiv 2002.05202) and no biases. llama-8b is the
model of ETH's course Large-Scale AI Engineering (8,053,329,920 parameters with its vocabulary of 131,072). Two of about
1.1 G fit one card: llama-1b is 16 narrower blocks with heads of the same size, llama-1b-wide is four of its 32 blocks.

Attention, precision and checkpointing are the lab's techniques and live in files of their own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import attention, packed_attention
from attention_support import FULL
from checkpointing import run_blocks
from fused_gelu import mlp
from utils import (
    SettingsError,
    count_matmul_parameters,
    count_parameters,
    parse_settings,
    run_script,
    setting,
)

MODEL_TYPES = ("transformer", "llama")

# layers, width, heads, context, vocabulary; of a llama also heads of keys and values and the MLP's inner width
MODEL_SIZES = {
    "tiny": {
        "num_layers": 2,
        "embedding_dim": 128,
        "num_heads": 4,
        "context_length": 128,
        "vocab_size": 2048,
    },
    "gpt2": {
        "num_layers": 12,
        "embedding_dim": 768,
        "num_heads": 12,
        "context_length": 256,
        "vocab_size": 32000,
    },
    "gpt2-medium": {
        "num_layers": 24,
        "embedding_dim": 1024,
        "num_heads": 16,
        "context_length": 256,
        "vocab_size": 32000,
    },
    "gpt2-large": {
        "num_layers": 36,
        "embedding_dim": 1280,
        "num_heads": 20,
        "context_length": 256,
        "vocab_size": 32000,
    },
    "gpt2-xl": {
        "num_layers": 48,
        "embedding_dim": 1600,
        "num_heads": 25,
        "context_length": 256,
        "vocab_size": 32000,
    },
    "llama-tiny": {
        "num_layers": 2,
        "embedding_dim": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_dim": 384,
        "context_length": 128,
        "vocab_size": 2048,
    },
    "llama-1b": {
        "num_layers": 16,
        "embedding_dim": 2048,
        "num_heads": 16,
        "num_kv_heads": 4,
        "mlp_dim": 8192,
        "context_length": 4096,
        "vocab_size": 32000,
    },
    "llama-1b-wide": {
        "num_layers": 4,
        "embedding_dim": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "mlp_dim": 14336,
        "context_length": 4096,
        "vocab_size": 32000,
    },
    "llama-8b": {
        "num_layers": 32,
        "embedding_dim": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "mlp_dim": 14336,
        "context_length": 4096,
        "vocab_size": 131072,
    },
}
SHAPE = ("num_layers", "embedding_dim", "num_heads", "num_kv_heads", "mlp_dim", "context_length", "vocab_size")
LLAMA_ONLY = ("num_kv_heads", "mlp_dim")


def type_of_size(model_size: str) -> str:
    """Which of MODEL_TYPES a named size is."""
    return "llama" if model_size.startswith("llama-") else "transformer"


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder and the techniques inside it."""

    num_layers: int
    embedding_dim: int
    num_heads: int
    context_length: int
    vocab_size: int
    model_type: str = "transformer"
    num_kv_heads: int | None = None  # llama: heads of keys and values, each seen by num_heads / num_kv_heads queries
    mlp_dim: int | None = None  # llama: inner width of the MLP
    rope_theta: float = 500_000.0  # llama: the slowest rotation takes 2 pi x this many tokens
    dropout: float = 0.0
    attention_backend: str = "sdpa"
    attention_window: tuple[int, int] = FULL
    gradient_checkpointing: str = "none"
    checkpoint_every: int = 2  # which blocks every_k checkpoints
    gelu: str = "plain"

    @property
    def head_dim(self) -> int:
        return self.embedding_dim // self.num_heads


def model_config(model_size: str, **overrides: object) -> ModelConfig:
    """The named size with every override that is not None.

    Raises:
        SettingsError: an unknown size, a number below 1, or a width that the heads do not divide.
    """
    if model_size not in MODEL_SIZES:
        raise SettingsError(f"--model_size {model_size} is unknown; choose one of {', '.join(MODEL_SIZES)}")
    kind = type_of_size(model_size)
    values = MODEL_SIZES[model_size] | {name: value for name, value in overrides.items() if value is not None}
    for name in SHAPE:
        if name in values and name not in MODEL_SIZES[model_size]:
            raise SettingsError(f"--{name} has no effect on a {kind}; it is for --model_type llama")
        if name in values and values[name] < 1:
            raise SettingsError(f"--{name} must be at least 1, not {values[name]}")
    config = ModelConfig(**(values | {"model_type": kind}))
    if config.embedding_dim % config.num_heads:
        raise SettingsError(
            f"--embedding_dim {config.embedding_dim} is not divisible by --num_heads {config.num_heads}"
        )
    if kind == "llama":
        if config.num_heads % config.num_kv_heads:
            raise SettingsError(
                f"--num_heads {config.num_heads} is not divisible by --num_kv_heads {config.num_kv_heads}"
            )
        if config.head_dim % 2:
            raise SettingsError(
                f"rotary positions turn pairs of numbers, and --embedding_dim {config.embedding_dim} / --num_heads "
                f"{config.num_heads} is the odd {config.head_dim}"
            )
        if config.gelu != "plain":
            raise SettingsError(f"--gelu {config.gelu} has no effect on a llama, whose MLP has no GELU")
    if not 0 <= config.dropout < 1:
        raise SettingsError(f"--dropout must be at least 0 and below 1, not {config.dropout}")
    return config


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention; rows of `qkv` are ordered (three, heads, head_dim), as in flash-attn's MHA.

    `num_heads` is the number of heads that this layer has now: head_pruning.py may remove some.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = nn.Linear(config.embedding_dim, 3 * config.embedding_dim, bias=False)
        self.output = nn.Linear(config.embedding_dim, config.embedding_dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)"""
        batch, tokens, _ = hidden_states.shape
        config = self.config
        qkv = self.qkv(hidden_states).view(batch, tokens, 3, self.num_heads, self.head_dim)
        mixed = packed_attention(
            qkv,
            backend=config.attention_backend,
            causal=True,
            window=config.attention_window,
            dropout_p=config.dropout if self.training else 0.0,
        )  # (batch, tokens, heads, head_dim)
        return self.output(mixed.reshape(batch, tokens, self.num_heads * self.head_dim))


class MLP(nn.Module):
    """Two linear layers with GELU between, 4 x width inside."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gelu = config.gelu
        self.expand = nn.Linear(config.embedding_dim, 4 * config.embedding_dim)
        self.contract = nn.Linear(4 * config.embedding_dim, config.embedding_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)"""
        return mlp(hidden_states, self.expand, self.contract, self.gelu)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)); dropout on each branch."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.embedding_dim)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.embedding_dim)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)"""
        hidden_states = hidden_states + self.dropout(self.attention(self.attention_norm(hidden_states)))
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


# --------------------------------------------------------------------------------------------------------------------
# The Llama kind
# --------------------------------------------------------------------------------------------------------------------


class RotaryPositions(nn.Module):
    """Turns pair i of a head's numbers by position / theta^(2 i / head_dim): a score depends on the distance alone.

    A pair is (i, i + head_dim / 2), as in Hugging Face's code; the paper's (2 i, 2 i + 1) is the same function of
    weights whose rows are permuted. The tables are fp32 whatever the parameters are; no part of the state.
    """

    def __init__(self, head_dim: int, context_length: int, theta: float):
        super().__init__()
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.outer(torch.arange(context_length, dtype=torch.float64), frequencies)
        self.register_buffer("cosines", angles.cos().float(), persistent=False)  # (context, head_dim / 2)
        self.register_buffer("sines", angles.sin().float(), persistent=False)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, heads, head_dim), tokens <= context, to the same shape and dtype; computed in fp32."""
        tokens = heads.shape[1]
        cosines, sines = self.cosines[:tokens, None], self.sines[:tokens, None]  # (tokens, 1, head_dim / 2)
        first, second = heads.float().chunk(2, dim=-1)
        turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
        return turned.to(heads.dtype)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention whose heads of keys and values are shared by several heads of queries.

    Rows of `qkv`: all queries, then all keys, then all values, each (heads, head_dim).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.embedding_dim, width, bias=False)
        self.output = nn.Linear(config.embedding_dim, config.embedding_dim, bias=False)

    def forward(self, hidden_states: torch.Tensor, rotate: RotaryPositions) -> torch.Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)"""
        batch, tokens, width = hidden_states.shape
        config = self.config
        heads = self.qkv(hidden_states).view(batch, tokens, -1, self.head_dim)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
        mixed = attention(
            rotate(q),
            rotate(k),
            v,
            backend=config.attention_backend,
            causal=True,
            window=config.attention_window,
            dropout_p=config.dropout if self.training else 0.0,
        )  # (batch, tokens, heads, head_dim)
        return self.output(mixed.reshape(batch, tokens, width))


class SwiGLU(nn.Module):
    """contract(silu(gate) x up); `expand` makes gate and up in one product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.expand = nn.Linear(config.embedding_dim, 2 * config.mlp_dim, bias=False)
        self.contract = nn.Linear(config.mlp_dim, config.embedding_dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)"""
        gate, up = self.expand(hidden_states).chunk(2, dim=-1)
        return self.contract(F.silu(gate) * up)


class LlamaBlock(nn.Module):
    """Pre-norm block as `Block`, with RMSNorm, rotary positions, grouped queries and SwiGLU."""

    def __init__(self, config: ModelConfig, rotate: RotaryPositions):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.embedding_dim, eps=1e-5)
        self.rotate = rotate  # one table for all blocks
        self.attention = GroupedQueryAttention(config)
        self.mlp_norm = nn.RMSNorm(config.embedding_dim, eps=1e-5)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)"""
        mixed = self.attention(self.attention_norm(hidden_states), self.rotate)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


# --------------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------------


class TransformerLM(nn.Module):
    """Decoder-only language model of either type."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        is_llama = config.model_type == "llama"
        self.token_embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        if not is_llama:
            self.position_embedding = nn.Embedding(config.context_length, config.embedding_dim)
        self.dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        if is_llama:
            rotate = RotaryPositions(config.head_dim, config.context_length, config.rope_theta)
            self.blocks = nn.ModuleList(LlamaBlock(config, rotate) for _ in range(config.num_layers))
            self.final_norm = nn.RMSNorm(config.embedding_dim, eps=1e-5)
        else:
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.final_norm = nn.LayerNorm(config.embedding_dim)
        self.head = nn.Linear(config.embedding_dim, config.vocab_size, bias=False)
        self.apply(self._initialise)
        # GPT-2's rule: the two layers that write into the residual stream start smaller, by 1 / sqrt(2 layers).
        for block in self.blocks:
            for layer in (block.attention.output, block.mlp.contract):
                nn.init.normal_(layer.weight, std=0.02 / (2 * config.num_layers) ** 0.5)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden_states(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (batch, tokens), tokens <= context_length, to what the head is given: (batch, tokens, width)."""
        config = self.config
        hidden_states = self.token_embedding(token_ids)
        if config.model_type == "transformer":
            positions = torch.arange(token_ids.shape[1], device=token_ids.device)
            hidden_states = hidden_states + self.position_embedding(positions)
        hidden_states = self.dropout(hidden_states)
        hidden_states = run_blocks(
            self.blocks,
            hidden_states,
            config.gradient_checkpointing,
            every=config.checkpoint_every,
            random=config.dropout > 0,
        )
        return self.final_norm(hidden_states)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (batch, tokens), tokens <= context_length, to logits (batch, tokens, vocabulary)."""
        return self.head(self.hidden_states(token_ids))


def model_summary(model: TransformerLM) -> str:
    """Every module with its parameters' shapes and count, and the totals; the text of model_summary.txt."""
    lines = [f"{'module':<40}{'kind':<22}{'parameters':>14}  shapes"]
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        count = sum(parameter.numel() for parameter in module.parameters())
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in own.items())
        depth = name.count(".") + 1 if name else 0
        label = "  " * depth + (name.rpartition(".")[2] or "model")
        lines.append(f"{label:<40}{type(module).__name__:<22}{count:>14,}  {shapes}".rstrip())
    config = model.config
    lines += [
        "",
        f"token ids (batch, tokens <= {config.context_length}) -> logits (batch, tokens, {config.vocab_size})",
        f"parameters: {count_parameters(model):,}",
        f"in matrix products: {count_matmul_parameters(model):,}",
        f"fp32 parameters and two Adam states: {12 * count_parameters(model) / 2**30:.3f} GiB",
    ]
    return "\n".join(lines) + "\n"


@dataclass
class Settings:
    """Settings of `python transformer_based_llm.py`."""

    model_size: str = setting("tiny", "which model to describe", list(MODEL_SIZES))


def main() -> int:
    """Print the summary of a model size (built without memory on PyTorch's meta device)."""
    settings = parse_settings(Settings)
    with torch.device("meta"):
        print(model_summary(TransformerLM(model_config(settings.model_size))), end="")
    return 0


if __name__ == "__main__":
    run_script(main)
