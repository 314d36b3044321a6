"""Peak memory of each phase of a training step: one context manager, the same table with and without a GPU.

    tracker = MemoryTracker(device, csv_path="memory.csv", roots=(model, optimizer))
    with tracker.step(number), tracker.phase("training_step"):
        with tracker.phase("forward_pass"):
            ...

On CUDA a phase's peak comes from the caching allocator: the peak counter is reset when a phase begins and read when it
ends, and what an inner phase saw is handed to the phases around it, so that nested peaks are right. The counters move
when a tensor is made, not when the kernel runs, so no synchronisation is needed and a phase costs a few microseconds.
Without a GPU the bytes of live tensor storages are counted (LiveTensorCounter), so the columns mean the same, except
that buffers inside one operator are not seen and there is no cache, hence no reserved column.

Why not torch.profiler's record_function? Its memory columns are the net bytes (allocations minus frees) of an interval,
never a peak, and are all zero unless profile_memory=True (pytorch issues 43465 and 144778): a forward pass that
allocates 20 GiB and frees 15 shows 5.

`allocated` is what live tensors hold; `reserved` is what the allocator has taken from the driver, and what decides
about an out-of-memory error. Neither holds the CUDA context (some hundred MiB). Everything is in GiB (2^30 bytes).

    python memory_tracker.py     checks the tracker on allocations of known size
"""

import csv
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

from utils import GIB, SettingsError

WHOLE = ("training_step", "evaluation")  # phases that are no part of a step
COLUMNS = (
    "step",
    "phase",
    "start_allocated_gib",
    "peak_allocated_gib",
    "end_allocated_gib",
    "start_reserved_gib",
    "peak_reserved_gib",
)


