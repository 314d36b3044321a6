"""The bars of a comparison that plot_config.py read (speed, memory, MFU, time), and what a comparison is.

A label stands for one run or for several seeds of it; then a bar is their mean and each seed has a dot. MFU is drawn
against one denominator for all, the dense bf16 peak of the GPU.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from figure_parts import (
    CROSS,
    GREY,
    RED,
    caption,
    draw_cross,
    draw_missing,
    draw_spread,
    finish_rows,
    legend_below,
    new_figure,
    result,
    setting,
    short,
)
from run_results import Run
from utils import SettingsError, peak_tflops


@dataclass
class Group:
    """What one label stands for: a run, or several seeds of it."""

    label: str
    colour: str
    folders: list[Path]
    runs: list[Run] = field(default_factory=list)  # one a folder, once they are read

    @property
    def good(self) -> list[Run]:
        return [run for run in self.runs if status(run) == "ok"]

    @property
    def failed(self) -> str:
        """The statuses of the runs that did not end well, or ''."""
        counts = Counter(status(run) for run in self.runs if status(run) != "ok")
        many = len(self.runs) > 1
        return ", ".join(f"{name} ({count} of {len(self.runs)})" if many else name for name, count in counts.items())


@dataclass
class Comparison:
    """A configuration file as read."""

    path: Path
    title: str
    output_folder: Path
    figures: list[str]
    groups: list[Group]
    baseline: str | None
    warm_up_steps: int | None
    smoothing_steps: int

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def seeds(self) -> list[int]:
        """How many runs each label stands for."""
        return [len(group.runs) for group in self.groups]

    def name(self, group: Group) -> str:
        """The group's label, with its number of seeds where the labels have different ones."""
        many = len(group.runs) > 1 and len(set(self.seeds)) > 1
        return (
            f"{group.label} ({len(group.runs)}\u00a0seeds)" if many else group.label
        )  # glued: one word to a line break

    def seed_words(self, words: str) -> list[str]:
        """`words` on how seeds are drawn, with their number where it is the same; nothing without seeds."""
        if max(self.seeds) == 1:
            return []
        return [f"{self.seeds[0]} seeds each: {words}" if len(set(self.seeds)) == 1 else f"several seeds: {words}"]

    def compile_words(self) -> list[str]:
        """What the sums of time leave out: compilation before the first step, which run.json states apart."""
        times = {group.label: [result(run, "compile_s") for run in group.good] for group in self.groups}
        known = {label: [s for s in found if s is not None] for label, found in times.items()}
        words = [f"{label} {np.mean(found):.0f} s" for label, found in known.items() if found]
        return [f"not in the minutes: compiling before the first step ({', '.join(words)})"] if words else []

    @property
    def base(self) -> Group | None:
        return next((group for group in self.groups if group.label == self.baseline), None)


def status(run: Run) -> str:
    return run.info.get("status", "unknown")


# --------------------------------------------------------------------------------------------------------------------
# What is measured of a run
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """A median, its 20th and 80th percentile, and of how many steps; or one number alone."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None

    def times(self, factor: float) -> "Measured":
        ends = [None if end is None else end * factor for end in (self.low, self.high)]
        return Measured(self.value * factor, *ends, self.count)


def of_steps(run: Run, key: str, comparison: Comparison) -> Measured | None:
    """Median and percentiles of a key of steps.jsonl over the steps after warm-up; None where none has it."""
    rows = run.steps[comparison.warm_up_steps :]
    if run.steps and not rows:
        raise SettingsError(
            f"--config {comparison.path}: warm_up_steps {comparison.warm_up_steps} leaves none of the "
            f"{len(run.steps)} steps of {run.folder}; lower it"
        )
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return None
    low, median, high = np.percentile(values, (20, 50, 80))
    return Measured(float(median), float(low), float(high), len(values))


def step_time(run: Run, comparison: Comparison) -> Measured | None:
    """Milliseconds of a step after warm-up: of the file's, or, without warm_up_steps, of the run's own."""
    if comparison.warm_up_steps is not None:
        return of_steps(run, "step_ms", comparison)
    median, *ends = (result(run, f"step_ms_{name}") for name in ("median", "p20", "p80"))
    return None if median is None else Measured(median, *ends, result(run, "timed_steps"))


def speed(run: Run, comparison: Comparison) -> Measured | None:
    """Tokens per second, as `step_time`."""
    if comparison.warm_up_steps is not None:
        return of_steps(run, "tokens_per_s", comparison)
    rate, time = result(run, "tokens_per_s"), step_time(run, comparison)
    if rate is None or time is None or None in (time.low, time.high):
        return None if rate is None else Measured(rate, count=result(run, "timed_steps"))
    return Measured(rate, rate * time.value / time.high, rate * time.value / time.low, time.count)


def dense_peak(run: Run, precision: str) -> float | None:
    """Dense TFLOP/s of one GPU of the run in a precision; None where it is not known."""
    return peak_tflops(run.info.get("device_name") or "", precision)


def mfu(run: Run, comparison: Comparison) -> Measured | None:
    """Percent of the dense bf16 peak of the run's GPUs, whatever its own precision; None for an unknown GPU."""
    rate, flops, peak = speed(run, comparison), result(run, "flops_per_token"), dense_peak(run, "bf16")
    if None in (rate, flops, peak):
        return None
    return rate.times(100 * flops / (peak * 1e12 * (run.info.get("world_size") or 1)))


