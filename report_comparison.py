"""The tables of the comparison, made from the run folders of compare_techniques.py and of the technique files.

    python report_comparison.py                                   prints every table of outputs/
    python report_comparison.py --prefix smoke_                   those of a laptop's small comparison

report.py puts them into the README; no number is typed by hand, not even the lines of code that a technique takes. A
case that did not end well has its status where its first measurement would stand, and is never left out.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_techniques import adoption_table, techniques_table
from report_text import ROOT, markdown, place, plain, read_json, read_table, shown, signed
from utils import SettingsError, parse_settings, run_script, setting

PHASES = {"forward_pass": "forward", "loss": "loss", "backward_pass": "backward", "optimizer_step": "optimizer"}

# --------------------------------------------------------------------------------------------------------------------
# The cases of an experiment
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One case of an experiment: name, flags, how it ended, and its run.json ({} if it left none)."""

    name: str
    flags: dict[str, str]
    status: str
    folder: Path
    info: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def batch(self) -> int | None:
        """Sequences in a batch: that which ran, else the planned one, else the one asked for."""
        known = (self.result("batch_size"), self.info.get("batch_size"), self.flags.get("batch_size"))
        return next((int(size) for size in known if size), None)

    def result(self, key: str) -> Any:
        """A number of run.json's results, or None if it was not measured."""
        return (self.info.get("results") or {}).get(key)


def read_cases(outputs: Path, experiment: str) -> list[Case]:
    """The cases of outputs/<experiment>/comparison.json in its order.

    Raises:
        SettingsError: the file is missing or damaged, or a case that ended well has no run.json.
    """
    folder = Path(outputs) / experiment
    cases = []
    for row in read_json(folder / "comparison.json")["cases"]:
        path = folder / row["name"] / "run.json"
        info = read_json(path) if path.is_file() or row["status"] == "ok" else {}
        status = row["status"] if row["status"] != "ok" else info["status"]
        cases.append(Case(row["name"], dict(row["flags"]), status, path.parent, info))
    if not cases:
        raise SettingsError(f"{place(folder / 'comparison.json')} has no cases; run compare_techniques.py")
    return cases


def table_of(cases: Iterable[Case], header: list[str], cells: Callable[[Case], list[str]]) -> str:
    """One row a case: name, batch and the measured cells, or its status and dashes if it did not end well."""
    lines = []
    for case in cases:
        measured = cells(case) if case.ok else [case.status, *["-"] * (len(header) - 3)]
        lines.append([plain(case.name), f"{case.batch:,}" if case.batch else "-", *measured])
    return markdown(header, lines)


# --------------------------------------------------------------------------------------------------------------------
# Memory and time
# --------------------------------------------------------------------------------------------------------------------


def phase_peaks(case: Case) -> dict[str, float]:
    """Phase -> highest allocated GiB over the tracked steps; {} if none was (compiled code without a GPU)."""
    peaks: dict[str, float] = {}
    if case.result("tracked_steps") == 0:
        return peaks
    for row in read_table(case.folder / "memory.csv"):
        peaks[row["phase"]] = max(peaks.get(row["phase"], 0.0), float(row["peak_allocated_gib"]))
    return peaks


def memory_table(outputs: Path, prefix: str = "") -> str:
    """GiB of each phase at its peak, of the whole step, reserved, and the phase that is the peak."""
    header = ["case", "batch", *(f"{words}, GiB" for words in PHASES.values())]
    header += ["step, GiB", "reserved, GiB", "the peak is"]

    def cells(case: Case) -> list[str]:
        peaks, peak_phase = phase_peaks(case), case.result("peak_phase")
        values = [*(peaks.get(phase) for phase in (*PHASES, "training_step")), case.result("peak_reserved_gib")]
        return [*(shown(value) for value in values), PHASES.get(peak_phase, peak_phase) or "-"]

    return table_of(read_cases(outputs, f"{prefix}seed"), header, cells)


