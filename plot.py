"""Draw the figures of one training run, or compare several, from the files in their run folders and from nothing else.

A run that ended with `oom`, `error` or `unsupported` is a result: it is a cross with its status, never left out.
Memory is in GiB (2^30 bytes). Every figure names device, precision, batch size, context length, data set and n.

    python plot.py outputs/llm/fp16-batch-125               # that run: loss_curve.png, memory_per_phase.png, ...
    python plot.py outputs/llm/RUN_A outputs/llm/RUN_B --output_folder outputs/llm     # compare these two
    python plot.py outputs/llm                              # compare every run folder inside, in name order

Prints the paths it wrote; a missing or broken run folder is one sentence on standard error and exit status 2.
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: a bare Figure saves PNG files with Agg and leaves no global state
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from run_results import Run, RunFolderError, find_runs, read_run

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers, hatching and labels repeat what they say.
BLUE, ORANGE, RED, GREEN, GREY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#808080"
LINE_COLOURS = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "#8C6D1F", GREY, "black")
WIDTH_INCHES, HEIGHT_INCHES, DPI = 10.7, 5.4, 150  # 1605 x 810 pixels
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


# ---------------------------------------------------------------------------------------- values and captions


def result(run: Run, key: str) -> float | None:
    """One number of run.json's results, or None if it was not measured."""
    return (run.info.get("results") or {}).get(key)


def setting(run: Run, key: str) -> object:
    """What a setting came to be in this run, or None: a result (the batch size that ran) before what run.json states
    (precision, model) before the setting as it was given."""
    found = (result(run, key), run.info.get(key), run.info.get("model"), run.info.get("settings"))
    for value in found:
        value = value.get(key) if isinstance(value, dict) else value
        if value is not None:
            return value
    return None


def caption(runs: Sequence[Run], counts: Sequence[float | None], unit: str) -> str:
    """Device, precision, batch size, context length, data set and n: what a reader needs to judge the numbers."""

    def listed(prefix: str, values: Sequence[object]) -> list[str]:
        different = list(dict.fromkeys(str(value) for value in values if value is not None))
        return [prefix + ", ".join(different[:5] + ["..."] * (len(different) > 5))] if different else []

    datasets = [run.info.get("dataset") or {} for run in runs]
    names = [d.get("description") if d.get("name") == "local files" else d.get("name") for d in datasets]
    names = [f"{name} (generated)" if d.get("generated") else name for name, d in zip(names, datasets, strict=True)]
    facts = listed("", [run.info.get("device_name") for run in runs])
    facts += listed("", [setting(run, "precision") for run in runs])
    facts += listed("batch ", [setting(run, "batch_size") for run in runs])
    facts += listed("context ", [setting(run, "context_length") for run in runs])
    facts += listed("data: ", names)
    known = [int(count) for count in counts if count]
    if known:
        low, high = min(known), max(known)
        facts.append(f"n = {low:,} {unit}" if low == high else f"n = {low:,} to {high:,} {unit}")
    return " | ".join(facts)


def short(value: float) -> str:
    """A value for a label: four significant digits, three below 1, and never 1e+04."""
    digits = 4 if abs(value) >= 1 else 3
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.{digits}g}".rstrip(".")


def new_figure(title: str, subtitle: str, panels: int = 1, height: float = HEIGHT_INCHES) -> tuple[Figure, list[Axes]]:
    """A figure with a title, a wrapped subtitle and `panels` axes side by side that share their y axis."""
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, layout="constrained")
    glued = subtitle.replace(" ", "\u00a0").replace("\u00a0|\u00a0", " | ")  # so that lines break at a | only
    lines = [*textwrap.wrap(title, 130), *textwrap.wrap(glued, 130, break_on_hyphens=False)]
    lines = [line.strip(" |") for line in lines]
    figure.suptitle("\n".join(lines).replace("\u00a0", " "), fontsize=10.5, x=0.01, ha="left")
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
        ax.grid(alpha=0.25)
    return figure, axes


def run_figure(what: str, run: Run, count: int, unit: str) -> tuple[Figure, Axes]:
    """A figure of one run; without rows to draw (count 0) a cross and the status, so that no old figure survives."""
    status = run.info.get("status", "unknown")
    title = f"{what}: {run.name}" + ("" if status == "ok" else f" (status: {status})")
    figure, (ax,) = new_figure(title, caption([run], [count], unit))
    if count == 0:
        ax.plot([0.5], [0.6], "x", color=RED, markersize=16, markeredgewidth=3, transform=ax.transAxes)
        text = f"nothing was recorded; the run's status is {status}"
        ax.text(0.5, 0.47, text, transform=ax.transAxes, ha="center", fontsize=11)
        ax.set(xticks=[], yticks=[])
    return figure, ax


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


def draw_bars(ax: Axes, runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Horizontal bars of run.json's results, one row a run from top to bottom, one bar for each of one or two keys.

    A `..._median` gets a line from its `..._p20` to its `..._p80`. A run with a status other than ok is a cross, even
    if some of its results are known.
    """
    height = 0.72 / len(keys)
    across = ax.get_yaxis_transform()  # x as a fraction of the axes, y in data
    end = 0.0
    for row, run in enumerate(runs):
        status = run.info.get("status", "unknown")
        if status != "ok":
            ax.plot([0.025], [row], "x", color=RED, markersize=8, markeredgewidth=2.4, transform=across)
            ax.annotate(
                status, (0.025, row), (9, 0), across, textcoords="offset points", color=RED, va="center", fontsize=9
            )
            continue
        for index, key in enumerate(keys):
            y = row + (index - (len(keys) - 1) / 2) * height
            value = result(run, key)
            if value is None or not math.isfinite(value):
                text = f"{key}: " + ("not recorded" if value is None else str(value))
                ax.text(0.01, y, text, color=GREY, va="center", fontsize=9, transform=across)
                continue
            ax.barh(y, value, height=0.94 * height, color=(BLUE, ORANGE)[index])
            label_at = value
            spread = [result(run, key.replace("_median", percentile)) for percentile in ("_p20", "_p80")]
            if key.endswith("_median") and None not in spread:
                ax.plot(spread, [y, y], "|-", color="black", linewidth=1.6, markersize=8)
                label_at = max(value, spread[1])
            ax.annotate(short(value), (label_at, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
            end = max(end, label_at)
    ax.set_yticks(range(len(runs)), [textwrap.fill(run.name, 44) for run in runs], fontsize=9.5)
    margin = 0.6 + max(0, 4 - len(runs)) / 2  # a single bar need not fill the figure
    ax.set_ylim(len(runs) - 1 + margin, -margin)  # the first run on top
    ax.set_xlim(0, 1.18 * end or 1.0)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    ax.grid(visible=False, axis="y")


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


# --------------------------------------------------------------------------- text lengths, saving, command line


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


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG file, making its folder if needed, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 after an error sentence on standard error, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of run folders")
    parser.add_argument("--output_folder", type=Path, help="where a comparison goes (default: the runs' common folder)")
    options = parser.parse_args(arguments)
    try:
        folders = [run for folder in options.folders for run in find_runs(folder)]
        parents = {folder.resolve().parent for folder in folders}
        if len(folders) == 1 and folders == options.folders and options.output_folder is None:
            paths = plot_run(folders[0])
        elif options.output_folder is None and len(parents) > 1:
            raise RunFolderError("the runs lie in different folders; say where to draw with --output_folder")
        else:
            paths = plot_runs(folders, options.output_folder or folders[0].parent)
    except (RunFolderError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
