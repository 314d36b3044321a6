"""Several processes train one model: DDP keeps a replica in each, FSDP2 a shard; what they hold, and what they send.

    torchrun --nproc_per_node=2 parallel.py                      both alone: time, peak memory, error, the formula
    torchrun --nproc_per_node=2 llm_train.py --parallel fsdp     train with it

Each process (rank) takes its slice of every batch; the gradients are averaged, so N processes make the update of one.
Bytes a GPU holds for P parameters in fp32 with Adam's two states, on N GPUs:

    ddp     4 P + 4 P + 8 P        replicated; the gradients lie in the buckets that are sent, 25 MB each, all step long
    fsdp    (4 P + 4 P + 8 P) / N  and in flight, unsharded: the root (embeddings, last norm, head) at 4 bytes, two
                                   blocks' parameters (the one that computes and the next, on its way) at 2 bytes in
                                   bf16, else 4, and one block's gradients, as made and in fp32 to be sent

Sent by each GPU in an update, (N-1)/N times: ddp 2 x 4 P (an all-reduce, while the backward pass runs); fsdp 4 P for
the gradients and twice the parameters (forward and backward) at 2 or 4 bytes: 8 P in bf16, 12 P in fp32. Of the
micro-batches of an update only the last sends gradients; until then FSDP keeps whole gradients (4 P) and parameters.

When it does not help: activations are not sharded, so FSDP saves nothing where they are the peak (use a smaller batch,
or checkpointing); a small model computes too little to hide what is sent, and without NVLink or InfiniBand so does a
large one; on one GPU FSDP is a copy more. Under FSDP in bf16 the blocks' norms see weights rounded to bf16.

Sources: Li et al. 2020, PyTorch Distributed, arXiv 2006.15704; Zhao et al. 2023, PyTorch FSDP, arXiv 2304.11277;
Rajbhandari et al. 2019, ZeRO, arXiv 1910.02054.
"""

import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from utils import SettingsError

METHODS = ("ddp", "fsdp")
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(minutes=30)  # for a rank that is late, such as the first one while it makes the token files
SIGNS_OF_LOSS = ("connection closed", "connection reset", "broken pipe", "gloo/transport", "nccl", "socket")
Result = TypeVar("Result")


class ProcessLost(RuntimeError):
    """Another process of the run is gone, so that nothing can be agreed on any more."""


class AgreedError(SettingsError):
    """A wrong setting or input that all ranks know of, so that one of them may say it."""


def is_lost(error: BaseException) -> bool:
    """Whether an error only says that another process is gone (its own error, if it had one, is told by that one)."""
    if isinstance(error, ProcessLost | dist.DistError):
        return True
    words = str(error).lower()
    # DCP's CheckpointException, which is no RuntimeError, holds the text of what went wrong on each rank.
    told = isinstance(error, RuntimeError) or type(error).__name__ == "CheckpointException"
    return told and any(sign in words for sign in SIGNS_OF_LOSS)


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(" ".join(str(error).split())) from None


