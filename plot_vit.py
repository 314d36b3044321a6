"""Draw the figures of vit_train.py from the files in its run folders and from nothing else.

    python plot_vit.py outputs/vit/RUN                one run: accuracy and loss, memory, correlation of heads, mosaics
    python plot_vit.py outputs/vit/ablation-cifar10   a study (ablation, tokens, decatt): its comparison

plot_vit_studies.py holds the figures of studies. Prints the paths it wrote.
"""

import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from figure_parts import BLUE, GREEN, GREY, ORANGE, RED, blank_figure, caption, run_figure, save, tidy
from plot import memory_figure
from plot_vit_studies import (
    ablation_accuracy,
    cost_figure,
    curves_figure,
    legend_below,
    study_correlation,
    tokens_accuracy,
    tokens_time,
    weights_figure,
)
from run_results import Run, read_experiment, read_run, read_steps
from utils import SettingsError, run_script
from vit_results import random_heads, seeds_of, sibling_control

LAYERS_A_ROW = 12  # of heat maps
MOSAIC_ARRAYS = ("images", "mosaics", "sizes", "centres", "classes", "min_patch")


# --------------------------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------------------------


def accuracy_figure(folder: Path) -> Figure:
    """Training and validation accuracy and loss against epochs, a line a seed; best epochs, and the test results."""
    run, epochs = read_run(folder), read_steps(folder / "epochs.jsonl")
    if not epochs:
        return run_figure("Accuracy and loss", run, 0, "epochs")[0]
    seeds = list(dict.fromkeys(row["seed"] for row in epochs))
    augmentation = (run.info.get("recipe") or {}).get("augmentation") or {}
    mixed = augmentation.get("mixup_alpha") or augmentation.get("cutmix_alpha")
    soft = mixed or augmentation.get("label_smoothing")
    status = run.info.get("status", "unknown")
    title = f"Accuracy and loss: {run.name}" + ("" if status == "ok" else f" (status: {status})")
    figure = blank_figure(title, caption([run], [len(seeds)], f"seed{'s' * (len(seeds) > 1)}"))
    left, right = (tidy(ax) for ax in figure.subplots(1, 2))
    marker = "." if max(row["epoch"] for row in epochs) <= 30 else None
    results = run.info.get("results") or {}
    best = {row["seed"]: row["best_epoch"] for row in results.get("seeds") or []}
    validated = {row["epoch"] for row in epochs if row.get("validation_accuracy") is not None}
    once = bool(best) and len(validated) == 1  # a point, no line; and nothing to choose a best epoch from
    weights = "last weights" if once else "best weights"
    images = ((run.info.get("dataset") or {}).get("splits") or {}).get("validation")
    if run.info.get("status") == "ok" and len(epochs) != sum(row["epochs"] for row in results.get("seeds") or []):
        raise SettingsError(f"{folder / 'epochs.jsonl'} is damaged: it has {len(epochs)} lines, not one for each epoch")
    words = {
        "accuracy": {"train": "training" + (" (mixed images: of the larger part)" if mixed else "")},
        "loss": {"train": "training" + (" (soft targets)" if soft else "")},
    }
    for ax, key, scale in ((left, "accuracy", 100), (right, "loss", 1)):
        for number, seed in enumerate(seeds):
            own = [row for row in epochs if row["seed"] == seed]
            first = number == 0
            for part, label, colour in (("train", words[key]["train"], BLUE), ("validation", "validation", ORANGE)):
                if once and part == "validation":
                    continue
                points = [
                    (row["epoch"], scale * row[f"{part}_{key}"]) for row in own if row.get(f"{part}_{key}") is not None
                ]
                if points:
                    style = {
                        "color": colour,
                        "marker": marker,
                        "linewidth": 1.3,
                        "alpha": 1 if len(seeds) == 1 else 0.7,
                    }
                    ax.plot(*zip(*points, strict=True), label=label if first else None, **style)
            chosen = [row for row in own if row["epoch"] == best.get(seed)]
            if chosen and chosen[0].get(f"validation_{key}") is not None:
                label = "best epoch: " + ", ".join(map(str, best.values()))
                if once:
                    label = f"validation{f' ({images:,} images)' if images else ''}, epoch {min(validated)}"
                ax.plot(chosen[0]["epoch"], scale * chosen[0][f"validation_{key}"], "v", color=GREEN, markersize=8,
                        zorder=4, label=label if first else None)  # fmt: skip
        values = seeds_of(results, f"test_{key}")
        if values:
            mean = scale * float(np.mean(values))
            label = f"test, {weights}: {mean:.2f} %" if key == "accuracy" else f"test, {weights}: {mean:.3f}"
            label += f" (mean of {len(values)} seeds)" if len(values) > 1 else ""
            ax.axhline(mean, color=RED, linestyle="--", linewidth=1.6, label=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set_xlabel("epoch")
        ax.legend(fontsize=9)
    left.set_ylabel("accuracy (%)")
    right.set_ylabel("cross-entropy (nats)")
    return figure


def mean_matrices(results: dict[str, Any], key: str) -> np.ndarray | None:
    """(layers, heads, heads): the mean |C| of each pair, mean of the seeds; None if it was not measured."""
    found = [row[key]["matrices"] for row in results.get("seeds") or [] if row.get(key)]
    return np.mean(np.array(found), axis=0) if found else None


def correlation_figure(run: Run) -> Figure | None:
    """|C| of each pair of heads in each layer at the start and after training, and their mean; None for one head."""
    results = run.info.get("results") or {}
    stages = (("at the start", "head_correlation_at_start", GREY), ("after training", "head_correlation", BLUE))
    matrices = {key: mean_matrices(results, key) for _, key, _ in stages}
    if any(matrix is None for matrix in matrices.values()):
        return None
    layers, heads, _ = matrices["head_correlation"].shape
    lines = math.ceil(layers / LAYERS_A_ROW)
    columns = min(layers, LAYERS_A_ROW)
    for matrix in matrices.values():
        matrix[:, range(heads), range(heads)] = np.nan  # a head with itself is 1
    highest = max(0.05, math.ceil(20 * max(np.nanmax(matrix) for matrix in matrices.values())) / 20)
    seeds = len(results["seeds"])
    weight = run.info.get("decatt_weight") or 0
    title = f"Correlation |C| of heads' outputs ({f'DeCAtt, weight {weight:g}' if weight else 'without DeCAtt'}, "
    title += "white: a head with itself)"
    maps_height = 2 * lines * (min(1.3, 9 / columns) + 0.35)
    figure = blank_figure(
        f"{title}: {run.name}", caption([run], [seeds], "seeds (mean)" if seeds > 1 else "seed"), maps_height + 4.2
    )
    grid = figure.add_gridspec(2, 1, height_ratios=[maps_height, 3.2])
    maps = grid[0].subgridspec(2 * lines, columns)
    axes, image = [], None
    for stage, (words, key, _) in enumerate(stages):
        for layer in range(layers):
            line, column = divmod(layer, LAYERS_A_ROW)
            ax = figure.add_subplot(maps[stage * lines + line, column])
            image = ax.imshow(matrices[key][layer], vmin=0, vmax=highest, cmap="viridis")
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"layer {layer + 1}", fontsize=8, pad=3)
            if column == 0:
                ax.set_ylabel(f"{words}\nhead 1 to {heads}", fontsize=8)
            axes.append(ax)
    figure.colorbar(image, ax=axes, label="mean |C| of a pair of heads", shrink=0.9, pad=0.01)
    below = tidy(figure.add_subplot(grid[1]))
    numbers = range(1, layers + 1)
    for words, key, colour in stages:
        values = np.array([row[key]["magnitudes"] for row in results["seeds"] if row.get(key)])
        below.plot(
            numbers, values.mean(axis=0), "o-", color=colour, label=f"{words} (mean over layers {values.mean():.3f})"
        )
        if len(values) > 1:
            below.plot(numbers, values.T, ".", color=colour, alpha=0.5, markersize=4)
    level = random_heads(run.info)
    if level is not None:
        expected = math.sqrt(2 * level / math.pi)
        below.axhline(expected, color="black", linestyle=":", label=f"random heads: {expected:.3f}")
    below.set(xlabel="layer", ylabel="mean |C| over pairs")
    below.set_ylim(bottom=0)
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_below(figure, [below])
    return figure


