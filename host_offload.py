"""Inputs of checkpointed blocks in host memory until the backward pass: the copies of `checkpointing.py`'s offload.

A copy to pinned host memory runs while the next block computes, the copy back one block before it is needed: both are
hidden where a block computes for longer than its input takes to travel.
"""

import functools
from collections import deque
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Parked:
    """One block's input while it is away. `earlier` is the block before; the last block's input stays (`here`)."""

    def __init__(self, host: torch.Tensor | None, here: torch.Tensor | None, earlier: "Parked | None"):
        self.host, self.here, self.earlier = host, here, earlier
        self.fetched: tuple[torch.Tensor, torch.cuda.Event | None] | None = None


class HostOffload:
    """Takes the inputs of one forward pass's blocks to host memory and back; make a new one for every forward pass.

    Copies run on a stream of their own. A source is held until the computing stream has waited for its copy, at most
    IN_FLIGHT blocks later; only then may the allocator give its memory away, which needs no record_stream and so does
    not depend on how far the CPU runs ahead. What comes back is allocated on the copying stream: if a backward pass
    breaks off, its memory can only go to a later copy. The pinned buffers come from PyTorch's cache of them, which
    knows the copies under way. On a CPU the same copies are made without streams, for tests.
    """

    IN_FLIGHT = 2

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = copy_stream(device) if device.type == "cuda" else None
        self.last: Parked | None = None
        self.leaving: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self.address, self.stays = 0, False

    def run(self, block: nn.Module, hidden_states: torch.Tensor, stays: bool) -> torch.Tensor:
        """A checkpointed block, with its input in host memory unless it `stays` (the last one's, needed at once)."""
        self.address, self.stays = hidden_states.data_ptr(), stays
        with saved_tensors_hooks(self.pack, self.unpack):
            return checkpoint(block, hidden_states, use_reentrant=False)

    def finish(self) -> None:
        """The forward pass is over: free the last sources. Host memory lives as long as the graph."""
        self._free_sources(0)
        self.last = None

    def pack(self, tensor: torch.Tensor) -> Any:
        """What autograd keeps in place of a tensor; only the block's input is touched."""
        if tensor.data_ptr() != self.address or tensor.numel() == 0:
            return tensor
        tensor, host = tensor.detach(), None  # a graph must not hold itself through its hooks
        if not self.stays and self.stream is None:
            host = tensor.clone()
        elif not self.stays:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                host.copy_(tensor, non_blocking=True)
                self.leaving.append((tensor, self.stream.record_event()))
            self._free_sources(self.IN_FLIGHT)
        self.last = Parked(host, tensor if self.stays else None, self.last)
        return self.last

    def unpack(self, parked: Any) -> torch.Tensor:
        """The tensor on its device again; the copy of the block before, which is needed next, is started."""
        if not isinstance(parked, Parked):
            return parked
        tensor = parked.here
        if tensor is None:
            self._fetch(parked)
            (tensor, arrived), parked.fetched = parked.fetched, None
            if arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(arrived)
        if parked.earlier is not None:
            self._fetch(parked.earlier)
        return tensor

    def _fetch(self, parked: Parked) -> None:
        if parked.fetched is not None:
            return
        if self.stream is None:
            parked.fetched = parked.host.clone(), None
            return
        # The memory it gets may have held an earlier input that the computing stream still reads.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            tensor = parked.host.to(self.device, non_blocking=True)
            parked.fetched = tensor, self.stream.record_event()

    def _free_sources(self, remaining: int) -> None:
        while len(self.leaving) > remaining:
            _, left = self.leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(left)
