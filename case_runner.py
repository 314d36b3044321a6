"""Run cases of a study, each a script with flags in a process of its own, and see that run.json says how it ended.

compare_techniques.py, patchtst_experiments.py and vit_experiments.py use it. A case is a run folder
<experiment>/<case>. A case that ended (ok, oom or unsupported) with the same flags is not run again, so that a study
goes on after Ctrl-C; errors are tried again. No process is left behind.

A fresh process matters: allocator caches, compiled kernels and cuBLAS workspaces of one case would count for the next.
"""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from run_folder import RunFolder, StopRequest, check_writable, command_line, write_atomically
from utils import SettingsError

HERE = Path(__file__).parent
FINISHED = ("ok", "oom", "unsupported")


@dataclass
class Case:
    """One configuration; `flags` are those that decide about its result."""

    name: str
    words: str
    flags: dict[str, str]
    script: str = "llm_train.py"


def read_flags(text: str) -> dict[str, str]:
    """`--name value --name value` as a dictionary."""
    words = text.split()
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def given_flags(settings: Any, leave_out: Sequence[str]) -> dict[str, str]:
    """The settings that differ from their defaults, as flags of a case."""
    flags = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in leave_out or value == field.default:
            continue
        flags[field.name] = str(value).lower() if isinstance(value, bool) else str(value)
    return flags


def split_list(text: str | None) -> list[str]:
    """The entries of a comma-separated list; commas in brackets, as in window-(64,0), separate nothing."""
    return [word.strip() for word in re.split(r",(?![^(]*\))", text or "") if word.strip()]


# --------------------------------------------------------------------------------------------------------------------
# Run folders of the cases
# --------------------------------------------------------------------------------------------------------------------


def read_info(folder: Path) -> dict[str, Any] | None:
    """run.json of a folder; None if there is none that a run of this lab wrote."""
    try:
        return RunFolder.open(str(folder)).info
    except SettingsError:
        return None


def same_text(flags: dict[str, str]) -> dict[str, str]:
    """The flags with a data path's last part only: the same folder may lie elsewhere on another machine."""
    return {name: Path(value).name if name in ("dataset_path", "data_path") else value for name, value in flags.items()}


def status_of(case: Case, folder: Path) -> tuple[str, str]:
    """(status, what differs): status as in run.json, missing, or changed if it ended but was made with other flags."""
    info = read_info(folder / case.name)
    if info is None:
        return "missing", ""
    status = info.get("status", "error")
    if status not in FINISHED:
        return status, ""
    before, wanted = same_text((info.get("case") or {}).get("flags", {})), same_text(case.flags)
    if before == wanted:
        return status, ""
    names = [name for name in before | wanted if before.get(name) != wanted.get(name)]
    changes = (f"--{name} was {before.get(name, 'not given')}, is {wanted.get(name, 'not given')}" for name in names)
    return "changed", "; ".join(changes)


def check_old_folder(folder: Path) -> None:
    """Raise unless a folder that a case needs is missing, empty or a run of this lab, so that it may be removed."""
    if folder.exists() and read_info(folder) is None and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"{folder} holds no run.json of a run, so it is not removed; move it or leave its case out")


# --------------------------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A case that is running."""

    case: Case
    process: subprocess.Popen
    gpu: str | None
    stdout: IO[str]
    stderr: IO[str]
    begin: float


def command(case: Case, folder: Path, place: dict[str, str]) -> list[str]:
    """The words that run a case; `place` are flags that do not decide about its result, such as cache_folder."""
    place = place | {"output_folder": str(folder.parent), "experiment": folder.name}
    flags = case.flags | place | {"run_name": case.name, "figures": "false"}  # they can be drawn later
    return [sys.executable, str(HERE / case.script), *(word for k, v in flags.items() for word in (f"--{k}", v))]


