"""Loss and perplexity of the comparison's runs: seeds with equal updates, and larger batches on as many tokens.

plot_comparison.py draws them.
"""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

import report_comparison as tables
from figure_parts import BLACK, BLUE, CROSS, GREY, ORANGE, draw_cross, legend_below, new_figure, short
from plot_comparison_parts import (
    place_labels,
    plain_logarithm,
    rows_figure,
    words_of,
)
from report_comparison import Case, finished, mean, shown


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
