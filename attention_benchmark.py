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

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from attention import DTYPES
from attention_measure import (
    Bench,
    Case,
    Measurement,
)
from attention_results import csv_rows, study_lines, summarise_again, write_csv, write_summary
from attention_studies import break_even, overhead
from attention_support import BACKENDS, FULL
from batch_size import set_memory_budget, use_expandable_segments
from plot_attention import plot_sweep
from run_folder import RunFolder, check_writable, describe_environment, now
from utils import GIB, SettingsError, parse_settings, run_script, setting

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
