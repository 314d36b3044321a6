"""attention_benchmark.py and attention_studies.py: every flag does what it says and every case is a row.

Made-up times give known answers, and wrong input costs one sentence.
"""

import contextlib
import csv
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import attention_benchmark
import attention_measure
import attention_results
import attention_studies
from attention_benchmark import CPU_SWEEPS, GPU_SWEEPS, Settings, read_list, sweep_axes, sweep_cases
from attention_measure import DIRECTIONS, Bench, Case, Measurement, attention_flops, forward, make_inputs
from attention_results import COLUMNS, csv_rows, summarise, write_csv
from attention_studies import break_even, break_even_words, direct_call, find_break_even, overhead, overhead_words
from attention_support import FULL, unsupported_reason
from memory_tracker import LiveTensorCounter
from utils import GIB, SettingsError, run_script

SCRIPT = Path(attention_benchmark.__file__)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BASE = {
    "device": "cpu", "sweep": "custom", "backends": "eager", "batch_size": "2", "context_length": "16",
    "num_heads": "2", "head_dim": "8", "causal": "true", "window": "-1", "layout": "separate", "dtype": "fp32",
    "rounds": 1, "seconds": 0.001,
}  # fmt: skip
ENVIRONMENT = {
    "device": "cpu", "device_name": "a machine", "torch_version": "2.0", "cuda_version": None,
    "flash_attn_version": "2.8.3",
}  # fmt: skip


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
    output_folder: Path

    @property
    def path(self) -> Path:
        (path,) = (file.parent for file in self.output_folder.rglob("run.json"))
        return path

    @property
    def info(self) -> dict:
        return json.loads((self.path / "run.json").read_text())

    @property
    def rows(self) -> list[dict[str, str]]:
        return read_csv(self.path / "results.csv")

    @property
    def last_line(self) -> dict:
        return json.loads(self.stdout.splitlines()[-1])

    def seen(self, column: str) -> set[str]:
        return {row[column] for row in self.rows}

    def value(self, metric: str, direction: str = "forward_backward") -> float:
        """Of the only case of the run."""
        (value,) = (r["value"] for r in self.rows if (r["metric"], r["direction"]) == (metric, direction))
        return float(value)

    @property
    def flops(self) -> float:
        return self.value("throughput") * self.value("time")

    @property
    def inputs_bytes(self) -> float:
        return GIB * (self.value("peak_memory") - self.value("peak_memory_above_inputs"))


