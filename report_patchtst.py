"""The tables of PatchTST, made from the run folders of patchtst_train.py's experiments and of patchtst_benchmark.py.

    python report_patchtst.py                              prints every table of outputs/patchtst
    python report_patchtst.py --output_folder mine         those of your own runs

report.py puts them into the README; beside what was measured stand the published errors and what the course project
that this part repeats had measured. An experiment that has not been run is one line that says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_techniques import break_even_words
from report_text import ROOT, markdown, not_run, place, plain, read_json, shown
from run_results import Case, by_prefix, read_experiment, time_saved
from technique_bench import Cost, time_difference
from utils import SettingsError, parse_settings, run_script, setting

# Nie et al. 2023, table 3: test MSE and MAE of PatchTST/42 and PatchTST/64.
PUBLISHED = {
    "ETTh1": {
        96: ("0.375 / 0.399", "0.370 / 0.400"),
        192: ("0.414 / 0.421", "0.413 / 0.429"),
        336: ("0.431 / 0.436", "0.422 / 0.440"),
        720: ("0.449 / 0.466", "0.447 / 0.468"),
    },
    "ETTm1": {
        96: ("0.290 / 0.342", "0.293 / 0.346"),
        192: ("0.332 / 0.369", "0.333 / 0.370"),
        336: ("0.366 / 0.392", "0.369 / 0.392"),
        720: ("0.420 / 0.424", "0.416 / 0.420"),
    },
    "traffic": {
        96: ("0.367 / 0.251", "0.360 / 0.249"),
        192: ("0.385 / 0.259", "0.379 / 0.256"),
        336: ("0.398 / 0.265", "0.392 / 0.264"),
        720: ("0.434 / 0.287", "0.432 / 0.286"),
    },
}
# The course project's seconds of an epoch (vanilla, flash) by what it varied; its GPU and clock are others.
COURSE = {
    "patch_size": {12: (13.827, 10.190), 24: (9.482, 8.588), 48: (8.253, 8.597), 96: (8.387, 8.778),
                   192: (8.425, 8.759)},
    "batch_size": {32: (24.723, 23.263), 64: (17.611, 14.909), 128: (15.712, 12.249), 256: (14.714, 11.342),
                   512: (14.482, 11.003)},
    "num_workers": {2: (13.961, 10.178), 4: (14.013, 10.054), 8: (15.280, 10.782), 16: (18.537, 13.331)},
}  # fmt: skip
SWEPT, PRUNED = "ETTm1", "ETTh1"  # data sets of those experiments
VARIED = {"patch_size": "patch length", "batch_size": "batch", "num_workers": "worker processes"}
SWEEP_WORDS = {
    "patch_size": "the patch lengths",
    "batch_size": "the batch sizes",
    "num_workers": "the worker processes",
}


# --------------------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------------------


def mean_of(group: list[Case], key: Callable[[dict[str, Any]], float | None]) -> float | None:
    """The mean over the cases that ended well; None if one of those has no such number."""
    values = [key(case.results) for case in group if case.ok]
    return sum(values) / len(values) if values and None not in values else None


def context_of(folder: Path) -> int:
    """The context of a folder of the horizon experiment; that of PatchTST/42 where its name has none."""
    return int(folder.name.rpartition("-context-")[2]) if "-context-" in folder.name else 336


def horizon_table(outputs: Path) -> str:
    """Test errors by dataset, context and horizon beside the published ones; what was not run is a row, too."""
    header = ["dataset", "context", "horizon", "seeds", "test MSE, mean", "largest - smallest", "MAE, mean"]
    header += ["MSE on whole batches of 128 only", "PatchTST/42, published MSE / MAE", "PatchTST/64, published"]
    header += ["repeat last day, MSE", "attention, precision"]
    lines = []
    folders = []
    for data in PUBLISHED:
        own = sorted((outputs / "patchtst").glob(f"horizon-{data}-context-[0-9]*/"), key=context_of)
        folders += [(data, folder) for folder in (outputs / "patchtst" / f"horizon-{data}", *own)]
    others = [path.parent for path in sorted((outputs / "patchtst").glob("horizon-*/experiment.json"))]
    folders += [
        (folder.name.removeprefix("horizon-").partition("-context-")[0], folder)
        for folder in others
        if folder not in [known for _, known in folders]
    ]
    for data, folder in folders:
        groups = by_prefix(read_experiment(folder)[1]) if (folder / "experiment.json").is_file() else {}
        shapes = [case.info.get("model") or {} for group in groups.values() for case in group if case.ok]
        context = str((shapes or [{}])[0].get("context_length", context_of(folder)))
        published = PUBLISHED.get(data) or {int(name.rpartition("-")[2]): ("-", "-") for name in groups}
        for horizon, (small, large) in published.items():
            group = groups.get(f"horizon-{horizon}", [])
            done = [case for case in group if case.ok]
            if not done:
                reason = ", ".join(sorted({case.status for case in group})) or "not run"
                reason = "not run: the data could not be had" if data == "traffic" and not group else reason
                lines.append([data, context, str(horizon), reason, *["-"] * 4, small, large, "-", "-"])
                continue
            errors = [case.results["test_mse"] for case in done]
            whole = mean_of(group, lambda results: (results.get("test_in_whole_batches") or {}).get("mse"))
            day = (done[0].results["baselines"].get("repeat last day") or {}).get("mse")
            kernel = f"{done[0].info['model']['attention_backend']}, {done[0].info['precision']}"
            failed = "" if len(done) == len(group) else f" of {len(group)}"
            lines.append(
                [
                    data,
                    context,
                    str(horizon),
                    f"{len(done)}{failed}",
                    f"{sum(errors) / len(errors):.4f}",
                    f"{max(errors) - min(errors):.4f}",
                    f"{mean_of(group, lambda results: results['test_mae']):.4f}",
                    "-" if whole is None else f"{whole:.4f}",
                    small,
                    large,
                    "-" if day is None else f"{day:.4f}",
                    plain(kernel),
                ]
            )
    return markdown(header, lines)


# --------------------------------------------------------------------------------------------------------------------
# Sweeps
# --------------------------------------------------------------------------------------------------------------------


def seconds(case: Case | None) -> tuple[str, str, str]:
    """Data, compute and total of an epoch, or the status."""
    if case is None or not case.ok:
        return ("-" if case is None else case.status, "-", "-")
    return tuple(f"{case.results[f'epoch_{part}_s']:.3f}" for part in ("data", "compute", "total"))


def sweep_table(outputs: Path, name: str) -> str:
    """One row for each value: seconds of an epoch with textbook and fused attention, what that saves, GiB.

    "Not clear" stands where not every timed epoch of one is faster than every one of the other.
    """
    folder = outputs / "patchtst" / f"{name}-{SWEPT}"
    if not (folder / "experiment.json").is_file():
        return not_run(SWEEP_WORDS[name], f"python patchtst_train.py --{name}_exp --dataset {SWEPT}")
    rows: dict[str, dict[str, Case]] = {}
    for case in read_experiment(folder)[1]:
        _, value, kind = case.name.rsplit("-", 2)
        rows.setdefault(value, {})[kind] = case
    kinds = [kind for kind in ("flash", "auto") if any(kind in row for row in rows.values())]
    header = [VARIED[name], *(["tokens"] if name == "patch_size" else [])]
    header += ["vanilla: data + compute = total, s"]
    for kind in kinds:
        names = {row[kind].info.get("model", {}).get("attention_backend", "?") for row in rows.values() if kind in row}
        header += [f"{kind} ({plain(', '.join(sorted(names)))}): data + compute = total, s", "time saved"]
    header += ["GiB, vanilla / " + " / ".join(kinds), "course project: vanilla, flash, s"]
    lines = []
    for value, row in rows.items():
        line = [value]
        if name == "patch_size":
            shape = next(case.info["model"] for case in row.values() if case.info)
            count = (shape["context_length"] - shape["patch_length"]) // shape["patch_stride"] + 1
            line.append(str(count + shape["end_padding"]))
        base = row.get("vanilla")
        line.append(" + ".join(seconds(base)[:2]) + f" = {seconds(base)[2]}")
        for kind in kinds:
            own = row.get(kind)
            parts = seconds(own)
            saved = time_saved(own, base)
            words = "-" if saved is None else f"{100 * saved[0]:+.1f} %" + ("" if saved[1] else " (not clear)")
            line += [f"{parts[0]} + {parts[1]} = {parts[2]}", words]
        peaks = [row[kind].results.get("peak_allocated_gib") if kind in row else None for kind in ("vanilla", *kinds)]
        line.append(" / ".join(shown(peak) for peak in peaks))
        theirs = COURSE[name].get(int(value)) if value.isdigit() else None
        line.append("-" if theirs is None else f"{theirs[0]:.1f}, {theirs[1]:.1f}")
        lines.append(line)
    return markdown(header, lines)


# --------------------------------------------------------------------------------------------------------------------
# The benchmark
# --------------------------------------------------------------------------------------------------------------------


def peer_table(outputs: Path) -> str:
    """Time and memory of a training step of each model and kernel, against the library's own, like with like."""
    path = outputs / "patchtst" / "peer" / "run.json"
    if not path.is_file():
        return not_run("the step of transformers' model", "python patchtst_benchmark.py --questions peer")
    results = read_json(path)["results"]
    rounds = {row["variant"]: [ms for ms in row["ms"] if ms is not None] for row in results["rounds"]}
    base = {row["variant"]: row for row in results["rows"]}
    lines = []
    for row in results["rows"]:
        name = row["variant"]
        like = base["transformers, eager" + (", compiled" if name.endswith("compiled") else "")]
        if row["status"] != "ok":
            lines.append([plain(name), row["status"], *["-"] * 4])
            continue
        times = rounds[name]
        exact = "-" if row["exactness"] is None else f"{row['exactness']} ({row['error']:.1e})"
        lines.append(
            [
                plain(name),
                f"{row['ms']:.2f} ({min(times):.2f}-{max(times):.2f})",
                f"{row['ms'] / like['ms']:.2f}",
                shown(row["peak_gib"]),
                exact,
                plain(row["note"]),
            ]
        )
    header = ["model, attention", "step, ms (all rounds)", "times that of transformers, eager", "peak, GiB"]
    return markdown([*header, "result beside fp64", "kernel"], lines)