def time_table(outputs: Path, prefix: str = "") -> str:
    """Time of a step, the first step, compilation and an epoch; tokens/s and MFU with what it is a share of."""
    header = ["case", "batch", "step, ms (20th-80th percentile)", "first step, ms", "compilation, s"]
    header += ["epoch, minutes", "tokens/s", "MFU (of the card's dense peak)"]

    def cells(case: Case) -> list[str]:
        mfu, peak = case.result("mfu"), case.result("mfu_denominator_tflops")
        step, low, high = (case.result(f"step_ms_{name}") for name in ("median", "p20", "p80"))
        return [
            f"{step:,.1f} ({low:,.1f}-{high:,.1f})",
            shown(case.result("first_step_ms"), 4),
            shown(case.result("compile_s")),
            shown(case.result("epoch_minutes")),
            f"{case.result('tokens_per_s'):,.0f}",
            "-" if mfu is None else f"{100 * mfu:.1f} % ({case.info['precision']}: {peak:g} TFLOP/s)",
        ]

    return table_of(read_cases(outputs, f"{prefix}seed"), header, cells)


PEER = "hf-gpt2-compiled"  # its name, or the beginning of it


def peer_table(outputs: Path, prefix: str = "") -> str:
    """The peer and every compiled case of its batch: tokens/s and peak GiB, and both beside the peer's.

    Raises:
        SettingsError: the experiment has no such peer.
    """
    cases = read_cases(outputs, f"{prefix}seed")
    peer = next((case for case in cases if case.name.startswith(PEER)), None)
    if peer is None:
        raise SettingsError(
            f"{place(outputs / f'{prefix}seed')} has no case {PEER}, so there is nothing to hold against"
        )
    header = ["case", "batch", "tokens/s", f"times that of {PEER}", "peak, GiB", f"times that of {PEER}"]

    def cells(case: Case) -> list[str]:
        rate, peak = case.result("tokens_per_s"), case.result("peak_allocated_gib")
        if not peer.ok:
            return [f"{rate:,.0f}", f"- (the peer: {peer.status})", shown(peak), "-"]
        of_peer = peer.result("peak_allocated_gib")
        times = f"{peak / of_peer:.2f}" if peak and of_peer else "-"
        return [f"{rate:,.0f}", f"{rate / peer.result('tokens_per_s'):.2f}", shown(peak), times]

    compiled = [case for case in cases if case.flags.get("use_compile") == "true"]
    others = [case for case in compiled if case is not peer and case.batch == peer.batch]
    return table_of([peer, *others], header, cells)


def profile_table(outputs: Path, prefix: str = "") -> str:
    """Where the time of every profiled step goes, in ms and as a share, beside the floor of its matrix products.

    Raises:
        SettingsError: no case has a profile.json.
    """
    cases = [case for case in read_cases(outputs, f"{prefix}seed") if (case.folder / "profile.json").is_file()]
    if not cases:
        raise SettingsError(
            f"no case of {place(outputs / f'{prefix}seed')} has a profile.json; profile a compiled case"
        )
    profiles = [read_json(case.folder / "profile.json") for case in cases]
    parts = [{part["name"]: part for part in profile["categories"]} for profile in profiles]
    lines = []
    for name in dict.fromkeys(name for own in parts for name in own):
        found = [own.get(name) for own in parts]
        words = ["-" if part is None else f"{shown(part['ms'])} ({100 * part['share']:.1f} %)" for part in found]
        lines.append([plain(name), *words])
        if name == "matrix products":
            lines.append(
                ["the same products, each alone on this card", *(shown(p["matmul_floor_ms"]) for p in profiles)]
            )
    lines.append(["the step, timed without the profiler", *(shown(profile["step_ms"]) for profile in profiles)])
    sentences = []
    for case, profile in zip(cases, profiles, strict=True):
        rates = [rate["tflops"] for rate in profile["matmul_rates"]]
        measured = f"{min(rates):,.0f} to {max(rates):,.0f}" if rates else "none measured"
        sentences.append(
            f"{plain(case.name)}: mean of {profile['steps']} steps; {shown(profile['matmul_tflop'])} TFLOP of matrix "
            f"products, {len(rates)} shapes at {measured} TFLOP/s alone. Idle is the step minus the time with a kernel."
        )
    table = markdown(["ms a step (share)", *(plain(case.name) for case in cases)], lines)
    return "\n\n".join([table, *sentences])


