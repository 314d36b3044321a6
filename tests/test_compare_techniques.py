"""compare_techniques.py: what is finished stays, what failed is a row, and nothing outlives the runner."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, combinations
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
from transformers import GPT2LMHeadModel

import case_runner
import compare_techniques
import comparison_cases
import gpt2_peer
import llm_train
from compare_techniques import Settings, effects
from comparison_cases import FACTORS, all_combinations, make_cases
from dataset import load_text_data
from sample_documents import generate_documents
from transformer_based_llm import TransformerLM, model_config
from utils import SettingsError, count_matmul_parameters, parse_settings, run_script

# A trainer that does in milliseconds what behaviour.json says for the case's name.
FAKE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = flags["--run_name"]
folder = Path(flags["--output_folder"]) / flags["--experiment"] / name
here = Path(__file__).parent
behaviour = json.loads((here / "behaviour.json").read_text()).get(name, "ok")
begin = time.time()

def note(what):
    with (here / "calls.jsonl").open("a") as file:
        row = {"name": name, "what": what, "time": time.time(), "pid": os.getpid()}
        file.write(json.dumps(row | {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}) + "\\n")

def record(status, **more):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"status": status, "settings": {}, "device_name": json.loads((here / "device.json").read_text()), **more}
    (folder / "run.json").write_text(json.dumps(content))

note("begin")
assert not folder.exists(), "the runner must remove an earlier attempt"
if behaviour == "unsupported":
    print("llm_train.py: error: --loss fused needs liger-kernel", file=sys.stderr)
    sys.exit(2)
if behaviour == "usage":
    print("usage: llm_train.py [-h]\\nllm_train.py: error: unrecognized arguments: --x", file=sys.stderr)
    sys.exit(2)
if behaviour == "crash":
    print("line of a bar 1\\rline of a bar 2\\nValueError: no such thing", file=sys.stderr)
    sys.exit(1)
if behaviour == "early oom":
    print(json.dumps({"run": str(folder), "status": "oom"}))
    sys.exit(1)
if behaviour == "oom":
    record("oom", error="CUDA out of memory")
    sys.exit(1)
if behaviour == "one does not fit":
    record("error", error="not even one sequence fits in memory")
    (folder / "batch_size_search.csv").write_text("batch_size,status,peak\\n8,oom,1.0\\n4,oom,1.0\\n")
    sys.exit(2)
if behaviour == "killed":
    record("running")
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "plots fail":
    record("ok", results={})
    print("OSError: no space", file=sys.stderr)
    sys.exit(1)
if behaviour in ("hang", "stubborn", "with child"):
    def end(number, frame):
        note("signal")
        if behaviour != "stubborn":
            time.sleep(0.2)
            record("interrupted")
            sys.exit(130)
    signal.signal(signal.SIGINT, end)
    if behaviour == "with child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (here / "child").write_text(str(child.pid))
    record("running")
    note("ready")
    deadline = time.time() + 60
    while time.time() < deadline:
        time.sleep(0.05)
time.sleep(0.4 if behaviour == "slow" else 0)
results = {"peak_allocated_gib": 1.5, "step_ms_median": 20.0, "tokens_per_s": 51200.0, "batch_size": 8}
record("ok", results=results | json.loads((here / "results.json").read_text()).get(name, {}))
note("end")
"""


