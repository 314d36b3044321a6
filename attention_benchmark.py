"""Compare attention kernels with controls: parity first, then memory, then time; an out of memory is a row.

    python attention_benchmark.py                                  batch x context for every kernel (small on a CPU)
    python attention_benchmark.py --sweep window,break_even        other experiments, by name
    python attention_benchmark.py --sweep all                      every experiment
    python attention_benchmark.py --sweep custom --context_length 512,4096 --backends sdpa,flash_attn
    python attention_benchmark.py --memory_budget_gib 12           as on a card of 12 GiB

Experiments: `comparison` batch x context, `comparison_packed` the same with q, k and v in one tensor; `batch_size`,
`context_length`, `num_heads`, `embedding_dim`, `causal` one parameter each around the default cell, packed; `short`
contexts; `window` context x window; `head_dim`; `long` at a fixed number of tokens; `break_even` bisects for the
context from which fused attention beats eager, and a window the full mask; `overhead` compares `attention.py` with
calling the kernel directly. A flag replaces the list of the experiment.

How a case is measured is in `attention_measure.py`. Every case is measured `--rounds` times, each round in another
random order: the median difference between two of its rounds is its noise, and the 95th percentile over all cases the
noise floor of the experiment, unless cases that ran the same kernel under two names lie further apart. The summary
calls a smaller difference "no difference".

Leaves outputs/attention_benchmark/<experiment>/: results.csv (one row for each case and metric), summary.txt, run.json
and figures. The last line on standard output is one JSON object.
"""

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from attention import DTYPES
from attention_measure import (
    DIRECTIONS,
    Bench,
    Case,
    Measurement,
    attention_flops,
    case_noise,
    cell_name,
    differences,
    noise_floor,
)
from attention_studies import break_even, break_even_words, overhead, overhead_words
from attention_support import BACKENDS, FULL
from batch_size import set_memory_budget, use_expandable_segments
from plot_attention import plot_sweep, read_results
from run_folder import RunFolder, check_writable, describe_environment, now, write_atomically
from utils import GIB, SettingsError, parse_settings, percentile, run_script, setting

