"""A vision transformer for small images: pre-norm blocks over patches and a class token; 4,197,994 parameters.

    python vit.py                                            the 4.2 M model: modules, parameters, FLOPs an image
    python vit.py --model_size large                         the 11.9 M model of the course project's baseline

A picture of 32 x 32 pixels is cut into 64 patches of 4 x 4; each becomes a token by a linear layer and a norm, a class
token is put in front, positions are added, 12 blocks follow (norm, attention, norm, MLP of width 512), and the class
token goes through a norm, Linear to half of the width, GELU, Linear to the classes. Width 192 with 3 heads is the
course project's small model, width 384 with 6 heads its baseline; both have an MLP of 512. The project declares a final
norm, counts its parameters and never applies it; here it is applied (`--final_norm false` leaves it out).

`scaled` initialisation draws weights with deviation sqrt(2 / (5 width)), 0.046 at width 192, and the two layers of a
block that write into the residual stream smaller by sqrt(2 layers). Patches leave their norm with deviation 1, so the
class token is drawn with 1, too, and learned positions with 0.71, the root mean square of the waves of `centres`: at
the usual 0.02 a model has to find out first where its patches are. `pytorch` is what the layers do by themselves, as in
the course project, with positions of 0.02.

Tokens come from mixed_resolution.py, patches of one size or of many. `learned` positions belong to places in a row and
need a regular grid; `centres` are fixed waves of each patch's centre and fit both. The residual stream runs in the
precision of autocast. Attention, checkpointing and the decorrelation of heads are the lab's techniques.

When fused attention does not help: 65 tokens are few. The score products are 7 % of the model's FLOPs at width 192, and
a compiled textbook softmax over 65 scores is one short kernel.

Source: Dosovitskiy et al. 2020, An Image is Worth 16x16 Words, arXiv 2010.11929; Hassani et al. 2021, Escaping the Big
Data Paradigm with Compact Transformers, arXiv 2104.05704 (patches of 4 on CIFAR); Nguyen and Salazar 2019, Transformers
without Tears, arXiv 1910.05895 (the initialisation).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attention import packed_attention
from checkpointing import run_blocks
from decatt import decorrelation
from mixed_resolution import centre_positions
from utils import (
    SettingsError,
    count_matmul_parameters,
    count_parameters,
    parse_settings,
    run_script,
    setting,
    training_flops_per_token,
)

POOLS = ("class", "mean")
POSITIONS = ("learned", "centres")
HEADS = ("mlp", "linear")
INITIALISATIONS = ("scaled", "pytorch")

# Shapes by name; what is not given here is the default of ViTConfig.
MODEL_SIZES = {
    "small": {},
    "large": {"embedding_dim": 384, "num_heads": 6},
    "tiny": {"num_layers": 4, "embedding_dim": 64, "num_heads": 2, "mlp_dim": 128},  # for a laptop
}


@dataclass(frozen=True)
class ViTConfig:
    """Shape of the model and the techniques inside it; the defaults are the small model of 4,197,994 parameters."""

    num_tokens: int = 64  # patches of an image, without the class token
    patch_values: int = 48  # numbers of a patch: 3 x 4 x 4
    num_classes: int = 10
    num_layers: int = 12
    embedding_dim: int = 192
    num_heads: int = 3
    mlp_dim: int = 512
    dropout: float = 0.0  # inside the MLP and the head
    attention_dropout: float = 0.0
    drop_path: float = 0.0  # of the last block; rises linearly from 0
    pool: str = "class"
    positions: str = "learned"
    head: str = "mlp"
    final_norm: bool = True
    patch_norm: bool = False  # a norm of the patch's numbers, before they become a token
    initialisation: str = "scaled"
    attention_backend: str = "sdpa"
    gradient_checkpointing: str = "none"
    checkpoint_every: int = 2
    decorrelated_layers: int = 0  # the first so many layers return DeCAtt's term

    @property
    def head_dim(self) -> int:
        return self.embedding_dim // self.num_heads

    @property
    def sequence_length(self) -> int:
        """Tokens that attention sees."""
        return self.num_tokens + (self.pool == "class")


def vit_config(model_size: str = "small", **overrides: object) -> ViTConfig:
    """The named shape with every override that is not None.

    Raises:
        SettingsError: an unknown name or choice, a number out of range, a width that the heads do not divide.
    """
    if model_size not in MODEL_SIZES:
        raise SettingsError(f"--model_size {model_size} is unknown; choose one of {', '.join(MODEL_SIZES)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    config = ViTConfig(**(MODEL_SIZES[model_size] | given))
    for name in ("num_tokens", "patch_values", "num_classes", "num_layers", "embedding_dim", "num_heads", "mlp_dim"):
        if getattr(config, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(config, name)}")
    for name in ("dropout", "attention_dropout", "drop_path"):
        if not 0 <= getattr(config, name) < 1:
            raise SettingsError(f"--{name} must be at least 0 and below 1, not {getattr(config, name)}")
    choices = {"pool": POOLS, "positions": POSITIONS, "head": HEADS, "initialisation": INITIALISATIONS}
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise SettingsError(f"--{name} {getattr(config, name)} is unknown; choose one of {', '.join(known)}")
    if config.embedding_dim % config.num_heads:
        raise SettingsError(
            f"--embedding_dim {config.embedding_dim} is not divisible by --num_heads {config.num_heads}"
        )
    if config.positions == "centres" and (config.embedding_dim % 4 or config.embedding_dim < 8):
        raise SettingsError(
            f"--positions centres needs an --embedding_dim that 4 divides, at least 8, not {config.embedding_dim}"
        )
    if config.head == "mlp" and config.embedding_dim < 2:
        raise SettingsError("--head mlp halves the width; raise --embedding_dim or use --head linear")
    if not 0 <= config.decorrelated_layers <= config.num_layers:
        raise SettingsError(
            f"--decatt_layers must be from 1 to the {config.num_layers} layers of the model, "
            f"not {config.decorrelated_layers}"
        )
    if config.decorrelated_layers and config.num_heads < 2:
        raise SettingsError("--decatt_weight needs at least two heads to decorrelate; raise --num_heads")
    return config


class SelfAttention(nn.Module):
    """Multi-head attention of every token with every token; rows of `qkv` are ordered (three, heads, head_dim).

    `num_heads` is the number of heads that this layer has now: head_pruning.py may remove some. `decorrelated` makes
    it return DeCAtt's term beside its output.
    """

    def __init__(self, config: ViTConfig, decorrelated: bool):
        super().__init__()
        self.attention_backend, self.dropout = config.attention_backend, config.attention_dropout
        self.num_heads, self.head_dim, self.decorrelated = config.num_heads, config.head_dim, decorrelated
        self.qkv = nn.Linear(config.embedding_dim, 3 * config.embedding_dim)
        self.output = nn.Linear(config.embedding_dim, config.embedding_dim)

    def heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the heads return: (images, tokens, width) -> (images, tokens, heads, head_dim)"""
        images, tokens, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(images, tokens, 3, self.num_heads, self.head_dim)
        dropout = self.dropout if self.training else 0.0
        return packed_attention(qkv, backend=self.attention_backend, causal=False, dropout_p=dropout)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(images, tokens, width) -> (the same shape, DeCAtt's term or None)"""
        mixed = self.heads(hidden_states)
        term = decorrelation(mixed) if self.decorrelated and self.training else None
        return self.output(mixed.flatten(2)), term


class DropPath(nn.Module):
    """Stochastic depth: leaves a branch out for a random part of the images and scales the others up.

    Source: Huang et al. 2016, Deep Networks with Stochastic Depth, arXiv 1603.09382.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.drops = probability > 0
        kept = torch.tensor(1.0 - probability)  # no Python number, or each block would be compiled by itself
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """(images, tokens, width) -> the same shape"""
        if not self.training or not self.drops:
            return branch
        gates = torch.rand(branch.shape[0], 1, 1, device=branch.device) < self.kept
        return branch * (gates / self.kept).to(branch.dtype)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ViTConfig, place: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.embedding_dim)
        self.attention = SelfAttention(config, place < config.decorrelated_layers)
        self.mlp_norm = nn.LayerNorm(config.embedding_dim)
        self.expand = nn.Linear(config.embedding_dim, config.mlp_dim)
        self.dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.contract = nn.Linear(config.mlp_dim, config.embedding_dim)
        self.drop_path = DropPath(config.drop_path * place / max(1, config.num_layers - 1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(images, tokens, width) -> the same shape; with DeCAtt's term beside it where the layer is decorrelated"""
        mixed, term = self.attention(self.attention_norm(hidden_states))
        hidden_states = hidden_states + self.drop_path(mixed)
        expanded = self.dropout(F.gelu(self.expand(self.mlp_norm(hidden_states))))
        hidden_states = hidden_states + self.drop_path(self.contract(expanded))
        return hidden_states if term is None else (hidden_states, term)


class ViT(nn.Module):
    """Vision transformer over tokens that are patches of an image."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        width = config.embedding_dim
        self.patch_norm = nn.LayerNorm(config.patch_values) if config.patch_norm else nn.Identity()
        self.embedding = nn.Linear(config.patch_values, width)
        self.embedding_norm = nn.LayerNorm(width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if config.pool == "class" else None
        shape = (config.sequence_length, width)
        self.positions = nn.Parameter(torch.zeros(shape)) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, place) for place in range(config.num_layers))
        self.final_norm = nn.LayerNorm(width) if config.final_norm else nn.Identity()
        if config.head == "mlp":
            dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
            self.head = nn.Sequential(
                nn.Linear(width, width // 2), nn.GELU(), dropout, nn.Linear(width // 2, config.num_classes)
            )
        else:
            self.head = nn.Linear(width, config.num_classes)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights anew, as the configuration says."""
        if self.config.initialisation == "pytorch":
            for token in (self.class_token, self.positions):
                if token is not None:
                    nn.init.normal_(token, std=1.0 if token is self.class_token else 0.02)
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=(2 / (5 * self.config.embedding_dim)) ** 0.5)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=self.config.patch_values**-0.5)  # its input is no hidden state
        for block in self.blocks:
            for layer in (block.attention.output, block.contract):
                layer.weight.div_((2 * self.config.num_layers) ** 0.5)
        for token, deviation in ((self.class_token, 1.0), (self.positions, 0.5**0.5)):
            if token is not None:
                nn.init.normal_(token, std=deviation)

    def tokens(self, patches: torch.Tensor, centres: torch.Tensor | None = None) -> torch.Tensor:
        """Patches (and their centres, for `centres` positions) -> what the first block is given.

        Returns:
            (images, sequence_length, width)
        """
        projected = self.embedding(self.patch_norm(patches))  # (images, tokens, width)
        hidden_states = self.embedding_norm(projected).to(projected.dtype)  # 16 bits under autocast
        if self.positions is None:
            hidden_states = hidden_states + centre_positions(centres, self.config.embedding_dim).to(hidden_states.dtype)
        if self.class_token is not None:
            front = self.class_token.to(hidden_states.dtype).expand(len(hidden_states), -1, -1)
            hidden_states = torch.cat([front, hidden_states], dim=1)
        if self.positions is not None:
            hidden_states = hidden_states + self.positions.to(hidden_states.dtype)
        return hidden_states

    def features(
        self,
        patches: torch.Tensor,
        centres: torch.Tensor | None = None,
        tokens: Callable[..., torch.Tensor] | None = None,
        blocks: Iterable[Callable[..., Any]] | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the head reads, (images, width), and the decorrelation terms of the layers that return one."""
        config, terms = self.config, []
        hidden_states = run_blocks(
            self.blocks if blocks is None else blocks,
            (tokens or self.tokens)(patches, centres),
            config.gradient_checkpointing,
            every=config.checkpoint_every,
            random=max(config.dropout, config.attention_dropout, config.drop_path) > 0,
            terms=terms,
        )
        if config.pool == "class":
            return self.final_norm(hidden_states[:, 0]), terms
        return self.final_norm(hidden_states).mean(1), terms

    def forward(
        self,
        patches: torch.Tensor,
        centres: torch.Tensor | None = None,
        tokens: Callable[..., torch.Tensor] | None = None,
        blocks: Iterable[Callable[..., Any]] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Patches to logits.

        Args:
            patches: (images, tokens, patch_values), as mixed_resolution.py cuts them.
            centres: (images, tokens, 2) or (tokens, 2), for `centres` positions.
            tokens, blocks: called in the place of this model's own; see `compiled_by_parts`.

        Returns:
            Logits (images, classes), fp32. While it trains with decorrelated layers: (logits, the mean of DeCAtt's
            terms over those layers, a scalar).
        """
        features, terms = self.features(patches, centres, tokens, blocks)
        logits = self.head(features).float()
        return (logits, torch.stack(terms).mean()) if terms else logits


def compiled_by_parts(model: ViT, backend: str = "inductor") -> Callable[..., Any]:
    """The model's forward pass with its embedding and its blocks compiled one by one.

    Blocks of one kind are compiled once, which takes a part of the time that the whole model takes; nothing is fused
    across the borders of blocks. Needs `gradient_checkpointing` none.
    """
    compiled = partial(torch.compile, dynamic=False, fullgraph=True, backend=backend)
    return partial(model, tokens=compiled(model.tokens), blocks=[compiled(block) for block in model.blocks])


@torch.no_grad()
def head_outputs(model: ViT, patches: torch.Tensor, centres: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The outputs of every layer's heads, each (images, tokens, heads, head_dim); for a model in evaluation mode."""
    outputs, hidden_states = [], model.tokens(patches, centres)
    for block in model.blocks:
        outputs.append(block.attention.heads(block.attention_norm(hidden_states)))
        result = block(hidden_states)
        hidden_states = result[0] if isinstance(result, tuple) else result
    return outputs


def flops_per_image(model: ViT) -> float:
    """Floating-point operations of forward and backward for one image.

    6 x the parameters in matrix products for every token they see (the patch embedding all patches, the blocks all
    tokens, the head one), and 12 x heads x head_dim x tokens for the attention of each token and layer.
    """
    config = model.config
    embedding = model.embedding.weight.numel()
    head = count_matmul_parameters(model.head) if config.head == "mlp" else model.head.weight.numel()
    body = count_matmul_parameters(model) - embedding - head
    attended = sum(b.attention.num_heads * b.attention.head_dim for b in model.blocks) / len(model.blocks)
    tokens = config.sequence_length
    per_token = training_flops_per_token(body, len(model.blocks), attended, tokens)
    return tokens * per_token + 6 * embedding * config.num_tokens + 6 * head


@dataclass
class Settings:
    """Settings of `python vit.py`."""

    model_size: str = setting("small", "which model to describe", list(MODEL_SIZES))
    num_classes: int = setting(10, "classes")
    num_tokens: int = setting(64, "patches of an image")


def main() -> int:
    """Print modules, parameters and FLOPs of a shape (built without memory on PyTorch's meta device)."""
    settings = parse_settings(Settings)
    config = vit_config(settings.model_size, num_classes=settings.num_classes, num_tokens=settings.num_tokens)
    with torch.device("meta"):
        model = ViT(config)
    print(model)
    print(f"\npatches (images, {config.num_tokens}, {config.patch_values}) -> logits (images, {config.num_classes})")
    print(f"{config.sequence_length} tokens; parameters: {count_parameters(model):,}")
    print(f"training: {flops_per_image(model) / 1e9:,.3f} GFLOP an image")
    return 0


if __name__ == "__main__":
    run_script(main)
