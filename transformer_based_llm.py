"""A GPT-2-like decoder: pre-norm blocks, learned positions, an untied head; 134,367,744 parameters as `gpt2`.

    python transformer_based_llm.py                        summary of the tiny model: modules, shapes, parameters
    python transformer_based_llm.py --model_size gpt2      the 134 M model of the plwiki lab

Differences from GPT-2 (Radford et al. 2019), chosen so that the parameter count is that of the lab this one repeats:
the head is not tied to the token embedding and has no bias, the four attention projections have no bias; the MLP and
the LayerNorms have one. The MLP is 4 x width with GELU, positions are an nn.Embedding. Attention, precision and
checkpointing are the lab's techniques and live in files of their own.
"""

from dataclasses import dataclass

import torch
from torch import nn

from attention import packed_attention
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

# layers, width, heads, context, vocabulary
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
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder and the techniques inside it."""

    num_layers: int
    embedding_dim: int
    num_heads: int
    context_length: int
    vocab_size: int
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
    values = MODEL_SIZES[model_size] | {name: value for name, value in overrides.items() if value is not None}
    for name in MODEL_SIZES[model_size]:
        if values[name] < 1:
            raise SettingsError(f"--{name} must be at least 1, not {values[name]}")
    config = ModelConfig(**values)
    if config.embedding_dim % config.num_heads:
        raise SettingsError(
            f"--embedding_dim {config.embedding_dim} is not divisible by --num_heads {config.num_heads}"
        )
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


class TransformerLM(nn.Module):
    """Decoder-only language model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.position_embedding = nn.Embedding(config.context_length, config.embedding_dim)
        self.dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
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
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        hidden_states = self.dropout(self.token_embedding(token_ids) + self.position_embedding(positions))
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
