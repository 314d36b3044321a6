"""Find the largest batch size that trains: grow by a quarter until out of memory, then bisect.

    python batch_size.py                          search with a small model under a budget of 0.25 GiB, probe by probe
    python batch_size.py --memory_budget_gib 0.5  a card of another size

Growing alone (64, 80, 100, 125, 156, 195, 243, 303, 378, ...) can only end on a point of that grid: two techniques
whose true limits are 200 and 240 both "reach 195". Bisection between the last size that ran and the first that did not
finds the limit to the sequence.

A probe is whole training steps with the optimizer's states in place, and one evaluation pass, because the first step of
a run needs less memory than the later ones. Only a size that ran is returned. Afterwards the parameters, the optimizer
and the random state are bit for bit what they were. A larger batch changes the optimisation (fewer updates an epoch):
`--tokens_per_update` of llm_train.py keeps that fixed, and a comparison of quality needs it.

After an out-of-memory error the exception's traceback holds the frames and so the tensors of the failed step; a smaller
size would fail too. So the except block is left before anything is cleaned up (pytorch issues 18853 and 27600).
"""

import csv
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from memory_tracker import LiveTensorCounter
from training_state import capture, restore
from utils import GIB, SettingsError, is_out_of_memory, parse_settings, run_script, setting

METHODS = ("grow", "bisect")
GROWTH = 1.25


@dataclass
class Probe:
    """One tried size. status: ok, oom or error; peaks in GiB (reserved is None without a GPU)."""

    batch_size: int
    status: str
    peak_allocated_gib: float
    peak_reserved_gib: float | None
    seconds: float


