"""The generated sample of images: five shapes in two textures, ten classes, no download.

    python vit_train.py                                   trains on it
    python image_dataset.py --picture sheet.png           shows it

Position, size, rotation, the texture's direction and period and all colours are random and say nothing about the class,
so that a small model has to look at shapes and textures, and learns them within a minute on a laptop. An accuracy on it
says that training works, and nothing about photographs.
"""

import numpy as np

from image_set import LARGEST, SMALLEST, ImageSet, describe
from utils import SettingsError

SHAPES = ("disc", "square", "triangle", "cross", "ring")
TEXTURES = ("striped", "checked")
# What is drawn at random, so that a small model learns it within a minute, and not to the last image.
RADIUS, POSITION = (0.7, 0.9), 0.1  # of half the side; the position in both directions from the middle
ROTATION = 0.25  # radians, in both directions
PERIOD = (6.0, 9.0)  # of the texture, in 32nds of the side
NOISE = (0.02, 0.08)  # standard deviation, of the range of a byte


def sample_images(train: int = 2000, test: int = 400, image_size: int = 32, seed: int = 0) -> ImageSet:
    """The project's generator: five shapes in two textures, so ten classes.

    Position, size, rotation, the texture's direction and period and all colours are random and say nothing about the
    class; behind the shape is a gradient of brightness, over everything lies noise. The same arguments give the same
    numbers; the test images do not depend on the number of train images.

    Args:
        train, test: images, at least one a class.
        image_size: pixels a side.
        seed: of everything that is random.
    """
    names = [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES]
    if min(train, test) < len(names) or not SMALLEST <= image_size <= LARGEST:
        raise SettingsError(
            f"--dataset sample needs at least {len(names)} images a split and an image size of {SMALLEST} to {LARGEST}"
        )
    parts = []
    for number, count in enumerate((train, test)):
        generator = np.random.default_rng([seed, number])
        labels = generator.permutation(np.arange(count, dtype=np.int64) % len(names))
        together = max(1, 2**19 // image_size**2)  # images drawn at once, for the processor's cache
        blocks = [
            draw_shapes(labels[begin : begin + together], image_size, generator) for begin in range(0, count, together)
        ]
        parts += [np.concatenate(blocks), labels]
    images = ImageSet(*parts, names, {})
    images.source = describe(images, "sample", "generated sample (textured shapes)", True, None) | {"seed": seed}
    return images


def draw_shapes(labels: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Images of the sample for these labels: (n, 3, size, size) uint8. Label = 2 x shape + texture."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return generator.uniform(low, high, (count, *shape)).astype(np.float32)

    places = (2 * np.arange(size, dtype=np.float32) + 1) / size - 1  # centres of pixels in [-1, 1]
    x, y = places[None, None, :], places[None, :, None]

    def turned(angle: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cosine, sine = np.cos(angle), np.sin(angle)
        return cosine * x + sine * y, cosine * y - sine * x

    radius = uniform(*RADIUS, 1, 1)
    u, v = x - uniform(-POSITION, POSITION, 1, 1), y - uniform(-POSITION, POSITION, 1, 1)
    u, v = turned(uniform(-ROTATION, ROTATION, 1, 1), u, v)
    u, v = u / radius, v / radius  # (n, size, size), the shape reaches to about 1
    distance, across, along = np.sqrt(u * u + v * v), np.abs(u), np.abs(v)
    outside = np.stack(  # positive outside of the shape, in units of its radius
        [
            distance - 0.9,
            np.maximum(across, along) - 0.8,
            np.maximum(0.866 * across + 0.5 * v, -v) - 0.55,
            np.minimum(np.maximum(across - 0.3, along - 1), np.maximum(along - 0.3, across - 1)),
            np.abs(distance - 0.72) - 0.26,
        ]
    )[labels // 2, np.arange(count)]  # (n, size, size)
    inside = np.clip(0.5 - outside * radius * size / 2, 0, 1)[:, None]  # soft edge of one pixel

    p, q = turned(uniform(-ROTATION, ROTATION, 1, 1), x, y)
    waves = np.pi * 32 / uniform(*PERIOD, 1, 1)
    p, q = np.sin(waves * p + uniform(0, 2 * np.pi, 1, 1)), np.sin(waves * q + uniform(0, 2 * np.pi, 1, 1))
    texture = np.clip(0.5 + 2 * np.where((labels % 2 == 0)[:, None, None], p, p * q), 0, 1)[:, None]

    ramp = turned(uniform(0, 2 * np.pi, 1, 1), x, y)[0][:, None]  # (n, 1, size, size)
    # Three levels a channel, a third of the range apart, in random order: all differ and none tells the class.
    order = np.argsort(uniform(0, 1, 3, 3), axis=1) / 3
    levels = ((order + uniform(0, 1, 1, 3) + uniform(-0.06, 0.06, 3, 3)) % 1)[..., None, None].astype(np.float32)
    behind = levels[:, 0] + 0.1 * ramp
    shape = levels[:, 1] + texture * (levels[:, 2] - levels[:, 1])
    noise = generator.standard_normal((count, 3, size, size), dtype=np.float32)
    values = behind + inside * (shape - behind) + uniform(*NOISE, 1, 1, 1) * noise
    return np.clip(255 * values + 0.5, 0, 255).astype(np.uint8)
