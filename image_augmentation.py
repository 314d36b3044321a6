"""Augment whole batches of images on the device: one call, one resampling, every random number an argument.

    from image_augmentation import Augmentation, augment, draw_mixing, draw_numbers
    python image_dataset.py --picture sheet.png           what it does to images, and what it costs here

Flip, crop, rotation and the geometric operations are one affine matrix an image and one resampling, then come the
colour operations, cutout, and mixup or cutmix. `augment` is a pure function that torch.compile takes whole. A small
model's step takes milliseconds, and worker processes that augment image by image with PIL cannot keep up with it. 512
images of 32 x 32 with two operations, cutout and mixing take 0.3 to 0.4 ms on an H100 compiled (torch 2.11, launches
included) and 4 to 6 ms eager, as the kernels are many and small: compile it there.

It does not help where images have sizes of their own: every image here is a square of one size. RandAugment's equalize
is left out, as it needs a histogram an image.

Sources: Cubuk et al. 2020, RandAugment, arXiv 1909.13719; DeVries and Taylor 2017, cutout, arXiv 1708.04552; Zhang et
al. 2018, mixup, arXiv 1710.09412; Yun et al. 2019, CutMix, arXiv 1905.04899; Szegedy et al. 2016, label smoothing,
arXiv 1512.00567.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from image_set import LARGEST
from utils import SettingsError

# --------------------------------------------------------------------------------------------------------------------
# Settings and random numbers
# --------------------------------------------------------------------------------------------------------------------

OPERATIONS = (
    "identity",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "brightness",
    "contrast",
    "color",
    "sharpness",
    "autocontrast",
    "posterize",
    "solarize",
    "invert",
)
MOST_OPERATIONS = 4
NUMBERS = 6 + 2 * MOST_OPERATIONS  # flip; crop: rows, columns; rotation; cutout: row, column; operations: which, sign
# Strengths at magnitude 10, as in the code of AutoAugment and RandAugment for CIFAR.
ROTATE_DEGREES, SHEAR, TRANSLATE, ENHANCE, POSTERIZE_BITS = 30.0, 0.3, 10 / 32, 0.9, 4  # translate: share of the side
GRAY = (0.299, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601, as PIL's mode L)
NO_MIXING, MIXUP, CUTMIX = 0, 1, 2  # first number of a row of draw_mixing


@dataclass(frozen=True)
class Augmentation:
    """What `augment` does to training images.

    Attributes:
        flip: mirror every second image, left and right.
        crop_padding: shift by up to this many pixels in both directions; what comes in is black.
        rotation_degrees: rotate by up to this angle in both directions.
        operations: RandAugment operations an image, drawn with replacement from OPERATIONS (0 to 4).
        magnitude: strength of the operations, 0 to 10.
        cutout: side in pixels of a square, around a random pixel, that becomes the mean colour; 0: none.
        mixup_alpha, cutmix_alpha: of the Beta distribution of the share; 0: off. With both, each batch is one of them.
        label_smoothing: share of the target that is spread over all classes.
    """

    flip: bool = True
    crop_padding: int = 4
    rotation_degrees: float = 0.0
    operations: int = 0
    magnitude: float = 9.0
    cutout: int = 0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    label_smoothing: float = 0.0

    def check(self, image_size: int = LARGEST) -> None:
        """Check the ranges.

        Args:
            image_size: pixels a side, which bounds crop_padding and cutout.

        Raises:
            SettingsError: one sentence that names the flag.
        """
        ranges = {
            "crop_padding": (self.crop_padding, 0, image_size - 1),
            "rotation_degrees": (self.rotation_degrees, 0, 180),
            "augment_operations": (self.operations, 0, MOST_OPERATIONS),
            "augment_magnitude": (self.magnitude, 0, 10),
            "cutout": (self.cutout, 0, image_size),
            "mixup_alpha": (self.mixup_alpha, 0, 100),
            "cutmix_alpha": (self.cutmix_alpha, 0, 100),
        }
        for flag, (value, low, high) in ranges.items():
            if not low <= value <= high:
                raise SettingsError(f"--{flag} must be {low} to {high}, not {value}")
        if not 0 <= self.label_smoothing < 1:
            raise SettingsError(f"--label_smoothing must be at least 0 and below 1, not {self.label_smoothing}")

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


def draw_numbers(
    batch: int, augmentation: Augmentation, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Every uniform number that the augmentation of a batch needs, by one call on the device.

    Args:
        batch: images.
        augmentation: of the batch; the draw is the same for each, so that leaving out one technique changes no other.
        generator: of that device.
        device: where the numbers are drawn.

    Returns:
        (batch, NUMBERS) fp32 in [0, 1).
    """
    return torch.rand(batch, NUMBERS, generator=generator, device=device)


