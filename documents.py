"""Where documents come from: the generated sample, Polish Wikipedia through `datasets`, and local files of many kinds.

dataset.py splits, tokenises and packs them.
"""

import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow

import polish_grammar
import sample_articles
import sample_documents
from utils import SettingsError

FILE_TYPES = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")


@dataclass
class Source:
    """Where documents come from: `identity` names them for the cache, `read` yields their texts."""

    name: str
    flag: str  # the setting that chose it, with its value, for error sentences
    description: str
    generated: bool
    identity: dict[str, Any]
    read: Callable[[], Iterator[str]]


def sample_source(count: int) -> Source:
    """Documents of the project's own generator."""
    files = (Path(module.__file__) for module in (polish_grammar, sample_articles, sample_documents))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return Source(
        "sample",
        "--dataset_name sample",
        f"{count:,} generated documents (built-in sample, no real text)",
        True,
        {"generator": code},
        lambda: sample_documents.generate_documents(count),
    )


def plwiki_source() -> Source:
    """plwiki of SpeakLeash, documents whose quality is HIGH (package speakleash; downloads on first use)."""
    try:
        from speakleash import Speakleash
    except ImportError:
        raise SettingsError(
            "--dataset_name plwiki needs the package speakleash: install it with `uv sync --extra plwiki`, "
            "or use --dataset_name plwiki_hf"
        ) from None

    def read() -> Iterator[str]:
        problem = "--dataset_name plwiki could not be downloaded from SpeakLeash"
        try:
            found = Speakleash(str(Path(".cache") / "speakleash"), lang="pl").get("plwiki")
            documents = None if found is None else found.ext_data
        except Exception as error:  # the package passes on whatever its HTTP client raises
            raise SettingsError(f"{problem}: {' '.join(str(error).split())[:200]}") from None
        if documents is None:  # what the package returns where a download failed
            raise SettingsError(f"{problem}; is there a network?")
        with_quality = 0
        iterator = iter(documents)
        while True:
            try:
                text, meta = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                raise SettingsError(f"{problem}: {' '.join(str(error).split())[:200]}") from None
            with_quality += "quality" in meta
            if meta.get("quality") == "HIGH":
                yield text
        if not with_quality:
            raise SettingsError("--dataset_name plwiki: its documents carry no quality class, so none can be chosen")

    description = "plwiki by SpeakLeash, quality HIGH"
    return Source("plwiki", "--dataset_name plwiki", description, False, {"speakleash": "plwiki HIGH"}, read)


def plwiki_hf_source() -> Source:
    """Polish Wikipedia of 2023-11-01 from the Hugging Face hub (streamed)."""

    def read() -> Iterator[str]:
        from datasets import load_dataset

        try:
            for row in load_dataset("wikimedia/wikipedia", "20231101.pl", split="train", streaming=True):
                yield row["text"]
        except (OSError, ValueError, RuntimeError) as error:
            raise SettingsError(
                f"--dataset_name plwiki_hf could not be loaded from the hub: {' '.join(str(error).split())[:300]}"
            ) from None

    description = "wikimedia/wikipedia 20231101.pl"
    return Source("plwiki_hf", "--dataset_name plwiki_hf", description, False, {"hub": description}, read)


def file_type(path: Path) -> str | None:
    """.txt, .jsonl or .parquet, whatever the compression; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FILE_TYPES else None


@contextmanager
def open_decompressed(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a plain, .gz, .xz or .zst file for reading bytes."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        opener: Any = partial(pyarrow.input_stream, compression="zstd")  # unlike others, it reports a missing end
    else:
        opener = partial({".gz": gzip.open, ".xz": lzma.open}.get(suffix, open), mode="rb")
    with opener(str(path)) as file:
        yield file


def read_file(path: Path, *, whole: bool) -> Iterator[str]:
    """Yield the documents of one file.

    A .jsonl line and a .parquet row are a document each (field `text`). A .txt file is one document if `whole`, else
    its blocks separated by blank lines are documents.

    Raises:
        SettingsError: bytes that are no UTF-8, a line that is no JSON, no field `text`, or a damaged file.
    """
    name = f"--dataset_path: {path}"
    try:
        with open_decompressed(path) as file:
            if file_type(path) == ".txt":
                text = file.read().decode("utf-8-sig")
                yield from [text] if whole else (block for block in text.replace("\r\n", "\n").split("\n\n"))
            elif file_type(path) == ".jsonl":
                for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n"), start=1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
                    except ValueError:
                        raise SettingsError(f"{name}: line {number} is not JSON that holds text") from None
                    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                        raise SettingsError(f"{name}: line {number} has no field `text` that holds text")
                    yield row["text"]
            else:
                yield from read_parquet(name, file, compressed=path.suffix.lower() in COMPRESSIONS)
    except UnicodeDecodeError as error:
        raise SettingsError(f"{name}: bytes near {error.start} are not UTF-8 ({error.reason})") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise SettingsError(f"{name} cannot be read: {' '.join(str(error).split())}") from None


def read_parquet(name: str, file: Any, *, compressed: bool) -> Iterator[str]:
    """Yield the column `text` of a parquet file."""
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(file.read()) if compressed else file)
        if "text" not in table.schema_arrow.names:
            raise SettingsError(f"{name} has no column `text`, only {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(batch_size=1024, columns=["text"]):
            for value in batch.column(0).to_pylist():
                if not isinstance(value, str):
                    raise SettingsError(f"{name}: its column `text` holds values that are not text")
                yield value
    except pyarrow.ArrowInvalid as error:
        raise SettingsError(f"{name} is not a parquet file: {' '.join(str(error).split())[:200]}") from None


def local_source(path_text: str) -> Source:
    """Documents of a file or of all .txt, .jsonl and .parquet files below a folder, in name order.

    Raises:
        SettingsError: nothing there, an unknown kind of file, or no usable file in the folder.
    """
    path = Path(path_text)
    if not path.exists():
        raise SettingsError(f"--dataset_path {path} does not exist")
    kinds = ", ".join(FILE_TYPES) + " (plain, " + ", ".join(COMPRESSIONS) + ")"
    files = sorted(p for p in path.rglob("*") if p.is_file() and file_type(p)) if path.is_dir() else [path]
    if not files or file_type(files[0]) is None:
        raise SettingsError(f"--dataset_path {path} has no file of a kind that can be read: {kinds}")
    identity = {}
    for file in files:
        try:
            with file.open("rb") as opened:
                name = str(file.relative_to(path)) if path.is_dir() else file.name
                identity[name] = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise SettingsError(f"--dataset_path: {file} cannot be read: {error.strerror}") from None

    def read() -> Iterator[str]:
        for file in files:
            yield from read_file(file, whole=path.is_dir())

    names = ", ".join(file.name for file in files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
    identity = {"files": identity, "folder": path.is_dir()}
    return Source("local files", f"--dataset_path {path}", f"local files: {names}", False, identity, read)