def break_even_table(outputs: Path) -> str:
    """Milliseconds of a step by tokens of a sequence and kernel, and the answers of the bisection."""
    path = outputs / "patchtst" / "break_even" / "run.json"
    if not path.is_file():
        return not_run("the break-even number of tokens", "python patchtst_benchmark.py --questions break_even")
    results = read_json(path)["results"]
    names = list(results["times"][0]["ms"])
    lines = []
    for row in results["times"]:
        cells = []
        for name in names:
            times = row["ms"].get(name)
            known = sorted(ms for ms in times if ms is not None) if times else []
            text = f"{known[len(known) // 2]:.1f}" if known and len(known) == len(times) else "oom" if times else "-"
            cells.append(text)
        words = f"{row['tokens']:,}" + (", compiled" if row["compiled"] else "")
        lines.append([words, f"{row['windows']:,}", *cells])
    header = ["tokens of a sequence", "windows", *(f"`{name}`, ms" for name in names)]
    answers = [f"- {plain(answer['question'])}: {break_even_words(answer)}" for answer in results["break_even"]]
    return "\n\n".join([markdown(header, lines), "\n".join(answers)])


# --------------------------------------------------------------------------------------------------------------------
# Pruning
# --------------------------------------------------------------------------------------------------------------------


def pruning_table(outputs: Path) -> str:
    """The study: heads, size, test MSE before, right after and after further training, means of the seeds."""
    folder = outputs / "patchtst" / f"pruning-{PRUNED}"
    if not (folder / "experiment.json").is_file():
        return not_run("the pruning study", f"python patchtst_train.py --pruning_exp --dataset {PRUNED}")
    lines = []
    for name, group in by_prefix(read_experiment(folder)[1]).items():
        done = [case for case in group if case.ok]
        if not done:
            lines.append([plain(name), group[0].words, ", ".join({case.status for case in group}), *["-"] * 6])
            continue
        errors = [case.results["test_mse"] for case in done]
        report = done[0].results.get("pruning") or {}
        last = report.get("further") or report.get("static") or {}

        def part(stage: str, done: list[Case] = done) -> str:
            found = [((case.results.get("pruning") or {}).get(stage) or {}).get("test_mse") for case in done]
            return "-" if None in found else f"{sum(found) / len(found):.4f}"

        flops = last.get("gflop_per_window")
        if flops is None:
            results = done[0].results
            flops = results["flops_per_token"] * results["tokens_per_s"] / results["windows_per_s"] / 1e9
        lines.append(
            [
                plain(name),
                group[0].words,
                str(len(done)),
                f"{done[0].results['parameters']:,}",
                f"{flops:.4f}",
                part("before"),
                part("after"),
                f"{sum(errors) / len(errors):.4f}",
                f"{max(errors) - min(errors):.4f}",
            ]
        )
    header = ["case", "what", "seeds", "parameters", "GFLOP a window", "test MSE before", "right after"]
    return markdown([*header, "at the end, mean", "largest - smallest"], lines)


