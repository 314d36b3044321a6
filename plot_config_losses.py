"""The loss curves of a comparison that plot_config.py read: against steps, tokens and minutes.

Of several seeds the mean is thick and each seed thin. With a baseline, a second panel shows how far each label lies
from it, seed by seed, beside how far the baseline's own seeds lie apart: what lies inside is no difference.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from figure_parts import CROSS, GREY, HEIGHT_INCHES, blank_figure, caption, legend_below, setting, tidy
from plot_config_bars import Comparison, Group, status
from run_results import Run
from utils import SettingsError

LINE_STYLES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))  # curves that coincide stay visible
X_LABELS = {
    "steps": "training step",
    "tokens": "training tokens seen",
    "minutes": "time of training steps (minutes): sum of step_ms, warm-up included, without waiting for data",
}

Curve = tuple[np.ndarray, np.ndarray]  # x and loss, each (points,)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of every `window` neighbours: (points,) to (points - window + 1,)."""
    return np.convolve(values, np.ones(window) / window, mode="valid")


def curve(run: Run, measure: str, comparison: Comparison) -> Curve | None:
    """The smoothed loss of a run against steps, tokens or minutes; None where steps.jsonl does not tell.

    A point is the mean of `smoothing_steps` losses, at the mean of their x.
    """
    key = {"steps": "step", "tokens": "tokens", "minutes": "step_ms"}[measure]
    if not run.steps or any(row.get(key) is None for row in run.steps):
        return None
    x = np.array([row[key] for row in run.steps], dtype=float)
    if measure == "minutes":
        x = np.cumsum(x) / 60_000
    loss = np.array([row.get("loss") for row in run.steps], dtype=float)  # None becomes nan, a gap in the line
    window = comparison.smoothing_steps
    if len(loss) < window:
        if status(run) != "ok":
            return None
        raise SettingsError(
            f"--config {comparison.path}: smoothing_steps {window} is more than the {len(loss)} steps of "
            f"{run.folder}; lower it"
        )
    return running_mean(x, window), running_mean(loss, window)


def mean_curve(group: Group, measure: str, comparison: Comparison) -> Curve | None:
    """The mean over the seeds that ended well, over the steps that all of them took."""
    curves = [found for run in group.good if (found := curve(run, measure, comparison)) is not None]
    if not curves:
        return None
    points = min(len(loss) for _, loss in curves)
    xs = np.array([x[:points] for x, _ in curves])
    if measure != "minutes" and np.ptp(xs, axis=0).max() > 0:
        raise SettingsError(
            f"--config {comparison.path}: the runs under the label {group.label} took different numbers of {measure}, "
            "so they are not seeds of one configuration; give each a label of its own"
        )
    return xs.mean(axis=0), np.mean([loss[:points] for _, loss in curves], axis=0)


def difference_curves(group: Group, measure: str, comparison: Comparison) -> list[Curve]:
    """Loss minus that of the baseline with the same seed, one curve for each seed that both have."""
    others = {setting(run, "seed"): curve(run, measure, comparison) for run in comparison.base.good}
    found = []
    for run in group.good:
        own, other = curve(run, measure, comparison), others.get(setting(run, "seed"))
        if own is not None and other is not None:
            points = min(len(own[0]), len(other[0]))
            if np.array_equal(own[0][:points], other[0][:points]):  # the same tokens at the same step
                found.append((own[0][:points], own[1][:points] - other[1][:points]))
    return found


def loss_figure(comparison: Comparison, measure: str) -> Figure:
    """Loss curves; against steps and tokens with a baseline also their difference to it, beside its seeds' spread."""
    window = comparison.smoothing_steps
    facts = [caption(comparison.runs, [len(run.steps) for run in comparison.runs], "steps")]
    facts.append(f"smoothing: running mean of {window} steps" if window > 1 else "smoothing: none")
    facts += comparison.seed_words("thick is their mean, thin is a seed")
    if measure == "minutes":
        facts += comparison.compile_words()
    below = comparison.base is not None and measure != "minutes"
    height = 7.6 if below else HEIGHT_INCHES
    figure = blank_figure(f"Training loss against {measure}: {comparison.title}", " | ".join(facts), height)
    axes = [
        tidy(ax)
        for ax in figure.subplots(1 + below, 1, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + below])[:, 0]
    ]
    handles = []
    for place, group in enumerate(comparison.groups):
        style = {"color": group.colour, "linestyle": LINE_STYLES[place % len(LINE_STYLES)]}
        handles += draw_curves(axes[0], group, measure, comparison, style)
    axes[0].set_ylabel("training loss (nats per token)")
    if below:
        handles += draw_differences(axes[1], measure, comparison)
    axes[-1].set_xlabel(X_LABELS[measure])
    axes[-1].set_xlim(left=0)
    if measure == "tokens":
        axes[-1].xaxis.set_major_formatter(EngFormatter())
    legend_below(figure, 4, handles)
    return figure


def draw_curves(ax: Axes, group: Group, measure: str, comparison: Comparison, style: dict) -> list[Line2D]:
    """A group's thin lines and its mean; what ended badly has a cross where it ended. Returns the legend's entries."""
    many = len(group.runs) > 1
    for run in group.runs:
        own = curve(run, measure, comparison)
        if own is None:
            continue
        if many or status(run) != "ok":
            ax.plot(*own, **style, linewidth=0.7, alpha=0.45)
        if status(run) != "ok":
            ax.plot(own[0][-1:], own[1][-1:], **CROSS)
    mean = mean_curve(group, measure, comparison)
    handles = []
    if mean is not None:
        ax.plot(*mean, **style, linewidth=1.8, label=comparison.name(group))
        handles.append(Line2D([], [], **style, linewidth=1.8, label=comparison.name(group)))
    elif group.good:
        handles.append(Line2D([], [], color=GREY, linestyle="none", label=f"{group.label}: not recorded"))
    if group.failed:
        (cross,) = ax.plot([], [], **CROSS, label=f"{group.label}: {group.failed}")
        handles.append(cross)
    return handles


def draw_differences(ax: Axes, measure: str, comparison: Comparison) -> list[Patch | Line2D]:
    """Each label's loss minus the baseline's, a line a seed; the band is how far the baseline's own seeds lie apart."""
    base, handles = comparison.base, []
    mean = mean_curve(base, measure, comparison)
    ax.axhline(0, color=base.colour, linewidth=1.2)
    ax.set_ylabel("difference (nats)")
    ax.set_title(f"loss minus that of {base.label}, of the same seed: a line a seed", loc="left", fontsize=10)
    seeds = [found[1] for run in base.good if (found := curve(run, measure, comparison)) is not None]
    if len(seeds) > 1:
        points = min(map(len, seeds))
        apart = np.array([loss[:points] for loss in seeds])
        apart = apart.max(axis=0) - apart.min(axis=0)
        ax.fill_between(mean[0][:points], -apart, apart, color=base.colour, alpha=0.18, linewidth=0)
        words = f"how far the seeds of {base.label} lie apart"
        handles.append(Patch(color=base.colour, alpha=0.18, label=words))
    for place, group in enumerate(comparison.groups):
        found = [] if group is base else difference_curves(group, measure, comparison)
        for own in found:
            ax.plot(*own, color=group.colour, linestyle=LINE_STYLES[place % len(LINE_STYLES)], linewidth=1.2)
        if not found and group is not base and group.good:
            words = f"{group.label}: no difference, {base.label} has no run of its seed at the same {measure}"
            handles.append(Line2D([], [], linestyle="none", label=words))
    return handles