# --------------------------------------------------------------------------------------------------------------------
# The processes, and what they agree on
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; alone (the default) every method is what one process does anyway.

    What is agreed on goes through gloo on the host: it waits for the other hosts, never for a GPU.
    """

    method: str | None = None
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    joined: bool = False  # there is a process group

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes the run folder."""
        return self.rank == 0

    def agree(self, *flags: bool) -> list[bool]:
        """Each flag: whether any rank has it set."""
        if not self.joined:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        with _talking():
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        if not self.joined:
            return value
        values = [value]
        with _talking():
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; on all of them."""
        if not self.joined:
            return [value]
        values = [None] * self.world_size
        with _talking():
            dist.all_gather_object(values, value)
        return values

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place; on a GPU nobody waits for it."""
        if self.joined:
            dist.all_reduce(value)
        return value

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks, in place."""
        return self.sum(value).div_(self.world_size) if self.joined else value

    def together(self, action: Callable[[], Result]) -> Result:
        """What every rank does before training; if it fails on one, all raise the first rank's SettingsError."""
        if not self.joined:
            return action()
        result, problem = None, None
        try:
            result = action()
        except SettingsError as error:
            problem = str(error)
        for rank, found in enumerate(self.gather(problem)):
            if found is not None:
                raise AgreedError(found if rank == 0 else f"on rank {rank}: {found}")
        return result

    def first_alone(self, action: Callable[[], Result]) -> Result | None:
        """What only rank 0 does; its result there, None elsewhere. All raise its SettingsError."""
        return self.together(lambda: action() if self.first else None)

    def first_then_others(self, action: Callable[[], Result]) -> Result:
        """Rank 0 does it first, so that the others find what it left (a cache of files)."""
        result = self.first_alone(action)
        return result if not self.joined else self.together(lambda: result if self.first else action())

    def mine(self, items: Any) -> Any:
        """This rank's contiguous slice; the lengths of all slices differ by one at most."""
        begin, end = (len(items) * place // self.world_size for place in (self.rank, self.rank + 1))
        return items[begin:end]

    def with_rank(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Every rank's rows with a column `rank`."""
        return [row | {"rank": rank} for rank, own in enumerate(self.gather(rows)) for row in own]

    def reseed(self, *place: int | str, alike: bool = False) -> None:
        """In a parallel run: random numbers that follow from the seed and the step, so that no state need be kept.

        Args:
            place: seed, step and what is drawn.
            alike: the same on all ranks; without it dropout differs from rank to rank, as it must.
        """
        if self.method is None:
            return
        words = "/".join(map(str, (*place, 0 if alike else self.rank)))
        torch.manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7]))

    def description(self) -> dict[str, Any]:
        """For run.json."""
        return {} if self.method is None else {"parallel": self.method, "world_size": self.world_size}


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun, or something like it, started this process."""
    return all(name in os.environ for name in VARIABLES)


@contextmanager
def process_group(cuda: bool) -> Iterator[Ranks]:
    """Join the processes that torchrun started, `method` still open; without torchrun this process is alone.

    Ranks other than the first print nothing: their standard output is closed.

    Args:
        cuda: the run is to use a GPU, LOCAL_RANK's, and NCCL beside gloo.

    Raises:
        SettingsError: there are more processes on this machine than GPUs.
    """
    if not launched():
        yield ALONE
        return
    rank, local_rank, world_size = (int(os.environ[name]) for name in VARIABLES[:3])
    device = None
    if cuda:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise SettingsError(
                f"torchrun started process {local_rank + 1} on a machine with {count} GPUs; lower --nproc_per_node "
                "or use --device cpu"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    with _talking():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE, device_id=device)
    output = sys.stdout
    if rank > 0:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    try:
        yield Ranks(None, rank, local_rank, world_size, joined=True)
    except AgreedError as error:
        if rank == 0:
            raise
        raise SystemExit(2) from error  # the first rank says it
    except Exception as error:
        if world_size > 1:
            end_at_once(error, rank, 2 if isinstance(error, SettingsError) else 1)
        raise
    finally:
        if rank > 0:
            sys.stdout.close()
            sys.stdout = output


def end_at_once(error: Exception | None, rank: int, status: int = 1) -> None:
    """Leave without cleaning up: NCCL's would wait for the others, who wait for this process's end."""
    if isinstance(error, SettingsError):
        print(f"{Path(sys.argv[0]).name}: error: on rank {rank}: {error}", file=sys.stderr)
    elif error is not None:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave(ranks: Ranks, status: int) -> None:
    """End the process group after a run that returned `status`."""
    if ranks.world_size > 1 and status == 1:
        end_at_once(None, ranks.rank)
    if ranks.joined:
        dist.destroy_process_group()


def check_launch(method: str | None, ranks: Ranks) -> Ranks:
    """The ranks with their method.

    Raises:
        SettingsError: torchrun without --parallel, or --parallel without torchrun.
    """
    script = Path(sys.argv[0]).name
    if method is not None and not ranks.joined:
        raise SettingsError(
            f"--parallel {method} needs processes: torchrun --nproc_per_node=2 {script} --parallel {method} ...; "
            "for a single process leave --parallel out"
        )
    if method is None and ranks.world_size > 1:
        raise SettingsError(
            f"torchrun started {ranks.world_size} processes and each would train the same; add --parallel ddp or "
            "--parallel fsdp, or start the script without torchrun"
        )
    return replace(ranks, method=method)


def check_parallel(settings: Any) -> None:
    """Raise where a setting of llm_train.py cannot be combined with --parallel."""
    if settings.optimizer_in_backward:
        raise SettingsError(
            "--optimizer_in_backward true updates a parameter before the processes have averaged its gradient, so it "
            f"excludes --parallel {settings.parallel}; leave one of them out"
        )
    if settings.adjust_batch_size:
        raise SettingsError(
            "--adjust_batch_size true under --parallel would hang when a batch size fits in one process and not in "
            "another; search in one process without --parallel, and give --batch_size times the number of processes"
        )


def check_batches(batch_size: int, tokens_per_update: int | None, context_length: int, world_size: int) -> None:
    """Raise where the processes cannot have equal shares."""
    if batch_size % world_size:
        raise SettingsError(
            f"--batch_size {batch_size} is the sequences of all processes together and not divisible by the "
            f"{world_size} there are; use a multiple of {world_size}"
        )
    if tokens_per_update is not None and tokens_per_update // context_length % world_size:
        raise SettingsError(
            f"--tokens_per_update {tokens_per_update} is {tokens_per_update // context_length} sequences, which "
            f"{world_size} processes cannot share equally; use a multiple of {world_size * context_length}"
        )


# --------------------------------------------------------------------------------------------------------------------
# The model in several processes
# --------------------------------------------------------------------------------------------------------------------


class Entry(nn.Module):
    """A model whose forward is one of its methods: DDP can only wrap a module's forward."""

    def __init__(self, model: nn.Module, entry: str):
        super().__init__()
        self.model, self.entry = model, entry

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs) if self.entry == "forward" else getattr(self.model, self.entry)(inputs)


