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

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from memory_tracker import MemoryTracker
from processes import AgreedError, Ranks, leave, process_group
from run_folder import StepClock
from technique_bench import relative_error
from utils import GIB, SettingsError, parse_settings, percentile, run_script, setting

METHODS = ("ddp", "fsdp")


def check_parallel(settings: Any) -> None:
    """Raise where a setting of llm_train.py cannot be combined with --parallel."""
    if settings.optimizer_in_backward and settings.parallel == "ddp":
        raise SettingsError(
            "--optimizer_in_backward true updates a parameter before DDP has averaged its gradient; leave one of them "
            "out, or use --parallel fsdp"
        )
    if settings.parallel == "fsdp" and (settings.optimizer, settings.parameters) == ("adamw_8bit", "bf16_stochastic"):
        raise SettingsError(
            "--optimizer adamw_8bit with --parameters bf16_stochastic cannot round what lies in shards; use "
            "--parallel ddp, --parameters fp32 or --optimizer adamw"
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
    return model  # FSDP has moved it, buffers too


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


# --------------------------------------------------------------------------------------------------------------------
# Both alone
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Settings of `torchrun --nproc_per_node=N parallel.py`."""

    num_layers: int | None = setting(None, "blocks (default: 6 with a GPU, 4 without)")
    width: int | None = setting(None, "width of a block (default: 2048 with a GPU, 256 without)")
    vocab_size: int | None = setting(None, "entries of embedding and head (default: 32000 with a GPU, 512 without)")
    tokens: int | None = setting(None, "in the batch of all processes (default: 4096 a GPU, 256 a process without)")
    repeats: int = setting(10, "timed steps")


class Block(nn.Module):
    """A residual MLP: 8 x width^2 parameters."""

    def __init__(self, width: int):
        super().__init__()
        self.expand, self.contract = (nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.contract(F.gelu(self.expand(hidden_states)))


class Stack(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, num_layers: int, width: int, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_layers))
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embedding(token_ids)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.head(hidden_states)


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    """The whole gradients, wherever their parts are."""
    gradients = [parameter.grad for parameter in model.parameters()]
    return [value.full_tensor() if hasattr(value, "full_tensor") else value.clone() for value in gradients]


def measure_method(settings: Settings, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Gradients, median time of a step and peak memory by rank of one method; None is one process with all tokens."""
    torch.manual_seed(0)
    model = Stack(settings.num_layers, settings.width, settings.vocab_size)
    own = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
    count = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.randint(settings.vocab_size, (2, settings.tokens), generator=torch.Generator().manual_seed(1))
    inputs, targets = (row.to(device) for row in (ids if ranks.method is None else map(ranks.mine, ids)))
    model = place_model(model, ranks, device, "fp32", "forward")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    forward = wrap_model(model, ranks, device, "forward")
    tracker = MemoryTracker(device, roots=(model, optimizer), resized=ranks.method == "fsdp")
    clock = StepClock(device)

    def step() -> None:
        F.cross_entropy(forward(inputs), targets).backward()

    step()
    gradients = gradients_of(model)
    for _ in range(2):  # the optimizer's states are made, DDP orders its buckets
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with tracker.step(1), tracker.phase("step"):
        step()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for _ in range(settings.repeats):
        clock.start()
        step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.stop()
    formula = held_bytes(ranks.method, ranks.world_size, count)
    flight = in_flight_bytes(ranks.method, own, count - sum(own))
    return {
        "gradients": gradients,
        "ms": percentile(clock.read(), 50),
        "peak": tracker.summary()["step"]["peak_allocated_gib"],
        "held": formula / GIB,
        "flight": flight / GIB,
        "sent": sent_bytes(ranks.method, ranks.world_size, count) / GIB,
    }


def main() -> int:
    """Measure one process, DDP and FSDP on a stack of blocks, and print the table."""
    settings = parse_settings(Settings)
    with process_group(torch.cuda.is_available()) as ranks:
        if not ranks.joined:
            raise SettingsError(
                "parallel.py compares processes; start it with: torchrun --nproc_per_node=2 parallel.py"
            )
        device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        cuda = device.type == "cuda"
        settings.num_layers = settings.num_layers or (6 if cuda else 4)
        settings.width = settings.width or (2048 if cuda else 256)
        settings.vocab_size = settings.vocab_size or (32000 if cuda else 512)
        settings.tokens = settings.tokens or (4096 if cuda else 256) * ranks.world_size
        if min(settings.num_layers, settings.width, settings.vocab_size, settings.repeats) < 1:
            raise AgreedError("--num_layers, --width, --vocab_size and --repeats must be at least 1")
        if settings.tokens < 1 or settings.tokens % ranks.world_size:
            raise AgreedError(f"--tokens {settings.tokens} must be a multiple of the {ranks.world_size} processes")
        torch.set_float32_matmul_precision("highest")
        print(f"{ranks.world_size} processes, {settings.tokens} tokens in the batch of all, fp32, AdamW; GiB a rank")
        print(f"{'':<12}{'ms':>9}  {'peak by rank':<22}{'held':>9}{'in flight':>11}{'sent':>9}{'error':>10}")
        exact: list[torch.Tensor] = []
        worst = 0.0
        for method in (None, *METHODS):
            own = Ranks() if method is None else replace(ranks, method=method)
            found = measure_method(settings, own, device)
            peaks = " ".join(f"{peak:.4f}" for peak in ranks.gather(found["peak"]))
            exact = exact or found["gradients"]
            error = relative_error(found["gradients"], exact)
            worst = max(worst, error)
            print(
                f"{method or 'one process':<12}{found['ms']:>9.2f}  {peaks:<22}{found['held']:>9.4f}"
                f"{found['flight']:>11.4f}{found['sent']:>9.4f}{error:>10.1e}"
            )
            del found
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
        print("held: parameters, gradients, states by the formula; in flight: unsharded; the peak has activations too")
        status = int(worst > 1e-5)
        leave(ranks, status)
        return status


if __name__ == "__main__":
    run_script(main)
