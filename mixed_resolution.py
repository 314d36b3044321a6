"""Mixed-resolution tokens: a quadtree gives small patches to the parts of an image that need them, large to the rest.

    python mixed_resolution.py                                    time of the tokeniser beside uniform patches
    python mixed_resolution.py --image_size 64 --num_tokens 34    half as many tokens at one size
    python mixed_resolution.py --image_size 48 --min_patch 3 --max_patch 12    another tree

An image of side S begins as the uniform grid of its largest patches, (S / max_patch)^2 leaves. Then, m times, the most
important leaf that is larger than min_patch is replaced by its four children, so that a tree has

    K = (S / max_patch)^2 + 3 m tokens,    at most (S / min_patch)^2, the uniform grid of the smallest patches.

Every token is shrunk to min_patch x min_patch pixels and goes through the same patch embedding; where it lies is told
by its centre, how large it is by nothing.

Why it saves: a transformer block of width d needs 24 K d^2 + 4 K^2 d operations forward and keeps activations in
proportion to K, whatever S is. At 64 pixels K = 64 of 256 patches of 4 x 4 is a quarter of the activations of the fine
grid and less than a quarter of its operations; the tokeniser adds a few passes over the pixels and compares some 80
numbers of an image with each other, once for every scale and once more.

When it does not help: against a uniform grid of the same K nothing is saved, so a gain can only be accuracy. Images
that were enlarged have no detail that a smaller patch could find, and images with detail everywhere have no place where
tokens could be spared.

Importance of a patch of side p (the paper's score is its negative):

pixel_blur  sqrt(p MSE(patch, the patch shrunk to min_patch and enlarged again)): what the token would lose.
trained     what the features of a small network, trained on the same data, lose when the image is blurred by 2 and 4.
            The paper takes a ShuffleNet that knows ImageNet.
random      uniform numbers: the control. What it reaches, trees reach without looking at the image.

Source: Ronen, Levy, Golbert 2023, Vision Transformers with Mixed-Resolution Tokenization, arXiv 2304.00287.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from quadtree import SIZES, Quadtree, greedy_reference, locate, quadtree, select, valid_counts
from technique_bench import Study, interleaved, middle
from utils import SettingsError, parse_settings, run_script, setting

SCORERS = ("pixel_blur", "random", "trained")
BLURS = (2, 4)  # factors of the trained scorer
SPAN = 16  # of a regular grid's centres
STRIDE = 4  # pixels between neighbouring features of its network


# --------------------------------------------------------------------------------------------------------------------
# Importance
# --------------------------------------------------------------------------------------------------------------------


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """(b, c, S, S) -> (b, c, size, size) bilinear, with antialiasing when it shrinks; the same tensor if equal."""
    if images.shape[-1] == size:
        return images
    shrinks = size < images.shape[-1]
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=shrinks)


def shrink(images: torch.Tensor, factor: int) -> torch.Tensor:
    """(b, c, S, S) -> (b, c, S / factor, S / factor) bilinear without antialiasing; the same tensor for factor 1."""
    if factor == 1:
        return images
    size = images.shape[-1] // factor
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def blur(images: torch.Tensor, factor: int) -> torch.Tensor:
    """(b, c, S, S): shrunk by the factor and enlarged again."""
    size = images.shape[-1]
    return F.interpolate(shrink(images, factor), size=(size, size), mode="bilinear", align_corners=False)


def mean_of_patches(values: torch.Tensor, size: int) -> torch.Tensor:
    """(b, c, H, H) -> (b, (H / size)^2): mean over the channels and pixels of each patch, row-major."""
    return values.unflatten(3, (-1, size)).unflatten(2, (-1, size)).mean((1, 3, 5)).flatten(1)


@torch.no_grad()
def scores(
    images: torch.Tensor,
    tree: Quadtree,
    scorer: str,
    *,
    network: "ScorerNetwork | None" = None,
    generator: torch.Generator | None = None,
) -> list[torch.Tensor]:
    """Importance of every patch that may be split.

    Args:
        images: (b, 3, S, S) fp32, as the model sees them.
        tree: the shape of the tree.
        scorer: one of `SCORERS`.
        network: of the trained scorer.
        generator: of the random one, on the images' device; None draws from the device's own. Compiled code can only
            do that.

    Returns:
        For each patch side p above min_patch, largest first: (b, (S / p)^2) fp32, row-major, without gradients. Higher
        is split first.

    Raises:
        SettingsError: images of another size, an unknown scorer, or a trained one without a network or with patches
            that do not consist of whole features.
    """
    check_images(images, tree)
    scales = tree.sizes[:-1]
    with torch.autocast(images.device.type, enabled=False):  # differences of nearly equal numbers: no 16 bits
        if scorer == "pixel_blur":
            # Enlarging the whole image, not patch by patch, keeps edges between patches smooth.
            losses = [(images - blur(images, size // tree.min_patch)).square() for size in scales]
            return [
                (size * mean_of_patches(loss, size)).sqrt() for size, loss in zip(scales, losses, strict=True)
            ]  # (b, (S / p)^2)
        if scorer == "random":
            counts = [(tree.image_size // size) ** 2 for size in scales]
            shape = (len(images), sum(counts))
            return list(torch.rand(shape, device=images.device, generator=generator).split(counts, 1))
        if scorer != "trained":
            raise SettingsError(f"--scorer {scorer} is unknown; choose one of {', '.join(SCORERS)}")
        if network is None:
            raise SettingsError("--scorer trained needs a trained network; --scorer pixel_blur needs none")
        if any(size % STRIDE for size in scales):
            raise SettingsError(
                f"--scorer trained has a feature every {STRIDE} pixels and needs patches above --min_patch that are "
                f"multiples of {STRIDE}, not {', '.join(map(str, scales))}"
            )
        sharp = network.features(images)  # (b, c, S / 4, S / 4)
        loss = sum((sharp - network.features(blur(images, factor))).square() for factor in BLURS)
        return [mean_of_patches(loss, size // STRIDE) for size in scales]


def check_images(images: torch.Tensor, tree: Quadtree) -> None:
    """Raise unless the images have the tree's size."""
    if tuple(images.shape[1:]) != (3, tree.image_size, tree.image_size):
        raise SettingsError(
            f"--image_size {tree.image_size} needs images of 3 x {tree.image_size} x {tree.image_size}, not "
            f"{' x '.join(map(str, images.shape[1:]))}"
        )


