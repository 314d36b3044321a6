"""Draw the figures of an attention benchmark from its results.csv and from nothing else.

    python plot_attention.py outputs/attention_benchmark/comparison            that experiment
    python plot_attention.py outputs/attention_benchmark/*                     each of several

One figure for each mask and layout: time, TFLOP/s and memory of forward and backward against the parameter that was
varied, one line a kernel; out of memory is a cross at the top. A window experiment adds a map of the time that a window
saves, and break_even the ratio against eager and against the full mask. Every figure names device, dtype and n.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from figure_parts import BLUE, DPI, GREEN, GREY, ORANGE, RED, WIDTH_INCHES, save
from run_results import RunFolderError

# One look a kernel in every figure; the markers repeat what the colours say.
STYLES = {
    "eager": {"color": "black", "marker": "s"},
    "sdpa": {"color": GREY, "marker": ".", "linestyle": ":"},
    "sdpa_math": {"color": "#7F4F24", "marker": "p"},
    "sdpa_flash": {"color": BLUE, "marker": "o"},
    "sdpa_efficient": {"color": ORANGE, "marker": "^"},
    "sdpa_cudnn": {"color": GREEN, "marker": "D"},
    "flash_attn": {"color": RED, "marker": "v"},
    "flash_attn_3": {"color": "#882255", "marker": "<"},
    "flash_attn_4": {"color": "#332288", "marker": ">"},
    "varlen": {"color": "#56B4E9", "marker": "P"},
    "flex": {"color": "#CC79A7", "marker": "X"},
    "short": {"color": "#117733", "marker": "*"},
    "auto": {"color": "black", "marker": "o", "linestyle": "none", "markerfacecolor": "none", "markersize": 11},
}
AXES = {  # column -> words of the axis; the order decides what is x where several were varied
    "context_length": "context (tokens)",
    "batch_size": "batch (sequences)",
    "head_dim": "head width",
    "embedding_dim": "embedding width",
    "num_heads": "heads",
    "causal": "causal",
}
PANELS = {  # metric -> (words, logarithmic)
    "time": ("time (ms)", True),
    "throughput": ("TFLOP/s", False),
    "peak_memory_above_inputs": ("peak memory above\nthe inputs (GiB)", True),
}
CELL_COLUMNS = ("layout", "batch_size", "context_length", "num_heads", "head_dim", "causal", "window", "dtype")

NEEDED_COLUMNS = (*CELL_COLUMNS, "embedding_dim", "sweep", "backend", "chosen_backend", "status", "direction", "metric")
NEEDED_COLUMNS += ("value", "p20", "p80", "n", "device", "torch", "flash_attn")

Row = dict[str, str]


def read_results(folder: Path) -> list[Row]:
    """The rows of results.csv as text.

    Raises:
        RunFolderError: no such file, no rows, or columns missing.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise RunFolderError(f"{folder} has no results.csv, so it is no run of attention_benchmark.py with cases")
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except UnicodeDecodeError as error:
        raise RunFolderError(f"{path} is damaged: {error}") from None
    if not rows:
        raise RunFolderError(f"{path} has no rows, so there is nothing to draw")
    missing = [name for name in NEEDED_COLUMNS if name not in rows[0]]
    if missing:
        raise RunFolderError(f"{path} lacks the columns {', '.join(missing)}")
    unknown = {row["backend"] for row in rows} - set(STYLES)
    if unknown:
        raise RunFolderError(
            f"{path} has kernels that this script does not know: {', '.join(sorted(map(str, unknown)))}"
        )
    for number, row in enumerate(rows, start=2):
        for name in ("value", "p20", "p80", "n"):
            try:
                float(row[name] or 0)
            except (TypeError, ValueError):
                raise RunFolderError(f"{path} line {number}: {name} is not a number: {row[name]!r}") from None
    return rows


def different(rows: Sequence[Row], column: str) -> list[str]:
    """The values of a column, numbers in rising order, words in the order met."""
    values = list(dict.fromkeys(row[column] for row in rows))
    return sorted(values, key=float) if all(value.lstrip("-").isdigit() for value in values) else values


def backends_of(rows: Sequence[Row]) -> list[str]:
    found = {row["backend"] for row in rows}
    return [name for name in STYLES if name in found]


def caption(rows: Sequence[Row]) -> str:
    """Device, dtype, versions and n."""
    counts = [int(row["n"]) for row in rows if row["metric"] == "time" and row["n"]]
    first = rows[0]
    facts = [first["device"], ", ".join(different(rows, "dtype")), f"torch {first['torch']}"]
    facts += [f"flash-attn {first['flash_attn']}"] if first["flash_attn"] else []
    if counts:
        low, high = min(counts), max(counts)
        facts.append(f"n = {low}" if low == high else f"n = {low} to {high}")
        facts[-1] += " repetitions a point, median; bars: 20th to 80th percentile"
    return " | ".join(facts)


