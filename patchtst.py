"""PatchTST: forecast every channel of a time series by itself, with a transformer whose tokens are pieces of the past.

    python patchtst.py                                        the official model: modules, parameters, FLOPs a window
    python patchtst.py --model_variant transformers --context_length 512

A window (context_length, channels) is standardised by its own mean and deviation; each channel is cut into patches of
patch_length rows every patch_stride rows, so 336 rows become 42 tokens and attention costs 42 x 42 scores a head, not
336 x 336: patching is the memory saving of this model. Channels share all weights and never see each other. The encoder
is not causal. The head maps all tokens of a channel at once to its horizon.

`official` is the paper's supervised model: the end is padded by repeating the last row patch_stride times, learned
positions, BatchNorm after each branch. Its code adds the attention scores of one layer to those of the next, which
needs the scores in memory and so rules out every fused kernel; like the transformers library this model does not.
`transformers` is what PatchTSTForPrediction of that library computes: no padding (the oldest rows are left out where
the patches do not fit), fixed sine positions, BatchNorm before each branch.

Attention goes through attention.py: textbook and fused kernels compute the same function of the same weights. The
residual stream runs in the precision of autocast.

When fused attention does not help: at few tokens. With 42 tokens, 16 heads of 8 and patches of 12 the score and value
products are 5 % of a layer's; what a fused kernel saves is the traffic of the scores, 672 numbers a token beside 128
features, and at patches of 48 (10 tokens) that is nearly nothing.

Source: Nie et al. 2023, A Time Series is Worth 64 Words, arXiv 2211.14730, and its published code.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import packed_attention
from attention_support import FULL
from utils import (
    SettingsError,
    count_matmul_parameters,
    count_parameters,
    parse_settings,
    run_script,
    setting,
    training_flops_per_token,
)

NORMS = ("batch", "layer")
NORM_POSITIONS = ("post", "pre")
POSITIONS = ("learned", "sincos")

# Shapes by name; what is not given here is the default of PatchTSTConfig.
MODEL_VARIANTS = {
    "official": {},
    "transformers": {
        "context_length": 512,
        "patch_length": 12,
        "patch_stride": 12,
        "end_padding": False,
        "ffn_dim": 512,
        "norm_position": "pre",
        "positions": "sincos",
        "dropout": 0.0,
        "dropout_twice": False,
        "head_dropout": 0.2,  # as in the course project; the library's default is 0
    },
}


@dataclass(frozen=True)
class PatchTSTConfig:
    """Shape of the model; the defaults are the official ones for ETTm1 and Traffic."""

    context_length: int = 336
    horizon: int = 96
    patch_length: int = 16
    patch_stride: int = 8
    end_padding: bool = True
    num_layers: int = 3
    embedding_dim: int = 128
    num_heads: int = 16
    ffn_dim: int = 256
    dropout: float = 0.2
    dropout_twice: bool = True  # the official code drops the attention branch twice: inside its module and behind it
    head_dropout: float = 0.0
    norm: str = "batch"
    norm_position: str = "post"
    positions: str = "learned"
    attention_backend: str = "sdpa"

    @property
    def head_dim(self) -> int:
        return self.embedding_dim // self.num_heads

    @property
    def num_patches(self) -> int:
        """Tokens of a channel."""
        return (self.context_length - self.patch_length) // self.patch_stride + 1 + self.end_padding


def patchtst_config(model_variant: str = "official", **overrides: object) -> PatchTSTConfig:
    """The named shape with every override that is not None.

    Raises:
        SettingsError: an unknown name or choice, a number out of range, a width that the heads do not divide.
    """
    if model_variant not in MODEL_VARIANTS:
        raise SettingsError(f"--model_variant {model_variant} is unknown; choose one of {', '.join(MODEL_VARIANTS)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    config = PatchTSTConfig(**(MODEL_VARIANTS[model_variant] | given))
    for name in ("context_length", "horizon", "patch_length", "patch_stride", "num_layers", "embedding_dim"):
        if getattr(config, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(config, name)}")
    for name in ("num_heads", "ffn_dim"):
        if getattr(config, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(config, name)}")
    for name in ("dropout", "head_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise SettingsError(f"--{name} must be at least 0 and below 1, not {getattr(config, name)}")
    for name, known in (("norm", NORMS), ("norm_position", NORM_POSITIONS), ("positions", POSITIONS)):
        if getattr(config, name) not in known:
            raise SettingsError(f"--{name} {getattr(config, name)} is unknown; choose one of {', '.join(known)}")
    if config.patch_length > config.context_length:
        raise SettingsError(
            f"--patch_length {config.patch_length} is longer than --context_length {config.context_length}"
        )
    if config.embedding_dim % config.num_heads:
        raise SettingsError(
            f"--embedding_dim {config.embedding_dim} is not divisible by --num_heads {config.num_heads}"
        )
    if config.positions == "sincos" and config.embedding_dim % 2:
        raise SettingsError(f"--positions sincos needs an even --embedding_dim, not {config.embedding_dim}")
    return config


class SelfAttention(nn.Module):
    """Multi-head attention of every token with every token; rows of `qkv` are ordered (three, heads, head_dim).

    `num_heads` is the number of heads that this layer has now: head_pruning.py may remove some.
    """

    def __init__(self, config: PatchTSTConfig):
        super().__init__()
        self.attention_backend = config.attention_backend
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = nn.Linear(config.embedding_dim, 3 * config.embedding_dim)
        self.output = nn.Linear(config.embedding_dim, config.embedding_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(sequences, tokens, width) -> (sequences, tokens, width)"""
        sequences, tokens, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(sequences, tokens, 3, self.num_heads, self.head_dim)
        mixed = packed_attention(qkv, backend=self.attention_backend, causal=False, window=FULL)
        return self.output(mixed.reshape(sequences, tokens, self.num_heads * self.head_dim))


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm of each feature over all tokens of all sequences."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(sequences, tokens, width) -> (sequences, tokens, width)"""
        return super().forward(hidden_states.flatten(0, 1)).view_as(hidden_states)


