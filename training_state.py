"""The state of a training run: taken and put back bit for bit in memory, or kept in a file that survives a kill.

Holds the parameters, the optimizer's states, the gradient scaler and the random states. The batch-size search uses it
to leave no trace, the trainers to go on after an interruption. (A file of its own because both a technique and every
trainer need it.)

A file is written beside the old one, synced to disk and renamed over it, so at any moment there is one complete file.
The format is safetensors (tensors and a JSON header): loading it executes nothing.
"""

import importlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from utils import SettingsError

WRAPPERS_FROM = "torchao."  # a file may name tensor classes of this package only: no other is looked up and called


def unwrap(name: str, tensor: torch.Tensor, wrappers: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The plain tensors that hold a tensor's bits, by name.

    A subclass that wraps tensors, such as torchao's 8-bit optimizer state (codes, scales, table), is taken apart;
    `wrappers[name]` gets what `wrap` needs to build it again, ready for JSON.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return {name: tensor}
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    if not kind.startswith(WRAPPERS_FROM):
        raise TypeError(f"{name} is a {kind}; only the tensor classes of {WRAPPERS_FROM[:-1]} can be kept")
    inner, attributes = tensor.__tensor_flatten__()
    wrappers[name] = {
        "class": kind,
        "inner": list(inner),
        "attributes": [
            {"dtype": str(value).removeprefix("torch.")} if isinstance(value, torch.dtype) else value
            for value in attributes
        ],
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
    }
    plain: dict[str, torch.Tensor] = {}
    for part in inner:
        plain |= unwrap(f"{name}/{part}", getattr(tensor, part), wrappers)
    return plain


def wrap(name: str, tensors: dict[str, torch.Tensor], wrappers: dict[str, Any]) -> torch.Tensor:
    """A copy of a kept tensor, in the class it had. The inverse of `unwrap`."""
    if name not in wrappers:
        return tensors[name].clone()
    known = wrappers[name]
    module, _, kind = known["class"].rpartition(".")
    if not module.startswith(WRAPPERS_FROM):
        raise SettingsError(f"--resume: the checkpoint names the tensor class {known['class']}, which is not loaded")
    attributes = [getattr(torch, value["dtype"]) if isinstance(value, dict) else value for value in known["attributes"]]
    parts = {part: wrap(f"{name}/{part}", tensors, wrappers) for part in known["inner"]}
    build = getattr(importlib.import_module(module), kind).__tensor_unflatten__
    return build(parts, attributes, torch.Size(known["shape"]), tuple(known["stride"]))


def capture(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Copy the training state to host memory.

    Returns:
        Named tensors on the CPU that share no memory with the run, and JSON-ready details.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    optimizer_state = optimizer.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in optimizer_state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    groups = []
    for index, group in enumerate(optimizer_state["param_groups"]):
        tensors |= {f"group.{index}.{key}": v for key, v in group.items() if isinstance(v, torch.Tensor)}
        groups.append({key: value for key, value in group.items() if not isinstance(value, torch.Tensor)})
    tensors["random.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    wrappers: dict[str, Any] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        plain |= unwrap(name, value, wrappers)
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in plain.items()}
    details = {
        "optimizer_numbers": numbers,
        "param_groups": groups,
        "wrappers": wrappers,
        "scaler": scaler.state_dict(),
    }
    return copies, details


def restore(
    tensors: dict[str, torch.Tensor],
    details: dict[str, Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> None:
    """Put a captured or loaded state back; gradients are dropped. The inverse of `capture`, bit for bit."""
    wrappers = details.get("wrappers", {})  # files of older versions have none
    parts = {f"{name}/{part}" for name, known in wrappers.items() for part in known["inner"]}
    whole = [name for name in (*tensors, *wrappers) if name not in parts]
    weights = [name for name in whole if name.startswith("model.")]  # copied by the model: no clone of plain ones
    model.load_state_dict(
        {name[6:]: tensors[name] if name in tensors else wrap(name, tensors, wrappers) for name in weights}
    )
    states: dict[int, dict[str, Any]] = {int(index): dict(v) for index, v in details["optimizer_numbers"].items()}
    groups = [dict(group) for group in details["param_groups"]]
    for name in whole:
        kind, *place = name.split(".", 2)
        if kind == "optimizer":
            states.setdefault(int(place[0]), {})[place[1]] = wrap(name, tensors, wrappers)
        elif kind == "group":
            now = optimizer.param_groups[int(place[0])].get(place[1])
            value = wrap(name, tensors, wrappers)
            groups[int(place[0])][place[1]] = value.to(now.device) if isinstance(now, torch.Tensor) else value
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    optimizer.zero_grad(set_to_none=True)
    scaler.load_state_dict(details["scaler"])
    if scaler.is_enabled():
        scaler._per_optimizer_states.clear()  # a step that ran out of memory halfway left its "already unscaled" here
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)


def save_state(path: Path, tensors: dict[str, torch.Tensor], details: dict[str, Any]) -> None:
    """Write a state to `path`: beside it, synced, renamed. Until the rename the old file stays whole.

    Raises:
        SettingsError: the disk is full or the folder not writable; the half-written file is removed.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in path.parent.glob(f"{path.name}.tmp-*"):
            left_by_a_kill.unlink()
        save_file(tensors, temporary, metadata={"details": json.dumps(details)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise SettingsError(
            f"saving {path} failed ({reason}); the last checkpoint, if any, is still there: "
            "free space or change --output_folder"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_state` wrote.

    Raises:
        SettingsError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise SettingsError(f"--resume: there is no checkpoint {path}; the run ended before one was saved")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["details"])  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"--resume: checkpoint {path} is damaged: {' '.join(str(error).split())}") from None