class LiveTensorCounter(TorchDispatchMode):
    """Counts the bytes of live tensor storages while it is active, on any device, and can play a card of limited size.

    Every operator's inputs and outputs are looked at: a storage not met before is added once (views share it), and
    subtracted when PyTorch frees it. `limit_bytes` makes it raise torch.OutOfMemoryError, the error a full GPU gives,
    as soon as the live bytes exceed it. Tensors that exist before and take no part in an operator must be named with
    `add`. With `resized` the sizes are looked up again before every operator: FSDP empties the storages of gathered
    parameters and fills them again, without an operator that could be seen.
    """

    def __init__(self, limit_bytes: int | None = None, resized: bool = False):
        super().__init__()
        self.limit_bytes, self.resized = limit_bytes, resized
        self.live: dict[int, weakref.ref] = {}
        self.sizes: dict[int, int] = {}
        self.current_bytes = 0
        self.peak_bytes = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now until PyTorch frees it; a storage already counted is left alone.

        Of a subclass that wraps tensors, such as an 8-bit optimizer state, the wrapped ones count: its own storage is
        empty and only claims a size.
        """
        if is_traceable_wrapper_subclass(tensor):
            for part in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
                if isinstance(part, torch.Tensor):  # of a sharded tensor it also names the processes
                    self.add(part)
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        self.sizes[key] = storage.nbytes()

        def freed(_: weakref.ref, key: int = key) -> None:
            self.current_bytes -= self.sizes.pop(key)
            self.live.pop(key, None)

        self.live[key] = weakref.ref(storage, freed)
        self.current_bytes += self.sizes[key]
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def look_up_sizes(self) -> None:
        """Take over the present sizes of the live storages."""
        for key, reference in list(self.live.items()):
            storage = reference()
            if storage is not None and storage.nbytes() != self.sizes[key]:
                self.current_bytes += storage.nbytes() - self.sizes[key]
                self.sizes[key] = storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def add_all(self, roots: tuple[Any, ...]) -> None:
        """Count the parameters, buffers, gradients and optimizer states that modules and optimizers hold."""
        for root in roots:
            if isinstance(root, torch.nn.Module):
                held = [*root.parameters(), *root.buffers()]
                held += [p.grad for p in root.parameters() if p.grad is not None]
            else:
                held = [value for state in root.state.values() for value in state.values()]
            for tensor in held:
                if isinstance(tensor, torch.Tensor):
                    self.add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.resized:
            self.look_up_sizes()
        result = func(*args, **kwargs)
        for value in tree_iter((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                self.add(value)
        if self.limit_bytes is not None and self.current_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"live tensors need {self.current_bytes / GIB:.3f} GiB, "
                f"the memory budget is {self.limit_bytes / GIB:.3f} GiB"
            )
        return result


@dataclass
class PhaseRow:
    """What one phase of one step held, in bytes; reserved is None where there is no caching allocator."""

    phase: str
    start_allocated: int
    start_reserved: int | None
    peak_allocated: int = 0
    peak_reserved: int | None = None
    end_allocated: int = 0

    def see(self, allocated: int, reserved: int | None) -> None:
        self.peak_allocated = max(self.peak_allocated, allocated)
        if reserved is not None:
            self.peak_reserved = max(self.peak_reserved or 0, reserved)


@dataclass
class MemoryTracker:
    """Peak memory per phase and measured step; outside a `step` its phases do nothing and cost nothing.

    Args:
        device: the device whose memory counts.
        csv_path: appended to, one row per phase and measured step; None keeps the rows in memory only.
        roots: modules and optimizers whose tensors exist before a phase begins (needed without a GPU).
        limit_bytes: without a GPU, live bytes beyond this raise torch.OutOfMemoryError while a step is measured.
        resized: without a GPU, see LiveTensorCounter.
        collect: in a parallel run, given this rank's new rows returns those of all ranks, with a column `rank`.
        writes: whether `csv_path` is this process's to write.
    """

    device: torch.device
    csv_path: Path | None = None
    roots: tuple[Any, ...] = ()
    limit_bytes: int | None = None
    resized: bool = False
    collect: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None
    writes: bool = True
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cuda = self.device.type == "cuda"
        self.active = False
        self.open_phases: list[PhaseRow] = []
        self.step_rows: dict[str, PhaseRow] = {}

    # -- reading the device ------------------------------------------------------------------------------------------

    def _now(self) -> tuple[int, int | None]:
        if self.cuda:
            return torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        return self.counter.current_bytes, None

    def _peak_since_reset(self) -> tuple[int, int | None]:
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return self.counter.peak_bytes, None

    def _reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.counter.peak_bytes = self.counter.current_bytes

    # -- measuring ---------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Measure the phases inside as step `number`; rows are written when it ends, unless it ends in an error."""
        self.active, self.open_phases, self.step_rows = True, [], {}
        if not self.cuda:
            self.counter = LiveTensorCounter(self.limit_bytes, self.resized)
            self.counter.add_all(self.roots)
        try:
            with nullcontext() if self.cuda else self.counter:
                yield
        finally:
            self.active = False
        self._write(number)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside under this name; phases nest, a name met again in a step keeps its maximum."""
        if not self.active:
            yield
            return
        if self.open_phases:
            self.open_phases[-1].see(*self._peak_since_reset())
        row = PhaseRow(name, *self._now())
        self.open_phases.append(row)
        self._reset_peak()
        try:
            yield
        finally:
            row.see(*self._peak_since_reset())
            row.end_allocated = self._now()[0]
            self.open_phases.pop()
            self._reset_peak()
            if self.open_phases:
                self.open_phases[-1].see(row.peak_allocated, row.peak_reserved)
            earlier = self.step_rows.setdefault(name, row)
            earlier.see(row.peak_allocated, row.peak_reserved)
            earlier.end_allocated = row.end_allocated

    def _write(self, number: int) -> None:
        def gib(value: int | None) -> float | str:
            return "" if value is None else round(value / GIB, 6)

        new = [
            dict(
                zip(
                    COLUMNS,
                    (
                        number,
                        row.phase,
                        gib(row.start_allocated),
                        gib(row.peak_allocated),
                        gib(row.end_allocated),
                        gib(row.start_reserved),
                        gib(row.peak_reserved),
                    ),
                    strict=True,
                )
            )
            for row in self.step_rows.values()
        ]
        if self.collect is not None:
            new = self.collect(new)
        self.rows += new
        if self.csv_path is None or not self.writes or not new:
            return
        try:
            with self.csv_path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(new[0]), lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerows(new)
        except OSError as error:
            raise SettingsError(
                f"writing {self.csv_path} failed ({error.strerror}); free space or change --output_folder"
            ) from None

    # -- results -----------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, dict[str, float | str]]:
        """For each phase, in the order met, the maximum over measured steps (and ranks) of every column (GiB)."""
        result: dict[str, dict[str, float | str]] = {}
        for row in self.rows:
            best = result.setdefault(row["phase"], {column: row[column] for column in COLUMNS[2:]})
            for column, value in best.items():
                best[column] = max(value, row[column]) if value != "" else ""
        return result

    def headline(self) -> dict[str, Any]:
        """Peaks of a training step in GiB, and the phase that is the peak; null where no step was tracked."""
        summary = self.summary()
        step = summary.get("training_step", {})
        phases = {name: row["peak_allocated_gib"] for name, row in summary.items() if name not in WHOLE}
        return {
            "tracked_steps": len({row["step"] for row in self.rows if row["phase"] == "training_step"}),
            "peak_allocated_gib": step.get("peak_allocated_gib"),
            "peak_reserved_gib": step.get("peak_reserved_gib") or None,
            "peak_phase": max(phases, key=phases.get, default=None),
        }

    def table(self) -> str:
        """The summary as aligned text, GiB."""
        lines = [f"{'phase':<16}{'start':>10}{'peak':>10}{'end':>10}{'reserved':>10}   GiB, maximum over the steps"]
        for phase, row in self.summary().items():
            shown = (row["start_allocated_gib"], row["peak_allocated_gib"], row["end_allocated_gib"])
            numbers = [f"{value:10.3f}" for value in shown]
            reserved = row["peak_reserved_gib"]
            lines.append(
                f"{phase:<16}{''.join(numbers)}{reserved:10.3f}"
                if reserved != ""
                else f"{phase:<16}{''.join(numbers)}{'-':>10}"
            )
        return "\n".join(lines)


def main() -> int:
    """Allocate known sizes in nested phases and compare: outer = held + the larger of its inner phases."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tracker = MemoryTracker(device)
    mib = 2**20
    with tracker.step(1), tracker.phase("outer"):
        kept = torch.ones(64 * mib, dtype=torch.uint8, device=device)
        with tracker.phase("small"):
            torch.ones(16 * mib, dtype=torch.uint8, device=device)
        with tracker.phase("large"):
            torch.ones(256 * mib, dtype=torch.uint8, device=device)
        torch.ones(32 * mib, dtype=torch.uint8, device=device)
    del kept
    print(tracker.table())
    expected = {"small": 80, "large": 320, "outer": 320}
    start = tracker.summary()["outer"]["start_allocated_gib"]
    wrong = 0
    for phase, value in expected.items():
        seen = (tracker.summary()[phase]["peak_allocated_gib"] - start) * 1024
        wrong += abs(seen - value) > 0.01
        print(f"{phase}: {seen:.1f} MiB seen, {value} MiB expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
