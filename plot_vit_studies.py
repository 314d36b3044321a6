"""The figures of vit_train.py's studies, and what they share with those of one run.

plot_vit.py draws them. A case that ended with `oom`, `error` or `unsupported` is a cross with its status, never left
out. Every seed is a dot; a mean of seeds never stands alone.
"""

import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from figure_parts import BLUE, GREEN, GREY, LINE_COLOURS, ORANGE, RED, blank_figure, caption, new_figure, short, tidy
from run_results import Case, Run
from vit_results import CONTROL, COURSE, random_heads, seed_noise, seeds_of, seen_by_chance, steady_minutes

COLOURS = (*LINE_COLOURS, "#A0522D")  # as many as the ablation has cases
LATE = 0.4  # of the epochs are left out where curves are compared
SCORER_STYLES = {  # of mixed tokens: words, colour, marker
    "pixel_blur": ("mixed, split by pixel blur", ORANGE, "s"),
    "random": ("mixed, split at random", GREY, "^"),
    "trained": ("mixed, split by a trained network", GREEN, "D"),
}


# --------------------------------------------------------------------------------------------------------------------
# What the figures share
# --------------------------------------------------------------------------------------------------------------------


def study_caption(cases: Sequence[Case]) -> str:
    """Device, precision, batch, data set and the number of seeds of all cases that ran."""
    known = [case for case in cases if case.info]
    runs = [Run(case.name, Path(), case.info, [], [], []) for case in known]
    epochs = {row["epochs"] for case in known for row in case.results.get("seeds") or []}
    words = f" | {min(epochs)} epoch{'s' * (min(epochs) > 1)}" if len(epochs) == 1 else ""
    return caption(runs, [case.results.get("seed_count") for case in known], "seeds a case") + words


def data_of(cases: Sequence[Case]) -> str:
    """The data set's name."""
    return next((case.info["dataset"]["name"] for case in cases if case.info.get("dataset")), "?")