# --------------------------------------------------------------------------------------------------------------------
# Quality
# --------------------------------------------------------------------------------------------------------------------

REFERENCES = ("flash", "fp32-baseline")  # the first that was run is what the others are held against


@dataclass
class Confounded:
    """A run on as many tokens whose batch decides about the number of updates, beside those at equal updates."""

    case: Case
    configuration: str | None  # the one of equal updates that trains in the same way; None if there is none


AMOUNTS = ("batch_size", "tokens_per_update", "max_steps", "epochs", "seed", "tracked_steps", "measured_steps")


def technique_flags(case: Case) -> dict[str, str]:
    """The flags that say how a case trains, not how much."""
    return {name: value for name, value in case.flags.items() if name not in AMOUNTS}


def quality_runs(cases: Iterable[Case]) -> tuple[dict[str, dict[int, Case]], list[Confounded]]:
    """Configuration -> seed -> run at equal updates, and the confounded runs.

    Raises:
        SettingsError: a case whose name is neither ...-seed-N nor confounded-...
    """
    equal: dict[str, dict[int, Case]] = {}
    confounded = []
    for case in cases:
        match = re.fullmatch(r"(.+)-seed-(\d+)", case.name)
        if case.name.startswith("confounded-"):
            confounded.append(Confounded(case, None))
        elif match:
            equal.setdefault(match[1], {})[int(match[2])] = case
        else:
            raise SettingsError(f"the case {case.name} is named neither ...-seed-N nor confounded-...")
    for run in confounded:
        own = technique_flags(run.case)
        without = {name: value for name, value in own.items() if name != "gradient_checkpointing"}
        run.configuration = next(
            (
                name
                for flags in (own, without)  # blocks that are recomputed train the same, bit for bit
                for name, seeds in equal.items()
                if flags in map(technique_flags, seeds.values())
            ),
            None,
        )
    return equal, confounded


