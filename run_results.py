"""What the folders of runs and experiments hold, for figures and tables; nothing is drawn here."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import SettingsError


class RunFolderError(SettingsError):
    """A run folder that cannot be drawn; the message is one sentence that names the file."""


@dataclass
class Run:
    """One run folder as read from disk; a value that was not measured (null or an empty cell) is None."""

    name: str  # run_name of run.json, or the folder's name
    folder: Path
    info: dict  # run.json
    steps: list[dict]  # steps.jsonl, one dict a training step
    memory: list[dict]  # memory.csv, one dict a phase and measured step, GiB
    probes: list[dict]  # batch_size_search.csv, one dict a probe in the order tried, GiB and seconds


def measured_elsewhere(run: Run) -> bool:
    """Whether a resumed run's times are (or, in older folders, may be) of other devices than its run.json names."""
    info = run.info
    method = f", {info['parallel']}" if info.get("parallel") else ""
    named = f"{info.get('world_size') or 1} x {info.get('device_name')}{method}"
    return bool(info.get("resumed")) and (info.get("results") or {}).get("measured_on") != named


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file that exists; RunFolderError if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged: it is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_run(folder: Path) -> Run:
    """Read run.json, steps.jsonl, memory.csv and batch_size_search.csv of one run; only run.json must exist.

    A last line cut off by a kill is ignored. Raises RunFolderError: folder or run.json missing, or a file invalid.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is not a folder; give a run folder, outputs/EXPERIMENT/RUN_NAME")
    path = folder / "run.json"
    if not path.is_file():
        raise RunFolderError(f"{folder} has no run.json, so it is not a run folder")
    info = read_object(path)
    tables = [read_csv(folder / "memory.csv"), read_csv(folder / "batch_size_search.csv")]
    return Run(info.get("run_name") or folder.resolve().name, folder, info, read_steps(folder / "steps.jsonl"), *tables)


def read_steps(path: Path) -> list[dict]:
    """One dict a line, [] without the file; an unparsable last line is ignored, any other raises RunFolderError."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise RunFolderError(f"{path} line {number} is not a JSON object: {line[:60]!r}") from error
    return rows


def read_csv(path: Path) -> list[dict]:
    """One dict a row, [] without the file: phase and status stay text, all else is a float, an empty cell is None.

    A last row without its line end was cut off by a kill and is ignored: 3.1 could be the beginning of 3.14.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    try:
        return [
            {key: cell if key in ("phase", "status") else float(cell) if cell else None for key, cell in row.items()}
            for row in rows
        ]
    except (ValueError, TypeError) as error:
        raise RunFolderError(f"{path} holds a cell that is not a number: {error}") from error


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it holds a run.json, otherwise the run folders directly inside it in name order."""
    if not folder.is_dir() or (folder / "run.json").is_file():
        return [folder]  # a missing folder gets its error sentence from read_run
    runs = sorted(path.parent for path in folder.glob("*/run.json"))
    if not runs:
        raise RunFolderError(f"{folder} has no run.json and no run folders inside, so there is nothing to draw")
    return runs


# --------------------------------------------------------------------------------------------------------------------
# Experiments: cases that ran side by side
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A case of an experiment as its files tell."""

    name: str
    words: str
    status: str
    error: str | None
    info: dict[str, Any]
    epochs: list[dict[str, Any]]

    @property
    def results(self) -> dict[str, Any]:
        return self.info.get("results") or {}

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def epoch_totals(self) -> list[float]:
        """Seconds of every timed epoch: all but the first, which warms up."""
        return [row["total_s"] for row in self.epochs[1:]]


def read_experiment(folder: Path) -> tuple[str, list[Case]]:
    """The experiment's name and its cases in order.

    Raises:
        SettingsError: no experiment.json; RunFolderError: a damaged one, or a damaged file of a case.
    """
    path = folder / "experiment.json"
    if not path.is_file():
        raise SettingsError(f"{folder} has no experiment.json, so it holds no experiment")
    content = read_object(path)
    if "experiment" not in content or not isinstance(content.get("cases"), list):
        raise RunFolderError(f"{path} is damaged: it has no experiment with cases")
    cases = []
    for row in content["cases"]:
        try:
            own, words, status, problem = folder / row["name"], row["words"], row["status"], row.get("error")
        except (KeyError, TypeError) as error:
            raise RunFolderError(f"{path} is damaged: a case has no {error}") from error
        info = read_object(own / "run.json") if (own / "run.json").is_file() else {}
        cases.append(Case(own.name, words, status, problem, info, read_steps(own / "epochs.jsonl")))
    return content["experiment"], cases


def by_prefix(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Cases named <what>-seed-<n>, by what."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.name.rsplit("-seed-", 1)[0], []).append(case)
    return found


def time_saved(own: Case | None, base: Case | None) -> tuple[float, bool] | None:
    """How much less time an epoch takes than with `base`, as a share, and whether every timed epoch says so.

    Returns:
        (1 - median / median of base, clear); clear if all timed epochs of one, at least two, are faster than all of
        the other. None if one of them has no times.
    """
    if own is None or base is None or not (own.ok and base.ok):
        return None
    times = [case.results.get("epoch_total_s") for case in (own, base)]
    if None in times:
        return None
    mine, theirs = own.epoch_totals, base.epoch_totals
    clear = min(len(mine), len(theirs)) > 1 and (max(mine) < min(theirs) or min(mine) > max(theirs))
    return 1 - times[0] / times[1], clear