def start(
    case: Case, folder: Path, place: dict[str, str], gpu: str | None, choose_gpu: bool, fresh_compile: bool
) -> Job:
    """Remove what an earlier attempt left and start the case in a process group of its own."""
    check_old_folder(folder / case.name)
    shutil.rmtree(folder / case.name, ignore_errors=True)
    text = {"encoding": "utf-8", "errors": "replace", "newline": ""}  # newline: a progress bar's \r stays
    stdout, stderr = (tempfile.TemporaryFile("w+", **text) for _ in range(2))  # noqa: SIM115
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if choose_gpu else {})
    if fresh_compile and case.flags.get("use_compile") == "true":
        environment |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    process = subprocess.Popen(
        command(case, folder, place),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=environment,
        start_new_session=True,  # the terminal's Ctrl-C reaches the runner only, which passes it on once
    )
    return Job(case, process, gpu, stdout, stderr, time.monotonic())


def kill_group(job: Job) -> None:
    """End the process and whatever it started (compile workers), and wait for it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(job.process.pid, signal.SIGKILL)
    job.process.wait()


def read_lines(file: IO[str]) -> list[str]:
    """The lines of a process's output that say something; of a progress bar its last state."""
    file.seek(0)
    lines = (line.rpartition("\r")[2].rstrip() for line in file.read().replace("\r\n", "\n").split("\n"))
    return [line for line in lines if line]


def conclude(job: Job, folder: Path, environment: dict, *, timed_out: str | None, stopping: bool) -> str:
    """Make sure that run.json says how a case ended, and leave error.txt if it failed; returns the status."""
    path, case = folder / job.case.name, job.case
    lines, code = read_lines(job.stderr), job.process.returncode
    last_words = read_lines(job.stdout)[-1:]
    job.stdout.close()
    job.stderr.close()
    info = read_info(path)
    said: dict[str, Any] = {}
    with suppress(ValueError, IndexError):
        said = json.loads(last_words[0])
    status = info.get("status", "running") if info else said.get("status", "running")
    reason = info.get("error") if info else None
    ending = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    if timed_out is not None:
        status, reason = "error", timed_out
    elif info is None and stopping:
        return "missing"
    elif info is None and code == 2 and lines and not any(line.startswith("usage:") for line in lines):
        status, reason = "unsupported", lines[-1].removeprefix(f"{case.script}: error: ")
    elif stopping and status in ("running", "interrupted"):
        status = "interrupted"
    elif status == "running" or (status == "ok" and (code != 0 or info is None)):
        status, reason = "error", ": ".join([ending, *lines[-1:]])
    elif status == "error" and (path / "batch_size_search.csv").exists():
        probes = (path / "batch_size_search.csv").read_text(encoding="utf-8").splitlines()[1:]
        if probes and all(",oom," in probe for probe in probes):  # not even one sequence fits: a result, not a failure
            status = "oom"
    if status in ("oom", "error") and reason is None:
        reason = ": ".join([ending, *lines[-1:]])
    run = RunFolder(path)
    if info is None:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        run.info = {
            "experiment": folder.name,
            "run_name": case.name,
            **environment,
            "argv": [case.script, *job.process.args[2:]],
        }
        run.info["settings"] = dict(case.flags)
    else:
        run.info = info
    run.update(status=status, case={"words": case.words, "flags": case.flags, "gpu": job.gpu})
    if status != "ok":
        run.update(error=reason)
        if lines:
            write_atomically(path / "error.txt", "\n".join(lines[-50:]) + "\n")
    return status


def result_line(case: Case, info: dict[str, Any]) -> str:
    """Name, status, batch, peak, time and rate of a case; of one that failed its reason."""
    results = info.get("results") or {}
    line = f"{case.name:<54} {info.get('status', 'missing'):<12}"
    if info.get("status") != "ok":
        return f"{line}{info.get('error') or ''}".rstrip()
    shown = (("batch_size", ",", "batch"), ("peak_allocated_gib", ".3f", "GiB"), ("step_ms_median", ".1f", "ms"))
    shown = (*shown, ("tokens_per_s", ",.0f", "tokens/s"))
    return line + "  ".join(
        f"{'-' if results.get(key) is None else format(results[key], style):>8} {unit}" for key, style, unit in shown
    )


