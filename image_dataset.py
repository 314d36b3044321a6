"""Images for classification: the data set that the settings mean, on the device, with validation split off.

    python image_dataset.py                                       the generated sample: splits, classes, cost
    python image_dataset.py --dataset cifar10 --data_path cifar-10-binary.tar.gz --picture sheet.png
    python image_dataset.py --dataset cifar100 --download true    through the Hugging Face hub
    python image_dataset.py --data_path photos --source_size 64   a folder photos/train/<class>/*.png, photos/test/...

All images lie on the device as bytes (CIFAR-10: 184 MB), so a batch is a gather, and image_augmentation.py augments it
there by one call. Validation is a share of every class of the training images; test images stay as they are. Files are
read by image_formats.py, and the sample is drawn by sample_images.py.

It does not help where the images do not fit into the device's memory, or where they must keep their own sizes: every
image here is a square of one size.

Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images (CIFAR-10, CIFAR-100).
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from image_augmentation import Augmentation, augment, draw_mixing, draw_numbers
from image_formats import as_pixels, read_path
from image_set import LARGEST, SMALLEST, ImageSet, cached, check_images, describe, reason_of
from run_folder import check_writable
from sample_images import sample_images
from utils import SettingsError, device_name, parse_settings, run_script, setting

DATASETS = ("sample", "cifar10", "cifar100")
CLASSES = {"cifar10": 10, "cifar100": 100}
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
HUB = {"cifar10": ("uoft-cs/cifar10", "label"), "cifar100": ("uoft-cs/cifar100", "fine_label")}  # name, label column

# --------------------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------------------


def fetch_images(dataset: str) -> ImageSet:
    """CIFAR-10 or CIFAR-100 from the Hugging Face hub.

    Raises:
        SettingsError: no connection, or other columns than expected.
    """
    from datasets import load_dataset

    address, label = HUB[dataset]
    try:
        loaded = load_dataset(address)
        parts = []
        for split in ("train", "test"):
            pictures = [np.asarray(picture.convert("RGB")) for picture in loaded[split]["img"]]
            parts.append(as_pixels(np.stack(pictures), f"{split} images", f"--dataset {dataset}"))
            parts.append(np.asarray(loaded[split][label], dtype=np.int64))
        names = [str(name) for name in loaded["train"].features[label].names]
    except SettingsError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SettingsError(
            f"--download true: {address} could not be loaded from the Hugging Face hub ({reason_of(error)}); fetch the "
            "binary version yourself and name it with --data_path"
        ) from None
    images = ImageSet(*parts, names, {})
    check_images(images, f"--dataset {dataset}")
    return images


def load_images(
    dataset: str | None = None,
    data_path: str | None = None,
    *,
    fetch: bool = False,
    image_size: int | None = None,
    cache_folder: str = ".cache/images",
) -> ImageSet:
    """The images that the settings mean.

    Args:
        dataset: one of DATASETS; None is the sample, or local images if data_path is given.
        data_path: CIFAR's binary version (folder, .tar.gz or .tar), an .npz of pixels or JPEG bytes, or an image
            folder; with a dataset's name it must have that dataset's classes and 32 x 32 pixels.
        fetch: take the dataset from the Hugging Face hub if no path is given.
        image_size: pixels a side that the images of an image folder are resized to (default 32).
        cache_folder: where decoded images are kept.

    Raises:
        SettingsError: settings that contradict each other, or files that are missing, damaged or other ones.
    """
    if dataset is not None and dataset not in DATASETS:
        raise SettingsError(f"--dataset {dataset} is unknown; choose one of {', '.join(DATASETS)}, or give --data_path")
    if image_size is not None and not SMALLEST <= image_size <= LARGEST:
        raise SettingsError(f"--source_size must be {SMALLEST} to {LARGEST}, not {image_size}")
    if dataset in (None, "sample") and data_path is None:
        for flag, given in (("download", fetch), ("source_size", image_size is not None)):
            if given:
                raise SettingsError(f"--{flag} has no effect on the generated sample; leave it out")
        return sample_images()
    if dataset == "sample":
        raise SettingsError("--dataset sample is generated and takes no --data_path; leave one of them out")
    if data_path is not None and not data_path.strip():
        raise SettingsError("--data_path is empty; give an archive, an .npz or a folder, or leave it out")
    if data_path is not None and fetch:
        raise SettingsError("--data_path and --download true exclude each other; give one of them")
    if data_path is None and not fetch:
        raise SettingsError(
            f"--dataset {dataset}: give the binary version with --data_path, or fetch it with --download true "
            f"(huggingface.co/datasets/{HUB[dataset][0]})"
        )
    found = None
    if data_path is None:
        if image_size is not None:
            raise SettingsError(f"--source_size is for image folders and has no effect on {dataset}; leave it out")
        images = cached(cache_folder, f"hub-{dataset}", lambda: fetch_images(dataset))
        words = f"hub copy {HUB[dataset][0]}"
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            images, words, found = read_path(Path(data_path), image_size, cache_folder)
    classes, size = len(images.class_names), images.image_size
    if dataset is not None and (classes, size) != (CLASSES[dataset], 32):
        raise SettingsError(
            f"--dataset {dataset}: {data_path or 'the hub copy'} has {classes} classes of {size} x {size} pixels, not "
            f"{CLASSES[dataset]} of 32 x 32; leave --dataset out to read it as images of your own"
        )
    title = TITLES[dataset] if dataset else f"local images {Path(data_path).name}"
    images.source = describe(images, dataset or "local images", f"{title} ({words})", False, found)
    return images


# --------------------------------------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """One split on the device: images (n, 3, size, size) uint8 and labels (n,) int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class ImageData:
    """Splits (train, validation, test) on the device, and what run.json says about them.

    Attributes:
        splits: by name.
        mean, deviation: (3,) fp32 on the device, of the train split alone, in units of [0, 1] (deviation: ddof 0).
        class_names: in the order of the labels.
        description: the source with the sizes of the splits, the validation share and the seed of the split.
    """

    splits: dict[str, Split]
    mean: torch.Tensor
    deviation: torch.Tensor
    class_names: list[str]
    description: dict[str, Any]


