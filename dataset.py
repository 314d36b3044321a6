"""Polish text as packed token windows: generated sample, plwiki, or local files, tokenised once and memory-mapped.

    python dataset.py                                                 the built-in sample: documents and tokens
    python dataset.py --dataset_path folder_of_files --vocab_size 32000
    python dataset.py --dataset_name plwiki --tokenizer_type transformers     (uv sync --extra plwiki; downloads)

Documents are split 80/10/10 with a seed of their own, then each split is one long row of tokens with an end-of-text
token after every document, so no window reaches across splits and none is padded. The rows are kept as uint16 or uint32
files in a cache named by a hash of everything that made them (text, split, tokenizer); a damaged one is found by its
checksum and made again. A training batch is one gather from the memory map.

`sample` is made by this project's generator (sample_documents.py) and is no real Wikipedia; numbers from it say so.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from documents import Source, local_source, plwiki_hf_source, plwiki_source, sample_source
from utils import SettingsError, parse_settings, run_script, setting

SPLITS = ("train", "validation", "test")
DATASET_NAMES = ("sample", "plwiki", "plwiki_hf")
DEFAULT_TOKENIZER = "speakleash/Bielik-4.5B-v3"
END_OF_TEXT = "<|endoftext|>"
CACHE_FORMAT = 1  # raise when the files or the packing change, so that old caches are not used


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class TextTokenizer:
    """A tokenizer of either kind behind three things: its size, its end-of-text id, and encoding many texts at once."""

    description: str
    size: int
    end_of_text_id: int
    encode: Callable[[list[str]], list[list[int]]]


def load_pretrained_tokenizer(name: str) -> TextTokenizer:
    """A tokenizer by hub name or from a folder, through transformers; no code from the hub is run.

    Raises:
        SettingsError: not found (or no network), or without an end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(
            f"--tokenizer {name} could not be loaded ({reason}); without a network give the path of a tokenizer's "
            "folder, or use --tokenizer_type bpe"
        ) from None
    if tokenizer.eos_token_id is None:
        raise SettingsError(f"--tokenizer {name} has no end-of-text token")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.encode_special_tokens = True  # "</s>" in a document is text, not an end of text

    def encode(texts: list[str]) -> list[list[int]]:
        if backend is not None:  # all cores, and no copy of offsets and masks
            return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    end = tokenizer.eos_token_id
    return TextTokenizer(f"transformers {name} (sha256 {digest[:12]}, end of text {end})", len(tokenizer), end, encode)


def train_bpe(texts: list[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer: any text can be encoded. Source: Sennrich et al. 2016, arXiv 1508.07909."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap_bpe(tokenizer: Any) -> TextTokenizer:
    """A tokenizer of `train_bpe` as a TextTokenizer."""
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document is text, not an end of text
    return TextTokenizer(
        f"byte-level BPE trained on the training split, {tokenizer.get_vocab_size():,} entries",
        tokenizer.get_vocab_size(),
        tokenizer.token_to_id(END_OF_TEXT),
        lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)],
    )