def is_fp8(run: Run) -> bool:
    return setting(run, "precision") == "fp8"


def mfu_of_fp8_peak(run: Run, comparison: Comparison) -> Measured | None:
    """Percent of the GPU's dense fp8 peak, as the run recorded it; for runs in fp8."""
    if comparison.warm_up_steps is not None:
        share = of_steps(run, "mfu", comparison)  # of its own precision's peak
    else:
        value = result(run, "mfu_fp8_peak")
        share = None if value is None else Measured(value, count=result(run, "timed_steps"))
    return None if share is None else share.times(100)


def of_results(key: str, count_key: str) -> Callable[[Run, Comparison], Measured | None]:
    """A number of run.json's results that has no percentiles."""

    def measure(run: Run, comparison: Comparison) -> Measured | None:
        value = result(run, key)
        return None if value is None else Measured(value, count=result(run, count_key))

    return measure


# --------------------------------------------------------------------------------------------------------------------
# Bars
# --------------------------------------------------------------------------------------------------------------------

RIGHT = {"color": RED, "ha": "right", "va": "center", "fontsize": 9}


@dataclass
class Bar:
    """One bar of a row: what it measures, what it is called where it is missing, how it is filled, for which runs."""

    measure: Callable[[Run, Comparison], Measured | None]
    name: str
    look: str = "filled"  # filled, outlined or hatched
    applies: Callable[[Run], bool] = lambda run: True

    def style(self, colour: str) -> dict[str, object]:
        if self.look == "filled":
            return {"color": colour}
        return {"facecolor": "white", "edgecolor": colour, "hatch": "////" if self.look == "hatched" else ""}

    def of(self, group: Group | None, comparison: Comparison) -> list[Measured]:
        """What the group's runs that ended well measured, where the bar applies; without the number, no place."""
        found = [self.measure(run, comparison) for run in (group.good if group else []) if self.applies(run)]
        return [measured for measured in found if measured is not None and math.isfinite(measured.value)]


def draw_group_bars(ax: Axes, comparison: Comparison, bars: Sequence[Bar], room: float) -> None:
    """One row a label, the first on top; the x axis is `room` times as long as the longest bar."""
    thickness, end = 0.72 / len(bars), 0.0
    across = ax.get_yaxis_transform()
    for row, group in enumerate(comparison.groups):
        if not group.good:
            draw_cross(ax, row, group.failed)
            continue
        own = [bar for bar in bars if any(map(bar.applies, group.good))]
        for place, bar in enumerate(own):
            y = row + (place - (len(own) - 1) / 2) * thickness
            found = bar.of(group, comparison)
            if not found:
                draw_missing(ax, y, f"{bar.name}: not recorded")
                continue
            mean = float(np.mean([measured.value for measured in found]))
            ax.barh(y, mean, height=0.94 * thickness, linewidth=1.4, **bar.style(group.colour))
            reach = [mean, *draw_seeds(ax, y, thickness, found)]
            base = bar.of(comparison.base, comparison)
            factor = mean / np.mean([measured.value for measured in base]) if base else None
            text = short(mean) + (f"   {factor:.2f}x" if factor and group is not comparison.base else "")
            style = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
            ax.annotate(text, (max(reach), y), (6, 0), **style)
            end = max(end, *reach)
            missing = sum(map(bar.applies, group.good)) - len(found)
            if missing:
                remark = f"{bar.name}: not recorded ({missing} of {len(group.runs)})"
                ax.text(0.995, y, remark, color=GREY, ha="right", va="center", fontsize=9, transform=across)
        if group.failed:  # of some seeds: the bar is the mean of the others
            ax.plot([0.985], [row], transform=across, **CROSS)
            ax.annotate(group.failed, (0.985, row), (-9, 0), across, textcoords="offset points", **RIGHT)
    finish_rows(ax, [comparison.name(group) for group in comparison.groups], end, room)


def draw_seeds(ax: Axes, y: float, thickness: float, found: Sequence[Measured]) -> list[float]:
    """The line of percentiles of a single run, or a dot and a thin line for each seed; returns how far they reach."""
    if len(found) == 1:
        (only,) = found
        if None not in (only.low, only.high):
            draw_spread(ax, only.low, only.high, y)
        return [only.value, only.high or 0.0]
    for measured, place in zip(found, np.linspace(-0.3, 0.3, len(found)), strict=True):
        at = y + place * thickness
        if None not in (measured.low, measured.high):
            ax.plot([measured.low, measured.high], [at, at], "-", color="black", linewidth=0.9)
        ax.plot([measured.value], [at], "o", color="white", markeredgecolor="black", markersize=4, markeredgewidth=1)
    return [value for measured in found for value in (measured.value, measured.high or 0.0)]


