"""The results.csv of an attention benchmark, and what is said about it: rows, summary.txt, headline numbers.

attention_benchmark.py runs the cases; everything here is made from the file alone, so that it can be made anew.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from attention_measure import (
    DIRECTIONS,
    Case,
    Measurement,
    attention_flops,
    case_noise,
    cell_name,
    differences,
    noise_floor,
)
from attention_studies import break_even_words, overhead_words
from attention_support import FULL
from plot_attention import plot_sweep, read_results
from run_folder import RunFolder, write_atomically
from utils import GIB, SettingsError, percentile

# --------------------------------------------------------------------------------------------------------------------
# The CSV: one row for each case and metric
# --------------------------------------------------------------------------------------------------------------------

COLUMNS = (
    "sweep",
    "backend",
    "layout",
    "batch_size",
    "context_length",
    "num_heads",
    "head_dim",
    "embedding_dim",
    "causal",
    "window",
    "dtype",
    "status",
    "direction",
    "metric",
    "unit",
    "value",
    "p20",
    "p80",
    "n",
    "rounds",
    "limit",
    "chosen_backend",
    "operator",
    "kernel",
    "reason",
    "device",
    "torch",
    "cuda",
    "cudnn",
    "flash_attn",
)


def csv_rows(sweep: str, measurement: Measurement, environment: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one case: value is the median, p20 and p80 are over n repetitions, `rounds` has each round's median.

    A case that is not ok has a row with the metric `status` and its reason.
    """
    case = measurement.case
    base = {
        "sweep": sweep,
        **{name: getattr(case, name) for name in ("backend", "layout", "batch_size", "context_length", "num_heads")},
        "head_dim": case.head_dim,
        "embedding_dim": case.num_heads * case.head_dim,
        "causal": str(case.causal).lower(),
        "window": "none" if case.window == FULL else case.window[0],
        "dtype": case.dtype,
        "status": measurement.status,
        "chosen_backend": measurement.chosen_backend,
        "operator": measurement.operator,
        "reason": measurement.reason,
        "device": environment["device_name"],
        "torch": environment["torch_version"],
        "cuda": environment["cuda_version"],
        "cudnn": torch.backends.cudnn.version() if environment["device"] == "cuda" else None,
        "flash_attn": environment["flash_attn_version"],
    }
    if measurement.status != "ok":
        yield base | {"metric": "status", "direction": "forward_backward"}
    for name, (error, limit) in measurement.errors.items():
        yield base | {"metric": f"error_{name}", "unit": "max abs", "value": error, "limit": limit}
    for metric, peaks in (
        ("peak_memory", measurement.peak_bytes),
        ("peak_memory_above_inputs", measurement.peak_above_inputs_bytes),
    ):
        for direction, peak in peaks.items():
            yield base | {"metric": metric, "unit": "GiB", "direction": direction, "value": peak / GIB}
    if not measurement.rounds:
        return
    for direction in DIRECTIONS:
        times = [ms for one in measurement.rounds for ms in one[direction]]
        medians = [percentile(one[direction], 50) for one in measurement.rounds]
        shared = base | {
            "direction": direction,
            "n": len(times),
            "kernel": measurement.kernels.get(direction, ""),
        }
        low, middle, high = (percentile(times, percent) for percent in (20, 50, 80))
        yield shared | {
            "metric": "time",
            "unit": "ms",
            "value": middle,
            "p20": low,
            "p80": high,
            "rounds": ";".join(f"{value:.6g}" for value in medians),
        }
        rate = attention_flops(case, direction) / 1e9
        shared |= {"metric": "throughput", "unit": "TFLOP/s"}
        yield shared | {"value": rate / middle, "p20": rate / high, "p80": rate / low}
    for metric, unit, values in (
        ("host_time", "ms", measurement.host_ms),
        ("clock", "MHz", measurement.clock_mhz),
    ):
        if values:
            yield base | {
                "metric": metric,
                "unit": unit,
                "direction": "forward_backward",
                "value": percentile(values, 50),
                "n": len(values),
                "rounds": ";".join(f"{value:.6g}" for value in values),
            }


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows anew; numbers with nine digits, memory exact to the byte."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        shown = {key: value for key, value in row.items() if value is not None}
        for key, value in shown.items():
            if isinstance(value, float):
                shown[key] = repr(value) if row["unit"] == "GiB" else f"{value:.9g}"
        writer.writerow(shown)
    write_atomically(path, text.getvalue())


# --------------------------------------------------------------------------------------------------------------------
# Summaries, made from results.csv alone
# --------------------------------------------------------------------------------------------------------------------


def row_cell(row: dict[str, str]) -> str:
    """The cell of a row, all but its kernel, in words."""
    window = FULL if row["window"] == "none" else (int(row["window"]), 0)
    shape = (int(row[name]) for name in ("batch_size", "context_length", "num_heads", "head_dim"))
    return cell_name(Case("", *shape, row["causal"] == "true", window, row["layout"], row["dtype"]))


def round_medians(row: dict[str, str]) -> list[float]:
    return [float(value) for value in row["rounds"].split(";")]


def same_kernel_differences(rows: list[dict[str, str]]) -> list[float]:
    """A/A pairs across names: in a cell `auto`, `sdpa` and the kernel forced by name often run the same fused kernel.

    Returns:
        How far the times of each such pair lie apart, relative to the smaller.
    """
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if "attn" in row["operator"] or "attention" in row["operator"]:
            groups.setdefault((row_cell(row), row["operator"]), []).append(float(row["value"]))
    return [difference for values in groups.values() for difference in differences(values)]


