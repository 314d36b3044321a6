"""What a run leaves behind: its folder, the log of its steps, and how it reacts to being stopped.

outputs/<experiment>/<run_name>/ holds run.json (written at the start, completed at the end), steps.jsonl (one JSON
object a step) and what other tools add. Every trainer uses this file; it knows no model.
"""

import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import GIB, SettingsError, device_name, is_out_of_memory, model_flops_utilisation, percentile


def now() -> str:
    """The time in UTC as ISO 8601 text, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_writable(folder: Path, flag: str) -> None:
    """Raise a SettingsError unless `folder` exists or can be made and written to; leaves nothing behind."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise SettingsError(
            f"{flag} {folder} is not writable ({existing} is a file or read-only); choose another folder"
        )


def write_atomically(path: Path, text: str) -> None:
    """Write beside the file and rename, so that a reader or a kill never meets half a file."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


class RunFolder:
    """outputs/<experiment>/<run_name>/ with run.json (start and end of a run) and steps.jsonl (one line a step)."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes  # of the processes of a parallel run one writes
        self.info: dict[str, Any] = {}

    @classmethod
    def create(cls, output_folder: str, experiment: str, run_name: str, *, unique: bool) -> "RunFolder":
        """Make a new folder. With `unique` a taken name gets -2, -3, ...; without it, a taken name is an error."""
        parent = Path(output_folder) / experiment
        path, number = parent / run_name, 2
        while True:
            try:
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError:
                if not unique:
                    raise SettingsError(f"--run_name {run_name}: {path} already exists; choose another name") from None
                path, number = parent / f"{run_name}-{number}", number + 1
            except OSError as error:
                raise SettingsError(f"--output_folder: {path} cannot be made: {error.strerror}") from None

    @classmethod
    def open(cls, path: str) -> "RunFolder":
        """Open an earlier run's folder and read its run.json."""
        folder = cls(Path(path))
        try:
            folder.info = json.loads((folder.path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SettingsError(f"--resume {path}: there is no run.json in that folder") from None
        except (OSError, ValueError) as error:
            raise SettingsError(f"--resume {path}: its run.json cannot be read: {error}") from None
        if not isinstance(folder.info, dict) or not isinstance(folder.info.get("settings"), dict):
            raise SettingsError(f"--resume {path}: its run.json holds no settings, so it is no run of this lab")
        return folder

    def update(self, **fields: Any) -> None:
        """Set fields of run.json and write it anew, never half."""
        self.info |= fields
        self._write(lambda: write_atomically(self.path / "run.json", json.dumps(self.info, indent=2) + "\n"))

    def log_steps(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append one JSON object a line to steps.jsonl and flush."""
        self.append("steps.jsonl", rows)

    def append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Append one JSON object a line to a file of this folder and flush."""

        def append() -> None:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

        self._write(append)

    def drop_rows_after(self, step: int) -> None:
        """Before resuming: remove what was logged after the checkpoint's step from steps.jsonl and memory.csv."""
        steps, memory = self.path / "steps.jsonl", self.path / "memory.csv"
        if steps.exists():
            kept = [line for line in steps.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in kept if json.loads(line)["step"] <= step]
            self._write(lambda: write_atomically(steps, "".join(line + "\n" for line in kept)))
        if memory.exists() and memory.stat().st_size:
            header, *rows = memory.read_text(encoding="utf-8").splitlines()
            rows = [row for row in rows if row.count(",") == header.count(",") and int(row.split(",")[0]) <= step]
            self._write(lambda: write_atomically(memory, "".join(line + "\n" for line in [header, *rows])))

    def add_rank_column(self) -> None:
        """Before a run of one process goes on in several: its rows of memory.csv are those of rank 0."""
        memory = self.path / "memory.csv"
        if memory.exists() and memory.stat().st_size:
            header, *rows = memory.read_text(encoding="utf-8").splitlines()
            if not header.endswith(",rank"):
                lines = [f"{header},rank", *(f"{row},0" for row in rows)]
                self._write(lambda: write_atomically(memory, "".join(line + "\n" for line in lines)))

    def has_rank_column(self) -> bool:
        """Whether memory.csv is that of a parallel run."""
        memory = self.path / "memory.csv"
        if not memory.exists():
            return False
        with memory.open(encoding="utf-8") as file:
            return file.readline().rstrip().endswith(",rank")

    def _write(self, action: Callable[[], None]) -> None:
        if not self.writes:
            return
        try:
            action()
        except OSError as error:
            raise SettingsError(
                f"writing to {self.path} failed ({error.strerror}); free space or change --output_folder"
            ) from None


def command_line() -> list[str]:
    """The words this script was called with; of its own path the name alone."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a number: device, versions, git commit, command line and start time (UTC)."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def git(*words: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "argv": command_line(),
        "device": device.type,
        "device_name": device_name(device),
        "device_memory_gib": round(torch.cuda.get_device_properties(device).total_memory / GIB, 2)
        if device.type == "cuda"
        else None,
        "cpu_threads": torch.get_num_threads(),  # sums on a CPU depend on it in the last bit
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "cuda_version": torch.version.cuda if device.type == "cuda" else None,
        "allocator_settings": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"),
        "flash_attn_version": version("flash-attn"),
        "transformers_version": version("transformers"),
        "torchao_version": version("torchao"),
        # GIT_COMMIT tells it where the code was copied without its repository (a container, a job on another machine).
        "git_commit": git("rev-parse", "HEAD") or os.environ.get("GIT_COMMIT"),
        "git_dirty": None if changes is None else bool(changes),
        "started_at": now(),
    }


class StepClock:
    """Times steps without stopping the GPU: CUDA events, read later; without a GPU the host's clock.

    `start()` and `stop()` surround a step; `read()` waits for the device once and returns the milliseconds of every
    step since the last `read()`.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []
        self.begin: Any = None

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.begin = self._mark()

    def stop(self) -> None:
        self.marks.append((self.begin, self._mark()))

    def read(self) -> list[float]:
        marks, self.marks = self.marks, []
        if not self.cuda:
            return [1000 * (end - begin) for begin, end in marks]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in marks]


class LapClock:
    """One clock for parts that must add up: each lap ends where the next one begins, nothing lies between them.

    On a GPU the marks are CUDA events: what the host does while the GPU is busy costs nothing, and what the GPU waits
    for (a batch that is not there yet) lies in the lap in which it waits. Without a GPU it is the host's clock.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """End a lap and begin the next one; the first mark only begins."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def read(self) -> list[float]:
        """Wait for the device; milliseconds of the laps since the last `read`, and forget them."""
        marks, self.marks = self.marks, []
        if not self.cuda:
            return [1000 * (end - begin) for begin, end in itertools.pairwise(marks)]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)]


