"""Draw the figures of the comparison from the run folders of compare_techniques.py and from nothing else.

    python plot_comparison.py outputs                                       every experiment found there
    python plot_comparison.py --experiment seed --output_folder outputs     one of them

Each figure lies in its experiment's folder. seed: time, memory of each phase, memory against speed, where the time of a
step goes; quality: loss, perplexity, perplexity against updates; max_batch: largest batch; factorial: effects and
memory against speed. A case that did not end well is a red cross with its status. Memory is in GiB (2^30 bytes).
"""

import argparse
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

import report_comparison as tables
from plot import BLUE, GREEN, GREY, HEIGHT_INCHES, ORANGE, RED, caption, draw_bars, new_figure, save, short
from report_comparison import Case, effects_of, finished, mean, read_json, shown, signed
from run_results import Run
from utils import SettingsError

EXPERIMENTS = ("seed", "factorial", "max_batch", "quality")
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"  # the rest of Okabe and Ito's colours
BROWN, WINE = "#7F4F24", "#882255"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK, GREY, BROWN, WINE)
MARKERS = "osD^vP<>p*"
CROSS = {"marker": "x", "color": RED, "markersize": 8, "markeredgewidth": 2.4, "linestyle": "none"}


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


def draw_cross(ax: Axes, row: float, status: str) -> None:
    """A red cross with the status at the left end of a row."""
    across = ax.get_yaxis_transform()
    ax.plot([0.02], [row], transform=across, **CROSS)
    ax.annotate(status, (0.02, row), (9, 0), across, textcoords="offset points", color=RED, va="center", fontsize=9)


