"""dataset.py: documents from every kind of file, split and packed without loss, cached safely; errors are sentences."""

import errno
import gzip
import io
import json
import lzma
import shutil
import socket
import sys
from pathlib import Path
from types import ModuleType

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import dataset
import documents
from dataset import TextTokenizer, TokenSplit, load_text_data, split_documents, train_bpe
from documents import local_source
from utils import SettingsError

CPU = torch.device("cpu")
DOCUMENTS = [f"Żółw nr {i}, rok {1900 + i}.\nMa {i * i} łat i\t„{i % 7}” braci." for i in range(40)]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}
VOCAB_SIZE = 300


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def connect(*args):
        raise OSError(errno.ENETUNREACH, "a test tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def load(tmp_path):
    """load_text_data with a small BPE and a cache of its own."""

    def call(path: Path | None = None, **settings) -> dataset.TextData:
        settings = {"vocab_size": VOCAB_SIZE, "cache_folder": str(tmp_path / "cache"), "progress": False} | settings
        return load_text_data(dataset_path=None if path is None else str(path), **settings)

    return call


def parquet_bytes(**columns) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def file_bytes(name: str, documents: list[str]) -> bytes:
    """What a file of this name holds, compressed by its last suffix."""
    kind = next(kind for kind in (".txt", ".jsonl", ".parquet") if kind in name)
    if kind == ".parquet":
        content = parquet_bytes(id=list(range(len(documents))), text=documents)
    elif kind == ".jsonl":
        lines = [json.dumps({"id": i, "text": text}, ensure_ascii=False) for i, text in enumerate(documents)]
        content = "\n".join(lines).encode()
    else:
        content = "\n\n".join(documents).encode()
    return COMPRESS[Path(name).suffix if Path(name).suffix in COMPRESS else ""](content)


def write(path: Path, documents: list[str] = DOCUMENTS) -> Path:
    path.write_bytes(file_bytes(path.name, documents))
    return path


@pytest.fixture
def text_file(tmp_path) -> Path:
    return write(tmp_path / "documents.txt")


def refused(call, *parts: str) -> None:
    """The call raises a SettingsError of one line that holds these parts."""
    with pytest.raises(SettingsError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and "(None)" not in message
    for part in parts:
        assert part in message


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, kind, compression):
    assert list(local_source(str(write(tmp_path / f"documents.v1{kind}{compression}"))).read()) == DOCUMENTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_folder_of_text_files_has_one_document_a_file(tmp_path, compression):
    documents = [f"{text}\n\nDrugi akapit." for text in DOCUMENTS[:4]]
    (tmp_path / "b").mkdir()
    for name, text in zip(["a", "b/a", "b/b", "c"], documents, strict=True):
        write(tmp_path / f"{name}.txt{compression}", [text])
    (tmp_path / "notes.md").write_text("no document")
    assert sorted(local_source(str(tmp_path)).read()) == sorted(documents)
    assert list(local_source(str(tmp_path)).read()) == list(local_source(str(tmp_path)).read())


@pytest.mark.parametrize("compression", COMPRESS)
def test_file_put_together_from_two_compressed_ones(tmp_path, compression):
    parts = [file_bytes(f"a.jsonl{compression}", DOCUMENTS[:10]), COMPRESS[compression](b"\n")]
    parts.append(file_bytes(f"a.jsonl{compression}", DOCUMENTS[10:]))
    (tmp_path / f"a.jsonl{compression}").write_bytes(b"".join(parts))
    assert list(local_source(str(tmp_path / f"a.jsonl{compression}")).read()) == DOCUMENTS


def test_folder_of_mixed_files(tmp_path):
    write(tmp_path / "a.parquet", DOCUMENTS[:10])
    write(tmp_path / "b.jsonl.gz", DOCUMENTS[10:30])
    for i in range(30, 40):
        write(tmp_path / f"c{i}.txt", [DOCUMENTS[i]])
    assert list(local_source(str(tmp_path)).read()) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "\ufeffa\r\n\r\nb\r\nb\r\n\r\n\r\n\r\nc\r\n", ["a", "b\nb", "c"]),
        ("a.jsonl", '\ufeff{"text": "a"}\r\n\r\n  \n{"text": "b\\n\\nb"}\n{"text": "c", "x": 1}', ["a", "b\n\nb", "c"]),
        ("a.jsonl", '{"text": "a\u2028a"}\n{"text": "b\x85b"}\n', ["a\u2028a", "b\x85b"]),
    ],
    ids=["txt with carriage returns", "jsonl with blank lines", "jsonl with unicode line separators"],
)
def test_line_ends(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert [text.strip() for text in local_source(str(tmp_path / name)).read() if text.strip()] == expected


GOOD_LINE = b'{"text": "a"}\n'
LONG = [f"{text} {np.random.default_rng(i).bytes(300).hex()}" for i, text in enumerate(DOCUMENTS)]
TRUNCATED = ["a.txt.gz", "a.txt.xz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.parquet.zst"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", None, "does not exist"),
        ("a.pdf", b"%PDF", "no file of a kind that can be read: .txt, .jsonl, .parquet"),
        ("a.txt.bz2", b"BZh", "no file of a kind that can be read: .txt, .jsonl, .parquet"),
        ("a.gz", b"", "no file of a kind that can be read: .txt, .jsonl, .parquet"),
        *[(f"a.{end}", b"", "") for end in ("txt", "jsonl", "parquet", "txt.gz", "txt.xz", "txt.zst", "parquet.gz")],
        ("a.txt", b"a\n\nb", "2 documents"),
        ("a.txt", b"a\n\n \n\n\n\nb\n\n", "2 documents"),
        ("a.jsonl", GOOD_LINE * 2 + b'\n{"title": "a"}', "line 4 has no field `text`"),
        ("a.jsonl", GOOD_LINE * 2 + b'{"text": 3}', "line 3 has no field `text`"),
        ("a.jsonl", GOOD_LINE * 2 + b'["text"]', "line 3 has no field `text`"),
        ("a.jsonl", GOOD_LINE * 2 + b'{"text": "a"', "line 3 is not JSON"),
        ("a.jsonl", GOOD_LINE * 4 + rb'{"text": "half a pair \ud800"}', "line 5"),
        ("a.jsonl", GOOD_LINE * 9 + b'{"text": "\xff"}', "not UTF-8"),
        ("a.txt", "Łódź\n\n".encode("utf-16") * 9, "not UTF-8"),
        ("a.txt", "Łódź\n\n".encode("cp1250") * 9, "not UTF-8"),
        ("a.txt.zst", COMPRESS[".zst"]("Łódź\n\n".encode("cp1250") * 9), "not UTF-8"),
        *[(name, file_bytes(name, LONG)[:-cut], "") for name in TRUNCATED for cut in (1, 4000)],
        *[(f"a.txt{end}", b"not compressed", "cannot be read") for end in (".gz", ".xz", ".zst")],
        ("a.parquet", parquet_bytes(id=[1, 2, 3], body=["a", "b", "c"]), "no column `text`, only id, body"),
        ("a.parquet", parquet_bytes(text=[1, 2, 3]), "column `text` holds values that are not text"),
        ("a.parquet", parquet_bytes(text=["a", None, "c"]), "column `text` holds values that are not text"),
        ("a.parquet", b"not parquet", "is not a parquet file"),
        ("a.parquet.gz", gzip.compress(b"not parquet" * 9), "is not a parquet file"),
    ],
)
def test_bad_file_is_one_sentence(tmp_path, load, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(lambda: load(tmp_path / name), "--dataset_path", name, reason)
    assert not list(tmp_path.glob("cache/*"))


def test_folder_without_a_usable_file(tmp_path, load):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.pdf").write_text("a")
    refused(lambda: load(tmp_path / "documents"), "--dataset_path", "no file of a kind")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"dataset_name": "sample", "dataset_path": "a.txt"}, ["--dataset_name", "--dataset_path", "exclude"]),
        ({"dataset_name": "wiki"}, ["--dataset_name wiki is unknown", "sample, plwiki, plwiki_hf"]),
        ({"max_documents": 2}, ["--max_documents", "at least 3"]),
        ({"tokenizer": "gpt2"}, ["--tokenizer ", "--tokenizer_type bpe"]),
        ({"vocab_size": 256}, ["--vocab_size 256", "too small"]),
        ({"tokenizer_type": "transformers"}, ["--tokenizer speakleash/Bielik", "could not be loaded", "bpe"]),
        (
            {"tokenizer_type": "transformers", "tokenizer": "none/here"},
            ["--tokenizer none/here", "could not be loaded"],
        ),
    ],
)
def test_wrong_setting_is_one_sentence(tmp_path, settings, parts):
    refused(lambda: load_text_data(cache_folder=str(tmp_path), progress=False, **settings), *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", [".", "deeper"])
def test_file_in_the_place_of_the_cache_folder(tmp_path, text_file, load, below):
    (tmp_path / "taken").write_text("")
    folder = str(tmp_path / "taken" / below)
    refused(lambda: load(text_file, cache_folder=folder), f"--cache_folder {folder}", "Not a directory")


# --- splits and packing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("count", "held_out"), [(3, 1), (10, 1), (19, 1), (20, 2), (99, 9), (1000, 100)], ids=lambda value: str(value)
)
def test_split_is_80_10_10_and_disjoint(count, held_out, seed):
    split = split_documents(count, seed)
    sizes = {name: len(numbers) for name, numbers in split.items()}
    assert sizes == {"test": held_out, "validation": held_out, "train": count - 2 * held_out}
    assert sorted(np.concatenate(list(split.values()))) == list(range(count))
    assert all(np.array_equal(numbers, split_documents(count, seed)[name]) for name, numbers in split.items())
    if count > 3:
        assert split["test"].tolist() != split_documents(count, seed + 2)["test"].tolist()