@dataclass
class Bench:
    """A folder with the fake trainer, and calls of compare_techniques.main() that use it."""

    root: Path

    def behave(self, **behaviour: str) -> None:
        (self.root / "behaviour.json").write_text(json.dumps(behaviour))

    def calls(self, what: str = "begin") -> list[dict]:
        path = self.root / "calls.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["what"] == what]

    def names(self) -> list[str]:
        """The cases started since the last time this was asked."""
        names = [row["name"] for row in self.calls()]
        (self.root / "calls.jsonl").unlink(missing_ok=True)
        return names

    def run(self, *flags: str) -> tuple[int, str, str]:
        argv = ["compare_techniques.py", "--output_folder", str(self.root / "out"), "--device", "cpu", *flags]
        out, err = io.StringIO(), io.StringIO()
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        with (
            patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as caught,
        ):
            run_script(compare_techniques.main)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
        for row in self.calls():
            assert not psutil.pid_exists(row["pid"]), "a process outlived the runner"
        return caught.value.code, out.getvalue(), err.getvalue()

    def interrupt_at(self, ready: int, number: int = signal.SIGINT, again: bool = False) -> threading.Thread:
        """Send a signal to this process once so many cases are ready; a second one when they have noted the first."""

        def wait_for(what: str) -> None:
            deadline = time.monotonic() + 30
            while len(self.calls(what)) < ready and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(os.getpid(), number)

        def send() -> None:
            wait_for("ready")
            if again:
                wait_for("signal")

        thread = threading.Thread(target=send)
        thread.start()
        return thread

    def folder(self, name: str = "", experiment: str = "smoke_seed") -> Path:
        return self.root / "out" / experiment / name

    def info(self, name: str, experiment: str = "smoke_seed") -> dict:
        return json.loads((self.folder(name, experiment) / "run.json").read_text())

    def comparison(self, experiment: str = "smoke_seed") -> dict:
        return json.loads((self.folder(experiment=experiment) / "comparison.json").read_text())

    def statuses(self) -> dict[str, str]:
        return {row["name"]: row["status"] for row in self.comparison()["cases"]}


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    """Four cases, a-batch-125 to d-batch-125, run by the fake trainer."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "device.json").write_text(
        json.dumps(compare_techniques.describe_environment(torch.device("cpu"))["device_name"])
    )
    original = case_runner.command

    def command(case, folder, place):
        return [sys.executable, str(tmp_path / "fake.py"), *original(case, folder, place)[2:]]

    table = tuple((f"{letter}-batch-125", "--precision fp32", f"case {letter}") for letter in "abcd")
    monkeypatch.setattr(case_runner, "command", command)
    monkeypatch.setattr(comparison_cases, "SEED_CASES", table)
    bench = Bench(tmp_path)
    bench.behave()
    return bench


ALL = [f"{letter}-batch-125" for letter in "abcd"]


# --- What is run, and what is not run again ---------------------------------------------------------------------------


def test_finished_cases_are_not_run_again(bench):
    status, out, _ = bench.run()
    assert status == 0 and bench.names() == ALL
    assert bench.statuses() == dict.fromkeys(ALL, "ok") and bench.comparison()["finished"] is True
    assert json.loads(out.splitlines()[-1])["status"] == "ok"
    assert "1.500 GiB" in out and "20.0 ms" in out and "51,200 tokens/s" in out
    status, out, _ = bench.run()
    assert status == 0 and bench.names() == [] and "4 cases, 0 to run" in out
    row = bench.comparison()["cases"][1]
    assert row["words"] == "case b" and row["flags"]["batch_size"] == "8" and row["flags"]["model_size"] == "tiny"
    assert row["gpu"] is None and row["error"] is None


def test_oom_and_unsupported_are_results_and_errors_are_tried_again(bench):
    bench.behave(**dict(zip(ALL, ["oom", "unsupported", "crash", "ok"], strict=True)))
    status, out, _ = bench.run()
    assert status == 1 and bench.names() == ALL
    assert list(bench.statuses().values()) == ["oom", "unsupported", "error", "ok"]
    assert bench.comparison()["finished"] is False and "left: c-batch-125" in out
    assert bench.info(ALL[1])["error"] == "--loss fused needs liger-kernel"
    assert bench.info(ALL[1])["settings"]["precision"] == "fp32"
    bench.behave()
    status, _, _ = bench.run()
    assert status == 0 and bench.names() == [ALL[2]] and bench.comparison()["finished"] is True
    assert not (bench.folder(ALL[2]) / "error.txt").exists()


def test_a_case_with_other_flags_is_run_anew_and_says_so(bench):
    bench.run()
    bench.names()
    table = (*comparison_cases.SEED_CASES[:1], (ALL[1], "--precision bf16", ""), *comparison_cases.SEED_CASES[2:])
    with patch.object(comparison_cases, "SEED_CASES", table):
        _, out, _ = bench.run()
    assert bench.names() == [ALL[1]]
    assert "b-batch-125 was made with other flags and is run anew: --precision was fp32, is bf16" in out
    assert bench.info(ALL[1])["case"]["flags"]["precision"] == "bf16"


def test_the_same_text_in_another_place_is_no_other_flag(bench):
    bench.run("--dataset_path", "/here/pl_text")
    bench.names()
    bench.run("--dataset_path", "there/pl_text")
    assert bench.names() == []
    bench.run("--dataset_path", "there/other")
    assert bench.names() == ALL


@pytest.mark.parametrize("status", ["running", "interrupted", "error"])
def test_a_case_that_did_not_end_is_run_again(bench, status):
    bench.run()
    bench.names()
    info = bench.info(ALL[0])
    (bench.folder(ALL[0]) / "run.json").write_text(json.dumps(info | {"status": status}))
    (bench.folder(ALL[0]) / "steps.jsonl").write_text("old")
    assert bench.run()[0] == 0 and bench.names() == [ALL[0]]
    assert bench.info(ALL[0])["status"] == "ok" and not (bench.folder(ALL[0]) / "steps.jsonl").exists()


def test_a_folder_that_is_no_run_is_never_removed(bench):
    bench.folder(ALL[2]).mkdir(parents=True)  # an empty one is what a kill left
    bench.folder(ALL[1]).mkdir(parents=True)
    (bench.folder(ALL[1]) / "notes.txt").write_text("mine")
    status, _, err = bench.run()
    assert status == 2 and "holds no run.json" in err and bench.names() == []
    assert (bench.folder(ALL[1]) / "notes.txt").read_text() == "mine"
    assert bench.run("--cases", "a-batch-125,c-batch-125")[0] == 0 and bench.names() == [ALL[0], ALL[2]]


def test_results_of_another_device_are_neither_mixed_nor_removed(bench):
    (bench.root / "device.json").write_text('"NVIDIA A40"')
    bench.run("--cases", ALL[0])
    bench.names()
    status, _, err = bench.run()
    assert status == 2 and "holds results of NVIDIA A40" in err and "--output_folder" in err
    assert bench.names() == [] and bench.info(ALL[0])["status"] == "ok"


def test_list_runs_nothing(bench):
    bench.run("--cases", ALL[0])
    bench.names()
    status, out, _ = bench.run("--list", "true")
    assert status == 0 and bench.names() == []
    assert "smoke_seed/a-batch-125: ok" in out and "smoke_seed/b-batch-125: missing" in out
    assert "--model_size tiny --precision fp32 --batch_size 8" in out


def test_chosen_cases_leave_the_others_in_the_list(bench):
    status, out, _ = bench.run("--cases", "c-batch-125")
    assert status == 0 and bench.names() == [ALL[2]]
    assert bench.statuses() == dict(zip(ALL, ["missing", "missing", "ok", "missing"], strict=True))
    assert bench.comparison()["finished"] is False and json.loads(out.splitlines()[-1])["status"] == "ok"


def test_cases_of_other_lists_stay_in_the_comparison(bench):
    for seed in "01":
        with (
            patch.object(comparison_cases, "QUALITY_CASES", comparison_cases.QUALITY_CASES[:2]),
            patch.object(comparison_cases, "CONFOUNDED_CASES", ()),
        ):
            bench.run("--experiment", "quality", "--seeds", seed)
    names = [row["name"] for row in bench.comparison("smoke_quality")["cases"]]
    assert names == ["fp32-baseline-seed-1", "bf16-seed-1", "fp32-baseline-seed-0", "bf16-seed-0"]


def test_a_second_runner_is_refused(bench):
    bench.folder().mkdir(parents=True)
    with case_runner.alone(bench.folder()):
        status, _, err = bench.run()
    assert status == 2 and "another compare_techniques.py" in err and bench.names() == []


# --- How a case ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "status", "words"),
    [
        ("crash", "error", "exit status 1: ValueError: no such thing"),
        ("usage", "error", "exit status 2: llm_train.py: error: unrecognized arguments: --x"),
        ("early oom", "oom", "exit status 1"),
        ("one does not fit", "oom", "not even one sequence fits in memory"),
        ("killed", "error", "ended by SIGKILL"),
        ("plots fail", "error", "exit status 1: OSError: no space"),
    ],
)
def test_every_way_to_fail_is_a_row(bench, behaviour, status, words):
    bench.behave(**{ALL[1]: behaviour})
    _, out, _ = bench.run("--cases", f"{ALL[1]},{ALL[2]}")
    assert bench.names() == ALL[1:3]  # the one after it runs
    row = bench.comparison()["cases"][1]
    assert (row["status"], row["error"]) == (status, words)
    info = bench.info(ALL[1])
    assert info["status"] == status and info["case"]["flags"]["precision"] == "fp32" and words in out


def test_the_last_lines_of_a_failed_process_are_kept(bench):
    bench.behave(**{ALL[0]: "crash"})
    bench.run("--cases", ALL[0])
    assert (bench.folder(ALL[0]) / "error.txt").read_text() == "line of a bar 2\nValueError: no such thing\n"


def test_a_case_that_takes_too_long_is_ended_with_its_children(bench):
    bench.behave(**{ALL[0]: "with child"})
    status, _, _ = bench.run("--timeout_minutes", "0.02", "--cases", f"{ALL[0]},{ALL[1]}")
    assert status == 1 and bench.statuses()[ALL[0]] == "error" and bench.statuses()[ALL[1]] == "ok"
    assert bench.info(ALL[0])["error"] == "took longer than 0.02 minutes; raise --timeout_minutes"
    assert has_ended(int((bench.root / "child").read_text()))


def has_ended(pid: int) -> bool:
    """Whether a process has ended, waiting a little; one that nobody has collected yet counts as ended."""
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


# --- Interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_done_and_leaves_no_process(bench, number):
    (bench.root / "fake.py").write_text(FAKE.replace("signal.SIGINT", f"signal.Signals({int(number)})"))
    bench.behave(**{ALL[1]: "with child"})
    thread = bench.interrupt_at(ready=1, number=number)
    status, out, _ = bench.run()
    thread.join()
    assert status == 128 + number
    assert len(bench.calls("signal")) == 1, "passed on once"
    assert has_ended(int((bench.root / "child").read_text()))
    assert list(bench.statuses().values()) == ["ok", "interrupted", "missing", "missing"]
    assert bench.comparison()["finished"] is False and json.loads(out.splitlines()[-1])["status"] == "interrupted"
    assert "go on with the same command: python compare_techniques.py" in out
    bench.names()
    bench.behave()
    assert bench.run()[0] == 0 and bench.names() == ALL[1:]


def test_the_second_ctrl_c_kills(bench):
    bench.behave(**{ALL[0]: "stubborn"})
    thread = bench.interrupt_at(ready=1, again=True)
    begin = time.monotonic()
    status, _, _ = bench.run()
    thread.join()
    assert status == 130 and time.monotonic() - begin < 30
    assert bench.statuses()[ALL[0]] == "running" and bench.comparison()["finished"] is False


def test_the_terminals_ctrl_c_does_not_reach_the_cases_twice(bench):
    """They are in process groups of their own."""
    groups = []
    original = subprocess.Popen

    def popen(*args, **options):
        process = original(*args, **options)
        if options.get("start_new_session"):
            groups.append(os.getpgid(process.pid) == process.pid != os.getpgid(0))
        return process

    with patch.object(subprocess, "Popen", popen):
        bench.run("--cases", ALL[0])
    assert groups == [True]


def test_no_case_starts_after_the_time_is_up(bench):
    bench.behave(**dict.fromkeys(ALL, "slow"))
    status, out, _ = bench.run("--stop_after_minutes", "0.005")
    done = bench.names()
    assert status == 0 and 1 <= len(done) < 4
    assert f"left: {', '.join(ALL[len(done) :])}" in out and json.loads(out.splitlines()[-1])["status"] == "incomplete"
    assert bench.run()[0] == 0 and bench.names() == ALL[len(done) :]


def test_two_gpus_run_two_cases_at_a_time(bench):
    bench.behave(**dict.fromkeys(ALL, "slow"))
    environment = compare_techniques.describe_environment(torch.device("cpu"))
    with patch.object(compare_techniques, "find_environment", lambda settings: environment):
        assert bench.run("--gpus", "0,3", "--size", "smoke")[0] == 0
    begun, ended = bench.calls("begin"), bench.calls("end")
    assert Counter(row["gpu"] for row in begun) == {"0": 2, "3": 2}
    events = sorted([(row["time"], 1, row["gpu"]) for row in begun] + [(row["time"], -1, row["gpu"]) for row in ended])
    at_once, most = Counter(), 0
    for _, change, gpu in events:
        at_once[gpu] += change
        most = max(most, at_once.total())
        assert at_once[gpu] <= 1, "a GPU has one case at a time"
    assert most == 2
    where = {row["name"]: row["gpu"] for row in begun}
    assert {row["name"]: row["gpu"] for row in bench.comparison()["cases"]} == where


def test_several_cases_at_a_time_on_a_cpu(bench):
    bench.behave(**dict.fromkeys(ALL, "slow"))
    assert bench.run("--processes", "3")[0] == 0
    events = sorted(
        [(row["time"], 1) for row in bench.calls("begin")] + [(row["time"], -1) for row in bench.calls("end")]
    )
    assert max(accumulate(change for _, change in events)) == 3
    assert bench.statuses() == dict.fromkeys(ALL, "ok") and bench.comparison()["finished"] is True
    assert {row["gpu"] for row in bench.comparison()["cases"]} == {None}
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        pytest.raises(SettingsError, match="--processes is for the CPU"),
    ):
        compare_techniques.find_environment(Settings(processes=2))


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--experiment", "speed"], "--experiment speed must be different ones of seed, factorial"),
        (["--experiment", "seed,seed"], "must be different ones"),
        (["--memory_budget_gib", "8"], "--memory_budget_gib has no effect without --experiment max_batch"),
        (["--seeds", "0"], "--seeds has no effect without --experiment quality"),
        (["--factors", "bf16"], "--factors has no effect without --experiment factorial"),
        (["--updates", "3"], "--updates has no effect without --experiment quality"),
        (["--experiment", "quality", "--updates", "0"], "--updates must be above 0"),
        (["--experiment", "quality", "--seeds", "0,0"], "--seeds 0,0 must be different numbers"),
        (["--experiment", "max_batch", "--memory_budget_gib", "8,-1"], "--memory_budget_gib 8,-1 must be"),
        (["--experiment", "factorial", "--factors", "bf16,speed"], "--factors bf16,speed must be different ones"),
        (["--timeout_minutes", "0"], "--timeout_minutes must be above 0"),
        (["--cases", "x"], "no case is named x"),
        (["--gpus", "0"], "--gpus needs NVIDIA GPUs"),
        (["--processes", "0"], "--processes must be above 0"),
        (["--dataset_name", "sample", "--dataset_path", "x"], "exclude each other"),
    ],
)
def test_wrong_settings_are_one_sentence(bench, flags, words):
    status, _, err = bench.run(*flags)
    assert status == 2 and words in err and err.count("\n") == 1 and bench.names() == []


# --- The cases --------------------------------------------------------------------------------------------------------

NINE = {
    "fp32-baseline-batch-125", "fp16-batch-125", "fp16-batch-195", "flash-attention-batch-125",
    "flash-attention-batch-195", "flash-attention-window-(64,0)-batch-125", "flash-attention-window-(64,0)-batch-195",
    "fp32-gradient-checkpointing-batch-125", "fp32-gradient-checkpointing-batch-303",
}  # fmt: skip


def cases_of(experiment: str, size: str, memory: float | None = None, **changes) -> dict[str, comparison_cases.Case]:
    return {case.name: case for case in make_cases(experiment, size, Settings(**changes), memory)}


@pytest.mark.parametrize("size", ["full", "smoke"])
@pytest.mark.parametrize("experiment", comparison_cases.EXPERIMENTS)
def test_every_flag_of_every_case_exists(experiment, size, tmp_path):
    cases = make_cases(experiment, size, Settings())
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        script = {"llm_train.py": llm_train, "gpt2_peer.py": gpt2_peer}[case.script]
        settings = parse_settings(
            script.Settings, case_runner.command(case, tmp_path / experiment, {"cache_folder": "x"})[2:]
        )
        assert settings.run_name == case.name and settings.cache_folder == "x" and settings.experiment == experiment
        assert settings.figures is False and "figures" not in case.flags  # no reason to make a finished case anew
        for name, value in case.flags.items():
            parsed = getattr(settings, name)
            assert str(parsed).lower() == value or float(parsed) == float(value), (case.name, name)


def test_the_seed_experiment():
    full, smoke = cases_of("seed", "full"), cases_of("seed", "smoke")
    assert list(full) == list(smoke) and set(list(full)[:9]) == NINE
    assert all(full[name].flags["optimizer"] == "adam" for name in NINE)
    for name, case in full.items():
        assert case.flags["batch_size"] == name.rpartition("-")[2] and case.flags["model_size"] == "gpt2"
        assert (case.script == "gpt2_peer.py") == name.startswith("hf-gpt2")
    sizes = {(full[name].flags["batch_size"], smoke[name].flags["batch_size"]) for name in full}
    assert sizes == {("125", "8"), ("195", "12"), ("303", "19")}
    base = full["flash-attention-adamw-batch-125"].flags
    changed = {name: case.flags.items() ^ base.items() for name, case in full.items() if name.startswith("flash-")}
    assert [name for name in changed if not changed[name]] == ["flash-attention-adamw-batch-125"]
    assert changed["flash-attention-batch-125"] == {("optimizer", "adam")}
    assert changed["flash-chunked-loss-batch-125"] == {("loss", "chunked")}
    selective, block = (full[f"flash-compile-{name}-chunked-loss-batch-125"] for name in ("selective", "checkpointing"))
    assert block.flags | {"gradient_checkpointing": "selective"} == selective.flags


def test_the_factorial_has_every_combination_once():
    cases = cases_of("factorial", "full")
    assert len(cases) == 32 and list(cases)[:4] == ["baseline", "bf16", "flash", "bf16+flash"]
    settings = [
        tuple(case.flags[name] for name in ("precision", "attention_backend", "loss")) for case in cases.values()
    ]
    assert len(set(settings)) == 8 and cases["bf16+8bit"].flags["optimizer"] == "adamw_8bit"
    fewer = cases_of("factorial", "full", factors="flash,bf16")
    assert list(fewer) == ["baseline", "bf16", "flash", "bf16+flash"]
    assert all(fewer[name].flags == cases[name].flags for name in fewer)


def test_budgets_and_the_whole_card():
    cases = cases_of("max_batch", "full", 79.2)
    assert len(cases) == 48 and cases["flash-chunked-loss-24-gib"].flags["memory_budget_gib"] == "24"
    assert (
        "memory_budget_gib" not in cases["flash-80-gib"].flags and "whole card of 79.2" in cases["flash-80-gib"].words
    )
    assert cases["flash-45-gib"].flags["memory_budget_gib"] == "45"
    small = cases_of("max_batch", "full", 44.98)
    assert "memory_budget_gib" not in small["flash-45-gib"].flags | small["flash-48-gib"].flags
    assert small["flash-80-gib"].flags["memory_budget_gib"] == "80"  # the trainer refuses it: a row, not another budget
    assert next(iter(cases_of("max_batch", "smoke", memory_budget_gib="0.05"))) == "fp32-baseline-0.05-gib"


def test_quality_is_compared_at_equal_updates_and_then_confounded():
    cases = cases_of("quality", "full")
    equal = [case.flags for name, case in cases.items() if not name.startswith("confounded")]
    assert len(equal) == 30 and len(cases) == 35
    assert {(flags["tokens_per_update"], flags["batch_size"]) for flags in equal} == {("32000", "125")}
    assert not any("max_steps" in flags for flags in equal)
    confounded = cases["confounded-flash-attention-batch-303"].flags
    assert confounded["batch_size"] == "303" and "tokens_per_update" not in confounded and confounded["seed"] == "0"
    smoke = cases_of("quality", "smoke")
    assert smoke["flash-seed-2"].flags["tokens_per_update"] == str(8 * 128)
    steps = {name: int(case.flags["max_steps"]) for name, case in smoke.items()}
    assert steps["flash-seed-2"] == 8 and steps["confounded-flash-attention-batch-303"] == 8 * 8 // 19
    assert cases_of("quality", "full", updates=100)["confounded-fp16-batch-195"].flags["max_steps"] == "64"


# --- Effects and the grid ---------------------------------------------------------------------------------------------


def test_effects_by_hand():
    """y(-)=10, y(A)=6, y(B)=8, y(AB)=7: A is -4 without B and -1 with it, so -2.5, and the interaction is 1.5."""
    values = {frozenset(): 10.0, frozenset({"a"}): 6.0, frozenset({"b"}): 8.0, frozenset({"a", "b"}): 7.0}
    assert effects(values) == {"main": {"a": -2.5, "b": -0.5}, "interactions": {"a x b": 1.5}}


def test_techniques_that_add_up_do_not_interact():
    own = {"bf16": -4.0, "flash": -2.0, "checkpointing": -8.0}
    values = {on: 32.0 + sum(own[name] for name in on) for on in all_combinations(list(own))}
    result = effects(values)
    assert result["main"] == own and list(result["main"]) == list(own)
    assert result["interactions"] == {f"{a} x {b}": 0.0 for a, b in combinations(own, 2)}


def test_an_interaction_of_a_full_factorial_is_found():
    values = {on: 10.0 * len(on) + (3.0 if {"bf16", "8bit"} <= on else 0.0) for on in all_combinations(list(FACTORS))}
    result = effects(values)
    assert len(values) == 32 and result["main"]["bf16"] == 11.5 and result["main"]["flash"] == 10.0
    assert {name: value for name, value in result["interactions"].items() if value} == {"bf16 x 8bit": 1.5}


def test_effects_with_a_missing_combination_say_which():
    values = {on: None if on == {"bf16", "flash"} else 1.0 for on in all_combinations(["bf16", "flash"])}
    assert effects(values) == {"main": None, "interactions": None, "reason": "no value for bf16+flash"}
    del values[frozenset()]
    assert effects(values)["reason"] == "no value for baseline, bf16+flash"


def test_effects_are_written_from_the_run_folders(bench):
    results = {
        "baseline": {"peak_allocated_gib": 4.0, "step_ms_median": 80.0},
        "bf16": {"peak_allocated_gib": 3.0, "step_ms_median": 20.0},
        "flash": {"peak_allocated_gib": 3.5, "step_ms_median": 40.0},
        "bf16+flash": {"peak_allocated_gib": 2.5, "step_ms_median": 10.0},
    }
    (bench.root / "results.json").write_text(json.dumps(results))
    flags = ("--experiment", "factorial", "--factors", "bf16,flash")
    assert bench.run(*flags)[0] == 0
    path = bench.folder("effects.json", "smoke_factorial")
    found = json.loads(path.read_text())
    assert found["factors"] == ["bf16", "flash"] and len(found["cases"]) == 4
    assert found["peak_gib"] == {"main": {"bf16": -1.0, "flash": -0.5}, "interactions": {"bf16 x flash": 0.0}}
    assert found["step_ms"]["main"] == {"bf16": -45.0, "flash": -25.0}
    assert found["step_ms_ratio"]["main"]["bf16"] == pytest.approx(0.25)
    assert found["step_ms_ratio"]["interactions"]["bf16 x flash"] == pytest.approx(1.0)
    info = bench.info("flash", "smoke_factorial") | {"status": "oom"}
    (bench.folder("flash", "smoke_factorial") / "run.json").write_text(json.dumps(info))
    bench.run(*flags)
    found = json.loads(path.read_text())
    assert found["step_ms"]["main"] is None and found["peak_gib"]["reason"] == "no value for flash"


# --- The real trainers ------------------------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_real_case_from_end_to_end(tmp_path):
    """With llm_train.py itself: first it trains, then the text is too short."""
    words = ["--experiment", "quality", "--size", "smoke", "--seeds", "0", "--updates", "7"]
    words += ["--cases", "fp32-baseline-seed-0", "--dataset_path", str(tmp_path / "text.txt")]
    words += ["--cache_folder", str(tmp_path / "cache")]
    (tmp_path / "text.txt").write_text("\n\n".join(generate_documents(40, seed=7)))
    bench = Bench(tmp_path)
    status, out, err = bench.run(*words)
    assert status == 0, out + err
    row = bench.comparison("smoke_quality")["cases"][0]
    info = bench.info("fp32-baseline-seed-0", "smoke_quality")
    assert row["status"] == info["status"] == "ok" and info["results"]["timed_steps"] == 4
    assert info["results"]["steps"] == 7 and info["results"]["test_loss"] > 0
    assert info["settings"]["precision"] == "fp32" and info["model"]["attention_backend"] == "eager"
    assert info["batch_size"] == 8 and info["case"]["words"] == row["words"]
    assert f"{info['results']['peak_allocated_gib']:.3f} GiB" in out
    (tmp_path / "text.txt").write_text("a\n\nb\n\nc\n\nd")
    shutil.rmtree(tmp_path / "out")
    status, out, err = bench.run(*words)
    assert status == 0, out + err
    row = bench.comparison("smoke_quality")["cases"][0]
    assert row["status"] == "unsupported" and "use more text or a smaller --context_length" in row["error"]


@pytest.fixture(scope="module")
def peer(tmp_path_factory) -> Callable[..., tuple[int, str, Path]]:
    """peer(flag=value, ...) runs gpt2_peer.main() with a model even smaller than tiny."""
    root = tmp_path_factory.mktemp("peer")

    def call(run_name: str, **flags) -> tuple[int, str, Path]:
        words = {"device": "cpu", "max_steps": 5, "tracked_steps": 2, "measured_steps": 2, "run_name": run_name}
        words |= {"output_folder": root / "out", "cache_folder": root / "cache"} | flags
        argv = ["gpt2_peer.py", *(word for name, value in words.items() for word in (f"--{name}", str(value)))]
        out = io.StringIO()
        sizes = {
            "tiny": {"num_layers": 1, "embedding_dim": 32, "num_heads": 2, "context_length": 32, "vocab_size": 300}
        }
        before = torch.get_float32_matmul_precision()
        with (
            patch.object(sys, "argv", argv),
            patch.dict("transformer_based_llm.MODEL_SIZES", sizes),
            patch("plot.plot_run", lambda path: (path / "figure").write_text("drawn")),
            patch("dataset.sample_source", lambda count, original=gpt2_peer_sample: original(30)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            pytest.raises(SystemExit) as caught,
        ):
            run_script(gpt2_peer.main)
        torch.set_float32_matmul_precision(before)
        return caught.value.code, out.getvalue(), root / "out" / "llm" / run_name

    return call


gpt2_peer_sample = load_text_data.__globals__["sample_source"]


def test_the_peer_leaves_a_run_folder_like_any_other(peer):
    status, out, path = peer("bf16")
    assert status == 0, out
    info = json.loads((path / "run.json").read_text())
    results = info["results"]
    assert json.loads(out.splitlines()[-1]) == {"run": str(path), "status": "ok", **results}
    assert results["steps"] == 5 and results["timed_steps"] == 2 and results["compile_s"] is None
    assert results["tokens_per_update"] == 8 * 32 and results["peak_allocated_gib"] > 0
    assert results["epoch_minutes"] == pytest.approx(
        results["step_ms_median"] * (results["steps"] / results["epochs"]) / 60_000, rel=0.01, abs=1e-4
    )
    assert info["attention_kernel"].startswith("aten._scaled_dot_product_")  # seen, not said
    phases = {line.split(",")[1] for line in (path / "memory.csv").read_text().splitlines()[1:]}
    assert phases == {"training_step", "forward_pass", "backward_pass", "optimizer_step"}
    losses = [json.loads(line)["loss"] for line in (path / "steps.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(300), abs=0.1) and losses[-1] < losses[0]


def test_the_compiled_peer_counts_no_memory_on_a_cpu(peer):
    """The counter would switch the compiler off, and the memory would be another program's."""
    status, out, path = peer("compiled", use_compile="true")
    assert status == 0, out
    results = json.loads((path / "run.json").read_text())["results"]
    assert results["compile_s"] > 0 and results["timed_steps"] == 2
    assert results["peak_allocated_gib"] is None and not (path / "memory.csv").exists()