def pruned_step_table(outputs: Path) -> str:
    """Time and memory of a step with fewer heads, masked and cut."""
    path = outputs / "patchtst" / "pruned_step" / "run.json"
    if not path.is_file():
        return not_run("the step of pruned models", "python patchtst_benchmark.py --questions pruned_step")
    results = read_json(path)["results"]
    lines: list[list[str]] = []
    whole: list[Cost] = []
    for row, measured in zip(results["rows"], results["rounds"], strict=True):
        times = [ms for ms in measured["ms"] if ms is not None]
        costs = [Cost("oom" if ms is None else "ok", ms=ms) for ms in measured["ms"]]
        whole = costs if row["baseline"] is None else whole
        change = "-" if row["extra_time"] is None else f"{100 * row['extra_time']:+.1f} %"
        clear = "-" if row["baseline"] is None else time_difference(costs, whole)
        span = f"{row['ms']:.2f} ({min(times):.2f}-{max(times):.2f})" if row["status"] == "ok" else row["status"]
        size = (f"{measured['parameters']:,}", f"{measured['gflop']:.3f}")
        lines.append([plain(row["variant"]), *size, span, change, clear, shown(row["peak_gib"])])
    header = ["model", "parameters", "GFLOP a window", "step, ms (all rounds)", "time", "difference", "peak, GiB"]
    return markdown(header, lines)


