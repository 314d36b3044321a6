"""The table of runs in several processes, made from the run folders in outputs/parallel.

    python report_parallel.py                              prints it
    python report_parallel.py --output_folder mine         of your own runs

report.py puts it into the README. What a GPU held before the forward pass stands beside the formula of parallel.py;
"times one" is against the run of one process with the same work for each GPU, on the same kind of GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optimizers import state_bytes_per_parameter
from parallel import held_bytes
from report_text import ROOT, markdown, not_run, percent, place, shown
from run_results import Run, measured_elsewhere, read_run
from utils import GIB, SettingsError, parse_settings, run_script, setting

COMMAND = "torchrun --nproc_per_node=2 llm_train.py --experiment parallel --parallel fsdp"
MAY_DIFFER = ("parallel", "batch_size", "run_name")  # between a run and the one that it is compared with


def world_size(run: Run) -> int:
    return run.info.get("world_size") or 1


def formula_gib(run: Run) -> float:
    """GiB a GPU holds before the forward pass: parameters and states, and DDP's buckets, in which the gradients lie."""
    settings = run.info["settings"]
    whole = state_bytes_per_parameter(settings["optimizer"], settings["parameters"], in_backward=False)
    without = state_bytes_per_parameter(settings["optimizer"], settings["parameters"], in_backward=True)
    method = run.info.get("parallel")
    held = whole if method == "ddp" else without
    return held_bytes(method, world_size(run), run.info["parameters"], held) / GIB


def one_of(run: Run, runs: list[Run]) -> Run | None:
    """The run of one process without torchrun that differs in the number of GPUs alone."""

    def facts(other: Run) -> tuple:
        settings = {name: value for name, value in other.info["settings"].items() if name not in MAY_DIFFER}
        return other.info["device_name"], other.info["batch_size"] / world_size(other), sorted(settings.items())

    alone = (other for other in runs if other.info.get("parallel") is None and status_of(other) == "ok")
    return next((other for other in alone if facts(other) == facts(run)), None)


def status_of(run: Run) -> str:
    """The run's status; "ok" is one whose time and memory are of the devices that its run.json names."""
    if run.info["status"] == "ok" and measured_elsewhere(run):
        return f"ok, resumed after step {run.info['resumed'][-1]['step']}"
    if run.info["status"] == "ok" and run.info["results"].get("tokens_per_s") is None:
        return "too short to time"
    return run.info["status"]


def ratio(results: dict, one: dict) -> float | None:
    """How many times as many tokens a second; None if either was too short to time."""
    return results["tokens_per_s"] / one["tokens_per_s"] if one.get("tokens_per_s") else None


def parallel_table(outputs: Path) -> str:
    """One row a run: speed against one process, MFU, memory of each GPU against the formula."""
    runs = [read_run(path.parent) for path in (outputs / "parallel").glob("*/run.json")]
    runs = [run for run in runs if {"model_size", "device_name", "batch_size", "settings"} <= run.info.keys()]
    if not runs:
        return not_run("a training in several processes", COMMAND)
    runs.sort(key=lambda run: (run.info["device_name"], world_size(run), run.info["batch_size"], run.name))
    lines = []
    for run in runs:
        layers = run.info["settings"].get("num_layers")
        words = [
            f"`{run.name}`",
            f"{world_size(run)} x {run.info['device_name']}",
            run.info.get("parallel") or "one process",
            f"`{run.info['model_size']}`" + (f", {layers} of its layers" if layers else ""),
            str(run.info["batch_size"]),
        ]
        status = status_of(run)
        if status != "ok":
            lines.append([*words, status, *["-"] * 7])
            continue
        results, one = run.info["results"], one_of(run, runs)
        gain = None if one is None or one is run else ratio(results, one.info["results"])
        starts = [row["start_allocated_gib"] for row in run.memory if row["phase"] == "forward_pass"]
        peaks = results.get("peak_allocated_gib_by_rank") or [results["peak_allocated_gib"]]
        lines.append(
            [
                *words,
                f"{results['tokens_per_s']:,.0f}",
                f"{results['step_ms_median']:.1f} ({results['step_ms_p20']:.1f}-{results['step_ms_p80']:.1f})",
                str(results["timed_steps"]),
                "-" if gain is None else f"{gain:.3f}",
                percent(results["mfu"]),
                shown(max(starts, default=None)),
                shown(formula_gib(run)),
                ", ".join(shown(peak) for peak in peaks),
            ]
        )
    header = ["run", "GPUs", "parallel", "model", "batch of all", "tokens/s of all"]
    header += ["step ms (20th-80th percentile)", "n", "times one"]
    header += ["MFU", "held before forward, GiB a GPU", "by the formula", "peak, GiB by GPU"]
    return markdown(header, lines)


PARALLEL_TABLES: dict[str, Callable[[], str]] = {"parallel": lambda: parallel_table(ROOT / "outputs")}


@dataclass
class Settings:
    """Settings of `python report_parallel.py`."""

    output_folder: str = setting("outputs", "folder of all results")


def main() -> int:
    """Print the table."""
    outputs = Path(parse_settings(Settings).output_folder)
    if not (outputs / "parallel").is_dir():
        raise SettingsError(f"--output_folder {place(outputs)} has no folder parallel; run {COMMAND}")
    print(parallel_table(outputs))
    return 0


if __name__ == "__main__":
    run_script(main)
