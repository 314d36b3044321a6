"""Draw the figures of patchtst_train.py from the files in its run folders and from nothing else.

    python plot_patchtst.py outputs/patchtst/RUN              one run: errors by epoch, forecasts, memory of each phase
    python plot_patchtst.py outputs/patchtst/patch_size-ETTm1 an experiment: its comparison

A case that ended with `oom`, `error` or `unsupported` is a cross with its status, never left out. Errors are those of
the standardised channels. plot_patchtst_studies.py holds the figures of experiments. Prints the paths it wrote.
"""

import csv
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figure_parts import BLUE, DPI, GREEN, GREY, ORANGE, RED, WIDTH_INCHES, caption, new_figure, save
from plot import memory_figure
from plot_patchtst_studies import (
    SWEEPS,
    break_even_figure,
    curves_figure,
    horizon_figure,
    mark_removals,
    pruning_figure,
    sweep_figure,
)
from run_results import read_experiment, read_run, read_steps
from utils import SettingsError, run_script

# --------------------------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------------------------


def error_figure(folder: Path) -> Figure:
    """Train and validation MSE against epochs; the best epoch, and the test MSE that was reported."""
    run, epochs = read_run(folder), read_steps(folder / "epochs.jsonl")
    figure, (ax,) = new_figure(f"MSE by epoch: {run.name}", caption([run], [len(epochs)], "epochs"))
    ax.set(xlabel="epoch", ylabel="MSE of the standardised channels")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    marker = "." if len(epochs) <= 30 else None
    for key, label, colour in (("train_mse", "training", BLUE), ("validation_mse", "validation", ORANGE)):
        points = [(row["epoch"], row[key]) for row in epochs if row.get(key) is not None]
        if points:
            ax.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    results = run.info.get("results") or {}
    if results.get("best_epoch"):
        ax.axvline(results["best_epoch"], color=GREEN, linestyle="--", label=f"best epoch: {results['best_epoch']}")
        ax.axhline(
            results["test_mse"], color=RED, linestyle=":", label=f"test, best weights: {results['test_mse']:.4f}"
        )
    mark_removals(ax, epochs, "fewer heads from here on")
    ax.legend(fontsize=10)
    return figure


def forecast_figure(folder: Path) -> Figure:
    """Forecast against truth for each channel (at most eight), from forecast.csv."""
    with (folder / "forecast.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    channels = [name for name in rows[0] if name not in ("date", "row") and f"{name} forecast" in rows[0]]
    run = read_run(folder)
    steps = np.array([int(row["row"]) for row in rows])
    horizon = int(steps.max()) + 1
    shown = steps >= -min(-int(steps.min()), 2 * horizon)
    columns = 2 if len(channels) > 1 else 1
    lines = math.ceil(len(channels) / columns)
    figure = Figure(figsize=(WIDTH_INCHES, 1.5 + 1.75 * lines), dpi=DPI, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True)
    first = rows[int(np.flatnonzero(steps == 0)[0])]["date"].replace("T", " ")
    title = f"Forecast of the window in the middle of test, from {first} on: {run.name}"
    figure.suptitle(f"{title}\n{caption([run], [1], 'window')}", fontsize=10.5, x=0.01, ha="left")
    for ax, name in zip(axes.flat, channels, strict=False):
        truth = np.array([float(row[name]) for row in rows])
        forecast = np.array([float(row[f"{name} forecast"] or "nan") for row in rows])
        ax.plot(steps[shown], truth[shown], color=GREY, linewidth=1.2, label="truth")
        ax.plot(steps, forecast, color=ORANGE, linewidth=1.6, label="forecast")
        ax.axvline(-0.5, color="black", linewidth=0.6)
        ax.set_title(name, fontsize=9.5, loc="left")
        ax.set_xlim(steps[shown].min(), horizon)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    for ax in list(axes.flat)[len(channels) :]:
        ax.set_axis_off()
    for ax in axes[-1]:
        ax.set_xlabel("rows from the beginning of the forecast")
    for ax in axes[:, 0]:
        ax.set_ylabel("standardised")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9.5, frameon=False)
    return figure


def plot_run(folder: Path) -> list[Path]:
    """Write mse_curves.png, memory_per_phase.png and, after an evaluation, forecast.png into the run's folder."""
    folder = Path(folder)
    figures = {"mse_curves.png": error_figure(folder), "memory_per_phase.png": memory_figure(read_run(folder))}
    if (folder / "forecast.csv").is_file():
        figures["forecast.png"] = forecast_figure(folder)
    return [save(figure, folder / name) for name, figure in figures.items()]


def plot_experiment(folder: Path) -> list[Path]:
    """Write the figures of an experiment into its folder and return their paths."""
    name, cases = read_experiment(folder)
    if name in SWEEPS:
        return [save(sweep_figure(name, cases), folder / SWEEPS[name][0])]
    if name == "horizon":
        return [
            save(horizon_figure(cases), folder / "test_mse.png"),
            save(curves_figure(cases), folder / "mse_curves.png"),
        ]
    return [save(pruning_figure(cases), folder / "val_mse_pruning.png")]


def main() -> int:
    """Draw what every folder given on the command line holds."""
    folders = [Path(word) for word in sys.argv[1:]]
    if not folders or any(word.startswith("-") for word in sys.argv[1:]):
        print(__doc__)
        return 0 if set(sys.argv[1:]) & {"-h", "--help"} else 2
    for folder in folders:
        if (folder / "experiment.json").is_file():
            paths = plot_experiment(folder)
        elif (folder / "run.json").is_file():
            if "times" in (read_run(folder).info.get("results") or {}):
                paths = [save(break_even_figure(folder), folder / "break_even.png")]
            else:
                paths = plot_run(folder)
        else:
            raise SettingsError(f"{folder} has neither run.json nor experiment.json, so there is nothing to draw")
        print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