def finished(seeds: dict[int, Case], key: str) -> list[float]:
    """A result of the seeds that ended well."""
    return [case.result(key) for case in seeds.values() if case.ok]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest."""
    return max(values) - min(values)


def difference_words(own: list[float], reference: list[float]) -> str:
    """Difference of the means, and whether it is more than what seeds do."""
    if not reference:
        return "- (it has no result)"
    difference = mean(own) - mean(reference)
    if min(len(own), len(reference)) < 2:
        return f"{difference:+.4f} (one seed has no spread)"
    limit = max(spread(own), spread(reference))
    verdict = "no difference" if abs(difference) <= limit else "larger"
    return f"{difference:+.4f} ({verdict}: spread {limit:.4f})"


def listed(values: Iterable[float]) -> str:
    """The different values, rising."""
    return ", ".join(f"{value:,}" for value in sorted(set(values)))


def quality_table(outputs: Path, prefix: str = "") -> str:
    """Equal tokens an update and equal updates: test loss of every seed, and differences beside what seeds do."""
    equal, _ = quality_runs(read_cases(outputs, f"{prefix}quality"))
    if not equal:
        raise SettingsError(f"{place(outputs / f'{prefix}quality')} has no case named ...-seed-N")
    reference = next((name for name in REFERENCES if name in equal), next(iter(equal)))
    header = ["configuration", "seeds", "updates", "tokens an update", "test loss, mean", "spread"]
    header += ["of each seed", "perplexity, mean", "bits per byte, mean", f"loss minus that of {plain(reference)}"]
    lines = []
    for name, seeds in equal.items():
        failed = [f"seed {seed}: {case.status}" for seed, case in seeds.items() if not case.ok]
        losses = finished(seeds, "test_loss")
        words = f"{len(losses)}" + (f" of {len(seeds)} ({', '.join(failed)})" if losses and failed else "")
        if not losses:
            statuses = ", ".join(dict.fromkeys(case.status for case in seeds.values()))
            lines.append([plain(name), words, statuses, *["-"] * (len(header) - 3)])
            continue
        each = ", ".join(f"{case.result('test_loss'):.4f}" if case.ok else case.status for case in seeds.values())
        lines.append(
            [
                plain(name),
                words,
                listed(finished(seeds, "steps")),
                listed(finished(seeds, "tokens_per_update")),
                f"{mean(losses):.4f}",
                f"{spread(losses):.4f}" if len(losses) > 1 else "-",
                each,
                shown(mean(finished(seeds, "test_perplexity")), 4),
                f"{mean(finished(seeds, 'test_bits_per_byte')):.3f}",
                "-" if name == reference else difference_words(losses, finished(equal[reference], "test_loss")),
            ]
        )
    return markdown(header, lines)


def confounded_table(outputs: Path, prefix: str = "") -> str:
    """One epoch at each batch, so that the updates differ, beside the same configuration at equal updates."""
    equal, confounded = quality_runs(read_cases(outputs, f"{prefix}quality"))
    if not confounded:
        raise SettingsError(f"{place(outputs / f'{prefix}quality')} has no case named confounded-...")
    header = ["case", "batch", "updates", "perplexity", "the same at equal updates", "updates", "perplexity, mean"]
    partners = {run.case.name: run.configuration for run in confounded}

    def cells(case: Case) -> list[str]:
        seeds = equal.get(partners[case.name], {})
        perplexities = finished(seeds, "test_perplexity")
        return [
            f"{case.result('steps'):,}",
            shown(case.result("test_perplexity"), 4),
            plain(partners[case.name] or "-"),
            listed(finished(seeds, "steps")) or "-",
            shown(mean(perplexities) if perplexities else None, 4),
        ]

    return table_of([run.case for run in confounded], header, cells)


# --------------------------------------------------------------------------------------------------------------------
# Largest batch and effects
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class LargestBatch:
    """The largest batch of a configuration under a budget, and what the plwiki lab's grid would have answered."""

    status: str  # ok; oom: not even one sequence fits; or what else ended the search
    size: int | None = None
    grid: int | None = None  # None: its first size does not fit
    limited: bool = False  # the search ended at its maximum, not at the memory
    later: str = ""  # what ended the training that came after the search

    @property
    def words(self) -> str:
        if self.size is None:
            return self.status
        grid = "oom" if self.grid is None else f"{self.grid:,}"
        after = f", {self.later} in training" if self.later else ""
        return f"{'at least ' if self.limited else ''}{self.size:,} ({grid}){after}"


def largest_batch(case: Case) -> LargestBatch:
    """Read batch_size_search.csv: the growing phase ends with the first size that failed."""
    path = case.folder / "batch_size_search.csv"
    if not path.is_file() and not case.ok:
        return LargestBatch(case.status)
    probes = [(int(row["batch_size"]), row["status"]) for row in read_table(path)]
    fitting = [size for size, status in probes if status == "ok"]
    first_failure = next((place for place, (_, status) in enumerate(probes) if status != "ok"), len(probes))
    if not fitting:
        return LargestBatch("oom" if probes and probes[-1][1] == "oom" else case.status)
    grid = max((size for size, _ in probes[:first_failure]), default=None)
    later = "" if case.ok else case.status
    return LargestBatch("ok", max(fitting), grid, first_failure == len(probes), later)


def largest_batches(cases: Iterable[Case]) -> dict[str, dict[float, LargestBatch]]:
    """Configuration -> budget in GiB -> answer, from cases named CONFIGURATION-24-gib.

    Raises:
        SettingsError: a case with another name.
    """
    answers: dict[str, dict[float, LargestBatch]] = {}
    for case in cases:
        match = re.fullmatch(r"(.+)-(\d+(?:\.\d+)?)-gib", case.name)
        if match is None:
            raise SettingsError(f"the case {case.name} is not named CONFIGURATION-BUDGET-gib")
        answers.setdefault(match[1], {})[float(match[2])] = largest_batch(case)
    return answers


