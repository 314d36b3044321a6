"""The figures of patchtst_train.py's experiments: sweeps, horizons, pruning and the break-even of fused attention.

plot_patchtst.py draws them. A case that ended with `oom`, `error` or `unsupported` is a cross with its status.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from figure_parts import BLUE, DPI, GREEN, GREY, LINE_COLOURS, ORANGE, RED, WIDTH_INCHES, new_figure
from run_results import Case, by_prefix, read_run, time_saved

KINDS = {"vanilla": ("textbook attention", BLUE), "flash": ("flash attention", ORANGE), "auto": ("auto", GREEN)}
SWEEPS = {  # experiment: file, title, label of the x axis
    "patch_size": ("patchsize_plot.png", "Patch length", "patch length (rows); tokens of a sequence"),
    "batch_size": ("batchsize_plot.png", "Batch size", "batch size (windows)"),
    "num_workers": ("numworkers_plot.png", "Worker processes", "worker processes that cut windows"),
}
PUBLISHED = {  # Nie et al. 2023, table 3: test MSE of PatchTST/42 and /64
    "ETTh1": {96: (0.375, 0.370), 192: (0.414, 0.413), 336: (0.431, 0.422), 720: (0.449, 0.447)},
    "ETTm1": {96: (0.290, 0.293), 192: (0.332, 0.333), 336: (0.366, 0.369), 720: (0.420, 0.416)},
}
RATIOS = (0.1, 0.2, 0.5, 1, 2, 5, 10)  # ticks of the break-even


def mark_removals(ax: Axes, epochs: Sequence[dict[str, Any]], label: str | None, colour: str = GREY) -> None:
    """A thin line before each epoch that begins with fewer heads than the one before."""
    for before, after in itertools.pairwise(epochs):
        if sum(after.get("heads", [])) < sum(before.get("heads", [])):
            ax.axvline(after["epoch"] - 0.5, color=colour, linewidth=0.8, label=label)
            label = None


# --------------------------------------------------------------------------------------------------------------------
# Sweeps
# --------------------------------------------------------------------------------------------------------------------


def facts(cases: Sequence[Case]) -> str:
    """Device, precision, data set and what does not change over the cases."""
    known = [case.info for case in cases if case.info]
    parts = []
    for values in (
        [info.get("device_name") for info in known],
        [info.get("precision") for info in known],
        [(info.get("dataset") or {}).get("name") for info in known],
    ):
        parts += [", ".join(dict.fromkeys(str(value) for value in values if value))]
    model = [info.get("model") or {} for info in known]
    for key, word in (("context_length", "context"), ("patch_length", "patches of"), ("embedding_dim", "width")):
        values = {shape.get(key) for shape in model}
        parts += [f"{word} {values.pop()}"] if len(values) == 1 else []
    batches = {info.get("batch_size") for info in known}
    parts += [f"batch {batches.pop()}"] if len(batches) == 1 else []
    return " | ".join(part for part in parts if part)


def kernel_names(cases: Sequence[Case]) -> str:
    """The attention backends of these cases."""
    names = (case.info.get("model", {}).get("attention_backend") for case in cases)
    return ", ".join(dict.fromkeys(name for name in names if name)) or "did not run"


def sweep_figure(name: str, cases: Sequence[Case]) -> Figure:
    """Seconds of an epoch, data on top of compute, for each kernel; beside it the time that fused attention saves."""
    _, title, x_label = SWEEPS[name]
    rows: dict[str, dict[str, Case]] = {}
    for case in cases:
        _, value, kind = case.name.rsplit("-", 2)
        rows.setdefault(value, {})[kind] = case
    kinds = [kind for kind in KINDS if any(kind in row for row in rows.values())]
    timed = [case.results.get("timed_epochs") or 0 for case in cases if case.ok] or [0]
    count = str(timed[0]) if len(set(timed)) == 1 else f"{min(timed)} to {max(timed)}"
    kernels = {kind: kernel_names([row[kind] for row in rows.values() if kind in row]) for kind in kinds}
    figure = Figure(figsize=(WIDTH_INCHES, 5.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    figure.suptitle(
        f"{title}: time of a training epoch, median of n = {count} epochs and their range\n{facts(cases)}",
        fontsize=10.5,
        x=0.01,
        ha="left",
    )
    width, places = 0.8 / len(kinds), np.arange(len(rows))
    top = max((seconds for case in cases if case.ok for seconds in case.epoch_totals), default=1.0)
    for number, kind in enumerate(kinds):
        for place, row in zip(places, rows.values(), strict=True):
            case = row.get(kind)
            at = place + (number - (len(kinds) - 1) / 2) * width
            if case is None:
                continue
            if not case.ok or case.results.get("epoch_total_s") is None:
                left.plot([at], [0.04 * top], "x", color=RED, markersize=9, markeredgewidth=2)
                left.text(at, 0.07 * top, case.status, color=RED, fontsize=8, ha="center", rotation=90)
                continue
            compute, data = case.results["epoch_compute_s"], case.results["epoch_data_s"]
            left.bar(at, compute, 0.92 * width, color=KINDS[kind][1])
            left.bar(at, data, 0.92 * width, bottom=compute, color="white", edgecolor=KINDS[kind][1], hatch="////")
            total = compute + data
            least, most = min(case.epoch_totals, default=total), max(case.epoch_totals, default=total)
            left.plot([at, at], [least, most], color="black", linewidth=1)
            words = f"{total:.2f}" if total < 10 else f"{total:.1f}"
            left.text(at, max(total, most) + 0.01 * top, words, fontsize=7.5, ha="center")
    labels = []
    for value, row in rows.items():
        case = next(iter(row.values()))
        shape = case.info.get("model") or {}
        tokens = ""
        if name == "patch_size" and shape:
            count = (
                (shape["context_length"] - shape["patch_length"]) // shape["patch_stride"] + 1 + shape["end_padding"]
            )
            tokens = f"\n{count} tokens"
        labels.append(f"{value}{tokens}")
    left.set_xticks(places, labels, fontsize=9)
    left.set(xlabel=x_label, ylabel="seconds of an epoch", ylim=(0, 1.1 * top or 1.0))
    handles = [Patch(color=KINDS[kind][1], label=f"{KINDS[kind][0]} ({kernels[kind]})") for kind in kinds]
    handles.append(Patch(facecolor="white", edgecolor="black", hatch="////", label="waiting for data, on top"))
    hollow = False
    for number, kind in enumerate(kind for kind in kinds if kind != "vanilla"):
        points = []
        for place, row in zip(places, rows.values(), strict=True):
            saved = time_saved(row.get(kind), row.get("vanilla"))
            if saved is not None:
                points.append((place + 0.08 * number, 100 * saved[0], saved[1]))
        colour = KINDS[kind][1]
        if points:
            right.plot(*zip(*[point[:2] for point in points], strict=True), "-", color=colour)
        for x, y, clear in points:
            right.plot([x], [y], "o", color=colour, markerfacecolor=colour if clear else "white")
        if not all(clear for _, _, clear in points):
            hollow = True
    if hollow:
        right.set_title("hollow: not every timed epoch says so", fontsize=9, loc="left")
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(places, list(rows), fontsize=9)
    right.set(xlabel=x_label.split(";")[0], ylabel="time saved against textbook attention (%)")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
        ax.grid(alpha=0.25, axis="y")
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9.5, frameon=False)
    return figure


# --------------------------------------------------------------------------------------------------------------------
# Horizons
# --------------------------------------------------------------------------------------------------------------------


def horizon_figure(cases: Sequence[Case]) -> Figure:
    """Test MSE of every seed and their mean by horizon, beside the published figures; the axis does not begin at 0.

    The published figures count whole batches of 128 windows only; a diamond is the mean of the seeds on these.
    """
    groups = by_prefix(cases)
    data = next((case.info["dataset"]["name"] for case in cases if case.info), "?")
    context = next((case.info["model"]["context_length"] for case in cases if case.info), "?")
    title = f"Test MSE by horizon: {data}, context {context} (the axis does not begin at 0)"
    figure, (ax,) = new_figure(title, facts(cases))
    ax.set(
        xlabel="horizon (rows); below it the MSE of repeating the last day", ylabel="test MSE, standardised channels"
    )
    labels, lowest, highest = [], [], []
    for place, (name, group) in enumerate(groups.items()):
        horizon = int(name.rsplit("-", 1)[1])
        values = [case.results["test_mse"] for case in group if case.ok]
        first = place == 0
        for number, (label, colour) in enumerate((("PatchTST/42, published", ORANGE), ("PatchTST/64, published", RED))):
            if data in PUBLISHED and horizon in PUBLISHED[data]:
                value = PUBLISHED[data][horizon][number]
                style = {"color": colour, "linewidth": 2, "linestyle": ("-", ":")[number]}
                ax.hlines(value, place - 0.3, place + 0.3, label=label if first else None, **style)
                lowest.append(value)
                highest.append(value)
        if values:
            spread = [place - 0.08 + 0.16 * i / max(1, len(values) - 1) for i in range(len(values))]
            ax.plot(
                spread, values, "o", color=BLUE, markersize=5, label=f"each of {len(values)} seeds" if first else None
            )
            mean = float(np.mean(values))
            ax.hlines(
                mean, place - 0.2, place + 0.2, color=BLUE, linewidth=2, label="mean of the seeds" if first else None
            )
            ax.annotate(f"{mean:.4f}", (place + 0.32, mean), fontsize=9.5, va="center", color=BLUE)
            whole = [(case.results.get("test_in_whole_batches") or {}).get("mse") for case in group if case.ok]
            if None not in whole:
                label = "mean, windows of whole batches of 128 only" if first else None
                ax.plot([place], [np.mean(whole)], "D", color="black", markerfacecolor="white", label=label)
                values += [float(np.mean(whole))]
            lowest.append(min(values))
            highest.append(max(values))
        failed = sorted({case.status for case in group if not case.ok})
        if failed:
            ax.plot([place], [0.04], "x", color=RED, markersize=9, transform=ax.get_xaxis_transform())
            ax.text(place + 0.05, 0.04, ", ".join(failed), color=RED, transform=ax.get_xaxis_transform())
        day = [(case.results.get("baselines") or {}).get("repeat last day") for case in group if case.ok]
        labels.append(f"{horizon}\n{day[0]['mse']:.4f}" if day and day[0] else str(horizon))
    ax.set_xticks(range(len(groups)), labels)
    ax.set_xlim(-0.6, len(groups) - 0.2)
    if lowest:
        margin = 0.12 * (max(highest) - min(lowest)) + 0.005
        ax.set_ylim(min(lowest) - margin, max(highest) + margin)
    ax.grid(visible=False, axis="x")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9.5, frameon=False)
    return figure


def curves_figure(cases: Sequence[Case]) -> Figure:
    """Train and validation MSE against epochs, a panel for each horizon, a line for each seed."""
    groups = by_prefix(cases)
    figure, axes = new_figure("Training and validation MSE by epoch", facts(cases), len(groups))
    for ax, (name, group) in zip(axes, groups.items(), strict=True):
        for number, case in enumerate(group):
            for key, colour, label in (("train_mse", BLUE, "training"), ("validation_mse", ORANGE, "validation")):
                points = [(row["epoch"], row[key]) for row in case.epochs if row.get(key) is not None]
                if points:
                    ax.plot(*zip(*points, strict=True), color=colour, linewidth=1, alpha=0.8,
                            label=f"{label}, each seed" if number == 0 else None)  # fmt: skip
            best = case.results.get("best_epoch")
            if best:
                ax.plot([best], [case.results["validation_mse"]], "v", color=RED, markersize=6,
                        label="best validation" if number == 0 else None)  # fmt: skip
        ax.set_title(name.replace("-", " "), fontsize=10)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[0].set_ylabel("MSE of the standardised channels")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9.5, frameon=False)
    return figure


# --------------------------------------------------------------------------------------------------------------------
# Pruning
# --------------------------------------------------------------------------------------------------------------------


def first_training(group: Sequence[Case], whole: Sequence[Case]) -> int:
    """Epochs before heads are removed: those of the whole model where it ran, else up to the first removal."""
    lengths = [len(case.epochs) for case in whole if case.ok]
    if lengths:
        return min(lengths)
    for case in group:
        for before, after in itertools.pairwise(case.epochs):
            if sum(after.get("heads", [])) < sum(before.get("heads", [])):
                return before["epoch"]
    return min((len(case.epochs) for case in group), default=0)


def pruning_figure(cases: Sequence[Case]) -> Figure:
    """Validation MSE against epochs (mean of the seeds), before and after heads are removed; test MSE of every seed.

    Above on the left the first training, which a case of dynamic pruning shares with the whole model; on the right
    what follows it from the best weights. Below the test MSE at the end, and right after the removal.
    """
    groups = by_prefix(cases)
    figure = Figure(figsize=(WIDTH_INCHES, 8.2), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1.1, 1])
    first, further, last = (figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :]))
    seeds = max(len(group) for group in groups.values())
    figure.suptitle(
        f"Pruned heads: validation MSE in training, test MSE at the end\n{facts(cases)} | n = {seeds} seeds",
        fontsize=10.5,
        x=0.01,
        ha="left",
    )
    for number, (name, group) in enumerate(groups.items()):
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        style = {"color": colour, "linewidth": 1.5, "linestyle": "--" if name.endswith("masked") else "-"}
        done = [case for case in group if case.ok]
        shortest = min((len(case.epochs) for case in done), default=0)
        if shortest:
            values = np.array([[row["validation_mse"] for row in case.epochs[:shortest]] for case in done]).mean(0)
            goes_on = any((case.results.get("pruning") or {}).get("further") for case in done)
            split = first_training(done, groups.get("whole", [])) if goes_on else shortest
            if not goes_on or "whole" not in groups:
                first.plot(range(1, split + 1), values[:split], label=name, **style)
            if goes_on:
                further.plot(range(1, shortest - split + 1), values[split:], label=name, **style)
        at = [case.results["test_mse"] for case in done]
        last.plot(at, [number] * len(at), "o", color=colour, markersize=6, alpha=0.8)
        if at:
            last.plot([np.mean(at)], [number], "|", color="black", markersize=14, markeredgewidth=2)
        after = [(case.results.get("pruning") or {}).get("after") for case in done]
        after = [found["test_mse"] for found in after if found]
        last.plot(after, [number] * len(after), "x", color=colour, markersize=6)
        failed = [case.status for case in group if not case.ok]
        if failed:
            last.text(0.02, number, f"x {', '.join(failed)}", color=RED, transform=last.get_yaxis_transform())
    first.set(xlabel="epoch", ylabel="validation MSE, standardised channels,\nmean of the seeds")
    first.set_title("first training (dynamic cases: as the whole model)", fontsize=10)
    further.set(xlabel="epoch after the first training, from its best weights on")
    further.set_title("further training, heads removed before its first epochs", fontsize=10)
    last.set_yticks(range(len(groups)), list(groups), fontsize=9)
    last.invert_yaxis()
    last.set_xlabel("test MSE, standardised channels: dots each seed, bar their mean, crosses right after the removal")
    for ax in (first, further, last):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    for ax in (first, further):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if ax.lines:
            ax.legend(fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------------------------
# Break-even
# --------------------------------------------------------------------------------------------------------------------


def break_even_figure(folder: Path) -> Figure:
    """Time of a training step against the tokens of a sequence, relative to textbook attention; eager and compiled."""
    info = read_run(folder).info
    rows = info["results"]["times"]
    kinds = [False, True] if any(row["compiled"] for row in rows) else [False]
    settings = info["settings"]
    facts_here = f"{info['device_name']} | {settings['precision']} | width {settings['embedding_dim']}, "
    facts_here += (
        f"{settings['num_heads']} heads | as many tokens in every batch | band: all of {settings['rounds']} rounds"
    )
    figure, axes = new_figure("Training step with fused attention against textbook attention", facts_here, len(kinds))
    for ax, compiled in zip(axes, kinds, strict=True):
        own = [row for row in rows if row["compiled"] is compiled]
        backends = [name for name in own[0]["ms"] if name != "eager"]
        for row in own:
            if None in row["ms"]["eager"]:  # no ratio without it: a word at the bottom, not a point among the ratios
                ran = [name for name in backends if row["ms"].get(name) and None not in row["ms"][name]]
                words = "textbook: oom" + (f"\n({', '.join(ran)}: ok)" if ran else "")
                where = {"transform": ax.get_xaxis_transform(), "color": RED}
                ax.plot([row["tokens"]], [0.03], "x", markersize=9, markeredgewidth=2, clip_on=False, **where)
                ax.text(row["tokens"], 0.06, words, fontsize=8, ha="right", **where)
        tokens = [row["tokens"] for row in own]
        for colour, name in zip((ORANGE, GREEN, BLUE, RED), backends, strict=False):
            known = [(row["tokens"], row["ms"].get(name, [None]), row["ms"]["eager"]) for row in own]
            known = [row for row in known if None not in row[1] and None not in row[2]]
            x = [row[0] for row in known]
            ax.plot(x, [np.median(row[1]) / np.median(row[2]) for row in known], "o-", color=colour, label=name)
            low, high = ([pick(row[1]) / other(row[2]) for row in known] for pick, other in ((min, max), (max, min)))
            ax.fill_between(x, low, high, color=colour, alpha=0.25)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(xscale="log", xlabel="tokens of a sequence", title="compiled" if compiled else "not compiled")
        ax.set_xticks(tokens, [str(value) for value in tokens], fontsize=8, rotation=60)
        ax.set_yscale("log")
        ax.set_yticks(RATIOS, [f"{value:g}" for value in RATIOS])
        ax.minorticks_off()
    axes[0].set_ylabel("time of a step / that with textbook attention")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9.5, frameon=False)
    return figure