def mean_curve(epochs: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Epochs, and the mean of the seeds in each where every seed has a value."""
    seeds = {row["seed"] for row in epochs}
    found: dict[int, list[float]] = {}
    for row in epochs:
        if row.get(key) is not None:
            found.setdefault(row["epoch"], []).append(row[key])
    points = [(epoch, float(np.mean(values))) for epoch, values in sorted(found.items()) if len(values) == len(seeds)]
    return [x for x, _ in points], [y for _, y in points]


def legend_below(figure: Figure, axes: Sequence[Axes], columns: int = 4) -> None:
    """One legend under all axes, each label once."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        place = {"loc": "outside lower center", "frameon": False}
        figure.legend(entries.values(), entries.keys(), ncols=columns, fontsize=9, **place)


# --------------------------------------------------------------------------------------------------------------------
# Cases one below the other
# --------------------------------------------------------------------------------------------------------------------


def case_rows(ax: Axes, cases: Sequence[Case]) -> None:
    """Rows with the cases' names and words, the first on top."""
    ax.set_yticks(range(len(cases)), [f"{case.name}\n{textwrap.fill(case.words, 32)}" for case in cases], fontsize=8)
    ax.set_ylim(len(cases) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")


def cross(ax: Axes, row: float, status: str, at: float = 0.03) -> None:
    """A case without a result: a red cross and its status in its row; `at` is a part of the axis, beyond 1 outside."""
    across = ax.get_yaxis_transform()
    ax.plot([at], [row], "x", color=RED, markersize=9, markeredgewidth=2, transform=across, clip_on=False)
    ax.text(at + 0.03, row, status, color=RED, fontsize=9, va="center", transform=across)


def ablation_accuracy(cases: Sequence[Case]) -> Figure:
    """Test accuracy of each case: every seed, the mean, and how far from the control noise leads.

    What the course project had stands beside it, on an axis of its own.
    """
    data = data_of(cases)
    title = f"Test accuracy with each combination of techniques: {data} (the axes do not begin at 0)"
    figure = blank_figure(title, study_caption(cases), 1.8 + 0.52 * len(cases))
    known = COURSE.get(data, {})
    theirs, ax = (tidy(axes) for axes in figure.subplots(1, 2, sharey=True, width_ratios=[1, 2.2]))
    control = next((case for case in cases if case.name == CONTROL and case.ok), None)
    if control is not None:
        values = seeds_of(control.results, "test_accuracy")
        chance = seen_by_chance(seed_noise([case.results for case in cases if case.ok]), len(values), len(values))
        if not math.isnan(chance):
            low, high = (100 * (statistics.fmean(values) + sign * chance) for sign in (-1, 1))
            words = f"{CONTROL} +/- {100 * chance:.2f}: what seeds alone do, 95 of 100 times"
            ax.axvspan(low, high, color=BLUE, alpha=0.12, label=words)
    labelled: set[str] = set()

    def once(words: str) -> str | None:
        return None if words in labelled else labelled.add(words) or words

    for row, case in enumerate(cases):
        if not case.ok:
            cross(ax, row, case.status, 1.02)
        else:
            values = [100 * value for value in seeds_of(case.results, "test_accuracy")]
            mean = float(np.mean(values))
            ax.plot([min(values), max(values)], [row, row], color=BLUE, linewidth=1, label=once("range of the seeds"))
            ax.plot(values, [row] * len(values), "o", color=BLUE, markersize=5, alpha=0.8, label=once("each seed"))
            ax.plot(
                [mean], [row], "|", color="black", markersize=15, markeredgewidth=2, label=once("mean of the seeds")
            )
            ax.text(1.01, row, f"{mean:.2f} %", fontsize=9, va="center", transform=ax.get_yaxis_transform())
        if case.name in known:
            accuracy, _, epochs = known[case.name]
            words = "course project: one seed, best epoch on the test set"
            theirs.plot([accuracy], [row], "D", color=ORANGE, markersize=6, label=once(words))
            text = f"{accuracy:.2f}" + (f"\n({epochs} of 50 epochs)" if epochs < 50 else "")
            theirs.annotate(text, (accuracy, row), (7, 0), textcoords="offset points", fontsize=8, va="center")
    case_rows(theirs, cases)
    ax.grid(visible=False, axis="y")
    ax.tick_params(labelleft=False)
    ax.margins(x=0.08)
    theirs.margins(x=0.35)
    theirs.set_xlabel("course project (%)")
    ax.set_xlabel("here: test accuracy (%), with the weights of the best epoch on validation")
    legend_below(figure, [ax, theirs], 3)
    return figure


def curves_figure(cases: Sequence[Case]) -> Figure:
    """Validation accuracy and training loss against epochs, the mean of the seeds of each case.

    Of a long training the last part is shown, because all begin alike.
    """
    last = max((row["epoch"] for case in cases if case.ok for row in case.epochs), default=0)
    first = LATE * last if last >= 20 else 0
    words = f" from epoch {first:.0f} on" if first else ""
    figure = blank_figure(
        f"Validation accuracy and training loss{words}, means of seeds (dashed: mixed tokens, dotted: their control)",
        study_caption(cases),
        6.0,
    )
    axes = [tidy(ax) for ax in figure.subplots(1, 2)]
    for ax, key, scale in zip(axes, ("validation_accuracy", "train_loss"), (100, 1), strict=True):
        for number, case in enumerate(cases):
            if not case.ok:
                label = f"{case.name}: {case.status}"
                ax.plot([], [], "x", color=RED, label=label)
                continue
            x, y = mean_curve([row for row in case.epochs if row["epoch"] >= first], key)
            style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.4}
            dashes = ":" if case.name == "centres" else "--" if "mixed" in case.name else "-"
            style |= {"linestyle": dashes, "marker": "." if len(x) <= 10 else None}
            ax.plot(x, [scale * value for value in y], label=case.name, **style)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[0].set_ylabel("validation accuracy (%)")
    axes[1].set_ylabel("training loss (nats, soft targets)")
    legend_below(figure, axes, 5)
    return figure


def cost_figure(cases: Sequence[Case]) -> Figure:
    """Training minutes, images/s and peak GiB of each case, and what that is against the control."""
    height = 1.7 + 0.45 * len(cases)
    figure, axes = new_figure(
        "Cost of each combination (x: times that of the control)", study_caption(cases), 3, height
    )
    control = next((case for case in cases if case.name == CONTROL and case.ok), None)
    columns = (
        ("training_minutes", "training of a seed (minutes), without\nits first step, which compiles"),
        ("images_per_s", "images/s of a step, without\naugmenting and cutting tokens"),
        ("peak_allocated_gib", "peak of a step (GiB)"),
    )

    def found(case: Case, key: str) -> tuple[float | None, list[float]]:
        """The mean, and the value of each seed."""
        if key == "training_minutes":
            values = steady_minutes(case.results)
            return (float(np.mean(values)) if values else None), values
        return case.results.get(key), seeds_of(case.results, key)

    for ax, (key, label) in zip(axes, columns, strict=True):
        end = 0.0
        base = None if control is None else found(control, key)[0]
        for row, case in enumerate(cases):
            value, values = found(case, key)
            if not case.ok:
                cross(ax, row, case.status)
                continue
            if value is None:
                ax.text(
                    0.02, row, "not measured", color=GREY, fontsize=8, va="center", transform=ax.get_yaxis_transform()
                )
                continue
            ax.barh(row, value, 0.7, color=GREY if case.name == CONTROL else BLUE)
            if len(values) > 1:
                ax.plot([min(values), max(values)], [row, row], "|-", color="black", linewidth=1.2, markersize=7)
            at = max([value, *values])
            text = short(value) + (f" (x {value / base:.2f})" if base and case is not control else "")
            ax.annotate(text, (at, row), (4, 0), textcoords="offset points", fontsize=8, va="center")
            end = max(end, at)
        case_rows(ax, cases)
        ax.set_xlim(0, 1.65 * end or 1.0)
        ax.set_xlabel(label)
        ax.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def layer_squares(case: Case, key: str = "head_correlation") -> np.ndarray | None:
    """(layers,): C^2 of each layer, mean of the seeds."""
    found = [row[key]["squares"] for row in case.results.get("seeds") or [] if row.get(key)]
    return np.mean(np.array(found), axis=0) if case.ok and found else None


def log_scale(ax: Axes) -> None:
    """A logarithmic y axis, where anything is drawn that it can show."""
    if any(np.any(np.asarray(line.get_ydata(), dtype=float) > 0) for line in ax.lines):
        ax.set_yscale("log")


def random_line(ax: Axes, cases: Sequence[Case]) -> None:
    """The C^2 of random heads, once for each shape."""
    levels = sorted({level for case in cases if (level := random_heads(case.info)) is not None})
    for number, level in enumerate(levels):
        style = {"color": "black", "linestyle": (":", "-.")[min(number, 1)], "linewidth": 1.2}
        ax.axhline(level, label=f"random heads, 1 / (tokens x head dim) = {level:.1e}", **style)


def study_correlation(cases: Sequence[Case]) -> Figure:
    """C^2 after training by layer, with and without DeCAtt, and DeCAtt's term over the training."""
    figure = blank_figure("Correlation C^2 of heads' outputs, means of the seeds", study_caption(cases), 6.2)
    left, right = (tidy(ax) for ax in figure.subplots(1, 2))
    for number, case in enumerate(cases):
        colour = COLOURS[number % len(COLOURS)]
        with_term = bool(case.info.get("decatt_weight"))
        values = layer_squares(case)
        if not case.ok:
            left.plot([], [], "x", color=RED, label=f"{case.name}: {case.status}")
        elif values is not None:
            style = {"marker": "o" if with_term else "s", "linestyle": "-" if with_term else "--", "markersize": 4}
            left.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.2, label=case.name, **style)
        if case.ok and with_term:
            x, y = mean_curve(case.epochs, "decorrelation")
            right.plot(x, y, color=colour, label=case.name, marker="o" if len(x) <= 10 else None, markersize=4)
    if not right.lines:
        right.text(0.5, 0.5, "no case with DeCAtt ended well", ha="center", transform=right.transAxes, color=GREY)
    for ax in (left, right):
        random_line(ax, [case for case in cases if case.ok])
        log_scale(ax)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left.set(xlabel="layer", ylabel="C^2, mean over pairs and images (log)")
    left.set_title("after training (solid: with DeCAtt, dashed: without)", fontsize=9.5, loc="left")
    right.set(xlabel="epoch", ylabel="DeCAtt's term, mean over layers (log)")
    right.set_title("the term while training", fontsize=9.5, loc="left")
    legend_below(figure, [left, right], 4)
    return figure


