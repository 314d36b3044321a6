"""Run many configurations of llm_train.py, each in a fresh process, and keep what every one of them cost.

    python compare_techniques.py                                  the nine runs of the plwiki lab, and what they lacked
    python compare_techniques.py --experiment factorial,max_batch,quality --dataset_path pl_text
    python compare_techniques.py --list true                      the cases, their flags and status; runs nothing
    python compare_techniques.py --gpus 0,1                       a case per GPU at a time

seed       time and memory at equal batch: the plwiki lab's nine runs under their names, then one change at a time
factorial  all combinations of techniques, their main effects and interactions on peak memory and step time
max_batch  the largest batch of each configuration under memory budgets, by the plwiki lab's grid and by bisection
quality    equal tokens per update and equal updates with three seeds; then that lab's epochs at unequal batches, in
           which perplexity follows the number of updates

A case is a run folder outputs/<experiment>/<case>. A case that ended (ok, oom or unsupported) with the same flags is
not run again, so the same command goes on after Ctrl-C; errors are tried again. `--size smoke` takes the tiny model and
folders of its own (smoke_seed, ...): minutes on a laptop, times that say nothing about a GPU.

A fresh process matters: allocator caches, compiled kernels and cuBLAS workspaces of one case would count for the next.
When it does not help: for one question about one technique, run that technique's own file.
"""

import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from case_runner import (
    FINISHED,
    Case,
    alone,
    check_device,
    check_old_folder,
    gpu_environment,
    hang_up_means_stop,
    read_info,
    result_line,
    run_cases,
    split_list,
    status_of,
)
from comparison_cases import (
    EXPERIMENTS,
    FACTORS,
    MEMORY_BUDGETS,
    SMOKE_BUDGETS,
    all_combinations,
    combination_name,
    make_cases,
    read_numbers,
)
from dataset import DATASET_NAMES
from run_folder import StopRequest, check_writable, describe_environment, write_atomically
from utils import SettingsError, parse_settings, read_names, run_script, setting


# fmt: off
@dataclass
class Settings:
    """Settings of `python compare_techniques.py`; the flags of a case itself are in comparison_cases.py."""

    experiment: str = setting("seed", f"one or several of {', '.join(EXPERIMENTS)}, separated by commas")
    size: str | None = setting(None, "full: the 134 M model; smoke: the tiny one (default: by GPU)", ["full", "smoke"])
    cases: str | None = setting(None, "only these cases, separated by commas")
    memory_budget_gib: str | None = setting(None, f"max_batch: GiB (default: {MEMORY_BUDGETS}; smoke {SMOKE_BUDGETS})")
    factors: str | None = setting(None, f"factorial: some of {','.join(FACTORS)} (default: all; smoke three)")
    seeds: str | None = setting(None, "quality: seeds (default: 0,1,2)")
    updates: int | None = setting(None, "quality: updates of 125 sequences (default: one epoch; smoke 8)")
    gpus: str | None = setting(None, "such as 0,1: a case on each of these GPUs at a time (default: one at a time)")
    processes: int | None = setting(None, "on the CPU: cases at a time, which slow each other down (default: 1)")
    device: str = setting("auto", "auto is cuda if there is one", ["auto", "cpu", "cuda"])
    dataset_name: str | None = setting(None, "as in llm_train.py", DATASET_NAMES)
    dataset_path: str | None = setting(None, "as in llm_train.py")
    cache_folder: str = setting(".cache/tokens", "where token files are kept")
    output_folder: str = setting("outputs", "folder of all results")
    timeout_minutes: float = setting(30.0, "a case that takes longer is ended and counts as an error")
    stop_after_minutes: float | None = setting(None, "start no case after this long")
    list: bool = setting(False, "print the cases with flags and status and run nothing")
# fmt: on


# --------------------------------------------------------------------------------------------------------------------
# What the numbers of a factorial mean
# --------------------------------------------------------------------------------------------------------------------


def effects(values: dict[frozenset[str], float | None]) -> dict[str, Any]:
    """Main effects and two-factor interactions of a full factorial.

    An effect of A is the mean, over all combinations of the other factors, of y(A on) - y(A off). The interaction of A
    and B is half the difference between A's effect with B on and with B off; 0 where techniques simply add up.

    Args:
        values: the measured number for every set of factors that are on; None where it could not be measured.

    Returns:
        main: factor -> effect, interactions: "A x B" -> effect, in the unit of the values; both None with a reason if a
        combination is missing, because the rest would not be balanced.
    """
    order = {name: place for place, name in enumerate(FACTORS)}
    names = sorted(set().union(*values), key=lambda name: (order.get(name, len(order)), name))
    wanted = all_combinations(names)
    missing = [combination_name(on, names) for on in wanted if values.get(on) is None]
    if missing:
        return {"main": None, "interactions": None, "reason": f"no value for {', '.join(missing)}"}

    def contrast(chosen: tuple[str, ...]) -> float:
        signed = (math.prod(1 if name in on else -1 for name in chosen) * values[on] for on in wanted)
        return math.fsum(signed) / (len(wanted) / 2)

    return {
        "main": {name: contrast((name,)) for name in names},
        "interactions": {" x ".join(pair): contrast(pair) for pair in itertools.combinations(names, 2)},
    }