def constant_words(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """What is the same in all rows, in words."""
    words = {
        "batch_size": "batch {}",
        "context_length": "context {}",
        "num_heads": "{} heads",
        "head_dim": "heads of width {}",
        "layout": "{} q, k, v",
    }
    parts = [text.format(rows[0][name]) for name, text in words.items() if len(different(rows, name)) == 1]
    both = [part for part in parts if " heads" in part or part.startswith("heads of")]
    if len(both) == 2:
        parts[parts.index(both[0])] = f"{rows[0]['num_heads']} {both[1]}"
        parts.remove(both[1])
    tokens = {int(row["batch_size"]) * int(row["context_length"]) for row in rows}
    if len(parts) and len(tokens) == 1 and len(different(rows, "context_length")) > 1:
        parts.insert(0, f"{tokens.pop():,} tokens in the batch")
    if len(different(rows, "head_dim")) > 1 and len(different(rows, "embedding_dim")) == 1:
        parts.append(f"heads of {rows[0]['embedding_dim']} together")
    if "causal" not in varied:
        parts.append("causal" if rows[0]["causal"] == "true" else "not causal")
    return ", ".join(part for part in parts if part)


def new_grid(
    title: str, subtitle: str, rows: int, columns: int, width: float = WIDTH_INCHES
) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, 1.5 + 2.5 * rows), dpi=DPI, layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=10, x=0.01, ha="left")
    axes = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
        ax.grid(alpha=0.25)
    return figure, axes