@pytest.mark.parametrize("split_seed", [0, 5])
def test_tokens_are_the_documents_joined_by_end_of_text(tmp_path, text_file, load, split_seed):
    data = load(text_file, split_seed=split_seed)
    bpe = Tokenizer.from_file(str(tmp_path / "cache" / data.description["cache_key"] / "tokenizer.json"))
    end = bpe.token_to_id(dataset.END_OF_TEXT)
    numbers = split_documents(len(DOCUMENTS), split_seed)
    assert [data.description["splits"][name]["documents"] for name in dataset.SPLITS] == [32, 4, 4]
    for name, split in data.splits.items():
        assert split.tokens[-1] == end and split.tokens.dtype == np.uint16
        ends = np.flatnonzero(split.tokens == end)
        documents = [ids[ids != end] for ids in np.split(split.tokens, ends + 1)[:-1]]
        assert bpe.decode_batch(documents) == [DOCUMENTS[i] for i in numbers[name]]
        assert [len(ids) for ids in documents] == data.document_lengths[numbers[name]].tolist()
        assert split.num_bytes == sum(len(DOCUMENTS[i].encode()) for i in numbers[name])
        assert data.description["splits"][name]["tokens"] == len(split.tokens)


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 12])
@pytest.mark.parametrize("context_length", [1, 2, 5, 10, 20])
def test_windows_and_tail_predict_every_token_but_the_first_once(length, context_length):
    tokens = np.arange(100, 100 + length, dtype=np.uint16)
    split = TokenSplit("test", tokens, 0, 1)
    windows = split.num_windows(context_length)
    inputs, targets = split.batch(np.arange(windows), context_length, CPU)
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (windows, context_length)
    tail = split.tail(context_length, CPU)
    tail_inputs, tail_targets = (torch.empty(1, 0), torch.empty(1, 0)) if tail is None else tail
    assert len(tail_inputs) == 1 and tail_inputs.numel() < context_length
    assert torch.cat([inputs.flatten(), tail_inputs.flatten()]).tolist() == tokens[:-1].tolist()
    assert torch.cat([targets.flatten(), tail_targets.flatten()]).tolist() == tokens[1:].tolist()