# --------------------------------------------------------------------------------------------------------------------
# Tokens and weights
# --------------------------------------------------------------------------------------------------------------------


def token_count(case: Case) -> int:
    """Tokens of an image, of a case that failed from its name: grid-36, mixed-49-random."""
    return int((case.info.get("model") or {}).get("num_tokens") or case.name.split("-")[1])


def token_kind(case: Case) -> tuple[str, str, str]:
    """Words, colour and marker of a case of the study of tokens."""
    if case.name.startswith("grid"):
        return "regular grid", BLUE, "o"
    parts = case.name.split("-")
    scorer = (case.info.get("tokens") or {}).get("scorer") or (parts[2] if len(parts) > 2 else "pixel_blur")
    return SCORER_STYLES[scorer]


def by_kind(cases: Sequence[Case], kind: Callable[[Case], Any]) -> dict[Any, list[Case]]:
    found: dict[Any, list[Case]] = {}
    for case in cases:
        found.setdefault(kind(case), []).append(case)
    return found


def seed_points(ax: Axes, cases: Sequence[Case], where: Callable[[Case], float], label: str, **style: Any) -> None:
    """Mean test accuracy of cases along x as a line, every seed as a pale dot; a case that failed is a cross on top."""
    done = [case for case in cases if case.ok]
    points = [(where(case), 100 * case.results["test_accuracy"]) for case in done]
    if points:
        line = "-" if len(points) > 1 else "none"
        ax.plot(*zip(*points, strict=True), linestyle=line, linewidth=1.4, markersize=7, label=label, **style)
    for case in done:
        values = [100 * value for value in seeds_of(case.results, "test_accuracy")]
        ax.plot([where(case)] * len(values), values, style["marker"], color=style["color"], markersize=4, alpha=0.45)
    for case in cases:
        if not case.ok:
            words = {"label": f"{case.name}: {case.status}", "transform": ax.get_xaxis_transform(), "zorder": 5}
            ax.plot([where(case)], [1.0], "x", color=RED, markersize=9, markeredgewidth=2, clip_on=False, **words)