def draw_mixing(batches: int, augmentation: Augmentation, seed: int, epoch: int, device: torch.device) -> torch.Tensor:
    """How the batches of an epoch are mixed, drawn on the host (a Beta draw of few numbers) and uploaded at once.

    Args:
        batches: of the epoch.
        augmentation: whose mixup_alpha and cutmix_alpha count.
        seed, epoch: what is drawn is a function of them.
        device: where the numbers go.

    Returns:
        (batches, 4) fp32: NO_MIXING, MIXUP or CUTMIX; lambda, the share of the image itself, from Beta(alpha, alpha);
        row and column of the centre of cutmix's box in [0, 1).
    """
    generator = np.random.default_rng([seed, epoch, 2])
    rows = np.zeros((batches, 4), dtype=np.float32)
    rows[:, 1] = 1
    if augmentation.mixes:
        mixup, cutmix = augmentation.mixup_alpha, augmentation.cutmix_alpha
        which = generator.integers(MIXUP, CUTMIX + 1, batches) if mixup and cutmix else MIXUP if mixup else CUTMIX
        rows[:, 0] = which
        alpha = np.where(rows[:, 0] == MIXUP, mixup, cutmix)
        rows[:, 1] = generator.beta(alpha, alpha)
        rows[:, 2:] = generator.random((batches, 2), dtype=np.float32)
    return torch.from_numpy(rows).to(device, non_blocking=True)


# --------------------------------------------------------------------------------------------------------------------
# Geometry
# --------------------------------------------------------------------------------------------------------------------