def logarithmic_ticks(ax: Axes) -> None:
    """A logarithmic y axis labelled at 1, 2 and 5."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def set_scale(
    ax: Axes, places: Sequence[float], labels: Sequence[str], logarithmic_x: bool, logarithmic_y: bool
) -> None:
    if logarithmic_x:
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        pad = (max(places) / min(places)) ** 0.08 if max(places) > min(places) else 1.5
        ax.set_xlim(min(places) / pad, max(places) * pad)
    else:
        ax.set_xlim(min(places) - 0.4, max(places) + 0.4)
    ax.set_xticks(places, labels, fontsize=8.5, rotation=45 if len(labels) > 6 else 0)
    if logarithmic_y:
        logarithmic_ticks(ax)
    else:
        ax.set_ylim(bottom=0)


def draw_lines(ax: Axes, rows: Sequence[Row], x: str, metric: str, places: dict[str, float]) -> None:
    """One line a kernel with bars from p20 to p80; an out of memory is a cross at the top, one below the other."""
    crosses: dict[str, int] = {}
    for backend in backends_of(rows):
        style = STYLES[backend]
        own = [row for row in rows if row["backend"] == backend]
        values = [r for r in own if r["metric"] == metric and r["direction"] == "forward_backward" and r["value"]]
        values.sort(key=lambda row: places[row[x]])
        if values:
            xs, ys = [places[row[x]] for row in values], [float(row["value"]) for row in values]
            ax.plot(xs, ys, **({"linewidth": 1.4, "markersize": 5.5} | style))
            bars = [(px, float(r["p20"]), float(r["p80"])) for px, r in zip(xs, values, strict=True) if r.get("p20")]
            for px, low, high in bars:
                ax.plot([px, px], [low, high], color=style["color"], linewidth=1.2)
        for row in own:
            if row["metric"] == "status" and row["status"] == "oom":
                level = crosses.get(row[x], 0)
                crosses[row[x]] = level + 1
                ax.plot(
                    [places[row[x]]],
                    [0.97 - 0.075 * level],
                    "x",
                    color=style["color"],
                    markersize=8,
                    markeredgewidth=2.2,
                    transform=ax.get_xaxis_transform(),
                    clip_on=False,
                )


def legend(figure: Figure, rows: Sequence[Row]) -> None:
    """Kernels below the figure; one that never ran says why in a word."""
    handles = []
    for backend in backends_of(rows):
        own = [row for row in rows if row["backend"] == backend]
        statuses = {row["status"] for row in own}
        label = backend
        if backend == "auto":
            label += f" ({', '.join(dict.fromkeys(r['chosen_backend'] for r in own if r['chosen_backend']))})"
        others = [status for status in ("unsupported", "error") if status in statuses]
        if others:
            label += f" ({'partly ' if 'ok' in statuses else ''}{', '.join(others)})"
        handles.append(Line2D([], [], label=label, **({"linewidth": 1.4, "markersize": 5.5} | STYLES[backend])))
    if any(row["status"] == "oom" for row in rows):
        style = {"marker": "x", "color": GREY, "linestyle": "none", "markeredgewidth": 2.2}
        handles.append(Line2D([], [], label="out of memory, in the kernel's colour", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8.5, frameon=False)


def sweep_figures(rows: list[Row]) -> dict[str, Figure]:
    """Time, throughput and memory against what was varied; one figure for each mask, layout and window."""
    figures = {}
    varied = [name for name in AXES if len(different(rows, name)) > 1]
    numeric = [name for name in varied if name != "causal"]
    x = (numeric or varied or ["context_length"])[0]
    x = rows[0]["sweep"] if rows[0]["sweep"] in varied else x  # the parameter that gave the experiment its name
    numeric = [x, *(name for name in numeric if name != x)]
    # A second number that was varied on its own (not one that follows from the first) makes the columns, else windows.
    windows = ["window"] if len(different(rows, "window")) > 1 else []
    columns = next((name for name in [*numeric[1:], *windows] if not follows(rows, x, name)), None)
    others = [
        name for name in numeric[1:] if columns and not follows(rows, x, name) and not follows(rows, columns, name)
    ]
    split = [name for name in ("causal", "layout", *windows, *others) if name not in (x, columns)]
    split = [name for name in split if len(different(rows, name)) > 1]
    for values in dict.fromkeys(tuple(row[name] for name in split) for row in rows):
        chosen = [row for row in rows if tuple(row[name] for name in split) == values]
        panels = panel_order(different(chosen, columns)) if columns else [""]
        title = f"Attention, forward and backward: {constant_words(chosen, ['causal'] if x == 'causal' else [])}"
        if chosen[0]["window"] != "none" and columns != "window":
            title += f", window {chosen[0]['window']}"
        figure, axes = new_grid(title, caption(chosen), len(PANELS), len(panels))
        labels = different(chosen, x)
        logarithmic = all(label.isdigit() for label in labels) and len(labels) > 1
        places = {label: float(label) if logarithmic else float(i) for i, label in enumerate(labels)}
        for line, (metric, (words, logarithmic_y)) in enumerate(PANELS.items()):
            measured = [
                float(row["value"])
                for row in chosen
                if row["metric"] == metric and row["direction"] == "forward_backward" and row["value"]
            ]
            if not measured or max(measured) < 4 * min(measured):
                logarithmic_y = False  # a logarithmic axis would blow up what hardly differs
            for column, panel in enumerate(panels):
                ax = axes[line][column]
                shown = [row for row in chosen if not columns or row[columns] == panel]
                draw_lines(ax, shown, x, metric, places)
                set_scale(ax, list(places.values()), labels, logarithmic, logarithmic_y)
                if any(row["status"] == "oom" for row in chosen) and column == len(panels) - 1:
                    low, high = ax.get_ylim()  # shared by the line of panels: room for the crosses
                    ax.set_ylim(low, high * 3 if logarithmic_y else high * 1.25)
                if line == 0 and columns:
                    name = "no window" if panel == "none" else f"{AXES.get(columns, columns).split(' (')[0]} {panel}"
                    ax.set_title(name, fontsize=9.5)
                if line == len(PANELS) - 1:
                    ax.set_xlabel(AXES[x])
                if column == 0:
                    ax.set_ylabel(words)
        legend(figure, chosen)
        parts = [f"{name}_{value}" for name, value in zip(split, values, strict=True)]
        figures["_".join(["sweep", *parts]) + ".png"] = figure
    return figures


def panel_order(values: list[str]) -> list[str]:
    """ "none" first, numbers rising."""
    return sorted(values, key=lambda value: -1.0 if value == "none" else float(value))


def follows(rows: Sequence[Row], x: str, name: str) -> bool:
    """Whether a column has one value for each value of another (a batch that keeps the number of tokens)."""
    pairs = {(row[x], row[name]) for row in rows}
    return len(pairs) == len({row[x] for row in rows})


def times_of(rows: Sequence[Row]) -> dict[tuple[str, ...], float]:
    """(backend, *CELL_COLUMNS) -> median ms of forward and backward."""
    return {
        (row["backend"], *(row[name] for name in CELL_COLUMNS)): float(row["value"])
        for row in rows
        if row["metric"] == "time" and row["direction"] == "forward_backward"
    }


def without_window(key: tuple[str, ...], backend: str) -> tuple[str, ...]:
    """The same cell without a window, of this backend."""
    place = 1 + CELL_COLUMNS.index("window")
    return (backend, *key[1:place], "none", *key[place + 1 :])


def window_map(rows: list[Row]) -> Figure | None:
    """Time with a window over time without, for each context and window: a map for each kernel, and against cuDNN."""
    times = times_of(rows)
    windows = panel_order(different(rows, "window"))[1:]
    contexts = different(rows, "context_length")
    maps = []
    for backend in backends_of(rows):
        for other in dict.fromkeys((backend, "sdpa_cudnn" if backend == "flash_attn" else backend)):
            grid = np.full((len(windows), len(contexts)), np.nan)
            for key, ms in times.items():
                cell = dict(zip(CELL_COLUMNS, key[1:], strict=True))
                against = times.get(without_window(key, other))
                if key[0] == backend and cell["window"] != "none" and against:
                    grid[windows.index(cell["window"]), contexts.index(cell["context_length"])] = ms / against
            if not np.isnan(grid).all():
                name = "itself" if other == backend else other
                maps.append((f"{backend} with a window over {name} without", grid))
    if not maps:
        return None
    title = f"What a window saves, forward and backward: {constant_words(rows, [])}"
    figure = Figure(figsize=(WIDTH_INCHES, 1.4 + 1.55 * len(maps)), dpi=DPI, layout="constrained")
    subtitle = caption(rows).replace("; bars: 20th to 80th percentile", "")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=10, x=0.01, ha="left")
    axes = figure.subplots(len(maps), 1, squeeze=False, sharex=True)[:, 0]
    norm = TwoSlopeNorm(1.0, 0.0, 2.0)
    for ax, (name, grid) in zip(axes, maps, strict=True):
        image = ax.imshow(grid, cmap="RdYlGn_r", norm=norm, aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            if not np.isnan(value):
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9)
        ax.set_title(name, fontsize=9.5, loc="left")
        ax.set_yticks(range(len(windows)), windows)
        ax.set_ylabel("window")
        ax.set_xticks(range(len(contexts)), contexts)
    axes[-1].set_xlabel("context (tokens); empty: the window hides nothing there")
    figure.colorbar(image, ax=list(axes), label="time / time without", shrink=0.9)
    return figure


def break_even_figure(rows: list[Row]) -> Figure:
    """Time over that of eager, and with a window over that without, against the context; below 1 it saves time."""
    times = times_of(rows)
    place = 1 + CELL_COLUMNS.index("context_length")
    lines: list[dict[str, list[tuple[int, float]]]] = [{}, {}]
    for key, ms in times.items():
        backend, window = key[0], key[1 + CELL_COLUMNS.index("window")]
        if window == "none":
            pairs = [(0, backend, ("eager", *key[1:]))] if backend != "eager" else []
        else:
            pairs = [(1, f"{backend}, window {window}", without_window(key, backend))]
        for panel, name, against in pairs:
            if against in times:
                lines[panel].setdefault(name, []).append((int(key[place]), ms / times[against]))
    lines = [panel for panel in lines if panel]
    words = constant_words([row for row in rows if row["window"] == "none"], [])
    title = f"From which context on it pays, forward and backward: {words}"
    figure = Figure(figsize=(WIDTH_INCHES, 5.0), dpi=DPI, layout="constrained")
    figure.suptitle(
        f"{title}\n{caption(rows).replace(', median; bars: 20th to 80th percentile', ', median')}", fontsize=10
    )
    axes = figure.subplots(1, max(1, len(lines)), squeeze=False)[0]
    colours = [BLUE, ORANGE, GREEN, RED, GREY]
    for ax, panel in zip(axes, lines, strict=False):
        for index, (name, points) in enumerate(panel.items()):
            points.sort()
            style = STYLES.get(name, {"color": colours[index % len(colours)], "marker": "osvD^"[index % 5]})
            ax.plot(*zip(*points, strict=True), label=name, linewidth=1.4, markersize=5, **style)
        ax.axhline(1.0, color="black", linewidth=1)
        contexts = sorted({context for points in panel.values() for context, _ in points})
        powers = [context for context in contexts if context & (context - 1) == 0] or contexts
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(powers, [str(power) for power in powers], rotation=45, fontsize=8.5)
        logarithmic_ticks(ax)
        windowed = any("window" in name for name in panel)
        against = "that of the same kernel without it" if windowed else "that of eager"
        ax.set(xlabel="context (tokens)", ylabel=f"time / {against}")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8.5)
    return figure


def plot_sweep(folder: Path) -> list[Path]:
    """Write the figures of one experiment into its folder; returns the paths.

    Raises:
        RunFolderError: results.csv is missing or broken.
    """
    rows = read_results(Path(folder))
    if rows[0]["sweep"] == "break_even":
        figures = {"break_even.png": break_even_figure(rows)}
    else:
        figures = sweep_figures(rows)
        mapped = window_map(rows) if len(different(rows, "window")) > 1 else None
        if mapped is not None:
            figures["window_map.png"] = mapped
    return [save(figure, Path(folder) / name) for name, figure in figures.items()]


def main() -> int:
    """Draw the folders named on the command line; status 2 if one of them could not be drawn."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:] and sys.argv[1] in ("-h", "--help") else 2
    status = 0
    for folder in sys.argv[1:]:
        try:
            print(*plot_sweep(Path(folder)), sep="\n")
        except (RunFolderError, OSError) as error:
            print(f"plot_attention.py: {error}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