def legend_below(figure: Figure, columns: int, handles: list | None = None) -> None:
    extra = {} if handles is None else {"handles": handles}
    labels = [handle.get_label() for handle in handles or figure.axes[0].get_legend_handles_labels()[0]]
    columns = min(columns, max(1, 130 // (8 + max(map(len, labels), default=1))))  # about 130 characters fit
    figure.legend(loc="outside lower center", ncols=columns, fontsize=9, frameon=False, **extra)


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


# ------------------------------------------------------------------------------------------------- time and memory


def time_figure(cases: Sequence[Case]) -> Figure:
    """The plwiki lab's figure: time of a step and of an epoch."""
    subtitle = words_of(cases, "timed_steps", "timed steps a case")
    figure, axes = rows_figure("Execution time", subtitle, [case.name for case in cases], 2)
    panels = {
        "step_ms_median": "time per training step (ms)\nmedian; black line: 20th to 80th percentile",
        "epoch_minutes": "time of one epoch (minutes)",
    }
    for ax, (key, label) in zip(axes, panels.items(), strict=True):
        draw_bars(ax, as_runs(cases), [key])
        ax.set_ylim(len(cases) - 0.4, -0.6)
        ax.set_xlabel(label)
        ax.tick_params(axis="y", labelsize=9)
    return figure


SEGMENTS = {  # segment -> colour, hatching, words
    "start": (GREY, "", "held at the step's start (parameters, states)"),
    "forward_pass": (BLUE, "", "forward"),
    "loss": (ORANGE, "//", "loss"),
    "backward_pass": (SKY, "", "backward"),
    "optimizer_step": (GREEN, "\\\\", "optimizer"),
    "between": (BLACK, "", "outside these phases"),
}


NOT_TRACKED = "memory not tracked (compiled code without a GPU)"


def memory_segments(case: Case) -> dict[str, float]:
    """Segment -> GiB by which it raises the highest allocation seen so far in the step; the sum is the step's peak.

    The step is the tracked one with the highest peak.
    """
    rows = tables.read_table(case.folder / "memory.csv")
    steps = [row for row in rows if row["phase"] == "training_step"]
    if not steps:
        raise SettingsError(f"{case.folder / 'memory.csv'} has no row training_step; raise --tracked_steps")
    step = max(steps, key=lambda row: float(row["peak_allocated_gib"]))
    own = {row["phase"]: row for row in rows if row["step"] == step["step"]}
    highest = float(step["start_allocated_gib"])
    segments = {"start": highest}
    for phase in tables.PHASES:
        peak = float(own[phase]["peak_allocated_gib"]) if phase in own else 0.0
        segments[phase] = max(0.0, peak - highest)
        highest = max(highest, peak)
    segments["between"] = max(0.0, float(step["peak_allocated_gib"]) - highest)
    return segments


def memory_figure(cases: Sequence[Case]) -> Figure:
    """Stacked bars that end at the peak of the step."""
    subtitle = words_of(cases, "tracked_steps", "tracked steps a case, of which the highest is drawn")
    figure, (ax,) = rows_figure("Memory per phase of a training step", subtitle, [case.name for case in cases])
    end = 0.0
    for row, case in enumerate(cases):
        if not case.ok:
            draw_cross(ax, row, case.status)
            continue
        if case.result("tracked_steps") == 0:
            ax.text(0.01, row, NOT_TRACKED, transform=ax.get_yaxis_transform(), va="center", fontsize=9, color=GREY)
            continue
        left = 0.0
        for name, width in memory_segments(case).items():
            colour, hatch, _ = SEGMENTS[name]
            if width > 0:
                ax.barh(row, width, left=left, height=0.7, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
            left += width
        reserved = case.result("peak_reserved_gib")
        if reserved:
            ax.plot([reserved], [row], "|", color=BLACK, markersize=11, markeredgewidth=1.6)
        end = max(end, left, reserved or 0.0)
        words = short(left) + (f" ({short(reserved)} reserved)" if reserved else "")
        at = (max(left, reserved or 0), row)
        ax.annotate(words, at, (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    ax.set_xlabel(
        "allocated memory (GiB); the bar ends at the step's peak; peaks do not add up, so a segment is by\n"
        "how much its phase raises the highest allocation so far in the step (none if it stays below)"
    )
    ax.set_xlim(0, 1.25 * end or 1.0)
    drawn = [memory_segments(case) for case in cases if case.ok and case.result("tracked_steps") != 0]
    handles: list = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=words)
        for name, (colour, hatch, words) in SEGMENTS.items()
        if any(segments[name] > 0 for segments in drawn)
    ]
    handles.append(Line2D([], [], marker="|", linestyle="none", color=BLACK, markersize=11, label="reserved, peak"))
    legend_below(figure, 4, handles)
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other one beats: (memory, speed) with as little memory, as much speed, one better.

    Equal points are both members. In order of memory.
    """
    front = [
        place
        for place, (memory, speed) in enumerate(points)
        if not any(m <= memory and s >= speed and (m, s) != (memory, speed) for m, s in points)
    ]
    return sorted(front, key=lambda place: points[place])


CONTROLS = ("fp32-baseline", "flash-attention-adamw", "baseline")  # what the others are held against


def speed_figure(cases: Sequence[Case]) -> Figure:
    """Peak GiB against tokens/s of the cases with the usual batch; the Pareto front is a line."""
    usual = Counter(case.batch for case in cases if case.batch).most_common(1)[0][0]
    shown_cases = [case for case in cases if case.batch in (usual, None)]  # None: it failed before it had a batch
    good = [case for case in shown_cases if case.ok and case.result("peak_allocated_gib") is not None]
    subtitle = words_of(good, "timed_steps", "timed steps a case, median")
    figure, (ax,) = new_figure(f"Peak memory against speed at batch {usual}", subtitle, 1, 6.6)
    ax.set(xlabel="peak allocated memory of a step (GiB)", ylabel="tokens/s")
    points = [(case.result("peak_allocated_gib"), case.result("tokens_per_s")) for case in good]
    front = pareto_front(points)
    peers = [place for place, case in enumerate(good) if case.name.startswith(tables.PEER)]
    members = [points[place] for place in front]
    if members:
        line = "steps-post"
        ax.plot(*zip(*members, strict=True), color=BLUE, drawstyle=line, linewidth=1.4, label="Pareto front", zorder=1)
    for words, chosen, style in [
        ("on the front", front, {"marker": "o", "color": BLUE, "zorder": 4}),  # on a point of the same place
        ("behind it", [i for i in range(len(points)) if i not in front], {"marker": "o", "color": GREY, "zorder": 3}),
        (f"{tables.PEER}, the peer", peers, {"marker": "*", "color": ORANGE, "zorder": 5}),
    ]:
        places = [i for i in chosen if i not in peers or style["marker"] == "*"]
        if places:
            size = 15 if style["marker"] == "*" else 7
            xs, ys = zip(*(points[i] for i in places), strict=True)
            ax.plot(xs, ys, linestyle="none", markersize=size, markeredgecolor="white", label=words, **style)
    for words, style in (  # no place in the plane
        ({case.name: case.status for case in shown_cases if not case.ok}, CROSS),
        ({case.name: NOT_TRACKED for case in shown_cases if case.ok and case not in good}, {"color": "none"}),
    ):
        many = [f"{count} case{'s' * (count > 1)}: {word}" for word, count in Counter(words.values()).items()]
        for label in [f"{name}: {word}" for name, word in words.items()] if len(words) <= 4 else many:
            ax.plot([], [], label=label, **style)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if points:
        highest, fastest = (max(values) for values in zip(*points, strict=True))
        ax.set(xlim=(0, 1.12 * highest), ylim=(0, 1.12 * fastest))
    legend_below(figure, 3)
    controls = [place for place, case in enumerate(good) if case.name.startswith(CONTROLS)]
    named = list(dict.fromkeys([*front, *peers, *controls]))
    corners = [corner for one, other in itertools.pairwise(members) for corner in (one, (other[0], one[1]))]
    place_labels(ax, [points[i] for i in named], [good[i].name for i in named], points, [*corners, *members[-1:]])
    return figure


def profile_figure(cases: Sequence[Case]) -> Figure | None:
    """Where a profiled step's time goes, over its matrix products alone; None if nothing was profiled."""
    profiled = [case for case in cases if (case.folder / "profile.json").is_file()]
    if not profiled:
        return None
    profiles = [read_json(case.folder / "profile.json") for case in profiled]
    names = [name for case in profiled for name in (case.name, "its matrix products alone")]
    steps = ", ".join(dict.fromkeys(str(profile["steps"]) for profile in profiles))
    subtitle = f"{words_of(profiled, '', '')} | n = {steps} profiled steps, mean | alone: FLOP of the matrix products"
    subtitle += " over the rates measured for their shapes"
    figure, (ax,) = rows_figure("Where the time of a training step goes", subtitle, names, row=0.4)
    categories = list(dict.fromkeys(part["name"] for profile in profiles for part in profile["categories"]))
    colours = dict(
        zip(categories, itertools.cycle((BLUE, ORANGE, SKY, GREEN, PURPLE, YELLOW, BROWN, WINE, GREY)), strict=False)
    )
    for row, profile in enumerate(profiles):
        left = 0.0
        for part in profile["categories"]:
            colour = colours[part["name"]]
            ax.barh(2 * row, part["ms"], left=left, height=0.7, color=colour, edgecolor="white", linewidth=0.6)
            if part["ms"] > 0.05 * profile["step_ms"]:
                dark = colour in (BLUE, GREEN, BROWN, WINE, GREY)
                text = f"{part['ms']:.1f}"
                middle = left + part["ms"] / 2
                ax.text(middle, 2 * row, text, ha="center", va="center", fontsize=8.5, color="white" if dark else BLACK)
            left += part["ms"]
        ax.plot([profile["step_ms"]] * 2, [2 * row - 0.45, 2 * row + 0.45], color=BLACK, linewidth=2)
        floor = profile["matmul_floor_ms"] or 0.0
        ax.barh(2 * row + 1, floor, height=0.5, color="white", edgecolor=BLUE, hatch="//", linewidth=1.2)
        for end, place in ((left, 2 * row), (floor, 2 * row + 1)):
            ax.annotate(short(end), (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_xlabel("time of a step (ms)")
    ax.set_xlim(0, 1.08 * ax.dataLim.x1)
    handles: list = [Patch(facecolor=colours[name], label=name) for name in categories]
    handles.append(Line2D([], [], color=BLACK, linewidth=2, label="the step without the profiler"))
    legend_below(figure, 4, handles)
    return figure


# ---------------------------------------------------------------------------------------------------------- quality


def quality_figure(cases: Sequence[Case], title: str, key: str, label: str) -> Figure:
    """Every seed a point, their mean a bar across; the runs with another number of updates below and apart."""
    equal, confounded = tables.quality_runs(cases)

    def updates(own: Sequence[Case]) -> str:
        counts = dict.fromkeys(f"{case.result('steps'):,}" for case in own if case.ok)
        return f" ({', '.join(counts)} updates)" if counts else ""

    names = [name + updates(list(seeds.values())) for name, seeds in equal.items()]
    names += [run.case.name + updates([run.case]) for run in confounded]
    subtitle = words_of(cases, "test_tokens", "test tokens")
    figure, (ax,) = rows_figure(title, subtitle, names, row=0.34)
    for row, seeds in enumerate(equal.values()):
        values = finished(seeds, key)
        failed = [f"seed {seed}: {case.status}" for seed, case in seeds.items() if not case.ok]
        if failed:
            draw_cross(ax, row, ", ".join(failed))
        if values:
            ax.plot(values, [row] * len(values), "o", color=BLUE, markersize=7, alpha=0.75)
            ax.plot([mean(values)] * 2, [row - 0.33, row + 0.33], color=BLACK, linewidth=2.2)
            text = short(mean(values)) if key != "test_loss" else f"{mean(values):.3f}"
            ax.annotate(text, (max(values), row), (9, 0), textcoords="offset points", va="center", fontsize=8.5)
    for row, run in enumerate(confounded, start=len(equal)):
        if run.case.ok:
            value = run.case.result(key)
            text = short(value) if key != "test_loss" else f"{value:.3f}"
            ax.plot([value], [row], "D", color=ORANGE, markersize=7)
            ax.annotate(text, (value, row), (9, 0), textcoords="offset points", va="center", fontsize=8.5)
        else:
            draw_cross(ax, row, run.case.status)
    if confounded:
        ax.axhline(len(equal) - 0.5, color=GREY, linestyle=":", linewidth=1.4)
    low, high = ax.dataLim.intervalx
    if math.isfinite(low):
        width = (high - low) or 0.1 * abs(high)
        partly = any(
            len({case.ok for case in seeds.values()}) == 2 for seeds in equal.values()
        )  # crosses beside points
        ax.set_xlim(low - (0.35 if partly else 0.14) * width, high + 0.12 * width)
    if key != "test_loss":
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.set_xlabel(f"{label}; the axis does not begin at 0")
    handles = [
        Line2D([], [], marker="o", linestyle="none", color=BLUE, markersize=7, label="one seed, equal updates"),
        Line2D([], [], marker="|", linestyle="none", color=BLACK, markersize=12, markeredgewidth=2.2, label="mean"),
        Line2D([], [], marker="D", linestyle="none", color=ORANGE, markersize=7, label="as many tokens, other updates"),
    ]
    legend_below(figure, 3, handles)
    return figure


def updates_figure(cases: Sequence[Case]) -> Figure:
    """Perplexity against the number of updates: runs at equal updates, and larger batches on as many tokens."""
    equal, confounded = tables.quality_runs(cases)
    subtitle = words_of(cases, "test_tokens", "test tokens")
    figure, (ax,) = new_figure("Perplexity against the number of updates", subtitle, 1, 6.2)
    ax.set(xlabel="updates of the weights", ylabel="test perplexity: exp(loss in nats per token)")
    places: dict[str, list[tuple[float, float]]] = {}
    labels: list[tuple[tuple[float, float], str]] = []
    for words, style, chosen in [
        (
            "equal updates",
            {"marker": "o", "color": BLUE, "alpha": 0.6},
            [c for s in equal.values() for c in s.values()],
        ),
        ("as many tokens at a larger batch", {"marker": "D", "color": ORANGE}, [run.case for run in confounded]),
    ]:
        good = [case for case in chosen if case.ok]
        places[words] = [(case.result("steps"), case.result("test_perplexity")) for case in good]
        if good:
            xs, ys = zip(*places[words], strict=True)
            ax.plot(xs, ys, linestyle="none", markersize=8, label=words, zorder=3, **style)
        if words != "equal updates":
            for batch in dict.fromkeys(case.batch for case in good):
                own = [place for place, case in zip(places[words], good, strict=True) if case.batch == batch]
                labels.append((max(own, key=lambda place: place[1]), f"batch {batch:,}{plural(len(own))}"))
    for steps in sorted({x for x, _ in places["equal updates"]}):
        own = [y for x, y in places["equal updates"] if x == steps]
        text = f"{steps:,} updates in each{plural(len(own))}: {shown(min(own))} to {shown(max(own))}"
        labels.append(((steps, max(own)), text))
    for case in cases:
        if not case.ok:
            ax.plot([], [], label=f"{case.name}: {case.status}", **CROSS)
    every = [point for points in places.values() for point in points]
    if every:
        xs, ys = zip(*every, strict=True)
        ax.set_xlim(0, 1.25 * max(xs))
        if max(ys) > 3 * min(ys):
            ax.set_yscale("log")
            plain_logarithm(ax.yaxis)
            ax.set_ylim(min(ys) / 1.25, max(ys) * 1.35)
        else:
            ax.set_ylim(0.75 * min(ys), 1.25 * max(ys))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.set_ylabel(f"{ax.get_ylabel()}\nthe axis does not begin at 0")
    legend_below(figure, 3)
    if labels:
        place_labels(ax, *map(list, zip(*labels, strict=True)), every)
    return figure


def plural(count: int) -> str:
    return f", {count} runs" if count > 1 else ", one run"


# ----------------------------------------------------------------------------------------- largest batch and effects


def max_batch_figure(cases: Sequence[Case]) -> Figure:
    """Largest batch against the budget, a line a configuration with its name; hollow: the plwiki lab's grid."""
    answers = tables.largest_batches(cases)
    facts = [fact for fact in words_of(cases, "", "").split(" | ") if not fact.startswith("batch ")]
    searched = sum(case.status in ("ok", "oom") for case in cases)
    facts += [f"n = {searched} searches", "hollow: where growing by a quarter alone ends"]
    ended = dict.fromkeys(answer.later for own in answers.values() for answer in own.values() if answer.later)
    facts += [f"cross on a point: the training after the search ended with {' or '.join(ended)}"] if ended else []
    subtitle = " | ".join(facts)
    figure, (ax,) = new_figure("Largest batch that the search found", subtitle, 1, 6.8)
    budgets = sorted({budget for own in answers.values() for budget in own})
    sizes = [answer.size for own in answers.values() for answer in own.values() if answer.size]
    sizes += [answer.grid for own in answers.values() for answer in own.values() if answer.grid]
    ends, names, rows = [], [], 0
    for index, (name, own) in enumerate(answers.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        found = [(budget, answer) for budget, answer in sorted(own.items()) if answer.size]
        if found:
            xs, ys = zip(*((budget, answer.size) for budget, answer in found), strict=True)
            ax.plot(xs, ys, color=colour, marker=marker, linewidth=1.5, markersize=6.5, zorder=3)
            ends.append((xs[-1], ys[-1]))
            names.append((name, colour))
        fell = [(budget, answer.size) for budget, answer in found if answer.later]
        if fell:
            ax.plot(*zip(*fell, strict=True), zorder=5, **CROSS)
        grid = [(budget, answer.grid) for budget, answer in found if answer.grid]
        if grid:
            style = {"markerfacecolor": "none", "markeredgecolor": colour, "markersize": 10, "linestyle": "none"}
            ax.plot(*zip(*grid, strict=True), marker=marker, zorder=2, **style)
        crosses = {budget: answer.status for budget, answer in sorted(own.items()) if answer.size is None}
        if crosses:  # a row of crosses for each configuration, its words behind the last of them
            level, down = 0.025 + 0.042 * rows, ax.get_xaxis_transform()
            rows += 1
            ax.plot(list(crosses), [level] * len(crosses), transform=down, zorder=4, **(CROSS | {"markersize": 6}))
            words = "; ".join(
                f"{word} ({', '.join(f'{budget:g}' for budget, own_word in crosses.items() if own_word == word)} GiB)"
                for word in dict.fromkeys(crosses.values())
            )
            style = {"textcoords": "offset points", "va": "center", "fontsize": 7.5, "color": RED}
            ax.annotate(f"{name}: {words}", (max(crosses), level), (6, 0), down, **style)
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    near = [False, *(right < 1.12 * left for left, right in itertools.pairwise(budgets))]  # a line lower
    ax.set_xticks(budgets, [f"{chr(10) * low}{budget:g}" for budget, low in zip(budgets, near, strict=True)])
    ax.set_xlim(budgets[0] / 1.1, budgets[-1] * (budgets[-1] / budgets[0]) ** 0.5 * 1.1)
    ax.set(xlabel="memory budget of PyTorch's allocator (GiB)", ylabel="largest batch (sequences)")
    if sizes:
        ax.set_yscale("log")
        plain_logarithm(ax.yaxis)
        share = 0.04 + 0.045 * rows  # of the axes, for the crosses below every line
        span = math.log(max(sizes) * 1.4) - math.log(min(sizes) / 1.2)
        ax.set_ylim(min(sizes) / 1.2 / math.exp(span * share / (1 - share)), max(sizes) * 1.4)
    name_lines(ax, ends, names)
    return figure


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


def interactions_figure(effects: dict, subtitle: str) -> Figure:
    """Main effects on the diagonal, interactions beside it: GiB of the peak and ms of the step."""
    factors = tables.effect_names(effects, "main")
    for pair in tables.effect_names(effects, "interactions"):
        factors += [factor for factor in pair.split(" x ") if factor not in factors]
    reasons = "; ".join(tables.reasons_of(effects))
    subtitle += " | diagonal: effect of one technique; beside it: half of what one changes in the effect of the other"
    figure, axes = new_figure(
        "What techniques change together", subtitle + (f" | {reasons}" if reasons else ""), 2, 5.5
    )
    for ax, (measure, words) in zip(axes, {"peak_gib": "peak, GiB", "step_ms": "step, ms"}.items(), strict=True):
        main, pairs = (effects_of(effects, measure, kind) for kind in ("main", "interactions"))
        grid = np.full((len(factors), len(factors)), np.nan)
        for (i, one), (j, other) in itertools.product(enumerate(factors), repeat=2):
            value = main.get(one) if i == j else pairs.get(f"{one} x {other}", pairs.get(f"{other} x {one}"))
            grid[i, j] = np.nan if value is None else value
        limit = float(np.nanmax(np.abs(grid))) if not np.isnan(grid).all() else 1.0
        norm = TwoSlopeNorm(0.0, -(limit or 1.0), limit or 1.0)
        image = ax.imshow(grid, cmap="PuOr_r", norm=norm)
        for (i, j), value in np.ndenumerate(grid):
            if np.isnan(value):
                ax.plot([j], [i], **CROSS)
                continue
            dark = abs(value) > 0.65 * limit
            style = {"color": "white" if dark else BLACK, "fontweight": "bold" if i == j else "normal"}
            ax.text(j, i, signed(value), ha="center", va="center", fontsize=9, **style)
        ax.set_title(words, fontsize=10, loc="left")
        ax.set_xticks(range(len(factors)), factors, rotation=30, ha="right", fontsize=9)
        ax.set_yticks(range(len(factors)), factors, fontsize=9)
        ax.grid(visible=False)
        figure.colorbar(image, ax=ax, shrink=0.75, label=f"{words}: negative saves")
    return figure


# ------------------------------------------------------------------------------------------------------ command line


def figures_of(outputs: Path, experiment: str) -> dict[str, Callable[[], Figure | None]]:
    """File name -> function that draws it (None: the run folders hold nothing for it).

    Raises:
        SettingsError: an experiment of another name, or its comparison.json is missing.
    """
    kind = experiment.removeprefix("smoke_")
    if kind not in EXPERIMENTS:
        raise SettingsError(f"--experiment {experiment} is none of {', '.join(EXPERIMENTS)}, with or without smoke_")
    cases = tables.read_cases(outputs, experiment)
    if kind == "seed":
        return {
            "time_execution.png": lambda: time_figure(cases),
            "memory_per_phase.png": lambda: memory_figure(cases),
            "memory_against_speed.png": lambda: speed_figure(cases),
            "step_profile.png": lambda: profile_figure(cases),
        }
    if kind == "quality":
        loss, perplexity = "test loss (nats per token)", "test perplexity: exp(loss in nats per token)"
        return {
            "test_loss.png": lambda: quality_figure(cases, "Test loss", "test_loss", loss),
            "test_perplexity.png": lambda: quality_figure(cases, "Test perplexity", "test_perplexity", perplexity),
            "quality_against_updates.png": lambda: updates_figure(cases),
        }
    if kind == "max_batch":
        return {"max_batch.png": lambda: max_batch_figure(cases)}
    effects = read_json(Path(outputs) / experiment / "effects.json")
    subtitle = f"{words_of(cases, 'timed_steps', 'timed steps a case')} | {len(cases)} combinations"
    return {
        "interactions.png": lambda: interactions_figure(effects, subtitle),
        "memory_against_speed.png": lambda: speed_figure(cases),
    }


def plot_comparison(outputs: Path, experiment: str) -> list[Path]:
    """Write the figures of an experiment into its folder; returns the paths.

    Raises:
        SettingsError: a file that a figure needs is missing or damaged.
    """
    paths = []
    for name, draw in figures_of(outputs, experiment).items():
        try:
            figure = draw()
        except SettingsError:
            raise
        except (KeyError, ValueError, TypeError) as error:
            raise SettingsError(f"{Path(outputs) / experiment}: {name} cannot be drawn: {error!r}") from None
        if figure is None:
            print(f"{name}: no case of {experiment} has the files for it", file=sys.stderr)
        else:
            paths.append(save(figure, Path(outputs) / experiment / name))
    return paths


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 after an error sentence on standard error, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", nargs="?", type=Path, help="where the experiments' folders lie (default: outputs)")
    parser.add_argument("--output_folder", type=Path, help="the same as a flag")
    parser.add_argument("--experiment", help=f"only this one: {', '.join(EXPERIMENTS)}, or smoke_seed and so on")
    options = parser.parse_args(arguments)
    outputs = options.output_folder or options.outputs or Path("outputs")
    try:
        names = [prefix + name for prefix in ("", "smoke_") for name in EXPERIMENTS]
        found = [name for name in names if (outputs / name / "comparison.json").is_file()]
        if not found and options.experiment is None:
            raise SettingsError(f"{outputs} holds no experiment; run compare_techniques.py or name another folder")
        for name in [options.experiment] if options.experiment else found:
            print(*plot_comparison(outputs, name), sep="\n")
    except (SettingsError, OSError) as error:
        print(f"plot_comparison.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