def shift_and_flip(
    images: torch.Tensor, mirrored: torch.Tensor, down: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Mirror some images, then cut every one at an offset; an exact copy of pixels by one gather.

    Args:
        images: (batch, 3, size, size)
        mirrored: (batch,) bool.
        down, right: (batch,) int64, the offset of the cut in pixels; beyond the border it is black.

    Returns:
        (batch, 3, size, size) of the same type.
    """
    size = images.shape[-1]
    places = torch.arange(size, device=images.device)
    rows = places + down[:, None]  # (batch, size)
    columns = places + right[:, None]
    columns = torch.where(mirrored[:, None], size - 1 - columns, columns)
    within = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None]
    numbers = rows.clamp(0, size - 1)[:, :, None] * size + columns.clamp(0, size - 1)[:, None]  # (batch, size, size)
    numbers = numbers.flatten(1)[:, None].expand(-1, images.shape[1], -1)  # (batch, 3, size * size), no copy
    return images.flatten(2).gather(2, numbers).view_as(images) * within[:, None]


def crop_matrix(mirrored: torch.Tensor, down: torch.Tensor, right: torch.Tensor, size: int) -> torch.Tensor:
    """What `shift_and_flip` does as matrices (batch, 2, 3); see `compose`."""
    side = torch.where(mirrored, -1.0, 1.0)
    zero, one = torch.zeros_like(side), torch.ones_like(side)
    return torch.stack([side, zero, side * right * (2 / size), zero, one, down * (2 / size)], -1).view(-1, 2, 3)


def rotation_matrix(degrees: torch.Tensor) -> torch.Tensor:
    """Counter-clockwise rotations (...,) as matrices (..., 2, 3); see `compose`."""
    angle = torch.deg2rad(degrees)
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return torch.stack([cosine, -sine, zero, sine, cosine, zero], -1).unflatten(-1, (2, 3))


def operation_matrix(kinds: torch.Tensor, signs: torch.Tensor, magnitude: float) -> torch.Tensor:
    """The geometric operations as matrices; the identity for all others.

    Args:
        kinds: (...,) int64, places in OPERATIONS.
        signs: (...,) fp32, 1 or -1.
        magnitude: 0 to 10.

    Returns:
        (..., 2, 3) fp32; see `compose`.
    """
    strength = signs * (magnitude / 10)

    def where(name: str, most: float) -> torch.Tensor:
        return torch.where(kinds == OPERATIONS.index(name), strength * most, 0.0)

    turned = rotation_matrix(where("rotate", ROTATE_DEGREES))
    zero = torch.zeros_like(strength)
    entries = [
        zero,
        where("shear_x", SHEAR),
        where("translate_x", 2 * TRANSLATE),
        where("shear_y", SHEAR),
        zero,
        where("translate_y", 2 * TRANSLATE),
    ]
    return turned + torch.stack(entries, -1).unflatten(-1, (2, 3))


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The matrix of `first` and then `second`, both (batch, 2, 3).

    A matrix leads from a place of the result back to a place of the image, x to the right and y down in [-1, 1], so the
    matrix of what is done last comes last in the product. Written out, as autocast or TF32 would round a matmul.
    """
    product = first[:, :, :1] * second[:, :1] + first[:, :, 1:2] * second[:, 1:]
    return product + F.pad(first[:, :, 2:], (2, 0))


def resample(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Images at the places that matrices lead to: bilinear, black outside, rounded to whole bytes.

    Args:
        images: (batch, 3, size, size) uint8.
        matrix: (batch, 2, 3) as in `compose`.

    Returns:
        (batch, 3, size, size) fp32, whole numbers 0 to 255.
    """
    size = images.shape[-1]
    places = (2 * torch.arange(size, device=images.device) + 1) / size - 1  # (size,) centres of pixels
    entries = matrix[:, :, :, None, None]  # (batch, 2, 3, 1, 1)
    grid = entries[:, :, 0] * places + entries[:, :, 1] * places[:, None] + entries[:, :, 2]  # (batch, 2, size, size)
    grid = grid.permute(0, 2, 3, 1)  # (batch, size, size, 2)
    pixels = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return pixels.round()


# --------------------------------------------------------------------------------------------------------------------
# Colours, cutout, mixing
# --------------------------------------------------------------------------------------------------------------------


def apply_colour(pixels: torch.Tensor, kinds: torch.Tensor, signs: torch.Tensor, magnitude: float) -> torch.Tensor:
    """One colour operation an image; images whose operation is the identity or geometric stay as they are.

    Four steps run for every image, with numbers that make those neutral which are not its own: a blend with another
    image (black: brightness, mean gray: contrast, gray: color, smoothed: sharpness), a stretch (autocontrast), rounding
    down (posterize), and inverting from a threshold on (solarize; invert is the threshold 0).

    Args:
        pixels: (batch, 3, size, size) fp32, whole numbers 0 to 255.
        kinds: (batch,) int64, places in OPERATIONS.
        signs: (batch,) fp32, 1 or -1: enhancers strengthen or weaken.
        magnitude: 0 to 10.

    Returns:
        As `pixels`.
    """
    share = magnitude / 10
    kinds, signs = kinds[:, None, None, None], signs[:, None, None, None]

    def is_kind(*names: str) -> torch.Tensor:
        found = kinds == OPERATIONS.index(names[0])
        for name in names[1:]:
            found = found | (kinds == OPERATIONS.index(name))
        return found  # (batch, 1, 1, 1)

    gray = GRAY[0] * pixels[:, :1] + GRAY[1] * pixels[:, 1:2] + GRAY[2] * pixels[:, 2:]  # (batch, 1, size, size)
    middle = pixels[:, :, 1:-1, 1:-1]
    sums = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    sums = sums[..., :-2] + sums[..., 1:-1] + sums[..., 2:]
    smooth = pixels + F.pad((sums + 4 * middle) / 13 - middle, (1, 1, 1, 1))  # PIL's filter; the border stays
    other = torch.where(is_kind("contrast"), gray.mean((2, 3), keepdim=True).round(), 0.0)
    other = torch.where(is_kind("color"), gray, other)
    other = torch.where(is_kind("sharpness"), smooth, other)
    factor = torch.where(
        is_kind("brightness", "contrast", "color", "sharpness"), 1 + signs * (ENHANCE * share), 1.0
    )  # (batch, 1, 1, 1)
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)  # (batch, 3, 1, 1)
    stretched = is_kind("autocontrast") & (high > low)
    low = torch.where(stretched, low, 0.0)
    scale = torch.where(stretched, 255 / (high - low).clamp(min=1), 1.0)
    step = torch.where(is_kind("posterize"), 2.0 ** round(POSTERIZE_BITS * share), 1.0)
    threshold = torch.where(is_kind("solarize"), 256 * (1 - share), 256.0)
    threshold = torch.where(is_kind("invert"), 0.0, threshold)

    pixels = other + factor * (pixels - other)
    pixels = ((pixels - low) * scale).round().clamp(0, 255)
    pixels = (pixels / step).floor() * step
    return torch.where(pixels >= threshold, 255 - pixels, pixels)


def cutout_mask(numbers: torch.Tensor, side: int, size: int) -> torch.Tensor:
    """(batch, 1, size, size) bool, False in a square whose centre is a random pixel; it is clipped at the border.

    Args:
        numbers: (batch, 2) uniform in [0, 1), for row and column.
        side: of the square in pixels.
        size: of the image in pixels.
    """
    begin = (numbers * size).long().clamp(max=size - 1) - side // 2  # (batch, 2)
    places = torch.arange(size, device=numbers.device)
    inside = (places >= begin[..., None]) & (places < begin[..., None] + side)  # (batch, 2, size)
    return ~(inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]


def mixing_weights(mixing: torch.Tensor, size: int) -> torch.Tensor:
    """(size, size) fp32: the share of an image itself at every pixel; the rest is its partner's.

    It is lambda everywhere for mixup, and 0 in the box of cutmix (of the share 1 - lambda before it is clipped) and 1
    around it, so that its mean is lambda corrected to the exact area.
    """
    kind, share = mixing[0], mixing[1]
    half = ((1 - share).clamp(min=0).sqrt() * size).floor().div(2).floor()
    centre = (mixing[2:] * size).floor()  # (2,)
    places = torch.arange(size, device=mixing.device)
    inside = (places >= centre[:, None] - half) & (places < centre[:, None] + half)  # (2, size)
    box = inside[0, :, None] & inside[1]  # (size, size)
    weights = torch.where(box, 0.0, 1.0)
    return torch.where(kind == CUTMIX, weights, torch.where(kind == MIXUP, share, 1.0))


def soft_targets(labels: torch.Tensor, num_classes: int, label_smoothing: float) -> torch.Tensor:
    """(batch, num_classes) fp32: 1 - label_smoothing at the label, and label_smoothing spread over all classes."""
    hit = labels[:, None] == torch.arange(num_classes, device=labels.device)
    spread = label_smoothing / num_classes
    return torch.where(hit, 1 - label_smoothing + spread, spread)


def normalise(images: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Bytes (batch, 3, size, size) as fp32 with the train split's mean 0 and deviation 1; all that evaluation needs."""
    return (images.float() / 255 - mean[:, None, None]) / deviation[:, None, None]


def augment(
    images: torch.Tensor,
    labels: torch.Tensor,
    numbers: torch.Tensor,
    mixing: torch.Tensor,
    *,
    augmentation: Augmentation,
    mean: torch.Tensor,
    deviation: torch.Tensor,
    num_classes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment a batch: a pure function of its arguments, without a loop over images or a wait for the device.

    Flip, crop, rotation and the drawn geometric operations come first, composed to one resampling (so what one of them
    moves out of the image another one may bring back), then the drawn colour operations in their order, whatever the
    order in which geometry and colour were drawn; then cutout and the mixing. Without rotation and operations, flip and
    crop are exact copies of pixels. The partner of image i is image i + 1, as the order of a batch is random already.

    Args:
        images: (batch, 3, size, size) uint8.
        labels: (batch,) int64.
        numbers: (batch, NUMBERS) as `draw_numbers` gives them.
        mixing: (4,) a row of `draw_mixing`.
        augmentation: what is done; its Python values decide which work exists at all.
        mean, deviation: (3,) fp32 of the train split.
        num_classes: of the targets.

    Returns:
        inputs (batch, 3, size, size) fp32, normalised, and targets (batch, num_classes) fp32 that sum to 1.

    Sources: those of this file; for operations RandAugment, arXiv 1909.13719, without equalize and with invert.
    """
    size = images.shape[-1]
    mirrored = numbers[:, 0] < (0.5 if augmentation.flip else 0.0)  # (batch,)
    padding = augmentation.crop_padding
    offsets = (numbers[:, 1:3] * (2 * padding + 1)).long().clamp(max=2 * padding) - padding  # (batch, 2)
    if augmentation.rotation_degrees > 0 or augmentation.operations > 0:
        matrix = crop_matrix(mirrored, offsets[:, 0], offsets[:, 1], size)  # (batch, 2, 3)
        if augmentation.rotation_degrees > 0:
            degrees = (2 * numbers[:, 3] - 1) * augmentation.rotation_degrees
            matrix = compose(matrix, rotation_matrix(degrees))
        if augmentation.operations > 0:
            drawn = numbers[:, 6 : 6 + 2 * augmentation.operations].unflatten(1, (augmentation.operations, 2))
            kinds = (drawn[..., 0] * len(OPERATIONS)).long().clamp(max=len(OPERATIONS) - 1)  # (batch, operations)
            signs = torch.where(drawn[..., 1] < 0.5, -1.0, 1.0)
            matrices = operation_matrix(kinds, signs, augmentation.magnitude)  # (batch, operations, 2, 3)
        for place in range(augmentation.operations):
            matrix = compose(matrix, matrices[:, place])
        pixels = resample(images, matrix)
        for place in range(augmentation.operations):
            pixels = apply_colour(pixels, kinds[:, place], signs[:, place], augmentation.magnitude)
    elif augmentation.flip or padding > 0:
        pixels = shift_and_flip(images, mirrored, offsets[:, 0], offsets[:, 1])
    else:
        pixels = images
    inputs = normalise(pixels, mean, deviation)
    if augmentation.cutout > 0:
        inputs = inputs * cutout_mask(numbers[:, 4:6], augmentation.cutout, size)
    targets = soft_targets(labels, num_classes, augmentation.label_smoothing)
    if augmentation.mixes:
        weights = mixing_weights(mixing, size)  # (size, size)
        inputs = weights * inputs + (1 - weights) * inputs.roll(-1, 0)
        share = weights.mean()
        targets = share * targets + (1 - share) * targets.roll(-1, 0)
    return inputs, targets
