"""llm_train.py: every flag does what it says, a run can be stopped anywhere, and wrong input costs one sentence."""

import contextlib
import csv
import errno
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

import attention
import attention_support
import dataset
import llm_plan
import llm_step
import llm_train
import plot
import run_folder
import training_state
import transformer_based_llm
from dataset import TokenSplit
from memory_tracker import COLUMNS, MemoryTracker
from run_folder import StopRequest
from sample_documents import generate_documents
from transformer_based_llm import MODEL_SIZES, ModelConfig, TransformerLM
from utils import GIB, SettingsError, run_script

SCRIPT = Path(llm_train.__file__)
BASE = {
    "num_layers": 1, "embedding_dim": 32, "num_heads": 2, "context_length": 32, "vocab_size": 300,
    "max_documents": 20, "batch_size": 8, "max_steps": 6, "tracked_steps": 2, "measured_steps": 3, "device": "cpu",
}  # fmt: skip
STEP_KEYS = ["step", "tokens", "loss", "perplexity", "step_ms", "data_ms", "tokens_per_s", "mfu", "peak_gib"]
INNER_PHASES = {"forward_pass", "loss", "backward_pass", "optimizer_step"}


def flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@dataclass
class Run:
    """What one call of the script gave."""

    status: int
    stdout: str
    stderr: str
    path: Path | None  # of the run folder; None if there is none

    @property
    def info(self) -> dict:
        return json.loads((self.path / "run.json").read_text())

    @property
    def results(self) -> dict:
        return self.info["results"]

    @property
    def steps(self) -> list[dict]:
        return [json.loads(line) for line in (self.path / "steps.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.steps]

    @property
    def memory(self) -> list[dict[str, str]]:
        return read_csv(self.path / "memory.csv")

    @property
    def probes(self) -> list[tuple[int, str]]:
        return [(int(row["batch_size"]), row["status"]) for row in read_csv(self.path / "batch_size_search.csv")]

    @property
    def last_line(self) -> dict:
        return json.loads(self.stdout.splitlines()[-1])

    @property
    def has_checkpoint(self) -> bool:
        return (self.path / "checkpoint" / "state.safetensors").is_file()

    def peak(self, phase: str) -> float:
        return max(float(row["peak_allocated_gib"]) for row in self.memory if row["phase"] == phase)


def run_folder_in(output_folder: Path) -> Path | None:
    found = [path.parent for path in output_folder.rglob("run.json")]
    assert len(found) <= 1
    return found[0] if found else None


def call_script(argv: list[str]) -> tuple[int, str, str]:
    """`python llm_train.py ...` without a new process; leaves torch's and the signals' state as it was."""
    out, err = io.StringIO(), io.StringIO()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with (
        patch.object(sys, "argv", ["llm_train.py", *argv]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            with pytest.raises(SystemExit) as caught:
                run_script(llm_train.main)
        finally:
            torch.use_deterministic_algorithms(False)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    return caught.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, quick) -> Path:
    """A folder for everything: cache/ of tokens, files/ of inputs, a folder for each run."""
    root = tmp_path_factory.mktemp("llm_train")
    files = root / "files"
    files.mkdir()
    documents = list(generate_documents(20, seed=7))
    (files / "good.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (files / "empty.txt").write_text("")
    (files / "short.txt").write_text("a\n\nb\n\nc\n\nd")
    (files / "no_field.jsonl").write_text('{"title": "a"}\n')
    (files / "latin2.txt").write_bytes("zażółć gęślą jaźń".encode("iso-8859-2"))
    (files / "settings.yaml").write_text("seed: 3\nmax_steps: 2\n")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=dataset.train_bpe(documents, 290), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(files / "tokenizer")
    return root


@pytest.fixture(scope="module")
def train(workplace) -> Callable[..., Run]:
    """train(name=value, ...) runs BASE with these changes, train(resume=path, ...) goes on; only `figures` draws."""
    numbers = itertools.count()

    def train(**changes) -> Run:
        output_folder = workplace / f"run-{next(numbers)}"
        defaults = {"cache_folder": workplace / "cache", "output_folder": output_folder, "figures": False}
        settings = changes if "resume" in changes else BASE | defaults | changes
        status, out, err = call_script(flags(settings))
        path = settings["resume"] if "resume" in changes else run_folder_in(Path(settings["output_folder"]))
        return Run(status, out, err, path)

    return train


@pytest.fixture(scope="module")
def base(train) -> Run:
    run = train()
    assert run.status == 0, run.stderr
    return run


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """One thread is fastest for models this small, and another number of threads rounds otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    gc.freeze()  # a search collects garbage after every probe: nothing older than the test need be looked at
    yield
    torch.set_float32_matmul_precision(before)


# --- Flash attention and the largest batch ----------------------------------------------------------------------------


def test_flash_attention_at_the_largest_batch(workplace):
    """In a process of its own, with its pictures."""
    changes = {
        "memory_budget_gib": 0.004,
        "batch_size": None,
        "cache_folder": workplace / "cache",
        "output_folder": ".",
    }
    folder = workplace / "card"
    folder.mkdir()
    command = [sys.executable, str(SCRIPT), "--use_flash_attention", "true", "--adjust_batch_size", "true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *flags(BASE | changes)], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    run = Run(done.returncode, done.stdout, done.stderr, run_folder_in(folder))
    assert run.last_line == {"run": "llm/" + run.path.name, "status": "ok", **run.results}
    assert run.info["status"] == "ok"
    assert {path.name for path in run.path.iterdir()} == {
        "run.json", "steps.jsonl", "memory.csv", "batch_size_search.csv", "model_summary.txt", "loss_curve.png",
        "memory_per_phase.png", "text_length_distribution.png", "batch_size_search.png",
    }  # fmt: skip

    chosen = run.results["batch_size"]
    assert chosen == max(size for size, status in run.probes if status == "ok") > 8
    assert (chosen + 1, "oom") in run.probes  # so it was memory that ended the search, and no bound
    assert run.results["tokens_per_update"] == 32 * chosen == run.steps[0]["tokens"]
    assert run.peak("training_step") <= 0.004
    assert run.info["precision"] == "bf16"
    assert run.info["model"]["attention_backend"] == "sdpa_flash"
    assert "scaled_dot_product_flash_attention" in run.info["attention_kernel"]
    assert "attention_backend sdpa_flash (flash_attn needs an NVIDIA GPU)" in run.stdout


# --- A search ---------------------------------------------------------------------------------------------------------


def test_search_leaves_no_trace(train):
    searched = train(adjust_batch_size=True, memory_budget_gib=0.004, dropout=0.1)
    plain = train(batch_size=searched.results["batch_size"], dropout=0.1)
    assert searched.losses == plain.losses
    assert searched.results["test_loss"] == plain.results["test_loss"]


def test_search_settings(train):
    exact = train(adjust_batch_size=True, memory_budget_gib=0.004, max_steps=1)
    grown = train(adjust_batch_size=True, memory_budget_gib=0.004, max_steps=1, batch_size_search="grow")
    assert grown.probes == exact.probes[: len(grown.probes)]
    assert grown.results["batch_size"] == grown.probes[-2][0] < exact.results["batch_size"]
    smaller = train(adjust_batch_size=True, memory_budget_gib=0.003, max_steps=1)
    assert smaller.results["batch_size"] < exact.results["batch_size"]
    bounded = train(adjust_batch_size=True, memory_budget_gib=0.004, max_steps=1, max_batch_size=11)
    assert bounded.probes == [(8, "ok"), (10, "ok"), (11, "ok")]
    assert bounded.results["batch_size"] == 11
    assert "batch size 11 after 3 probes; the largest allowed" in bounded.stdout
    update = train(adjust_batch_size=True, memory_budget_gib=1, max_steps=1, tokens_per_update=13 * 32)
    assert update.results["batch_size"] == 13  # never more than one update
    found = exact.results["batch_size"]
    margin = train(adjust_batch_size=True, memory_budget_gib=0.004, max_steps=1, search_margin=0.1)
    less = train(adjust_batch_size=True, memory_budget_gib=0.0036, max_steps=1)
    assert margin.probes == less.probes and margin.results["batch_size"] == less.results["batch_size"] < found
    assert margin.info["search_margin"] == 0.1 and exact.info["search_margin"] == 0
    assert "of 0.00 GiB (10 % kept free by --search_margin)" in margin.stdout


def test_nothing_fits(train):
    run = train(adjust_batch_size=True, memory_budget_gib=0.0005)
    assert run.status == 2
    assert "not even one sequence fits" in run.stderr.splitlines()[-1]
    assert run.info["status"] == "error"
    assert run.info["error"] in run.stderr


# --- Stopping and going on --------------------------------------------------------------------------------------------

# Epochs of 5 updates, each of micro-batches 40, 40 and 16.
LONG = {"tokens_per_update": 96 * 32, "batch_size": 40, "epochs": 2, "max_steps": 8, "dropout": 0.1}
ALWAYS = 1e-9  # minutes between checkpoints: before every step


@pytest.fixture(scope="module")
def uninterrupted(train) -> Run:
    run = train(**LONG)
    assert run.status == 0, run.stderr
    assert len(run.losses) == 8
    assert 8 / run.results["epochs"] == 5  # the runs below cross the end of an epoch
    return run


def assert_same_training(run: Run, expected: Run) -> None:
    assert run.status == 0, run.stderr
    assert [row["step"] for row in run.steps] == [row["step"] for row in expected.steps]
    assert run.losses == expected.losses
    assert run.results["test_loss"] == expected.results["test_loss"]
    assert run.info["status"] == "ok"


@contextlib.contextmanager
def after_steps(count: int, action: Callable[[], None]) -> Iterator[None]:
    """Do something inside the training step number `count` of the process, before its weights change."""
    original, calls = llm_train.training_step, itertools.count(1)

    def training_step(*arguments):
        if next(calls) == count:
            action()
        return original(*arguments)

    with patch.object(llm_train, "training_step", training_step):
        yield


def test_more_steps_after_a_normal_end(train, uninterrupted):
    first = train(**LONG | {"max_steps": 3}, checkpoint_every_minutes=60)
    assert first.losses == uninterrupted.losses[:3]
    assert first.has_checkpoint
    assert_same_training(train(resume=first.path, max_steps=8), uninterrupted)
    assert len(first.info["resumed"]) == 1


def test_resume_keeps_the_gradient_scaler(train):
    options = LONG | {"precision": "fp16", "checkpoint_every_minutes": 60}
    whole, first = train(**options), train(**options | {"max_steps": 4})
    assert_same_training(train(resume=first.path, max_steps=8), whole)
    scalers = [
        training_state.load_state(run.path / "checkpoint" / "state.safetensors")[1]["scaler"] for run in (whole, first)
    ]
    assert scalers[0] == scalers[1]
    assert scalers[0]["_growth_tracker"] == 8


def test_resume_keeps_the_batch_size_found(train):
    search = {"adjust_batch_size": True, "memory_budget_gib": 0.004}
    first = train(**search, max_steps=2, checkpoint_every_minutes=60)
    probes = first.probes
    second = train(resume=first.path, max_steps=4)
    assert second.probes == probes
    assert_same_training(second, train(**search, max_steps=4))


def run_until_killed(argv: list[str], place: str) -> None:
    """In a process of its own: checkpoint once, then die by SIGKILL, in step 7 or half through the second file."""

    def die(*arguments, **options) -> None:
        if arguments:
            Path(arguments[1]).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)

    save, times = llm_train.Training.save, itertools.count(1)
    steps = [3, 6]  # saved before steps 4 and 7: three steps are logged after the first checkpoint

    def save_at_these_steps(self, log) -> None:
        if self.step not in steps:
            return
        if next(times) == 2:
            if place == "step":
                return
            training_state.save_file = die
        save(self, log)

    llm_train.Training.save = save_at_these_steps
    with after_steps(7, die):
        call_script(argv)


@pytest.mark.parametrize("place", ["step", "save"])
def test_resume_after_kill(train, uninterrupted, workplace, place):
    output_folder = workplace / f"killed-in-{place}"
    settings = BASE | LONG | {"checkpoint_every_minutes": ALWAYS, "log_every": 1}
    settings |= {"cache_folder": workplace / "cache", "output_folder": output_folder}
    # fork is much faster, but only Linux's is safe after torch has been used
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    process = context.Process(target=run_until_killed, args=(flags(settings), place))
    process.start()
    process.join(timeout=100)
    assert process.exitcode == -signal.SIGKILL
    killed = Run(process.exitcode, "", "", run_folder_in(output_folder))
    assert killed.info["status"] == "running"
    assert killed.losses == uninterrupted.losses[:6]
    _, details = training_state.load_state(killed.path / "checkpoint" / "state.safetensors")
    assert details["step"] == 3
    with (killed.path / "steps.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a kill can also leave half a line
    assert_same_training(train(resume=killed.path), uninterrupted)
    tracked = [row["step"] for row in killed.memory if row["phase"] == "training_step"]
    assert tracked == ["2", "3", "5", "6"]  # of the second process: its second and third


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_resume_after_signal(train, uninterrupted, number, status):
    with after_steps(4, lambda: signal.raise_signal(number)):
        stopped = train(**LONG)
    assert stopped.status == status
    assert stopped.info["status"] == "interrupted"
    assert stopped.results["steps"] == 4  # the step was finished first
    assert stopped.losses == uninterrupted.losses[:4]
    assert stopped.has_checkpoint
    assert f"--resume {stopped.path}" in stopped.stdout
    assert_same_training(train(resume=stopped.path), uninterrupted)


def test_resume_after_signal_in_evaluation(train, uninterrupted):
    original = llm_train.evaluate

    def evaluate(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with patch.object(llm_train, "evaluate", evaluate):
        stopped = train(**LONG, checkpoint_every_minutes=60)
    assert stopped.status == 143
    assert stopped.info["status"] == "interrupted"
    assert_same_training(train(resume=stopped.path), uninterrupted)


@pytest.mark.parametrize("minutes", [1e-9, 0.002])
def test_time_limit(train, uninterrupted, minutes):
    """Also where the time is up before the first step."""
    original = llm_train.training_step

    def slow_step(*arguments):
        time.sleep(0.04)
        return original(*arguments)

    with patch.object(llm_train, "training_step", slow_step):
        stopped = train(**LONG, max_training_minutes=minutes, figures=minutes == 1e-9)
    assert stopped.status == 0, stopped.stderr
    assert (stopped.info["status"], stopped.info["stopped_by"]) == ("ok", "time")
    assert stopped.results["steps"] < 8
    assert math.isfinite(stopped.results["test_loss"])
    assert stopped.last_line["status"] == "ok"
    assert stopped.has_checkpoint
    assert_same_training(train(resume=stopped.path, max_training_minutes=60), uninterrupted)


def test_no_checkpoint_unless_asked(base):
    assert not base.has_checkpoint
    assert base.info["stopped_by"] == "done"


def test_disk_full_while_saving(train, uninterrupted):
    save_file, times = training_state.save_file, itertools.count(1)

    def second_fails(tensors, path, **options) -> None:
        if next(times) == 2:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **options)

    with patch.object(training_state, "save_file", second_fails):
        full = train(**LONG, checkpoint_every_minutes=ALWAYS)
    assert full.status == 2
    assert "No space left on device" in full.stderr.splitlines()[-1]
    assert "Traceback" not in full.stderr
    assert full.info["status"] == "error"
    assert [path.name for path in (full.path / "checkpoint").iterdir()] == ["state.safetensors"]
    assert_same_training(train(resume=full.path), uninterrupted)


# --- Wrong input ------------------------------------------------------------------------------------------------------

WRONG = {  # settings, what the sentence names
    "unknown data set": ({"dataset_name": "wiki"}, "--dataset_name"),
    "two data sets": ({"dataset_name": "sample", "dataset_path": "{files}/good.jsonl"}, "--dataset_path"),
    "unknown model type": ({"model_type": "lstm"}, "--model_type"),
    "unknown model size": ({"model_size": "gpt5"}, "--model_size"),
    "unknown optimizer": ({"optimizer": "sgd"}, "--optimizer"),
    "wrong type": ({"max_steps": "six"}, "--max_steps"),
    "missing file": ({"dataset_path": "{files}/none.txt"}, "--dataset_path"),
    "empty file": ({"dataset_path": "{files}/empty.txt"}, "--dataset_path"),
    "no text field": ({"dataset_path": "{files}/no_field.jsonl"}, "--dataset_path"),
    "no UTF-8": ({"dataset_path": "{files}/latin2.txt"}, "--dataset_path"),
    "shorter than a context": ({"dataset_path": "{files}/short.txt"}, "--context_length"),
    "too few documents": ({"max_documents": 2}, "--max_documents"),
    "tokenizer not found": ({"tokenizer_type": "transformers", "tokenizer": "nobody/nothing"}, "--tokenizer"),
    "tokenizer without effect": ({"tokenizer": "nobody/nothing"}, "--tokenizer"),
    "tokenizer too large": (
        {"tokenizer_type": "transformers", "tokenizer": "{files}/tokenizer", "vocab_size": 289},
        "--vocab_size 290",
    ),
    "vocabulary too small": ({"vocab_size": 256}, "--vocab_size"),
    "heads": ({"num_heads": 3}, "--num_heads"),
    "no layers": ({"num_layers": 0}, "--num_layers"),
    "dropout": ({"dropout": 1.0}, "--dropout"),
    "negative decay": ({"weight_decay": -0.1}, "--weight_decay"),
    "negative seed": ({"seed": -1}, "--seed"),
    "negative split seed": ({"split_seed": -1}, "--split_seed"),
    "window of sdpa": ({"attention_window": "4,0"}, "attention_window"),
    "window of a flash kernel on a CPU": (
        {"attention_window": "4,0", "use_flash_attention": True},
        "--use_flash_attention true cannot run here: flash_attn needs an NVIDIA GPU; varlen needs an NVIDIA GPU",
    ),
    "window of one number": ({"attention_window": "4", "attention_backend": "eager"}, "--attention_window"),
    "window that hides nothing": ({"attention_window": "31,0", "attention_backend": "eager"}, "--attention_window"),
    "window after the query": ({"attention_window": "4,2", "attention_backend": "eager"}, "--attention_window"),
    "run name that is a path": ({"run_name": "../outside"}, "--run_name"),
    "no run name": ({"run_name": ""}, "--run_name"),
    "run name too long": ({"run_name": "x" * 300}, "--run_name"),
    "infinite learning rate": ({"learning_rate": "inf"}, "--learning_rate"),
    "infinite budget": ({"memory_budget_gib": "inf"}, "--memory_budget_gib"),
    "endless seed": ({"seed": 10**23}, "--seed"),
    "allocator without a GPU": ({"expandable_segments": False}, "--expandable_segments"),
    "window below -1": ({"attention_window": "-2,0", "attention_backend": "eager"}, "--attention_window"),
    "window of words": ({"attention_window": "a,b", "attention_backend": "eager"}, "--attention_window"),
    "flash-attn on a CPU": ({"attention_backend": "flash_attn"}, "--attention_backend"),
    "training with flex on a CPU": ({"attention_backend": "flex"}, "--attention_backend flex"),
    "dropout of varlen": ({"attention_backend": "varlen", "dropout": 0.1}, "set --dropout 0"),
    "unknown kernel": ({"attention_backend": "flash"}, "--attention_backend"),
    "two kernels": ({"attention_backend": "sdpa", "use_flash_attention": True}, "--attention_backend"),
    "tf32 on a CPU": ({"precision": "tf32"}, "--precision"),
    "two precisions": ({"precision": "fp16", "use_fp16": True}, "--use_fp16"),
    "no GPU": ({"device": "cuda"}, "--device"),
    "batch larger than the corpus": ({"batch_size": 100_000}, "--batch_size"),
    "update larger than the corpus": ({"tokens_per_update": 3_200_000}, "--tokens_per_update"),
    "no whole sequences": ({"tokens_per_update": 500}, "--tokens_per_update"),
    "batch larger than the update": ({"tokens_per_update": 128}, "--tokens_per_update"),
    "bound without search": ({"max_batch_size": 8}, "--max_batch_size"),
    "method without search": ({"batch_size_search": "grow"}, "--batch_size_search"),
    "a margin of everything": ({"adjust_batch_size": True, "search_margin": 1.0}, "--search_margin"),
    "a margin of no search": ({"search_margin": 0.1}, "--search_margin"),
    "start above the bound": ({"adjust_batch_size": True, "max_batch_size": 4}, "--max_batch_size"),
    "output folder under a file": ({"output_folder": "{files}/empty.txt/outputs"}, "--output_folder"),
    "cache under a file": ({"cache_folder": "{files}/empty.txt/cache"}, "--cache_folder"),
    "no settings file": ({"config": "{files}/none.yaml"}, "--config"),
    "fused loss on a CPU": ({"loss": "fused"}, "--loss fused cannot run here: liger-kernel's kernels"),
    "chunk size without chunks": ({"loss_chunk_tokens": 8}, "--loss_chunk_tokens has no effect"),
    "two kinds of checkpointing": (
        {"use_gradient_checkpointing": True, "gradient_checkpointing": "selective"},
        "contradicts --gradient_checkpointing selective",
    ),
    "checkpoint_every alone": ({"checkpoint_every": 2}, "--checkpoint_every has no effect"),
    "offload on a CPU": ({"gradient_checkpointing": "offload"}, "offload needs a GPU"),
    "selective with eager": (
        {"gradient_checkpointing": "selective", "attention_backend": "eager"},
        "selective keeps the output of a fused attention operator and eager has none",
    ),
    "every first block": (
        {"gradient_checkpointing": "every_k", "checkpoint_every": 1},
        "--checkpoint_every",
    ),
    "memory budget without compiler": ({"activation_memory_budget": 0.5}, "has no effect without --use_compile"),
    "memory budget above 1": ({"activation_memory_budget": 1.5, "use_compile": True}, "activation_memory_budget"),
    "memory budget and checkpointing": (
        {"activation_memory_budget": 0.5, "use_compile": True, "use_gradient_checkpointing": True},
        "give one of them",
    ),
    "compiler and budget on a CPU": ({"use_compile": True, "memory_budget_gib": 1}, "leave --use_compile out"),
    "compiler and update in backward": (
        {"use_compile": True, "optimizer_in_backward": True},
        "--optimizer_in_backward true saves nothing",
    ),
    "accumulation and update in backward": (
        {"tokens_per_update": 512, "optimizer_in_backward": True},
        "--optimizer_in_backward true drops each gradient",
    ),
    "search, accumulation and update in backward": (
        {"adjust_batch_size": True, "tokens_per_update": 256, "optimizer_in_backward": True, "memory_budget_gib": 0.01},
        "--optimizer_in_backward true makes an update of every batch",
    ),
    "8-bit states of nothing": ({"embedding_dim": 16, "optimizer": "adamw_8bit"}, "adamw_8bit has no effect"),
    "8-bit states and a budget on a CPU": (
        {"optimizer": "adamw_8bit", "memory_budget_gib": 1},
        "use --optimizer adamw",
    ),
    "fp16 and update in backward": ({"precision": "fp16", "optimizer_in_backward": True}, "use --precision bf16"),
    "adam with bf16 parameters": ({"optimizer": "adam", "parameters": "bf16_master"}, "use --optimizer adamw"),
    "bf16 parameters in fp32": ({"precision": "fp32", "parameters": "bf16_master"}, "contradict --precision fp32"),
    "profile without a GPU": ({"profile_steps": 2}, "--profile_steps"),
    "plwiki without its package": ({"dataset_name": "plwiki"}, "uv sync --extra plwiki"),
}
WRONG |= {f"{name} 0": ({name: 0}, f"--{name} must be above 0") for name in llm_plan.MUST_BE_POSITIVE}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(train, workplace, monkeypatch, case):
    settings, named = WRONG[case]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "speakleash", None)
    settings = {
        name: value.format(files=workplace / "files") if isinstance(value, str) else value
        for name, value in settings.items()
    }
    run = train(**settings)
    assert_one_sentence(run, named)
    assert run.path is None
    assert run.stdout == ""


def assert_one_sentence(run: Run, named: str) -> None:
    assert run.status == 2
    sentence = run.stderr.splitlines()[-1]
    assert sentence.startswith("llm_train.py: error: ")
    assert named in sentence
    assert "Traceback" not in run.stderr


def test_run_name_taken(train, workplace):
    first = train(run_name="mine", output_folder=workplace / "taken", max_steps=1)
    before = first.info
    again = train(run_name="mine", output_folder=workplace / "taken", max_steps=1)
    assert_one_sentence(again, "--run_name mine")
    assert again.info == before


RESUME_WRONG = {
    "another seed": ({"seed": 1}, "--seed"),
    "another kernel": ({"attention_backend": "eager"}, "--attention_backend"),
    "another length": ({"epochs": 2}, "--epochs"),
    "without checkpoint": ({}, "no checkpoint"),
}


@pytest.mark.parametrize("case", RESUME_WRONG)
def test_wrong_resume(train, base, case):
    """A wrong attempt to go on leaves the finished run as it was."""
    settings, named = RESUME_WRONG[case]
    before = {path.name: path.read_bytes() for path in base.path.iterdir()}
    try:
        run = train(resume=base.path, **settings)
        assert_one_sentence(run, named)
        assert {path.name: path.read_bytes() for path in base.path.iterdir()} == before
    finally:
        for name, content in before.items():
            (base.path / name).write_bytes(content)


def test_resume_of_nothing(train, workplace):
    assert_one_sentence(train(resume=workplace / "nowhere"), "--resume")


def test_resume_with_other_text(train, workplace):
    text = workplace / "changing.jsonl"
    text.write_bytes((workplace / "files" / "good.jsonl").read_bytes())
    first = train(dataset_path=text, max_steps=2, checkpoint_every_minutes=60)
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in generate_documents(20, seed=8)))
    assert_one_sentence(train(resume=first.path, max_steps=4), "--resume")
    assert (first.info["status"], len(first.losses)) == ("ok", 2)


# --- What a GPU would get ---------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch) -> Iterator[Callable[..., None]]:
    """gpu((9, 0)) makes torch claim to see such a GPU, with or without the flash-attn package and varlen's window."""

    def pretend(capability: tuple[int, int], flash_attn: bool = False, varlen: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended GPU")
        properties = SimpleNamespace(total_memory=80 * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        reason = None if flash_attn else "flash-attn is not installed; uv sync --extra flash"
        monkeypatch.setattr(attention_support, "flash_attn_error", lambda: reason)
        monkeypatch.setattr(attention_support, "varlen_error", lambda: None if varlen else "varlen needs torch 2.11")
        monkeypatch.setattr(attention_support, "pytorch_refusal", lambda *args: None)
        choose_backend.cache_clear()

    choose_backend = attention_support.choose_backend
    yield pretend
    choose_backend.cache_clear()  # of what it found out about GPUs that are not there


@pytest.mark.parametrize(
    ("capability", "settings", "named"),
    [
        ((9, 0), {"use_flash_attention": True, "precision": "fp32"}, "true with --precision fp32"),
        ((9, 0), {"use_flash_attention": True, "precision": "tf32"}, "true with --precision tf32"),
        ((7, 5), {"precision": "bf16"}, "--precision bf16"),
        ((7, 5), {"precision": "tf32"}, "--precision tf32"),
        ((7, 5), {"use_fp16": True}, "bf16"),
        ((7, 5), {"use_flash_attention": True}, "bf16"),
        ((7, 5), {"use_flash_attention": True, "precision": "fp16"}, "--use_flash_attention"),
        ((9, 0), {"attention_backend": "flash_attn", "precision": "bf16"}, "uv sync --extra flash"),
        ((9, 0), {"attention_backend": "sdpa_flash"}, "--precision"),
        (
            (9, 0),
            {"use_flash_attention": True, "attention_window": "64,0"},
            "uv sync --extra flash; varlen needs torch",
        ),
        (
            (9, 0),
            {"attention_backend": "varlen", "precision": "bf16", "attention_window": "64,0"},
            "varlen needs torch",
        ),
    ],
)
def test_what_a_gpu_cannot_run_is_an_error(gpu, capability, settings, named):
    gpu(capability, varlen=False)
    with pytest.raises(SettingsError, match=named):
        llm_train.make_plan(llm_train.Settings(**settings))


def test_plans_for_a_gpu(gpu):
    gpu((9, 0))
    plan = llm_train.make_plan(llm_train.Settings(use_flash_attention=True))
    assert (plan.device.type, plan.model_size, plan.batch_size, plan.capacity_gib) == ("cuda", "gpt2", 64, 80)
    assert (plan.precision, plan.model.attention_backend) == ("bf16", "sdpa_flash")
    assert any("uv sync --extra flash" in note for note in plan.notes)
    assert llm_train.make_plan(llm_train.Settings(precision="tf32")).precision == "tf32"
    plan = llm_train.make_plan(llm_train.Settings(use_flash_attention=True, attention_window="64,0"))
    assert (plan.model.attention_backend, plan.model.attention_window) == ("varlen", (64, 0))
    assert any("attention_backend varlen (flash-attn is not installed" in note for note in plan.notes)
    gpu((8, 0), flash_attn=True)
    plan = llm_train.make_plan(llm_train.Settings(use_flash_attention=True, attention_window="64,0"))
    assert (plan.model.attention_backend, plan.model.attention_window) == ("flash_attn", (64, 0))
    assert llm_train.default_run_name(llm_train.Settings(), plan) == "gpt2-bf16-flash_attn-window-(64,0)-batch-64"
    assert llm_train.make_plan(llm_train.Settings(device="cpu")).model_size == "tiny"


@pytest.mark.parametrize(
    ("capability", "flash_attn", "settings", "expected"),
    [
        ((9, 0), True, {"precision": "bf16"}, "flash_attn"),  # gpt2: 256 tokens, of one packed tensor
        ((9, 0), True, {"precision": "bf16", "context_length": 512}, "flash_attn"),
        ((9, 0), True, {"precision": "bf16", "context_length": 513}, "sdpa_cudnn"),
        ((9, 0), False, {"precision": "bf16"}, "sdpa_cudnn"),
        ((9, 0), True, {"precision": "fp32"}, "sdpa_efficient"),
        ((9, 0), True, {"precision": "tf32"}, "sdpa_efficient"),
        ((9, 0), True, {"use_fp16": True, "attention_window": "64,0"}, "flash_attn"),
        ((9, 0), False, {"use_fp16": True, "attention_window": "64,0"}, "varlen"),
        ((9, 0), False, {"use_fp16": True, "attention_window": "64,0", "dropout": 0.1}, "eager"),
        ((8, 0), True, {"precision": "fp16"}, "flash_attn"),
        ((8, 0), False, {"precision": "fp16"}, "sdpa_flash"),
    ],
)
def test_auto_becomes_one_kernel(gpu, capability, flash_attn, settings, expected):
    gpu(capability, flash_attn)
    plan = llm_train.make_plan(llm_train.Settings(attention_backend="auto", **settings))
    assert plan.model.attention_backend == expected
    assert sum(note.startswith(f"--attention_backend auto: {expected} (") for note in plan.notes) == 1
    assert any("saves nothing" in note for note in plan.notes) == (expected == "eager")
    name = llm_train.default_run_name(llm_train.Settings(attention_backend="auto"), plan)
    assert name.startswith(f"gpt2-{plan.precision}-{expected}-")


@pytest.mark.parametrize("backend", ["varlen", "flex", "flash_attn_3", "flash_attn_4"])
def test_kernels_without_dropout(gpu, backend):
    gpu((9, 0), flash_attn=True)
    sentence = f"--attention_backend {backend} cannot run here: {backend} has no attention dropout; set --dropout 0"
    for window in (None, "64,0"):
        settings = {"attention_backend": backend, "precision": "bf16", "attention_window": window}
        with pytest.raises(SettingsError, match=sentence):
            llm_train.make_plan(llm_train.Settings(dropout=0.1, **settings))
    if backend == "varlen":
        assert llm_train.make_plan(llm_train.Settings(**settings)).model.attention_backend == "varlen"


def test_flash_attention_with_a_window_and_dropout(gpu):
    settings = llm_train.Settings(use_flash_attention=True, attention_window="64,0", dropout=0.1)
    gpu((9, 0), flash_attn=True)
    assert llm_train.make_plan(settings).model.attention_backend == "flash_attn"
    gpu((9, 0))
    with pytest.raises(SettingsError, match="uv sync --extra flash; varlen has no attention dropout"):
        llm_train.make_plan(settings)


def test_auto_of_a_run(train, base):
    """On a CPU it is sdpa, and eager with a window; the run says so and trains the same."""
    run = train(attention_backend="auto")
    assert "--attention_backend auto: sdpa (PyTorch's choice without a GPU)" in run.stdout
    assert run.info["settings"]["attention_backend"] == "auto"
    assert run.info["model"] == base.info["model"]
    assert (run.losses, run.path.name) == (base.losses, base.path.name)
    run = train(attention_backend="auto", attention_window="4,0")
    assert "--attention_backend auto: eager (" in run.stdout
    assert run.info["model"]["attention_backend"] == "eager"


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_model_sizes(size):
    plan = llm_train.make_plan(llm_train.Settings(device="cpu", model_size=size))
    assert {name: getattr(plan.model, name) for name in MODEL_SIZES[size]} == MODEL_SIZES[size]
    assert plan.batch_size == (8 if size == "tiny" else 64)


# --- Metrics and gradients --------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
SMALL = ModelConfig(num_layers=2, embedding_dim=16, num_heads=2, context_length=8, vocab_size=40, dropout=0.5)


def make_split(tokens: int) -> dataset.TokenSplit:
    row = np.random.default_rng(0).integers(0, SMALL.vocab_size, tokens).astype(np.uint16)
    return dataset.TokenSplit("test", row, num_bytes=3 * tokens, num_documents=4)


def objective(model: TransformerLM, loss: str = "full") -> llm_step.Objective:
    plan = SimpleNamespace(
        loss=loss, loss_chunk_tokens=5, use_compile=False, autocast_precision="fp32", device=torch.device("cpu")
    )
    return llm_step.Objective(model, plan)


@pytest.mark.parametrize("tokens", [8 * 11 + 1, 8 * 11 + 6, 5])  # no tail, a tail of 5 targets, nothing but a tail
def test_metrics_do_not_depend_on_the_batch_size(tokens):
    torch.manual_seed(0)
    model, split = TransformerLM(SMALL), make_split(tokens)
    with torch.no_grad():  # far from uniform, so that a forgotten or doubled token shows
        for parameter in model.parameters():
            parameter.mul_(10)
    nats = 0.0
    model.eval()
    for begin in range(0, tokens - 1, 8):
        ids = torch.from_numpy(split.tokens[begin : begin + 9].astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None, :-1])[0].double()
        nats -= sum(F.log_softmax(logits, -1)[place, target].item() for place, target in enumerate(ids[1:]))
    model.train()
    for batch_size, loss in itertools.product((1, 3, 7, 1000), ("full", "chunked")):
        metrics = llm_step.evaluate(objective(model, loss), split, batch_size, StopRequest())
        assert metrics["tokens"] == tokens - 1
        assert metrics["loss"] == pytest.approx(nats / (tokens - 1), rel=1e-6)
        assert metrics["perplexity"] == pytest.approx(math.exp(nats / (tokens - 1)), rel=1e-5)
        assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / (3 * tokens), rel=1e-6)
    assert model.training


def step_in_micro_batches(batch_size: int, loss: str = "full") -> tuple[float, list[torch.Tensor]]:
    """Loss and weights after one plain gradient step on 7 sequences."""
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**{**vars(SMALL), "dropout": 0.0}))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    split = make_split(7 * 8 + 1)
    batches = [split.batch(np.arange(i, min(i + batch_size, 7)), 8, CPU) for i in range(0, 7, batch_size)]
    mean = llm_step.training_step(objective(model, loss), optimizer, scaler, batches, MemoryTracker(CPU))
    assert all(parameter.grad is None for parameter in model.parameters())
    return mean.item(), [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(("batch_size", "kind"), [(1, "full"), (2, "full"), (3, "full"), (2, "chunked")])
def test_accumulated_gradient_is_the_gradient_of_the_whole(batch_size, kind):
    loss, weights = step_in_micro_batches(7)
    accumulated_loss, accumulated = step_in_micro_batches(batch_size, kind)
    assert accumulated_loss == pytest.approx(loss, rel=1e-6)
    for one, other in zip(accumulated, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_accumulation_keeps_the_updates(train):
    """Same updates whatever the batch size; 13 sequences: micro-batches of 5, 5, 3 or 1, 1, ... or all."""
    runs = [train(tokens_per_update=13 * 32, batch_size=size, max_steps=None, max_documents=6) for size in (1, 5, 13)]
    whole = runs[-1]
    windows = (whole.info["dataset"]["splits"]["train"]["tokens"] - 1) // 32
    for run, size in zip(runs, (1, 5, 13), strict=True):
        assert run.results["batch_size"] == size
        assert run.results["steps"] == windows // 13 > 2
        assert run.results["tokens_per_update"] == 13 * 32
        assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    assert runs[0].peak("training_step") < whole.peak("training_step")


# --- Every setting changes the run ------------------------------------------------------------------------------------

BLOCK = 12 * 32**2 + 9 * 32  # parameters of a block: qkv, output, two MLP layers with biases, two norms


def grown_by(parameters: int) -> Callable[[Run, Run], bool]:
    return lambda base, run: run.info["parameters"] - base.info["parameters"] == parameters


def close_losses(base: Run, run: Run) -> bool:
    return run.losses == pytest.approx(base.losses, rel=1e-5)


def start_of_a_step(run: Run) -> float:
    """GiB of parameters and optimizer states."""
    return max(float(row["start_allocated_gib"]) for row in run.memory if row["phase"] == "training_step")


def learns_otherwise(base: Run, run: Run) -> bool:
    """The same model on the same data, another update."""
    return run.losses[0] == base.losses[0] and all(x != y for x, y in zip(run.losses[1:], base.losses[1:], strict=True))


def close_but_not_equal(relative: float) -> Callable[[Run, Run], bool]:
    return lambda base, run: run.losses != base.losses and run.losses == pytest.approx(base.losses, rel=relative)


def steps_measured(run: Run) -> list[int]:
    return sorted({int(row["step"]) for row in run.memory if row["phase"] == "training_step"})


def printed_steps(run: Run) -> list[str]:
    return [line.split()[1] for line in run.stdout.splitlines() if line.startswith("step ") and "loss" in line]


EFFECTS = {  # field: (changes, what must be true of the base run and the changed one)
    "num_layers": ({"num_layers": 2}, grown_by(BLOCK)),
    "embedding_dim": (
        {"embedding_dim": 64},
        grown_by((2 * 300 + 32 + 2) * 32 + (12 * 64**2 + 9 * 64 - BLOCK)),
    ),
    "num_heads": (
        {"num_heads": 4},
        lambda base, run: grown_by(0)(base, run) and close_but_not_equal(0.01)(base, run),
    ),
    "context_length": (
        {"context_length": 16},
        lambda base, run: grown_by(-16 * 32)(base, run) and run.results["tokens_per_update"] == 8 * 16,
    ),
    "vocab_size": (
        {"vocab_size": 310},
        lambda base, run: grown_by(2 * 10 * 32)(base, run) and run.info["tokenizer"]["size"] == 310,
    ),
    "dropout": (
        {"dropout": 0.5},
        lambda base, run: run.losses[0] != base.losses[0] and run.losses[0] == pytest.approx(base.losses[0], rel=0.05),
    ),
    "use_flash_attention": (
        {"use_flash_attention": True},
        lambda base, run: (run.info["precision"], run.info["model"]["attention_backend"]) == ("bf16", "sdpa_flash"),
    ),
    "attention_backend": (
        {"attention_backend": "eager"},
        lambda base, run: (
            run.info["attention_kernel"].startswith("eager")
            and "flash" in base.info["attention_kernel"]
            and run.losses == pytest.approx(base.losses, rel=1e-6)
        ),
    ),
    "attention_window": (
        {"attention_backend": "eager", "attention_window": "2,0"},
        lambda base, run: run.losses != pytest.approx(base.losses, rel=1e-6) and "saves nothing" in run.stdout,
    ),
    "precision": (
        {"precision": "bf16"},
        lambda base, run: (
            close_but_not_equal(0.005)(base, run) and run.peak("forward_pass") < base.peak("forward_pass")
        ),
    ),
    "use_fp16": (
        {"use_fp16": True},
        lambda base, run: run.info["precision"] == "bf16" and "this run is bf16" in run.stdout,
    ),
    "optimizer": ({"optimizer": "adam"}, learns_otherwise),
    "learning_rate": ({"learning_rate": 0.01}, learns_otherwise),
    "weight_decay": ({"weight_decay": 0.0}, learns_otherwise),
    "batch_size": (
        {"batch_size": 4},
        lambda base, run: (
            [row["tokens"] for row in run.steps] == [128 * step for step in range(1, 7)]
            and run.peak("training_step") < base.peak("training_step")
        ),
    ),
    "tokens_per_update": (
        {"tokens_per_update": 16 * 32},
        lambda base, run: (
            (run.results["batch_size"], run.results["tokens_per_update"]) == (8, 512)
            and run.steps[-1]["tokens"] == 2 * base.steps[-1]["tokens"]
        ),
    ),
    "dataset_path": (
        {"dataset_path": "{files}/good.jsonl"},
        lambda base, run: (
            (base.info["dataset"]["generated"], run.info["dataset"]["generated"]) == (True, False)
            and "good.jsonl" in run.stdout
            and "generated" not in run.stdout
        ),
    ),
    "dataset_name": (  # the only one without a network is the default, so it is the same run
        {"dataset_name": "sample"},
        lambda base, run: run.info["dataset"] == base.info["dataset"] and run.losses == base.losses,
    ),
    "max_documents": (
        {"max_documents": 10},
        lambda base, run: [s["documents"] for s in run.info["dataset"]["splits"].values()] == [8, 1, 1],
    ),
    "split_seed": (
        {"split_seed": 1},
        lambda base, run: (
            sum(split["bytes"] for split in run.info["dataset"]["splits"].values())
            == sum(split["bytes"] for split in base.info["dataset"]["splits"].values())
            and run.info["dataset"]["splits"]["test"]["bytes"] != base.info["dataset"]["splits"]["test"]["bytes"]
        ),
    ),
    "tokenizer_type": (
        {"tokenizer_type": "transformers", "tokenizer": "{files}/tokenizer"},
        lambda base, run: run.info["tokenizer"]["size"] == 290 and grown_by(0)(base, run),
    ),
    "cache_folder": (
        {"cache_folder": "{files}/cache"},
        lambda base, run: (
            run.losses == base.losses
            and [path.name for path in Path(run.info["settings"]["cache_folder"]).iterdir()]
            == [run.info["dataset"]["cache_key"]]
        ),
    ),
    "epochs": (
        {"epochs": 2, "max_steps": None, "batch_size": 100},
        lambda base, run: (
            run.results["epochs"] == 2
            and run.results["steps"] == 2 * ((run.info["dataset"]["splits"]["train"]["tokens"] - 1) // 3200)
        ),
    ),
    "max_steps": ({"max_steps": 4}, lambda base, run: run.losses == base.losses[:4]),
    "evaluate_on": (
        {"evaluate_on": "validation"},
        lambda base, run: (
            run.losses == base.losses
            and "test_loss" not in run.results
            and run.results["validation_tokens"] == run.info["dataset"]["splits"]["validation"]["tokens"] - 1
        ),
    ),
    "loss": (
        {"loss": "chunked"},
        lambda base, run: close_losses(base, run) and run.peak("training_step") < 0.8 * base.peak("training_step"),
    ),
    "optimizer_in_backward": (
        {"optimizer_in_backward": True},
        lambda base, run: run.losses == base.losses and run.peak("optimizer_step") < base.peak("optimizer_step"),
    ),
    "parameters": (
        {"parameters": "bf16_stochastic"},
        lambda base, run: (
            run.info["precision"] == "bf16"
            and start_of_a_step(run) == pytest.approx(start_of_a_step(base) / 2, rel=0.1)
            and run.losses == pytest.approx(base.losses, rel=0.02)
        ),
    ),
    "tracked_steps": (
        {"tracked_steps": 4},
        lambda base, run: (steps_measured(base), steps_measured(run)) == ([2, 3], [2, 3, 4, 5]),
    ),
    "measured_steps": (
        {"measured_steps": 2},
        lambda base, run: (base.results["timed_steps"], run.results["timed_steps"]) == (3, 2),
    ),
    "figures": (
        {"figures": True},
        lambda base, run: (len(list(base.path.glob("*.png"))), len(list(run.path.glob("*.png")))) == (0, 3),
    ),
    "log_every": (
        {"log_every": 2},
        lambda base, run: (printed_steps(base), printed_steps(run)) == ([], ["2:", "4:", "6:"]),
    ),
    "seed": (
        {"seed": 1},
        lambda base, run: run.info["dataset"] == base.info["dataset"] and run.losses[0] != base.losses[0],
    ),
    "device": ({"device": "cpu"}, lambda base, run: run.info["device"] == "cpu"),
    "checkpoint_every_minutes": (
        {"checkpoint_every_minutes": 60},
        lambda base, run: run.has_checkpoint and not base.has_checkpoint,
    ),
    "output_folder": (
        {"output_folder": "{files}/elsewhere"},
        lambda base, run: run.path.parent.parent.name == "elsewhere",
    ),
    "experiment": (
        {"experiment": "second"},
        lambda base, run: (base.path.parent.name, run.path.parent.name) == ("llm", "second"),
    ),
    "run_name": (
        {"run_name": "mine"},
        lambda base, run: (base.path.name, run.path.name) == ("tiny-fp32-sdpa-batch-8", "mine"),
    ),
    "config": (  # a flag wins over the file: BASE has max_steps
        {"config": "{files}/settings.yaml"},
        lambda base, run: (run.info["settings"]["seed"], run.results["steps"]) == (3, 6),
    ),
}
ELSEWHERE = {
    "loss_chunk_tokens": "test_chunks_of_the_loss",
    "gelu": "test_gelu",
    "gradient_checkpointing": "test_gradient_checkpointing",
    "checkpoint_every": "test_gradient_checkpointing",
    "use_compile": "test_compile",
    "activation_memory_budget": "test_compile",
    "profile_steps": "test_wrong_input",  # on a CPU; on a GPU tests/test_gpu_training.py
    "model_type": "test_wrong_input",  # there is one
    "model_size": "test_model_sizes",
    "use_gradient_checkpointing": "test_gradient_checkpointing",
    "adjust_batch_size": "test_search_leaves_no_trace",
    "batch_size_search": "test_search_settings",
    "max_batch_size": "test_search_settings",
    "search_margin": "test_search_settings",
    "memory_budget_gib": "test_search_settings",
    "expandable_segments": "test_allocator_setting",
    "tokenizer": "test_every_setting_changes_the_run",  # with tokenizer_type
    "max_training_minutes": "test_time_limit",
    "deterministic": "test_deterministic",
    "resume": "test_more_steps_after_a_normal_end",
}


@pytest.mark.parametrize("field", EFFECTS)
def test_every_setting_changes_the_run(train, base, workplace, field):
    changes, effect = EFFECTS[field]
    changes = {
        name: value.format(files=workplace / "files") if isinstance(value, str) else value
        for name, value in changes.items()
    }
    run = train(**changes)
    assert run.status == 0, run.stderr
    assert effect(base, run), run.stdout
    for name, value in BASE.items():  # nothing else was changed on the way
        assert run.info["settings"][name] == changes.get(name, value)


def test_every_setting_has_a_test():
    assert set(EFFECTS) | set(ELSEWHERE) == {field.name for field in fields(llm_train.Settings)}
    assert not set(EFFECTS) & set(ELSEWHERE)
    assert set(ELSEWHERE.values()) <= set(globals())


def test_same_settings_same_run(train, base):
    again = train()
    assert again.losses == base.losses
    assert again.results["test_loss"] == base.results["test_loss"]


def test_allocator_setting(train):
    """Whether the allocator is asked; tests/test_gpu_training.py sees on a GPU which one it really is."""
    with patch.object(llm_train, "use_expandable_segments") as use:
        train(max_steps=1)
    assert use.called


def test_names_of_the_same_technique(train):
    assert train(use_fp16=True).losses == train(precision="bf16").losses


def test_fp16_scales_its_gradients(train, base):
    with patch.object(torch.amp.GradScaler, "scale", autospec=True, side_effect=torch.amp.GradScaler.scale) as scale:
        run = train(precision="fp16", checkpoint_every_minutes=60)
    assert scale.call_count == 6
    assert close_but_not_equal(0.005)(base, run)
    _, details = training_state.load_state(run.path / "checkpoint" / "state.safetensors")
    assert details["scaler"]["scale"] > 1


def test_without_decay_adam_is_adamw(train):
    adam, adamw = (train(optimizer=name, weight_decay=0.0).losses for name in ("adam", "adamw"))
    assert adam == pytest.approx(adamw, rel=1e-6)


def test_gradient_checkpointing(train):
    plain, recomputed = (
        train(num_layers=4, dropout=0.1, use_gradient_checkpointing=value) for value in ("false", "true")
    )
    assert recomputed.losses == plain.losses
    assert recomputed.peak("training_step") < 0.8 * plain.peak("training_step")
    assert recomputed.path.name == "tiny-fp32-sdpa-gradient-checkpointing-dropout-0.1-batch-8"


def test_every_method_of_checkpointing(train):
    """All losses bit for bit; the more is recomputed, the lower the peak."""
    options = {"num_layers": 6, "loss": "chunked"}
    runs = {
        method: train(**options, gradient_checkpointing=method)
        for method in ("none", "every_k", "selective_matmul", "selective", "block")
    }
    runs["every 3"] = train(**options, gradient_checkpointing="every_k", checkpoint_every=3)
    assert len({tuple(run.losses) for run in runs.values()}) == 1
    peaks = {method: run.peak("backward_pass") for method, run in runs.items()}
    assert peaks["none"] > peaks["every 3"] > peaks["every_k"] > peaks["block"]
    assert peaks["none"] > peaks["selective_matmul"] > peaks["selective"] > peaks["block"]


def test_chunks_of_the_loss(train):
    small, large = (train(loss="chunked", loss_chunk_tokens=size) for size in (8, 256))
    assert close_losses(small, large) and small.peak("loss") < large.peak("loss")
    assert "chunked-loss" in small.path.name


def test_gelu(train, base):
    runs = {gelu: train(gelu=gelu) for gelu in ("fused", "recomputed")}
    assert all(close_losses(base, run) for run in runs.values())
    assert runs["recomputed"].peak("forward_pass") < base.peak("forward_pass")
    assert [run.path.name for run in runs.values()] == [f"tiny-fp32-sdpa-{gelu}-gelu-batch-8" for gelu in runs]


def test_compile(train, base):
    """The compiled run: losses to rounding, compilation and first step apart, memory not counted on a CPU."""
    budgets = []

    def note() -> None:
        budgets.append(torch._functorch.config.activation_memory_budget)

    with after_steps(1, note):
        run = train(use_compile=True, activation_memory_budget=0.25, evaluate_on="none")
    assert run.status == 0, run.stderr
    assert budgets == [0.25]
    assert close_losses(base, run)
    assert run.results["compile_s"] > run.results["first_step_ms"] / 1000 > 0
    assert run.results["epoch_minutes"] > 0 and "compiled in" in run.stdout
    assert run.results["peak_allocated_gib"] is None and not (run.path / "memory.csv").exists()
    assert "test_loss" not in run.results and "no split was evaluated" in run.stdout
    assert "compile-memory-budget-0.25" in run.path.name


def sequences_met(train: Callable[..., Run], **changes) -> list[tuple[int, ...]]:
    """Every training sequence, in the order in which the run meets them."""
    original, seen = llm_train.training_step, []

    def training_step(objective, optimizer, scaler, batches, *others):
        seen.extend(tuple(row.tolist()) for inputs, _ in batches for row in inputs)
        return original(objective, optimizer, scaler, batches, *others)

    with patch.object(llm_train, "training_step", training_step):
        assert train(max_documents=6, max_steps=None, **changes).status == 0
    return seen


def test_order_of_the_data(train):
    """Each epoch and each seed has its own order, and no sequence comes twice in an epoch."""
    both = sequences_met(train, epochs=2)
    first, second = both[: len(both) // 2], both[len(both) // 2 :]
    assert len(set(first)) == len(first) == len(second) == len(set(second))
    assert first != second
    other_seed = sequences_met(train, seed=1)
    assert first != other_seed
    assert first != sorted(first)
    assert first == sequences_met(train, batch_size=4)[: len(first)]


def test_dropout_reaches_attention_in_training_only(train):
    seen = []

    def packed_attention(qkv, **options):
        seen.append((torch.is_grad_enabled(), options["dropout_p"]))
        return attention.packed_attention(qkv, **options)

    with patch.object(transformer_based_llm, "packed_attention", packed_attention):
        train(dropout=0.25)
    assert {0.25} == {dropout for training, dropout in seen[1:] if training}  # the first looks which kernel runs
    assert {0.0} == {dropout for training, dropout in seen if not training}


def test_deterministic(train, base):
    seen = []
    with after_steps(1, lambda: seen.append(torch.are_deterministic_algorithms_enabled())):
        run = train(deterministic=True)
    assert seen == [True]
    assert run.losses == base.losses


# --- Failures that are results ----------------------------------------------------------------------------------------


def test_out_of_memory(train):
    run = train(memory_budget_gib=0.001)
    assert run.status == 1
    assert run.info["status"] == "oom"
    assert run.last_line == {"run": str(run.path), "status": "oom"}
    sentence = run.stdout.splitlines()[-2]
    assert "out of memory with batch size 8 (live tensors need" in sentence
    assert "--adjust_batch_size true" in sentence
    assert "Traceback" not in run.stderr


def test_out_of_memory_after_a_search(train):
    """The advice is not to search."""
    with patch.object(llm_train.Training, "train", side_effect=torch.OutOfMemoryError("full")):
        run = train(adjust_batch_size=True, max_batch_size=9)
    assert run.last_line == {"run": str(run.path), "status": "oom"}
    sentence = run.stdout.splitlines()[-2]
    assert "out of memory with batch size 9 (full); raise --search_margin" in sentence
    assert "--adjust_batch_size" not in sentence


def test_loss_that_is_not_finite(train):
    run = train(learning_rate=1e30)
    assert run.status == 1
    assert run.info["status"] == "error"
    assert "not finite" in run.info["error"]
    assert "--learning_rate" in run.stdout.splitlines()[-2]
    assert run.last_line == {"run": str(run.path), "status": "error"}
    assert "Traceback" not in run.stderr


# --- What a run writes ------------------------------------------------------------------------------------------------


def test_steps_file(base):
    assert [list(row) for row in base.steps] == [STEP_KEYS] * 6
    assert [row["step"] for row in base.steps] == [1, 2, 3, 4, 5, 6]
    for row in base.steps:
        assert row["tokens"] == row["step"] * 8 * 32
        assert row["step_ms"] > 0
        assert row["data_ms"] >= 0
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["tokens_per_s"] == pytest.approx(256_000 / row["step_ms"], rel=1e-3)
        assert row["mfu"] is None  # a CPU has no entry in the table of peaks
    timed = [row["step_ms"] for row in base.steps[3:]]
    assert base.results["step_ms_median"] == pytest.approx(np.median(timed), abs=1e-3)
    assert base.results["first_step_ms"] == pytest.approx(base.steps[0]["step_ms"], abs=1e-3)
    assert base.losses[0] == pytest.approx(math.log(300), rel=0.02)  # an untrained model knows nothing
    assert base.losses[-1] < base.losses[0]


def test_memory_file(base):
    assert list(base.memory[0]) == list(COLUMNS)
    for step in ("2", "3"):
        rows = {row["phase"]: row for row in base.memory if row["step"] == step}
        assert set(rows) == {"training_step", *INNER_PHASES}
        peaks = {phase: float(row["peak_allocated_gib"]) for phase, row in rows.items()}
        # what lies between the inner phases (deleting the logits, adding up the loss) needs a few bytes at most
        assert peaks["training_step"] == pytest.approx(max(peaks[phase] for phase in INNER_PHASES), abs=2e-6)
        assert all(float(row["start_allocated_gib"]) <= peaks[phase] for phase, row in rows.items())
        weights = 3 * 4 * base.info["parameters"] / GIB  # and Adam's two states
        assert float(rows["training_step"]["start_allocated_gib"]) == pytest.approx(weights, rel=0.1)
        assert peaks["loss"] - float(rows["loss"]["start_allocated_gib"]) >= 4 * 256 * 300 / GIB  # log-probabilities
        freed = float(rows["loss"]["end_allocated_gib"]) - float(rows["backward_pass"]["start_allocated_gib"])
        assert freed == pytest.approx(4 * 256 * 300 / GIB, rel=0.02)  # the logits do not outlive the loss
    evaluation = [row for row in base.memory if row["phase"] == "evaluation"]
    assert [row["step"] for row in evaluation] == ["6"]
    assert base.results["peak_allocated_gib"] == base.peak("training_step")
    assert base.peak(base.results["peak_phase"]) == max(base.peak(phase) for phase in INNER_PHASES)


def test_run_file(base):
    info = base.info
    assert info["status"] == "ok"
    assert info["argv"][0] == "llm_train.py"
    assert {field.name for field in fields(llm_train.Settings)} == set(info["settings"])
    assert info["parameters"] == 2 * 300 * 32 + 32 * 32 + BLOCK + 2 * 32
    assert f"parameters: {info['parameters']:,}" in (base.path / "model_summary.txt").read_text()
    assert base.last_line == {"run": str(base.path), "status": "ok", **base.results}
    assert "on generated text" in base.stdout  # a loss on the sample is never passed off as a real one


def test_resume_on_another_machine(train, monkeypatch):
    """`auto` means another model there: one sentence, and the run's folder stays as it was."""
    run = train(checkpoint_every_minutes=60)
    before = (run.path / "run.json").read_text()
    make_plan = llm_train.make_plan

    def elsewhere(*arguments):
        plan = make_plan(*arguments)
        plan.precision = "bf16"
        return plan

    monkeypatch.setattr(llm_train, "make_plan", elsewhere)
    monkeypatch.setattr("sys.argv", ["llm_train.py", "--resume", str(run.path)])
    with pytest.raises(llm_train.SettingsError, match="that run had precision fp32"):
        llm_train.main()
    assert (run.path / "run.json").read_text() == before


def test_resume_keeps_what_was_measured(train):
    """A resumed part too short to measure anything does not erase the earlier numbers."""
    first = train(checkpoint_every_minutes=60)
    resumed = train(resume=first.path)
    for name in ("timed_steps", "step_ms_median", "first_step_ms", "tracked_steps", "peak_allocated_gib", "peak_phase"):
        assert resumed.results[name] == first.results[name] and first.results[name], name
    assert resumed.info["resumed"][0]["argv"] != first.info["argv"]


def test_unigram_control_against_a_count_by_hand():
    train = TokenSplit("train", np.array([0, 0, 1, 2], dtype=np.uint16), 4, 1)
    test = TokenSplit("test", np.array([2, 0, 1], dtype=np.uint16), 3, 1)
    # counts plus one: 3, 2, 2, 1 of 8; the first test token is not predicted
    assert llm_step.unigram_perplexity(train, test, 4) == pytest.approx((3 / 8 * 2 / 8) ** -0.5)


def test_disk_full_while_drawing(train):
    """The results are in; the missing picture is one sentence and status 2."""
    with patch.object(plot, "plot_text_lengths", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        run = train(figures=True)
    assert run.status == 2 and "free space or change --output_folder" in run.stderr
    assert run.results["test_loss"]


def test_disk_full_at_the_first_write_leaves_no_folder(train):
    with patch.object(run_folder, "write_atomically", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        run = train()
    assert run.status == 2 and run.path is None


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": 3}'])
def test_resume_of_something_else(train, tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    run = train(resume=tmp_path)
    assert run.status == 2 and "no run of this lab" in run.stderr