def summarise(rows: list[dict[str, str]]) -> tuple[str, dict[str, Any]]:
    """A text for people, cell by cell, and the headline numbers.

    In each cell the fastest kernel leads. Another is called no difference if it is slower by less than the noise floor,
    or by less than the rounds of either of the two typically differ.
    """
    times: dict[str, list[dict[str, str]]] = {direction: [] for direction in DIRECTIONS}
    for row in rows:
        if row["metric"] == "time":
            times[row["direction"]].append(row)
    floors = {direction: noise_floor([round_medians(row) for row in own]) for direction, own in times.items()}
    twins = same_kernel_differences(times["forward_backward"])
    floor = floors["forward_backward"]
    if floor is not None and twins:
        floor = max(floor, percentile(twins, 95))
    lines = [
        "One round or no result: no noise floor, so differences are not judged. Use --rounds 3."
        if floor is None
        else f"noise floor of forward and backward: {100 * floor:.1f} %; a smaller difference is called no difference "
        f"(95th percentile, the larger one, of the median difference between two rounds of a case, over "
        f"{len(times['forward_backward'])} cases, and of {len(twins)} pairs of cases that ran the same kernel)"
    ]

    def find(metric: str, cell: str, backend: str) -> float:
        return next(
            float(row["value"])
            for row in rows
            if (row["metric"], row["direction"], row["backend"]) == (metric, "forward_backward", backend)
            and row_cell(row) == cell
        )

    cells: dict[str, list[dict[str, str]]] = {}
    failed: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        cells.setdefault(row_cell(row), [])
        if row["metric"] == "status":
            failed.setdefault(row_cell(row), []).append(row)
    for row in times["forward_backward"]:
        cells[row_cell(row)].append(row)
    auto: list[tuple[float, str]] = []
    for cell, ran in cells.items():
        lines += ["", cell]
        ran.sort(key=lambda row: float(row["value"]))
        named = [row for row in ran if row["backend"] != "auto"]
        for row in ran:
            ms, fastest = float(row["value"]), float(ran[0]["value"])
            verdict = f"{ms / fastest:.2f} x the fastest"
            if row is ran[0]:
                verdict = "fastest"
            elif floor is not None:
                noise = max(floor, *(case_noise(round_medians(one)) or 0.0 for one in (row, ran[0])))
                verdict = "no difference to the fastest" if ms / fastest - 1 < noise else verdict
            label = row["backend"] + (f" -> {row['chosen_backend']}" if row["backend"] == "auto" else "")
            rate = find("throughput", cell, row["backend"])
            peak = find("peak_memory_above_inputs", cell, row["backend"])
            lines.append(f"  {label:<22}{ms:>11.3f} ms{rate:>9.3g} TFLOP/s{peak:>9.3f} GiB  {verdict}")
            if row["backend"] == "auto" and named and floor is not None:
                auto.append((ms / float(named[0]["value"]) - 1, cell))
        lines += [f"  {row['backend']:<22}{row['status']}: {row['reason']}" for row in failed.get(cell, [])]
    statuses = {(row_cell(row), row["backend"]): row["status"] for row in rows}
    headline: dict[str, Any] = {"cases": len(statuses)}
    headline |= {name: list(statuses.values()).count(name) for name in ("ok", "oom", "unsupported", "error")}
    headline |= {f"noise_floor_{direction}": value for direction, value in floors.items()}
    headline["noise_floor_forward_backward"] = floor
    if auto:
        worst, where = max(auto)
        worst = max(worst, 0.0)
        headline |= {"auto_behind_fastest_at_most": worst, "auto_worst_cell": where}
        lines += ["", f"auto is behind the fastest kernel by at most {100 * worst:.1f} % ({where})"]
    return "\n".join(lines) + "\n", headline


def write_summary(run: RunFolder, lines: list[str]) -> tuple[str, dict[str, Any]]:
    """Write summary.txt: `lines` and, where there is a results.csv, what `summarise` makes of it.

    Returns:
        (the text, the headline numbers).
    """
    text, headline = summarise(read_results(run.path)) if (run.path / "results.csv").is_file() else ("", {})
    text = "\n\n".join(part for part in ("\n".join(lines), text) if part)
    write_atomically(run.path / "summary.txt", text.rstrip("\n") + "\n")
    return text, headline


def summarise_again(folder: str) -> dict[str, Any]:
    """Make summary.txt, the headline numbers and the figures of an earlier run anew from its results.csv.

    Raises:
        SettingsError: not a folder of this benchmark.
    """
    run = RunFolder(Path(folder))
    try:
        run.info = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
        studies = {
            name: run.info["results"][name] for name in ("break_even", "overhead") if name in run.info["results"]
        }
        _, headline = write_summary(run, study_lines(studies))
        run.update(results=headline | studies)
        for path in plot_sweep(run.path) if (run.path / "results.csv").is_file() else []:
            print(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"--summarise {folder}: it is no finished run of this benchmark ({error!r})") from None
    return {"run": str(run.path), "status": run.info["status"], **headline}


def study_lines(studies: dict[str, Any]) -> list[str]:
    """The answers of break_even and overhead in words."""
    lines = [break_even_words(answer) for answer in studies.get("break_even", [])]
    return lines + [overhead_words(answer) for answer in studies.get("overhead", [])]
