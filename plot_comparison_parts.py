"""What the figures of the comparison share: rows, crosses, logarithmic axes, and names that do not cover each other."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from figure_parts import BLACK, BLUE, GREEN, GREY, HEIGHT_INCHES, ORANGE, PURPLE, SKY, caption, new_figure
from report_comparison import Case
from run_results import Run

BROWN, WINE = "#7F4F24", "#882255"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK, GREY, BROWN, WINE)
MARKERS = "osD^vP<>p*"


def as_runs(cases: Sequence[Case]) -> list[Run]:
    """The cases as plot.py knows runs; the status is that of the comparison."""
    return [Run(case.name, case.folder, case.info | {"status": case.status}, [], [], []) for case in cases]


def words_of(cases: Sequence[Case], count_key: str, unit: str) -> str:
    """Device, precision, batch, context, data and n of the cases that ended well."""
    good = [case for case in cases if case.ok]
    return caption(as_runs(good), [case.result(count_key) for case in good], unit)


def rows_figure(
    title: str, subtitle: str, names: Sequence[str], panels: int = 1, row: float = 0.3
) -> tuple[Figure, list[Axes]]:
    """A figure with one named row a case, the first on top."""
    figure, axes = new_figure(title, subtitle, panels, max(HEIGHT_INCHES, 1.8 + row * len(names)))
    for ax in axes:
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.grid(visible=False, axis="y")
    return figure, axes


def plain_logarithm(axis: object) -> None:
    """A logarithmic axis labelled 1, 2, 5, 10, ... without powers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


# ------------------------------------------------------------------------------------------------------- labels

Point = tuple[float, float]


def place_labels(
    ax: Axes, points: Sequence[Point], names: Sequence[str], avoid: Sequence[Point], line: Sequence[Point] = ()
) -> list[Annotation]:
    """Name points so that no name lies on another one, on a marker, on the line or outside: the nearest free place.

    Args:
        points, names: what is named, in data coordinates.
        avoid: further points (data coordinates) that no name may cover.
        line: corners of a line that no name may cover.

    Returns:
        The names; one that is not beside its point has a thin line to it.
    """
    figure = ax.figure
    figure.draw_without_rendering()  # the layout has to be final before pixels are compared
    renderer = FigureCanvasAgg(figure).get_renderer()
    frame, pixels = ax.get_window_extent(renderer), ax.transData.transform
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in map(pixels, [*points, *avoid])]
    taken += [box for one, other in itertools.pairwise(map(pixels, line)) for box in boxes_along(one, other)]
    directions = [(1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    horizontal, vertical = {1: "left", 0: "center", -1: "right"}, {1: "bottom", 0: "center", -1: "top"}
    labels: list[Annotation] = []
    for point, name in zip(points, names, strict=True):
        named = [old.get_window_extent(renderer) for old in labels]
        label = ax.annotate(name, point, (0, 0), textcoords="offset points", fontsize=8.5, annotation_clip=False)
        label.set_in_layout(False)
        best = (math.inf, {})
        for distance, (right, up) in itertools.product((9, 18, 30, 44, 60, 80, 104), directions):
            style = {"ha": horizontal[right], "va": vertical[up], "position": (distance * right, distance * up)}
            label.set(**style)
            box = label.get_window_extent(renderer).padded(1.5)
            leader = boxes_along(pixels(point), pixels(point) + np.array(style["position"]) * figure.dpi / 72)
            cost = sum(overlap_area(box, other) for other in taken) + box.width * box.height - overlap_area(box, frame)
            cost += sum(overlap_area(part, old) for part in leader for old in named)
            if cost < best[0] - 1e-6:
                best = (cost, style)
            if cost < 1e-6:
                break
        label.set(**best[1])
        taken.append(label.get_window_extent(renderer).padded(1.5))
        if sum(map(abs, best[1]["position"])) > 9:
            arrow = {"arrowstyle": "-", "color": GREY, "lw": 0.7}
            ax.annotate("", point, best[1]["position"], textcoords="offset points", arrowprops=arrow)
        labels.append(label)
    return labels


def boxes_along(one: np.ndarray, other: np.ndarray) -> list[Bbox]:
    """Small boxes on the way between two places in pixels."""
    count = int(np.hypot(*(other - one)) / 6) + 2
    return [Bbox.from_bounds(x - 1, y - 1, 2, 2) for x, y in np.linspace(one, other, count)]


def overlap_area(one: Bbox, other: Bbox) -> float:
    """Square pixels that both boxes cover."""
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else both.width * both.height


def name_lines(ax: Axes, ends: Sequence[tuple[float, float]], names: Sequence[tuple[str, str]]) -> None:
    """Write each line's name to the right of its end, in its colour, moved up where two would touch."""
    figure = ax.figure
    figure.draw_without_rendering()
    per_point = figure.dpi / 72
    lowest = -math.inf
    for (x, y), (name, colour) in sorted(zip(ends, names, strict=True), key=lambda pair: pair[0][1]):
        at = ax.transData.transform((x, y))[1] / per_point
        lowest = max(at, lowest + 11.5)
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (0, 0.5)} if lowest - at > 1 else None
        style = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": colour, "arrowprops": arrow}
        ax.annotate(name, (x, y), (16, lowest - at), annotation_clip=False, **style).set_in_layout(False)