class ScorerNetwork(nn.Module):
    """Three convolutions and a linear classifier, 47 k parameters, trained by `train_scorer` and then only looked into.

    Fully convolutional: it can be trained on small images and applied to the same images enlarged, where its features
    see a smaller part of an object. It knows which changes matter for the classes of its own data, no more than that:
    it replaces the paper's ShuffleNet where no weights can be downloaded, and is far weaker.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, num_classes)
        self.epoch_losses: list[float] = []  # mean training loss of each epoch

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, S, S) normalised images -> (b, 64, S / 4, S / 4)"""
        return self.convolutions(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, S, S) normalised images -> (b, num_classes) logits"""
        return self.head(self.features(images).mean((2, 3)))


def train_scorer(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_classes: int,
    mean: Sequence[float],
    deviation: Sequence[float],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> ScorerNetwork:
    """Train a scorer as a classifier: AdamW, mirrored images, a rate that falls linearly to 0, everything in fp32.

    The same seed on the same device gives the same weights, and the process's own random numbers are not touched.

    Args:
        images: (n, 3, s, s) uint8 on the device: the training split that the model is trained on, no other.
        labels: (n,) int64.
        num_classes: of the labels.
        mean, deviation: of the channels in units of 0 to 1; the network sees (pixel / 255 - mean) / deviation.
        epochs, batch_size, learning_rate: of the training; the last batch of an epoch may be smaller.
        seed: of weights, order and mirroring.

    Returns:
        The network, frozen and in evaluation mode.

    Raises:
        SettingsError: no image, epoch or batch.
    """
    if min(len(images), epochs, batch_size) < 1:
        raise SettingsError(
            "--scorer trained needs at least one image, one epoch and a batch of one, not "
            f"{len(images)}, {epochs} and {batch_size}"
        )
    device = images.device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = ScorerNetwork(num_classes)
    network.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    mean, deviation = (
        torch.as_tensor(part, dtype=torch.float32, device=device).view(3, 1, 1) for part in (mean, deviation)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    totals = torch.zeros(epochs, device=device)
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with exact, torch.autocast(device.type, enabled=False):
        for epoch in range(epochs):
            for chosen in torch.randperm(len(images), generator=generator, device=device).split(batch_size):
                batch = (images[chosen].float() / 255 - mean) / deviation  # (b, 3, s, s)
                mirrored = torch.rand((len(chosen), 1, 1, 1), generator=generator, device=device) < 0.5
                loss = F.cross_entropy(network(torch.where(mirrored, batch.flip(3), batch)), labels[chosen])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                totals[epoch] += loss.detach() * len(chosen)
    network.epoch_losses = (totals / len(images)).tolist()
    return network.requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------------------------------
# Tokens
# --------------------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """Patches of a batch of images, ready for the patch embedding.

    patches  (b, K, 3 x p x p): content, channel by channel, each row-major.
    centres  (b, K, 2) fp32: x and y in units of p, such as 0.5 or 2.0; of a regular grid in sixteenths of the image.
    sizes    (b, K) int64: side of the patch in the image, in pixels.
    corners  (b, K, 2) int64: x and y of its upper left pixel.
    """

    patches: torch.Tensor
    centres: torch.Tensor
    sizes: torch.Tensor
    corners: torch.Tensor

    def of_image(self, place: int) -> "Tokens":
        """The tokens of one image: every tensor without its first dimension."""
        return Tokens(*(part[place] for part in self))


def cut(images: torch.Tensor, size: int) -> torch.Tensor:
    """(b, 3, H, H) -> (b, (H / size)^2, 3 x size x size): the regular grid of patches, row-major."""
    grid = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (b, 3, rows, size, columns, size)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def tokenize(images: torch.Tensor, tree: Quadtree, importances: Sequence[torch.Tensor]) -> Tokens:
    """Cut images along the trees that their importances choose, every patch shrunk to min_patch x min_patch.

    Each scale is shrunk as a whole image and cut into patches of min_patch, and the leaves are picked out of them all:
    1 + 1/4 + 1/16 + ... of the image's size is written for a moment. Shrinking is bilinear without antialiasing.

    Args:
        images: (b, 3, S, S) fp32.
        tree: the shape of the tree.
        importances: as `scores` gives them.

    Returns:
        K tokens an image, in the order of `select`.

    Raises:
        SettingsError: images of another size.
    """
    check_images(images, tree)
    smallest = tree.min_patch
    numbers = select(importances, tree)  # (b, K)
    sizes, rows, columns = locate(numbers, tree)
    corners = torch.stack([columns, rows], -1) * sizes[..., None]  # (b, K, 2)
    centres = (corners + sizes[..., None] / 2) / smallest
    parts = [cut(shrink(images, size // smallest), smallest) for size in tree.sizes]
    candidates = torch.cat(parts, 1)  # (b, patches of all scales, 3 x p x p)
    patches = candidates.gather(1, numbers[..., None].expand(-1, -1, candidates.shape[2]))
    return Tokens(patches, centres, sizes, corners)


def uniform_tokens(images: torch.Tensor, patch_size: int) -> Tokens:
    """The regular grid of patches in the same form, row-major: (S / p)^2 tokens an image.

    Its centres lie in 0 to SPAN whatever the number of patches, where those of mixed tokens lie whose smallest patch is
    a sixteenth of the image: the same place of an image has the same position in both.

    Args:
        images: (b, 3, S, S).
        patch_size: side p in pixels.

    Raises:
        SettingsError: a side that does not divide the image's.
    """
    size = images.shape[-1]
    if patch_size < 1 or size % patch_size:
        raise SettingsError(f"--patch_size {patch_size} must divide the side of the image, {size}")
    side = size // patch_size
    steps = torch.arange(side, device=images.device)
    grid = torch.stack([steps.expand(side, side), steps[:, None].expand(side, side)], -1).flatten(0, 1)  # (K, 2)
    shape = (len(images), side * side)
    sizes = torch.full((1, 1), patch_size, device=images.device).expand(shape)
    centres = ((grid + 0.5) * (SPAN / side)).repeat(len(images), 1, 1)
    return Tokens(cut(images, patch_size), centres, sizes, (grid * patch_size).expand(*shape, 2))


def centre_positions(centres: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoidal positions of centres: half of the width for x, half for y, each sines and then cosines.

    Args:
        centres: (b, K, 2) or (K, 2): x and y, as in Tokens.
        width: of the embedding, d.

    Returns:
        (..., width) fp32 with the frequencies 10000^(-i / (d/4 - 1)), i = 0 .. d/4 - 1.

    Raises:
        SettingsError: a width that is no multiple of 4, or below 8.
    """
    if width % 4 or width < 8:
        raise SettingsError(f"--embedding_dim {width} must be a multiple of 4 and at least 8 for positions of centres")
    steps = torch.arange(width // 4, device=centres.device, dtype=torch.float32)
    angles = centres.float()[..., None] * 10000 ** (-steps / (width // 4 - 1))  # (..., 2, width / 4)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def mosaic(image: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """The image as its tokens show it to the model: each token's pixels, enlarged without smoothing, at its place.

    Args:
        image: (3, S, S); gives size and type, the content is the tokens'.
        tokens: those of one image (`Tokens.of_image`).

    Returns:
        (3, S, S)
    """
    painted = torch.zeros_like(image)
    side = round((tokens.patches.shape[-1] / 3) ** 0.5)
    for patch, size, (x, y) in zip(tokens.patches, tokens.sizes.tolist(), tokens.corners.tolist(), strict=True):
        pixels = patch.unflatten(0, (3, side, side))
        factor = size // side
        painted[:, y : y + size, x : x + size] = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return painted


# --------------------------------------------------------------------------------------------------------------------
# What it costs
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Settings of `python mixed_resolution.py`; the defaults are the lab's trees for CIFAR's images, enlarged."""

    image_size: int | None = setting(None, "side of the images in pixels (default: 32, 64, 128 and 256)")
    min_patch: int | None = setting(None, "side of the smallest patch (default: image_size / 16)")
    max_patch: int | None = setting(None, "side of the largest patch (default: image_size / 4)")
    num_tokens: int = setting(64, "tokens of an image: (image_size / max_patch)^2 + 3 x splits")
    scorer: str | None = setting(None, "one way to tell importance (default: all)", SCORERS)
    batch_size: int | None = setting(None, "images (default: 512, at 256 pixels and more 128, without a GPU 4)")
    use_compile: bool | None = setting(None, "also compiled variants (default: with a GPU)")
    rounds: int = setting(3, "measurements of each variant, in turn")
    repeats: int = setting(5, "timed calls of a measurement")
    output_folder: str = setting("outputs", "folder of all results")


class Problem(nn.Module):
    """Made-up images of one size, smooth with some noise, and the ways to cut them."""

    def __init__(self, tree: Quadtree, batch_size: int, device: torch.device):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        smooth = resize(torch.randn(batch_size, 3, 8, 8, generator=generator), tree.image_size)
        images = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
        self.register_buffer("images", images.to(device), persistent=False)
        counts = {size: (tree.image_size // size) ** 2 for size in tree.sizes}
        self.tree, self.uniform_size = tree, min(counts, key=lambda size: abs(counts[size] - tree.num_tokens))
        self.network = ScorerNetwork(10).requires_grad_(False).eval().to(device)

    def uniform(self) -> Tokens:
        """The grid of that scale of the tree which has nearest to as many tokens."""
        return uniform_tokens(self.images, self.uniform_size)

    def mixed(self, scorer: str) -> tuple[Tokens, list[torch.Tensor]]:
        """Tokens, and the importances that chose them."""
        importances = scores(self.images, self.tree, scorer, network=self.network)
        return tokenize(self.images, self.tree, importances), importances

    def variants(self, scorers: Sequence[str], compiled: bool) -> dict[str, Callable[[], Any]]:
        """Name -> call."""
        found = {"uniform": self.uniform} | {name: lambda name=name: self.mixed(name) for name in scorers}
        if not compiled:
            return found
        return {f"{name}, compiled": torch.compile(call, fullgraph=True, dynamic=False) for name, call in found.items()}


def is_greedy(tokens: Tokens, importances: Sequence[torch.Tensor], tree: Quadtree, images: int) -> bool:
    """Whether the leaves of the first images are those of the definition."""
    for place in range(min(images, len(tokens.sizes))):
        sizes, corners = tokens.sizes[place].tolist(), tokens.corners[place].tolist()
        leaves = [(size, y // size, x // size) for size, (x, y) in zip(sizes, corners, strict=True)]
        if leaves != greedy_reference([part[place].cpu() for part in importances], tree):
            return False
    return True


def main() -> int:
    """Time of cutting images into tokens, uniform and mixed, for each way to tell importance."""
    settings = parse_settings(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    settings.use_compile = gpu if settings.use_compile is None else settings.use_compile
    for name in ("batch_size", "rounds", "repeats"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise SettingsError(f"--{name} must be at least 1, not {value}")
    if settings.image_size is None and (settings.min_patch is not None or settings.max_patch is not None):
        raise SettingsError("--min_patch and --max_patch belong to one size of image; give --image_size as well")
    image_sizes = list(SIZES) if settings.image_size is None else [settings.image_size]
    trees = [quadtree(size, settings.min_patch, settings.max_patch, settings.num_tokens) for size in image_sizes]
    scorers = SCORERS if settings.scorer is None else (settings.scorer,)
    study = Study("mixed_resolution", settings, device)
    for tree in trees:
        counts = valid_counts(tree.image_size, tree.min_patch, tree.max_patch)
        batch_size = settings.batch_size or ((512 if tree.image_size < 256 else 128) if gpu else 4)
        print(
            f"{batch_size} images of {tree.image_size} pixels, patches {', '.join(map(str, tree.sizes))}: "
            f"{tree.num_tokens} tokens; possible are {counts[0]} to {counts[-1]} in steps of 3"
        )
        problem = Problem(tree, batch_size, device)
        for compiled in (False, True) if settings.use_compile else (False,):
            torch._dynamo.reset()  # or one size after another would count as recompilations
            variants = problem.variants(scorers, compiled)
            steps = {name: (call, (problem,)) for name, call in variants.items()}
            timing = {"rounds": settings.rounds, "repeats": settings.repeats, "compiled": compiled}
            costs = {name: middle(rows) for name, rows in interleaved(steps, device, **timing).items()}
            for name, call in variants.items():
                row = f"{tree.image_size} px {name}"
                cost = costs[name]
                note = "" if cost.ms is None else f"{1000 * cost.ms / batch_size:.2f} us an image"
                if name.startswith("uniform"):
                    study.add(row, cost, note=f"{note}, {(tree.image_size // problem.uniform_size) ** 2} tokens")
                    continue
                exactness = None
                if cost.status == "ok":
                    exactness = "bitwise" if is_greedy(*call(), tree, images=16) else "changed"
                base = f"{tree.image_size} px uniform{', compiled' if compiled else ''}"
                study.add(row, cost, baseline=base, exactness=exactness, note=note)
    details = [{"image_size": tree.image_size, "sizes": tree.sizes, "num_tokens": tree.num_tokens} for tree in trees]
    return study.finish(trees=details)


if __name__ == "__main__":
    run_script(main)