def use_expandable_segments(device: torch.device) -> None:
    """Let PyTorch's CUDA allocator grow one segment instead of collecting many of fixed sizes.

    With fixed segments a batch near the limit may run in a probe and fail in training, or the other way round, by the
    luck of which sizes were asked for before: on an 80 GB card a size that had run failed in training with 12.7 GiB
    reserved but unusable. Call it before the first allocation. Where PYTORCH_CUDA_ALLOC_CONF is set, the
    allocator stays as it says (https://docs.pytorch.org/docs/stable/notes/cuda.html).
    """
    if device.type == "cuda" and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        # The setter moved and was renamed between PyTorch 2.9 and 2.11.
        set_allocator = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (set_allocator or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def set_memory_budget(device: torch.device, gib: float | None) -> None:
    """Make a GPU behave like one with `gib` GiB: PyTorch's allocator refuses to reserve more (the context is extra).

    Raises:
        SettingsError: the budget is not positive or larger than the card.
    """
    if gib is None or device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    if gib > total:
        raise SettingsError(f"--memory_budget_gib {gib} is more than this card's {total:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(gib / total)


@contextmanager
def memory_kept_free(device: torch.device, gib: float | None, share: float) -> Iterator[None]:
    """While it is open, a GPU's allocator refuses the last share of what it could take; without a GPU nothing happens.

    For a search whose answer has to train for hours, in which the allocator's free memory comes in other pieces than in
    the steps of a probe. Of 48 answers found on an H100 up to the very limit, 4 ran out of memory within nine steps of
    training, for want of less than 0.02 GiB.

    Args:
        gib: the budget (see `set_memory_budget`), which holds again afterwards; None is the whole card.
        share: of the budget, or of what is free on the card if that is less; from 0 to below 1.
    """
    if device.type != "cuda" or share == 0:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    reachable = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    budget = total if gib is None else gib * GIB
    torch.cuda.set_per_process_memory_fraction((1 - share) * min(budget, reachable) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(budget / total)


def try_batch_size(
    train: Callable[[int], None],
    batch_size: int,
    *,
    device: torch.device,
    roots: tuple[nn.Module, torch.optim.Optimizer],
    limit_bytes: int | None,
) -> tuple[Probe, str]:
    """Run one probe and clean up after it.

    Returns:
        The probe and the error's text (empty if it ran).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        counter = None
    else:
        counter = LiveTensorCounter(limit_bytes)
        counter.add_all(roots)
    status, message = "ok", ""
    begin = time.perf_counter()
    try:
        with counter or nullcontext():
            train(batch_size)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, MemoryError) as error:
        status = "oom" if is_out_of_memory(error) else "error"
        message = " ".join(str(error).split())
    # The except block has been left: its traceback, and with it the failed step's tensors, can go now.
    seconds = time.perf_counter() - begin
    if counter is not None:
        allocated, reserved = counter.peak_bytes / GIB, None
    else:
        allocated = torch.cuda.max_memory_allocated(device) / GIB
        reserved = round(torch.cuda.max_memory_reserved(device) / GIB, 4)
    roots[1].zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Probe(batch_size, status, round(allocated, 4), reserved, round(seconds, 3)), message


def find_batch_size(
    train: Callable[[int], None],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    start: int,
    maximum: int,
    method: str = "bisect",
    limit_bytes: int | None = None,
    csv_path: Path | None = None,
    report: Callable[[Probe], None] = lambda probe: None,
) -> tuple[int, list[Probe]]:
    """Largest batch size for which `train(batch_size)` runs.

    Args:
        train: runs whole training steps (forward, loss, backward, optimizer) and an evaluation pass of that size.
        model, optimizer, scaler: what `train` changes; put back afterwards, bit for bit.
        start: first size tried; each next one is int(1.25 x the last).
        maximum: no larger size is tried.
        method: "grow" returns the last size of the grid that ran; "bisect" goes on to the exact limit.
        limit_bytes: budget for live tensor bytes without a GPU (on a GPU see `set_memory_budget`).
        csv_path: gets one row a probe, as soon as it has ended.
        report: called with each probe.

    Returns:
        The size and the probes in the order tried.

    Raises:
        SettingsError: not even one sequence fits (with "grow": the start size does not), or a size fails for another
            reason than memory.
    """
    tensors, details = capture(model, optimizer, scaler, device)
    probes: list[Probe] = []

    def runs(size: int) -> bool:
        # As a run begins: with optimizer states left by the last probe the allocator's memory would be in other pieces.
        restore(tensors, details, model, optimizer, scaler, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        probe, message = try_batch_size(train, size, device=device, roots=(model, optimizer), limit_bytes=limit_bytes)
        probes.append(probe)
        if csv_path is not None:
            with csv_path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(asdict(probe)), lineterminator="\n")
                if len(probes) == 1:
                    writer.writeheader()
                writer.writerow(asdict(probe))
        report(probe)
        if probe.status == "error":
            raise SettingsError(
                f"--adjust_batch_size: batch size {size} failed, and not for lack of memory: {message}; "
                "a smaller --max_batch_size avoids it"
            )
        return probe.status == "ok"

    try:
        largest, too_large = 0, None
        size = min(start, maximum)
        while largest < maximum and too_large is None:
            if runs(size):
                largest, size = size, min(max(size + 1, int(GROWTH * size)), maximum)
            else:
                too_large = size
        if method == "grow" and largest == 0:
            raise SettingsError(
                f"--batch_size {start} does not fit in memory, and --batch_size_search grow only goes up from there; "
                "lower --batch_size or use --batch_size_search bisect"
            )
        while method == "bisect" and too_large is not None and too_large - largest > 1:
            size = (largest + too_large) // 2
            if runs(size):
                largest = size
            else:
                too_large = size
    finally:
        restore(tensors, details, model, optimizer, scaler, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # training starts with the memory that a probe had
    if largest == 0:
        raise SettingsError(
            "--adjust_batch_size: not even one sequence fits in memory; "
            "use a smaller --model_size or --context_length, or --use_gradient_checkpointing true"
        )
    return largest, probes


@dataclass
class Settings:
    """Settings of `python batch_size.py`."""

    memory_budget_gib: float = setting(0.25, "memory of the card that is played (a GPU: its allocator's limit)")
    batch_size: int = setting(64, "first size tried")
    max_batch_size: int = setting(4096, "no larger size is tried")
    width: int = setting(256, "width of the small model")


def main() -> int:
    """Search with a small multi-layer perceptron and print the probes and both answers."""
    settings = parse_settings(Settings)
    if min(settings.memory_budget_gib, settings.batch_size, settings.max_batch_size, settings.width) <= 0:
        raise SettingsError("--memory_budget_gib, --batch_size, --max_batch_size and --width must be above 0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_memory_budget(device, settings.memory_budget_gib)
    torch.manual_seed(0)
    width = settings.width
    model = nn.Sequential(nn.Linear(width, 16 * width), nn.GELU(), nn.Linear(16 * width, width)).to(device)
    optimizer = torch.optim.Adam(model.parameters())

    def train(batch_size: int) -> None:
        for _ in range(2):
            model(torch.ones(batch_size, 16, width, device=device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    largest, probes = find_batch_size(
        train,
        model=model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        device=device,
        start=settings.batch_size,
        maximum=settings.max_batch_size,
        limit_bytes=int(settings.memory_budget_gib * GIB),
        report=lambda probe: print(f"{probe.batch_size:>6} {probe.status:<5} {probe.peak_allocated_gib:.4f} GiB"),
    )
    grid = [settings.batch_size]
    while int(GROWTH * grid[-1]) <= largest:
        grid.append(max(grid[-1] + 1, int(GROWTH * grid[-1])))
    print(
        f"largest batch size {largest} after {len(probes)} probes; growing by a quarter alone would stop at {grid[-1]}"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