def make_norm(config: PatchTSTConfig) -> nn.Module:
    return TokenBatchNorm(config.embedding_dim) if config.norm == "batch" else nn.LayerNorm(config.embedding_dim)


def make_dropout(probability: float) -> nn.Module:
    return nn.Dropout(probability) if probability > 0 else nn.Identity()


class EncoderLayer(nn.Module):
    """Attention and MLP, each with a residual, and a norm after (post) or before (pre) each of them."""

    def __init__(self, config: PatchTSTConfig):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.attention_norm = make_norm(config)
        self.attention = SelfAttention(config)
        # Two dropouts one after the other are one that keeps (1 - p)^2.
        kept = (1 - config.dropout) ** (2 if config.dropout_twice else 1)
        self.attention_dropout = make_dropout(1 - kept)
        self.mlp_norm = make_norm(config)
        self.expand = nn.Linear(config.embedding_dim, config.ffn_dim)
        self.contract = nn.Linear(config.ffn_dim, config.embedding_dim)
        self.mlp_dropout = make_dropout(config.dropout)

    def mlp(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.contract(self.mlp_dropout(F.gelu(self.expand(hidden_states))))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(sequences, tokens, width) -> (sequences, tokens, width)"""
        if self.pre_norm:
            hidden_states = hidden_states + self.attention_dropout(self.attention(self.attention_norm(hidden_states)))
            return hidden_states + self.mlp_dropout(self.mlp(self.mlp_norm(hidden_states)))
        hidden_states = self.attention_norm(hidden_states + self.attention_dropout(self.attention(hidden_states)))
        return self.mlp_norm(hidden_states + self.mlp_dropout(self.mlp(hidden_states)))


def sincos_positions(tokens: int, width: int) -> torch.Tensor:
    """(tokens, width): sines and cosines of rising period, mean 0 and deviation 0.1 over the whole table."""
    place = torch.arange(tokens).unsqueeze(1)
    rates = 10000.0 ** (-torch.arange(0, width, 2) / width)
    table = torch.stack([torch.sin(place * rates), torch.cos(place * rates)], dim=2).flatten(1)  # (tokens, width)
    table = table - table.mean()
    return table / (10 * table.std())


class PatchTST(nn.Module):
    """Channel-independent patch transformer."""

    def __init__(self, config: PatchTSTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Linear(config.patch_length, config.embedding_dim)
        shape = (config.num_patches, config.embedding_dim)
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(shape).uniform_(-0.02, 0.02))
        else:
            self.register_buffer("positions", sincos_positions(*shape))
        self.dropout = make_dropout(config.dropout if config.positions == "learned" else 0.0)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.head_dropout = make_dropout(config.head_dropout)
        self.head = nn.Linear(config.num_patches * config.embedding_dim, config.horizon)

    def patches(self, series: torch.Tensor) -> torch.Tensor:
        """(sequences, context_length) -> (sequences, num_patches, patch_length)"""
        config = self.config
        if config.end_padding:
            series = F.pad(series, (0, config.patch_stride), mode="replicate")
        used = config.patch_length + (config.num_patches - 1) * config.patch_stride
        start = 0 if config.end_padding else series.shape[1] - used  # padded: what does not fit is the padding's end
        return series[:, start : start + used].unfold(1, config.patch_length, config.patch_stride)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Windows (batch, context_length, channels) -> forecasts (batch, horizon, channels), fp32."""
        batch, _, channels = inputs.shape
        series = inputs.transpose(1, 2).reshape(batch * channels, -1)  # (sequences, context_length)
        mean = series.mean(1, keepdim=True)
        deviation = torch.sqrt(series.var(1, keepdim=True, unbiased=False) + 1e-5)
        hidden_states = self.embedding(self.patches((series - mean) / deviation))  # (sequences, tokens, width)
        hidden_states = self.dropout(hidden_states + self.positions.to(hidden_states.dtype))
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        forecast = self.head(self.head_dropout(hidden_states.flatten(1))).float()  # (sequences, horizon)
        return (forecast * deviation + mean).view(batch, channels, -1).transpose(1, 2)


def flops_per_window(model: PatchTST, channels: int) -> float:
    """Floating-point operations of forward and backward for one window: those of all tokens and of the head.

    6 x parameters in matrix products for each of channels x tokens, 12 x heads x head_dim x tokens for the attention of
    each token and layer (not causal, so in full), and 6 x parameters of the head for each channel.
    """
    tokens, layers = model.config.num_patches, model.layers
    head = model.head.weight.numel()
    attended = sum(layer.attention.num_heads * layer.attention.head_dim for layer in layers) / len(layers)
    body = count_matmul_parameters(model) - head
    return channels * (tokens * training_flops_per_token(body, len(layers), attended, tokens) + 6 * head)


@dataclass
class Settings:
    """Settings of `python patchtst.py`."""

    model_variant: str = setting("official", "which model to describe", list(MODEL_VARIANTS))
    context_length: int | None = setting(None, "rows that it sees (default: by variant)")
    horizon: int = setting(96, "rows that it forecasts")
    embedding_dim: int = setting(128, "width")
    num_heads: int = setting(16, "attention heads")


def main() -> int:
    """Print modules, parameters and FLOPs of a shape (built without memory on PyTorch's meta device)."""
    settings = parse_settings(Settings)
    config = patchtst_config(
        settings.model_variant,
        context_length=settings.context_length,
        horizon=settings.horizon,
        embedding_dim=settings.embedding_dim,
        num_heads=settings.num_heads,
    )
    with torch.device("meta"):
        model = PatchTST(config)
    print(model)
    print(f"\nwindows (batch, {config.context_length}, channels) -> forecasts (batch, {config.horizon}, channels)")
    print(f"{config.num_patches} tokens a channel; parameters: {count_parameters(model):,}")
    print(f"training: {flops_per_window(model, 1) / 1e6:,.1f} MFLOP a window and channel")
    return 0


if __name__ == "__main__":
    run_script(main)
