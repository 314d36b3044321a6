"""run_folder.py: files are never half written, steps are timed as documented, and a stop is noted once."""

import errno
import json
import os
import re
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import run_folder
from run_folder import Interrupted, RunFolder, StepClock, StepLog, StopRequest, check_writable, describe_environment
from utils import SettingsError

CPU = torch.device("cpu")


@contextmanager
def full_disk(max_file_bytes: int):
    """While this is open no file can grow beyond that size: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def refused(*parts: str):
    """Expect one sentence that holds these parts."""
    with pytest.raises(SettingsError) as caught:
        yield
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(str(tmp_path / "outputs"), "llm", "run", unique=True)


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- run.json ---------------------------------------------------------------------------------------------------------


def test_update_keeps_earlier_fields_and_can_be_opened_again(run):
    run.update(status="running", settings={"name": "żółw"})
    run.update(status="ok", results={"loss": 1.5})
    expected = {"status": "ok", "settings": {"name": "żółw"}, "results": {"loss": 1.5}}
    assert json.loads((run.path / "run.json").read_text(encoding="utf-8")) == expected
    assert RunFolder.open(str(run.path)).info == expected
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def half_a_write(path: Path, text: str, **details) -> None:
    with path.open("w") as file:
        file.write(text[: len(text) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def refused_rename(path: Path, target: Path) -> None:
    raise OSError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(("method", "broken"), [("write_text", half_a_write), ("replace", refused_rename)])
def test_failed_write_leaves_the_old_run_json(run, monkeypatch, method, broken):
    run.update(status="running")
    before = (run.path / "run.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, broken)
        with refused(str(run.path), "--output_folder"):
            run.update(status="ok")
    assert (run.path / "run.json").read_bytes() == before
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_full_disk_leaves_the_old_run_json(run):
    run.update(status="running")
    with full_disk(1000), refused(str(run.path), "File too large", "--output_folder"):
        run.update(results=list(range(1000)))
    assert json.loads((run.path / "run.json").read_text()) == {"status": "running"}
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_value_that_is_no_json_leaves_the_old_run_json(run):
    run.update(status="running")
    with pytest.raises(TypeError):
        run.update(status="ok", results={1, 2})
    assert json.loads((run.path / "run.json").read_text()) == {"status": "running"}


@pytest.mark.parametrize("content", [None, "", '{"status": ', "\0\0\0"])
def test_missing_or_damaged_run_json(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with refused(f"--resume {tmp_path}", "run.json"):
        RunFolder.open(str(tmp_path))


# --- names and folders ------------------------------------------------------------------------------------------------


def test_taken_names(tmp_path):
    paths = [RunFolder.create(str(tmp_path), "llm", "fp32", unique=True).path for _ in range(3)]
    assert paths == [tmp_path / "llm" / name for name in ("fp32", "fp32-2", "fp32-3")]
    assert all(path.is_dir() for path in paths)
    with refused("--run_name fp32", "already exists"):
        RunFolder.create(str(tmp_path), "llm", "fp32", unique=False)
    assert RunFolder.create(str(tmp_path), "other", "fp32", unique=False).path == tmp_path / "other" / "fp32"


def test_name_taken_by_another_process_at_the_same_moment(tmp_path, monkeypatch):
    mkdir, calls = Path.mkdir, []

    def slower_than_another(path: Path, *words, **details) -> None:
        calls.append(path)
        if len(calls) == 1:
            mkdir(path, parents=True)
        mkdir(path, *words, **details)

    monkeypatch.setattr(Path, "mkdir", slower_than_another)
    assert RunFolder.create(str(tmp_path), "llm", "fp32", unique=True).path == tmp_path / "llm" / "fp32-2"


def test_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with refused("--output_folder", "Not a directory"):
        RunFolder.create(str(tmp_path / "file"), "llm", "run", unique=True)
    with refused("--output_folder", "is not writable"):
        check_writable(tmp_path / "file" / "deeper", "--output_folder")
    with refused("--cache_folder", "is not writable"):
        check_writable(tmp_path / "file", "--cache_folder")


def test_check_writable_leaves_nothing_behind(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b", "--output_folder")
    check_writable(tmp_path, "--output_folder")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    check_writable(Path("outputs"), "--output_folder")
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0)  # root may write to read-only folders
    with refused("--output_folder", str(tmp_path), "is not writable"):
        check_writable(tmp_path / "a", "--output_folder")


def test_environment_is_json_and_names_this_machine():
    info = describe_environment(CPU)
    assert json.loads(json.dumps(info)) == info
    assert info["device"] == "cpu" and info["torch_version"] == torch.__version__ and info["cuda_version"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", info["started_at"])
    assert info["git_commit"] is None or re.fullmatch("[0-9a-f]{40}", info["git_commit"])


def test_environment_has_the_command_without_the_scripts_own_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py", "--data_path", "a/b.npz"])
    assert describe_environment(CPU)["argv"] == ["train.py", "--data_path", "a/b.npz"]


def test_environment_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    info = describe_environment(CPU)
    assert info["git_commit"] is None and info["git_dirty"] is None


# --- logs -------------------------------------------------------------------------------------------------------------


def test_steps_are_appended(run):
    run.log_steps([{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}])
    run.log_steps([{"step": 3, "loss": 1.5}])
    assert read_json_lines(run.path / "steps.jsonl") == [{"step": i, "loss": 3 - i / 2} for i in (1, 2, 3)]


def test_full_disk_while_appending(run):
    run.log_steps([{"step": 1}])
    with full_disk(100), refused(str(run.path), "File too large", "--output_folder"):
        run.log_steps([{"step": step} for step in range(2, 50)])
    run.drop_rows_after(1)  # whatever was half written does not hinder a resumed run
    assert read_json_lines(run.path / "steps.jsonl") == [{"step": 1}]


HEADER = "step,phase,peak_gib"


@pytest.mark.parametrize("cut_line", ["", '{"step": 3, "lo', '{"step": 7', "{"])
@pytest.mark.parametrize("cut_row", ["", "3,forw", "7,forward", "1"])
def test_drop_rows_after_a_checkpoint(run, cut_line, cut_row):
    steps, memory = run.path / "steps.jsonl", run.path / "memory.csv"
    steps.write_text("".join(f'{{"step": {i}, "loss": {i / 2}}}\n' for i in range(1, 7)) + cut_line)
    memory.write_text("\n".join([HEADER, *(f"{i},{p},{i / 4}" for i in range(1, 7) for p in "ab")]) + "\n" + cut_row)
    run.drop_rows_after(4)
    assert read_json_lines(steps) == [{"step": i, "loss": i / 2} for i in range(1, 5)]
    assert memory.read_text().splitlines() == [HEADER, *(f"{i},{p},{i / 4}" for i in range(1, 5) for p in "ab")]
    run.log_steps([{"step": 5}])
    assert read_json_lines(steps)[-1] == {"step": 5}
    assert sorted(path.name for path in run.path.iterdir()) == ["memory.csv", "steps.jsonl"]


@pytest.mark.parametrize("content", [None, "", HEADER + "\n"])
def test_drop_rows_where_nothing_was_logged_yet(run, content):
    for name in ("steps.jsonl", "memory.csv") if content is not None else ():
        (run.path / name).write_text(content if name == "memory.csv" else "")
    run.drop_rows_after(4)
    assert content is None or (run.path / "memory.csv").read_text() == content


# --- StepLog ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_log(run, monkeypatch):
    """A StepLog whose clock is moved by hand: log.run_step(step, ms) takes that long."""

    def make(done_steps: int = 0, peak_tflops: float | None = None) -> StepLog:
        seconds = [100.0]
        monkeypatch.setattr(run_folder, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
        log = StepLog(
            run,
            CPU,
            tokens_per_update=1000,
            flops_per_token=5e6,
            peak_tflops=peak_tflops,
            tracked_steps=2,
            measured_steps=4,
            done_steps=done_steps,
        )

        def run_step(step: int, ms: float, loss: float = 1.0) -> None:
            log.clock.start()
            seconds[0] += ms / 1000
            log.clock.stop()
            log.add(step, torch.tensor(loss), data_ms=ms / 10)
            seconds[0] += 5.0  # time between steps is nobody's

        log.run_step = run_step
        return log

    return make


@pytest.mark.parametrize("done_steps", [0, 40])
def test_first_step_then_tracked_then_measured_steps(make_log, done_steps):
    log = make_log(done_steps)
    assert [step - done_steps for step in range(done_steps + 1, done_steps + 10) if log.is_tracked(step)] == [2, 3]
    for place, ms in enumerate([900, 300, 300, 10, 40, 20, 30, 5, 5], start=1):
        log.run_step(done_steps + place, ms)
        if place in (2, 6):
            log.flush(None)
    log.flush(None)
    # Timed: 10, 40, 20, 30 ms. By linear interpolation the 20th percentile is 10 + 0.6 x 10, the 80th 30 + 0.4 x 10.
    expected = {
        "timed_steps": 4,
        "step_ms_median": 25.0,
        "step_ms_p20": 16.0,
        "step_ms_p80": 34.0,
        "first_step_ms": 900.0,
        "data_ms_median": 2.5,
        "tokens_per_s": 40_000.0,
        "mfu": None,
        "mfu_denominator_tflops": None,
        "flops_per_token": 5e6,
    }
    assert log.headline() == expected


def test_mfu_of_the_headline_and_of_each_step(make_log, run):
    log = make_log(peak_tflops=1.0)
    for step in range(1, 6):
        log.run_step(step, 25)
    log.flush(0.5)
    # 1000 tokens in 25 ms are 40,000 tokens/s; x 5e6 FLOP = 0.2 TFLOP/s of 1.
    assert log.headline()["mfu"] == 0.2 and log.headline()["mfu_denominator_tflops"] == 1.0
    assert [row["mfu"] for row in read_json_lines(run.path / "steps.jsonl")] == [0.2] * 5


def test_rows_of_a_flush(make_log, run):
    log = make_log()
    log.run_step(1, 20, loss=2.0)
    log.run_step(2, 50, loss=1000.0)
    last = log.flush(1.25)
    rows = read_json_lines(run.path / "steps.jsonl")
    assert rows[1] == last
    assert rows[0] == {
        "step": 1,
        "tokens": 1000,
        "loss": 2.0,
        "perplexity": pytest.approx(7.389056),
        "step_ms": 20.0,
        "data_ms": 2.0,
        "tokens_per_s": 50_000.0,
        "mfu": None,
        "peak_gib": 1.25,
    }
    assert rows[1]["tokens"] == 2000 and rows[1]["perplexity"] < float("inf")


def test_flush_without_steps_writes_nothing(make_log, run):
    log = make_log()
    assert log.flush(None) is None
    log.run_step(1, 20)
    assert log.flush(None)["step"] == 1
    assert log.flush(None) is None
    assert len(read_json_lines(run.path / "steps.jsonl")) == 1


def test_headline_of_a_run_that_was_too_short(make_log):
    log = make_log()
    headline = log.headline()
    assert headline["timed_steps"] == 0 and headline["step_ms_median"] is None and headline["first_step_ms"] is None
    for step in range(1, 4):
        log.run_step(step, 20)
    log.flush(None)
    headline = log.headline()
    assert headline["timed_steps"] == 0 and headline["tokens_per_s"] is None and headline["first_step_ms"] == 20.0


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_loss_that_is_not_finite_raises_after_writing(make_log, run, loss):
    log = make_log()
    for step, value in enumerate([2.0, loss, 1.0], start=1):
        log.run_step(step, 20, value)
    with pytest.raises(FloatingPointError, match=r"not finite.*--learning_rate"):
        log.flush(None)
    assert [row["step"] for row in read_json_lines(run.path / "steps.jsonl")] == [1, 2, 3]


def test_clock_returns_each_step_once(monkeypatch):
    ticks = iter([1.0, 1.5, 7.0, 7.25, 9.0, 10.0])
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    clock = StepClock(CPU)
    for _ in range(2):
        clock.start()
        clock.stop()
    assert clock.read() == [500.0, 250.0]
    assert clock.read() == []
    clock.start()
    clock.stop()
    assert clock.read() == [1000.0]


# --- being stopped ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_is_noted_and_the_second_ends_at_once(number, status):
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert stop.signal is None
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.signal == number and stop.exit_status == status
        with pytest.raises(Interrupted):
            stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before


def test_handlers_are_put_back_without_a_signal():
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with StopRequest():
        assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] != before
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before