def tokens_accuracy(cases: Sequence[Case]) -> Figure:
    """Test accuracy against the number of tokens, regular grids and mixed tokens by scorer."""
    title = f"Test accuracy against the number of tokens: {data_of(cases)} (the axis does not begin at 0)"
    figure, (ax,) = new_figure(title, study_caption(cases))
    kinds = by_kind(cases, token_kind)
    order = ["regular grid", *(words for words, *_ in SCORER_STYLES.values())]

    def place(case: Case) -> float:
        """Its number, shifted by its rank among the kinds that have this number."""
        there = {token_kind(other)[0] for other in cases if token_count(other) == token_count(case)}
        return token_count(case) + 0.35 * sorted(there, key=order.index).index(token_kind(case)[0])

    for words, colour, marker in sorted(kinds, key=lambda kind: order.index(kind[0])):
        own = sorted(kinds[words, colour, marker], key=token_count)
        seed_points(ax, own, place, words, color=colour, marker=marker)
    ax.set_xticks(sorted({token_count(case) for case in cases}))
    ax.set(xlabel="tokens of an image (points of one number stand side by side); pale: each seed")
    ax.set_ylabel("test accuracy (%)")
    legend_below(figure, [ax])
    return figure


def tokens_time(cases: Sequence[Case]) -> Figure:
    """Milliseconds of a training step and, on top, of cutting tokens, case by case in order of tokens."""
    ordered = sorted(cases, key=lambda case: (token_count(case), case.name))
    figure, (ax,) = new_figure("Time of a training step against the number of tokens", study_caption(cases))
    parts = ("step_ms_median", "tokenise_ms_median")
    top = max((sum(case.results.get(key) or 0 for key in parts) for case in ordered if case.ok), default=0) or 1.0
    for place, case in enumerate(ordered):
        step, cut = case.results.get("step_ms_median"), case.results.get("tokenise_ms_median")
        if not case.ok or step is None:
            ax.plot([place], [0.05 * top], "x", color=RED, markersize=9, markeredgewidth=2)
            words = "not measured" if case.ok else case.status
            ax.text(place, 0.1 * top, words, color=RED, fontsize=9, ha="center", rotation=90)
            continue
        colour = token_kind(case)[1]
        ax.bar(place, step, 0.75, color=colour)
        ax.bar(place, cut or 0, 0.75, bottom=step, color="white", edgecolor=colour, hatch="////")
        values = seeds_of(case.results, "step_ms_median")
        if len(values) > 1:
            ax.plot([place, place], [min(values), max(values)], "_-", color="black", linewidth=1.2, markersize=7)
        text = f"{short(step)}\n+ {short(cut)}" if cut else short(step)
        at = (place, max([step + (cut or 0), *values]))
        ax.annotate(text, at, (0, 3), textcoords="offset points", fontsize=8.5, ha="center")
    names = [f"{token_count(case)} tokens\n{case.name}" for case in ordered]
    ax.set_xticks(range(len(ordered)), names, fontsize=8)
    ax.set_ylabel("median time (ms)")
    ax.set_ylim(0, 1.2 * top)
    handles = [
        Patch(color=GREY, label="training step"),
        Line2D([], [], color="black", linewidth=1.2, label="its range over the seeds"),
        Patch(facecolor="white", edgecolor=GREY, hatch="////", label="cutting the tokens"),
    ]
    figure.legend(handles=handles, loc="outside lower center", frameon=False, ncols=3, fontsize=9)
    ax.grid(visible=False, axis="x")
    return figure


