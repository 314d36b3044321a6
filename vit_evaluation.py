"""What a ViT is judged by: accuracy, correlation of its heads, accuracy without some of them, mosaics of its tokens.

vit_fit.py trains; here nothing is changed but copies.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from decatt import head_correlation
from head_pruning import attention_layers, remove_heads
from image_dataset import ImageData, Split
from mixed_resolution import Tokens, mosaic, resize
from precision import autocast
from quadtree import Quadtree
from vit import ViT, head_outputs

CORRELATED_IMAGES = 1000  # of validation, on which the correlation of heads is measured
SHOWN_IMAGES = 8  # in mosaics.npz
TokensOf = Callable[[torch.Tensor, int], Tokens]  # of (images, 3, s, s) bytes, and a seed of the random scorer


def spread(count: int, wanted: int) -> torch.Tensor:
    """Places of `wanted` of `count` images (all, if they are fewer), far apart, as a folder lies class by class."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()


@torch.no_grad()
def accuracy_of(model: ViT, split: Split, tokens_of: TokensOf, batch_size: int, precision: str) -> dict[str, float]:
    """`accuracy` and `loss` (cross-entropy, nats) over every image of a split, in evaluation mode, never compiled."""
    device, was_training = split.labels.device, model.training
    right = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    for place in range(0, len(split), batch_size):
        part = slice(place, place + batch_size)
        tokens = tokens_of(split.images[part], place)
        with autocast(precision, device):
            logits = model(tokens.patches, tokens.centres)
        labels = split.labels[part]
        right += (logits.argmax(1) == labels).sum()
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
    model.train(was_training)
    return {"accuracy": right.item() / len(split), "loss": loss.item() / len(split)}


@torch.no_grad()
def correlation_of(model: ViT, split: Split, tokens_of: TokensOf, precision: str) -> dict[str, Any] | None:
    """Correlation of the heads of each layer over some images of a split; None for one head.

    Returns:
        `squares`: DeCAtt's term of each layer. `magnitudes`: the mean |C| over pairs of each layer. `matrices`: the
        mean |C| of each pair, (layers, heads, heads).
    """
    heads = model.config.num_heads
    if heads < 2:
        return None
    model.eval()
    tokens = tokens_of(split.images[spread(len(split), CORRELATED_IMAGES)], 0)
    device = tokens.patches.device
    with autocast(precision, device):
        outputs = head_outputs(model, tokens.patches, tokens.centres)
    pairs = ~torch.eye(heads, dtype=torch.bool, device=device)
    found = [head_correlation(output) for output in outputs]  # each (images, heads, heads)
    model.train()
    return {
        "images": len(tokens.patches),
        "squares": [round(c.square()[:, pairs].mean().item(), 6) for c in found],
        "magnitudes": [round(c.abs()[:, pairs].mean().item(), 6) for c in found],
        "matrices": [c.abs().mean(0).cpu().numpy().round(4).tolist() for c in found],
    }


def without_heads(model: ViT, matrices: list[Any], seed: int) -> Iterator[tuple[str, ViT]]:
    """Copies with one head of every layer cut out: `redundant`, the most correlated one, and `random`, one drawn.

    Args:
        matrices: (layers, heads, heads), the mean |C| of each pair.
        seed: of the random ones.
    """
    draw = np.random.default_rng(seed)
    for name in ("redundant", "random"):
        cut = copy.deepcopy(model)
        for layer, matrix in zip(attention_layers(cut), matrices, strict=True):
            most = int(np.argmax(np.sum(matrix, axis=1)))
            remove_heads(layer, [most if name == "redundant" else int(draw.integers(len(matrix)))])
        yield name, cut


@torch.no_grad()
def mosaics_of(data: ImageData, tokens_of: TokensOf, tree: Quadtree) -> dict[str, np.ndarray]:
    """Arrays of mosaics.npz: some test images, what their tokens show, and the tokens' sizes and centres."""
    split = data.splits["test"]
    places = spread(len(split), SHOWN_IMAGES)
    images = split.images[places]
    plain = resize(images.float() / 255, tree.image_size)
    tokens = tokens_of(images, 0)
    # Cutting and shrinking are linear, so what a token shows is what it holds without the normalisation.
    pixels = tokens.patches.unflatten(2, (3, -1)) * data.deviation[:, None] + data.mean[:, None]
    shown = tokens._replace(patches=pixels.flatten(2))
    painted = torch.stack([mosaic(image, shown.of_image(place)) for place, image in enumerate(plain)])

    def as_bytes(values: torch.Tensor) -> np.ndarray:
        return (255 * values).round().clamp(0, 255).byte().cpu().numpy()

    return {
        "images": as_bytes(plain),
        "mosaics": as_bytes(painted),
        "sizes": tokens.sizes.cpu().numpy(),
        "centres": tokens.centres.cpu().numpy(),
        "classes": np.array([data.class_names[label] for label in split.labels[places].tolist()]),
        "min_patch": np.array(tree.min_patch),
    }


def summarise(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, the spread (largest - smallest) of the accuracies, and `seeds` with each by itself."""

    def values(name: str) -> list[float]:
        return [result[name] for result in found if result.get(name) is not None]

    def mean(name: str) -> float | None:
        return float(np.mean(values(name))) if values(name) else None

    accuracies = ("validation_accuracy", "test_accuracy")
    more = ("test_accuracy_without_a_redundant_head", "test_accuracy_without_a_random_head")
    means = ("training_minutes", "evaluation_minutes", "total_minutes", "step_ms_median", "images_per_s")
    means += ("augment_ms_median", "tokenise_ms_median", "mfu")
    results = {"seed_count": len(found), "parameters": found[0]["parameters"]}
    results |= {name: mean(name) for name in (*accuracies, *more, *means)}
    results |= {f"{name}_spread": max(values(name)) - min(values(name)) for name in accuracies}
    memory = ("tracked_steps", "peak_allocated_gib", "peak_reserved_gib", "peak_phase")
    results |= {name: found[0][name] for name in memory}
    for name in ("head_correlation_at_start", "head_correlation"):
        rows = [result[name] for result in found if result[name] is not None]
        for key in ("squares", "magnitudes"):
            results[f"{name}_{key}"] = float(np.mean([row[key] for row in rows])) if rows else None
    return results | {"seeds": found}
