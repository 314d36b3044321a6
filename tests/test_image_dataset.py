"""image_dataset.py, image_formats.py, sample_images.py: every format to the exact pixels, broken files, splits."""

import io
import math
import pickle
import shutil
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import image_dataset
import image_decoding
import image_formats
import image_set
from image_augmentation import Augmentation, augment, draw_mixing, draw_numbers
from image_dataset import channel_statistics, load_images, split_images
from image_set import ImageSet
from sample_images import sample_images
from utils import SettingsError

CPU = torch.device("cpu")


def random_pixels(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth random images, so that JPEG and resampling have something to keep."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, 4, 4), dtype=np.uint8)
    tensor = torch.nn.functional.interpolate(torch.from_numpy(coarse).float(), size=(size, size), mode="bilinear")
    return tensor.round().byte().numpy()


def png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(path)


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=90)
    return file.getvalue()


def load(path: Path, cache: Path, dataset: str | None = None, **options) -> ImageSet:
    return load_images(dataset, str(path), cache_folder=str(cache), **options)


def write_cifar10(folder: Path, each: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The binary version with `each` images a file; returns all pixels and labels, the test file's last."""
    folder.mkdir(parents=True)
    pixels = random_pixels(6 * each)
    labels = np.arange(6 * each) % 10
    for number, file in enumerate(image_formats.CIFAR10_FILES):
        part = slice(number * each, (number + 1) * each)
        records = np.concatenate([labels[part, None].astype(np.uint8), pixels[part].reshape(each, -1)], axis=1)
        (folder / file).write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"name{number}" for number in range(10)) + "\n\n")
    return pixels, labels


def write_cifar100(folder: Path, each: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """The binary version with `each` train images a class and one test image a class."""
    folder.mkdir(parents=True)
    labels = np.concatenate([np.arange(100 * each) % 100, np.arange(100)])
    pixels = random_pixels(len(labels))
    records = np.concatenate(
        [(labels // 5)[:, None].astype(np.uint8), labels[:, None].astype(np.uint8), pixels.reshape(len(labels), -1)], 1
    )
    (folder / "train.bin").write_bytes(records[: 100 * each].tobytes())
    (folder / "test.bin").write_bytes(records[100 * each :].tobytes())
    return pixels, labels


def npz_arrays(count: int = 20, size: int = 16) -> dict[str, np.ndarray]:
    pixels, labels = random_pixels(count + 6, size), np.arange(count + 6) % 2
    return {
        "train_images": pixels[:count],
        "train_labels": labels[:count],
        "test_images": pixels[count:],
        "test_labels": labels[count:],
    }


def jpeg_arrays(count: int = 20, size: int = 16) -> dict[str, np.ndarray]:
    raw = npz_arrays(count, size)
    arrays = {"class_names": np.array(["left", "right"])}
    for split in ("train", "test"):
        encoded = [jpeg(image) for image in raw[f"{split}_images"]]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, encoded)])
        arrays[f"{split}_labels"] = raw[f"{split}_labels"].astype(np.uint8)
    return arrays


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)
    return path


def write_folder(root: Path, count: int = 7) -> np.ndarray:
    """root/train/<class>/ and root/test/<class>/ of PNGs of 32 x 32, two classes."""
    pixels = random_pixels(2 * count + 4)
    for number in range(2 * count):
        png(root / "train" / ("cat" if number < count else "dog") / f"{number:03}.png", pixels[number])
    for number in range(4):
        png(root / "test" / ("cat" if number < 2 else "dog") / f"{number}.png", pixels[2 * count + number])
    return pixels


# --- The sample -------------------------------------------------------------------------------------------------------


def test_the_sample_is_reproducible_and_balanced():
    first, again, other = sample_images(200, 40), sample_images(200, 40), sample_images(200, 40, seed=1)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))
    assert first.train_images.shape == (200, 3, 32, 32) and first.train_images.dtype == np.uint8
    assert np.bincount(first.train_labels).tolist() == [20] * 10 and np.bincount(first.test_labels).tolist() == [4] * 10
    assert len(set(first.class_names)) == 10 and first.source["generated"] and first.source["sha256"] is None
    assert np.array_equal(sample_images(100, 40).test_images, first.test_images)
    assert sample_images(20, 10, image_size=48).test_images.shape == (10, 3, 48, 48)


