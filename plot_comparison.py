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
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

import report_comparison as tables
from figure_parts import (
    BLACK,
    BLUE,
    CROSS,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    YELLOW,
    draw_bars,
    draw_cross,
    legend_below,
    new_figure,
    save,
    short,
)
from plot_comparison_parts import (
    BROWN,
    COLOURS,
    MARKERS,
    WINE,
    as_runs,
    name_lines,
    place_labels,
    plain_logarithm,
    rows_figure,
    words_of,
)
from plot_comparison_quality import quality_figure, updates_figure
from report_comparison import Case, effects_of, read_json, signed
from utils import SettingsError

EXPERIMENTS = ("seed", "factorial", "max_batch", "quality")


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