# --------------------------------------------------------------------------------------------------------------------


def patchtst_tables(outputs: Path) -> dict[str, Callable[[], str]]:
    """Name -> table."""
    tables = {"horizon": horizon_table, "peer": peer_table, "break-even": break_even_table}
    tables |= {"pruning": pruning_table, "pruned step": pruned_step_table}
    found = {f"patchtst {name}": lambda table=table: table(outputs) for name, table in tables.items()}
    words = {"patch_size": "patch size", "batch_size": "batch size", "num_workers": "workers"}
    return found | {f"patchtst {text}": lambda name=name: sweep_table(outputs, name) for name, text in words.items()}


PATCHTST_TABLES = patchtst_tables(ROOT / "outputs")


@dataclass
class Settings:
    """Settings of `python report_patchtst.py`."""

    output_folder: str = setting("outputs", "where the experiments' folders lie")


def main() -> int:
    """Print every table."""
    outputs = Path(parse_settings(Settings).output_folder)
    if not (outputs / "patchtst").is_dir():
        raise SettingsError(f"{place(outputs / 'patchtst')} is missing; run patchtst_train.py or patchtst_benchmark.py")
    for name, table in patchtst_tables(outputs).items():
        print(f"{name}\n\n{table()}\n")
    return 0


if __name__ == "__main__":
    run_script(main)
