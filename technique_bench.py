"""Measure a technique alone: peak memory and time of a step, the size from which on it pays, and a run folder.

Every technique file's `main()` uses it: `measure` for one variant, `find_break_even` for a bisection over sizes,
`Study` to print the table and leave it in outputs/techniques/<name>/run.json.

    python technique_bench.py     measures allocations and a pause of known size
"""

import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from memory_tracker import MemoryTracker
from run_folder import RunFolder, StepClock, check_writable, describe_environment, now
from utils import GIB, is_out_of_memory, percentile, run_script

SPIN_CYCLES = 1_000_000  # about half a millisecond
EXACTNESS = ("bitwise", "within rounding", "changed")


@dataclass
class Cost:
    """What a step needs: peak allocated GiB, of which `start_gib` lay there before; median ms; status ok or oom."""

    status: str
    start_gib: float | None = None
    peak_gib: float | None = None
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    n: int = 0


def measure(
    step: Callable[[], None],
    device: torch.device,
    *,
    roots: tuple[Any, ...] = (),
    repeats: int = 10,
    warm_up: int = 2,
    compiled: bool = False,
) -> Cost:
    """Peak memory and time of a function that runs one training step (or part of one) and keeps nothing.

    Args:
        step: called warm_up + 1 + repeats times; compiles, makes optimizer states and the like in the first calls.
        device: whose memory and clock count.
        roots: modules and optimizers whose tensors are there before (needed without a GPU).
        repeats: timed calls, after the one whose memory is tracked.
        warm_up: calls before anything is measured.
        compiled: the step holds compiled code. Without a GPU its memory cannot be counted (tensors are counted operator
            by operator, and compiled code has none), so the peak is None.

    Returns:
        The cost; an out-of-memory error is a status, every other error is raised.
    """
    clock, tracker = StepClock(device), MemoryTracker(device, roots=roots)
    status, tracked = "ok", device.type == "cuda" or not compiled
    try:
        for _ in range(warm_up):
            step()
        if tracked:
            with tracker.step(1), tracker.phase("step"):
                step()
        for _ in range(repeats):
            clock.start()
            step()
            clock.stop()
        times = clock.read()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        status = "oom"
    if status == "oom":  # the except block has been left, so its frames and their tensors can go
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return Cost("oom")
    row = tracker.summary().get("step", {})
    return Cost(
        status,
        row.get("start_allocated_gib"),
        row.get("peak_allocated_gib"),
        *(round(percentile(times, percent), 4) for percent in (50, 20, 80)),
        n=len(times),
    )