def factorial_effects(cases: Sequence[Case], folder: Path) -> dict[str, Any]:
    """Effects on peak GiB and step ms, and as ratios (geometric means) of the step's time, from the run folders."""
    sets = [frozenset() if case.name == "baseline" else frozenset(case.name.split("+")) for case in cases]
    infos = [read_info(folder / case.name) or {} for case in cases]
    peaks, times = (
        {on: (info.get("results") or {}).get(key) if info.get("status") == "ok" else None for on, info in both}
        for key, both in ((key, zip(sets, infos, strict=True)) for key in ("peak_allocated_gib", "step_ms_median"))
    )
    ratio = effects({on: None if value is None else math.log(value) for on, value in times.items()})
    for kind in ("main", "interactions"):
        ratio[kind] = None if ratio[kind] is None else {name: math.exp(value) for name, value in ratio[kind].items()}
    return {
        "factors": [name for name in FACTORS if name in set().union(*sets)],
        "peak_gib": effects(peaks),
        "step_ms": effects(times),
        "step_ms_ratio": ratio,
        "cases": [
            {"name": case.name, "status": info.get("status", "missing"), "peak_gib": peaks[on], "step_ms": times[on]}
            for case, info, on in zip(cases, infos, sets, strict=True)
        ],
    }


# --------------------------------------------------------------------------------------------------------------------
# Run folders of the cases
# --------------------------------------------------------------------------------------------------------------------


def write_comparison(path: Path, experiment: str, size: str, cases: Sequence[Case], environment: dict) -> list[str]:
    """Write comparison.json: every case in order with flags and status, and those of earlier lists after them.

    Returns:
        The names of the cases that have no final status.
    """
    rows, left = [], []
    for case in cases:
        info = read_info(path / case.name) or {}
        status = status_of(case, path)[0]
        row = {"name": case.name, "words": case.words, "flags": case.flags, "status": status}
        row |= {"gpu": (info.get("case") or {}).get("gpu"), "error": info.get("error")}
        rows.append(row)
        left += [case.name] if status not in FINISHED else []
    with suppress(OSError, ValueError, KeyError):  # cases of another --memory_budget_gib, --seeds, ... stay in the list
        earlier = json.loads((path / "comparison.json").read_text(encoding="utf-8"))["cases"]
        known = {case.name for case in cases}
        rows += [row for row in earlier if row["name"] not in known and read_info(path / row["name"])]
    content = {"experiment": experiment, "size": size, "finished": not left}
    content |= {"git_commit": environment["git_commit"], "device_name": environment["device_name"], "cases": rows}
    write_atomically(path / "comparison.json", json.dumps(content, indent=2) + "\n")
    return left


# --------------------------------------------------------------------------------------------------------------------
# The script
# --------------------------------------------------------------------------------------------------------------------


def find_environment(settings: Settings) -> dict[str, Any]:
    """Device and versions; of a GPU asked for in a process of its own, so that the runner holds no memory there."""
    gpus = split_list(settings.gpus)
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise SettingsError("--device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu")
    if settings.device == "cpu" or not has_gpu:
        if settings.gpus is not None:
            raise SettingsError("--gpus needs NVIDIA GPUs, and this comparison runs on the CPU; leave it out")
        return describe_environment(torch.device("cpu"))
    if settings.processes is not None:
        raise SettingsError("--processes is for the CPU; on a GPU leave it out, or name several GPUs with --gpus")
    return gpu_environment(gpus[0] if gpus else None, f"--device cuda{f' --gpus {settings.gpus}' if gpus else ''}")


