"""Draw how many times as fast as bf16 FP8 is, by width, from the rows of fp8_benchmark.py in outputs/fp8.

    python plot_fp8.py                              writes outputs/plots/fp8/speedup_by_width.png
    python plot_fp8.py --output_folder mine         of your own runs

A panel for each question, number of tokens and GPU; a colour is a recipe, a marker a shape. A hollow marker was faster
in the median but not in every round; what failed is a red cross.
"""

import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from figure_parts import BLUE, CROSS, GREEN, GREY, ORANGE, blank_figure, legend_below, save, tidy
from fp8_results import SHAPE_WORDS, family, read_rows
from precision import FP8_RECIPES
from utils import SettingsError, parse_settings, run_script, setting

COLUMNS = 3
COLOURS = dict(zip(FP8_RECIPES, (ORANGE, BLUE, GREEN), strict=True))
LOOKS = dict(
    zip(SHAPE_WORDS, (("o", "-"), ("^", "--"), ("s", ":"), ("D", "-"), ("P", "-")), strict=True)
)  # marker, line


def panel(ax: Axes, question: str, rows: list[dict[str, str]]) -> None:
    """The lines of one question, one number of tokens and one GPU."""
    widths = sorted({int(row["width"]) for row in rows})
    for (shape, recipe), group in groupby(sorted(rows, key=line_of), key=line_of):
        own = list(group)
        points = sorted((int(row["width"]), float(row["speedup"] or "nan")) for row in own)
        marker, style = LOOKS.get(shape, ("o", "-"))
        if any(math.isfinite(speedup) for _, speedup in points):  # what failed is a gap in the line
            ax.plot(
                *zip(*points, strict=True),
                marker=marker,
                linestyle=style,
                color=COLOURS[recipe],
                markersize=5,
            )
        for row in own:
            if float(row["speedup"] or 0) > 1 and row["clear"] != "yes":
                ax.plot(int(row["width"]), float(row["speedup"]), marker=marker, markersize=5, color=COLOURS[recipe],
                        markerfacecolor="white", zorder=3)  # fmt: skip
    failed = sorted((row for row in rows if not row["speedup"]), key=lambda row: int(row["width"]))
    for width, group in groupby(failed, key=lambda row: int(row["width"])):
        own = list(group)
        reasons = {row["status"] if row["status"] != "ok" else "no bf16" for row in own}
        words = own[0]["variant"] if len(own) == 1 else f"{len(own)} rows"
        ax.plot([width], [0.06], transform=ax.get_xaxis_transform(), **CROSS)
        ax.annotate(f"{words}:\n{', '.join(sorted(reasons))}", (width, 0.06), (0, 9), ax.get_xaxis_transform(),
                    textcoords="offset points", color=CROSS["color"], ha="center", fontsize=8)  # fmt: skip
    ax.axhline(1, color=GREY, linewidth=1.2)
    ax.set_xscale("log", base=2)
    ax.set_xticks(widths, [f"{width:,}" for width in widths], rotation=45, ha="right", fontsize=8.5)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_title(f"{question}, {int(rows[0]['tokens']):,} tokens\n{rows[0]['device_name']}", fontsize=9.5, loc="left")
    ax.set_xlabel("width d")


def line_of(row: dict[str, str]) -> tuple[str, str]:
    """The shape, or the family of models whose block it is, and the recipe."""
    return family(row), row["variant"]


def speedup_figure(outputs: Path) -> Figure:
    """All panels, with one scale and one legend.

    Raises:
        SettingsError: there are no rows of the benchmark.
    """
    rows = [row for row in read_rows(outputs) if row["variant"] in FP8_RECIPES]
    if not rows:
        raise SettingsError(f"{outputs / 'fp8'} holds no rows of the benchmark; run `python fp8_benchmark.py`")
    groups: dict[tuple, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["question"], int(row["tokens"]), row["device_name"]), []).append(row)
    columns = min(COLUMNS, len(groups))
    lines = -(-len(groups) // columns)
    numbers = sorted({int(row["n"]) for row in rows if row["status"] == "ok"})
    counted = " to ".join(str(number) for number in dict.fromkeys(numbers[:1] + numbers[-1:]))
    figure = blank_figure(
        "FP8 against bf16, by width: time of a training step's products, of a layer and of a block with their casts",
        "rounds of replays of a CUDA graph, in turn with bf16: medians of the middle rounds"
        + (f", n = {counted}" if counted else "")
        + " | above the grey line FP8 is faster; hollow: not in every round",
        height=1.9 + 3.3 * lines,
    )
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    every = [int(row["width"]) for row in rows]
    for ax, ((question, *_), own) in zip(axes.flat, groups.items(), strict=False):
        panel(tidy(ax), question, own)
        ax.set_xlim(min(every) / 1.2, max(every) * 1.2)
    for ax in axes.flat[len(groups) :]:
        ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel("times as fast as bf16")
    axes[0, 0].set_ylim(bottom=0)
    recipes = [name for name in FP8_RECIPES if any(row["variant"] == name for row in rows)]
    shapes = [name for name in LOOKS if any(line_of(row)[0] == name for row in rows)]
    handles = [Line2D([], [], color=COLOURS[name], linewidth=3, label=name) for name in recipes]
    for name in shapes:
        marker, style = LOOKS[name]
        handles.append(
            Line2D([], [], color="black", marker=marker, linestyle=style, markersize=5, label=SHAPE_WORDS[name])
        )
    legend_below(figure, len(handles), handles)
    return figure


@dataclass
class Settings:
    """Settings of `python plot_fp8.py`."""

    output_folder: str = setting("outputs", "folder of all results")


def main() -> int:
    """Draw the figure and print its path."""
    outputs = Path(parse_settings(Settings).output_folder)
    print(save(speedup_figure(outputs), outputs / "plots" / "fp8" / "speedup_by_width.png"))
    return 0


if __name__ == "__main__":
    run_script(main)