def place_model(model: nn.Module, ranks: Ranks, device: torch.device, precision: str, entry: str) -> nn.Module:
    """Move a model to the device, under FSDP each rank's shard of it, block by block; before the optimizer is made.

    Args:
        model: on the CPU, with its `blocks`, the same on every rank.
        precision: of the run; in bf16 and fp8 a GPU's blocks are gathered in bf16. Autocast stays around it.
        entry: forward, or the method that the training calls instead.
    """
    if ranks.method != "fsdp":
        return model.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (ranks.world_size,))
    # On a CPU the norms under autocast cannot take bf16 weights beside fp32 hidden states.
    half = torch.bfloat16 if precision in ("bf16", "fp8") and device.type == "cuda" else None
    # Gradients are summed in fp32, and the residual stream stays what it is in one process.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=replace(policy, param_dtype=half))
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if entry != "forward":
        register_fsdp_forward_method(model, entry)
    return model.to(device)  # buffers


def lower_parameters(model: nn.Module, ranks: Ranks, parameters: str) -> list[torch.Tensor] | None:
    """Under FSDP, make bf16_* parameters bf16 in the way it allows; returns the values they had, for a master copy.

    (Elsewhere the optimizer does it when it is made.)
    """
    if ranks.method != "fsdp" or parameters == "fp32":
        return None
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model._apply(lambda tensor: tensor.to(torch.bfloat16) if isinstance(tensor, nn.Parameter) else tensor)
    return before


def compile_blocks(model: nn.Module, run_block: Callable[[int, Callable], Callable]) -> None:
    """torch.compile each block for itself: gradients are sent as soon as a block's are there, not after the last one's.

    A whole compiled backward pass gives all gradients at its end. The hooks of FSDP stay outside of the compiled code.

    Args:
        run_block: (index, a block's forward) -> what is compiled; it puts checkpointing inside.
    """
    torch._dynamo.config.optimize_ddp = False  # it would split the blocks again, and cannot with checkpointing
    for index, block in enumerate(model.blocks):
        block.forward = torch.compile(run_block(index, block.forward), fullgraph=True)


def wrap_model(model: nn.Module, ranks: Ranks, device: torch.device, entry: str) -> Callable:
    """What the training calls for a forward pass."""
    if ranks.method != "ddp":
        return model if entry == "forward" else getattr(model, entry)
    ddp = nn.parallel.DistributedDataParallel
    # Buffers never change; PyTorch 2.15 has another word for not sending them.
    word = "forward_sync_buffers" if "forward_sync_buffers" in signature(ddp).parameters else "broadcast_buffers"
    return ddp(
        Entry(model, entry),
        device_ids=[ranks.local_rank] if device.type == "cuda" else None,
        **{word: False},
        gradient_as_bucket_view=True,  # otherwise gradients would be there twice
    )


def sending_gradients(model: nn.Module, wrapped: Callable, ranks: Ranks, last: bool) -> AbstractContextManager:
    """Around a micro-batch's forward and backward pass: only the last one of an update sends gradients."""
    if ranks.method == "ddp":
        return nullcontext() if last else wrapped.no_sync()
    if ranks.method == "fsdp":
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last)
    return nullcontext()


def eager(ranks: Ranks, compiled: bool) -> AbstractContextManager:
    """Around a forward pass that must not run compiled blocks."""
    return torch.compiler.set_stance("force_eager") if compiled and ranks.method is not None else nullcontext()


# --------------------------------------------------------------------------------------------------------------------
# The formula
# --------------------------------------------------------------------------------------------------------------------


def held_bytes(method: str | None, world_size: int, parameters: int, bytes_per_parameter: float = 16) -> float:
    """Bytes a GPU holds for parameters, gradients and optimizer states (see optimizers.state_bytes_per_parameter)."""
    return parameters * bytes_per_parameter / (world_size if method == "fsdp" else 1)


def in_flight_bytes(method: str | None, blocks: Sequence[int], root: int, gathered_bytes: int = 4) -> int:
    """Bytes a GPU holds unsharded for a while, at most: see the top of this file.

    Args:
        blocks: parameters of each block.
        root: parameters outside of the blocks.
        gathered_bytes: of a block's parameter: 2 in bf16, else 4.
    """
    if method != "fsdp":
        return 0
    largest = max(blocks, default=0)
    two = sum(sorted(blocks)[-2:])
    return 4 * root + gathered_bytes * two + (gathered_bytes + 4) * largest


def sent_bytes(method: str | None, world_size: int, parameters: int, gathered_bytes: int = 4) -> float:
    """Bytes each GPU sends in an update."""
    once = {None: 0, "ddp": 2 * 4, "fsdp": 4 + 2 * gathered_bytes}[method]
    return parameters * once * (world_size - 1) / world_size
