"""The search finds the exact limit, returns only sizes that ran, and leaves no trace."""

import csv
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import nn

import batch_size
from batch_size import find_batch_size, memory_kept_free, set_memory_budget, try_batch_size
from memory_tracker import LiveTensorCounter
from training_state import capture
from utils import GIB, SettingsError, is_out_of_memory

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDTH, TOKENS = 16, 200


class Run:
    """A small model with dropout whose step needs memory in proportion to the batch."""

    def __init__(self, device: str = "cpu", width: int = WIDTH):
        self.device, self.width = torch.device(device), width
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width)
        ).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        self.sizes: list[int] = []

    def train(self, size: int) -> None:
        self.sizes.append(size)
        for _ in range(2):
            self.model(torch.randn(size, TOKENS, self.width, device=self.device)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def search(self, train=None, **options):
        defaults = {"start": 64, "maximum": 100_000}
        return find_batch_size(
            train or self.train,
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            device=self.device,
            **(defaults | options),
        )

    def peak_bytes(self, size: int) -> int:
        """Peak of a fresh run at this size, counted independently of the search."""
        fresh = Run(width=self.width)
        with LiveTensorCounter() as counter:
            counter.add_all((fresh.model, fresh.optimizer))
            fresh.train(size)
        return counter.peak_bytes


@pytest.mark.parametrize(
    ("limit", "start"),
    [(1, 1), (1, 64), (3, 64), (64, 64), (65, 64), (141, 64), (500, 64), (20, 1), (100, 200), (200, 200)],
)
def test_bisect_finds_the_exact_largest_size_under_a_budget(limit, start):
    run = Run()
    largest, probes = run.search(limit_bytes=run.peak_bytes(limit), start=start)
    assert largest == limit
    assert run.peak_bytes(limit) < run.peak_bytes(limit + 1)
    assert (limit, "ok") in [(probe.batch_size, probe.status) for probe in probes]
    assert (limit + 1, "oom") in [(probe.batch_size, probe.status) for probe in probes]


def test_grow_follows_the_grid_of_the_plwiki_lab():
    run = Run()
    largest, probes = run.search(limit_bytes=run.peak_bytes(310), method="grow")
    assert [probe.batch_size for probe in probes] == [64, 80, 100, 125, 156, 195, 243, 303, 378]
    assert [probe.status for probe in probes] == ["ok"] * 8 + ["oom"]
    assert largest == 303


def test_grow_that_cannot_start_is_an_error_that_names_the_setting():
    run = Run()
    with pytest.raises(SettingsError, match="--batch_size 64 does not fit"):
        run.search(limit_bytes=run.peak_bytes(40), method="grow")


def test_not_even_one_sequence_fits():
    run = Run()
    with pytest.raises(SettingsError, match="not even one sequence"):
        run.search(limit_bytes=run.peak_bytes(1) - 1)


def test_maximum_is_never_exceeded_and_can_be_reached():
    run = Run()
    largest, _ = run.search(maximum=90)
    assert largest == 90 and max(run.sizes) == 90
    assert run.search(maximum=10)[0] == 10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trained_before", [False, True])
def test_state_is_bit_identical_afterwards(device, trained_before):
    run = Run(device)
    if trained_before:
        run.train(8)
    before, details = capture(run.model, run.optimizer, run.scaler, run.device)

    def train(size):
        run.train(size)
        if size > 100:
            raise torch.OutOfMemoryError("full")

    assert run.search(train)[0] == 100
    after, details_after = capture(run.model, run.optimizer, run.scaler, run.device)
    assert before.keys() == after.keys() and details == details_after
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert bool(run.optimizer.state) == trained_before


def test_only_a_size_that_ran_is_returned_even_if_memory_is_not_monotonic():
    """A size in the middle fails (fragmentation): the answer must still be one that ran."""
    run = Run()

    def train(size):
        if size > 300 or size == 250:
            raise torch.OutOfMemoryError("full")

    largest, probes = run.search(train)
    assert largest in [probe.batch_size for probe in probes if probe.status == "ok"]


def test_an_out_of_memory_error_does_not_keep_the_failed_steps_tensors():
    """The exception's frames hold a tensor; with it alive the next smaller size would fail too."""
    run = Run()
    held = []

    class Big:
        pass

    def train(size):
        tensor = Big()
        held.append(__import__("weakref").ref(tensor))
        if size > 70:
            raise torch.OutOfMemoryError("full")

    probe, message = try_batch_size(train, 100, device=run.device, roots=(run.model, run.optimizer), limit_bytes=None)
    assert (probe.status, message) == ("oom", "full")
    assert held[0]() is None


@pytest.mark.gpu
def test_gpu_nothing_of_the_failed_probe_is_left():
    run = Run("cuda")
    run.train(8)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()

    def train(size):
        kept = torch.ones(2**28, device="cuda")
        run.train(size)
        raise torch.OutOfMemoryError(f"full {kept.shape}")

    probe, _ = try_batch_size(train, 64, device=run.device, roots=(run.model, run.optimizer), limit_bytes=None)
    assert probe.status == "oom" and probe.peak_allocated_gib > 1
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.gpu
def test_gpu_search_under_a_budget_ends_between_a_size_that_ran_and_the_next():
    run = Run("cuda", width=256)
    try:
        set_memory_budget(run.device, 1.5)
        largest, probes = run.search(start=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    status = {probe.batch_size: probe.status for probe in probes}
    assert status[largest] == "ok" and status[largest + 1] == "oom"
    assert all(probe.peak_reserved_gib <= 1.5 for probe in probes)
    assert max(probe.peak_reserved_gib for probe in probes if probe.status == "ok") > 1.2


@pytest.mark.parametrize(
    ("gib", "free", "reserved", "inside", "afterwards"),
    [
        (20, 70, 1, 0.9 * 20 / 80, 20 / 80),  # the budget is the limit
        (None, 70, 2, 0.9 * 72 / 80, 1.0),  # what other programs and the context leave of the card
        (75, 70, 2, 0.9 * 72 / 80, 75 / 80),  # less is free than the budget
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_memory_kept_free_in_a_search(gib, free, reserved, inside, afterwards, fails):
    asked = []
    with (
        patch.object(torch.cuda, "get_device_properties", return_value=SimpleNamespace(total_memory=80 * GIB)),
        patch.object(torch.cuda, "mem_get_info", return_value=(free * GIB, 80 * GIB)),
        patch.object(torch.cuda, "memory_reserved", return_value=reserved * GIB),
        patch.object(torch.cuda, "set_per_process_memory_fraction", asked.append),
        pytest.raises(SettingsError) if fails else nullcontext(),
        memory_kept_free(torch.device("cuda"), gib, 0.1),
    ):
        assert asked == [pytest.approx(inside)]
        if fails:
            raise SettingsError("not even one sequence fits")
    assert asked == [pytest.approx(inside), afterwards]


@pytest.mark.parametrize(("device", "share"), [("cpu", 0.1), ("cuda", 0.0)])
def test_nothing_is_kept_free_without_a_gpu_or_a_share(device, share):
    with patch.object(torch.cuda, "set_per_process_memory_fraction", side_effect=AssertionError):  # noqa: SIM117
        with memory_kept_free(torch.device(device), 1, share):
            pass


@pytest.mark.gpu
def test_gpu_memory_kept_free():
    """1.6 GiB fit a budget of 1.7, and not if an eighth of it is kept free."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved() / GIB

    def fits() -> bool:
        try:
            torch.empty(int(1.6 * GIB), dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            return False
        return True

    try:
        set_memory_budget(device, 1.7 + taken)
        with memory_kept_free(device, 1.7 + taken, 0.125):
            assert not fits()
        torch.cuda.empty_cache()
        assert fits()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_gpu_budget_above_the_card_is_an_error():
    with pytest.raises(SettingsError, match="memory_budget_gib"):
        set_memory_budget(torch.device("cuda"), 10_000)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: invalid configuration argument"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


def test_another_error_is_not_taken_for_a_limit_and_is_recorded(tmp_path):
    run, path = Run(), tmp_path / "search.csv"

    def train(size):
        if size > 100:
            raise RuntimeError("CUDA error: invalid configuration argument")

    with pytest.raises(SettingsError, match=r"batch size 125 failed, and not for lack of memory.*max_batch_size"):
        run.search(train, csv_path=path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch_size"], row["status"]) for row in rows] == [
        ("64", "ok"),
        ("80", "ok"),
        ("100", "ok"),
        ("125", "error"),
    ]


def test_every_probe_is_a_row(tmp_path):
    run, path = Run(), tmp_path / "search.csv"
    budget = run.peak_bytes(141)
    _, probes = run.search(limit_bytes=budget, csv_path=path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["batch_size", "status", "peak_allocated_gib", "peak_reserved_gib", "seconds"]
    assert [int(row["batch_size"]) for row in rows] == [probe.batch_size for probe in probes] == run.sizes
    for row in rows:
        over = float(row["peak_allocated_gib"]) > budget / GIB + 1e-4
        assert not (row["status"] == "ok" and over)


def test_main_shows_both_answers(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["batch_size.py", "--width", "32", "--memory_budget_gib", "0.01"])
    assert batch_size.main() == 0
    assert "growing by a quarter alone would stop at" in capsys.readouterr().out