def step_times(
    step_ms: Sequence[float], data_ms: Sequence[float], first_ms: float | None, tokens: int, flops_per_token: float
) -> dict[str, Any]:
    """The headline of timed steps: median, 20th and 80th percentile (ms), and the rate that follows; null for none.

    Args:
        step_ms, data_ms: of each timed step.
        first_ms: of the first step of all.
        tokens: of a step.
        flops_per_token: of forward and backward pass; as a fact for the reader.
    """

    def rounded(values: Sequence[float], percent: float) -> float | None:
        return round(percentile(values, percent), 3) if len(values) else None

    return {
        "timed_steps": len(step_ms),
        "step_ms_median": rounded(step_ms, 50),
        "step_ms_p20": rounded(step_ms, 20),
        "step_ms_p80": rounded(step_ms, 80),
        "first_step_ms": None if first_ms is None else round(first_ms, 3),
        "data_ms_median": rounded(data_ms, 50),
        "tokens_per_s": round(1000 * tokens / percentile(step_ms, 50), 1) if len(step_ms) else None,
        "flops_per_token": flops_per_token,
    }


class StepLog:
    """Times steps, writes them to steps.jsonl and keeps the headline numbers; waits for the device only in `flush`.

    In each process the first step is slow (kernels are loaded, optimizer states made), the next `tracked_steps` have
    their memory tracked and warm up, and the `measured_steps` after those give the reported time.
    """

    def __init__(
        self,
        run: RunFolder,
        device: torch.device,
        *,
        tokens_per_update: int,
        flops_per_token: float,
        peak_tflops: float | None,
        tracked_steps: int,
        measured_steps: int,
        done_steps: int = 0,
        also: Callable[[list[dict[str, Any]]], None] | None = None,
    ):
        self.run, self.clock, self.also = run, StepClock(device), also  # `also` gets the rows that steps.jsonl gets
        self.tokens_per_update, self.flops_per_token, self.peak_tflops = tokens_per_update, flops_per_token, peak_tflops
        self.tracked_steps, self.measured_steps, self.done_steps = tracked_steps, measured_steps, done_steps
        self.pending: list[tuple[int, torch.Tensor, float]] = []
        self.times: list[tuple[int, float, float]] = []  # (step of this process, step ms, data ms)

    def is_tracked(self, step: int) -> bool:
        """Whether this step's memory is to be tracked."""
        return 1 < step - self.done_steps <= 1 + self.tracked_steps

    def add(self, step: int, loss: torch.Tensor, data_ms: float) -> None:
        """Note a finished step: its loss (a scalar still on the device) and the host's time for its data."""
        self.pending.append((step, loss, data_ms))

    def flush(self, peak_gib: float | None) -> dict[str, Any] | None:
        """Wait for the device and write the noted steps; returns the last row, None if there was nothing to write.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if not self.pending:
            return None
        pending, self.pending = self.pending, []
        losses = torch.stack([loss for _, loss, _ in pending]).tolist()
        rows = []
        for (step, _, data_ms), loss, step_ms in zip(pending, losses, self.clock.read(), strict=True):
            tokens_per_s = 1000 * self.tokens_per_update / step_ms
            rows.append(
                {
                    "step": step,
                    "tokens": step * self.tokens_per_update,
                    "loss": loss if np.isfinite(loss) else None,  # JSON has no NaN
                    "perplexity": float(np.exp(min(loss, 700.0))) if np.isfinite(loss) else None,
                    "step_ms": round(step_ms, 4),
                    "data_ms": round(data_ms, 4),
                    "tokens_per_s": round(tokens_per_s, 1),
                    "mfu": self._mfu(tokens_per_s),
                    "peak_gib": peak_gib,
                }
            )
            self.times.append((step - self.done_steps, step_ms, data_ms))
        self.run.log_steps(rows)
        if self.also is not None:
            self.also(rows)
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"the loss is not finite near step {rows[-1]['step']}; lower --learning_rate")
        return rows[-1]

    def _mfu(self, tokens_per_s: float) -> float | None:
        mfu = model_flops_utilisation(tokens_per_s, self.flops_per_token, self.peak_tflops)
        return None if mfu is None else round(mfu, 4)

    def headline(self) -> dict[str, Any]:
        """Times in ms over the measured steps and the rate that follows; null where the run was too short."""
        begin = 1 + self.tracked_steps
        timed = [(ms, data) for place, ms, data in self.times if begin < place <= begin + self.measured_steps]
        step_ms, data_ms = [ms for ms, _ in timed], [data for _, data in timed]
        first = next((ms for place, ms, _ in self.times if place == 1), None)
        rate = 1000 * self.tokens_per_update / percentile(step_ms, 50) if timed else None
        return step_times(step_ms, data_ms, first, self.tokens_per_update, self.flops_per_token) | {
            "mfu": None if rate is None else self._mfu(rate),
            "mfu_denominator_tflops": self.peak_tflops,
        }


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived where there is no step to finish first."""