def call_script(argv: list[str], output_folder: Path) -> Run:
    """`python attention_benchmark.py ...` without a new process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["attention_benchmark.py", *argv])
        with pytest.raises(SystemExit) as caught:
            run_script(attention_benchmark.main)
    return Run(caught.value.code, out.getvalue(), err.getvalue(), output_folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quick_collections():
    gc.freeze()  # every case collects garbage: nothing older than the test need be looked at


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., Run]:
    """run(name=value, ...) runs BASE with these changes; without figures, which test_plot_attention.py draws."""
    monkeypatch.setattr(attention_benchmark, "plot_sweep", lambda path: [path / "sweep.png"])
    numbers = itertools.count()

    def run(**changes) -> Run:
        folder = tmp_path / f"run-{next(numbers)}"
        return call_script(flags(BASE | {"output_folder": folder} | changes), folder)

    return run


# A real process, with its figures, beside the other tests: importing torch takes it half a minute on a slow machine.
PROCESS = ["--device", "cpu", "--sweep", "custom", "--context_length", "16,32", "--batch_size", "1", "--num_heads", "2"]
PROCESS += ["--head_dim", "8", "--backends", "eager,sdpa,flash_attn", "--rounds", "2", "--seconds", "0.001"]


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("process")
    command = [sys.executable, str(SCRIPT), *PROCESS, "--output_folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err)
        yield child, folder
        if child.poll() is None:
            child.kill()
            child.wait()


# ---------------------------------------------------------------------------------------------------- flags and lists


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("batch_size", "1, 2,,2 , 64", [1, 2, 64]),
        ("tokens", "16384", [16384]),
        ("window", "-1,0,64", [-1, 0, 64]),
        ("causal", "true,False", [True, False]),
        ("layout", "packed,separate", ["packed", "separate"]),
        ("backends", "auto,sdpa_cudnn,flex", ["auto", "sdpa_cudnn", "flex"]),
    ],
)
def test_lists(name, text, values):
    assert read_list(name, text) == values
    assert [type(value) for value in read_list(name, text)] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        *((name, text, text) for name in attention_benchmark.WHOLE_NUMBERS for text in ("0", "-1", "1.5", "two")),
        ("context_length", "16,x,64", "x"),
        ("window", "-2", "-2"),
        ("window", "64,all", "all"),
        ("causal", "both", "both"),
        ("causal", "1", "1"),
        ("layout", "true", "true"),
        ("layout", "Packed", "Packed"),
        ("backends", "sdpa,flash", "flash"),
        ("backends", "all", "all"),
    ],
)
def test_a_wrong_value_is_named_with_its_flag(name, text, word):
    with pytest.raises(SettingsError) as caught:
        read_list(name, text)
    sentence = str(caught.value)
    assert sentence.startswith(f"--{name} {text}: '{word}' is not ") and "\n" not in sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": "0"}, "--batch_size 0: '0' is not a whole number from 1 up"),
        ({"batch_size": " , "}, "--batch_size is empty"),
        ({"backends": "flash"}, "--backends flash: 'flash' is not one of auto, eager, sdpa"),
        ({"tokens": "64"}, "--batch_size and --tokens fix the same number"),
        ({"embedding_dim": "16"}, "--num_heads, --head_dim and --embedding_dim: two of them fix the third"),
        (
            {"embedding_dim": "10", "head_dim": None, "num_heads": "4"},
            "--embedding_dim 10 is not divisible by --num_heads 4",
        ),
        ({"embedding_dim": "20", "num_heads": None}, "--embedding_dim 20 is not divisible by --head_dim 8"),
        ({"embedding_dim": "4", "num_heads": None}, "--embedding_dim 4 is not divisible by --head_dim 8"),
        ({"window": "4", "causal": "false"}, "--window looks back from the query, so it needs --causal true"),
        ({"window": "4", "causal": "true,false"}, "--window looks back"),
        ({"window": "15,16,64"}, "no case to measure"),
        ({"window": "4", "backends": "sdpa,sdpa_flash"}, "no case to measure"),
        ({"layout": "packed", "backends": "flex"}, "no case to measure"),
        ({"sweep": "customs"}, "--sweep customs is unknown; choose from comparison"),
        ({"sweep": "all,causal"}, "--sweep all is unknown"),
        ({"sweep": ","}, "--sweep is empty"),
        ({"sweep": "custom,causal", "run_name": "mine"}, "--run_name names one run folder"),
        ({"run_name": "../mine"}, "--run_name ../mine must be a plain name"),
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"seconds": 0}, "--seconds must be positive"),
        ({"seconds": "nan"}, "--seconds must be positive"),
        ({"seconds": "inf"}, "--seconds must be positive"),
        ({"memory_budget_gib": 0}, "--memory_budget_gib must be positive"),
        ({"memory_budget_gib": "inf"}, "--memory_budget_gib must be positive"),
        ({"backends": ""}, "--backends is empty"),
        ({"memory_budget_gib": "nan"}, "--memory_budget_gib must be positive"),
        ({"sweep": "break_even", "batch_size": "1,2"}, "--sweep break_even takes one value of --batch_size, not 2"),
        ({"sweep": "break_even", "causal": "true,false"}, "--sweep break_even takes one value of --causal, not 2"),
    ],
)
def test_wrong_input_costs_one_sentence(run, monkeypatch, changes, sentence):
    monkeypatch.setattr(Bench, "measure", lambda *_: pytest.fail("something was measured"))
    failed = run(**changes)
    assert failed.status == 2
    assert failed.stderr.startswith("attention_benchmark.py: error: ") and failed.stderr.count("\n") == 1
    assert sentence in failed.stderr
    assert not list(failed.output_folder.rglob("*"))


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--dtype", "fp64"], "--dtype"),
        (["--device", "tpu"], "--device"),
        (["--rounds", "two"], "--rounds"),
        (["--windows", "3"], "--windows"),
    ],
)
def test_wrong_words_are_told_by_the_parser(tmp_path, argv, word):
    failed = call_script([*flags(BASE | {"output_folder": tmp_path, "dtype": None, "device": None}), *argv], tmp_path)
    assert failed.status == 2 and word in failed.stderr.splitlines()[-1]


def test_an_output_folder_that_cannot_be(run, tmp_path):
    (tmp_path / "file").write_text("")
    failed = run(output_folder=tmp_path / "file")
    assert failed.status == 2 and "--output_folder" in failed.stderr and "not writable" in failed.stderr


def test_a_wrong_list_of_a_later_experiment_is_found_before_the_first(run):
    failed = run(sweep="custom,break_even", batch_size="1,2")
    assert failed.status == 2 and not list(failed.output_folder.rglob("run.json"))


def cases_of(sweep: str, device: torch.device = CUDA, **changes) -> list[Case]:
    return sweep_cases(sweep_axes(sweep, Settings(**changes), device), "bf16")


@pytest.mark.parametrize(
    ("sweep", "count"),
    [
        ("comparison", 9 * 2 * 9),
        ("comparison_packed", 9 * 2 * 6),
        ("batch_size", 3 * 6),
        ("context_length", 3 * 6),
        ("num_heads", 3 * 6),
        ("embedding_dim", 3 * 6),
        ("causal", 2 * 6),
        ("short", 5 * 2 * 6),
        ("window", 7 * 4 + 7 * 3 + 6 * 3 + 4 * 3),  # no window, 64, 256 from context 512 on, 1024 from 2048 on
        ("head_dim", 5 * 10),
        ("long", 7 * 7),
        ("overhead", 2 * 2 * 3),
        ("custom", 6),
    ],
)
def test_cases_of_every_experiment(sweep, count):
    cases = cases_of(sweep)
    assert len(cases) == len(set(cases)) == count
    assert {case.dtype for case in cases} == {"bf16"}


def test_no_experiment_is_forgotten():
    assert list(CPU_SWEEPS) == list(GPU_SWEEPS)
    tested = {mark for mark, _ in test_cases_of_every_experiment.pytestmark[0].args[1]}
    assert tested | {"break_even"} == set(GPU_SWEEPS)  # break_even's cases are asked for one after another


def test_the_parameters_that_are_varied():
    def widths(sweep):
        return {(case.num_heads, case.head_dim) for case in cases_of(sweep)}

    assert widths("comparison") == widths("causal") == widths("batch_size") == widths("context_length") == {(32, 64)}
    assert widths("num_heads") == {(8, 256), (16, 128), (32, 64)}
    assert widths("embedding_dim") == {(16, 64), (16, 128), (16, 256)}
    assert widths("head_dim") == {(128, 16), (64, 32), (32, 64), (16, 128), (8, 256)}
    assert {(case.batch_size, case.context_length) for case in cases_of("comparison")} == set(
        itertools.product((16, 32, 64), (512, 1024, 2048))
    )
    default = {(case.batch_size, case.context_length, case.causal, case.layout) for case in cases_of("num_heads")}
    assert default == {(32, 1024, False, "packed")}  # the cell of the published project
    assert {case.layout for case in cases_of("comparison")} == {"separate"}
    assert {case.layout for case in cases_of("comparison_packed")} == {"packed"}


def test_experiments_at_a_fixed_number_of_tokens():
    long = {(case.context_length, case.batch_size) for case in cases_of("long")}
    assert long == {(context, 32768 // context) for context in (1024, 2048, 4096, 8192, 16384, 32768)} | {(65536, 1)}
    short = {(case.context_length, case.batch_size) for case in cases_of("short")}
    assert short == {(32, 512), (64, 256), (128, 128), (192, 85), (256, 64)}
    cases = cases_of("window")
    assert all(case.batch_size * case.context_length == 16384 and case.causal for case in cases)
    windows = {(case.window[0], case.context_length) for case in cases if case.window != FULL}
    assert windows == {(w, 2**n) for w in (64, 256, 1024) for n in range(8, 15) if w < 2**n - 1}
    assert {case.backend for case in cases if case.window != FULL} == {"flash_attn", "varlen", "flex"}
    assert {case.backend for case in cases if case.window == FULL} == {"sdpa_cudnn", "flash_attn", "varlen", "flex"}
    assert all(case.window[1] == (0 if case.window[0] >= 0 else -1) for case in cases)


@pytest.mark.parametrize("sweep", CPU_SWEEPS)
def test_experiments_without_a_gpu_are_small(sweep):
    axes = sweep_axes(sweep, Settings(), CPU)
    cases = sweep_cases(axes | ({"window": [-1]} if sweep == "break_even" else {}), "fp32")
    assert len(cases) == len(set(cases)) > 0
    assert max(case.batch_size * case.context_length for case in cases) <= 2048
    assert max(case.num_heads * case.head_dim for case in cases) <= 768
    if sweep == "comparison":
        assert len(cases) == 9 * 2 * 9


@pytest.mark.parametrize(("window", "kept"), [("13", True), ("14", True), ("15", False), ("16", False)])
def test_windows_that_hide_nothing_are_left_out(window, kept):
    """With 16 tokens the last query has 15 keys before it, so a window of 15 is none."""
    changes = {"context_length": "16", "causal": "true", "backends": "eager", "window": f"-1,{window}"}
    windows = [case.window for case in cases_of("custom", **changes)]
    assert windows == [FULL] + [(int(window), 0)] * kept


def test_flags_replace_the_lists_of_the_experiment():
    def shapes(sweep, **changes):
        return {(c.batch_size, c.context_length, c.num_heads, c.head_dim) for c in cases_of(sweep, **changes)}

    assert shapes("context_length", context_length="128", batch_size="3") == {(3, 128, 32, 64)}
    assert shapes("causal", tokens="2048", context_length="128,512,4096") == {
        (16, 128, 32, 64), (4, 512, 32, 64), (1, 4096, 32, 64),
    }  # fmt: skip
    assert shapes("long", batch_size="2", context_length="64") == {(2, 64, 16, 128)}
    assert shapes("causal", num_heads="4", head_dim="24") == {(32, 1024, 4, 24)}
    assert shapes("causal", embedding_dim="512", head_dim="128") == {(32, 1024, 4, 128)}
    assert shapes("causal", embedding_dim="512") == {(32, 1024, 32, 16)}  # heads stay, their width follows
    assert shapes("causal", head_dim="16") == {(32, 1024, 32, 16)}
    assert shapes("causal", num_heads="16") == {(32, 1024, 16, 128)}
    both = cases_of("causal", layout="packed,separate", backends="flex,sdpa")
    assert {(case.backend, case.layout) for case in both} == {
        ("flex", "separate"), ("sdpa", "separate"), ("sdpa", "packed"),
    }  # fmt: skip


def test_no_case_twice():
    """Batches of 1 at 20 and at 30 tokens are the same case: it would be measured twice a round."""
    assert len(cases_of("custom", tokens="20,30", context_length="16", backends="sdpa")) == 1


# ---------------------------------------------------------------------------------------------------- every setting


EFFECTS = {  # field: (changes, what must be true of the base run and the changed one)
    "sweep": (
        {"sweep": "causal", "causal": None},
        lambda base, run: (run.seen("causal"), run.path.name, run.seen("sweep"))
        == ({"true", "false"}, "causal", {"causal"}),
    ),
    "backends": ({"backends": "sdpa_math,auto"}, lambda base, run: run.seen("backend") == {"sdpa_math", "auto"}),
    "batch_size": (
        {"batch_size": "6"},
        lambda base, run: run.seen("batch_size") == {"6"} and run.inputs_bytes == 3 * base.inputs_bytes,
    ),
    "tokens": (
        {"tokens": "100", "batch_size": None},
        lambda base, run: run.seen("batch_size") == {"6"} and run.inputs_bytes == 3 * base.inputs_bytes,
    ),
    "context_length": (
        {"context_length": "48"},
        lambda base, run: run.seen("context_length") == {"48"} and run.inputs_bytes == 3 * base.inputs_bytes,
    ),
    "num_heads": (
        {"num_heads": "6"},
        lambda base, run: run.seen("num_heads") == {"6"} and run.inputs_bytes == 3 * base.inputs_bytes,
    ),
    "head_dim": (
        {"head_dim": "24"},
        lambda base, run: run.seen("head_dim") == {"24"} and run.inputs_bytes == 3 * base.inputs_bytes,
    ),
    "embedding_dim": (
        {"embedding_dim": "48", "head_dim": None},
        lambda base, run: run.seen("head_dim") == {"24"} and run.inputs_bytes == 3 * base.inputs_bytes,
    ),
    "causal": (
        {"causal": "false"},
        lambda base, run: run.seen("causal") == {"false"} and run.flops == pytest.approx(2 * base.flops),
    ),
    "window": (
        {"window": "0"},  # 16 pairs instead of the 16 * 16 / 2 that the formula counts
        lambda base, run: run.seen("window") == {"0"} and run.flops == pytest.approx(base.flops / 8),
    ),
    "layout": (
        {"layout": "packed", "backends": "sdpa_flash"},
        lambda base, run: run.seen("layout") == {"packed"}
        and run.value("peak_memory_above_inputs") * GIB == 7 * run.inputs_bytes / 4,
    ),
    "dtype": (
        {"dtype": "bf16"},
        lambda base, run: run.seen("dtype") == {"bf16"} and 2 * run.inputs_bytes == base.inputs_bytes,
    ),
    "rounds": (
        {"rounds": 3},
        lambda base, run: all(3 <= r["rounds"].count(";") + 1 <= 6 for r in run.rows if r["metric"] == "time")
        and all(r["rounds"].count(";") == 0 for r in base.rows if r["metric"] == "time")  # 6: it was noisy
        and run.last_line["noise_floor_forward"] is not None
        and base.last_line["noise_floor_forward"] is None,
    ),
    "memory_budget_gib": (
        {"memory_budget_gib": 1e-5},
        lambda base, run: run.seen("status") == {"oom"} and base.seen("status") == {"ok"} and run.last_line["oom"] == 1,
    ),
    "run_name": ({"run_name": "mine"}, lambda base, run: (base.path.name, run.path.name) == ("custom", "mine")),
}  # fmt: skip
ELSEWHERE = {
    "device": "test_device",
    "seconds": "test_seconds",
    "seed": "test_seed",
    "output_folder": "test_a_real_process",
    "summarise": "test_a_summary_made_anew",
}


@pytest.mark.parametrize("field", EFFECTS)
def test_every_setting_changes_the_run(run, field):
    changes, effect = EFFECTS[field]
    base, changed = run(), run(**changes)
    assert (base.status, changed.status) == (0, 0), changed.stderr
    assert effect(base, changed), changed.stdout
    for name, value in BASE.items():  # nothing else was changed on the way
        assert changed.info["settings"][name] == changes.get(name, value)


def test_every_setting_has_a_test():
    assert set(EFFECTS) | set(ELSEWHERE) == {field.name for field in fields(Settings)}
    assert not set(EFFECTS) & set(ELSEWHERE)
    assert set(ELSEWHERE.values()) <= set(globals())


def test_device(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    failed = run(device="cuda")
    assert failed.status == 2 and "--device cuda: PyTorch sees no NVIDIA GPU" in failed.stderr
    found = run(device="auto", dtype=None)
    assert found.status == 0 and found.info["device"] == "cpu" and found.seen("dtype") == {"fp32"}


def test_device_where_there_is_a_gpu(run, monkeypatch):
    """As far as the experiment itself, on a GPU that is only pretended."""
    made, budgets = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_benchmark, "use_expandable_segments", lambda device: budgets.append(device))
    monkeypatch.setattr(attention_benchmark, "set_memory_budget", lambda device, gib: budgets.append((device, gib)))
    monkeypatch.setattr(attention_benchmark, "describe_environment", lambda device: {})
    monkeypatch.setattr(attention_benchmark, "run_sweep", lambda _, bench, axes, *__: made.append((bench, axes)) or {})
    everything = {name: None for name in BASE}
    for device in ("auto", "cuda", "cpu"):
        assert run(**everything | {"device": device, "memory_budget_gib": 12}).status == 0
    assert budgets == [CUDA, (CUDA, 12.0), CUDA, (CUDA, 12.0), CPU, (CPU, 12.0)]
    assert [bench.device for bench, _ in made] == [CUDA, CUDA, CPU]
    assert [bench.dtype for bench, _ in made] == ["bf16", "bf16", "fp32"]
    assert [bench.seconds for bench, _ in made] == [0.1, 0.1, 0.05]
    assert [axes["context_length"] for _, axes in made] == [[512, 1024, 2048]] * 2 + [[64, 128, 256]]
    assert [bench.limit_bytes for bench, _ in made] == [12 * GIB] * 3 and made[0][0].rounds == 3


def test_seconds(run, monkeypatch):
    made = []
    monkeypatch.setattr(attention_benchmark, "run_sweep", lambda name, bench, *_: made.append(bench) or {})
    for seconds in (0.25, None):
        assert run(seconds=seconds).status == 0
    assert [bench.seconds for bench in made] == [0.25, 0.05]


def test_seed(run, monkeypatch):
    orders = []
    measure = attention_measure.measure

    def note(case, *others, **options):
        orders[-1].append(case.batch_size)
        return measure(case, *others, **options)

    monkeypatch.setattr(attention_measure, "measure", note)
    for seed in (0, 0, 1):
        orders.append([])
        assert run(seed=seed, batch_size="1,2,3,4,5,6,7,8").status == 0
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2]) == list(range(1, 9))


def test_several_experiments_are_several_folders(run, monkeypatch):
    begun = []
    monkeypatch.setattr(attention_benchmark, "run_sweep", lambda name, *_: begun.append(name) or {"run": name})
    done = run(sweep=" causal, custom ")
    assert begun == ["causal", "custom"]
    assert done.last_line == {"status": "ok", "runs": [{"run": "causal"}, {"run": "custom"}]}
    begun.clear()
    everything = {name: None for name in BASE} | {"sweep": "all", "device": "cpu"}
    assert run(**everything).status == 0
    assert begun == [name for name in GPU_SWEEPS if name != "custom"]


def test_a_taken_name_is_an_error_and_a_default_name_is_numbered(run, tmp_path):
    for name, path in (("mine", "mine"), (None, "custom"), (None, "custom-2")):
        done = run(output_folder=tmp_path, run_name=name)
        assert done.last_line["run"] == str(tmp_path / "attention_benchmark" / path)
    failed = run(output_folder=tmp_path, run_name="mine")
    assert failed.status == 2 and "--run_name mine" in failed.stderr


# -------------------------------------------------------------------------------------------------------- whole runs


def test_out_of_memory_is_a_row_and_the_run_goes_on(run):
    done = run(memory_budget_gib=4e-5, context_length="16,64", backends="eager,sdpa_flash", dtype="bf16")
    assert done.status == 0 and done.info["status"] == "ok"
    status = {(row["backend"], row["context_length"]): row["status"] for row in done.rows}
    assert status == {
        ("eager", "16"): "ok",
        ("sdpa_flash", "16"): "ok",
        ("sdpa_flash", "64"): "ok",
        ("eager", "64"): "oom",
    }
    assert (done.last_line["ok"], done.last_line["oom"], done.last_line["cases"]) == (3, 1, 4)
    (row,) = (row for row in done.rows if row["metric"] == "status")
    assert (row["backend"], row["status"]) == ("eager", "oom") and "memory budget" in row["reason"]
    assert not [r for r in done.rows if r["status"] == "oom" and r["metric"] in ("time", "throughput", "peak_memory")]
    assert "oom: OutOfMemoryError" in (done.path / "summary.txt").read_text()


def test_a_kernel_with_a_bug_is_an_error_row_and_the_run_goes_on(run, monkeypatch):
    def forward(case, inputs):
        if case.backend == "sdpa":
            raise RuntimeError("an illegal instruction")
        output = attention_measure.attention(*inputs, backend="eager", causal=case.causal)
        return output * 2 if case.backend == "sdpa_math" else output

    monkeypatch.setattr(attention_measure, "forward", forward)
    done = run(backends="eager,sdpa,sdpa_math", rounds=2)
    assert done.status == 0 and done.last_line["error"] == 2 and done.last_line["ok"] == 1
    reasons = {row["backend"]: row["reason"] for row in done.rows if row["metric"] == "status"}
    assert reasons["sdpa"] == "RuntimeError: an illegal instruction" and reasons["sdpa_math"].startswith(
        "parity: output"
    )
    assert {row["backend"] for row in done.rows if row["metric"] == "time"} == {"eager"}
    wrong = {row["metric"]: row for row in done.rows if row["backend"] == "sdpa_math"}
    assert float(wrong["error_output"]["value"]) > float(wrong["error_output"]["limit"]) > 0


def test_kernels_without_a_window_are_said(run):
    done = run(backends="eager,sdpa,sdpa_flash", window="-1,4")
    assert "measured without a window only, because they have none: sdpa, sdpa_flash\n" in done.stdout
    assert {(row["backend"], row["window"]) for row in done.rows} == {
        ("eager", "none"), ("eager", "4"), ("sdpa", "none"), ("sdpa_flash", "none"),
    }  # fmt: skip
    assert "measured without" not in run(backends="eager", window="-1,4").stdout
    assert "measured without" not in run(backends="eager,sdpa").stdout


def test_a_failure_of_the_script_itself_is_noted(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "measure_all", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    info = Run(1, "", "", tmp_path).info
    assert info["status"] == "error" and info["finished_at"]


def run_until_stopped(argv: list[str], folder: Path) -> None:
    """The child's whole life: leaves with the exit status of the script."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    attention_benchmark.plot_sweep = lambda path: []
    attention_measure.tqdm.set_lock(threading.RLock())  # the parent's may be held by a thread that is not here
    os._exit(call_script(argv, folder).status)


