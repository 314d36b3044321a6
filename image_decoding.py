"""Decode encoded images in threads: JPEG bytes that lie one after the other, and image files of any size.

    from image_decoding import decode_files, decode_jpegs
    pixels = decode_files([Path("a.png"), Path("b.jpg")], 32)    # (2, 3, 32, 32) uint8

A broken or far too large image is an error of one sentence that names it.
"""

import io
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from image_set import LARGEST, SMALLEST, reason_of
from utils import SettingsError

LARGEST_PICTURE = 4096 * 4096  # pixels of a file that is resized
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def decode_all(count: int, size: int, decode: Callable[[int], np.ndarray]) -> np.ndarray:
    """Decode images in threads.

    Args:
        count: of images.
        size: pixels a side.
        decode: gives image i as (size, size, 3) uint8, or raises a SettingsError.

    Returns:
        (count, 3, size, size) uint8.
    """
    pixels = np.empty((count, 3, size, size), dtype=np.uint8)
    block = 64

    def work(begin: int) -> None:
        for number in range(begin, min(begin + block, count)):
            pixels[number] = decode(number).transpose(2, 0, 1)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for _ in pool.map(work, range(0, count, block)):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return pixels


def open_picture(content: Any, formats: Sequence[str], name: str) -> Image.Image:
    """Open an encoded image and check its header; its pixels are not decoded yet.

    Args:
        content: a file object.
        formats: that are taken, as PIL names them.
        name: of the image, for messages.

    Raises:
        SettingsError: it is none of these formats, far too large, or its pixels are not bytes.
    """
    try:
        picture = Image.open(content, formats=list(formats))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise SettingsError(f"{name} is far larger than 4096 x 4096 pixels; shrink it first") from None
    except DECODE_ERRORS:
        raise SettingsError(f"{name} is broken or no {' or '.join(formats)} image") from None
    if picture.width * picture.height > LARGEST_PICTURE:
        raise SettingsError(
            f"{name} has {picture.width:,} x {picture.height:,} pixels, more than 4096 x 4096; shrink it first"
        )
    if picture.mode[0] in "IF":
        raise SettingsError(f"{name} does not have 8 bits a channel (mode {picture.mode}); convert it first")
    return picture


def decode_jpegs(content: np.ndarray, offsets: np.ndarray, split: str, name: str) -> np.ndarray:
    """The images of JPEG bytes that lie one after the other.

    Args:
        content: (bytes,) uint8.
        offsets: (n + 1,) image i is content[offsets[i] : offsets[i + 1]].
        split: train or test, for messages.
        name: of the file, for messages.

    Returns:
        (n, 3, size, size) uint8, RGB.

    Raises:
        SettingsError: offsets that do not rise or leave the bytes; a broken image, or one of another size, by number.
    """
    if content.dtype != np.uint8 or content.ndim != 1:
        raise SettingsError(f"{name}: {split}_jpeg is {content.dtype} of {content.ndim} dimensions, not bytes in a row")
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        raise SettingsError(f"{name}: {split}_offsets must be whole numbers in a row, one more than images")
    offsets = offsets.astype(np.int64)
    if offsets[0] < 0 or offsets[-1] > len(content) or (np.diff(offsets) <= 0).any():
        raise SettingsError(f"{name}: {split}_offsets must rise and stay within the {len(content):,} bytes of JPEG")

    def opened(number: int) -> Image.Image:
        encoded = io.BytesIO(content[offsets[number] : offsets[number + 1]].tobytes())
        return open_picture(encoded, ["JPEG"], f"{name}: {split} image {number:,}")

    width, height = opened(0).size
    if width != height or not SMALLEST <= width <= LARGEST:
        raise SettingsError(
            f"{name}: {split} image 0 is {width} x {height}, not a square of {SMALLEST} to {LARGEST} pixels a side"
        )

    def decode(number: int) -> np.ndarray:
        picture = opened(number)
        if picture.size != (width, width):
            raise SettingsError(
                f"{name}: {split} image {number:,} is {picture.width} x {picture.height} and image 0 {width} x {width}"
            )
        try:
            return np.asarray(picture.convert("RGB"))
        except DECODE_ERRORS as error:
            raise SettingsError(f"{name}: {split} image {number:,} is broken ({reason_of(error)})") from None

    return decode_all(len(offsets) - 1, width, decode)


def decode_files(paths: Sequence[Path], size: int) -> np.ndarray:
    """Image files, cut to their middle square and resized (bilinear with antialiasing): (n, 3, size, size) uint8, RGB.

    They are turned as their EXIF data says; what is transparent becomes black.

    Raises:
        SettingsError: a file that is broken or far too large, by name.
    """

    def decode(number: int) -> np.ndarray:
        name = f"--data_path: {paths[number]}"
        with paths[number].open("rb") as file:  # an error of PIL would leave a file open that it opened itself
            opened = open_picture(file, ["PNG", "JPEG", "BMP", "WEBP"], name)
            try:
                picture = ImageOps.exif_transpose(opened)
                if "A" in picture.getbands() or "transparency" in picture.info:
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
                picture = picture.convert("RGB")
            except DECODE_ERRORS as error:
                raise SettingsError(f"{name} is broken ({reason_of(error)})") from None
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        return np.asarray(picture if side == size else picture.resize((size, size), Image.Resampling.BILINEAR))

    return decode_all(len(paths), size, decode)