def interleaved(
    steps: dict[str, tuple[Callable[[], None], tuple[Any, ...]]],
    device: torch.device,
    *,
    rounds: int,
    repeats: int,
    compiled: bool = False,
) -> dict[str, list[Cost]]:
    """Measure several steps in turn, round after round, so that a drift of the device's clock meets all of them.

    Each begins with an empty cache of the allocator: what one has kept there must not be missing for the next.

    Args:
        steps: name -> (the step, its roots), as `measure` wants them.
        rounds: a cost each.
        repeats: timed steps of a round.
        compiled: as in `measure`.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (step, roots) in steps.items():
            if device.type == "cuda":
                torch.cuda.empty_cache()
            costs[name].append(measure(step, device, roots=roots, repeats=repeats, compiled=compiled))
    return costs


def gpu_clock_mhz(device: torch.device) -> float:
    """The clock of a GPU's cores in MHz, to a few percent, from the time of a kernel that counts cycles.

    Call it right after the work whose clock is asked for: a card goes back to its highest clock when it has rested.
    """
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    torch.cuda._sleep(SPIN_CYCLES)
    after.record()
    torch.cuda.synchronize(device)
    return SPIN_CYCLES / before.elapsed_time(after) / 1000


def middle(costs: Sequence[Cost]) -> Cost:
    """The round with the median time; one that ran out of memory if there is one."""
    failed = [cost for cost in costs if cost.status != "ok"]
    return failed[0] if failed else sorted(costs, key=lambda cost: cost.ms)[len(costs) // 2]


def clearly_faster(fast: Sequence[Cost], slow: Sequence[Cost]) -> bool:
    """Whether every round of one took less time than every round of the other: a difference beyond their noise.

    One round has no noise to compare with, so it is never clear.
    """
    if any(cost.status != "ok" for cost in fast):
        return False
    if any(cost.status != "ok" for cost in slow):
        return True
    return min(len(fast), len(slow)) > 1 and max(cost.ms for cost in fast) < min(cost.ms for cost in slow)


def time_difference(costs: Sequence[Cost], base: Sequence[Cost]) -> str:
    """Clearly faster or slower than the base (in every round), no clear difference in time, or not compared."""
    if any(cost.status != "ok" for cost in (*costs, *base)):
        return "not compared"
    if clearly_faster(costs, base):
        return "clearly faster"
    return "clearly slower" if clearly_faster(base, costs) else "no clear difference in time"


def find_break_even(saves: Callable[[int], bool], sizes: Sequence[int], step: int) -> tuple[int | None, int | None]:
    """The size from which on something saves, by bisection between the points of a grid.

    Args:
        saves: whether it saves at a size; asked once for every size of the grid and for those of the bisection.
        sizes: rising.
        step: bisect until the bounds are this close.

    Returns:
        (largest size known not to save, smallest from which it saved at every larger point of the grid);
        (None, first) if it saves everywhere, (last, None) if it does not save at the largest.
    """
    failed = [place for place, size in enumerate(sizes) if not saves(size)]
    if not failed:
        return None, sizes[0]
    if failed[-1] == len(sizes) - 1:
        return sizes[-1], None
    low, high = sizes[failed[-1]], sizes[failed[-1] + 1]
    while high - low > step:
        middle = (low + high) // 2 // step * step
        middle = middle if middle > low else low + step
        if saves(middle):
            high = middle
        else:
            low = middle
    return low, high


@dataclass
class Study:
    """The results of one technique file: rows of variants, answers of bisections; printed and kept in a run folder.

    Args:
        name: of the folder in outputs/techniques/, such as cross_entropy.
        settings: the script's settings dataclass; its `output_folder` says where.
        device: what is measured on.
        experiment: folder of the results in that folder.
    """

    name: str
    settings: Any
    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)
    break_even: list[dict[str, Any]] = field(default_factory=list)
    experiment: str = "techniques"

    def __post_init__(self) -> None:
        check_writable(Path(self.settings.output_folder) / self.experiment, "--output_folder")

    def add(
        self,
        variant: str,
        cost: Cost,
        *,
        exactness: str | None = None,
        error: float | None = None,
        formula_saved_gib: float | None = None,
        baseline: str | None = None,
        note: str = "",
    ) -> None:
        """One row and its printed line.

        Args:
            exactness: bitwise, within rounding or changed, as compared in this run; None if it was not compared.
            error: largest relative difference from the reference that the comparison saw.
            formula_saved_gib: what the file's formula says it saves against `baseline`.
            baseline: the variant it is held against (an earlier row); None for the baseline itself.
            note: anything a reader needs, such as why it is unsupported.
        """
        if exactness is not None and exactness not in EXACTNESS:
            raise ValueError(f"exactness {exactness} is none of {', '.join(EXACTNESS)}")
        base = next((row for row in self.rows if row["variant"] == baseline), None)
        both = base is not None and base["status"] == cost.status == "ok"
        counted = both and None not in (base["peak_gib"], cost.peak_gib)
        row = {
            "variant": variant,
            "baseline": baseline,
            **asdict(cost),
            "saved_gib": round(base["peak_gib"] - cost.peak_gib, 4) if counted else None,
            "formula_saved_gib": None if formula_saved_gib is None else round(formula_saved_gib, 4),
            "extra_time": round(cost.ms / base["ms"] - 1, 4) if both else None,
            "exactness": exactness,
            "error": error,
            "note": note,
        }
        if not self.rows:
            heads = f"{'variant':<37}{'peak GiB':>10}{'saved':>9}{'formula':>9}{'ms':>10}{'time':>9}"
            print(f"{heads}  {'result':<16}{'error':>9}")
        self.rows.append(row)

        def shown(value: float | None, style: str) -> str:
            return "-" if value is None else format(value, style)

        print(
            f"{variant:<37}{cost.status if cost.status != 'ok' else shown(cost.peak_gib, '.4f'):>10}"
            f"{shown(row['saved_gib'], '+.4f'):>9}{shown(row['formula_saved_gib'], '+.4f'):>9}"
            f"{shown(cost.ms, '.2f'):>10}{shown(row['extra_time'], '+.1%'):>9}  {exactness or '-':<16}"
            f"{shown(error, '.1e'):>9}  {note}".rstrip()
        )

    def ask(self, question: str, unit: str, saves: Callable[[int], bool], sizes: Sequence[int], step: int) -> None:
        """Find a break-even size, print it and keep every size that was tried."""
        tried: list[tuple[int, bool]] = []

        def noted(size: int) -> bool:
            tried.append((size, bool(saves(size))))
            return tried[-1][1]

        low, high = find_break_even(noted, sizes, step)
        if high is None:
            words = f"not up to {low:,} {unit}"
        else:
            words = f"from {high:,} {unit} on" + (
                f" (not yet at {low:,})" if low is not None else ", the smallest tried"
            )
        self.break_even.append({"question": question, "unit": unit, "low": low, "high": high, "tried": sorted(tried)})
        print(f"{question}: {words}")

    def save(self, **more: Any) -> Path:
        """Write <experiment>/<name>/run.json and print the path as one JSON object on the last line."""
        run = RunFolder.create(self.settings.output_folder, self.experiment, self.name, unique=True)
        run.update(
            status="ok",
            experiment=self.experiment,
            run_name=run.path.name,
            **describe_environment(self.device),
            settings=asdict(self.settings),
            results={"rows": self.rows, "break_even": self.break_even, **more},
            finished_at=now(),
        )
        print(json.dumps({"run": str(run.path), "status": "ok", "rows": len(self.rows)}))
        return run.path

    def finish(self, trusted: Callable[[str], bool] = lambda variant: True, **more: Any) -> int:
        """`save`, and the exit status: 1, with the names, if a variant that is trusted to be exact is `changed`."""
        self.save(**more)
        rows = (row for row in self.rows if row["exactness"] == "changed")
        changed = [row["variant"] for row in rows if trusted(row["variant"])]
        if changed:
            print(f"error beyond rounding: {', '.join(changed)}")
        return 1 if changed else 0


def relative_error(values: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """The largest over the tensors of |value - reference| / |reference| (2-norms in fp64); 0 if all are equal.

    Infinite where a value or a reference is not finite, so that no bound lets it pass.
    """
    worst = 0.0
    for value, exact in zip(values, reference, strict=True):
        difference = (value.detach().double() - exact.detach().double()).norm().item()
        scale = exact.detach().double().norm().item()
        if not (math.isfinite(difference) and math.isfinite(scale)):
            return math.inf
        worst = max(worst, difference / scale if scale else difference)
    return worst


def compare(
    values: Sequence[torch.Tensor], plain: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> tuple[str, float]:
    """How exact results are beside those of plain PyTorch in the same precision.

    Returns:
        bitwise (equal to `plain`), within rounding (no more than twice the error of `plain`) or changed; and
        `relative_error` from `exact`.
    """
    error = relative_error(values, exact)
    if all(torch.equal(value, other) for value, other in zip(values, plain, strict=True)):
        return "bitwise", error
    return "within rounding" if error <= 2 * relative_error(plain, exact) + 1e-5 else "changed", error


def main() -> int:
    """Measure a step that allocates 64 MiB and takes 20 ms."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def step() -> None:
        block = torch.ones(64 * 2**20, dtype=torch.uint8, device=device)
        time.sleep(0.02)
        del block

    cost = measure(step, device, repeats=5)
    seen = cost.peak_gib - cost.start_gib
    print(f"{seen * GIB / 2**20:.2f} MiB seen, 64 expected; {cost.ms:.1f} ms seen, 20 or a little more expected")
    return 0 if abs(seen * GIB - 64 * 2**20) < 2**10 and cost.ms >= (20 if device.type == "cpu" else 0) else 1


if __name__ == "__main__":
    run_script(main)