def test_the_samples_colours_say_nothing_about_the_class():
    """The mean colour of a class differs from the others' by no more than chance."""
    images = sample_images(2000, 10)
    colours = images.train_images.mean((2, 3))
    means = np.stack([colours[images.train_labels == label].mean(0) for label in range(10)])
    assert np.abs(means - colours.mean(0)).max() < 4 * colours.std(0).max() / math.sqrt(200)


def test_the_default_is_the_sample():
    images = load_images(None, None)
    assert images.source["name"] == "sample" and len(images.train_images) == 2000 and len(images.test_images) == 400
    assert images.source["classes"] == 10 and images.source["image_size"] == 32


# --- Formats ----------------------------------------------------------------------------------------------------------


def test_cifar10_binary_as_folder_and_archive(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    pixels, labels = write_cifar10(folder)
    archives = [tmp_path / "cifar-10-binary.tar.gz", tmp_path / "plain.tar"]
    for path, mode in zip(archives, ("w:gz", "w"), strict=True):
        with tarfile.open(path, mode) as archive:
            archive.add(folder, "cifar-10-batches-bin")
    for path in (folder, tmp_path, *archives):
        images = load(path, tmp_path / "cache", "cifar10")
        assert np.array_equal(images.train_images, pixels[:50]) and np.array_equal(images.test_images, pixels[50:])
        assert np.array_equal(images.train_labels, labels[:50]) and np.array_equal(images.test_labels, labels[50:])
        assert images.train_labels.dtype == np.int64
        assert images.class_names[3] == "name3"
        assert images.source["name"] == "cifar10" and images.source["train_images"] == 50
        assert images.source["description"].startswith("CIFAR-10 (binary version): 50 train and 10 test")
        assert len(images.source["sha256"]) == 64 and images.source["generated"] is False
    (folder / "batches.meta.txt").unlink()
    assert load(folder, tmp_path).class_names[0] == "airplane"
    assert load(folder, tmp_path).source["name"] == "local images"


def test_cifar100_binary_through_the_splits(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    pixels, labels = write_cifar100(folder)
    (folder / "fine_label_names.txt").write_text("\n".join(f"fine{number}" for number in range(100)) + "\n")
    with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz") as archive:
        archive.add(folder, "cifar-100-binary")
    for path in (folder, tmp_path / "cifar-100-binary.tar.gz"):
        images = load(path, tmp_path / "cache", "cifar100")
        assert np.array_equal(images.train_images, pixels[:400]) and np.array_equal(images.test_labels, labels[400:])
        assert images.class_names[99] == "fine99" and images.source["classes"] == 100
    data = split_images(images, device=CPU, validation_share=0.25)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 300, "validation": 100, "test": 100}
    assert torch.bincount(data.splits["validation"].labels).tolist() == [1] * 100
    train = data.splits["train"]
    inputs, targets = augment(
        train.images[:64],
        train.labels[:64],
        draw_numbers(64, Augmentation(), torch.Generator().manual_seed(0), CPU),
        draw_mixing(1, Augmentation(), 0, 0, CPU)[0],
        augmentation=Augmentation(),
        mean=data.mean,
        deviation=data.deviation,
        num_classes=100,
    )
    assert inputs.shape == (64, 3, 32, 32) and targets.shape == (64, 100)
    assert torch.equal(targets.argmax(1), train.labels[:64])


@pytest.mark.parametrize("layout", ["first", "last"])
def test_npz_of_pixels(tmp_path, layout):
    arrays = npz_arrays()
    stored = dict(arrays)
    if layout == "last":
        stored |= {key: arrays[key].transpose(0, 2, 3, 1) for key in ("train_images", "test_images")}
    images = load(write_npz(tmp_path / "mine.npz", stored), tmp_path / "cache")
    assert np.array_equal(images.train_images, arrays["train_images"])
    assert np.array_equal(images.test_images, arrays["test_images"]) and images.test_images.flags.c_contiguous
    assert images.class_names == ["class 0", "class 1"]
    assert images.source["description"].startswith("local images mine.npz (raw pixels): 20 train and 6 test")
    assert not (tmp_path / "cache").exists()


def test_npz_of_jpegs_is_what_pil_decodes(tmp_path):
    arrays = jpeg_arrays()
    images = load(write_npz(tmp_path / "mine.npz", arrays), tmp_path / "cache")
    assert images.class_names == ["left", "right"]
    for split, pixels in (("train", images.train_images), ("test", images.test_images)):
        content, offsets = arrays[f"{split}_jpeg"].tobytes(), arrays[f"{split}_offsets"]
        for number, image in enumerate(pixels):
            decoded = Image.open(io.BytesIO(content[offsets[number] : offsets[number + 1]])).convert("RGB")
            assert np.array_equal(image, np.asarray(decoded).transpose(2, 0, 1))


def test_a_jpeg_copy_of_cifar10_is_called_one(tmp_path):
    arrays = jpeg_arrays(20, 32)
    arrays["class_names"] = np.array(image_formats.CIFAR10_NAMES)
    images = load(write_npz(tmp_path / "copy.npz", arrays), tmp_path / "cache", "cifar10")
    assert images.source["description"].startswith("CIFAR-10 (JPEG copy)")


def test_image_folder_with_train_and_test(tmp_path):
    pixels = write_folder(tmp_path / "photos")
    (tmp_path / "photos/train/cat/notes.txt").write_text("no image")
    images = load(tmp_path / "photos", tmp_path / "cache")
    assert np.array_equal(images.train_images, pixels[:14]) and np.array_equal(images.test_images, pixels[14:])
    assert images.train_labels.tolist() == [0] * 7 + [1] * 7 and images.test_labels.tolist() == [0, 0, 1, 1]
    assert images.class_names == ["cat", "dog"]
    with pytest.raises(SettingsError, match=r"--dataset cifar10: .* has 2 classes of 32 x 32"):
        load(tmp_path / "photos", tmp_path / "cache", "cifar10")


def test_image_folder_without_test_takes_every_sixth(tmp_path):
    pixels = random_pixels(26)
    for number, image in enumerate(pixels):
        png(tmp_path / "photos" / ("a" if number < 13 else "b") / f"{number:02}.png", image)
    images = load(tmp_path / "photos", tmp_path / "cache")
    held = [5, 11, 18, 24]
    assert np.array_equal(images.test_images, pixels[held]) and images.test_labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(images.train_images, np.delete(pixels, held, axis=0))
    assert "every 6th image of a class is test" in images.source["description"]


def test_pictures_are_cropped_and_resized(tmp_path):
    """A wide, a high and a gray one; the middle square, then bilinear with antialiasing; JPEG, BMP and WebP too."""
    root = tmp_path / "photos"
    write_folder(root)
    wide, high = random_pixels(1, 96)[0][:, :64], random_pixels(1, 96, seed=1)[0][:, :, :40]
    png(root / "train/cat/900.bmp", wide)
    png(root / "train/cat/901.png", high)
    Image.fromarray(random_pixels(1, 40)[0][0]).save(root / "train/cat/902.jpg")
    Image.fromarray(wide.transpose(1, 2, 0)).save(root / "train/cat/903.webp")
    for size in (None, 24):
        images = load(root, tmp_path / "cache", image_size=size)
        square = Image.fromarray(wide[:, :, 16:80].transpose(1, 2, 0))
        expected = np.asarray(square.resize((size or 32,) * 2, Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.array_equal(images.train_images[7], expected)
        square = Image.fromarray(high[:, 28:68].transpose(1, 2, 0))
        expected = np.asarray(square.resize((size or 32,) * 2, Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.array_equal(images.train_images[8], expected)
        assert np.array_equal(images.train_images[9, 0], images.train_images[9, 2])
        assert images.source["image_size"] == (size or 32) and len(images.train_images) == 18


def test_the_hub_copy(tmp_path, monkeypatch):
    """Columns and names as the hub has them; the second start needs no hub."""
    datasets = pytest.importorskip("datasets")
    pixels = random_pixels(30)
    names = [f"fine{number}" for number in range(100)]
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=names)})

    def rows(begin, end):
        pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in pixels[begin:end]]
        return datasets.Dataset.from_dict({"img": pictures, "fine_label": list(range(begin, end))}, features=features)

    asked = []

    def load_dataset(name):
        asked.append(name)
        return {"train": rows(0, 20), "test": rows(20, 30)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for _ in range(2):
        images = load_images("cifar100", None, fetch=True, cache_folder=str(tmp_path))
        assert np.array_equal(images.train_images, pixels[:20]) and images.test_labels.tolist() == list(range(20, 30))
        assert images.class_names == names
    assert asked == ["uoft-cs/cifar100"]


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        SettingsError, match=r"^--download true: uoft-cs/cifar10 could not .* \(no route\); .*--data_path"
    ):
        load_images("cifar10", None, fetch=True, cache_folder=str(tmp_path))


# --- Broken files and settings: one sentence --------------------------------------------------------------------------


def header_of_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def change(path: Path, **arrays) -> Path:
    return write_npz(path, npz_arrays() | arrays)


def change_jpeg(path: Path, **arrays) -> Path:
    return write_npz(path, jpeg_arrays() | arrays)


def broken_binary(root: Path, file: str, content: bytes | None) -> Path:
    write_cifar10(root)
    (root / file).unlink() if content is None else (root / file).write_bytes(content)
    return root


def cut_archive(root: Path) -> Path:
    write_cifar10(root / "bin")
    with tarfile.open(root / "whole.tar.gz", "w:gz") as archive:
        archive.add(root / "bin")
    content = (root / "whole.tar.gz").read_bytes()
    (root / "cut.tar.gz").write_bytes(content[: len(content) // 2])
    return root / "cut.tar.gz"


def archive_of(root: Path, **files: bytes) -> Path:
    with tarfile.open(root / "some.tar", "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return root / "some.tar"


def linked_archive(root: Path) -> Path:
    """data_batch_1.bin is a link to a file outside."""
    with tarfile.open(root / "linked.tar", "w") as archive:
        member = tarfile.TarInfo("data_batch_1.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    return root / "linked.tar"


def text(path: Path, content: bytes = b"hello\n") -> Path:
    path.write_bytes(content)
    return path


def folder_with(root: Path, name: str, content: bytes) -> Path:
    write_folder(root)
    (root / name).write_bytes(content)
    return root


def folder_without(root: Path, name: str) -> Path:
    write_folder(root)
    shutil.rmtree(root / name)
    return root


def one_class(root: Path) -> Path:
    for number, image in enumerate(random_pixels(6)):
        png(root / "only" / f"{number}.png", image)
    return root


def few_images(root: Path) -> Path:
    for number, image in enumerate(random_pixels(4)):
        png(root / "ab"[number % 2] / f"{number}.png", image)
    return root


def offsets(**changes: int) -> np.ndarray:
    found = jpeg_arrays()["train_offsets"].copy()
    for place, value in changes.items():
        found[int(place[1:])] = value
    return found


def cut_jpeg(**options) -> np.ndarray:
    content = jpeg_arrays()["train_jpeg"].copy()
    at = jpeg_arrays()["train_offsets"]
    content[at[7] : at[7] + 40] = 0
    return content


def jpegs_of_sizes(sizes: list[int]) -> dict[str, np.ndarray]:
    encoded = [jpeg(random_pixels(1, size)[0]) for size in sizes]
    return {
        "train_jpeg": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "train_offsets": np.cumsum([0, *map(len, encoded)]),
        "train_labels": np.arange(len(sizes)) % 2,
    }


RECORDS = np.zeros((10, 3073), dtype=np.uint8)
LABEL_12 = np.concatenate([np.full((10, 1), 12, np.uint8), RECORDS[:, 1:]], axis=1).tobytes()
BROKEN = {
    "missing": (lambda p: p / "nothing.npz", "cannot be read: No such file"),
    "text": (lambda p: text(p / "mine.txt"), "neither an .npz nor a whole tar archive"),
    "empty file": (lambda p: text(p / "mine.npz", b""), "neither an .npz nor a whole tar archive"),
    "broken npz": (lambda p: text(p / "mine.npz", b"PK\x03\x04" + b"\0" * 100), "cannot be read as .npz"),
    "cut npz": (
        lambda p: text(p / "cut.npz", change(p / "whole.npz").read_bytes()[:-300]),
        "cannot be read as .npz",
    ),
    "damaged npz": (
        lambda p: text(p / "bad.npz", change(p / "whole.npz").read_bytes().replace(b"\x80\x80", b"\x81\x82")),
        "cannot be read as .npz",
    ),
    "empty folder": (lambda p: p, "holds no class folders"),
    "one .bin": (lambda p: broken_binary(p / "b", "x", b"") / "test_batch.bin", "give the folder that holds all"),
    "truncated .bin": (lambda p: broken_binary(p / "b", "data_batch_2.bin", RECORDS.tobytes()[:-1]), "whole records"),
    "short .bin": (lambda p: broken_binary(p / "b", "data_batch_2.bin", RECORDS.tobytes()[:3073]), "holds 1 images"),
    "empty .bin": (lambda p: broken_binary(p / "b", "test_batch.bin", b""), "test_batch.bin has 0 bytes"),
    "missing .bin": (lambda p: broken_binary(p / "b", "data_batch_4.bin", None), "data_batch_4.bin is missing"),
    "label of .bin": (lambda p: broken_binary(p / "b", "data_batch_1.bin", LABEL_12), "label 12 of train image 0"),
    "names of .bin": (lambda p: broken_binary(p / "b", "batches.meta.txt", b"a\nb\n"), "has 2 names, not 10"),
    "two versions": (lambda p: broken_binary(p / "b", "train.bin", b"0"), "both CIFAR-10 and CIFAR-100"),
    "cut archive": (cut_archive, "neither an .npz nor a whole tar archive"),
    "other archive": (lambda p: archive_of(p, readme=b"hello"), "none of the .bin files"),
    "link in archive": (linked_archive, "none of the .bin files"),
    "pickles in archive": (
        lambda p: archive_of(p, data_batch_1=b"\x80", test_batch=b"\x80"),
        "take the binary version",
    ),
    "pickles of 100": (lambda p: archive_of(p, train=b"\x80", test=b"\x80", meta=b"\x80"), "take the binary version"),
    "coarse label": (lambda p: archive_of(p, train__bin=b"\x14" + bytes(3073), test__bin=bytes(3074)), "coarse label"),
    "array missing": (
        lambda p: write_npz(p / "a.npz", {"train_images": random_pixels(2), "train_labels": np.arange(2)}),
        "the array test_images is missing",
    ),
    "lengths": (lambda p: change(p / "a.npz", train_labels=np.arange(19) % 2), "20 train images and 19 train labels"),
    "float pixels": (lambda p: change(p / "a.npz", train_images=np.zeros((20, 3, 8, 8))), "train_images is float64"),
    "scalar": (lambda p: change(p / "a.npz", train_images=np.uint8(3)), "0 train images and 20 train labels"),
    "float labels": (lambda p: change(p / "a.npz", train_labels=np.ones(20)), "train_labels is float64"),
    "label range": (lambda p: change(p / "a.npz", test_labels=np.full(6, 2)), "label 2 of test image 0"),
    "negative label": (lambda p: change(p / "a.npz", train_labels=np.arange(20) % 2 - 1), "one class only"),
    "below zero": (lambda p: change(p / "a.npz", test_labels=np.full(6, -1)), "label -1 of test image 0"),
    "one class": (lambda p: change(p / "a.npz", train_labels=np.zeros(20, int)), "one class only"),
    "twice a name": (lambda p: change(p / "a.npz", class_names=np.array(["a", "a"])), "holds a name twice"),
    "numbers as names": (lambda p: change(p / "a.npz", class_names=np.arange(2)), "class_names is int64"),
    "not square": (lambda p: change(p / "a.npz", train_images=np.zeros((20, 3, 8, 9), np.uint8)), "are not square"),
    "tiny": (lambda p: write_npz(p / "a.npz", npz_arrays(size=4)), "4 x 4, not a square of 8 to 512"),
    "sizes": (lambda p: change(p / "a.npz", test_images=random_pixels(6, 20)), "16 x 16 and test images 20"),
    "no test image": (
        lambda p: change(p / "a.npz", test_images=random_pixels(1)[:0], test_labels=np.arange(0)),
        "there is no test image",
    ),
    "falling offsets": (lambda p: change_jpeg(p / "a.npz", train_offsets=offsets(_3=5)), "must rise and stay within"),
    "offsets outside": (lambda p: change_jpeg(p / "a.npz", train_offsets=offsets(_20=10**9)), "must rise and stay"),
    "offsets below": (lambda p: change_jpeg(p / "a.npz", train_offsets=offsets(_0=-4)), "must rise and stay within"),
    "float offsets": (lambda p: change_jpeg(p / "a.npz", train_offsets=offsets() * 1.0), "must be whole numbers"),
    "scalar offset": (lambda p: change_jpeg(p / "a.npz", train_offsets=np.int64(3)), "0 train images and 20"),
    "broken JPEG": (lambda p: change_jpeg(p / "a.npz", train_jpeg=cut_jpeg()), "train image 7 is broken"),
    "short JPEG": (
        lambda p: change_jpeg(p / "a.npz", train_offsets=offsets(_8=offsets()[7] + 250)),
        "train image 7 is",
    ),
    "JPEG of a size": (lambda p: change_jpeg(p / "a.npz", **jpegs_of_sizes([16, 16, 24])), "image 2 is 24 x 24"),
    "tiny JPEGs": (lambda p: change_jpeg(p / "a.npz", **jpegs_of_sizes([4, 4])), "4 x 4, not a square"),
    "broken PNG": (lambda p: folder_with(p / "f", "train/cat/x.png", b"\x89PNG\r\n\x1a\n123"), "x.png is broken"),
    "half a PNG": (lambda p: folder_with(p / "f", "train/cat/x.png", header_of_png(64, 64)), "x.png is broken"),
    "bomb": (lambda p: folder_with(p / "f", "test/cat/x.png", header_of_png(60000, 60000)), "larger than 4096 x 4096"),
    "warned bomb": (lambda p: folder_with(p / "f", "test/cat/x.png", header_of_png(11000, 11000)), "larger than 4096"),
    "large": (lambda p: folder_with(p / "f", "test/cat/x.png", header_of_png(5000, 5000)), "more than 4096 x 4096"),
    "no test folder": (lambda p: folder_without(p / "f", "test"), "holds train/ but no test/"),
    "class missing": (lambda p: folder_without(p / "f", "test/dog"), "do not have the same class folders"),
    "empty class": (lambda p: ((p / "a").mkdir(), p)[1], "holds no image"),
    "one class folder": (one_class, "one class only"),
    "few images": (few_images, "no class of 6 images"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_inputs_are_one_sentence(tmp_path, name):
    make, words = BROKEN[name]
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(SettingsError) as error:
        load(make(data), tmp_path / "cache")
    message = str(error.value)
    assert words in message and message.startswith("--data_path"), message
    assert "\n" not in message and ". " not in message and not message.endswith("."), message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mnist", None), "--dataset mnist is unknown"),
        (("sample", "x.npz"), "takes no --data_path"),
        (("cifar10", None), "--data_path, or fetch it with --download true"),
        (("cifar100", None), "--data_path, or fetch it with --download true"),
        ((None, None, {"fetch": True}), "--download has no effect on the generated sample"),
        ((None, None, {"image_size": 32}), "--source_size has no effect on the generated sample"),
        (("cifar10", "x.npz", {"fetch": True}), "exclude each other"),
        (("cifar10", None, {"fetch": True, "image_size": 32}), "--source_size is for image folders"),
        ((None, "x", {"image_size": 4}), "--source_size must be 8 to 512"),
    ],
)
def test_settings_that_contradict_each_other(arguments, words):
    dataset, path, *options = arguments
    with pytest.raises(SettingsError, match=words):
        load_images(dataset, path, **(options[0] if options else {}))


def test_a_named_dataset_must_fit(tmp_path):
    path = change(tmp_path / "a.npz")
    with pytest.raises(SettingsError, match="has 2 classes of 16 x 16 pixels, not 100 of 32 x 32"):
        load(path, tmp_path, "cifar100")
    with pytest.raises(SettingsError, match="--source_size is for image folders"):
        load(path, tmp_path, image_size=32)


class Marker:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_executed(tmp_path):
    marker = tmp_path / "marker"
    content = pickle.dumps({b"data": Marker(marker)})
    pickle.loads(content)
    assert marker.exists()
    marker.unlink()
    objects = change(tmp_path / "objects.npz", class_names=np.array([Marker(marker), 1], dtype=object))
    with pytest.raises(SettingsError, match="Python objects"):
        load(objects, tmp_path / "cache")
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (batches / name).write_bytes(content)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(batches, "cifar-10-batches-py")
    (tmp_path / "other.pkl").write_bytes(content)
    for path in (batches, batches / "data_batch_1", tmp_path / "cifar-10-python.tar.gz", tmp_path / "other.pkl"):
        with pytest.raises(SettingsError, match="take the binary version"):
            load(path, tmp_path / "cache", "cifar10")
    assert not marker.exists()


# --- Cache ------------------------------------------------------------------------------------------------------------


def test_the_cache_is_used_and_a_damaged_one_is_made_anew(tmp_path, monkeypatch, capsys):
    path, cache = write_npz(tmp_path / "mine.npz", jpeg_arrays()), tmp_path / "cache"
    first = load(path, cache)
    (kept,) = cache.iterdir()
    assert kept.name == f"{first.source['sha256']}.npz"
    whole = kept.read_bytes()

    def refuse(*arguments):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(image_decoding, "decode_all", refuse)
        again = load(path, cache)
        assert np.array_equal(again.train_images, first.train_images) and again.source == first.source
        assert again.class_names == first.class_names and np.array_equal(again.test_labels, first.test_labels)
    assert capsys.readouterr().out == ""
    flipped = bytearray(whole)
    flipped[whole.index(b"train_images") + 2000] ^= 1
    for damaged in (whole[:-10], b"", bytes(flipped), b"PK\x03\x04nonsense"):
        kept.write_bytes(damaged)
        assert np.array_equal(load(path, cache).train_images, first.train_images)
        assert "is damaged or foreign: making it again" in capsys.readouterr().out
        assert kept.read_bytes() == whole or len(kept.read_bytes()) == len(whole)
        assert [file.name for file in cache.iterdir()] == [kept.name]


def test_the_cache_of_a_folder_follows_its_content(tmp_path):
    write_folder(tmp_path / "photos")
    first = load(tmp_path / "photos", tmp_path / "cache")
    png(tmp_path / "photos/train/cat/000.png", np.zeros((3, 32, 32), np.uint8))
    second = load(tmp_path / "photos", tmp_path / "cache")
    assert first.source["sha256"] != second.source["sha256"] and second.train_images[0].max() == 0
    assert load(tmp_path / "photos", tmp_path / "cache", image_size=16).image_size == 16


def test_a_cache_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"--cache_folder .* is not writable"):
        load(write_npz(tmp_path / "mine.npz", jpeg_arrays()), tmp_path / "file")


# --- Splits -----------------------------------------------------------------------------------------------------------


def numbered(train: int = 200, test: int = 20, classes: int = 4) -> ImageSet:
    """Image i holds its number in the first pixel; classes are not equally frequent."""
    labels = np.sort(np.random.default_rng(0).integers(0, classes, train))
    pixels = random_pixels(train + test, 8)
    pixels[:, 0, 0, 0] = np.arange(train + test) % 256
    pixels[:, 1, 0, 0] = np.arange(train + test) // 256
    images = ImageSet(pixels[:train], labels, pixels[train:], np.arange(test) % classes, list("abcd"[:classes]), {})
    images.source = image_set.describe(images, "numbered", "numbered", True, None)
    return images


def numbers_of(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0].int() + 256 * images[:, 1, 0, 0].int()).tolist()


def test_the_split_is_stratified_disjoint_and_deterministic():
    images = numbered()
    data = split_images(images, device=CPU, validation_share=0.1, seed=3)
    train, validation = (numbers_of(data.splits[name].images) for name in ("train", "validation"))
    assert sorted(train + validation) == list(range(200)) and not set(train) & set(validation)
    for label, count in enumerate(np.bincount(images.train_labels)):
        assert (data.splits["validation"].labels == label).sum() == math.floor(0.1 * count + 0.5)
    assert data.splits["train"].labels.tolist() == images.train_labels[train].tolist()
    assert torch.equal(data.splits["test"].images, torch.from_numpy(images.test_images))
    again, other = (split_images(images, device=CPU, validation_share=0.1, seed=seed) for seed in (3, 4))
    assert numbers_of(again.splits["validation"].images) == validation
    assert numbers_of(other.splits["validation"].images) != validation
    assert data.description["splits"] == {"train": len(train), "validation": len(validation), "test": 20}
    assert data.description["validation_share"] == 0.1 and data.description["split_seed"] == 3
    assert data.description["name"] == "numbered" and len(data.splits["train"]) == len(train)


def test_statistics_are_those_of_the_train_split_alone():
    images = numbered()
    data = split_images(images, device=CPU, validation_share=0.25)
    pixels = data.splits["train"].images.double().numpy() / 255
    assert data.mean.numpy() == pytest.approx(pixels.mean((0, 2, 3)), abs=1e-6)
    assert data.deviation.numpy() == pytest.approx(pixels.std((0, 2, 3)), abs=1e-6)
    images.test_images[:] = 255
    assert torch.equal(split_images(images, device=CPU, validation_share=0.25).mean, data.mean)
    flat = torch.full((5, 3, 8, 8), 7, dtype=torch.uint8)
    assert channel_statistics(flat)[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("share", [0, -0.1, 0.51, float("nan"), 1e-6])
def test_validation_share_out_of_range(share):
    with pytest.raises(SettingsError, match="--validation_share"):
        split_images(numbered(), device=CPU, validation_share=share)


# --- The script -------------------------------------------------------------------------------------------------------


def test_main_prints_the_splits_and_writes_the_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_dataset, "time_augmentation", lambda data: {"eager": 1.0})
    monkeypatch.setattr(sys, "argv", ["image_dataset.py", "--picture", str(tmp_path / "sheets/sheet.png")])
    assert image_dataset.main() == 0
    printed = capsys.readouterr().out
    assert "generated sample" in printed and "1.00 ms eager" in printed
    assert "validation         100" in printed and "deviation of red, green, blue" in printed
    with Image.open(tmp_path / "sheets/sheet.png") as sheet:
        assert sheet.size == (8 * 100 + 4, 8 * 100 + 4)
        first = np.asarray(sheet)[4 : 4 + 96 : 3, 4 : 4 + 96 : 3].transpose(2, 0, 1)
    data = split_images(sample_images(), device=CPU)
    assert np.array_equal(first, data.splits["train"].images[0].numpy())
    monkeypatch.setattr(sys, "argv", ["image_dataset.py", "--picture", "sheet.jpg"])
    with pytest.raises(SettingsError, match=r"--picture sheet.jpg must end with .png"):
        image_dataset.main()


def test_pictures_are_turned_as_they_say_and_what_is_transparent_is_black(tmp_path):
    turned = Image.new("RGB", (8, 8))
    turned.paste((255, 255, 255), (0, 0, 8, 4))  # white above; orientation 6 turns it to the right
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / "red.png")
    found = image_decoding.decode_files([tmp_path / f"{name}.png" for name in ("turned", "clear", "red")], 8)
    assert found[0, 0, :, 4:].min() == 255 and found[0, 0, :, :4].max() == 0
    assert found[1].max() == 0 and found[2, 0].min() == 255 and found[2, 1:].max() == 0


def test_files_that_are_left_out_are_counted(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    (tmp_path / "a" / "2.gif").write_bytes(b"GIF89a")
    (tmp_path / "b" / ".hidden").write_text("x")
    assert [len(files) for files in image_formats.list_pictures(tmp_path)] == [1, 1]
    out = capsys.readouterr().out
    assert "1 files are left out" in out and str(tmp_path / "b") not in out


def test_an_empty_path_is_no_path():
    with pytest.raises(SettingsError, match="--data_path is empty"):
        load_images(None, "")