def test_a_summary_made_anew(run, monkeypatch):
    """From results.csv and the answers in run.json, and from nothing else."""
    drawn = []
    done = run(backends="eager,sdpa_flash,flash_attn", dtype="bf16", rounds=2, run_name="mine")
    monkeypatch.setattr(Bench, "measure", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(attention_results, "plot_sweep", lambda path: drawn.append(path) or [path / "sweep.png"])
    before, text = done.info, (done.path / "summary.txt").read_text()
    table = (done.path / "results.csv").read_text()
    (done.path / "summary.txt").unlink()
    (done.path / "run.json").write_text(json.dumps(before | {"results": {"cases": 77}}))
    again = call_script(["--summarise", str(done.path)], done.output_folder)
    assert again.status == 0 and again.last_line == done.last_line
    assert (again.info, (again.path / "summary.txt").read_text()) == (before, text)
    assert drawn == [done.path] and f"{done.path / 'sweep.png'}\n" in again.stdout

    (done.path / "results.csv").write_text(table.replace(",eager,", ",varlen,"))
    again = call_script(["--summarise", str(done.path)], done.output_folder)
    assert (again.path / "summary.txt").read_text() == text.replace("  eager ", "  varlen")


def test_a_summary_made_anew_of_a_study(run, monkeypatch):
    monkeypatch.setattr(attention_studies, "Timer", FakeTimer)
    monkeypatch.setattr(FakeTimer, "warm_up", lambda *_: None)
    done = run(sweep="overhead", backends="sdpa", context_length="4")
    before, text = done.info, (done.path / "summary.txt").read_text()
    (done.path / "summary.txt").unlink()
    again = call_script(["--summarise", str(done.path)], done.output_folder)
    assert again.status == 0 and again.last_line == done.last_line
    assert (again.info, (again.path / "summary.txt").read_text()) == (before, text)


@pytest.mark.parametrize("kind", ["no folder", "no run.json", "not finished", "half a file", "no columns", "no rows"])
def test_what_cannot_be_summarised_costs_one_sentence(run, tmp_path, kind):
    done = run()
    folder = done.path
    if kind == "no folder":
        folder = tmp_path / "nothing"
    elif kind == "no run.json":
        (folder / "run.json").unlink()
    elif kind == "not finished":
        (folder / "run.json").write_text(json.dumps({"status": "running"}))
    elif kind == "half a file":
        (folder / "run.json").write_text('{"status": "o')
    elif kind == "no columns":
        (folder / "results.csv").write_text("step,phase\n1,forward\n")
    else:
        (folder / "results.csv").write_text(",".join(COLUMNS) + "\n")
    failed = call_script(["--summarise", str(folder)], tmp_path)
    assert failed.status == 2
    assert failed.stderr.startswith("attention_benchmark.py: error: ") and failed.stderr.count("\n") == 1
    assert f"--summarise {folder}" in failed.stderr


def test_ctrl_c_keeps_the_rounds_that_were_finished(tmp_path):
    argv = flags(BASE | {"output_folder": tmp_path, "rounds": 1_000_000, "batch_size": "1,2,3"})
    # fork is much faster, but only Linux's is safe after torch has been used
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    child = context.Process(target=run_until_stopped, args=(argv, tmp_path))
    child.start()
    stopped = Run(130, "", "", tmp_path)
    try:
        deadline = time.monotonic() + 100
        while not list(tmp_path.rglob("results.csv")) and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert stopped.info["status"] == "running"
        os.kill(child.pid, signal.SIGINT)
        child.join(timeout=100)
    finally:
        child.kill()
        child.join()
    assert child.exitcode == 130
    assert stopped.info["status"] == "interrupted" and stopped.info["finished_at"]
    times = [row for row in stopped.rows if row["metric"] == "time"]
    assert {row["batch_size"] for row in times} == {"1", "2", "3"} and len(times) == 9
    assert len({row["rounds"].count(";") for row in times}) == 1  # whole rounds
    assert {path.name for path in stopped.path.iterdir()} == {"run.json", "results.csv"}


def test_a_real_process(process):
    child, folder = process
    assert child.wait(timeout=250) == 0, (folder / "stderr").read_text()
    done = Run(0, (folder / "stdout").read_text(), (folder / "stderr").read_text(), folder)
    assert "Traceback" not in done.stderr
    assert done.path == folder / "attention_benchmark" / "custom"
    assert {path.name for path in done.path.iterdir()} == {"run.json", "results.csv", "summary.txt", "sweep.png"}
    assert (done.path / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    headline = done.last_line
    counts = {name: headline[name] for name in ("cases", "ok", "oom", "unsupported", "error")}
    assert counts == {"cases": 6, "ok": 4, "oom": 0, "unsupported": 2, "error": 0}
    assert headline["run"] == str(done.path) and headline["noise_floor_forward_backward"] > 0
    assert done.info["status"] == "ok"
    assert {"run": headline["run"], "status": "ok", **done.info["results"]} == headline
    assert done.info["settings"]["context_length"] == "16,32" and done.info["lists"]["context_length"] == [16, 32]
    assert done.info["torch_version"] == torch.__version__ and done.info["argv"][0].endswith("attention_benchmark.py")
    assert done.info["finished_at"] >= done.info["started_at"]
    summary = (done.path / "summary.txt").read_text()
    assert summary in done.stdout and summary.count("fastest") >= 4

    assert (done.path / "results.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    known = {}
    for row in done.rows:
        known.setdefault((row["backend"], int(row["context_length"])), {})[row["metric"], row["direction"]] = row
    assert set(known) == {(backend, context) for backend in ("eager", "sdpa", "flash_attn") for context in (16, 32)}
    for (backend, context), rows in known.items():
        if backend == "flash_attn":
            assert list(rows) == [("status", "forward_backward")]
            row = rows["status", "forward_backward"]
            assert row["status"] == "unsupported" and row["reason"].startswith("flash_attn needs an NVIDIA GPU")
            continue
        timed = {(metric, direction) for metric in ("time", "throughput") for direction in DIRECTIONS}
        errors = {(f"error_{name}", "") for name in ("output", "dq", "dk", "dv")}
        peaks = set(itertools.product(("peak_memory", "peak_memory_above_inputs"), ("forward", "forward_backward")))
        assert set(rows) == timed | errors | peaks | {("host_time", "forward_backward")}
        for key in errors:
            assert 0 <= float(rows[key]["value"]) <= float(rows[key]["limit"]) < 1e-4
        for key in timed:
            assert 10 <= int(rows[key]["n"]) <= 100  # a noisy case gets two more rounds
            assert 0 < float(rows[key]["p20"]) <= float(rows[key]["value"]) <= float(rows[key]["p80"])
        assert all(1 <= rows["time", direction]["rounds"].count(";") <= 3 for direction in DIRECTIONS)
        case = Case(backend, 1, context, 2, 8, causal=False, layout="packed", dtype="fp32")
        inputs, upstream = make_inputs(case, CPU)
        with LiveTensorCounter() as counter:
            counter.add(inputs[0])
            counter.add(upstream)
            torch.autograd.grad(forward(case, inputs), inputs, upstream)
        peak = float(rows["peak_memory", "forward_backward"]["value"]) * GIB
        assert peak == counter.peak_bytes
        assert peak - float(rows["peak_memory_above_inputs", "forward_backward"]["value"]) * GIB == case.inputs_bytes
        assert {row["device"] for row in rows.values()} == {done.info["device_name"]}

    again = call_script([*PROCESS, "--output_folder", str(folder)], folder)  # in this process
    assert again.last_line["run"] == str(folder / "attention_benchmark" / "custom-2")


# ----------------------------------------------------------------------------------------------- the CSV and the text

CASE = Case("flash_attn", 2, 16, 3, 8, causal=False)


def made(case: Case, *rounds: list[float], above: int = GIB, status: str = "ok", **facts) -> Measurement:
    """A made-up measurement: a round is a list of milliseconds of forward and backward; forward is a quarter of it."""
    measurement = Measurement(case, status, chosen_backend=case.backend, **facts)
    for times in rounds:
        parts = {"forward": [t / 4 for t in times], "backward": [3 * t / 4 for t in times], "forward_backward": times}
        measurement.rounds.append(parts)
    if rounds:
        measurement.peak_above_inputs_bytes = {"forward": above // 2, "forward_backward": above}
        measurement.peak_bytes = {
            name: n + case.inputs_bytes for name, n in measurement.peak_above_inputs_bytes.items()
        }
    return measurement


def rows_of(measurement: Measurement, tmp_path: Path) -> list[dict[str, str]]:
    write_csv(tmp_path / "results.csv", list(csv_rows("custom", measurement, ENVIRONMENT)))
    return read_csv(tmp_path / "results.csv")


def test_rows_of_a_case_by_hand(tmp_path):
    measurement = made(
        CASE,
        [2.0, 4.0],
        [3.0, 5.0],
        operator="an operator",
        kernels={"forward": "kernel<1>", "backward": "other, kernel"},
        errors={"output": (1 / 3, 0.5)},
        host_ms=[0.5, 0.7],
        clock_mhz=[1980.0, 1970.0],
    )
    rows = {(row["metric"], row["direction"]): row for row in rows_of(measurement, tmp_path)}
    time_row = rows["time", "forward_backward"]
    assert [time_row[name] for name in ("value", "p20", "p80", "n", "rounds", "unit")] == [
        "3.5", "2.6", "4.4", "4", "3;4", "ms",
    ]  # fmt: skip
    assert rows["time", "forward"]["value"] == "0.875" and rows["time", "backward"]["value"] == "2.625"
    for direction, factor in (("forward", 4), ("backward", 4 / 3), ("forward_backward", 1)):
        row = rows["throughput", direction]
        tera = attention_flops(CASE, direction) / 1e12
        assert row["unit"] == "TFLOP/s"
        for name, ms in (("value", 3.5), ("p20", 4.4), ("p80", 2.6)):  # slow times are low rates
            assert float(row[name]) == pytest.approx(tera / (ms / factor / 1000), rel=1e-8)
    assert rows["error_output", ""]["value"] == "0.333333333" and rows["error_output", ""]["limit"] == "0.5"
    assert [rows["host_time", "forward_backward"][name] for name in ("value", "n", "rounds")] == ["0.6", "2", "0.5;0.7"]
    assert rows["clock", "forward_backward"]["value"] == "1975"
    kernels = {direction: rows["time", direction]["kernel"] for direction in DIRECTIONS}
    assert kernels == {"forward": "kernel<1>", "backward": "other, kernel", "forward_backward": ""}
    shared = {
        "sweep": "custom", "backend": "flash_attn", "layout": "separate", "batch_size": "2", "context_length": "16",
        "num_heads": "3", "head_dim": "8", "embedding_dim": "24", "causal": "false", "window": "none", "dtype": "bf16",
        "status": "ok", "chosen_backend": "flash_attn", "operator": "an operator", "reason": "", "device": "a machine",
        "torch": "2.0", "cuda": "", "cudnn": "", "flash_attn": "2.8.3",
    }  # fmt: skip
    for row in rows.values():
        assert {name: row[name] for name in shared} == shared and tuple(row) == COLUMNS
    windowed = made(replace(CASE, causal=True, window=(4, 0)), [1.0])
    assert {(row["causal"], row["window"]) for row in rows_of(windowed, tmp_path)} == {("true", "4")}


@pytest.mark.parametrize("peak", [1, 7, 644 * 2**20 + 512, 2576 * 2**20 + 512, 3 * GIB + 1, 79 * GIB - 12345])
def test_memory_reads_back_to_the_byte(tmp_path, peak):
    rows = rows_of(made(CASE, [1.0], above=peak), tmp_path)
    found = {(r["metric"], r["direction"]): float(r["value"]) * GIB for r in rows if r["unit"] == "GiB"}
    assert found == {
        ("peak_memory", "forward"): peak // 2 + CASE.inputs_bytes,
        ("peak_memory", "forward_backward"): peak + CASE.inputs_bytes,
        ("peak_memory_above_inputs", "forward"): peak // 2,
        ("peak_memory_above_inputs", "forward_backward"): peak,
    }


@pytest.mark.parametrize("status", ["oom", "unsupported", "error"])
def test_a_case_that_is_not_ok_is_one_row_with_its_reason(tmp_path, status):
    (row,) = rows_of(made(CASE, status=status, reason='a "reason", with a comma'), tmp_path)
    assert (row["status"], row["metric"], row["reason"]) == (status, "status", 'a "reason", with a comma')
    assert row["value"] == row["n"] == row["rounds"] == ""


def test_a_case_that_ran_out_of_memory_in_a_later_round_keeps_its_times(tmp_path):
    rows = rows_of(made(CASE, [1.0], status="oom", reason="full"), tmp_path)
    assert {row["status"] for row in rows} == {"oom"}
    assert sorted({row["metric"] for row in rows}) == sorted(
        {"status", "time", "throughput", "peak_memory", "peak_memory_above_inputs"}
    )


def summary(measurements: list[Measurement], tmp_path: Path) -> tuple[str, dict]:
    """Through a file, as in a run."""
    path = tmp_path / "results.csv"
    write_csv(path, [row for m in measurements for row in csv_rows("custom", m, ENVIRONMENT)])
    return summarise(read_csv(path))


def verdicts(text: str) -> dict[str, str]:
    """Backend -> what the last column of the summary says about it."""
    lines = [line for line in text.splitlines() if line.startswith("  ") and " ms" in line]
    return {line.split(" ms")[0].rsplit(maxsplit=1)[0].strip(): line.split("GiB  ")[-1] for line in lines}


def with_noise(case: Case, ms: float, noise: float = 0.05, **facts) -> Measurement:
    """Two rounds that lie `noise` apart; the median over both is ms."""
    low = ms / (1 + noise / 2)
    return made(case, [low], [low * (1 + noise)], **facts)


def test_summary_by_hand(tmp_path):
    cell = [
        with_noise(replace(CASE, backend="eager"), 40.0, above=5 * GIB),
        with_noise(replace(CASE, backend="sdpa"), 10.51),
        with_noise(replace(CASE, backend="sdpa_flash"), 10.49),
        with_noise(CASE, 10.0, above=3 * GIB // 2),
        with_noise(replace(CASE, backend="auto"), 10.2),
        made(replace(CASE, backend="flex"), status="unsupported", reason="flex needs a GPU"),
        made(replace(CASE, backend="varlen"), status="oom", reason="full"),
        made(replace(CASE, backend="sdpa_math"), status="error", reason="parity: output"),
    ]
    cell[4].chosen_backend = "sdpa_cudnn"
    text, headline = summary(cell, tmp_path)
    assert verdicts(text) == {
        "flash_attn": "fastest",
        "auto -> sdpa_cudnn": "no difference to the fastest",
        "sdpa_flash": "no difference to the fastest",
        "sdpa": "1.05 x the fastest",
        "eager": "4.00 x the fastest",
    }
    assert list(verdicts(text)) == ["flash_attn", "auto -> sdpa_cudnn", "sdpa_flash", "sdpa", "eager"]  # by time
    assert text.startswith("noise floor of forward and backward: 5.0 %")
    assert text.count("batch 2, context 16, 3 heads of 8, not causal, separate, bf16\n") == 1
    (line,) = (line for line in text.splitlines() if line.startswith("  flash_attn"))
    rate = attention_flops(CASE, "forward_backward") / 10.0 / 1e9
    assert "10.000 ms" in line and f"{rate:.3g} TFLOP/s" in line and "1.500 GiB" in line
    for words in ("unsupported: flex needs a GPU", "oom: full", "error: parity: output"):
        assert text.count(words) == 1
    assert "auto is behind the fastest kernel by at most 2.0 %" in text
    assert headline["auto_behind_fastest_at_most"] == pytest.approx(0.02)
    assert headline["noise_floor_forward_backward"] == pytest.approx(0.05, rel=1e-3)
    assert {name: headline[name] for name in ("cases", "ok", "oom", "unsupported", "error")} == {
        "cases": 8, "ok": 5, "oom": 1, "unsupported": 1, "error": 1,
    }  # fmt: skip
    json.dumps(headline)


@pytest.mark.parametrize("noisy", ["flash_attn", "sdpa"])
def test_the_noise_of_either_case_counts_too(tmp_path, noisy):
    """Most cases are steady, so the floor is low; but 8 % is no difference where one of the two differs by 10 %."""
    steady = [with_noise(replace(CASE, backend="eager", context_length=c), 1.0, 0.001) for c in range(20, 70)]
    pair = [
        with_noise(replace(CASE, backend=backend), ms, 0.1 if backend == noisy else 0.001)
        for backend, ms in (("flash_attn", 10.0), ("sdpa", 10.8), ("sdpa_math", 11.2))
    ]
    text, headline = summary([*steady, *pair], tmp_path)
    assert headline["noise_floor_forward_backward"] < 0.0011
    found = verdicts(text)
    assert found["sdpa"] == "no difference to the fastest"
    assert found["sdpa_math"] == "1.12 x the fastest"
    text, _ = summary([*steady, *(replace(m, rounds=m.rounds[:1] * 2) for m in pair)], tmp_path)
    assert "x the fastest" in verdicts(text)["sdpa"]


def test_summary_of_several_cells(tmp_path):
    """Each cell has its own fastest; auto's worst cell is named, and a cell without another kernel says nothing."""
    large, lonely = replace(CASE, context_length=512), replace(CASE, causal=True, window=(3, 0))
    cells = [
        with_noise(CASE, 10.0),
        with_noise(replace(CASE, backend="auto"), 9.0),
        with_noise(replace(large, backend="sdpa"), 30.0),
        with_noise(replace(large, backend="flash_attn"), 20.0),
        with_noise(replace(large, backend="auto"), 26.0),
        with_noise(replace(lonely, backend="auto"), 1.0),
    ]
    text, headline = summary(cells, tmp_path)
    assert text.count("  fastest\n") == 3 and text.count(" x the fastest\n") == 3
    assert "batch 2, context 16, 3 heads of 8, causal, window 3, separate, bf16\n" in text
    assert headline["auto_behind_fastest_at_most"] == pytest.approx(0.3)
    assert headline["auto_worst_cell"] == "batch 2, context 512, 3 heads of 8, not causal, separate, bf16"
    text, headline = summary(cells[:2], tmp_path)
    assert headline["auto_behind_fastest_at_most"] == 0.0  # it is ahead
    text, headline = summary(cells[:1], tmp_path)
    assert "auto" not in text and "auto_worst_cell" not in headline


def test_differences_of_one_round_are_not_judged(tmp_path):
    measurements = [made(CASE, [10.0]), made(replace(CASE, backend="sdpa"), [10.001], operator="aten.attention")]
    measurements.append(made(replace(CASE, backend="auto"), [12.0], operator="aten.attention"))
    text, headline = summary(measurements, tmp_path)
    assert "differences are not judged" in text and "no difference" not in text and "auto is behind" not in text
    assert verdicts(text) == {
        "flash_attn": "fastest", "sdpa": "1.00 x the fastest", "auto -> auto": "1.20 x the fastest",
    }  # fmt: skip
    assert headline["noise_floor_forward_backward"] is None and "auto_worst_cell" not in headline


def test_the_same_kernel_under_two_names_is_a_control(tmp_path):
    """Rounds 1 % apart, but the same operator 4 % apart from itself: a difference of 4 % is none."""
    fused, other = (
        {"operator": "aten._scaled_dot_product_flash_attention"},
        {"operator": "flash_attn._flash_attn_forward"},
    )
    large = replace(CASE, context_length=512)
    cases = [
        with_noise(replace(CASE, backend="sdpa"), 10.0, 0.01, **fused),
        with_noise(replace(CASE, backend="auto"), 10.4, 0.01, **fused),
        with_noise(CASE, 10.39, 0.01, **other),
        with_noise(replace(CASE, backend="eager"), 10.45, 0.01, operator="eager (matmul, softmax, matmul)"),
        with_noise(replace(large, backend="eager"), 99.0, 0.01, operator="eager (matmul, softmax, matmul)"),
        with_noise(replace(large, backend="sdpa"), 20.0, 0.01, **fused),  # another cell: no pair with the first two
    ]
    text, headline = summary(cases, tmp_path)
    assert headline["noise_floor_forward_backward"] == pytest.approx(0.04)
    assert headline["noise_floor_forward"] == pytest.approx(0.01, rel=1e-2)
    first = verdicts(text.split("context 512")[0])
    assert first["flash_attn"] == "no difference to the fastest" and first["eager"] == "1.04 x the fastest"
    assert "1 pairs" in text and "over 6 cases" in text
    headline = summary([cases[0], *cases[2:]], tmp_path)[1]
    assert headline["noise_floor_forward_backward"] == pytest.approx(0.01, rel=1e-2)
    steady = [with_noise(replace(CASE, backend=backend), 10.0, 0.01, **fused) for backend in ("sdpa", "auto")]
    headline = summary(steady, tmp_path)[1]  # the larger of the two counts
    assert headline["noise_floor_forward_backward"] == pytest.approx(0.01, rel=1e-2)


def test_the_floor_of_each_direction_is_its_own(tmp_path):
    measurement = made(CASE, [10.0], [10.0])
    measurement.rounds[1]["forward"] = [3.0]  # 2.5 before
    headline = summary([measurement], tmp_path)[1]
    floors = [headline[f"noise_floor_{direction}"] for direction in DIRECTIONS]
    assert floors == pytest.approx([0.2, 0.0, 0.0])


def test_summary_of_a_case_out_of_memory_in_a_later_round(tmp_path):
    text, headline = summary([made(CASE, [1.0], [1.0], status="oom", reason="full")], tmp_path)
    assert (headline["cases"], headline["ok"], headline["oom"]) == (1, 0, 1)
    assert "oom: full" in text and verdicts(text) == {"flash_attn": "fastest"}


# --------------------------------------------------------------------------------------------------------- break-even


@pytest.mark.parametrize(
    ("saving", "answer"),
    [
        ({16, 32, 64, 128}, (None, 16)),
        (set(), (128, None)),
        ({16, 32, 64}, (128, None)),  # but not at the largest
        ({128}, (120, 128)),
        ({16, 64, 128}, (56, 64)),  # a point that saves below one that does not counts for nothing
        ({32, 128}, (120, 128)),
    ],
)
def test_break_even_on_a_grid(saving, answer):
    asked = []

    def saves(context):
        asked.append(context)
        return context in saving

    assert find_break_even(saves, [16, 32, 64, 128], 8) == answer
    assert asked[:4] == [16, 32, 64, 128] and len(asked) == len(set(asked))


def test_break_even_is_found_between_any_grid_points():
    generator = random.Random(0)
    inside = 0
    for _ in range(2000):
        contexts = sorted(generator.sample(range(1, 3000), generator.randint(1, 8)))
        threshold, step = generator.randint(1, 3100), generator.choice([1, 2, 8, 128, 1000])
        asked = []
        low, high = find_break_even(lambda c, a=asked, t=threshold: a.append(c) or c >= t, contexts, step)
        assert len(asked) == len(set(asked)) and set(contexts) <= set(asked)
        if threshold <= contexts[0]:
            assert (low, high) == (None, contexts[0])
        elif threshold > contexts[-1]:
            assert (low, high) == (contexts[-1], None)
        else:
            inside += 1
            assert low < threshold <= high and high - low <= max(step, 1)
            assert {low, high} <= set(asked)  # both were seen
            assert len(asked) <= len(contexts) + 2 + math.log2(3000 / step + 1)
    assert inside > 500


class FakeBench:
    """Answers with made-up times: `ms(case, round)` is a number, or the status of a case that cannot run."""

    def __init__(self, ms: Callable[[Case, int], float | str], device: torch.device = CPU, reason: str = ""):
        self.ms, self.device, self.reason = ms, device, reason
        self.dtype, self.rounds, self.calls = "fp32", 2, []

    def measure(self, case: Case, earlier: Measurement | None = None) -> Measurement:
        self.calls.append(case)
        measurement = earlier or Measurement(case)
        answer = self.ms(case, len(measurement.rounds))
        if isinstance(answer, str):
            measurement.status, measurement.reason = answer, self.reason
        else:
            measurement.rounds.append({direction: [answer] * 3 for direction in DIRECTIONS})
        return measurement

    def ask(self, backends=("sdpa_flash",), windows=(), contexts=(16, 32, 64, 128, 256, 512), causal=True):
        base = Case("eager", 1, 16, 2, 8, causal=causal, dtype="fp32")
        return break_even(self, base, list(contexts), list(windows), list(backends), lambda c: max(1, 1024 // c))


def fused_from(threshold: int, fast: float = 1.0, slow: float = 3.0) -> Callable[[Case, int], float]:
    return lambda case, _: 2.0 if case.backend == "eager" else fast if case.context_length >= threshold else slow


@pytest.mark.parametrize("threshold", [17, 30, 100, 104, 105, 256, 300, 512])
def test_fused_against_eager_to_the_step(threshold):
    bench = FakeBench(fused_from(threshold))
    known, (answer,) = bench.ask()
    line = break_even_words(answer)
    assert answer["low"] < threshold <= answer["high"] and answer["high"] - answer["low"] <= 8
    assert (answer["backend"], answer["against"], answer["status"], answer["step"]) == ("sdpa_flash", "eager", "ok", 8)
    assert answer["window"] == -1 and answer["grid"] == [16, 32, 64, 128, 256, 512]
    assert line == f"sdpa_flash faster than eager: from {answer['high']} on (not yet at {answer['low']})"
    assert all(bench.calls.count(case) == bench.rounds for case in bench.calls)
    assert {m.case for m in known} == set(bench.calls) and len(known) == len(set(bench.calls))
    assert all(case.batch_size == max(1, 1024 // case.context_length) and case.causal for case in bench.calls)
    assert {case.backend for case in bench.calls} == {"eager", "sdpa_flash"}


def test_fused_against_eager_everywhere_and_nowhere():
    _, (answer,) = FakeBench(fused_from(1)).ask()
    assert (answer["low"], answer["high"]) == (None, 16)
    assert "everywhere from 16 on, the smallest tried" in break_even_words(answer)
    _, (answer,) = FakeBench(fused_from(1000)).ask()
    assert (answer["low"], answer["high"]) == (512, None) and "never up to 512" in break_even_words(answer)
    _, (answer,) = FakeBench(fused_from(1, fast=2.0)).ask()  # as fast as eager is not faster
    assert answer["high"] is None


def test_eager_is_asked_once_for_all_kernels():
    bench = FakeBench(fused_from(100))
    _, answers = bench.ask(backends=["sdpa_flash", "sdpa_math"])
    assert [(a["backend"], a["low"], a["high"]) for a in answers] == [("sdpa_flash", 96, 104), ("sdpa_math", 96, 104)]
    assert all(bench.calls.count(case) == bench.rounds for case in bench.calls)


def test_where_eager_has_no_memory_fused_saves():
    def ms(case, _):
        return ("oom" if case.context_length > 200 else 1.0) if case.backend == "eager" else 2.0

    _, (answer,) = FakeBench(ms).ask()
    assert (answer["low"], answer["high"]) == (200, 208)
    _, (answer,) = FakeBench(lambda *_: "oom").ask()  # but not where neither has
    assert answer["high"] is None


@pytest.mark.parametrize(
    ("fused", "eager", "saves"),
    [
        ((1.89, 1.89), (2.0, 2.0), True),
        ((1.8, 1.98), (2.0, 2.0), False),  # 5 % faster, but 10 % from itself
        ((1.95, 1.95), (2.0, 2.2), False),  # 7 % faster, but eager is 10 % from itself
        ((1.5, 1.65), (2.0, 2.2), True),
        ((0.5, 5.0), (20.0, 20.0), True),  # noise beyond a half counts as a half
    ],
)
def test_a_difference_within_the_noise_is_none(fused, eager, saves):
    bench = FakeBench(lambda case, number: (eager if case.backend == "eager" else fused)[number])
    _, (answer,) = bench.ask()
    assert (answer["low"], answer["high"]) == ((None, 16) if saves else (512, None))


def test_what_cannot_run_is_said_with_its_reason():
    bench = FakeBench(fused_from(100))
    known, answers = bench.ask(backends=["flash_attn", "sdpa_flash"], windows=[64])
    assert [answer["status"] for answer in answers] == ["unsupported", "ok", "unsupported"]
    assert answers[0]["reason"].startswith("flash_attn needs an NVIDIA GPU") and answers[0]["high"] is None
    assert break_even_words(answers[0]).startswith(
        "flash_attn faster than eager: unsupported: flash_attn needs an NVIDIA GPU"
    )
    assert answers[2]["window"] == 64 and "needs an NVIDIA GPU" in answers[2]["reason"]
    assert {m.case.backend for m in known} == {"eager", "sdpa_flash"}


def test_windows_against_the_full_mask(monkeypatch):
    monkeypatch.setattr(attention_studies, "reason_against", lambda *_: None)

    def ms(case, _):
        if case.window == FULL:
            return 1.0 if case.backend == "sdpa_cudnn" else 2.0
        return 1.5 if case.context_length < 3000 else 0.5

    bench = FakeBench(ms, device=CUDA)
    contexts = [16, 64, 128, 256, 1024, 4096, 8192]
    known, answers = bench.ask(backends=[], windows=[64, 200, 8191], contexts=contexts, causal=False)
    assert [(a["backend"], a["window"], a["against"], a["step"]) for a in answers] == [
        ("flash_attn", 64, "flash_attn", 128), ("flash_attn", 64, "sdpa_cudnn", 128),
        ("flash_attn", 200, "flash_attn", 128), ("flash_attn", 200, "sdpa_cudnn", 128),
    ]  # fmt: skip
    assert [a["grid"] for a in answers] == [contexts[2:]] * 2 + [contexts[3:]] * 2  # a window must hide something
    assert (answers[0]["low"], answers[0]["high"]) == (None, 128)
    assert answers[1]["low"] < 3000 <= answers[1]["high"] <= answers[1]["low"] + 128
    lines = [break_even_words(answer) for answer in answers]
    assert "window 64" in lines[0] and "the same kernel" in lines[0] and "cuDNN" in lines[1]
    assert all(case.causal for case in bench.calls)  # a window looks back
    assert {case.window for case in bench.calls} == {FULL, (64, 0), (200, 0)}
    assert len(known) == len(set(bench.calls))


def test_windows_without_the_package_or_cudnn(monkeypatch):
    missing = ("flash_attn", "sdpa_cudnn")
    monkeypatch.setattr(
        attention_studies, "reason_against", lambda _, case: "missing" if case.backend in missing else None
    )
    _, answers = FakeBench(lambda *_: 1.0).ask(backends=[], windows=[64])
    assert [(a["backend"], a["against"]) for a in answers] == [("varlen", "varlen")]


def test_eager_is_not_asked_beyond_its_comfort_on_a_gpu(monkeypatch):
    monkeypatch.setattr(attention_studies, "reason_against", lambda *_: None)
    contexts = [512, 1024, 2048, 4096, 8192]
    bench = FakeBench(fused_from(600), device=CUDA)
    _, (answer,) = bench.ask(contexts=contexts)
    assert answer["grid"] == [512, 1024, 2048] and max(case.context_length for case in bench.calls) == 2048
    bench = FakeBench(fused_from(5000), device=CPU)
    _, (answer,) = bench.ask(contexts=contexts)
    assert answer["grid"] == contexts
    _, (answer,) = FakeBench(fused_from(1), device=CUDA).ask(contexts=[4096, 8192])
    assert answer["status"] == "unsupported" and "no context fits" in break_even_words(answer)


def test_auto_is_compared_like_a_kernel():
    """It has no support check of its own: it always finds something that runs."""
    _, (answer,) = FakeBench(fused_from(100)).ask(backends=["auto"])
    assert (answer["status"], answer["low"], answer["high"]) == ("ok", 96, 104)


@pytest.mark.parametrize("failing", ["sdpa_flash", "eager"])
@pytest.mark.parametrize("status", ["error", "unsupported"])
def test_a_kernel_that_fails_is_not_one_that_never_pays(failing, status):
    """Wrong results, say, from some context on."""
    times = fused_from(100)

    def ms(case, number):
        return status if case.backend == failing and case.context_length > 200 else times(case, number)

    bench = FakeBench(ms, reason="why it failed")
    known, (answer, other) = bench.ask(backends=["sdpa_flash", "sdpa_math"])
    assert (answer["status"], answer["reason"], answer["low"], answer["high"]) == (status, "why it failed", None, None)
    assert break_even_words(answer) == f"sdpa_flash faster than eager: {status}: why it failed"
    assert other["status"] == ("ok" if failing == "sdpa_flash" else status)  # and the next question is asked
    assert {m.status for m in known} == {"ok", status}


def test_support_is_asked_for_the_case_as_it_is(monkeypatch):
    asked = []

    def unsupported(backend, device, dtype, window, head_dim, *, causal):
        asked.append((backend, device, dtype, window, head_dim, causal))
        return "too wide" if head_dim > 256 else None

    monkeypatch.setattr(attention_studies, "unsupported_reason", unsupported)
    base = Case("eager", 1, 16, 2, 512, causal=False, dtype="fp32")
    bench = FakeBench(lambda *_: pytest.fail("it was measured all the same"))
    _, answers = break_even(bench, base, [64, 128, 256], [100], ["flash_attn"], lambda context: 1)
    assert [(a["status"], a["reason"]) for a in answers] == [("unsupported", "too wide")] * 2
    assert ("flash_attn", CPU, torch.float32, FULL, 512, False) in asked
    assert ("varlen", CPU, torch.float32, (100, 0), 512, True) in asked
    assert all(head_dim == 512 for _, _, _, _, head_dim, _ in asked)


def test_break_even_as_a_run(run, monkeypatch):
    """The whole experiment with made-up times: answers in run.json, every case in results.csv."""
    fake = FakeBench(fused_from(100))
    monkeypatch.setattr(Bench, "measure", lambda self, case, earlier=None: fill(fake.measure(case, earlier)))

    def fill(measurement):
        measurement.peak_bytes = measurement.peak_above_inputs_bytes = dict.fromkeys(DIRECTIONS, 1)
        return measurement

    everything = {name: None for name in BASE} | {"device": "cpu", "rounds": 2, "sweep": "break_even"}
    done = run(**everything | {"tokens": "1024", "context_length": "512,64,128,256", "window": "-1,64"})
    assert done.status == 0, done.stderr
    first, second = done.info["results"]["break_even"]
    assert (first["low"], first["high"], first["grid"]) == (96, 104, [64, 128, 256, 512])
    assert (second["window"], second["status"]) == (64, "unsupported")
    assert {(row["backend"], row["context_length"], row["batch_size"]) for row in done.rows} == {
        (backend, str(context), str(1024 // context))
        for backend, context in itertools.product(("eager", "sdpa_flash"), (64, 96, 104, 112, 128, 256, 512))
    }
    assert "from 104 on (not yet at 96)" in (done.path / "summary.txt").read_text()
    assert done.last_line["cases"] == 14 == len(set(fake.calls))
    fake.calls.clear()
    done = run(**everything | {"batch_size": "5", "context_length": "64", "window": "-1"})
    assert {case.batch_size for case in fake.calls} == {5}


def test_break_even_where_nothing_can_run(run):
    """results.csv has no rows then."""
    everything = {name: None for name in BASE} | {"device": "cpu", "sweep": "break_even"}
    done = run(**everything | {"backends": "flash_attn"})
    assert done.status == 0
    assert done.info["status"] == "ok" and done.info["results"]["break_even"][0]["status"] == "unsupported"


# ---------------------------------------------------------------------------------------------------------- overhead


@pytest.mark.parametrize("layout", ["separate", "packed"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("backend", "device"),
    [
        *((backend, CPU) for backend in ("sdpa", "sdpa_math", "sdpa_flash")),
        *(
            pytest.param(backend, CUDA, marks=pytest.mark.gpu)
            for backend in ("sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flash_attn")
        ),
    ],
)
def test_the_direct_call_is_the_same_function(backend, device, layout, causal):
    reason = unsupported_reason(backend, device, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    case = Case(backend, 2, 128, 2, 64, causal=causal, layout=layout, dtype="bf16")
    inputs, _ = make_inputs(case, device)
    assert torch.equal(direct_call(case, inputs), forward(case, inputs))
    assert not torch.equal(direct_call(replace(case, causal=not causal), inputs), forward(case, inputs))


def flash_attn_stub(monkeypatch) -> list[tuple]:
    calls = []

    def function(name):
        return lambda *tensors, **options: calls.append((name, len(tensors), options)) or tensors[0]

    stub = SimpleNamespace(flash_attn_func=function("three"), flash_attn_qkvpacked_func=function("one"))
    monkeypatch.setitem(sys.modules, "flash_attn", stub)
    return calls


def test_the_direct_call_of_flash_attn(monkeypatch):
    calls = flash_attn_stub(monkeypatch)
    direct_call(replace(CASE, causal=True), [torch.ones(1)] * 3)
    direct_call(replace(CASE, layout="packed"), [torch.ones(1)])
    assert calls == [
        ("three", 3, {"causal": True, "window_size": FULL}),
        ("one", 1, {"causal": False, "window_size": FULL}),
    ]


def test_the_direct_call_has_the_window_of_its_case(monkeypatch):
    """Else --sweep overhead --window 64 --backends flash_attn would hold a window against the full mask."""
    calls = flash_attn_stub(monkeypatch)
    direct_call(replace(CASE, causal=True, window=(64, 0)), [torch.ones(1)] * 3)
    assert calls[0][2] == {"causal": True, "window_size": (64, 0)}


class FakeTimer:
    def __init__(self, device, function, inputs, upstream):
        self.once = function

    def warm_up(self, seconds):
        assert seconds == 0.5

    def wait(self):
        pass


def test_overhead_of_known_times(monkeypatch):
    clock = SimpleNamespace(now=0.0, calls=[])

    def takes(name, ms):
        def call(case, inputs):
            clock.now += ms / 1000
            clock.calls.append(name)

        return call

    monkeypatch.setattr(attention_studies, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(attention_studies, "Timer", FakeTimer)
    monkeypatch.setattr(attention_studies, "direct_call", takes("direct", 2.0))
    monkeypatch.setattr(attention_studies, "forward", takes("seam", 2.5))
    bench = Bench(CPU, "fp32", rounds=3, seconds=0.5)
    (found,) = overhead(bench, [Case("sdpa", 1, 16, 2, 8, dtype="fp32")])
    line = overhead_words(found)
    assert (found["direct_ms"], found["seam_ms"]) == (pytest.approx(2.0), pytest.approx(2.5))
    assert found["overhead"] == pytest.approx(0.25) and found["noise"] == pytest.approx(0.0, abs=1e-9)
    assert (found["backend"], found["context_length"], found["status"]) == ("sdpa", 16, "ok")
    assert "+25.00 %" in line and "direct 2.0000 ms" in line and "attention.py 2.5000 ms" in line
    size = found["repetitions_a_block"]
    blocks = [name for name, calls in itertools.groupby(clock.calls) for _ in range(len(list(calls)) // size)]
    assert len(blocks) == 3 * found["blocks"] > 50 and len(clock.calls) == size * len(blocks)
    cycles = [blocks[i : i + 3] for i in range(0, len(blocks), 3)]
    assert all(sorted(cycle) == ["direct", "direct", "seam"] for cycle in cycles)  # in turn
    assert len({cycle.index("seam") for cycle in cycles}) == 3  # in no fixed order


def test_overhead_without_a_gpu():
    bench = Bench(CPU, "fp32", rounds=1, seconds=0.0005)
    shape = Case("sdpa", 1, 4, 1, 4, dtype="fp32")
    cases = [
        shape,
        replace(shape, layout="packed"),
        replace(shape, backend="sdpa_cudnn"),
        replace(shape, backend="eager"),
    ]
    found = overhead(bench, cases)
    lines = [overhead_words(answer) for answer in found]
    assert [(answer["backend"], answer["layout"], answer["status"]) for answer in found] == [
        ("sdpa", "separate", "ok"),
        ("sdpa", "packed", "ok"),
        ("sdpa_cudnn", "separate", "unsupported"),
        ("eager", "separate", "unsupported"),
    ]
    for answer in found[:2]:
        assert min(answer["direct_ms"], answer["seam_ms"]) > 0 and answer["noise"] >= 0
        assert answer["overhead"] == answer["seam_ms"] / answer["direct_ms"] - 1
    assert "needs an NVIDIA GPU" in found[2]["reason"] and "no direct call" in found[3]["reason"]
    assert "unsupported: sdpa_cudnn needs" in lines[2] and "batch 1, context 4, 1 heads of 4" in lines[2]
    assert [overhead_words(answer) for answer in json.loads(json.dumps(found))] == lines  # as --summarise reads them


def test_overhead_as_a_run(run, monkeypatch):
    monkeypatch.setattr(attention_studies, "Timer", FakeTimer)
    monkeypatch.setattr(FakeTimer, "warm_up", lambda *_: None)
    done = run(sweep="overhead", backends="sdpa,sdpa_flash", layout="separate,packed", context_length="4", rounds=1)
    assert done.status == 0, done.stderr
    answers = done.info["results"]["overhead"]
    assert [(a["backend"], a["layout"], a["context_length"]) for a in answers] == [
        ("sdpa", "separate", 4), ("sdpa_flash", "separate", 4), ("sdpa", "packed", 4), ("sdpa_flash", "packed", 4),
    ]  # fmt: skip
    assert {path.name for path in done.path.iterdir()} == {"run.json", "summary.txt"}  # no cases, so no table
    assert (done.path / "summary.txt").read_text().count("through attention.py") == 4
    assert done.last_line == {"run": str(done.path), "status": "ok"}


def test_overhead_of_what_has_no_direct_call():
    cases = [Case(backend, 1, 4, 1, 4, dtype="fp32") for backend in ("auto", "flex", "varlen")]
    assert all("no direct call" in found["reason"] for found in overhead(Bench(CPU, "fp32", 1, 0.001), cases))
