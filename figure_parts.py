"""What figures share: colours, a figure with its title and caption, what a run says, rows of bars, crosses, saving.

Every plot_*.py imports from here; nothing here knows which figure it draws.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: a bare Figure saves PNG files with Agg and leaves no global state
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from run_results import Run

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers, hatching and labels repeat what they say.
BLUE, ORANGE, RED, GREEN, GREY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#808080"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"
LINE_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "#8C6D1F", GREY, "black")
CROSS = {"marker": "x", "color": RED, "markersize": 8, "markeredgewidth": 2.4, "linestyle": "none"}
WIDTH_INCHES, HEIGHT_INCHES, DPI = 10.7, 5.4, 150  # 1605 x 810 pixels


# ------------------------------------------------------------------------------------------ values and captions


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


# ------------------------------------------------------------------------------------------------------ figures


def blank_figure(title: str, subtitle: str, height: float = HEIGHT_INCHES) -> Figure:
    """A figure with a title, a wrapped subtitle and no axes yet."""
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, layout="constrained")
    parts = subtitle.split(" | ")  # lines break between parts; inside of one only if it fills a line
    glued = " | ".join(part if len(part) > 130 else part.replace(" ", "\u00a0") for part in parts)
    lines = [*textwrap.wrap(title, 130), *textwrap.wrap(glued, 130, break_on_hyphens=False)]
    lines = [line.strip(" |") for line in lines]
    figure.suptitle("\n".join(lines).replace("\u00a0", " "), fontsize=10.5, x=0.01, ha="left")
    return figure


def tidy(ax: Axes) -> Axes:
    """Two spines and a pale grid under what is drawn."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(alpha=0.25)
    return ax


def new_figure(title: str, subtitle: str, panels: int = 1, height: float = HEIGHT_INCHES) -> tuple[Figure, list[Axes]]:
    """A figure with a title, a wrapped subtitle and `panels` axes side by side that share their y axis."""
    figure = blank_figure(title, subtitle, height)
    return figure, [tidy(ax) for ax in figure.subplots(1, panels, sharey=True, squeeze=False)[0]]


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


def legend_below(figure: Figure, columns: int, handles: list | None = None) -> None:
    """One legend under all axes: of `handles`, or of what the first axes show."""
    extra = {} if handles is None else {"handles": handles}
    labels = [handle.get_label() for handle in handles or figure.axes[0].get_legend_handles_labels()[0]]
    columns = min(columns, max(1, 130 // (8 + max(map(len, labels), default=1))))  # about 130 characters fit
    figure.legend(loc="outside lower center", ncols=columns, fontsize=9, frameon=False, **extra)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG file, making its folder if needed, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


# ------------------------------------------------------------------------------------------------- rows of bars


def draw_cross(ax: Axes, row: float, status: str, left: float = 0.02) -> None:
    """A red cross with the status at the left end of a row; `left` is a fraction of the axes."""
    across = ax.get_yaxis_transform()  # x as a fraction of the axes, y in data
    ax.plot([left], [row], transform=across, **CROSS)
    ax.annotate(status, (left, row), (9, 0), across, textcoords="offset points", color=RED, va="center", fontsize=9)


def draw_missing(ax: Axes, y: float, text: str) -> None:
    """What stands where a bar would be if there were a number."""
    ax.text(0.01, y, text, color=GREY, va="center", fontsize=9, transform=ax.get_yaxis_transform())


def draw_spread(ax: Axes, low: float, high: float, y: float) -> None:
    """A black line with ends over a bar, from the 20th to the 80th percentile."""
    ax.plot([low, high], [y, y], "|-", color="black", linewidth=1.6, markersize=8)


def finish_rows(ax: Axes, names: Sequence[str], end: float, room: float = 1.18) -> None:
    """Name the rows of horizontal bars, the first on top; x from 0 to `end` with `room` for the bars' labels."""
    ax.set_yticks(range(len(names)), [textwrap.fill(name, 44) for name in names], fontsize=9.5)
    margin = 0.6 + max(0, 4 - len(names)) / 2  # a single bar need not fill the figure
    ax.set_ylim(len(names) - 1 + margin, -margin)  # the first one on top
    ax.set_xlim(0, room * end or 1.0)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    ax.grid(visible=False, axis="y")


def draw_bars(ax: Axes, runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Horizontal bars of run.json's results, one row a run from top to bottom, one bar for each of one or two keys.

    A `..._median` gets a line from its `..._p20` to its `..._p80`. A run with a status other than ok is a cross, even
    if some of its results are known.
    """
    height = 0.72 / len(keys)
    end = 0.0
    for row, run in enumerate(runs):
        status = run.info.get("status", "unknown")
        if status != "ok":
            draw_cross(ax, row, status, left=0.025)
            continue
        for index, key in enumerate(keys):
            y = row + (index - (len(keys) - 1) / 2) * height
            value = result(run, key)
            if value is None or not math.isfinite(value):
                draw_missing(ax, y, f"{key}: " + ("not recorded" if value is None else str(value)))
                continue
            ax.barh(y, value, height=0.94 * height, color=(BLUE, ORANGE)[index])
            label_at = value
            spread = [result(run, key.replace("_median", percentile)) for percentile in ("_p20", "_p80")]
            if key.endswith("_median") and None not in spread:
                draw_spread(ax, *spread, y)
                label_at = max(value, spread[1])
            ax.annotate(short(value), (label_at, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
            end = max(end, label_at)
    finish_rows(ax, [run.name for run in runs], end)