class StopRequest:
    """Notes the first Ctrl-C or SIGTERM so that a loop can finish its step and save; the second one ends at once."""

    def __init__(self, patient: bool = False) -> None:
        self.signal: int | None = None
        self.patient = patient  # under torchrun a signal can come twice, from the job and from torchrun

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.signal is not None:
            if self.patient:
                return
            raise KeyboardInterrupt
        self.signal = number

    def check(self) -> None:
        """Raise Interrupted if a signal came; for long work that has nothing to save."""
        if self.signal is not None:
            raise Interrupted

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + (self.signal or signal.SIGINT)


def end_badly(run: RunFolder, error: BaseException, stop: StopRequest, batch_size: int) -> int:
    """Note in run.json how a training ended that did not succeed, and print it; called where its error is caught.

    Args:
        run: its folder, whose run.json is there.
        error: what was raised: Interrupted or KeyboardInterrupt, out of memory, FloatingPointError, or a bug.
        stop: knows the signal of an interruption.
        batch_size: of the training, for the advice where memory ran out.

    Returns:
        The exit status.

    Raises:
        The error itself where it is a bug (or a setting), after it has been noted.
    """
    if isinstance(error, Interrupted | KeyboardInterrupt):
        run.update(status="interrupted")
        print(json.dumps({"run": str(run.path), "status": "interrupted"}))
        return stop.exit_status
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    status = "oom" if is_out_of_memory(error) else "error"
    with suppress(SettingsError):  # where the disk is full, the first error is the one to report
        run.update(status=status, error=reason)
    if status == "error" and not isinstance(error, FloatingPointError):
        raise error
    advice = f"out of memory with batch size {batch_size} ({reason}); lower --batch_size"
    print(f"{run.path}: {advice if status == 'oom' else reason}")
    print(json.dumps({"run": str(run.path), "status": status}))
    return 1