def test_the_peers_figures_are_drawn_unless_they_are_not_wanted(peer):
    for wanted in ("true", "false"):
        status, out, path = peer(f"figures-{wanted}", figures=wanted)
        assert status == 0, out
        assert (path / "figure").exists() == (wanted == "true")


def test_the_peer_trains_on_the_batches_of_llm_train(peer):
    """Same windows in the same order, seed and epoch by epoch, and every token of a window counts."""
    seen = []
    original = gpt2_peer.forward_loss

    def watched(model, inputs, targets):
        seen.append((inputs, targets))
        return original(model, inputs, targets)

    with patch.object(gpt2_peer, "forward_loss", watched):
        status, out, path = peer("fp32", precision="fp32", seed=3, max_steps=20, batch_size=64)
    assert status == 0, out
    cache = path.parent.parent.parent / "cache"
    with patch("dataset.sample_source", lambda count: gpt2_peer_sample(30)):
        data = load_text_data(vocab_size=300, cache_folder=str(cache), progress=False)
    training = object.__new__(llm_train.Training)
    training.settings = llm_train.Settings(seed=3)
    training.split, training.context_length, training.batch_size = data.splits["train"], 32, 64
    training.num_windows, training.device, training.epoch = training.split.num_windows(32), torch.device("cpu"), -1
    assert training.steps_per_epoch < 20, "more than one epoch"
    for step, (inputs, targets) in enumerate(seen, start=1):
        ((wanted_inputs, wanted_targets),) = training.batches_of_step(step)
        assert torch.equal(inputs, wanted_inputs) and torch.equal(targets, wanted_targets)


