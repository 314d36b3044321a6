"""The tables of FP8, made from the run folders of llm_train.py and fp8_benchmark.py in outputs/fp8.

    python report_fp8.py                              prints them
    python report_fp8.py --output_folder mine         those of your own runs

report.py puts them into the README. A run stands against the bf16 run of the same model and seed; losses are compared
as means of 25 steps, with what another seed does to bf16 beside them. What has not been run is one line that says so.
"""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8_results import QUESTIONS, SHAPE_WORDS, break_even, in_words, read_rows
from report_text import ROOT, markdown, not_run, percent, plain, shown
from run_results import Run, measured_elsewhere, read_run
from utils import SettingsError, parse_settings, run_script, setting

ORDER = ("fp32", "bf16", "fp8")
SHAPE_COLUMNS = ("device_name", "name", "tokens", "inputs", "outputs", "width")
MAY_DIFFER = {  # between a run in FP8 and its baseline
    "precision", "fp8_recipe", "fp8_layers", "fp8_head", "fp8_emulation", "use_fp16", "run_name", "figures",
    "log_every", "tensorboard", "output_folder", "cache_folder", "dataset_path", "resume", "config",
    "max_steps", "measured_steps", "evaluate_on",  # the learning rate does not depend on the last step
}  # fmt: skip
BLOCK_STEPS = 25  # steps whose mean loss is compared
TRAINING = (
    "python llm_train.py --experiment fp8 --model_type llama --model_size llama-1b-wide --precision fp8 "
    "--use_compile true"
)


def runs_of(outputs: Path) -> list[Run]:
    """The trainings in outputs/fp8, by model, warm-up, GPU, precision and seed."""
    paths = sorted((outputs / "fp8").glob("*/run.json"))
    runs = [read_run(path.parent) for path in paths]
    found = [run for run in runs if "model_size" in run.info and run.info.get("precision") in ORDER]

    def place(run: Run) -> tuple:
        kind = ORDER.index(run.info["precision"]), precision_words(run)
        return run.info["model_size"], -warm_up_of(run), run.info["device_name"], *kind, seed_of(run), run.name

    return sorted(found, key=place)


def seed_of(run: Run) -> int:
    return run.info["settings"]["seed"]


def warm_up_of(run: Run) -> int:
    return run.info["settings"].get("warm_up_steps") or 0


def model_words(run: Run) -> str:
    """The model, and where the learning rate did not rise first, that it did not."""
    return f"`{run.info['model_size']}`" + ("" if warm_up_of(run) else ", no warm-up")


def precision_words(run: Run) -> str:
    """ "bf16", "fp8 tensorwise", and whether the head is part of it."""
    fp8 = run.info.get("fp8")
    if not fp8:
        return run.info["precision"]
    kept = {row["name"] for row in fp8["kept"]}
    layers = "" if fp8["layers"] == "all" else ", large layers"
    emulated = ", emulated" if fp8["emulated"] else ""
    return f"fp8 {fp8['recipe']}{layers}{'' if 'head' in kept else ', head too'}{emulated}"


def fp8_share(run: Run) -> float | None:
    """The part of a step's FLOPs that is in FP8 products; None for a run without FP8."""
    fp8 = run.info.get("fp8")
    if not fp8:
        return None
    converted = sum(row["inputs"] * row["outputs"] * row["count"] for row in fp8["converted"])
    return 6 * converted / run.info["results"]["flops_per_token"]


def facts(run: Run, but: tuple[str, ...] = ()) -> tuple:
    """What two runs that are compared have in common: model, GPU and settings, without those named."""
    settings = {name: value for name, value in run.info["settings"].items() if name not in (*MAY_DIFFER, *but)}
    device = None if "device_name" in but else run.info["device_name"]
    return run.info["model_size"], device, sorted(settings.items(), key=lambda item: item[0])


def baseline_of(run: Run, runs: list[Run]) -> Run | None:
    """The bf16 run that differs in nothing but the precision: the same device, model, seed and all other settings.

    It may have more or fewer steps, if there is none that has as many.
    """

    own = facts(run)
    sound = (other for other in runs if other.info["status"] == "ok" and not measured_elsewhere(other))
    found = [other for other in sound if other.info["precision"] == "bf16" and facts(other) == own]
    steps = run.info["settings"].get("max_steps")
    return min(found, key=lambda other: other.info["settings"].get("max_steps") != steps, default=None)


