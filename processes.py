"""The processes of a parallel run: how they find each other, what they agree on, and what happens when one is gone.

torchrun starts them and says in variables who is who. What is agreed on (whether to stop, who failed, which folder)
goes through gloo on the host, in every step and by all ranks alike: nothing that only one rank knows may decide who
takes part. Rank 0 prints and writes; a rank that fails says so itself, and the others notice that it is gone.
"""

import hashlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from utils import SettingsError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(minutes=30)  # for a rank that is late, such as the first one while it makes the token files
SIGNS_OF_LOSS = ("connection closed", "connection reset", "broken pipe", "gloo/transport", "nccl", "socket")
Result = TypeVar("Result")


class Heart:
    """Counts the agreements of this process, so that a thread can see whether it still comes to any."""

    beats = 0


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
        Heart.beats += 1
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


def fresh_store(rank: int, world_size: int) -> tuple[dist.Store, dist.Store]:
    """Where the processes find each other: a store of rank 0's own, named in the one that torchrun gives.

    torchrun keeps its store when it restarts the processes, and PyTorch would meet the keys of those that are gone and
    wait for them for ever. An address that a dead rank 0 has left there refuses, so it is asked for again.

    Returns:
        The store, and the given one, which without torchrun is rank 0's too and must be kept for the others.
    """
    given = next(dist.rendezvous("env://", timeout=PATIENCE))[0]
    host, key = os.environ["MASTER_ADDR"], "memory lab: store of rank 0"
    if rank == 0:
        store = dist.TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        word = f"{store.port} {os.urandom(8).hex()}"
        store.set(key, word)
        given.set(key, word)
        return store, given
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < deadline:
        word = given.get(key).decode()
        with suppress(dist.DistError):
            brief = timedelta(seconds=3)
            store = dist.TCPStore(host, int(word.split()[0]), world_size, wait_for_workers=False, timeout=brief)
            if store.get(key).decode() == word:
                store.set_timeout(PATIENCE)
                return store, given
        time.sleep(0.2)
    raise ProcessLost(f"rank 0 did not begin within {PATIENCE}")


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
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    options = {"rank": rank, "world_size": world_size, "timeout": PATIENCE, "device_id": device}
    with _talking():
        store, given = fresh_store(rank, world_size)
        dist.init_process_group(backend, store=store, **options)
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
        del store, given
        if rank > 0:
            sys.stdout.close()
            sys.stdout = output


@contextmanager
def last_words(action: Callable[[], None], ranks: Ranks, seconds: float = 20) -> Iterator[None]:
    """Call `action` if a signal to stop came and `seconds` later the ranks have agreed on nothing more.

    When a process dies, torchrun sends SIGTERM to the others and kills them 30 s later. One that waits for its GPU,
    which waits for the dead one's, cannot look at the signal: a thread does.
    """
    if ranks.world_size == 1:
        yield
        return
    ears, mouth = socket.socketpair()
    mouth.setblocking(False)

    def listen() -> None:
        while heard := ears.recv(64):
            beats, deadline = Heart.beats, time.monotonic() + seconds
            waiting = {signal.SIGTERM, signal.SIGINT} & set(heard)
            while waiting and Heart.beats == beats and mouth.fileno() >= 0:
                if time.monotonic() > deadline:
                    action()
                    return
                time.sleep(min(0.2, seconds))
        ears.close()

    before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        mouth.close()


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
