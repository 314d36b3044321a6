"""The tables of the ViT, made from the run folders of vit_train.py, its studies and vit_benchmark.py.

    python report_vit.py                              prints every table of outputs/vit
    python report_vit.py --output_folder mine         those of your own runs

report.py puts them into the README. An accuracy is the mean of the seeds with the smallest and the largest. A
difference counts only where those ranges do not overlap and where it is larger than what seeds alone do in one
comparison of twenty, by the spread of all cases of the study together: the ranges of three seeds miss each other by
chance too often. What has not been run is one line that says so.
"""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_text import ROOT, markdown, not_run, percent, place, plain, read_json, shown
from run_results import Case, read_experiment
from utils import SettingsError, parse_settings, run_script, setting
from vit_results import (
    CONTROL,
    COURSE,
    seed_noise,
    seeds_of,
    seen_by_chance,
    sibling_control,
    steady_minutes,
    student,
)

DATA_PATHS = {"cifar10": "--data_path cifar10.npz", "cifar100": "--download true"}
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
CASES = {  # of the ablation, in the order of the course project's table
    "large": "baseline of the course project: twice as wide",
    "small": "control: none of the three",
    "decatt": "DeCAtt",
    "mixed": "mixed-resolution tokens",
    "flash": "flash attention",
    "mixed+flash": "mixed-resolution tokens, flash attention",
    "decatt+flash": "DeCAtt, flash attention",
    "decatt+mixed": "DeCAtt, mixed-resolution tokens",
    "decatt+mixed+flash": "all three",
    "centres": "control of mixed: a regular grid with its positions",
}
TECHNIQUES = {"decatt": "DeCAtt", "mixed": "mixed-resolution tokens", "flash": "flash attention"}
GOALS = (  # what the long run is held against: model, parameters, epochs, minutes, accuracy
    ("course project's baseline, best epoch on the test set", "11,965,642", "50", "31", "78.4 %"),
    (
        "ViT-Lite-7/4, Hassani et al. 2021, first release of their code (later versions of the paper report more)",
        "3.717 M",
        "200",
        "-",
        "91.38 %",
    ),
)


def study_command(study: str, data: str) -> str:
    return f"python vit_train.py --experiment {study} --dataset {data} {DATA_PATHS[data]}"


def spread(results: dict[str, Any], key: str = "test_accuracy") -> str:
    """Mean of the seeds in % with the smallest and the largest; a single seed says so."""
    values = seeds_of(results, key)
    if not values:
        return "-"
    words = f"{100 * min(values):.2f}-{100 * max(values):.2f}" if len(values) > 1 else "one seed"
    return f"{100 * sum(values) / len(values):.2f} % ({words})"


def difference(own: dict[str, Any], control: dict[str, Any] | None, noise: tuple[float, int]) -> str:
    """Points of test accuracy above the control; no difference where ranges overlap or noise does as much."""
    mine, theirs = seeds_of(own, "test_accuracy"), seeds_of(control or {}, "test_accuracy")
    if not mine or not theirs:
        return "-"
    points = 100 * (statistics.fmean(mine) - statistics.fmean(theirs))
    if min(len(mine), len(theirs)) < 2:
        return f"{points:+.2f} (one seed)"
    overlap = min(mine) <= max(theirs) and min(theirs) <= max(mine)
    chance = abs(points) <= 100 * seen_by_chance(noise, len(mine), len(theirs))
    return f"no difference ({points:+.2f})" if overlap or chance else f"{points:+.2f}"


def minutes(results: dict[str, Any]) -> str:
    """Mean minutes of training of a seed without its first step / of the first seed with it, which compiles."""
    steady, seeds = steady_minutes(results), seeds_of(results, "training_minutes")
    return f"{sum(steady) / len(steady):.2f} / {seeds[0]:.2f}" if steady else "-"


def with_everything(case: Case) -> float | None:
    """Images/s with augmenting and cutting tokens, from the medians of the three parts."""
    parts = [case.results.get(f"{name}_ms_median") for name in ("step", "augment", "tokenise")]
    return None if None in parts else 1000 * case.info["batch_size"] / sum(parts)


def rate(case: Case) -> str:
    """Images/s of the step alone / with augmenting and cutting tokens."""
    return " / ".join(
        "-" if value is None else f"{value:,.0f}" for value in (case.results.get("images_per_s"), with_everything(case))
    )


def times_of_seeds(results: dict[str, Any], key: str) -> str:
    """Mean of the seeds with the smallest and the largest."""
    values = seeds_of(results, key)
    words = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
    return shown(results.get(key)) + words


def scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


# --------------------------------------------------------------------------------------------------------------------
# The studies
# --------------------------------------------------------------------------------------------------------------------


def ablation_table(outputs: Path, data: str) -> str:
    """Every combination of the three techniques beside the control and what the course project had measured."""
    folder = outputs / "vit" / f"ablation-{data}"
    there = (folder / "experiment.json").is_file()
    if not there and data != "cifar100":
        return not_run("the ablation", study_command("ablation", data))
    cases = {case.name: case for case in read_experiment(folder)[1]} if there else {}
    control = cases[CONTROL].results if CONTROL in cases and cases[CONTROL].ok else None
    noise = seed_noise([case.results for case in cases.values() if case.ok])
    course = COURSE[data]
    header = ["case", "model", "parameters", "training, minutes: a seed / the first, which compiles"]
    header += ["best validation accuracy", "test accuracy (seeds)"]
    header += ["against the control, points", "images/s of a step / with augmenting and tokens", "peak, GiB"]
    header += ["mean C^2", f"course project: {TITLES[data]}", "its minutes"]
    lines = []
    for name in [*CASES, *(name for name in cases if name not in CASES)]:
        case = cases.get(name)
        line = [plain(name), CASES.get(name) or case.words]
        if case is None:
            reason = "not in the study" if there else "not run: the data could not be had"
            line += [reason, *["-"] * 7]
        elif not case.ok:
            line += [case.status, *["-"] * 7]
        else:
            results = case.results
            line += [
                f"{results['parameters']:,}",
                minutes(results),
                percent(results["validation_accuracy"], 2),
                spread(results),
                "-" if name == CONTROL else difference(results, control, noise),
                rate(case),
                shown(results["peak_allocated_gib"]),
                scientific(results["head_correlation_squares"]),
            ]
        if name in course:
            accuracy, seconds, epochs = course[name]
            words = "" if epochs == 50 else f" ({epochs} of 50 epochs)"
            line += [f"{accuracy:.2f} %{words}", f"{seconds * epochs / 60:.1f}"]
        else:
            line += ["not trained", "-"]
        lines.append(line)
    table = markdown(header, lines)
    return table if there else f"{table}\n\n{not_run('the ablation', study_command('ablation', data))}"


def pairs_of(technique: str) -> list[tuple[str, str]]:
    """Names of the four pairs of the ablation's cases that differ by a technique alone: (with it, without it)."""
    others = [name for name in TECHNIQUES if name != technique]
    groups = [group for count in range(len(others) + 1) for group in itertools.combinations(others, count)]

    def case(parts: tuple[str, ...]) -> str:
        return "+".join(name for name in TECHNIQUES if name in parts) or CONTROL

    return [(case((*group, technique)), case(group)) for group in groups]


def effect(found: dict[str, dict[str, Any]], technique: str, key: str) -> tuple[float, float]:
    """What a technique changes on the mean of the four pairs of cases that differ by it alone, and its 95 % interval.

    Args:
        found: results of all eight combinations by name.
        technique: of TECHNIQUES.
        key: an accuracy that every seed has.

    Returns:
        (difference, half of the interval's width), by the spread of the seeds within the eight cases.
    """
    pairs, values = pairs_of(technique), {name: seeds_of(results, key) for name, results in found.items()}
    points = [statistics.fmean(values[own]) - statistics.fmean(values[other]) for own, other in pairs]
    deviation, freedom = seed_noise(list(found.values()), key)
    error = math.sqrt(sum(1 / len(seeds) for seeds in values.values())) / len(pairs)
    return statistics.fmean(points), student(freedom) * deviation * error


def effects_table(outputs: Path, data: str) -> str:
    """Each technique over all eight combinations: with it against without it."""
    folder = outputs / "vit" / f"ablation-{data}"
    cases = read_experiment(folder)[1] if (folder / "experiment.json").is_file() else []
    names = {name for pair in pairs_of("flash") for name in pair}
    found = {case.name: case.results for case in cases if case.ok and case.name in names}
    if len(found) < len(names) or any(len(seeds_of(results, "test_accuracy")) < 2 for results in found.values()):
        return not_run("all eight combinations with several seeds", study_command("ablation", data))
    lines = []
    for technique, words in TECHNIQUES.items():
        line = [words]
        for key in ("test_accuracy", "validation_accuracy"):
            line.append("{:+.2f} (+/- {:.2f})".format(*(100 * value for value in effect(found, technique, key))))
        for key in ("images_per_s", "peak_allocated_gib"):
            ratios = [found[own][key] / found[other][key] for own, other in pairs_of(technique)]
            line.append(f"{min(ratios):.2f}-{max(ratios):.2f}")
        lines.append(line)
    header = ["technique", "test accuracy, points (95 %)", "best validation accuracy, points (95 %)"]
    return markdown([*header, "images/s of a step, times", "peak, times"], lines)