def training_table(outputs: Path) -> str:
    """One row a training: speed, MFU against both peaks, memory, loss."""
    runs = runs_of(outputs)
    if not runs:
        return not_run("a training in FP8", TRAINING)
    lines = []
    for run in runs:
        results = run.info.get("results") or {}
        words = [run.info["device_name"], model_words(run), plain(precision_words(run)), str(seed_of(run))]
        if run.info["status"] != "ok":
            lines.append([*words, run.info["status"], *["-"] * 9])
            continue
        if measured_elsewhere(run):
            lines.append([*words, "ok, resumed elsewhere", *["-"] * 8, last_loss(run)])
            continue
        if (run.info.get("fp8") or {}).get("emulated"):
            lines.append([*words, *["-"] * 9, last_loss(run)])  # its time and memory say nothing about FP8
            continue
        if results.get("tokens_per_s") is None:
            lines.append([*words, "too short to time", *["-"] * 8, last_loss(run)])
            continue
        base = baseline_of(run, runs)
        rate = None if base is None or base is run else base.info["results"].get("tokens_per_s")
        gain = results["tokens_per_s"] / rate if rate else None
        share = fp8_share(run)
        lines.append(
            [
                *words,
                f"{results['tokens_per_s']:,.0f}",
                f"{results['step_ms_median']:.1f} ({results['step_ms_p20']:.1f}-{results['step_ms_p80']:.1f})",
                "-" if gain is None else f"{gain:.3f}",
                percent(share),
                "-" if share is None else f"{1 / (1 - share / 2):.2f}",
                percent(results.get("mfu_bf16_peak", results["mfu"])),
                percent(results.get("mfu_fp8_peak")),
                shown(results["peak_allocated_gib"]),
                "-" if results["compile_s"] is None else f"{results['compile_s']:.0f}",
                last_loss(run),
            ]
        )
    header = ["GPU", "model", "precision", "seed", "tokens/s", "step ms (20th-80th percentile)"]
    header += ["times bf16, same seed", "FLOPs in FP8", "times bf16 if those took half the time"]
    header += ["MFU of the bf16 peak", "MFU of the fp8 peak", "peak allocated, GiB", "compiled in, s"]
    return markdown([*header, f"loss, mean of {BLOCK_STEPS} steps, at the last"], lines)


def last_loss(run: Run) -> str:
    """Mean of the last BLOCK_STEPS steps and the step at which they end."""
    if not run.steps:
        return "-"
    losses = [row["loss"] for row in run.steps[-BLOCK_STEPS:]]
    words = "not finite" if None in losses else f"{statistics.fmean(losses):.3f}"
    return f"{words} at {len(run.steps)}"


def block_means(run: Run) -> list[float]:
    """Mean loss of each BLOCK_STEPS steps; a rest is left out."""
    losses = [math.nan if row["loss"] is None else row["loss"] for row in run.steps]
    return [
        statistics.fmean(losses[begin : begin + BLOCK_STEPS])
        for begin in range(0, len(losses) - BLOCK_STEPS + 1, BLOCK_STEPS)
    ]


def distances(one: Run, other: Run) -> list[float]:
    """Signed differences of two runs' block means."""
    return [a - b for a, b in zip(block_means(one), block_means(other), strict=False)]


def pair_words(one: Run, other: Run) -> str:
    """Seeds and GPUs of two runs: "0 and 1, card", "0 and 0, card and other card"."""
    devices = dict.fromkeys([one.info["device_name"], other.info["device_name"]])
    return f"{seed_of(one)} and {seed_of(other)}, {' and '.join(devices)}"


def parity_table(outputs: Path) -> str:
    """How far FP8's loss lies from bf16's of the same seed, and two seeds of bf16 from each other."""
    runs = [run for run in runs_of(outputs) if run.info["status"] == "ok"]
    lines = []
    but = ("seed", "device_name")
    for _, group in itertools.groupby(runs, key=lambda run: (run.info["model_size"], -warm_up_of(run))):
        own = list(group)
        plain_runs = [run for run in own if run.info["precision"] == "bf16"]
        for one, other in itertools.combinations(plain_runs, 2):
            if facts(one, but) == facts(other, but):
                lines.append([model_words(one), "bf16", pair_words(one, other), distances(one, other)])
        for run in own:
            base = baseline_of(run, own)
            if run.info["precision"] == "fp8" and base is not None:
                words = [model_words(run), plain(precision_words(run)), f"{seed_of(run)}, {run.info['device_name']}"]
                lines.append([*words, distances(run, base)])
    if not lines:
        return not_run("a training in FP8 and its bf16 twin", TRAINING)
    header = ["model", "precision", "seeds, GPU", "steps", "largest distance", "mean distance", "last block, signed"]
    rows = [
        [
            *words,
            str(BLOCK_STEPS * len(found)),
            f"{max(map(abs, found)):.3f}",
            f"{statistics.fmean(map(abs, found)):.3f}",
            f"{found[-1]:+.3f}",
        ]
        for *words, found in lines
        if found
    ]
    return markdown(header, rows)