def max_batch_table(outputs: Path, prefix: str = "") -> str:
    """Configuration x budget: the largest batch by bisection, in brackets that of growing by a quarter from 64."""
    answers = largest_batches(read_cases(outputs, f"{prefix}max_batch"))
    budgets = sorted({budget for own in answers.values() for budget in own})
    header = ["largest batch by bisection (by the grid)", *(f"{budget:g} GiB" for budget in budgets)]
    lines = [
        [plain(name), *(own[budget].words if budget in own else "-" for budget in budgets)]
        for name, own in answers.items()
    ]
    return markdown(header, lines)


def effects_of(effects: dict[str, Any], measure: str, kind: str) -> dict[str, float | None]:
    """The main effects or interactions of peak_gib, step_ms or step_ms_ratio; {} if they could not be computed."""
    return (effects.get(measure) or {}).get(kind) or {}


def reasons_of(effects: dict[str, Any]) -> list[str]:
    """Why some effects are missing."""
    places = [effects, *(value for value in effects.values() if isinstance(value, dict))]
    return list(dict.fromkeys(place["reason"] for place in places if isinstance(place.get("reason"), str)))


def effect_names(effects: dict[str, Any], kind: str) -> list[str]:
    """The factors or pairs of them, in the order written."""
    measures = ("peak_gib", "step_ms", "step_ms_ratio")
    return list(dict.fromkeys(name for measure in measures for name in effects_of(effects, measure, kind)))


def effects_table(outputs: Path, prefix: str = "") -> str:
    """What each technique changes, over all combinations of the others."""
    effects = read_json(outputs / f"{prefix}factorial" / "effects.json")
    lines = []
    for name in effect_names(effects, "main"):
        gib, ms, ratio = (effects_of(effects, m, "main").get(name) for m in ("peak_gib", "step_ms", "step_ms_ratio"))
        lines.append([plain(name), signed(gib), signed(ms), "-" if ratio is None else f"{ratio:.3f}"])
    table = markdown(["technique", "peak, GiB", "step, ms", "step, times"], lines)
    return "\n\n".join([table, *(plain(reason) for reason in reasons_of(effects))])


def interactions_table(outputs: Path, prefix: str = "") -> str:
    """Half of what the second one changes in the effect of the first, the largest in GiB first."""
    effects = read_json(outputs / f"{prefix}factorial" / "effects.json")
    gib, ms = (effects_of(effects, measure, "interactions") for measure in ("peak_gib", "step_ms"))
    names = effect_names(effects, "interactions")
    names.sort(key=lambda name: (-abs(gib.get(name) or 0.0), -abs(ms.get(name) or 0.0)))
    lines = [[plain(name), signed(gib.get(name)), signed(ms.get(name))] for name in names]
    table = markdown(["two techniques", "peak, GiB", "step, ms"], lines)
    return "\n\n".join([table, *(plain(reason) for reason in reasons_of(effects))])


# --------------------------------------------------------------------------------------------------------------------


def comparison_tables(outputs: Path, prefix: str = "") -> dict[str, Callable[[], str]]:
    """Name of the table in the README -> function that makes it from these outputs."""
    tables = {
        "memory": memory_table,
        "time": time_table,
        "peer": peer_table,
        "profile": profile_table,
        "quality": quality_table,
        "confounded": confounded_table,
        "max batch": max_batch_table,
        "effects": effects_table,
        "interactions": interactions_table,
        "techniques": techniques_table,
        "adoption": adoption_table,
    }
    return {f"comparison {name}": functools.partial(table, outputs, prefix) for name, table in tables.items()}


COMPARISON_TABLES = comparison_tables(ROOT / "outputs")


@dataclass
class Settings:
    """Settings of `python report_comparison.py`."""

    output_folder: str = setting("outputs", "where the experiments' folders lie")
    prefix: str = setting("", "what stands before the experiments' names: smoke_ for a laptop's comparison")


def main() -> int:
    """Print every table; status 2 and the reasons if some could not be made."""
    settings = parse_settings(Settings)
    failures = []
    for name, table in comparison_tables(Path(settings.output_folder), settings.prefix).items():
        try:
            print(f"{name}\n\n{table()}\n")
        except SettingsError as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise SettingsError("; ".join(failures))
    return 0


if __name__ == "__main__":
    run_script(main)
