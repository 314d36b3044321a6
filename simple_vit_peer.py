"""The peer of vit_benchmark.py: vit-pytorch's SimpleViT by its published architecture, and this lab's model like it.

Weights are copied by name. A patch's numbers lie as (row, column, channel) in the peer and as (channel, row, column)
here; biases that the peer lacks become zero.

Source: https://github.com/lucidrains/vit-pytorch (SimpleViT); Beyer et al. 2022, Better plain ViT baselines for
ImageNet-1k, arXiv 2205.01580.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import sdpa_kernel

from attention_support import SDPA_KERNELS
from mixed_resolution import cut
from vit import ViT, ViTConfig, vit_config

IMAGE_SIZE, PATCH_SIZE, NUM_CLASSES = 32, 4, 10


def grid_coordinates(side: int) -> torch.Tensor:
    """(side x side, 2): column x and row y of each patch, row-major, from 0."""
    steps = torch.arange(side, dtype=torch.float32)
    return torch.stack([steps.repeat(side), steps.repeat_interleave(side)], dim=1)


class PeerAttention(nn.Module):
    """q, k and v from one layer, textbook softmax or one of PyTorch's fused kernels. No layer has a bias."""

    def __init__(self, width: int, heads: int, kernel: str):
        super().__init__()
        self.heads, self.scale, self.kernel = heads, (width // heads) ** -0.5, kernel
        self.qkv, self.output = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(images, tokens, width) -> the same shape"""
        parts = self.qkv(hidden_states).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (images, heads, tokens, d)
        if self.kernel != "textbook":
            with nullcontext() if self.kernel == "sdpa" else sdpa_kernel(SDPA_KERNELS[self.kernel]):
                mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = torch.matmul((torch.matmul(q, k.transpose(-1, -2)) * self.scale).softmax(dim=-1), v)
        return self.output(mixed.transpose(1, 2).flatten(2))


class PeerBlock(nn.Module):
    """Norm, attention, residual; norm, Linear, GELU, Linear, residual."""

    def __init__(self, width: int, heads: int, mlp_dim: int, kernel: str):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), PeerAttention(width, heads, kernel)
        self.mlp_norm, self.expand = nn.LayerNorm(width), nn.Linear(width, mlp_dim)
        self.contract = nn.Linear(mlp_dim, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(images, tokens, width) -> the same shape"""
        hidden_states = self.attention(self.attention_norm(hidden_states)) + hidden_states
        return self.contract(F.gelu(self.expand(self.mlp_norm(hidden_states)))) + hidden_states


class SimpleViT(nn.Module):
    """vit-pytorch's SimpleViT; modules are named as in vit.py, so that weights can be copied by name.

    Args:
        num_layers, embedding_dim, num_heads, mlp_dim: as in `ViTConfig`.
        kernel: of attention: "textbook", which the package has, "sdpa", which leaves the choice to PyTorch, or one of
            SDPA_KERNELS.
    """

    def __init__(self, num_layers: int, embedding_dim: int, num_heads: int, mlp_dim: int, kernel: str = "textbook"):
        super().__init__()
        values, width, side = 3 * PATCH_SIZE**2, embedding_dim, IMAGE_SIZE // PATCH_SIZE
        self.patch_norm, self.embedding = nn.LayerNorm(values), nn.Linear(values, width)
        self.embedding_norm = nn.LayerNorm(width)
        frequencies = 10000 ** (-torch.arange(width // 4) / (width // 4 - 1))
        x, y = (grid_coordinates(side)[:, axis, None] * frequencies for axis in (0, 1))
        self.register_buffer("positions", torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1), persistent=False)
        self.blocks = nn.ModuleList(PeerBlock(width, num_heads, mlp_dim, kernel) for _ in range(num_layers))
        self.final_norm, self.head = nn.LayerNorm(width), nn.Linear(width, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(images, 3, 32, 32) -> (images, classes)"""
        patches = images.unflatten(3, (-1, PATCH_SIZE)).unflatten(2, (-1, PATCH_SIZE))  # (b, c, h, p1, w, p2)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (b, h w, p1 p2 c)
        hidden_states = self.embedding_norm(self.embedding(self.patch_norm(patches)))
        hidden_states = hidden_states + self.positions.to(hidden_states.dtype)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.head(self.final_norm(hidden_states).mean(dim=1))


class OnImages(nn.Module):
    """This lab's model with the cutting of patches in front, as SimpleViT has it."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.model = ViT(config)
        self.register_buffer("grid", grid_coordinates(IMAGE_SIZE // PATCH_SIZE), persistent=False)

    def forward(self, images: torch.Tensor) -> Any:
        """(images, 3, 32, 32) -> what the model returns"""
        return self.model(cut(images, PATCH_SIZE), self.grid)


def our_peer(shape: dict[str, int], backend: str) -> OnImages:
    """The lab's model of SimpleViT's shape."""
    options = {"pool": "mean", "positions": "centres", "head": "linear", "patch_norm": True}
    return OnImages(vit_config(**shape, **options, num_classes=NUM_CLASSES, attention_backend=backend))


def in_our_order(name: str, values: torch.Tensor) -> torch.Tensor:
    """SimpleViT's parameter or gradient with a patch's numbers as (channel, row, column)."""
    if name == "embedding.weight" or name.startswith("patch_norm."):
        return values.unflatten(-1, (PATCH_SIZE**2, 3)).transpose(-1, -2).flatten(-2)
    return values


@torch.no_grad()
def copy_weights(model: ViT, state: dict[str, torch.Tensor]) -> None:
    """Give the lab's model SimpleViT's weights; biases that SimpleViT lacks become zero."""
    missing = model.load_state_dict({name: in_our_order(name, value) for name, value in state.items()}, strict=False)
    for name in missing.missing_keys:
        model.get_parameter(name).zero_()