# --------------------------------------------------------------------------------------------------------------------
# The benchmark
# --------------------------------------------------------------------------------------------------------------------


def cell(row: dict[str, str] | None, *keys: str) -> str:
    """Numbers of a row, or its status."""
    if row is None:
        return "-"
    if row["status"] != "ok":
        return row["status"]
    return " / ".join(shown(float(row[key])) if row[key] else "-" for key in keys)


def widths_table(outputs: Path, question: str, keys: tuple[str, ...]) -> str:
    """One row for each shape and number of tokens, a column for bf16 (all keys but speedup) and each recipe."""

    def keys_of(variant: str) -> list[str]:
        return [key for key in keys if variant != "bf16" or key != "speedup"]

    rows = read_rows(outputs, question)
    if not rows:
        return not_run(f"the benchmark's {question}", f"python fp8_benchmark.py --questions {question}")
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = []
    for facts, group in itertools.groupby(rows, key=lambda r: [r[key] for key in SHAPE_COLUMNS]):
        own = {row["variant"]: row for row in group}
        device, name, tokens, inputs, made, width = facts
        shape = f"{int(inputs):,} to {int(made):,}" if inputs else f"`{name}`, width {int(width):,}"
        cells = [cell(own.get(variant), *keys_of(variant)) for variant in variants]
        lines.append([device, f"{int(tokens):,}", shape, *cells])
    names = {"ms": "ms", "speedup": "times bf16", "kept_gib": "GiB kept", "peak_gib": "peak GiB"}
    heads = [f"{variant}: {' / '.join(names[key] for key in keys_of(variant))}" for variant in variants]
    return markdown(["GPU", "tokens", "layer" if question != "blocks" else "block of", *map(plain, heads)], lines)


def break_even_table(outputs: Path) -> str:
    """From which width on FP8 was faster at every width measured."""
    rows: list[dict[str, Any]] = [
        row | {"width": int(row["width"]), "tokens": int(row["tokens"])} for row in read_rows(outputs)
    ]
    lines = []
    for (device, question), own in itertools.groupby(rows, key=lambda row: (row["device_name"], row["question"])):
        for answer in break_even(own, question):
            shape = SHAPE_WORDS.get(answer["name"], answer["name"])
            lines.append([device, question, shape, f"{answer['tokens']:,}", plain(answer["recipe"]), in_words(answer)])
    if not lines:
        return not_run("the break-even widths", "python fp8_benchmark.py")
    return markdown(["GPU", "what", "shape", "tokens", "recipe", "faster from a width d of"], lines)


FP8_TABLES: dict[str, Callable[[], str]] = {
    "fp8 training": lambda: training_table(ROOT / "outputs"),
    "fp8 parity": lambda: parity_table(ROOT / "outputs"),
    "fp8 products": lambda: widths_table(ROOT / "outputs", "products", ("ms", "speedup")),
    "fp8 layers": lambda: widths_table(ROOT / "outputs", "layers", ("ms", "speedup")),
    "fp8 blocks": lambda: widths_table(ROOT / "outputs", "blocks", ("ms", "speedup", "kept_gib", "peak_gib")),
    "fp8 break-even": lambda: break_even_table(ROOT / "outputs"),
}


@dataclass
class Settings:
    """Settings of `python report_fp8.py`."""

    output_folder: str = setting("outputs", "folder of all results")


def main() -> int:
    """Print every table."""
    outputs = Path(parse_settings(Settings).output_folder)
    if not (outputs / "fp8").is_dir():
        raise SettingsError(f"--output_folder {outputs} has no folder fp8; run {TRAINING}")
    print(training_table(outputs), parity_table(outputs), sep="\n\n")
    for question in QUESTIONS:
        keys = ("ms", "speedup", *(("kept_gib", "peak_gib") if question == "blocks" else ()))
        print("", widths_table(outputs, question, keys), sep="\n")
    print("", break_even_table(outputs), sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
