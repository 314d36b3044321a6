"""Checkpoints of runs in several processes: saved by N, read by M, one process without torchrun included.

Each process writes its shards through torch.distributed.checkpoint (DCP). The names are plain (model.head.weight,
optimizer.head.weight.exp_avg) and the shapes whole, so nothing in a checkpoint depends on how many processes saved it
or how the model was split. 8-bit states are kept as the numbers they stand for and get the same codes when they are
quantised again. Random numbers are not kept: in a parallel run they follow from seed and step.

checkpoint/step-<n>/ holds details.json, DCP's index `.metadata` and a .distcp file a process. It is written as
step-<n>.tmp, synced and renamed when all have finished, and only then are older checkpoints removed: whenever the run
is killed, one complete checkpoint is there. A run in one process keeps checkpoint/state.safetensors
(training_state.py); `newest` says which of them to go on from.

DCP's `.metadata` is a pickle, and loading a pickle can run code: resume only from folders that your own runs wrote.
(The .distcp files hold tensors alone and are read with weights_only.)

The state goes by name here and not through DCP's get_state_dict and set_state_dict: to make the optimizer's states
before loading, the latter takes an optimizer step, which with stochastic rounding or 8-bit states is none.
"""

import json
import os
import pickle
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from low_precision_adamw import local
from processes import ProcessLost, Ranks, is_lost
from training_state import load_state, wrap
from utils import SettingsError

SINGLE = "state.safetensors"
DETAILS = "details.json"


# --------------------------------------------------------------------------------------------------------------------
# The state by name
# --------------------------------------------------------------------------------------------------------------------


def like(values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """A shard's values as a part of the whole tensor that `known` is a part of."""
    if not isinstance(known, DTensor):
        return values
    return DTensor.from_local(
        values, known.device_mesh, known.placements, run_check=False, shape=known.shape, stride=known.stride()
    )


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether an optimizer's state is one of torchao's, which hold codes instead of numbers."""
    return hasattr(local(tensor), "dequantize") and hasattr(local(tensor), "codes")


def state_by_name(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """The tensors of parameters, buffers and optimizer states by plain names, and the states that are mere numbers.

    The tensors share memory with the run, but for dequantised ones.
    """
    tensors = {f"model.{name}": value.detach() for name, value in model.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                numbers.setdefault(name, {})[key] = value
            elif is_quantised(value):
                tensors[f"optimizer.{name}.{key}"] = like(local(value).dequantize(), value)
            else:
                tensors[f"optimizer.{name}.{key}"] = value
    return tensors, numbers


def put_back(
    tensors: dict[str, torch.Tensor],
    numbers: dict[str, dict[str, Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Copy a state by name into model and optimizer; tensors are whole, or sharded as the model is."""
    own = model.state_dict()
    if {f"model.{name}" for name in own} != {name for name in tensors if name.startswith("model.")}:
        raise SettingsError("--resume: the checkpoint's model has other parameters than this one")
    for name, value in own.items():
        copy_whole(tensors[f"model.{name}"], value)
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        held = optimizer.state[parameter] if state or name in numbers else {}
        for key, value in state.items():
            if value.dim() == 0:
                # Adam's count of steps lies on the host, or with its fused kernel on the GPU.
                fused = any(group.get("fused") for group in optimizer.param_groups)
                held[key] = value.detach().clone().to(parameter.device if fused else "cpu")
                continue
            if key not in held:
                held[key] = new_state(optimizer, parameter, key, value.dtype)
            copy_whole(value, held[key])
        held.update(numbers.get(name, {}))
    optimizer.zero_grad(set_to_none=True)


def new_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, dtype: torch.dtype) -> torch.Tensor:
    """An empty state of a parameter, as the optimizer would make it."""
    if hasattr(optimizer, "_new_buffer"):  # torchao's
        return optimizer._new_buffer(parameter.detach(), key == "exp_avg")
    return torch.zeros_like(parameter, dtype=dtype)