def test_batch_gathers_the_windows_in_the_order_asked():
    split = TokenSplit("train", np.arange(50, dtype=np.uint32), 0, 1)
    inputs, targets = split.batch(np.array([3, 0]), 4, CPU)
    assert inputs.tolist() == [[12, 13, 14, 15], [0, 1, 2, 3]]
    assert targets.tolist() == [[13, 14, 15, 16], [1, 2, 3, 4]]


@pytest.mark.parametrize("documents", [3, 7])
def test_max_documents(text_file, load, documents):
    for source in ({"path": text_file}, {"dataset_name": "sample"}):
        splits = load(**source, max_documents=documents).description["splits"]
        assert sum(split["documents"] for split in splits.values()) == documents


def test_sample_is_deterministic_and_says_that_it_is_generated(tmp_path, text_file, load):
    first, second = (load(max_documents=30, cache_folder=str(tmp_path / name)) for name in "ab")
    assert first.description == second.description and first.description["generated"] is True
    assert "30 generated documents" in first.description["description"]
    for name in dataset.SPLITS:
        assert np.array_equal(first.splits[name].tokens, second.splits[name].tokens)
    assert load(text_file).description["generated"] is False


# --- tokenizers -------------------------------------------------------------------------------------------------------


def save_tokenizer(folder: Path, vocab_size: int = 320, eos: str | None = dataset.END_OF_TEXT) -> str:
    bpe = train_bpe(DOCUMENTS, vocab_size)
    bpe.add_special_tokens(["<other>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos).save_pretrained(folder)
    return str(folder)


def test_tokenizer_from_a_folder(tmp_path, text_file, load):
    folder = save_tokenizer(tmp_path / "tokenizer")
    data = load(text_file, tokenizer_type="transformers", tokenizer=folder, vocab_size=400)
    bpe = Tokenizer.from_file(f"{folder}/tokenizer.json")
    expected = [id for i in split_documents(40, 0)["validation"] for id in [*bpe.encode(DOCUMENTS[i]).ids, 0]]
    assert data.splits["validation"].tokens.tolist() == expected
    assert data.tokenizer["size"] == 321 and folder in data.tokenizer["description"]


def test_another_end_of_text_token_makes_another_cache(tmp_path, text_file, load):
    folder, tokens = tmp_path / "tokenizer", []
    for eos in (dataset.END_OF_TEXT, "<other>"):
        data = load(text_file, tokenizer_type="transformers", tokenizer=save_tokenizer(folder, eos=eos), vocab_size=400)
        tokens.append(int(data.splits["train"].tokens[-1]))
    assert tokens == [0, 320]


@pytest.mark.parametrize(
    ("eos", "vocab_size", "parts"),
    [
        (None, 400, ["--tokenizer ", "no end-of-text token"]),
        (dataset.END_OF_TEXT, 320, ["--tokenizer has 321 entries", "--vocab_size 320", "set --vocab_size 321"]),
    ],
)
def test_unusable_tokenizer(tmp_path, text_file, load, eos, vocab_size, parts):
    folder = save_tokenizer(tmp_path / "tokenizer", eos=eos)
    refused(
        lambda: load(text_file, tokenizer_type="transformers", tokenizer=folder, vocab_size=vocab_size),
        *parts,
    )


def test_empty_folder_is_no_tokenizer(tmp_path, load):
    refused(
        lambda: load(tokenizer_type="transformers", tokenizer=str(tmp_path)),
        f"--tokenizer {tmp_path}",
        "could not be loaded",
    )


@pytest.mark.parametrize(("size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_width_of_token_files(text_file, load, monkeypatch, size, dtype):
    large = TextTokenizer("large", size, size - 1, lambda texts: [[0, size - 2] for _ in texts])
    monkeypatch.setattr(dataset, "wrap_bpe", lambda tokenizer: large)
    for _ in range(2):  # made, then read back
        tokens = load(text_file).splits["test"].tokens
        assert tokens.dtype == dtype and tokens.tolist() == [0, size - 2, size - 1] * 4


# --- cache ------------------------------------------------------------------------------------------------------------


def test_second_load_reads_no_document(text_file, load, monkeypatch):
    def unread(*args, **kwargs):
        raise AssertionError("documents were read again")

    first = load(text_file)
    monkeypatch.setattr(documents, "read_file", unread)
    monkeypatch.setattr(dataset, "train_bpe", unread)
    second = load(text_file)
    assert second.description == first.description and second.tokenizer == first.tokenizer
    assert np.array_equal(second.document_lengths, first.document_lengths)
    assert all(np.array_equal(second.splits[name].tokens, first.splits[name].tokens) for name in dataset.SPLITS)


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def change_meta(folder: Path, change) -> None:
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


DAMAGES = {
    "truncated": lambda folder: (folder / "test.bin").write_bytes((folder / "test.bin").read_bytes()[:-2]),
    "empty": lambda folder: (folder / "train.bin").write_bytes(b""),
    "flipped token": lambda folder: flip_byte(folder / "train.bin", 40),
    "flipped length": lambda folder: flip_byte(folder / "document_lengths.npy", -8),
    "missing split": lambda folder: (folder / "validation.bin").unlink(),
    "missing lengths": lambda folder: (folder / "document_lengths.npy").unlink(),
    "missing meta": lambda folder: (folder / "meta.json").unlink(),
    "foreign meta": lambda folder: change_meta(folder, lambda meta: meta["made_by"].update(split_seed=9)),
    "cut meta": lambda folder: (folder / "meta.json").write_bytes((folder / "meta.json").read_bytes()[:-9]),
    "other json": lambda folder: (folder / "meta.json").write_text("[]"),
    "no dtype": lambda folder: change_meta(folder, lambda meta: meta.pop("dtype")),
    "wrong dtype": lambda folder: change_meta(folder, lambda meta: meta.update(dtype="uint8")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_made_again(tmp_path, text_file, load, capsys, damage):
    first = load(text_file)
    expected = {name: split.tokens.tolist() for name, split in first.splits.items()}
    folder = tmp_path / "cache" / first.description["cache_key"]
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    DAMAGES[damage](folder)
    again = load(text_file)
    assert "damaged or foreign: making it again" in capsys.readouterr().out
    assert {name: split.tokens.tolist() for name, split in again.splits.items()} == expected
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    load(text_file)
    assert capsys.readouterr().out == ""


def test_every_change_makes_another_cache(tmp_path, text_file, load):
    write(tmp_path / "same.jsonl")
    (tmp_path / "same.txt").write_bytes((tmp_path / "same.jsonl").read_bytes().replace(b"\n", b"\n\n"))
    (tmp_path / "same.jsonl").write_bytes((tmp_path / "same.txt").read_bytes())  # other suffix, same bytes
    (tmp_path / "folder").mkdir()
    for i in range(3):
        shutil.copy(text_file, tmp_path / "folder" / f"{i}.txt")
    loads = [
        load(text_file),
        load(text_file, split_seed=1),
        load(text_file, vocab_size=VOCAB_SIZE + 1),
        load(text_file, max_documents=20),
        load(tmp_path / "folder"),
        load(tmp_path / "same.txt"),
        load(tmp_path / "same.jsonl"),
        load(write(text_file, [*DOCUMENTS[:-1], "inny"])),
        load(max_documents=20),
        load(max_documents=21),
    ]
    keys = [data.description["cache_key"] for data in loads]
    assert len(set(keys)) == len(keys)
    assert load(write(text_file)).description["cache_key"] == keys[0]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == set(keys)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), SettingsError),
        (RuntimeError("bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_failure_while_writing_leaves_no_folder(tmp_path, text_file, load, monkeypatch, error, raised):
    def fail(*args, **kwargs):
        assert list((tmp_path / "cache").iterdir())  # the temporary folder
        raise error

    with monkeypatch.context() as patch, pytest.raises(raised) as caught:
        patch.setattr(np, "save", fail)
        load(text_file)
    if raised is SettingsError:
        assert str(caught.value) == f"--cache_folder {tmp_path / 'cache'}: writing failed (No space left on device)"
    assert list((tmp_path / "cache").iterdir()) == []
    load(text_file)
    assert len(list((tmp_path / "cache").iterdir())) == 1


# --- plwiki -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def speakleash(monkeypatch):
    """Install a module with the interface of speakleash 0.3.51; `data` is what `ext_data` returns or raises."""

    def install(data) -> None:
        class SpeakleashDataset:
            @property
            def ext_data(self):
                if isinstance(data, Exception):
                    raise data
                return data

        class Speakleash:
            def __init__(self, replicate_dir=None, lang="pl"):
                assert lang == "pl"

            def get(self, name):
                return SpeakleashDataset() if name == "plwiki" and data != "no plwiki" else None

        module = ModuleType("speakleash")
        module.Speakleash = Speakleash
        monkeypatch.setitem(sys.modules, "speakleash", module)

    return install


def test_plwiki_takes_documents_of_high_quality(load, speakleash):
    qualities = ["HIGH", "LOW", "HIGH", "MEDIUM"]
    rows = [(f"{text}", {"quality": qualities[i % 4], "url": "x"}) for i, text in enumerate(DOCUMENTS)]
    speakleash([*iter(rows), ("without a class", {})])
    assert list(documents.plwiki_source().read()) == DOCUMENTS[::2]
    speakleash(iter(rows))
    data = load(dataset_name="plwiki", max_documents=15)
    assert data.description["name"] == "plwiki" and data.description["generated"] is False
    assert sum(split.num_documents for split in data.splits.values()) == 15


def broken_off(error: Exception):
    yield DOCUMENTS[0], {"quality": "HIGH"}
    raise error


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("no plwiki", ""),  # get() returns None, also without a network
        (None, "could not be downloaded"),  # ext_data returns None after an incomplete download
        (ConnectionError("Max retries exceeded"), "could not be downloaded"),
        (broken_off(OSError(errno.EIO, "Input/output error")), "Input/output error"),
        (broken_off(Exception("zstd decompress error")), "zstd decompress error"),
        ([(text, {"name": "a"}) for text in DOCUMENTS], "no quality class"),
        ([(text, {"quality": "LOW"}) for text in DOCUMENTS], "0 documents"),
    ],
    ids=["not found", "incomplete", "no network", "unreadable", "damaged", "no quality", "no high quality"],
)
def test_plwiki_errors_are_one_sentence(tmp_path, load, speakleash, data, reason):
    speakleash(data)
    refused(lambda: load(dataset_name="plwiki"), "--dataset_name plwiki", reason)
    assert not list(tmp_path.glob("cache/*"))


def test_plwiki_without_the_package(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "speakleash", None)
    refused(lambda: load(dataset_name="plwiki"), "--dataset_name plwiki", "uv sync --extra plwiki", "plwiki_hf")


def test_plwiki_hf_streams_the_hub_format(tmp_path, load, monkeypatch):
    numbers = [str(i) for i in range(len(DOCUMENTS))]
    path = tmp_path / "train-00000-of-00001.parquet"
    path.write_bytes(parquet_bytes(id=numbers, url=numbers, title=numbers, text=DOCUMENTS))
    load_dataset = datasets.load_dataset

    def load_local(name, config, *, split, streaming):
        assert (name, config, split, streaming) == ("wikimedia/wikipedia", "20231101.pl", "train", True)
        return load_dataset("parquet", data_files=str(path), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    assert list(documents.plwiki_hf_source().read()) == DOCUMENTS
    data = load(dataset_name="plwiki_hf", max_documents=20)
    assert data.description["name"] == "plwiki_hf" and data.description["generated"] is False
    assert sum(split.num_documents for split in data.splits.values()) == 20


def test_plwiki_hf_without_a_network(tmp_path, load):
    refused(lambda: load(dataset_name="plwiki_hf"), "--dataset_name plwiki_hf could not be loaded from the hub")
    assert not list(tmp_path.glob("cache/*"))


def test_main_prints_a_row_for_each_split(tmp_path, text_file, monkeypatch, capsys):
    words = f"--dataset_path {text_file} --cache_folder {tmp_path / 'cache'} --vocab_size {VOCAB_SIZE}"
    monkeypatch.setattr(sys, "argv", ["dataset.py", *words.split()])
    assert dataset.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("local files: documents.txt; byte-level BPE")
    assert [line.split()[:2] for line in lines[2:5]] == [["train", "32"], ["validation", "4"], ["test", "4"]]