def test_the_peers_loss_is_the_mean_over_all_tokens():
    model = gpt2_peer.build_model(model_config("tiny", vocab_size=300))
    ids = torch.randint(300, (3, 17), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    logits = model(input_ids=inputs).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert gpt2_peer.forward_loss(model, inputs, targets).item() == pytest.approx(wanted.item(), abs=1e-6)


def test_the_peer_has_the_same_matrix_products_and_fewer_parameters():
    with torch.device("meta"):
        ours, theirs = TransformerLM(model_config("gpt2")), gpt2_peer.build_model(model_config("gpt2"))
    assert isinstance(theirs, GPT2LMHeadModel) and theirs.config._attn_implementation == "sdpa"
    assert gpt2_peer.count_matmul_parameters(theirs) == count_matmul_parameters(ours) == 109_510_656
    theirs.tie_weights()
    difference = gpt2_peer.count_parameters(ours) - gpt2_peer.count_parameters(theirs)
    biases = 12 * 4 * 768  # the lab's attention projections have none
    assert difference == 32000 * 768 - biases


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_steps": 4}, "--max_steps 4 ends before the measured steps do"),
        ({"batch_size": 0}, "--batch_size must be above 0"),
        ({"batch_size": 100_000}, "--batch_size asks for 100000 sequences"),
    ],
)
def test_the_peer_refuses_in_one_sentence(peer, flags, words):
    status, out, path = peer("refused", **flags)
    assert status == 2 and words in out and not path.exists()


