"""Gradient checkpointing: keep only each block's input and compute the rest again in the backward pass.

    python checkpointing.py                                  saved GiB, extra time, equal gradients on a stack of blocks
    python checkpointing.py --num_layers 12 --batch_size 125  the stack of the 134 M decoder (a GPU)

A pre-norm block in fp32 keeps about 4 x (8 width + 2 mlp) bytes a token for its backward pass; checkpointed it keeps
its input, 4 x width, and one block at a time is rebuilt: layers x 49,216 bytes a token become layers x 3,072 + 49,216
at width 768. The price is one more forward pass through the blocks: at most a third of the step's matrix products.

When it does not help: where the peak is not the saved activations. The logits and their gradients (12 bytes a logit)
stay, and at a vocabulary of 32,000 they are most of what is left. The result is exact: the same operations run on the
same numbers and the random state is restored, so gradients are bitwise equal, with dropout too. Source: Chen et al.
2016, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
"""

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memory_tracker import MemoryTracker
from utils import SettingsError, parse_settings, percentile, run_script, setting


def checkpointed(block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Run a block, keeping only its input for the backward pass.

    Args:
        block: a module of one argument.
        hidden_states: (batch, tokens, width).

    Returns:
        What the block returns; the same shape for a transformer block.
    """
    return checkpoint(block, hidden_states, use_reentrant=False)


@dataclass
class Settings:
    """Settings of `python checkpointing.py`."""

    num_layers: int = setting(4, "blocks in the stack")
    width: int = setting(256, "width of the hidden states")
    batch_size: int = setting(8, "sequences")
    context_length: int = setting(256, "tokens in a sequence")
    dropout: float = setting(0.1, "dropout inside the blocks; the random state is restored, so gradients stay equal")
    repeats: int = setting(5, "timed steps")


def main() -> int:
    """Compare a stack of MLP blocks with and without checkpointing: peak, time and gradients."""
    settings = parse_settings(Settings)
    if min(settings.num_layers, settings.width, settings.batch_size, settings.context_length, settings.repeats) < 1:
        raise SettingsError("--num_layers, --width, --batch_size, --context_length and --repeats must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        nn.Sequential(
            nn.LayerNorm(settings.width),
            nn.Linear(settings.width, 4 * settings.width),
            nn.GELU(),
            nn.Linear(4 * settings.width, settings.width),
            nn.Dropout(settings.dropout),
        )
        for _ in range(settings.num_layers)
    ).to(device)
    inputs = torch.randn(settings.batch_size, settings.context_length, settings.width, device=device)
    gradients, results = [], []
    for use_checkpointing in (False, True):
        times = []
        for repeat in range(settings.repeats + 1):
            tracker = MemoryTracker(device, roots=(blocks,))
            tracked = repeat == 0
            blocks.zero_grad(set_to_none=True)
            torch.manual_seed(1)
            begin = time.perf_counter()
            with tracker.step(repeat) if tracked else torch.enable_grad(), tracker.phase("step"):
                hidden_states = inputs
                for block in blocks:
                    change = checkpointed(block, hidden_states) if use_checkpointing else block(hidden_states)
                    hidden_states = hidden_states + change
                hidden_states.square().mean().backward()
                del hidden_states, change
            if device.type == "cuda":
                torch.cuda.synchronize()
            if tracked:
                peak = tracker.summary()["step"]["peak_allocated_gib"]
            else:
                times.append(1000 * (time.perf_counter() - begin))
        gradients.append([parameter.grad.clone() for parameter in blocks.parameters()])
        results.append((peak, percentile(times, 50)))
    equal = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    print(f"{'':<16}{'peak GiB':>10}{'ms':>10}")
    for name, (peak, milliseconds) in zip(("plain", "checkpointing"), results, strict=True):
        print(f"{name:<16}{peak:>10.4f}{milliseconds:>10.1f}")
    saved, slower = results[0][0] - results[1][0], results[1][1] / results[0][1] - 1
    print(f"saves {saved:.4f} GiB, costs {100 * slower:+.0f} % time, gradients bitwise equal: {equal}")
    return 0 if equal else 1


if __name__ == "__main__":
    run_script(main)