def weight_of(case: Case) -> float:
    """DeCAtt's weight, of a case that failed from its name: weight-10-first-3."""
    return float(case.info.get("decatt_weight") or case.name.split("-")[1])


def is_first_layers(case: Case) -> bool:
    return "first" in case.name


def weights_figure(cases: Sequence[Case], control: Case | None) -> Figure:
    """Test accuracy, and C^2 after training, against DeCAtt's weight; the control without it as a band."""
    title = f"Weight of DeCAtt: {data_of(cases)} (the axis of accuracy does not begin at 0)"
    figure = blank_figure(title, study_caption(cases))
    left, right = (tidy(ax) for ax in figure.subplots(1, 2))
    groups = by_kind(cases, is_first_layers)
    for first, own in groups.items():
        own = sorted(own, key=weight_of)
        layers = next((case.info["model"].get("decorrelated_layers") for case in own if case.info.get("model")), "?")
        words = f"first {layers} layers" if first else "every layer"
        colour, marker, by = (ORANGE, "D", 1.12) if first else (BLUE, "o", 1.0)
        seed_points(left, own, lambda case, by=by: by * weight_of(case), words, color=colour, marker=marker)
        for case in own:
            found = [row["head_correlation"] for row in case.results.get("seeds") or [] if row.get("head_correlation")]
            values = [float(np.mean(row["squares"])) for row in found]
            right.plot([by * weight_of(case)] * len(values), values, marker, color=colour, markersize=4, alpha=0.45)
        points = [
            (by * weight_of(case), case.results["head_correlation_squares"])
            for case in own
            if case.ok and case.results.get("head_correlation_squares") is not None
        ]
        if points:
            right.plot(
                *zip(*points, strict=True), color=colour, marker=marker, markersize=7, linewidth=1.4, label=words
            )
    if control is not None:
        values = [100 * value for value in seeds_of(control.results, "test_accuracy")]
        name = f"without DeCAtt (ablation, {control.name}): mean and range"
        left.axhspan(min(values), max(values), color=GREY, alpha=0.25)
        left.axhline(float(np.mean(values)), color=GREY, label=name)
        if control.results.get("head_correlation_squares"):
            right.axhline(control.results["head_correlation_squares"], color=GREY, label=name)
    random_line(right, [case for case in cases if case.ok])
    weights = sorted({weight_of(case) for case in cases})
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_xticks(weights, [f"{weight:g}" for weight in weights])
        ax.minorticks_off()
        ax.set_xlim(min(weights) / 1.8, max(weights) * 1.8)
        ax.set_xlabel("weight of the term (log); pale: each seed")
    left.set_ylabel("test accuracy (%)")
    log_scale(right)
    right.set_ylabel("C^2 after training, mean over layers (log)")
    legend_below(figure, [left, right], 2)
    return figure
