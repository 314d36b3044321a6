"""Checkpoints of parallel runs: whole at any moment, exact, and read by any number of processes."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from parallel_tools import Run, difference, drive
from torch import nn

import sharded_checkpoint
from optimizers import make_optimizer
from processes import ALONE
from run_results import measured_elsewhere, read_run
from sharded_checkpoint import SINGLE, load_checkpoint, newest, remove_others, save_sharded
from training_state import capture, save_state
from utils import SettingsError

CPU = torch.device("cpu")
HALF = {"checkpoint_every_minutes": 1e-9, "max_steps": 6}
VARIANTS = [("adamw", "fp32"), ("adam", "fp32"), ("adamw_8bit", "fp32"), ("adamw", "bf16_master"),
            ("adamw", "bf16_stochastic")]  # fmt: skip


class Trial:
    """A small model with its optimizer, trained for some steps."""

    def __init__(self, name: str = "adamw", parameters: str = "fp32", steps: int = 2):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64, bias=False))
        options = {"learning_rate": 0.01, "weight_decay": 0.1, "device": CPU, "parameters": parameters}
        self.optimizer = make_optimizer(name, self.model.parameters(), **options)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        for step in range(steps):
            self.step(step)

    def step(self, number: int) -> None:
        torch.manual_seed(number)
        weight = self.model[0].weight
        self.model(torch.randn(8, 64, dtype=weight.dtype)).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def parts(self) -> tuple:
        return self.model, self.optimizer, self.scaler

    def save(self, folder: Path, step: int = 2) -> Path:
        save_sharded(folder, *self.parts, {"step": step}, ALONE)
        return newest(folder)

    def values(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
def test_a_checkpoint_goes_on_bit_for_bit(tmp_path, name, parameters):
    """Also from a file of one process. 8-bit states are kept as numbers: equal to the last bit of a scale."""
    trial = Trial(name, parameters)
    path = trial.save(tmp_path)
    tensors, details = capture(*trial.parts, CPU)
    save_state(tmp_path / "other" / SINGLE, tensors, details | {"step": 2})
    trial.step(2)
    for source in (path, tmp_path / "other" / SINGLE):
        other = Trial(name, parameters, steps=0)
        assert load_checkpoint(source, *other.parts, ALONE)["step"] == 2
        other.step(2)
        for value, exact in zip(other.values(), trial.values(), strict=True):
            torch.testing.assert_close(value, exact, atol=0, rtol=1e-6 if name == "adamw_8bit" else 0)


def test_names_are_plain_and_tensors_whole(tmp_path):
    path = Trial().save(tmp_path)
    known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    assert {name for name in known if "0.weight" in name} == {
        "model.0.weight", "optimizer.0.weight.exp_avg", "optimizer.0.weight.exp_avg_sq", "optimizer.0.weight.step",
    }  # fmt: skip
    assert tuple(known["optimizer.0.weight.exp_avg"].size) == (64, 64)


def test_a_newer_checkpoint_replaces_the_older(tmp_path):
    trial = Trial()
    trial.save(tmp_path, 2)
    (tmp_path / SINGLE).write_bytes(b"older")
    with patch.object(sharded_checkpoint, "load_state", lambda path: ({}, {"step": 1})):
        assert trial.save(tmp_path, 3) == tmp_path / "step-3"
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


@pytest.mark.parametrize("moment", ["writing", "before the rename", "before the older is removed"])
def test_a_kill_leaves_one_complete_checkpoint(tmp_path, moment):
    """A kill is played by an exception that nothing catches; what is on the disk then is what a kill leaves."""

    class Killed(BaseException):
        pass

    def die(*args: object, **options: object) -> None:
        raise Killed

    trial = Trial()
    trial.save(tmp_path, 2)
    place = {
        "writing": (dcp, "save"),
        "before the rename": (Path, "replace"),
        "before the older is removed": (sharded_checkpoint, "remove_others"),
    }[moment]
    with patch.object(*place, die), pytest.raises(Killed):
        trial.save(tmp_path, 3)
    kept = newest(tmp_path)
    assert kept.name == ("step-3" if moment == "before the older is removed" else "step-2")
    load_checkpoint(kept, *Trial(steps=0).parts, ALONE)
    trial.save(tmp_path, 4)  # and what was left lying about is gone
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


def test_the_same_step_is_saved_once(tmp_path):
    trial = Trial()
    before = (trial.save(tmp_path) / ".metadata").stat().st_mtime_ns
    assert (trial.save(tmp_path) / ".metadata").stat().st_mtime_ns == before


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    trial = Trial()
    trial.save(tmp_path, 2)
    full = OSError(28, "No space left on device")
    with (
        patch.object(dcp, "save", side_effect=full),
        pytest.raises(SettingsError, match=r"saving .*step-3 failed .*No space left.*last checkpoint.* is still there"),
    ):
        trial.save(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


@pytest.mark.parametrize("what", ["details", "index", "index of nonsense", "tensors", "tensors cut"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, what):
    path = Trial().save(tmp_path)
    tensors = next(path.glob("*.distcp"))
    if what == "details":
        (path / "details.json").write_text("{")
    elif what == "index":
        (path / ".metadata").unlink()
    elif what == "index of nonsense":
        (path / ".metadata").write_bytes(b"nonsense")
    elif what == "tensors":
        tensors.unlink()
    else:
        tensors.write_bytes(tensors.read_bytes()[:1000])
    with pytest.raises(SettingsError, match=r"checkpoint .*step-2 is damaged: \S") as caught:
        load_checkpoint(path, *Trial(steps=0).parts, ALONE)
    assert "\n" not in str(caught.value)


def test_another_model_is_one_sentence(tmp_path):
    path = Trial().save(tmp_path)
    other = Trial(steps=0)
    other.model.append(nn.Linear(64, 2))
    with pytest.raises(SettingsError, match="other parameters"):
        load_checkpoint(path, *other.parts, ALONE)


def test_the_newest_is_the_later_step(tmp_path):
    """A run went on in one process, or in several, and was killed before the older checkpoint was removed."""
    trial = Trial()
    assert newest(tmp_path) is None
    trial.save(tmp_path, 5)
    tensors, details = capture(*trial.parts, CPU)
    save_state(tmp_path / SINGLE, tensors, details | {"step": 7})
    assert newest(tmp_path) == tmp_path / SINGLE
    save_state(tmp_path / SINGLE, tensors, details | {"step": 3})
    assert newest(tmp_path) == tmp_path / "step-5"
    remove_others(tmp_path, tmp_path / SINGLE)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


# --- Another number of processes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    place = tmp_path_factory.mktemp("sharded")

    def copy(run: Run, name: str) -> Path:
        shutil.copytree(run.path, run.path.with_name(name))
        return run.path.with_name(name)

    eight = {"optimizer": "adamw_8bit", "embedding_dim": 64}  # compiled: the dear part of this test
    wide = {"embedding_dim": 64}  # which 8-bit states follow closely, unless they are lost
    found = drive(place, {"whole": {}, "half": HALF, "whole-64": wide}, processes=1)
    two = {
        "fsdp-half": HALF | {"parallel": "fsdp"},
        "one-to-two": {"resume": copy(found["half"], "one-to-two"), "parallel": "fsdp", "max_steps": 12},
        "8bit-half": HALF | eight | {"parallel": "fsdp"},
        "stochastic": {"parallel": "fsdp", "parameters": "bf16_stochastic"},
        "stochastic-half": HALF | {"parallel": "fsdp", "parameters": "bf16_stochastic"},
        "stochastic-again": {"resume": place / "llm" / "stochastic-half", "max_steps": 12},
        "ddp-half": HALF | {"parallel": "ddp"},
        "two-to-two": {"resume": place / "llm" / "ddp-half", "parallel": "fsdp", "max_steps": 12},
        "forgotten": {"resume": copy(found["half"], "forgotten"), "max_steps": 12},
    }
    found |= drive(place, two)
    one = {
        "two-to-one": {"resume": copy(found["fsdp-half"], "two-to-one"), "max_steps": 12},
        "8bit-to-one": {"resume": copy(found["8bit-half"], "8bit-to-one"), "max_steps": 12},
    }
    return found | drive(place, one, processes=1)


def succeeded(run: Run) -> bool:
    return all(rank["status"] == 0 for rank in run.ranks) and run.info["status"] == "ok"


@pytest.mark.parametrize(
    ("name", "reference"),
    [("one-to-two", "whole"), ("two-to-one", "whole"), ("two-to-two", "whole"), ("8bit-to-one", "whole-64")],
)
def test_losses_go_on_as_if_nothing_had_happened(runs, name, reference):
    run = runs[name]
    assert succeeded(run), run.ranks[0]["stderr"]
    assert [row["step"] for row in run.steps] == list(range(1, 13))
    bound = 2e-3 if "8bit" in name else 1e-5
    assert difference(run.losses, runs[reference].losses) < bound
    assert difference([run.info["results"]["test_loss"]], [runs[reference].info["results"]["test_loss"]]) < bound
    assert [row["step"] for row in run.info["resumed"]] == [6]


def test_random_numbers_follow_from_the_step(runs):
    """Stochastic rounding after a resume is that of the run that never stopped, bit for bit."""
    assert succeeded(runs["stochastic-again"]), runs["stochastic-again"].ranks[0]["stderr"]
    assert runs["stochastic-again"].losses == runs["stochastic"].losses


def test_the_folder_says_who_went_on(runs):
    assert (runs["one-to-two"].info["parallel"], runs["one-to-two"].info["world_size"]) == ("fsdp", 2)
    assert (runs["two-to-one"].info["parallel"], runs["two-to-one"].info["world_size"]) == (None, 1)
    for name in ("one-to-two", "two-to-one"):
        header, *rows = (runs[name].path / "memory.csv").read_text().splitlines()
        assert header.endswith(",rank") and all(row.count(",") == header.count(",") for row in rows)
    ranks = {row.rsplit(",", 1)[1] for row in (runs["one-to-two"].path / "memory.csv").read_text().splitlines()[1:]}
    assert ranks == {"0", "1"}


def test_times_and_memory_of_other_processes_do_not_count(runs):
    began = {"one-to-two": 6, "two-to-one": 6, "two-to-two": 6}  # the last from DDP to FSDP
    began["stochastic-again"] = 0  # the same method and processes, as many timed steps before as after
    first = {name: runs[name].info["results"]["first_step_ms"] for name in began}
    begun = {name: runs[name].steps[step]["step_ms"] for name, step in began.items()}
    assert first == pytest.approx(begun, abs=0.01)
    seen = {name: runs[name].info["results"]["measured_on"] for name in began}
    assert seen["two-to-one"].startswith("1 x ") and seen["one-to-two"].startswith("2 x ")
    assert not any(measured_elsewhere(read_run(runs[name].path)) for name in began)
    assert len(runs["one-to-two"].info["results"]["peak_allocated_gib_by_rank"]) == 2
    assert "peak_allocated_gib_by_rank" not in runs["two-to-one"].info["results"]


def test_a_checkpoint_of_one_kind_replaces_the_other(runs):
    assert [path.name for path in (runs["one-to-two"].path / "checkpoint").iterdir()] == ["step-12"]
    assert [path.name for path in (runs["two-to-one"].path / "checkpoint").iterdir()] == [SINGLE]
    details = json.loads((runs["one-to-two"].path / "checkpoint" / "step-12" / "details.json").read_text())
    assert details["step"] == 12 and details["batch_size"] == 8


def test_two_processes_need_a_method(runs):
    assert [rank["status"] for rank in runs["forgotten"].ranks] == [2, 2]
    assert "add --parallel ddp or --parallel fsdp" in runs["forgotten"].ranks[0]["stderr"]