def test_the_peer_out_of_memory_is_a_status(peer):
    with patch.object(gpt2_peer, "forward_loss", side_effect=torch.OutOfMemoryError("full")):
        status, out, path = peer("oom")
    assert status == 1 and json.loads(out.splitlines()[-1])["status"] == "oom"
    info = json.loads((path / "run.json").read_text())
    assert (info["status"], info["error"]) == ("oom", "full")


def test_the_peer_can_be_interrupted(peer):
    original = gpt2_peer.forward_loss

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    with patch.object(gpt2_peer, "forward_loss", interrupted):
        status, out, path = peer("interrupted")
    assert status == 130 and json.loads((path / "run.json").read_text())["status"] == "interrupted", out


@pytest.mark.gpu
def test_the_compiled_peer_on_a_gpu(tmp_path):
    words = ["--experiment", "seed", "--size", "smoke", "--cases", "hf-gpt2-batch-125,hf-gpt2-compiled-batch-125"]
    words += ["--output_folder", str(tmp_path / "out"), "--cache_folder", str(tmp_path / "cache")]
    process = subprocess.run([sys.executable, compare_techniques.__file__, *words], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    folder = tmp_path / "out" / "smoke_seed"
    infos = {
        name: json.loads((folder / f"{name}-batch-125" / "run.json").read_text())
        for name in ("hf-gpt2", "hf-gpt2-compiled")
    }
    assert infos["hf-gpt2-compiled"]["results"]["compile_s"] > 0 and infos["hf-gpt2"]["results"]["compile_s"] is None
    assert all(info["case"]["gpu"] is not None and info["results"]["peak_reserved_gib"] > 0 for info in infos.values())
    losses = [
        [json.loads(line)["loss"] for line in (folder / f"{name}-batch-125" / "steps.jsonl").read_text().splitlines()]
        for name in infos
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_gpu_that_is_not_there(bench):
    status, _, err = bench.run("--device", "cuda")
    assert status == 2 and "finds no NVIDIA GPU" in err


def test_unknown_numbers_are_refused():
    with pytest.raises(SettingsError, match="--seeds one must be different numbers"):
        cases_of("quality", "full", seeds="one")