@torch.no_grad()
def copy_whole(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a tensor into one that may be sharded or quantised."""
    if isinstance(target, DTensor) and not isinstance(source, DTensor):
        source = distribute_tensor(
            source.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )  # every rank has the whole: none is sent
    source, target = local(source), local(target)
    if is_quantised(target) and target.signed:
        # Codes are relative to a block's largest number. torchao's have 1 but no -1, so a block whose largest is
        # negative comes back 0.7 % smaller; made as large as it was before, it gets the codes that it had.
        blocks = source.reshape(-1, target.block_size)
        lowest = blocks.amin(1, keepdim=True)
        largest_is_negative = (blocks == lowest) & (lowest == -blocks.abs().amax(1, keepdim=True))
        source = torch.where(largest_is_negative, blocks / target.qmap[0].abs(), blocks).view_as(source)
    target.copy_(source)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def newest(folder: Path) -> Path | None:
    """The checkpoint to go on from in a run's `checkpoint` folder; None if none is complete."""
    found = [(int(path.name[5:]), path) for path in folder.glob("step-*") if path.name[5:].isdigit()]
    single = folder / SINGLE
    if single.is_file() and found:
        found.append((load_state(single)[1]["step"], single))
    elif single.is_file():
        return single
    return max(found)[1] if found else None


def save_sharded(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    details: dict[str, Any],
    ranks: Ranks,
) -> None:
    """Write a checkpoint into `folder`; all ranks call it. Until it is complete the earlier one stays.

    Args:
        details: JSON-ready, with the number `step`; rank 0's are kept.

    Raises:
        SettingsError: the disk is full or the folder not writable, on every rank.
    """
    final = folder / f"step-{details['step']}"
    temporary = final.with_name(f"{final.name}.tmp")
    tensors, numbers = state_by_name(model, optimizer)
    details = details | {"optimizer_numbers": numbers, "scaler": scaler.state_dict()}

    def prepare() -> bool:
        if final.exists():  # a resumed run that has nothing left to train
            return False
        folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in folder.glob("step-*.tmp"):
            shutil.rmtree(left_by_a_kill)
        temporary.mkdir()
        return True

    def finish() -> None:
        with (temporary / DETAILS).open("w", encoding="utf-8") as file:
            json.dump(details, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        remove_others(folder, final)

    def told(action: Any) -> Any:
        def run() -> Any:
            try:
                return action()
            except OSError as error:
                raise SettingsError(failed(final, error.strerror)) from None

        return run

    if not ranks.broadcast(ranks.first_alone(told(prepare))):
        return
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), no_dist=not ranks.joined)
    except (CheckpointException, OSError, RuntimeError) as error:
        if is_lost(error):
            raise ProcessLost(last_words(error)) from None
        ranks.first_alone(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise SettingsError(failed(final, last_words(error))) from None
    ranks.first_alone(told(finish))


def failed(path: Path, reason: str | None) -> str:
    return (
        f"saving {path} failed ({reason}); the last checkpoint, if any, is still there: "
        "free space or change --output_folder"
    )


def last_words(error: BaseException) -> str:
    """The reason inside of DCP's error, which holds a traceback of each rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split()) or type(error).__name__


def remove_others(folder: Path, kept: Path) -> None:
    """Remove the checkpoints that `kept` replaces."""
    for path in folder.glob("step-*"):
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)
    if kept.name != SINGLE:
        with suppress(OSError):
            (folder / SINGLE).unlink(missing_ok=True)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ranks: Ranks,
) -> dict[str, Any]:
    """Put a checkpoint of either kind back; all ranks call it.

    Args:
        path: from `newest`.

    Returns:
        The details it was saved with.

    Raises:
        SettingsError: it is damaged, or of another model; on every rank.
    """

    def load() -> dict[str, Any]:
        if path.name == SINGLE:
            tensors, details = load_state(path)
            put_back(*single_by_name(tensors, details, model), model, optimizer)
            return details
        try:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be
            details = json.loads((path / DETAILS).read_text(encoding="utf-8"))
            reader = dcp.FileSystemReader(path)
            known = reader.read_metadata().state_dict_metadata
            parameters = dict(model.named_parameters())
            tensors, _ = state_by_name(model, optimizer)
            for name, about in known.items():
                if name not in tensors:
                    tensors[name] = place_for(name, about, parameters)
            tensors = {name: value for name, value in tensors.items() if name in known}
            dcp.load(tensors, storage_reader=reader, no_dist=True)  # each rank reads what it needs
            numbers = details["optimizer_numbers"]
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise SettingsError(damaged(path, last_words(error))) from None
        except (CheckpointException, pickle.UnpicklingError, ImportError) as error:
            raise SettingsError(damaged(path, last_words(error))) from None
        put_back(tensors, numbers, model, optimizer)
        return details

    details = ranks.together(load)
    if scaler.is_enabled():
        scaler.load_state_dict(details["scaler"])
    return details


def damaged(path: Path, reason: str) -> str:
    return f"--resume: checkpoint {path} is damaged: {reason}"


def place_for(name: str, about: Any, parameters: dict[str, nn.Parameter]) -> torch.Tensor:
    """Memory for a saved tensor that the run does not have yet, sharded like the parameter it belongs to."""
    parameter = parameters.get(name.removeprefix("optimizer.").rpartition(".")[0])
    if parameter is not None and tuple(parameter.shape) == tuple(about.size):
        return torch.zeros_like(parameter.detach(), dtype=about.properties.dtype)
    return torch.zeros(tuple(about.size), dtype=about.properties.dtype)


def single_by_name(
    tensors: dict[str, torch.Tensor], details: dict[str, Any], model: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """The state of training_state.capture by name: its optimizer knows parameters by number."""
    names = [name for name, _ in model.named_parameters()]
    wrappers = details.get("wrappers", {})
    parts = {f"{name}/{part}" for name, known in wrappers.items() for part in known["inner"]}
    found: dict[str, torch.Tensor] = {}
    for name in (*tensors, *wrappers):
        if name in parts or name.startswith(("random.", "group.")):
            continue
        value = wrap(name, tensors, wrappers)
        value = value.dequantize() if name in wrappers else value
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, _, key = rest.partition(".")
            name = f"optimizer.{names[int(number)]}.{key}"
        found[name] = value
    numbers = {names[int(number)]: values for number, values in details["optimizer_numbers"].items()}
    return found, numbers