def mosaic_figure(folder: Path) -> Figure:
    """Test images above; below each what its tokens show, with their borders."""
    run = read_run(folder)
    try:
        with np.load(folder / "mosaics.npz") as file:
            found = {name: file[name] for name in MOSAIC_ARRAYS}
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile):
        raise SettingsError(
            f"{folder / 'mosaics.npz'} is damaged: it does not hold {', '.join(MOSAIC_ARRAYS)}"
        ) from None
    count, tokens = found["sizes"].shape
    kind = run.info.get("tokens") or {}
    unit = int(found["min_patch"])
    sizes = ", ".join(str(size) for size in sorted(set(found["sizes"].ravel().tolist())))
    side = found["images"].shape[-1]
    title = f"{tokens} tokens of {sizes} pixels in images of {side} x {side}, scorer {kind.get('scorer') or '?'}"
    title += f": {run.name}"
    figure = blank_figure(title, caption([run], [count], "test images"), 3.6)
    axes = figure.subplots(2, count, squeeze=False)
    outline = [withStroke(linewidth=1.4, foreground="black")]  # white lines are seen on pale images, too
    for place in range(count):
        for ax, name in zip(axes[:, place], ("images", "mosaics"), strict=True):
            ax.imshow(found[name][place].transpose(1, 2, 0), interpolation="nearest", extent=(0, side, side, 0))
            ax.set(xticks=[], yticks=[])
        axes[0, place].set_title(str(found["classes"][place]), fontsize=9)
        for size, centre in zip(found["sizes"][place], found["centres"][place], strict=True):
            corner = centre * unit - size / 2
            axes[1, place].add_patch(
                Rectangle(corner, size, size, fill=False, edgecolor="white", linewidth=0.6, path_effects=outline)
            )
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel("what the tokens show", fontsize=9)
    return figure