def run_cases(
    cases: Sequence[Case],
    folder: Path,
    environment: dict[str, Any],
    stop: StopRequest,
    done: Callable[[Case], None],
    *,
    slots: Sequence[str | None],
    choose_gpu: bool = False,
    place: dict[str, str] | None = None,
    timeout_minutes: float = 30.0,
    timeout_advice: str = "",
    deadline: float = float("inf"),
    fresh_compile: bool = True,
) -> None:
    """Run the cases, one at a time in each slot, and call `done` after each.

    The first Ctrl-C or SIGTERM is passed on to the processes once and waited for; the second one, or any error here,
    kills them. No process is left behind.

    Args:
        slots: the GPU of each slot, noted in run.json; None without one. One entry is one case at a time.
        choose_gpu: make that GPU the only one that the case sees.
        place: flags beside those of the case that do not decide about its result.
        timeout_minutes: a case that takes longer is ended and counts as an error.
        timeout_advice: added to that error, such as the flag to raise.
        deadline: of time.monotonic(); no case is started after it.
        fresh_compile: each case compiles anew, so that the seconds it takes for that are comparable.
    """
    waiting, running, passed_on = list(cases), {}, False
    try:
        while waiting or running:
            may_start = stop.signal is None and time.monotonic() < deadline
            for slot, gpu in enumerate(slots):
                if waiting and may_start and slot not in running:
                    running[slot] = start(waiting.pop(0), folder, place or {}, gpu, choose_gpu, fresh_compile)
            if stop.signal is not None and not passed_on:
                passed_on = True
                for job in running.values():
                    job.process.send_signal(stop.signal)
            for slot, job in list(running.items()):
                late = time.monotonic() - job.begin > 60 * timeout_minutes
                if job.process.poll() is None and not late:
                    continue
                timed_out = job.process.returncode is None
                kill_group(job)
                words = f"took longer than {timeout_minutes:g} minutes{timeout_advice}"
                conclude(job, folder, environment, timed_out=words if timed_out else None, stopping=passed_on)
                del running[slot]
                done(job.case)
            if not running and not may_start:
                return
            time.sleep(0.05)
    finally:
        for job in running.values():
            kill_group(job)


def check_device(cases: Sequence[Case], folder: Path, environment: dict[str, Any]) -> None:
    """Raise if earlier results are another device's: one table must not mix them, and they are not to be removed."""
    for case in cases:
        info = read_info(folder / case.name) or {}
        names = [str(name).split(" (")[0] for name in (info.get("device_name"), environment["device_name"])]
        if info.get("status") in FINISHED and names[0] != names[1]:
            raise SettingsError(
                f"{folder} holds results of {names[0]}, and this is {names[1]}; choose another --output_folder"
            )


