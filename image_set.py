"""Images of one data set as every reader leaves them: what they are, their checks, and the cache of decoded ones.

    from image_set import cached
    images = cached(".cache/images", sha256, make)    # from the cache, or made and kept

Squares of one size as bytes, (n, 3, size, size), and labels. Decoded images are kept uncompressed under a key that
stands for their source's content; a cache that is damaged is made again.
"""

import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from run_folder import check_writable
from utils import SettingsError

SMALLEST, LARGEST = 8, 512  # pixels a side
CACHE_FORMAT = 1
ARCHIVE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    SyntaxError,
    MemoryError,
    RuntimeError,
    IndexError,
    TypeError,
    zlib.error,
    struct.error,
    zipfile.BadZipFile,
    tarfile.TarError,
)


@dataclass
class ImageSet:
    """Images as they were read.

    Attributes:
        train_images, test_images: (n, 3, size, size) uint8, RGB.
        train_labels, test_labels: (n,) int64.
        class_names: the classes' names in the order of the labels.
        source: what it is, for run.json: name, description, generated, sha256 (of the file; of a folder's names and
            contents; None for the sample and the hub), classes, image_size, train_images, test_images.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]
    source: dict[str, Any]

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.train_images.shape[-1]


def describe(images: ImageSet, name: str, title: str, generated: bool, sha256: str | None) -> dict[str, Any]:
    """`ImageSet.source`: the fields that run.json takes."""
    train, test, size = len(images.train_images), len(images.test_images), images.image_size
    return {
        "name": name,
        "description": f"{title}: {train:,} train and {test:,} test images of {size} x {size}, "
        f"{len(images.class_names)} classes",
        "generated": generated,
        "sha256": sha256,
        "classes": len(images.class_names),
        "image_size": size,
        "train_images": train,
        "test_images": test,
    }


def reason_of(error: BaseException) -> str:
    """An error's text in one line."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".")[:200]


def check_images(images: ImageSet, name: str) -> None:
    """Check shapes, counts and labels.

    Raises:
        SettingsError: one sentence that begins with `name`.
    """
    classes = len(images.class_names)
    if classes < 2 or len(np.unique(images.train_labels)) < 2:
        raise SettingsError(f"{name}: the training images are of one class only, and at least two are needed")
    if len(set(images.class_names)) < classes:
        raise SettingsError(f"{name}: class_names holds a name twice")
    size = images.train_images.shape[-1]
    for split, pixels, labels in (
        ("train", images.train_images, images.train_labels),
        ("test", images.test_images, images.test_labels),
    ):
        if len(pixels) == 0:
            raise SettingsError(f"{name}: there is no {split} image")
        if len(pixels) != len(labels):
            raise SettingsError(f"{name}: there are {len(pixels):,} {split} images and {len(labels):,} {split} labels")
        if pixels.shape[2] != pixels.shape[3] or not SMALLEST <= pixels.shape[2] <= LARGEST:
            raise SettingsError(
                f"{name}: the {split} images are {pixels.shape[2]} x {pixels.shape[3]}, not a square of {SMALLEST} to "
                f"{LARGEST} pixels a side"
            )
        if pixels.shape[-1] != size:
            raise SettingsError(f"{name}: train images are {size} x {size} and test images {pixels.shape[-1]}")
        bad = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(bad):
            raise SettingsError(
                f"{name}: label {labels[bad[0]]} of {split} image {bad[0]:,} is not one of 0 to {classes - 1}"
            )


def cached(cache_folder: str, key: str, make: Callable[[], ImageSet]) -> ImageSet:
    """The images from cache_folder/key.npz, or made now and kept there; a damaged cache is made anew.

    Args:
        cache_folder: where the file is kept, uncompressed.
        key: its name, which stands for the source's content.
        make: reads or decodes the images and checks them.

    Raises:
        SettingsError: the folder cannot be written to, or what `make` raises.
    """
    path = Path(cache_folder) / f"{key}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as content:  # the zip's checksums are compared
                if int(content["format"]) != CACHE_FORMAT:
                    raise ValueError("another format")
                names = [str(name) for name in content["class_names"]]
                arrays = [content[f"{split}_{part}"] for split in ("train", "test") for part in ("images", "labels")]
            if [array.dtype for array in arrays] != [np.uint8, np.int64] * 2 or arrays[0].ndim != 4:
                raise ValueError("other arrays")
            images = ImageSet(*arrays, names, {})
            check_images(images, str(path))
            return images
        except ARCHIVE_ERRORS:
            print(f"image cache {path} is damaged or foreign: making it again")
    check_writable(Path(cache_folder), "--cache_folder")
    images = make()
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(
                file,
                format=CACHE_FORMAT,
                class_names=np.array(images.class_names, dtype=np.str_),
                train_images=images.train_images,
                train_labels=images.train_labels,
                test_images=images.test_images,
                test_labels=images.test_labels,
            )
        temporary.replace(path)
    except OSError as error:
        raise SettingsError(f"--cache_folder {cache_folder}: writing failed ({reason_of(error)})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    return images