def plot_run(folder: Path) -> list[Path]:
    """Write accuracy_curves.png, memory_per_phase.png, head_correlation.png and mosaics.png into the run's folder.

    The last two need two heads and mixed tokens.

    Raises:
        RunFolderError: a file is missing or damaged.
        SettingsError: the folder of something else, or lines of epochs.jsonl are missing.
    """
    folder = Path(folder)
    run = read_run(folder)
    results = run.info.get("results") or {}
    if "rows" in results or (run.info.get("status") == "ok" and not results.get("seeds")):
        raise SettingsError(f"{folder} holds no training of vit_train.py; report_vit.py prints benchmarks")
    figures = {"accuracy_curves.png": accuracy_figure(folder), "memory_per_phase.png": memory_figure(run)}
    correlation = correlation_figure(run)
    if correlation is not None:
        figures["head_correlation.png"] = correlation
    if (folder / "mosaics.npz").is_file():
        figures["mosaics.png"] = mosaic_figure(folder)
    return [save(figure, folder / name) for name, figure in figures.items()]


# --------------------------------------------------------------------------------------------------------------------


def plot_study(folder: Path) -> list[Path]:
    """Write the figures of a study into its folder and return their paths.

    Raises:
        SettingsError: no study, or a damaged one.
    """
    folder = Path(folder)
    name, cases = read_experiment(folder)
    if name == "ablation":
        figures = {"accuracy.png": ablation_accuracy(cases), "curves.png": curves_figure(cases)}
        figures |= {"time.png": cost_figure(cases), "head_correlation.png": study_correlation(cases)}
    elif name == "tokens":
        figures = {"accuracy.png": tokens_accuracy(cases), "time.png": tokens_time(cases)}
    elif name == "decatt":
        figures = {"weights.png": weights_figure(cases, sibling_control(folder))}
        figures |= {"head_correlation.png": study_correlation(cases)}
    else:
        raise SettingsError(f"{folder} holds the experiment {name!r}, which is no study of vit_train.py")
    return [save(figure, folder / file) for file, figure in figures.items()]


def main() -> int:
    """Draw what every folder given on the command line holds."""
    words = sys.argv[1:]
    if not words or any(word.startswith("-") for word in words):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(words) else 2
    for folder in map(Path, words):
        paths = plot_study(folder) if (folder / "experiment.json").is_file() else plot_run(folder)
        print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
