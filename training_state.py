"""The state of a training run: taken and put back bit for bit in memory, or kept in a file that survives a kill.

Holds the parameters, the optimizer's states, the gradient scaler and the random states. The batch-size search uses it
to leave no trace, the trainers to go on after an interruption. (A file of its own because both a technique and every
trainer need it.)

A file is written beside the old one, synced to disk and renamed over it, so at any moment there is one complete file.
The format is safetensors (tensors and a JSON header): loading it executes nothing.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils import SettingsError


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
    tensors["random.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    details = {
        "optimizer_numbers": numbers,
        "param_groups": optimizer_state["param_groups"],
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
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    states: dict[int, dict[str, Any]] = {int(index): dict(v) for index, v in details["optimizer_numbers"].items()}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            states.setdefault(int(index), {})[key] = value.clone()
    optimizer.load_state_dict({"state": states, "param_groups": details["param_groups"]})
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