def tokens_table(outputs: Path, data: str = "cifar10") -> str:
    """Regular grids and mixed tokens by number: accuracy, time of the step and of cutting, work of an image."""
    folder = outputs / "vit" / f"tokens-{data}"
    if not (folder / "experiment.json").is_file():
        return not_run("the study of tokens", study_command("tokens", data))
    header = ["case", "kind", "tokens", "best validation accuracy", "test accuracy (seeds)", "step, ms (seeds)"]
    header += ["cutting tokens, ms"]
    header += ["share of augmenting, cutting and step"]
    header += ["images/s of a step / with augmenting and tokens", "GFLOP an image"]
    lines = []
    for case in read_experiment(folder)[1]:
        if not case.ok:
            lines.append([plain(case.name), case.words, "-", case.status, *["-"] * 6])
            continue
        results = case.results
        cut, everything = results.get("tokenise_ms_median"), with_everything(case)
        part = None if None in (cut, everything) else cut * everything / 1000 / case.info["batch_size"]
        flops = results["seeds"][0].get("flops_per_image")
        lines.append(
            [
                plain(case.name),
                case.words,
                str(case.info["model"]["num_tokens"]),
                percent(results["validation_accuracy"], 2),
                spread(results),
                times_of_seeds(results, "step_ms_median"),
                shown(cut),
                "-" if part is None else f"{100 * part:.1f} %",
                rate(case),
                "-" if flops is None else f"{flops / 1e9:.3f}",
            ]
        )
    return markdown(header, lines)


def decatt_table(outputs: Path, data: str = "cifar10") -> str:
    """DeCAtt's weights and layers: accuracy, correlation before and after training, accuracy with a head less."""
    folder = outputs / "vit" / f"decatt-{data}"
    if not (folder / "experiment.json").is_file():
        return not_run("the weights of DeCAtt", study_command("decatt", data))
    control = sibling_control(folder)
    cases = ([] if control is None else [control]) + read_experiment(folder)[1]
    noise = seed_noise([case.results for case in cases if case.ok])
    header = ["weight", "layers", "test accuracy (seeds)", "against weight 0, points"]
    header += ["mean C^2: start, after training", "mean \\|C\\|: start, after training"]
    header += ["without each layer's most redundant head", "without a random head of each layer"]
    lines = []
    for case in cases:
        if not case.ok:
            lines.append([plain(case.name), "-", case.status, *["-"] * 5])
            continue
        results, layers = case.results, case.info["model"]["decorrelated_layers"]
        of_all = f"{layers} of {case.info['model']['num_layers']}" if layers else f"none (ablation, {case.name})"
        pairs = [
            ", ".join(
                style(results.get(f"{stage}_{key}")) for stage in ("head_correlation_at_start", "head_correlation")
            )
            for key, style in (("squares", scientific), ("magnitudes", shown))
        ]
        lines.append(
            [
                f"{case.info.get('decatt_weight') or 0:g}",
                of_all,
                spread(results),
                "-" if case is control else difference(results, None if control is None else control.results, noise),
                *pairs,
                spread(results, "test_accuracy_without_a_redundant_head"),
                spread(results, "test_accuracy_without_a_random_head"),
            ]
        )
    return markdown(header, lines)


# --------------------------------------------------------------------------------------------------------------------
# The long run, and a step beside another library's
# --------------------------------------------------------------------------------------------------------------------


def recipe_words(info: dict[str, Any]) -> str:
    """What long runs differ in: augmentation, mixing of images and regularisation; zeros are left out."""
    recipe, model = info.get("recipe") or {}, info.get("model") or {}
    augmentation = recipe.get("augmentation") or {}
    values = {"RandAugment": augmentation.get("operations"), "mixup": augmentation.get("mixup_alpha")}
    values |= {"cutmix": augmentation.get("cutmix_alpha"), "weight decay": recipe.get("weight_decay")}
    values |= {"drop path": model.get("drop_path")}
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if value) or "-"


def split_sizes(info: dict[str, Any]) -> str:
    """Images that train / that validate."""
    sizes = (info.get("dataset") or {}).get("splits") or {}
    return f"{sizes['train']:,} / {sizes['validation']:,}" if sizes else "-"