STANDARD = ["eager", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flash_attn", "auto"]
MORE = ["eager", "sdpa", "sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flash_attn", "varlen", "auto"]
WINDOWED = ["flash_attn", "varlen", "flex"]

# Experiment -> its lists. `tokens` fixes batch x context instead of the batch; `embedding_dim` fixes heads x head_dim
# instead of the head's width. The default cell is that of the course project this benchmark began with.
CELL: dict[str, list] = {
    "batch_size": [32],
    "context_length": [1024],
    "num_heads": [32],
    "embedding_dim": [2048],
    "causal": [False],
    "window": [-1],
    "layout": ["packed"],
    "backends": STANDARD,
}
GPU_SWEEPS: dict[str, dict[str, list]] = {
    "comparison": {
        "batch_size": [16, 32, 64],
        "context_length": [512, 1024, 2048],
        "causal": [False, True],
        "layout": ["separate"],
        "backends": MORE,
    },
    "comparison_packed": {
        "batch_size": [16, 32, 64],
        "context_length": [512, 1024, 2048],
        "causal": [False, True],
    },
    "batch_size": {"batch_size": [16, 32, 64]},
    "context_length": {"context_length": [512, 1024, 2048]},
    "num_heads": {"num_heads": [8, 16, 32]},
    "embedding_dim": {"embedding_dim": [1024, 2048, 4096], "num_heads": [16]},
    "causal": {"causal": [False, True]},
    "short": {"tokens": [16384], "context_length": [32, 64, 128, 192, 256], "causal": [False, True]},
    "window": {
        "tokens": [16384],
        "context_length": [256, 512, 1024, 2048, 4096, 8192, 16384],
        "window": [-1, 64, 256, 1024],
        "causal": [True],
        "layout": ["separate"],
        "backends": ["sdpa_cudnn", *WINDOWED],
    },
    "head_dim": {
        "batch_size": [16],
        "head_dim": [16, 32, 64, 128, 256],
        "embedding_dim": [2048],
        "causal": [True],
        "layout": ["separate"],
        "backends": [*MORE[:-1], "flex", "auto"],
    },
    "long": {
        "tokens": [32768],
        "context_length": [1024, 2048, 4096, 8192, 16384, 32768, 65536],
        "num_heads": [16],
        "causal": [True],
        "layout": ["separate"],
        "backends": [*STANDARD[:-1], "varlen", "auto"],
    },
    "break_even": {
        "tokens": [16384],
        "context_length": [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384],
        "window": [64, 256, 1024],
        "causal": [True],
        "layout": ["separate"],
        "backends": ["sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flash_attn"],
    },
    "overhead": {
        "batch_size": [32],
        "context_length": [1024],
        "num_heads": [12, 32],
        "head_dim": [64],
        "causal": [True],
        "layout": ["separate", "packed"],
        "backends": ["sdpa", "sdpa_cudnn", "flash_attn"],
    },
    "custom": {},
}
# The same experiments in sizes that a laptop runs in a minute or two.
CPU_CELL = CELL | {"batch_size": [2], "context_length": [128], "num_heads": [4], "embedding_dim": [128]}
CPU_SWEEPS: dict[str, dict[str, list]] = {
    "comparison": GPU_SWEEPS["comparison"] | {"batch_size": [1, 2, 4], "context_length": [64, 128, 256]},
    "comparison_packed": {"batch_size": [1, 2, 4], "context_length": [64, 128, 256], "causal": [False, True]},
    "batch_size": {"batch_size": [1, 2, 4]},
    "context_length": {"context_length": [64, 128, 256]},
    "num_heads": {"num_heads": [2, 4, 8]},
    "embedding_dim": {"embedding_dim": [64, 128, 256]},
    "causal": {"causal": [False, True]},
    "short": {"tokens": [512], "context_length": [16, 32, 64], "causal": [False, True]},
    "window": GPU_SWEEPS["window"]
    | {
        "tokens": [512],
        "context_length": [64, 128, 256, 512],
        "window": [-1, 16, 64],
        "backends": ["eager", *WINDOWED],
    },
    "head_dim": GPU_SWEEPS["head_dim"] | {"batch_size": [2], "head_dim": [8, 16, 32, 64], "embedding_dim": [128]},
    "long": GPU_SWEEPS["long"] | {"tokens": [1024], "context_length": [128, 256, 512, 1024, 2048], "num_heads": [2]},
    "break_even": GPU_SWEEPS["break_even"]
    | {"tokens": [1024], "context_length": [8, 16, 32, 64, 128, 256, 512], "window": [64], "backends": ["sdpa_flash"]},
    "overhead": GPU_SWEEPS["overhead"]
    | {"batch_size": [4], "context_length": [128], "num_heads": [12], "backends": ["sdpa"]},
    "custom": {},
}
WHOLE_NUMBERS = ("batch_size", "context_length", "num_heads", "head_dim", "embedding_dim", "tokens")


@dataclass
class Settings:
    """Settings of `python attention_benchmark.py`; lists are separated by commas and replace the experiment's."""

    sweep: str = setting("comparison", f"experiments by name: {', '.join(GPU_SWEEPS)}, or all")
    backends: str | None = setting(None, "kernels to compare: auto, " + ", ".join(BACKENDS))
    batch_size: str | None = setting(None, "sequences")
    tokens: str | None = setting(None, "instead of batch_size, which becomes tokens // context_length (at least 1)")
    context_length: str | None = setting(None, "tokens in a sequence")
    num_heads: str | None = setting(None, "heads")
    head_dim: str | None = setting(None, "width of a head")
    embedding_dim: str | None = setting(None, "width of all heads together, instead of head_dim")
    causal: str | None = setting(None, "true, false or both")
    window: str | None = setting(None, "keys seen before the query itself (causal), -1 for all")
    layout: str | None = setting(None, "separate (q, k, v) or packed (one tensor, as a linear layer makes it), or both")
    dtype: str | None = setting(None, "of q, k and v (default: bf16 on a GPU, fp32 without)", list(DTYPES))
    device: str = setting("auto", "where to measure", ["auto", "cuda", "cpu"])
    rounds: int = setting(3, "how often each case is measured, each time in another order")
    seconds: float | None = setting(None, "timed seconds a case and round (default: 0.1 on a GPU, 0.05 without)")
    memory_budget_gib: float | None = setting(None, "behave like a card of this size; beyond it is oom")
    seed: int = setting(0, "of the random order")
    output_folder: str = setting("outputs", "where run folders go")
    run_name: str | None = setting(None, "name of the run folder (default: the experiment)")
    summarise: str | None = setting(None, "measure nothing: summary and figures of this run folder anew from its CSV")


# --------------------------------------------------------------------------------------------------------------------
# From settings to cases
# --------------------------------------------------------------------------------------------------------------------


def read_list(name: str, text: str) -> list:
    """The values of a comma-separated flag.

    Raises:
        SettingsError: a value of the wrong kind.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    kinds: dict[str, tuple[Callable[[str], Any], str]] = {
        "causal": (lambda word: {"true": True, "false": False}[word.lower()], "true or false"),
        "layout": (lambda word: {"separate": "separate", "packed": "packed"}[word], "separate or packed"),
        "backends": (lambda word: {n: n for n in ("auto", *BACKENDS)}[word], f"one of auto, {', '.join(BACKENDS)}"),
        "window": (lambda word: int(word), "a whole number from -1 up"),
    }
    convert, wanted = kinds.get(name, (int, "a whole number from 1 up"))
    values = []
    for word in words:
        try:
            value = convert(word)
        except (KeyError, ValueError):
            raise SettingsError(f"--{name} {text}: {word!r} is not {wanted}") from None
        if (name in WHOLE_NUMBERS and value < 1) or (name == "window" and value < -1):
            raise SettingsError(f"--{name} {text}: {word!r} is not {wanted}")
        values.append(value)
    if not values:
        raise SettingsError(f"--{name} is empty; give values separated by commas")
    return list(dict.fromkeys(values))


def sweep_axes(name: str, settings: Settings, device: torch.device) -> dict[str, list]:
    """The lists of an experiment with those of the flags in their place.

    Raises:
        SettingsError: two flags that fix the same number.
    """
    cell, sweeps = (CELL, GPU_SWEEPS) if device.type == "cuda" else (CPU_CELL, CPU_SWEEPS)
    lists = (*cell, "tokens", "head_dim")
    given = {key: read_list(key, getattr(settings, key)) for key in lists if getattr(settings, key) is not None}
    if "batch_size" in given and "tokens" in given:
        raise SettingsError("--batch_size and --tokens fix the same number; give one of them")
    widths = ("num_heads", "head_dim", "embedding_dim")
    if all(name in given for name in widths):
        raise SettingsError("--num_heads, --head_dim and --embedding_dim: two of them fix the third; leave one out")
    axes = dict(cell)
    for changes in (sweeps[name], given):
        axes |= changes
        for one, other in (("batch_size", "tokens"), ("tokens", "batch_size")):
            if one in changes:
                axes.pop(other, None)
        # Of heads, head width and width of all heads two are kept: the ones asked for last, heads before the width.
        spare = [width for width in ("embedding_dim", "num_heads", "head_dim") if width not in changes]
        if all(width in axes for width in widths):
            axes.pop(spare[0])
    return axes


def sweep_cases(axes: dict[str, list], dtype: str) -> list[Case]:
    """Every combination of the lists, without those that a plain case already stands for.

    Left out are windows that hide nothing (context - 1 or more keys before), windows for kernels without any, and flex
    with packed tensors (the same compiled kernel as with separate ones, and 5 s of compilation each).

    Raises:
        SettingsError: heads that do not divide the width, or a window without a causal mask.
    """
    cases = []
    sizes = axes.get("batch_size") or axes["tokens"]
    for size, context, heads, head_dim, width, causal, window, layout, backend in product(
        sizes,
        axes["context_length"],
        axes.get("num_heads", [None]),
        axes.get("head_dim", [None]),
        axes.get("embedding_dim", [None]),
        axes["causal"],
        axes["window"],
        axes["layout"],
        axes["backends"],
    ):
        for name, divisor in (("num_heads", heads), ("head_dim", head_dim)):
            if width and divisor and width % divisor:
                raise SettingsError(f"--embedding_dim {width} is not divisible by --{name} {divisor}")
        if window >= 0 and not causal:
            raise SettingsError("--window looks back from the query, so it needs --causal true")
        if window >= context - 1 or (window >= 0 and backend.startswith("sdpa")):
            continue
        if backend == "flex" and layout == "packed":
            continue
        batch = size if "batch_size" in axes else max(1, size // context)
        shape = (batch, context, heads or width // head_dim, head_dim or width // heads)
        shown = FULL if window < 0 else (window, 0)
        cases.append(Case(backend, *shape, causal, shown, layout, dtype))
    if not cases:
        raise SettingsError("these lists leave no case to measure: every window hides nothing or has no kernel")
    return list(dict.fromkeys(cases))


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


# --------------------------------------------------------------------------------------------------------------------
# One experiment, one run folder
# --------------------------------------------------------------------------------------------------------------------


def check_lists(name: str, axes: dict[str, list], dtype: str) -> None:
    """A wrong list is an error before the first experiment, not after it.

    Raises:
        SettingsError: lists that make no case, or several values where break_even takes one.
    """
    if name != "break_even":
        sweep_cases(axes, dtype)
        return
    for axis in ("batch_size", "tokens", "num_heads", "head_dim", "embedding_dim", "causal", "layout"):
        if len(axes.get(axis, [])) > 1:
            raise SettingsError(f"--sweep break_even takes one value of --{axis}, not {len(axes[axis])}")
    sweep_cases(axes | {"window": [-1]}, dtype)


def run_break_even(bench: Bench, axes: dict[str, list]) -> tuple[list[Measurement], list[dict[str, Any]]]:
    """`break_even` with the lists of the experiment."""
    base = sweep_cases(axes | {"window": [-1]}, bench.dtype)[0]

    def batch_of(context: int) -> int:
        return axes["batch_size"][0] if "batch_size" in axes else max(1, axes["tokens"][0] // context)

    windows = [window for window in axes["window"] if window >= 0]
    return break_even(bench, base, sorted(axes["context_length"]), windows, axes["backends"], batch_of)


def run_sweep(
    name: str, bench: Bench, axes: dict[str, list], settings: Settings, environment: dict[str, Any]
) -> dict[str, Any]:
    """Run one experiment and leave its folder; returns the headline numbers."""
    run = RunFolder.create(
        settings.output_folder, "attention_benchmark", settings.run_name or name, unique=settings.run_name is None
    )
    run.update(status="running", sweep=name, lists=axes, dtype=bench.dtype, settings=asdict(settings))
    run.update(**environment, cudnn_version=torch.backends.cudnn.version())
    begin = time.perf_counter()
    measurements: list[Measurement] = []

    def keep(known: list[Measurement]) -> None:
        measurements[:] = known
        rows = [row for m in known for row in csv_rows(name, m, environment)]
        if rows:  # a study in which nothing can run leaves none
            write_csv(run.path / "results.csv", rows)

    studies: dict[str, Any] = {}
    try:
        if name == "overhead":
            studies["overhead"] = overhead(bench, sweep_cases(axes, bench.dtype))
        elif name == "break_even":
            known, studies["break_even"] = run_break_even(bench, axes)
            keep(known)
        else:
            without = [name for name in axes["backends"] if name.startswith("sdpa")]
            if without and max(axes["window"]) >= 0:
                print(f"measured without a window only, because they have none: {', '.join(without)}")
            bench.measure_all(sweep_cases(axes, bench.dtype), keep)
    except BaseException as error:
        run.update(status="interrupted" if isinstance(error, KeyboardInterrupt) else "error", finished_at=now())
        raise
    text, headline = write_summary(run, study_lines(studies))
    print(text if text.count("\n") < 100 else f"{text[: text.index(chr(10))]}\n... {run.path / 'summary.txt'}")
    run.update(status="ok", results=headline | studies, seconds=round(time.perf_counter() - begin, 1))
    run.update(finished_at=now())
    for path in plot_sweep(run.path) if measurements else []:
        print(path)
    return {"run": str(run.path), "status": "ok", **headline}


def main() -> int:
    """Run the experiments of `--sweep` one after another."""
    settings = parse_settings(Settings)
    if settings.summarise is not None:
        print(json.dumps(summarise_again(settings.summarise)))
        return 0
    names = [word.strip() for word in settings.sweep.split(",") if word.strip()]
    names = [name for name in GPU_SWEEPS if name != "custom"] if names == ["all"] else names
    for name in names:
        if name not in GPU_SWEEPS:
            raise SettingsError(f"--sweep {name} is unknown; choose from {', '.join(GPU_SWEEPS)}, all")
    if not names:
        raise SettingsError(f"--sweep is empty; choose from {', '.join(GPU_SWEEPS)}, all")
    if settings.run_name and len(names) > 1:
        raise SettingsError("--run_name names one run folder; leave it out or give one --sweep")
    if settings.run_name and Path(settings.run_name).name != settings.run_name:
        raise SettingsError(f"--run_name {settings.run_name} must be a plain name, not a path; see --output_folder")
    if settings.rounds < 1:
        raise SettingsError("--rounds must be at least 1")
    if settings.seconds is not None and not (settings.seconds > 0 and math.isfinite(settings.seconds)):
        raise SettingsError("--seconds must be positive")
    budget = settings.memory_budget_gib
    if budget is not None and not (budget > 0 and math.isfinite(budget)):
        raise SettingsError("--memory_budget_gib must be positive")
    kind = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch sees no NVIDIA GPU here; use --device cpu")
    device = torch.device(kind)
    dtype = settings.dtype or ("bf16" if kind == "cuda" else "fp32")
    check_writable(Path(settings.output_folder) / "attention_benchmark", "--output_folder")
    use_expandable_segments(device)
    set_memory_budget(device, settings.memory_budget_gib)
    axes = {name: sweep_axes(name, settings, device) for name in names}
    for name in names:
        check_lists(name, axes[name], dtype)
    seconds = settings.seconds or (0.1 if kind == "cuda" else 0.05)
    limit = None if budget is None else int(budget * GIB)
    bench = Bench(device, dtype, settings.rounds, seconds, settings.seed, limit)
    environment = describe_environment(device)
    results = [run_sweep(name, bench, axes[name], settings, environment) for name in names]
    print(json.dumps(results[0] if len(results) == 1 else {"status": "ok", "runs": results}))
    return 0


if __name__ == "__main__":
    run_script(main)
