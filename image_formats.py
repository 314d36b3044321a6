"""Image files for classification: read CIFAR's binary version, .npz files and folders.

    from image_formats import read_path
    images, words, sha256 = read_path(Path("cifar-10-binary.tar.gz"), None, ".cache/images")

Every format ends as one ImageSet: squares of one size as bytes, (n, 3, size, size), and labels. JPEG bytes and the
files of a folder are decoded once (image_decoding.py) and kept under the SHA-256 of their content (image_set.py).
Nothing is unpacked to the disk, no pickle is loaded, and whatever is missing, damaged or too large is an error of one
sentence.

It does not help where images must keep their own sizes: those of a folder are cut to their middle square and resized.

Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images (CIFAR-10, CIFAR-100).
"""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from image_decoding import decode_files, decode_jpegs
from image_set import ARCHIVE_ERRORS, ImageSet, cached, check_images, reason_of
from utils import SettingsError

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
CIFAR100_FILES = ("train.bin", "test.bin")
NAME_FILES = ("batches.meta.txt", "fine_label_names.txt")
PICKLE_FILES = {*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"}
PICKLE_FILES_100 = {"train", "test", "meta"}  # all three together
PIXELS = 3 * 32 * 32  # bytes of an image in a binary file
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
LARGEST_MEMBER = 8 * 2**30  # bytes of the content of an archive
NPZ_ARRAYS = (
    *(f"{split}_{part}" for split in ("train", "test") for part in ("images", "jpeg", "offsets", "labels")),
    "class_names",
)


def refuse_pickle(name: str) -> SettingsError:
    """The error for CIFAR's Python version, which is made of pickles: loading one runs what it holds."""
    return SettingsError(
        f"{name} is CIFAR's Python version, whose pickles this lab does not load; take the binary version "
        "(cifar-10-binary.tar.gz or cifar-100-binary.tar.gz)"
    )


def read_records(content: bytes, label_bytes: int, file: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and images of a binary CIFAR file.

    Args:
        content: records of `label_bytes` and 3072 bytes, the red, green and blue plane.
        label_bytes: 1, or 2 for CIFAR-100, whose first one (the coarse label) is checked and left out.
        file: its name, for messages.
        name: of the archive or folder, for messages.

    Returns:
        (n, 3, 32, 32) uint8 and (n,) int64.
    """
    length = label_bytes + PIXELS
    if len(content) == 0 or len(content) % length:
        raise SettingsError(
            f"{name}: {file} has {len(content):,} bytes, which are not whole records of {length:,}; it is truncated or "
            "another file"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, length)
    if label_bytes == 2 and records[:, 0].max() >= 20:
        raise SettingsError(f"{name}: {file} has a coarse label of {records[:, 0].max()}, not one of 0 to 19")
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1].astype(np.int64)


def read_binary(files: dict[str, bytes], name: str) -> ImageSet:
    """CIFAR-10 or CIFAR-100 of their official binary versions (https://www.cs.toronto.edu/~kriz/cifar.html).

    Args:
        files: content by file name.
        name: of the archive or folder, for messages.

    Raises:
        SettingsError: a file that is missing, truncated or has labels out of range.
    """
    ten, hundred = set(files) & set(CIFAR10_FILES), set(files) & set(CIFAR100_FILES)
    if ten and hundred:
        raise SettingsError(f"{name} holds files of both CIFAR-10 and CIFAR-100; give one of them")
    wanted = CIFAR10_FILES if ten else CIFAR100_FILES
    missing = [file for file in wanted if file not in files]
    if missing:
        raise SettingsError(f"{name}: {missing[0]} is missing")
    parts = [read_records(files[file], 1 if ten else 2, file, name) for file in wanted]
    counts = [len(labels) for _, labels in parts[:-1]]
    for file, count in zip(wanted, counts, strict=False):
        if count != max(counts):
            raise SettingsError(f"{name}: {file} holds {count:,} images and another one {max(counts):,}; one is broken")
    names_file, classes = ("batches.meta.txt", 10) if ten else ("fine_label_names.txt", 100)
    names = CIFAR10_NAMES if ten else [f"class {number}" for number in range(100)]
    if names_file in files:
        names = [line.strip() for line in files[names_file].decode("utf-8", "replace").splitlines() if line.strip()]
        if len(names) != classes:
            raise SettingsError(f"{name}: {names_file} has {len(names)} names, not {classes}")
    images = ImageSet(
        np.concatenate([pixels for pixels, _ in parts[:-1]]),
        np.concatenate([labels for _, labels in parts[:-1]]),
        parts[-1][0].copy(),
        parts[-1][1],
        list(names),
        {},
    )
    check_images(images, name)
    return images


def read_tar(content: bytes, name: str) -> dict[str, bytes]:
    """The binary CIFAR files of a tar archive, plain or compressed; nothing is unpacked to the disk.

    Raises:
        SettingsError: no archive, a truncated one, or one without these files.
    """
    files: dict[str, bytes] = {}
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as archive:
            for member in archive:
                file = member.name.rsplit("/", 1)[-1]
                if not member.isreg():
                    continue
                seen.add(file)
                if file not in (*CIFAR10_FILES, *CIFAR100_FILES, *NAME_FILES):
                    continue
                if file in files:
                    raise SettingsError(f"{name} holds {file} twice")
                if member.size > LARGEST_MEMBER:
                    raise SettingsError(f"{name}: {file} is far too large ({member.size:,} bytes)")
                files[file] = archive.extractfile(member).read()
    except SettingsError:
        raise
    except ARCHIVE_ERRORS as error:
        opened = "could not be opened" not in str(error)  # else the reason is a list of what tarfile tried
        raise SettingsError(
            f"{name} is neither an .npz nor a whole tar archive of CIFAR's binary version"
            + (f" ({reason_of(error)})" if opened else "")
        ) from None
    if not set(files) & {*CIFAR10_FILES, *CIFAR100_FILES}:
        if seen & PICKLE_FILES or seen >= PICKLE_FILES_100:
            raise refuse_pickle(name)
        raise SettingsError(f"{name} holds none of the .bin files of CIFAR's binary version")
    return files


def as_pixels(array: np.ndarray, key: str, name: str) -> np.ndarray:
    """Raw images (n, 3, size, size) or (n, size, size, 3) uint8 as (n, 3, size, size)."""
    if array.dtype != np.uint8 or array.ndim != 4:
        raise SettingsError(
            f"{name}: {key} is {array.dtype} of shape {array.shape}, not uint8 of (images, 3, size, size) or "
            "(images, size, size, 3)"
        )
    if array.shape[1] == 3 and array.shape[2] == array.shape[3]:
        return np.ascontiguousarray(array)
    if array.shape[3] == 3 and array.shape[1] == array.shape[2]:
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    raise SettingsError(f"{name}: {key} has the shape {array.shape}, which are not square images of three channels")


def read_npz(arrays: dict[str, np.ndarray], name: str) -> ImageSet:
    """Images of an .npz: `train_images`, or JPEG bytes `train_jpeg` and `train_offsets`; `train_labels`; same for test.

    Args:
        arrays: the file's content.
        name: of the file, for messages.

    Raises:
        SettingsError: arrays that are missing, have other shapes or types, or do not fit each other.
    """
    jpeg = "train_jpeg" in arrays
    parts: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        pixels = [f"{split}_jpeg", f"{split}_offsets"] if jpeg else [f"{split}_images"]
        missing = [key for key in (*pixels, f"{split}_labels") if key not in arrays]
        if missing:
            raise SettingsError(f"{name}: the array {missing[0]} is missing (there are {', '.join(arrays) or 'none'})")
        labels, counted = arrays[f"{split}_labels"], arrays[pixels[-1]]
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise SettingsError(f"{name}: {split}_labels is {labels.dtype} of shape {labels.shape}, not whole numbers")
        parts[f"{split}_labels"] = labels.astype(np.int64)
        count = counted.shape[0] - (1 if jpeg else 0) if counted.ndim else 0
        if count != len(labels):  # told before the images are decoded
            raise SettingsError(f"{name}: there are {count:,} {split} images and {len(labels):,} {split} labels")
    if "class_names" in arrays:
        names = arrays["class_names"]
        if names.dtype.kind not in "US" or names.ndim != 1:
            raise SettingsError(f"{name}: class_names is {names.dtype} of shape {names.shape}, not texts in a row")
        class_names = [text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in names]
    else:
        class_names = [f"class {number}" for number in range(int(parts["train_labels"].max(initial=-1)) + 1)]
    for split in ("train", "test"):
        parts[f"{split}_images"] = (
            decode_jpegs(arrays[f"{split}_jpeg"], arrays[f"{split}_offsets"], split, name)
            if jpeg
            else as_pixels(arrays[f"{split}_images"], f"{split}_images", name)
        )
    images = ImageSet(class_names=class_names, source={}, **parts)
    check_images(images, name)
    return images


def load_arrays(content: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz that are NPZ_ARRAYS; one that needs pickle is refused."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > LARGEST_MEMBER:
            raise SettingsError(f"{name} unpacks to {size:,} bytes, more than this lab reads ({LARGEST_MEMBER:,})")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {key: np.asarray(arrays[key]) for key in NPZ_ARRAYS if key in arrays.files}
    except SettingsError:
        raise
    except ARCHIVE_ERRORS as error:
        if "allow_pickle" in str(error):
            raise SettingsError(
                f"{name} holds an array of Python objects (a pickle), which this lab does not load; save plain numbers"
            ) from None
        raise SettingsError(f"{name} cannot be read as .npz ({reason_of(error)})") from None


def list_pictures(folder: Path) -> list[list[Path]]:
    """The image files of every class folder, both sorted by name.

    Raises:
        SettingsError: no class folder, or one without an image.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise SettingsError(
            f"--data_path: {folder} holds no class folders, no .bin files of CIFAR and nothing else that can be read"
        )
    found = []
    for path in classes:
        inside = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
        files = sorted(file for file in inside if file.suffix.lower() in SUFFIXES)
        if len(files) < len(inside):
            print(f"{path}: {len(inside) - len(files)} files are left out, as they are no {', '.join(SUFFIXES)}")
        if not files:
            raise SettingsError(f"--data_path: {path} holds no image ({', '.join(SUFFIXES)})")
        found.append(files)
    return found


def read_folder(folder: Path, size: int, cache_folder: str) -> tuple[ImageSet, str, str]:
    """Images of folder/train/<class>/ and folder/test/<class>/, or of folder/<class>/ with every 6th one for test.

    Args:
        folder: the root.
        size: pixels a side that images are resized to.
        cache_folder: as in `cached`; the name is made of the files' names and contents and the size.

    Returns:
        The images, what they are in words, and the SHA-256 of the files' names and contents.
    """
    has = {split: (folder / split).is_dir() for split in ("train", "test")}
    if has["train"] != has["test"]:
        there, gone = ("train", "test") if has["train"] else ("test", "train")
        raise SettingsError(f"--data_path: {folder} holds {there}/ but no {gone}/")
    if has["train"]:
        train, test = list_pictures(folder / "train"), list_pictures(folder / "test")
        names = [files[0].parent.name for files in train]
        if names != [files[0].parent.name for files in test]:
            raise SettingsError(f"--data_path: {folder}/train and {folder}/test do not have the same class folders")
        words = "image folder"
    else:
        every = list_pictures(folder)
        names = [files[0].parent.name for files in every]
        train = [[file for place, file in enumerate(files) if place % 6 != 5] for files in every]
        test = [files[5::6] for files in every]
        if not any(test):
            raise SettingsError(f"--data_path: {folder} has no class of 6 images, of which every 6th one is for test")
        words = "image folder; every 6th image of a class is test"
    digest = hashlib.sha256()
    try:
        for file in sorted(file for files in (*train, *test) for file in files):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    except OSError as error:
        raise SettingsError(f"--data_path: {file} cannot be read: {reason_of(error)}") from None

    def decode() -> ImageSet:
        parts = []
        for groups in (train, test):
            parts.append(decode_files([file for files in groups for file in files], size))
            parts.append(np.repeat(np.arange(len(names)), [len(files) for files in groups]).astype(np.int64))
        images = ImageSet(*parts, names, {})
        check_images(images, f"--data_path {folder}")
        return images

    if len(names) < 2:
        raise SettingsError(f"--data_path {folder}: the images are of one class only, and at least two are needed")
    return cached(cache_folder, f"{digest.hexdigest()}-{size}", decode), words, digest.hexdigest()


def read_path(path: Path, image_size: int | None, cache_folder: str) -> tuple[ImageSet, str, str]:
    """Whatever lies at a path: an image folder, CIFAR's binary version as folder or archive, or an .npz.

    Returns:
        The images, what they are in words, and the SHA-256 of the file or of the folder's content.
    """
    name = f"--data_path {path}"
    try:
        if path.is_dir():
            inner = [path, *sorted(folder for folder in path.glob("cifar-*") if folder.is_dir())]
            present = {file.name: file for folder in inner for file in sorted(folder.iterdir()) if file.is_file()}
            known = {*CIFAR10_FILES, *CIFAR100_FILES}
            if not set(present) & known:
                if set(present) & PICKLE_FILES or set(present) >= PICKLE_FILES_100:
                    raise refuse_pickle(name)
                return read_folder(path, image_size or 32, cache_folder)
            files = {file: present[file].read_bytes() for file in sorted(set(present) & {*known, *NAME_FILES})}
            digest = hashlib.sha256()
            for file, content in files.items():
                digest.update(f"{file}\0{len(content)}\0".encode())
                digest.update(content)
            found = digest.hexdigest()
        else:
            content = path.read_bytes()
            found = hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise SettingsError(f"{name} cannot be read: {reason_of(error)}") from None
    if image_size is not None:
        raise SettingsError(f"--source_size is for image folders and has no effect on {path.name}; leave it out")
    if path.is_dir():
        return read_binary(files, name), "binary version", found
    if path.name in PICKLE_FILES or (content[:1] == b"\x80" and content[1:2] in b"\x02\x03\x04\x05"):
        raise refuse_pickle(name)
    if path.suffix.lower() == ".bin":
        raise SettingsError(f"{name} is one file of CIFAR's binary version; give the folder that holds all of them")
    if content[:4] != b"PK\x03\x04":
        return cached(cache_folder, found, lambda: read_binary(read_tar(content, name), name)), "binary version", found
    # Whether it holds JPEGs is told by the archive's list of names, so that a cached file is not unpacked for it.
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            holds_jpegs = "train_jpeg.npy" in archive.namelist()
    except ARCHIVE_ERRORS as error:
        raise SettingsError(f"{name} cannot be read as .npz ({reason_of(error)})") from None
    if not holds_jpegs:
        return read_npz(load_arrays(content, name), name), "raw pixels", found
    return cached(cache_folder, found, lambda: read_npz(load_arrays(content, name), name)), "JPEG copy", found