# --------------------------------------------------------------------------------------------------------------------
# Token files
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class TokenSplit:
    """One split: a long row of token ids (memory-mapped), and the UTF-8 bytes of text they stand for."""

    name: str
    tokens: np.ndarray  # (tokens,) uint16 or uint32
    num_bytes: int
    num_documents: int

    def num_windows(self, context_length: int) -> int:
        """Windows of context_length inputs whose targets (shifted by one) are all there."""
        return max(0, (len(self.tokens) - 1) // context_length)

    def order(self, context_length: int, seed: int, epoch: int) -> np.ndarray:
        """The numbers of all windows in the order of epoch 0, 1, ...; the same for the same seed and epoch."""
        return np.random.default_rng((seed, epoch)).permutation(self.num_windows(context_length))

    def batch(
        self, windows: np.ndarray, context_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the numbered windows, each (windows, context_length) int64 on the device."""
        places = windows[:, None] * context_length + np.arange(context_length + 1)  # (windows, context + 1)
        return self._to_device(self.tokens[places], device)

    def tail(self, context_length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What is left after the last whole window, as one shorter window (1, rest); None if nothing is."""
        begin = self.num_windows(context_length) * context_length
        if len(self.tokens) - begin < 2:
            return None
        return self._to_device(self.tokens[None, begin:], device)

    @staticmethod
    def _to_device(rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(rows.astype(np.int64))  # (windows, context + 1)
        if device.type == "cuda":
            ids = ids.pin_memory().to(device, non_blocking=True)
        return ids[:, :-1], ids[:, 1:]


@dataclass
class TextData:
    """The three splits and what made them."""

    splits: dict[str, TokenSplit]
    description: dict[str, Any]  # for run.json: name, description, generated, documents, tokens, cache key
    tokenizer: dict[str, Any]  # for run.json: description, size
    document_lengths: np.ndarray  # (documents,) tokens in each document


def load_text_data(
    *,
    dataset_name: str | None = None,
    dataset_path: str | None = None,
    max_documents: int | None = None,
    split_seed: int = 0,
    tokenizer_type: str = "bpe",
    tokenizer: str | None = None,
    vocab_size: int = 2048,
    cache_folder: str = ".cache/tokens",
    progress: bool = True,
) -> TextData:
    """Splits of packed tokens, from the cache or made now.

    Args:
        dataset_name: sample (the default), plwiki or plwiki_hf.
        dataset_path: a file or folder instead of a named data set.
        max_documents: at most this many (default: 2,000 of sample, 100,000 of plwiki and plwiki_hf, else all).
        split_seed: decides which documents are in which split.
        tokenizer_type: "bpe" trains one on the training split; "transformers" loads `tokenizer`.
        tokenizer: hub name or folder for "transformers".
        vocab_size: entries of the BPE, and the most that any tokenizer may have.
        cache_folder: where token files are kept.

    Raises:
        SettingsError: whatever is wrong with the input, in one sentence naming the setting.
    """
    if dataset_path is not None and dataset_name is not None:
        raise SettingsError("--dataset_name and --dataset_path exclude each other; give one of them")
    dataset_name = dataset_name or "sample"
    if dataset_path is None and dataset_name not in DATASET_NAMES:
        raise SettingsError(f"--dataset_name {dataset_name} is unknown; choose one of {', '.join(DATASET_NAMES)}")
    if max_documents is None and dataset_path is None:
        max_documents = 2_000 if dataset_name == "sample" else 100_000
    if max_documents is not None and max_documents < 3:
        raise SettingsError("--max_documents must be at least 3, one for each split")
    if split_seed < 0:
        raise SettingsError(f"--split_seed must be at least 0, not {split_seed}")
    if tokenizer_type == "bpe" and tokenizer is not None:
        raise SettingsError("--tokenizer has no effect with --tokenizer_type bpe; use --tokenizer_type transformers")
    if tokenizer_type == "bpe" and vocab_size < 257:
        raise SettingsError(f"--vocab_size {vocab_size} is too small for a byte-level BPE: 256 bytes and end of text")

    if dataset_path is not None:
        source = local_source(dataset_path)
    elif dataset_name == "sample":
        source = sample_source(max_documents)
    else:
        source = plwiki_source() if dataset_name == "plwiki" else plwiki_hf_source()
    pretrained = None
    if tokenizer_type == "transformers":
        pretrained = load_pretrained_tokenizer(tokenizer or DEFAULT_TOKENIZER)
        check_vocabulary(pretrained, vocab_size)
    made_by = {
        "format": CACHE_FORMAT,
        "source": source.identity,
        "max_documents": max_documents,
        "split_seed": split_seed,
        "tokenizer": pretrained.description if pretrained else f"bpe {vocab_size}",
    }
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache_folder) / key
    meta = read_cache(folder, made_by)
    if meta is None:
        try:
            build_cache(folder, source, made_by, pretrained, vocab_size, max_documents, split_seed, progress)
        except OSError as error:
            raise SettingsError(f"--cache_folder {cache_folder}: writing failed ({error.strerror})") from None
        meta = read_cache(folder, made_by)
        if meta is None:
            raise SettingsError(f"--cache_folder {cache_folder}: what was just written reads back differently")
    splits = {
        name: TokenSplit(
            name,
            np.memmap(folder / f"{name}.bin", dtype=meta["dtype"], mode="r"),
            meta["splits"][name]["bytes"],
            meta["splits"][name]["documents"],
        )
        for name in SPLITS
    }
    description = {
        "name": source.name,
        "description": source.description,
        "generated": source.generated,
        "split_seed": split_seed,
        "cache_key": key,
        "splits": {
            name: {"documents": split.num_documents, "tokens": len(split.tokens), "bytes": split.num_bytes}
            for name, split in splits.items()
        },
    }
    lengths = np.load(folder / "document_lengths.npy", allow_pickle=False)
    return TextData(splits, description, meta["tokenizer"], lengths)


def check_vocabulary(tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Raise unless every token id is below the model's vocabulary."""
    if tokenizer.size > vocab_size:
        raise SettingsError(
            f"--tokenizer has {tokenizer.size:,} entries, more than the model's --vocab_size {vocab_size:,}; "
            f"set --vocab_size {tokenizer.size}"
        )


def read_cache(folder: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """The cache's description if it is whole and made by the same things; else None, and a damaged one is removed."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        whole = meta.pop("crc32") == checksum_of(meta) and meta["made_by"] == made_by
        if whole and all(
            zlib.crc32((folder / name).read_bytes()) == checksum for name, checksum in meta["checksums"].items()
        ):
            return meta
    except (OSError, ValueError, KeyError, TypeError):
        pass
    print(f"token cache {folder} is damaged or foreign: making it again")
    shutil.rmtree(folder, ignore_errors=True)
    return None


def checksum_of(meta: dict[str, Any]) -> int:
    """CRC-32 of a cache's own description."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def split_documents(count: int, seed: int) -> dict[str, np.ndarray]:
    """Document numbers of each split, shuffled: 10 % test, 10 % validation (at least one each), the rest train."""
    order = np.random.default_rng(seed).permutation(count)
    held_out = max(1, count // 10)
    return {
        "test": order[:held_out],
        "validation": order[held_out : 2 * held_out],
        "train": order[2 * held_out :],
    }


def build_cache(
    folder: Path,
    source: Source,
    made_by: dict[str, Any],
    tokenizer: TextTokenizer | None,
    vocab_size: int,
    max_documents: int | None,
    split_seed: int,
    progress: bool,
) -> None:
    """Read, split, tokenise and write everything to a temporary folder, then rename it to `folder`."""
    documents = list(
        islice(
            tqdm(
                (text for text in source.read() if text.strip()),
                desc="reading documents",
                unit="",
                disable=not progress,
                leave=False,
            ),
            max_documents,
        )
    )
    if len(documents) < 3:
        raise SettingsError(
            f"{source.flag}: {len(documents)} documents with text, but at least 3 are needed, one for each split"
        )
    split = split_documents(len(documents), split_seed)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        if tokenizer is None:
            bpe = train_bpe([documents[i] for i in split["train"]], vocab_size)
            bpe.save(str(temporary / "tokenizer.json"))
            tokenizer = wrap_bpe(bpe)
        dtype = "uint16" if tokenizer.size <= 2**16 else "uint32"
        lengths = np.zeros(len(documents), dtype=np.int64)
        meta: dict[str, Any] = {
            "made_by": made_by,
            "dtype": dtype,
            "tokenizer": {"description": tokenizer.description, "size": tokenizer.size},
            "splits": {},
            "checksums": {},
        }
        with tqdm(total=len(documents), desc="tokenising", unit="doc", disable=not progress, leave=False) as bar:
            for name in SPLITS:
                num_bytes = 0
                with (temporary / f"{name}.bin").open("wb") as file:
                    for group in grouped(split[name], documents):
                        texts = [documents[i] for i in group]
                        for i, ids in zip(group, tokenizer.encode(texts), strict=True):
                            lengths[i] = len(ids)
                            num_bytes += len(documents[i].encode())
                            np.asarray([*ids, tokenizer.end_of_text_id], dtype=dtype).tofile(file)
                        bar.update(len(group))
                meta["splits"][name] = {"documents": len(split[name]), "bytes": num_bytes}
        np.save(temporary / "document_lengths.npy", lengths)
        for file in sorted(temporary.iterdir()):
            meta["checksums"][file.name] = zlib.crc32(file.read_bytes())
        meta["crc32"] = checksum_of(meta)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
        with suppress(OSError):  # another process may have been faster; its files are the same
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def grouped(numbers: np.ndarray, documents: list[str], characters: int = 4_000_000) -> Iterator[list[int]]:
    """Document numbers in groups of about `characters`: enough work for every core, little memory."""
    group: list[int] = []
    size = 0
    for number in numbers:
        group.append(int(number))
        size += len(documents[number])
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Settings of `python dataset.py`."""

    dataset_name: str | None = setting(None, "sample (the default), plwiki or plwiki_hf")
    dataset_path: str | None = setting(
        None, "a .txt, .jsonl or .parquet file (plain, .gz, .xz, .zst) or a folder of them"
    )
    max_documents: int | None = setting(None, "at most this many documents")
    split_seed: int = setting(0, "decides which documents are in which split")
    tokenizer_type: str = setting(
        "bpe", "bpe: trained on the training split; transformers: --tokenizer", ["bpe", "transformers"]
    )
    tokenizer: str | None = setting(None, f"hub name or folder (default {DEFAULT_TOKENIZER})")
    vocab_size: int = setting(2048, "entries of the BPE, the most any tokenizer may have")
    cache_folder: str = setting(".cache/tokens", "where token files are kept")


def main() -> int:
    """Make or load the token files and print what is in them."""
    data = load_text_data(**vars(parse_settings(Settings)))
    print(f"{data.description['description']}; {data.tokenizer['description']}")
    print(f"{'split':<12}{'documents':>10}{'tokens':>13}{'bytes a token':>15}")
    for name, split in data.splits.items():
        rate = split.num_bytes / max(1, len(split.tokens))
        print(f"{name:<12}{split.num_documents:>10,}{len(split.tokens):>13,}{rate:>15.2f}")
    middle, long = np.percentile(data.document_lengths, [50, 95])
    print(f"tokens a document: median {middle:.0f}, 95th percentile {long:.0f}, longest {data.document_lengths.max()}")
    return 0


if __name__ == "__main__":
    run_script(main)