def check_settings(settings: Settings) -> list[str]:
    """The names of the experiments, once every setting is in range and has an effect."""
    experiments = read_names("experiment", settings.experiment, EXPERIMENTS)
    for name, experiment in (
        ("memory_budget_gib", "max_batch"),
        ("factors", "factorial"),
        ("seeds", "quality"),
        ("updates", "quality"),
    ):
        if getattr(settings, name) is not None and experiment not in experiments:
            raise SettingsError(f"--{name} has no effect without --experiment {experiment}")
    for name in ("timeout_minutes", "stop_after_minutes", "updates", "processes"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise SettingsError(f"--{name} must be above 0 and finite, not {value}")
    if settings.gpus is not None:
        read_numbers("gpus", settings.gpus, "0,1", int)
    if settings.dataset_name is not None and settings.dataset_path is not None:
        raise SettingsError("--dataset_name and --dataset_path exclude each other; give one of them")
    return experiments


def main() -> int:
    """Plan the cases of every experiment, then list them or run what is left."""
    settings = parse_settings(Settings)
    experiments = check_settings(settings)
    environment = find_environment(settings)
    size = settings.size or ("full" if environment["device"] == "cuda" else "smoke")
    common = {"dataset_name": settings.dataset_name, "dataset_path": settings.dataset_path}
    common = {name: value for name, value in common.items() if value is not None} | {"device": environment["device"]}
    plans: list[tuple[str, Path, list[Case]]] = []
    for name in experiments:
        cases = make_cases(name, size, settings, environment["device_memory_gib"])
        for case in cases:
            case.flags |= common
        plans.append((name, Path(settings.output_folder) / f"{'smoke_' if size == 'smoke' else ''}{name}", cases))
    chosen = split_list(settings.cases)
    unknown = set(chosen) - {case.name for _, _, cases in plans for case in cases}
    if unknown:
        raise SettingsError(f"--cases: no case is named {', '.join(sorted(unknown))}; --list true prints the names")
    for _, folder, cases in plans:
        for case in cases:
            status, changes = status_of(case, folder)
            wanted = not chosen or case.name in chosen
            if settings.list and wanted:
                flags = " ".join(f"--{key} {value}" for key, value in case.flags.items())
                print(f"{folder}/{case.name}: {status}\n    {case.script} {flags}\n    {case.words or case.name}")
            elif status == "changed" and wanted:
                print(f"{case.name} was made with other flags and is run anew: {changes}")
    if settings.list:
        return 0
    for _, folder, cases in plans:
        check_writable(folder, "--output_folder")
        check_device(cases, folder, environment)
        for case in cases:
            if status_of(case, folder)[0] not in FINISHED and (not chosen or case.name in chosen):
                check_old_folder(folder / case.name)

    deadline = time.monotonic() + 60 * (settings.stop_after_minutes or math.inf)
    gpus = split_list(settings.gpus)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    slots = gpus or ([visible] if environment["device"] == "cuda" else [None] * (settings.processes or 1))
    summary: dict[str, Any] = {"status": "ok", "experiments": []}
    with StopRequest() as stop, hang_up_means_stop():
        for name, folder, cases in plans:
            with alone(folder):
                todo = [case for case in cases if status_of(case, folder)[0] not in FINISHED]
                todo = [case for case in todo if not chosen or case.name in chosen]
                print(f"{folder}: {len(cases)} cases, {len(todo)} to run", flush=True)

                def done(case: Case, name: str = name, folder: Path = folder, cases: list[Case] = cases) -> None:
                    print(result_line(case, read_info(folder / case.name) or {}), flush=True)
                    write_comparison(folder, name, size, cases, environment)

                try:
                    run_cases(
                        todo,
                        folder,
                        environment,
                        stop,
                        done,
                        slots=slots,
                        choose_gpu=bool(gpus),
                        place={"cache_folder": settings.cache_folder},
                        timeout_minutes=settings.timeout_minutes,
                        timeout_advice="; raise --timeout_minutes",
                        deadline=deadline,
                    )
                except KeyboardInterrupt:  # the second Ctrl-C: the processes are gone, what is finished stays
                    stop.signal = stop.signal or signal.SIGINT
                left = write_comparison(folder, name, size, cases, environment)
                if name == "factorial":
                    content = json.dumps(factorial_effects(cases, folder), indent=2)
                    write_atomically(folder / "effects.json", content + "\n")
                counts: dict[str, int] = {}
                for case in cases:
                    status = status_of(case, folder)[0]
                    counts[status] = counts.get(status, 0) + 1
                summary["experiments"].append({"folder": str(folder), "finished": not left, **counts, "left": left})
    left = [name for entry in summary["experiments"] for name in entry["left"] if not chosen or name in chosen]
    errors = any(entry.get("error") for entry in summary["experiments"])
    summary["status"] = "interrupted" if stop.signal else "error" if errors else "incomplete" if left else "ok"
    if left:
        print(f"left: {', '.join(left)}; go on with the same command: python {shlex.join(sys.argv)}")
    print(json.dumps(summary))
    if stop.signal is not None:
        return stop.exit_status
    return 1 if errors else 0


if __name__ == "__main__":
    run_script(main)
