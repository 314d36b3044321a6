"""training_state.py: a state comes back bit for bit, from memory or from a file that survives kills and full disks."""

import copy
import json
import multiprocessing
import pickle
import random
import resource
import time
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from training_state import capture, load_state, restore, save_state
from utils import SettingsError

CPU = torch.device("cpu")
OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
}


class Run:
    """A small training run whose data and dropout come from the global random state."""

    def __init__(self, optimizer: str = "adam"):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)

    @property
    def parts(self) -> tuple:
        return self.model, self.optimizer, self.scaler, CPU

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = self.model(torch.randn(5, 6)).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    def everything(self) -> tuple:
        """A deep copy of all that a state holds."""
        parts = (self.model.state_dict(), self.optimizer.state_dict(), self.scaler.state_dict(), torch.get_rng_state())
        return copy.deepcopy(parts)


def same(left, right) -> bool:
    """Equal to the last bit, through dictionaries, lists and tensors (dtype and shape included)."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def through_memory(state: tuple, folder: Path) -> tuple:
    return state


def through_file(state: tuple, folder: Path) -> tuple:
    save_state(folder / "checkpoint" / "state.safetensors", *state)
    return load_state(folder / "checkpoint" / "state.safetensors")


# --- capture and restore ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [through_memory, through_file])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 5])
def test_a_run_goes_on_bit_for_bit(tmp_path, optimizer, steps, way):
    run = Run(optimizer)
    run.train(steps)
    before = run.everything()
    state = way(capture(*run.parts), tmp_path)
    expected = run.train(4), run.everything()
    assert not same(expected[1], before)
    run.optimizer.param_groups[0]["lr"] = 7.0
    run.model(torch.randn(5, 6)).sum().backward()

    restore(*state, *run.parts)
    assert same(run.everything(), before)
    assert bool(run.optimizer.state_dict()["state"]) == (steps > 0)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert same((run.train(4), run.everything()), expected)

    other = Run(optimizer)  # as in another process
    other.train(1)
    restore(*state, *other.parts)
    assert same((other.train(4), other.everything()), expected)


@pytest.mark.parametrize("steps", [0, 5])
def test_a_state_can_be_restored_twice(steps):
    run = Run()
    run.train(steps)
    before, state = run.everything(), capture(*run.parts)
    for _ in range(2):
        restore(*state, *run.parts)
        assert same(run.everything(), before)
        run.train(3)


def test_states_that_are_no_tensors(tmp_path):
    run = Run()
    run.train(1)
    run.optimizer.state[run.model[0].weight] |= {"rank": 4, "ratio": 0.1}
    before, state = run.everything(), through_file(capture(*run.parts), tmp_path)
    run.optimizer.state[run.model[0].weight] |= {"rank": 5, "ratio": 0.2}
    restore(*state, *run.parts)
    assert same(run.everything(), before)


@pytest.mark.parametrize("steps", [0, 3])
def test_captured_tensors_share_no_memory_with_the_run(steps):
    run = Run()
    run.train(steps)
    tensors, details = capture(*run.parts)
    before = copy.deepcopy((tensors, details))
    states = [value for values in run.optimizer.state.values() for value in values.values()]
    live = {tensor.untyped_storage().data_ptr() for tensor in [*run.model.state_dict().values(), *states]}
    assert live.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    assert all(tensor.device == CPU and not tensor.requires_grad for tensor in tensors.values())
    run.train(2)
    run.optimizer.param_groups[0]["lr"] = 7.0
    assert same((tensors, details), before)


def test_scaler_that_was_interrupted_inside_its_step(monkeypatch):
    """Out of memory in the first optimizer step leaves the scaler between unscaling and stepping."""

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("no memory for the optimizer's states")

    run = Run()
    state = capture(*run.parts)
    expected = run.train(1), run.everything()
    restore(*state, *run.parts)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(run.optimizer, "step", out_of_memory)
        run.train(1)
    restore(*state, *run.parts)
    assert same((run.train(1), run.everything()), expected)


def test_scaler_that_passes_values_through(tmp_path):
    run = Run()
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = through_file(capture(*run.parts), tmp_path)
    expected = run.train(2)
    restore(*state, *run.parts)
    assert run.train(2) == expected


# --- the file ---------------------------------------------------------------------------------------------------------


def test_file_is_safetensors_and_nothing_is_pickled(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was used")

    for module, names in {torch: ["save", "load"], pickle: ["dump", "dumps", "load", "loads", "Unpickler"]}.items():
        for name in names:
            monkeypatch.setattr(module, name, forbidden)
    run = Run()
    run.train(1)
    tensors, details = capture(*run.parts)
    loaded, loaded_details = through_file((tensors, details), tmp_path)
    assert same(loaded, tensors)
    assert loaded_details == json.loads(json.dumps(details))
    data = (tmp_path / "checkpoint" / "state.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header) - {"__metadata__"} == set(tensors)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_types_and_shapes_survive(tmp_path, dtype):
    tensors = {"scalar": torch.tensor(1, dtype=dtype), "empty": torch.zeros(0, 3, dtype=dtype)}
    tensors["matrix"] = (torch.randn(3, 5) > 0).to(dtype)
    assert same(through_file((tensors, {}), tmp_path)[0], tensors)


def save_forever(path: Path, states: list, started) -> None:
    for state in cycle(states):
        save_state(path, *state)
        started.set()


def test_kill_while_saving_leaves_a_whole_file(tmp_path):
    path = tmp_path / "state.safetensors"
    states = [({"x": torch.full((250_000,), float(i))}, {"step": i}) for i in (1, 2)]
    fork = multiprocessing.get_context("fork")  # starts at once: torch is loaded already
    chance, interrupted = random.Random(0), 0
    for _ in range(10):
        started = fork.Event()
        process = fork.Process(target=save_forever, args=(path, states, started), daemon=True)
        process.start()
        assert started.wait(30)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()  # SIGKILL
        process.join()
        assert process.exitcode == -9
        tensors, details = load_state(path)
        assert torch.equal(tensors["x"], states[details["step"] - 1][0]["x"])
        interrupted += len(list(tmp_path.iterdir())) > 1
        for leftover in tmp_path.glob("*.tmp-*"):
            leftover.unlink()
    assert interrupted, "no kill came while a file was being written, so nothing was tested"
    save_state(path, {"x": torch.zeros(1)}, {"step": 3})
    assert load_state(path)[1] == {"step": 3}


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"x": torch.ones(3)}, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # no file can grow beyond this
    try:
        with pytest.raises(SettingsError, match=r"saving .* failed .*File too large.*--output_folder") as caught:
            save_state(path, {"x": torch.ones(100_000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    tensors, details = load_state(path)
    assert details == {"step": 1} and torch.equal(tensors["x"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"saving .* failed .*--output_folder"):
        save_state(tmp_path / "file" / "state.safetensors", {"x": torch.ones(3)}, {})


def whole_file(path: Path) -> bytes:
    save_state(path, {"x": torch.ones(1000)}, {"step": 1})
    return path.read_bytes()


def without_details(path: Path) -> bytes:
    save_file({"x": torch.ones(3)}, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        lambda path: b"",
        lambda path: b"not a checkpoint at all",
        lambda path: whole_file(path)[:-1],
        lambda path: whole_file(path)[:100],
        lambda path: whole_file(path)[:5],
        lambda path: whole_file(path).replace(b"details", b"betails"),
        lambda path: whole_file(path).replace(b"step", b'st"p'),
        without_details,
    ],
    ids=["empty", "text", "one byte short", "half header", "five bytes", "no details", "no json", "no metadata"],
)
def test_damaged_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "state.safetensors"
    path.write_bytes(content(path))
    with pytest.raises(SettingsError, match=f"--resume: checkpoint {path} is damaged") as caught:
        load_state(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["nothing there", "a folder"])
def test_missing_file_is_one_sentence(tmp_path, make):
    make(tmp_path / "state.safetensors")
    with pytest.raises(SettingsError, match=r"--resume: there is no checkpoint .*state.safetensors"):
        load_state(tmp_path / "state.safetensors")