def goal_table(outputs: Path) -> str:
    """The long runs (outputs/vit/best and best-*) beside the accuracies that they are held against."""
    command = "python vit_train.py --dataset cifar10 --data_path cifar10.npz --run_name best"
    header = ["model", "recipe", "images: training / validation", "parameters", "epochs"]
    header += ["training, minutes: without / with the first step, which compiles", "with validation"]
    header += ["validation accuracy (seeds)", "test accuracy (seeds)"]
    lines = []
    for path in sorted((outputs / "vit").glob("best*/run.json")):
        info = read_json(path)
        name = f"`{path.parent.name}`, {info['device_name']}" if info.get("device_name") else f"`{path.parent.name}`"
        results = info.get("results") or {}
        if info.get("status") != "ok" or not results.get("seeds"):
            lines.append([name, info.get("status", "no status"), *["-"] * 7])
            continue
        own = results["seeds"]
        lines.append(
            [
                name,
                recipe_words(info),
                split_sizes(info),
                f"{results['parameters']:,}",
                ", ".join(str(epochs) for epochs in sorted({row["epochs"] for row in own})),
                minutes(results),
                f"{results['total_minutes']:.2f}",
                spread(results, "validation_accuracy"),
                spread(results),
            ]
        )
    missing = [] if lines else [not_run("the long training", command)]
    for name, parameters, epochs, took, accuracy in GOALS:
        lines.append([name, "-", "-", parameters, epochs, took, "-", "-", accuracy])
    return "\n\n".join([markdown(header, lines), *missing])


def peer_table(outputs: Path) -> str:
    """Time and memory of a training step of each model, against the one that its row is held against."""
    path = outputs / "vit" / "peer" / "run.json"
    results = (read_json(path).get("results") or {}) if path.is_file() else {}
    if not results.get("rows"):
        return not_run("the step of another library's model", "python vit_benchmark.py --questions peer")
    times = {row["variant"]: row["ms"] for row in results["rows"] if row["status"] == "ok"}
    lines = []
    for row in results["rows"]:
        name, base = row["variant"], row["baseline"]
        line = [plain(name), plain(base or "-")]
        if row["status"] != "ok":
            lines.append([*line, row["status"], *["-"] * 5, plain(row["note"] or "")])
            continue
        own = [ms for ms in row.get("ms_of_rounds") or [] if ms is not None]
        exact = row["exactness"] or "-"
        span = f" ({min(own):.2f}-{max(own):.2f})" if own else ""
        line += [f"{row['ms']:.2f}{span}", f"{row['ms'] / times[base]:.2f}" if base in times else "-"]
        rate = row.get("images_per_s")
        line += ["-" if rate is None else f"{rate:,.0f}", shown(row["peak_gib"]), row.get("residual_stream") or "-"]
        line += [exact + ("" if row["error"] is None else f" ({row['error']:.1e})")]
        lines.append([*line, plain(row["note"] or "")])
    header = [
        "model, attention",
        "against",
        "step, ms (all rounds)",
        "times that",
        "images/s",
        "peak, GiB",
        "residual stream",
        "result (error)",
        "note",
    ]
    return markdown(header, lines)


# --------------------------------------------------------------------------------------------------------------------


def vit_tables(outputs: Path) -> dict[str, Callable[[], str]]:
    """Name -> table."""
    return {
        "vit ablation": lambda: ablation_table(outputs, "cifar10"),
        "vit effects": lambda: effects_table(outputs, "cifar10"),
        "vit cifar100": lambda: ablation_table(outputs, "cifar100"),
        "vit tokens": lambda: tokens_table(outputs),
        "vit decatt": lambda: decatt_table(outputs),
        "vit goal": lambda: goal_table(outputs),
        "vit peer": lambda: peer_table(outputs),
    }


VIT_TABLES = vit_tables(ROOT / "outputs")


@dataclass
class Settings:
    """Settings of `python report_vit.py`."""

    output_folder: str = setting("outputs", "where the folders of runs and studies lie")


def main() -> int:
    """Print every table."""
    outputs = Path(parse_settings(Settings).output_folder)
    if not (outputs / "vit").is_dir():
        raise SettingsError(f"{place(outputs / 'vit')} is missing; run vit_train.py")
    for name, table in vit_tables(outputs).items():
        print(f"{name}\n\n{table()}\n")
    return 0


if __name__ == "__main__":
    run_script(main)