def gpu_environment(gpu: str | None, flags: str) -> dict[str, Any]:
    """Device and versions of a GPU, asked for in a process of its own, so that the runner holds no memory there.

    Args:
        gpu: its number as in CUDA_VISIBLE_DEVICES; None is the first.
        flags: that chose it, for the message.

    Raises:
        SettingsError: it cannot be used.
    """
    code = "import json, torch, run_folder; print(json.dumps(run_folder.describe_environment(torch.device('cuda'))))"
    visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, env=os.environ | visible, capture_output=True, text=True
    )
    if process.returncode != 0:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise SettingsError(f"{flags}: {reason}")
    return json.loads(process.stdout) | {"argv": command_line()}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a lock on an experiment's folder: two runners would remove each other's run folders."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise SettingsError(f"another {Path(sys.argv[0]).name} works in {folder}; wait for it") from None
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def hang_up_means_stop() -> Iterator[None]:
    """A closed terminal ends the runner like SIGTERM, so that no process is left; under nohup it goes on."""
    before = signal.getsignal(signal.SIGHUP)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def run_studies(
    plans: Sequence[tuple[str, Path, list[Case]]],
    environment: dict[str, Any],
    *,
    only: str | None,
    gpus: Sequence[str],
    on_gpu: bool,
    place: dict[str, str],
    result_line: Callable[[Case, dict[str, Any]], str],
    draw: Callable[[Path], list[Path]] | None,
    parallel_runs: int = 1,
) -> int:
    """Run what is left of studies, leave experiment.json in the folder of each, and print one JSON object.

    Args:
        plans: (name of the study, its folder, its cases in order).
        environment: `gpu_environment`, or `describe_environment` without a GPU.
        only: names of the cases to run, separated by commas; None is all of them.
        gpus: numbers of the GPUs that are used side by side; [] is the first.
        on_gpu: whether the cases run on a GPU.
        place, parallel_runs: as in `run_cases`; so many runs at a time on each GPU.
        result_line: what to print of a case that ended.
        draw: makes the figures of a folder whose cases have all ended; None draws none.

    Returns:
        The exit status: 0, 1 if cases are left or none trained, 128 + the signal after Ctrl-C.

    Raises:
        SettingsError: an unknown case, a folder that is not writable, or that holds another device's results.
    """
    only = split_list(only)
    unknown = set(only) - {case.name for _, _, cases in plans for case in cases}
    if unknown:
        raise SettingsError(f"--only: no case is named {', '.join(sorted(unknown))}")
    for _, folder, cases in plans:
        check_writable(folder, "--output_folder")
        check_device(cases, folder, environment)
        for case in cases:
            status, changes = status_of(case, folder)
            if status in FINISHED or (only and case.name not in only):
                continue
            check_old_folder(folder / case.name)
            if status == "changed":
                print(f"{folder / case.name} was made with other flags and is run anew: {changes}")
    slots = [slot for _ in range(parallel_runs) for slot in (gpus or ["0" if on_gpu else None])]
    summary: dict[str, Any] = {"status": "ok", "experiments": []}
    failed: list[str] = []
    with StopRequest() as stop, hang_up_means_stop():
        for name, folder, cases in plans:
            with alone(folder):
                todo = [case for case in cases if status_of(case, folder)[0] not in FINISHED]
                todo = [case for case in todo if not only or case.name in only]
                print(f"{folder}: {len(cases)} cases, {len(todo)} to run", flush=True)
                begin = time.monotonic()

                def done(case: Case, folder: Path = folder, begin: float = begin) -> None:
                    line = result_line(case, read_info(folder / case.name) or {})
                    print(f"{line}   [{time.monotonic() - begin:.0f} s]", flush=True)

                run_cases(
                    todo,
                    folder,
                    environment,
                    stop,
                    done,
                    slots=slots,
                    choose_gpu=bool(gpus),
                    place=place,
                    timeout_minutes=120,
                    fresh_compile=False,
                )
                rows = []
                for case in cases:
                    info = read_info(folder / case.name) or {}
                    rows.append({"name": case.name, "words": case.words, "flags": case.flags})
                    rows[-1] |= {"status": status_of(case, folder)[0], "error": info.get("error")}
                left = [row["name"] for row in rows if row["status"] not in FINISHED]
                content = {"experiment": name, "finished": not left, "parallel_runs": parallel_runs}
                content |= {"gpus": max(1, len(gpus)), "device_name": environment["device_name"]}
                content |= {"git_commit": environment["git_commit"], "cases": rows}
                write_atomically(folder / "experiment.json", json.dumps(content, indent=2) + "\n")
                summary["experiments"].append({"folder": str(folder), "left": left})
                wanted = [row["status"] for row in rows if not only or row["name"] in only]
                if wanted and set(wanted) <= {"oom", "unsupported"}:
                    failed.append(name)
                    print(f"{folder}: no case trained; the lines above say why")
                if draw is not None and not left:
                    for path in draw(folder):
                        print(path)
    left = [name for entry in summary["experiments"] for name in entry["left"] if not only or name in only]
    summary["status"] = "interrupted" if stop.signal else "incomplete" if left else "failed" if failed else "ok"
    print(json.dumps(summary))
    if stop.signal is not None:
        return stop.exit_status
    return 1 if left or failed else 0
