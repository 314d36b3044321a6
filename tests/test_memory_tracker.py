"""Nested peaks on known allocations, what counts as live, and what a phase costs when nothing is measured."""

import csv
import gc

import pytest
import torch
from torch import nn

import memory_tracker
from memory_tracker import COLUMNS, LiveTensorCounter, MemoryTracker
from utils import GIB

MIB = 2**20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def block(mib: float, device: torch.device) -> torch.Tensor:
    return torch.ones(int(mib * MIB), dtype=torch.uint8, device=device)


def mib_of(row: dict, column: str) -> float:
    return row[column] * GIB / MIB


@pytest.mark.parametrize("device", DEVICES)
def test_nested_peaks_on_known_allocations(device):
    device = torch.device(device)
    tracker = MemoryTracker(device)
    with tracker.step(3):
        kept = block(8, device)
        with tracker.phase("outer"):
            with tracker.phase("first"):
                a = block(40, device)
                del a
                b = block(10, device)
            with tracker.phase("second"):
                with tracker.phase("innermost"):
                    c = block(20, device)
                    del c
                d = block(4, device)
            del b, d
            e = block(25, device)
            del e
        with tracker.phase("after"):
            f = block(2, device)
            del f
    base = mib_of(tracker.summary()["outer"], "start_allocated_gib") - 8
    expected = {  # start, peak, end beyond what was there before
        "outer": (8, 48, 8),
        "first": (8, 48, 18),
        "second": (18, 38, 22),
        "innermost": (18, 38, 18),
        "after": (8, 10, 8),
    }
    for phase, numbers in expected.items():
        row = tracker.summary()[phase]
        seen = [mib_of(row, f"{part}_allocated_gib") - base for part in ("start", "peak", "end")]
        assert seen == pytest.approx(numbers, abs=0.01), phase
    assert kept.numel() == 8 * MIB


@pytest.mark.gpu
def test_gpu_reserved_is_recorded_and_not_below_allocated():
    tracker = MemoryTracker(torch.device("cuda"))
    with tracker.step(1), tracker.phase("phase"):
        block(64, torch.device("cuda"))
    row = tracker.summary()["phase"]
    assert row["peak_reserved_gib"] >= row["peak_allocated_gib"] > 0


def test_outer_peak_is_the_maximum_over_its_phases_and_itself():
    tracker = MemoryTracker(torch.device("cpu"))
    with tracker.step(1), tracker.phase("outer"):
        a = block(30, tracker.device)
        del a
        with tracker.phase("inner"):
            b = block(3, tracker.device)
            del b
    assert mib_of(tracker.summary()["outer"], "peak_allocated_gib") == pytest.approx(30, abs=0.01)
    assert mib_of(tracker.summary()["inner"], "peak_allocated_gib") == pytest.approx(3, abs=0.01)


def test_a_phase_met_twice_keeps_its_maximum_in_one_row(tmp_path):
    path = tmp_path / "memory.csv"
    tracker = MemoryTracker(torch.device("cpu"), path)
    for step in (1, 2):
        with tracker.step(step):
            for size in (5, 9, 7):
                with tracker.phase("micro"):
                    block(size, tracker.device)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["phase"]) for row in rows] == [("1", "micro"), ("2", "micro")]
    assert tuple(rows[0]) == COLUMNS
    assert float(rows[0]["peak_allocated_gib"]) * GIB / MIB == pytest.approx(9, abs=0.01)
    assert rows[0]["peak_reserved_gib"] == ""


def test_outside_a_step_nothing_is_measured_or_switched_on(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a phase outside a measured step must not look at the device")

    tracker = MemoryTracker(torch.device("cpu"), tmp_path / "memory.csv")
    for name in ("_now", "_peak_since_reset", "_reset_peak"):
        monkeypatch.setattr(tracker, name, fail)
    monkeypatch.setattr(memory_tracker, "LiveTensorCounter", fail)
    with tracker.phase("outer"), tracker.phase("inner"):
        block(1, tracker.device)
    assert not tracker.rows and not (tmp_path / "memory.csv").exists()


def test_an_error_inside_a_step_leaves_the_tracker_usable():
    tracker = MemoryTracker(torch.device("cpu"))
    with pytest.raises(ValueError, match="mine"), tracker.step(1), tracker.phase("outer"), tracker.phase("inner"):
        raise ValueError("mine")
    assert not tracker.rows and not tracker.active
    with tracker.step(2), tracker.phase("outer"):
        block(6, tracker.device)
    assert mib_of(tracker.summary()["outer"], "peak_allocated_gib") == pytest.approx(6, abs=0.01)


def test_a_training_step_counts_parameters_gradients_and_states():
    model = nn.Linear(512, 512, bias=False)  # 1 MiB
    optimizer = torch.optim.Adam(model.parameters())
    tracker = MemoryTracker(torch.device("cpu"), roots=(model, optimizer))
    for step in (1, 2):
        with tracker.step(step):
            with tracker.phase("forward"):
                loss = model(torch.ones(1, 512)).sum()
            with tracker.phase("backward"):
                loss.backward()
            with tracker.phase("optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    starts = {(row["step"], row["phase"]): round(row["start_allocated_gib"] * 1024, 1) for row in tracker.rows}
    assert starts[1, "forward"] == 1.0  # parameters
    assert starts[1, "optimizer"] == 2.0  # and gradients
    assert starts[2, "forward"] == 3.0  # parameters and two states, gradients freed
    assert starts[2, "optimizer"] == 4.0


def test_counter_counts_views_once_and_frees():
    with LiveTensorCounter() as counter:
        a = torch.ones(256, 1024)
        views = (a[0], a.T, a.view(-1))
        assert counter.current_bytes == MIB
        del a, views
        gc.collect()
        assert counter.current_bytes == 0
        assert counter.peak_bytes == MIB


def test_counter_sees_what_autograd_keeps():
    weight = torch.ones(1024, 256, requires_grad=True)  # 1 MiB
    with LiveTensorCounter() as counter:
        counter.add(weight)
        saved = torch.exp(weight)  # its result is kept for the backward pass
        loss = saved.sum()
        del saved
        assert 2 * MIB <= counter.current_bytes <= 2 * MIB + 64
        loss.backward()
        del loss
        assert counter.current_bytes == 2 * MIB  # weight and gradient


def test_budget_raises_pytorchs_own_error_and_only_beyond_it():
    counter = LiveTensorCounter(limit_bytes=MIB)
    with counter:
        kept = torch.ones(256, 1024)  # exactly the budget
        with pytest.raises(torch.OutOfMemoryError, match="memory budget"):
            torch.ones(1)
    assert kept.numel() == 256 * 1024


def test_main_checks_itself(capsys):
    assert memory_tracker.main() == 0
    assert "320.0 MiB seen, 320 MiB expected" in capsys.readouterr().out