def split_numbers(labels: np.ndarray, validation_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the train and the validation images, rising: the share of every class, rounded, by a seeded draw."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        numbers = generator.permutation(np.flatnonzero(labels == label))
        chosen[numbers[: math.floor(validation_share * len(numbers) + 0.5) if len(numbers) > 1 else 0]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def channel_statistics(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every channel, (3,) fp32 in units of [0, 1]; exact sums, so the same everywhere.

    A channel that never changes has the deviation 1.
    """
    total = torch.zeros(3, dtype=torch.int64, device=images.device)
    squares = torch.zeros_like(total)
    for chunk in images.split(max(1, 2**24 // images[0].numel())):
        total += chunk.sum((0, 2, 3), dtype=torch.int64)
        squares += chunk.int().square().sum((0, 2, 3), dtype=torch.int64)
    count = images.numel() // 3
    mean = total.double() / count
    variance = (squares.double() / count - mean.square()).clamp(min=0)
    deviation = torch.where(variance > 1e-9, variance.sqrt(), 255.0)
    return (mean / 255).float(), (deviation / 255).float()


def split_images(images: ImageSet, *, device: torch.device, validation_share: float = 0.05, seed: int = 0) -> ImageData:
    """Take a stratified validation split out of the training images and lay everything on the device.

    Args:
        images: as `load_images` gives them; the test images stay as they are.
        device: where the splits lie.
        validation_share: of the images of every class, more than 0 and at most 0.5.
        seed: decides which images are taken.

    Raises:
        SettingsError: a share out of range, or one that leaves no validation image.
    """
    if not 0 < validation_share <= 0.5:
        raise SettingsError(f"--validation_share must be more than 0 and at most 0.5, not {validation_share}")
    train, validation = split_numbers(images.train_labels, validation_share, seed)
    if len(validation) == 0:
        raise SettingsError(f"--validation_share {validation_share} leaves no validation image; raise it")

    def laid(pixels: np.ndarray, labels: np.ndarray) -> Split:
        return Split(torch.from_numpy(pixels).to(device), torch.from_numpy(labels).to(device))

    splits = {
        "train": laid(images.train_images[train], images.train_labels[train]),
        "validation": laid(images.train_images[validation], images.train_labels[validation]),
        "test": laid(images.test_images, images.test_labels),
    }
    mean, deviation = channel_statistics(splits["train"].images)
    description = images.source | {
        "splits": {name: len(split) for name, split in splits.items()},
        "validation_share": validation_share,
        "split_seed": seed,
    }
    return ImageData(splits, mean, deviation, images.class_names, description)


# --------------------------------------------------------------------------------------------------------------------
# What it looks like and costs
# --------------------------------------------------------------------------------------------------------------------

TYPICAL = Augmentation(operations=2, cutout=8, mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1)


def time_augmentation(data: ImageData, batch: int = 512, repeats: int = 20) -> dict[str, float]:
    """Median milliseconds of augmenting a batch with TYPICAL: eager, and compiled where there is a GPU."""
    train = data.splits["train"]
    device = train.images.device
    numbers = torch.arange(batch, device=device) % len(train)
    images, labels = train.images[numbers], train.labels[numbers]
    uniform = draw_numbers(batch, TYPICAL, torch.Generator(device).manual_seed(0), device)
    mixing = draw_mixing(1, TYPICAL, 0, 0, device)[0]
    ways: dict[str, Callable[..., Any]] = {"eager": augment}
    if device.type == "cuda":
        ways["compiled"] = torch.compile(augment, fullgraph=True, dynamic=False)
    found = {}
    for name, way in ways.items():
        times = []
        for _ in range(repeats + 3):
            begin = time.perf_counter()
            way(
                images,
                labels,
                uniform,
                mixing,
                augmentation=TYPICAL,
                mean=data.mean,
                deviation=data.deviation,
                num_classes=len(data.class_names),
            )
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - begin))
        found[name] = float(np.median(times[3:]))
    return found


def contact_sheet(data: ImageData, rows: int = 8, columns: int = 8) -> Image.Image:
    """A sheet of training images: in every row one image, plain and then augmented with TYPICAL without mixing."""
    train, augmentation = data.splits["train"], replace(TYPICAL, mixup_alpha=0.0, cutmix_alpha=0.0)
    device, size = train.images.device, train.images.shape[-1]
    numbers = torch.linspace(0, len(train) - 1, rows, device=device).long()
    numbers = numbers.repeat_interleave(columns)  # (rows * columns,)
    inputs, _ = augment(
        train.images[numbers],
        train.labels[numbers],
        draw_numbers(len(numbers), augmentation, torch.Generator(device).manual_seed(0), device),
        draw_mixing(1, augmentation, 0, 0, device)[0],
        augmentation=augmentation,
        mean=data.mean,
        deviation=data.deviation,
        num_classes=len(data.class_names),
    )
    pixels = (inputs * data.deviation[:, None, None] + data.mean[:, None, None]) * 255
    pixels = pixels.round().clamp(0, 255).byte()
    pixels[::columns] = train.images[numbers[::columns]]
    scale, gap = max(1, 96 // size), 4
    cell = size * scale + gap
    sheet = Image.new("RGB", (columns * cell + gap, rows * cell + gap), "white")
    for place, image in enumerate(pixels.permute(0, 2, 3, 1).cpu().numpy()):
        picture = Image.fromarray(image).resize((size * scale, size * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (gap + place % columns * cell, gap + place // columns * cell))
    return sheet


@dataclass
class Settings:
    """Settings of `python image_dataset.py`."""

    dataset: str | None = setting(None, "a published dataset, or the generated sample (the default)", DATASETS)
    data_path: str | None = setting(None, "CIFAR's binary version, an .npz, or an image folder")
    download: bool = setting(False, "fetch the dataset from the Hugging Face hub")
    source_size: int | None = setting(None, "pixels a side to resize an image folder to (default 32)")
    cache_folder: str = setting(".cache/images", "where decoded images are kept")
    validation_share: float = setting(0.05, "of the training images of every class, for validation")
    picture: str | None = setting(None, "write a sheet of plain and augmented images to this .png")


def main() -> int:
    """Print what is in a dataset and what augmenting it costs here; write a sheet of images if asked for."""
    settings = parse_settings(Settings)
    if settings.picture is not None:
        if not settings.picture.lower().endswith(".png"):
            raise SettingsError(f"--picture {settings.picture} must end with .png")
        check_writable(Path(settings.picture).parent, "--picture")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    images = load_images(
        settings.dataset,
        settings.data_path,
        fetch=settings.download,
        image_size=settings.source_size,
        cache_folder=settings.cache_folder,
    )
    read_s = time.perf_counter() - begin
    data = split_images(images, device=device, validation_share=settings.validation_share)
    print(f"{data.description['description']}; read in {read_s:.2f} s")
    print(f"{'split':<12}{'images':>10}{'fewest a class':>17}{'most a class':>15}")
    classes = len(data.class_names)
    for name, split in data.splits.items():
        counts = torch.bincount(split.labels, minlength=classes)
        print(f"{name:<12}{len(split):>10,}{counts.min().item():>17,}{counts.max().item():>15,}")
    print(f"classes: {', '.join(data.class_names[:10])}{', ...' if classes > 10 else ''}")
    for name, values in (("mean", data.mean), ("deviation", data.deviation)):
        print(f"{name} of red, green, blue: {', '.join(f'{value:.4f}' for value in values.tolist())}")
    times = ", ".join(f"{ms:.2f} ms {name}" for name, ms in time_augmentation(data).items())
    print(f"augmenting 512 images ({TYPICAL.operations} operations, cutout, mixing) on {device_name(device)}: {times}")
    if settings.picture is not None:
        Path(settings.picture).parent.mkdir(parents=True, exist_ok=True)
        try:
            contact_sheet(data).save(settings.picture)
        except OSError as error:
            raise SettingsError(f"--picture {settings.picture} cannot be written: {reason_of(error)}") from None
        print(f"sheet of images: {settings.picture}")
    return 0


if __name__ == "__main__":
    run_script(main)
