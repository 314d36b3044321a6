"""Draw the figures of one training run, or compare several, from the files in their run folders and from nothing else.

A run that ended with `oom`, `error` or `unsupported` is a result: it is a cross with its status, never left out.
Memory is in GiB (2^30 bytes). Every figure names device, precision, batch size, context length, data set and n.

    python plot.py outputs/llm/fp16-batch-125               # that run: loss_curve.png, memory_per_phase.png, ...
    python plot.py outputs/llm/RUN_A outputs/llm/RUN_B --output_folder outputs/llm     # compare these two
    python plot.py outputs/llm                              # compare every run folder inside, in name order
    python plot.py --config plot_configs/flash_attention.yaml                          # what that file says

Prints the paths it wrote; a missing or broken run folder or file is one sentence on standard error and exit status 2.
figure_parts.py holds what figures share, plot_config.py the figures that a YAML file describes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from figure_parts import (
    BLUE,
    GREEN,
    GREY,
    HEIGHT_INCHES,
    ORANGE,
    RED,
    caption,
    draw_bars,
    new_figure,
    result,
    run_figure,
    save,
    setting,
    short,
)
from plot_config import plot_config
from run_results import Run, RunFolderError, find_runs, read_run
from utils import SettingsError

SMOOTH_FROM_STEPS = 60  # shorter training runs get no smoothed line

# The comparison of several runs: file -> title, (key, unit) of n, panels of (x axis label, keys of run.json's results).
COMPARISONS = {
    "time_execution.png": (
        "Execution time",
        ("timed_steps", "timed steps"),
        [
            ("time per training step (ms)\nmedian; black line: 20th to 80th percentile", ["step_ms_median"]),
            ("training time (minutes)", ["training_minutes"]),
        ],
    ),
    "test_loss.png": ("Test loss", ("test_tokens", "test tokens"), [("test loss (nats per token)", ["test_loss"])]),
    "test_perplexity.png": (
        "Test perplexity",
        ("test_tokens", "test tokens"),
        [("test perplexity: exp(loss in nats per token)", ["test_perplexity"])],
    ),
    "peak_memory.png": (
        "Peak memory",
        ("tracked_steps", "tracked steps"),
        [("peak memory (GiB)", ["peak_allocated_gib", "peak_reserved_gib"])],
    ),
}


# ------------------------------------------------------------------------------------------ figures of one run


def loss_figure(run: Run) -> Figure:
    """Training loss against tokens seen, from steps.jsonl; the test loss of run.json as a dashed line."""
    figure, ax = run_figure("Training loss", run, len(run.steps), "steps")
    by_tokens = all("tokens" in row for row in run.steps)
    ax.set_xlabel("training tokens seen" if by_tokens else "training step")
    ax.set_ylabel("loss (nats per token)" if by_tokens else "loss")
    if not run.steps:
        return figure
    x = np.array([row["tokens"] if by_tokens else row.get("step", i) for i, row in enumerate(run.steps)], dtype=float)
    loss = np.array([row.get("loss") for row in run.steps], dtype=float)  # None becomes nan, a gap in the line
    smooth = len(loss) >= SMOOTH_FROM_STEPS
    alpha, marker = (0.35 if smooth else 1.0), ("." if len(loss) <= 30 else None)
    ax.plot(x, loss, color=BLUE, alpha=alpha, marker=marker, linewidth=1.2, label="training loss of each step")
    if smooth:
        half = len(loss) // 60 + 1
        window = 2 * half + 1  # odd, so that the mean belongs to the middle step
        mean = np.convolve(loss, np.ones(window) / window, mode="valid")
        ax.plot(x[half:-half], mean, color=BLUE, linewidth=2.2, label=f"mean of {window} steps")
    test_loss = result(run, "test_loss")
    if test_loss is not None:
        ax.axhline(test_loss, color=RED, linestyle="--", linewidth=1.6, label=f"test loss {test_loss:.3f}")
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.legend(loc="upper right", fontsize=10)
    return figure


def memory_figure(run: Run) -> Figure:
    """Start and peak allocated GiB of each phase, the maximum over the measured steps of memory.csv."""
    count = len({row.get("step") for row in run.memory if row["phase"] == "training_step"})
    figure, ax = run_figure("Memory per phase", run, count or len(run.memory), "tracked steps (maximum)")
    ax.set(xlabel="phase of a training step", ylabel="memory (GiB)")
    if not run.memory:
        return figure
    phases = list(dict.fromkeys(row["phase"] for row in run.memory))

    def largest(phase: str, column: str) -> float:
        values = [row.get(column) for row in run.memory if row["phase"] == phase]
        return max((value for value in values if value is not None), default=0.0)

    starts = [largest(phase, "start_allocated_gib") for phase in phases]
    peaks = [largest(phase, "peak_allocated_gib") for phase in phases]
    reserved = max(largest(phase, "peak_reserved_gib") for phase in phases)
    positions = np.arange(len(phases))
    start_bars = ax.bar(positions - 0.2, starts, width=0.38, color=GREY, label="allocated at the phase's start")
    peak_bars = ax.bar(positions + 0.2, peaks, width=0.38, color=BLUE, label="allocated at its peak")
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # keeps a label readable on the reserved line
    for bars in (start_bars, peak_bars):
        ax.bar_label(bars, [short(value) for value in bars.datavalues], fontsize=9, padding=3, bbox=white, zorder=4)
    if reserved > 0:
        ax.axhline(reserved, color=ORANGE, linewidth=1.8, linestyle="--", label=f"reserved peak {short(reserved)} GiB")
    ax.set_xticks(positions, [phase.replace("_", " ") for phase in phases], fontsize=10)
    # training_step spans the others, so it is never the answer to "which phase is the peak"
    inner = [phase for phase in phases if phase != "training_step"] or phases
    peak_phase = result(run, "peak_phase")
    if peak_phase not in inner:
        peak_phase = max(inner, key=lambda phase: peaks[phases.index(phase)])
    peak_bars[phases.index(peak_phase)].set(edgecolor=RED, linewidth=2.2, hatch="//")
    ax.get_xticklabels()[phases.index(peak_phase)].set(color=RED, fontweight="bold")
    ax.set_ylim(0, 1.12 * max(reserved, *peaks, *starts, 1e-6))
    ax.grid(visible=False, axis="x")
    hatched = Patch(facecolor=BLUE, edgecolor=RED, hatch="//", label=f"peak phase: {peak_phase.replace('_', ' ')}")
    handles = [*ax.get_legend_handles_labels()[0], hatched]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9.5, frameon=False)
    return figure


def search_figure(run: Run) -> Figure:
    """Peak GiB of each probe of batch_size_search.csv; one that failed is a cross at the memory budget or the top."""
    figure, ax = run_figure("Batch size search", run, len(run.probes), "probes")
    ran = [row for row in run.probes if row["status"] == "ok"]
    known = []
    for column, style in [
        ("peak_allocated_gib", {"marker": "o", "color": BLUE}),
        ("peak_reserved_gib", {"marker": "s", "facecolors": "none", "edgecolors": ORANGE}),
    ]:
        points = [(row["batch_size"], row[column]) for row in ran if row.get(column) is not None]
        if points:
            label = f"ok: {column.removesuffix('_gib').replace('_', ' ')}"
            ax.scatter(*zip(*points, strict=True), s=42, linewidths=1.5, label=label, zorder=3, **style)
        known += [value for _, value in points]
    budget = setting(run, "memory_budget_gib")
    top = float(budget or 1.08 * max(known, default=1.0))
    if budget:
        ax.axhline(top, color=GREY, linestyle=":", linewidth=1.8, label=f"memory budget {short(top)} GiB")
    for status in dict.fromkeys(row["status"] for row in run.probes if row["status"] != "ok"):
        sizes = [row["batch_size"] for row in run.probes if row["status"] == status]
        style = {"marker": "x", "color": RED} if status == "oom" else {"marker": "P", "color": "black"}
        label = f"{status} (drawn at the {'budget' if budget else 'top'})"
        ax.scatter(sizes, [top] * len(sizes), s=80, linewidths=2, label=label, zorder=4, **style)
    chosen = setting(run, "batch_size")
    if chosen in [row["batch_size"] for row in ran]:
        ax.axvline(chosen, color=GREEN, linewidth=1.6, linestyle="--", label=f"chosen: {chosen:g}", zorder=1)
    ax.set(xlabel="batch size (samples)", ylabel="peak memory (GiB)", ylim=(0, 1.1 * max([top, *known])))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    columns = 3 if len(ax.get_legend_handles_labels()[0]) > 4 else 4
    figure.legend(loc="outside lower center", ncols=columns, fontsize=9.5, frameon=False)
    return figure


def plot_run(folder: Path) -> list[Path]:
    """Write loss_curve.png, memory_per_phase.png and, after a search, batch_size_search.png into the run's own folder.

    Returns the paths written. Raises RunFolderError if the folder cannot be read.
    """
    run = read_run(folder)
    figures = {"loss_curve.png": loss_figure(run), "memory_per_phase.png": memory_figure(run)}
    if run.probes:
        figures["batch_size_search.png"] = search_figure(run)
    return [save(figure, run.folder / name) for name, figure in figures.items()]


# --------------------------------------------------------------------------------------- figures of several runs


def comparison_figure(runs: Sequence[Run], file_name: str) -> Figure:
    """The figure of COMPARISONS with that file name: one row a run in the order given."""
    title, (count_key, unit), panels = COMPARISONS[file_name]
    subtitle = caption(runs, [result(run, count_key) for run in runs], unit)
    figure, axes = new_figure(title, subtitle, len(panels), max(HEIGHT_INCHES, 1.6 + 0.42 * len(runs)))
    for ax, (label, keys) in zip(axes, panels, strict=True):
        draw_bars(ax, runs, keys)
        ax.set_xlabel(label)
        if len(keys) > 1:
            names = [key.removesuffix("_gib").replace("_", " ") for key in keys]
            handles = [Patch(color=color, label=name) for color, name in zip((BLUE, ORANGE), names, strict=True)]
            figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9.5, frameon=False)
    return figure


def plot_runs(folders: list[Path], output_folder: Path) -> list[Path]:
    """Write time_execution.png, test_loss.png, test_perplexity.png and peak_memory.png; returns the paths written.

    Raises RunFolderError if a folder cannot be read; nothing is drawn then.
    """
    runs = [read_run(folder) for folder in folders]
    return [save(comparison_figure(runs, name), Path(output_folder) / name) for name in COMPARISONS]


def plot_folders(folders: list[Path], output_folder: Path | None) -> list[Path]:
    """The figures of the one run that is named, or the comparison of all runs in these folders; the paths written."""
    runs = [run for folder in folders for run in find_runs(folder)]
    if len(runs) == 1 and runs == folders and output_folder is None:
        return plot_run(runs[0])
    if output_folder is None and len({run.resolve().parent for run in runs}) > 1:
        raise RunFolderError("the runs lie in different folders; say where to draw with --output_folder")
    return plot_runs(runs, output_folder or runs[0].parent)


# --------------------------------------------------------------------------- text lengths, command line


def text_lengths_figure(token_counts: Sequence[int], title: str) -> Figure:
    """Histogram of document lengths (tokens) in logarithmic bins, with median and 95th percentile over all documents.

    Raises ValueError if no document has a token.
    """
    lengths = np.asarray(token_counts, dtype=float)
    drawn = lengths[lengths > 0]
    if not drawn.size:
        raise ValueError("token_counts holds no document with at least one token, so there is no histogram to draw")
    subtitle = f"n = {lengths.size:,} documents, {int(lengths.sum()):,} tokens"
    if drawn.size < lengths.size:
        subtitle += f" ({lengths.size - drawn.size:,} empty documents are counted but have no bar)"
    figure, (ax,) = new_figure(title, subtitle)
    # edges lie between whole numbers, so that no bin of short documents is empty by construction
    edges = np.unique(np.round(np.geomspace(drawn.min(), drawn.max() + 1, 51))) - 0.5
    ax.hist(drawn, bins=edges, color=BLUE, edgecolor="white", linewidth=0.4)
    for percentile, color, style, name in [(50, ORANGE, "-", "median"), (95, RED, "--", "95th percentile")]:
        value = np.percentile(lengths, percentile)
        ax.axvline(value, color=color, linestyle=style, linewidth=2, label=f"{name}: {value:,.0f} tokens")
    ax.set(xscale="log", xlabel="tokens per document", ylabel="documents per bin")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    ax.grid(visible=False, axis="x")
    ax.legend(fontsize=10)
    return figure


def plot_text_lengths(token_counts: Sequence[int], path: Path, title: str) -> Path:
    """Write the histogram of document lengths (tokens) and return its path. Raises ValueError without any token."""
    return save(text_lengths_figure(token_counts, title), Path(path))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 after an error sentence on standard error, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="run folders, or folders of run folders")
    parser.add_argument("--config", type=Path, help="a YAML file that says which runs and which figures (plot_configs)")
    parser.add_argument(
        "--output_folder", type=Path, help="where a comparison goes (default: the runs' common folder, or the file's)"
    )
    options = parser.parse_args(arguments)
    try:
        if bool(options.folders) == bool(options.config):
            raise SettingsError("name either run folders or, with --config, a YAML file that names them")
        if options.config:
            paths = plot_config(options.config, options.output_folder)
        else:
            paths = plot_folders(options.folders, options.output_folder)
    except (SettingsError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