def bars_figure(
    comparison: Comparison,
    what: str,
    panels: Sequence[tuple[str, Sequence[Bar]]],
    unit: str,
    facts: Sequence[str],
) -> Figure:
    """Rows of bars; `panels` are (label of the x axis, bars of a row), n is that of the first panel's first bar."""
    counted = [m.count for group in comparison.groups for m in panels[0][1][0].of(group, comparison)]
    facts = [caption(comparison.runs, counted, unit), *facts]
    facts += comparison.seed_words("the bar is their mean, a dot is a seed")
    if comparison.base:
        facts.append(f"1.00x is {comparison.baseline}")
        if not panels[0][1][0].of(comparison.base, comparison):
            facts[-1] = f"no factors: {comparison.baseline} has no number"
    height = max(4.2, 2.1 + 0.2 * len(comparison.groups) * (1 + max(len(bars) for _, bars in panels)))
    figure, axes = new_figure(f"{what}: {comparison.title}", " | ".join(facts), len(panels), height)
    for ax, (label, bars) in zip(axes, panels, strict=True):
        draw_group_bars(ax, comparison, bars, 1.3 if len(panels) == 1 else 1.5)
        ax.set_xlabel(label)
        if len(bars) > 1:
            legend_below(figure, 2, [Patch(**bar.style(GREY), label=bar.name) for bar in bars])
    return figure


def rate_facts(comparison: Comparison) -> list[str]:
    """How warm-up was excluded, and what a bar and its line are."""
    left_out = f"warm-up: the first {comparison.warm_up_steps} steps are left out"
    facts = [left_out if comparison.warm_up_steps is not None else "warm-up: as the run itself left it out"]
    return [*facts, "median of steps; black line: 20th to 80th percentile"]


def speed_figure(comparison: Comparison) -> Figure:
    panels = [("training speed (tokens per second)", [Bar(speed, "tokens/s")])]
    return bars_figure(comparison, "Training speed", panels, "steps", rate_facts(comparison))


def memory_figure(comparison: Comparison) -> Figure:
    bars = [
        Bar(of_results(f"peak_{kind}_gib", "tracked_steps"), f"{kind}, peak", look)
        for kind, look in (("allocated", "filled"), ("reserved", "outlined"))
    ]
    return bars_figure(comparison, "Peak memory", [("peak memory (GiB)", bars)], "tracked steps (their maximum)", [])


def mfu_figure(comparison: Comparison) -> Figure:
    """One denominator for every run, so that bars compare; a run in fp8 has a second bar against the fp8 peak."""

    def named(peaks: dict[str, float | None]) -> str:
        known = {name: peak for name, peak in peaks.items() if peak is not None}
        one = len(set(known.values())) == 1
        words = (
            [f"{peak:g} TFLOP/s" for peak in set(known.values())]
            if one
            else [f"{name}: {peak:g} TFLOP/s" for name, peak in known.items()]
        )
        return ", ".join(words) + " per GPU" if known else "not known for this device"

    bf16 = named({str(run.info.get("device_name")): dense_peak(run, "bf16") for run in comparison.runs})
    bars = [Bar(mfu, "of the bf16 peak")]
    label = f"model FLOPs utilisation (% of the dense bf16 peak: {bf16})"
    in_fp8 = [run for run in comparison.runs if is_fp8(run)]
    if in_fp8:
        fp8 = named({str(run.info.get("device_name")): dense_peak(run, "fp8") for run in in_fp8})
        bars.append(Bar(mfu_of_fp8_peak, "of the fp8 peak, runs in fp8", "hatched", is_fp8))
        label += f"\nhatched: the same run, % of the dense fp8 peak: {fp8}"
    facts = [*rate_facts(comparison), "every precision against the same bf16 peak"]
    return bars_figure(comparison, "MFU", [(label, bars)], "steps", facts)


def time_figure(comparison: Comparison) -> Figure:
    """The time of a step, and of the whole training as the run recorded it."""
    counts = sorted({len(run.steps) for group in comparison.groups for run in group.good})
    steps = " to ".join(f"{count:,}" for count in dict.fromkeys((counts or [0])[:: max(1, len(counts) - 1)]))
    panels = [
        ("time per training step (ms)", [Bar(step_time, "step time")]),
        (
            f"training time (minutes) of {steps} steps,\nwith warm-up and waiting for data",
            [Bar(of_results("training_minutes", "steps"), "minutes")],
        ),
    ]
    facts = [*rate_facts(comparison), *comparison.compile_words()]
    return bars_figure(comparison, "Training time", panels, "steps in the left panel", facts)
