"""Gradient checkpointing: keep a little of each block and compute the rest again in the backward pass.

    python checkpointing.py                     every method on a small stack: GiB saved, extra time, equal gradients
    python checkpointing.py --num_layers 12 --width 768 --batch_size 16
    python checkpointing.py --use_compile true  the compiler's own trade as well (automatic on a GPU)

A pre-norm block under bf16 autocast keeps 36 width + 16 + 4 heads bytes a token for its backward pass, 27,712 at width
768 with 12 heads (fp32: 64 width + 16 + 4 heads, 49,216); its input is 4 width, 3,072. For 12 blocks:

method            kept for the backward pass                              runs again                 bytes a token
none              everything                                              nothing                          332,544
block             each block's input                                      everything, block by block        61,504
every_k (k = 2)   block 1, 3, 5, ...: its input; the others: everything   half of the blocks               184,704
selective         inputs and the attention's outputs                      all but the attention kernel      78,928
selective_matmul  and the outputs of the matrix products                  norms, GELU, sums, casts         232,528
offload           inputs, in pinned host memory                           everything, block by block        30,784

The figures (`saved_bytes_per_token`) hold the one block that is rebuilt. every_k leaves the last block whole where k
divides the layers: rebuilding it would come on top of everything else that is still kept. The other reading of k,
segments of k blocks with one input kept for each (Chen et al.'s sqrt of layers), does not pay for this shape, because a
whole segment is rebuilt at once and a block's inside is nine times its input: block keeps 11 x 3,072 + 27,712 bytes
(the rebuilt block holds the twelfth input), segments of 2 keep 5 x 3,072 + 2 x 27,712 = 70,784, which is more, for the
same time.

block costs one more forward pass through the blocks, at most a third of the step's matrix products; selective_matmul
costs almost none of them. offload moves each input over PCIe twice, behind the computation of other blocks.

When it does not help: where the peak is not the saved activations. The logits and their gradients (12 bytes a logit)
stay, and at a vocabulary of 32,000 they are most of what is left. The result is exact: the same operations run on the
same numbers and the random state is restored, so gradients are bitwise equal, with dropout too (compiled graphs: within
rounding). Sources: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174; Korthikanti et
al. 2022, Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198 (selective).
"""

import functools
import importlib.util
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attention import packed_attention
from host_offload import HostOffload
from precision import autocast, set_precision
from technique_bench import Cost, Study, measure, relative_error
from utils import GIB, SettingsError, parse_settings, run_script, setting

METHODS = ("none", "block", "every_k", "selective", "selective_matmul", "offload")

# Operators by name, so that one that this PyTorch or this machine does not have needs no special case.
ATTENTION_OPERATORS = (
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "flash_attn._flash_attn_forward.default",
    "flash_attn._flash_attn_varlen_forward.default",
    "torch_attn._varlen_attn.default",
    "memory_lab.short_attention.default",
)
MATMUL_OPERATORS = (
    "aten.mm.default",
    "aten.addmm.default",
    "aten.bmm.default",
    "aten.linear.default",
    "aten._scaled_mm.default",  # FP8's, in compiled code
)
KEPT_OPERATORS = {"selective": ATTENTION_OPERATORS, "selective_matmul": ATTENTION_OPERATORS + MATMUL_OPERATORS}
NO_KEPT_OPERATOR = ("eager", "sdpa_math", "flex")  # no fused operator, or one compiled out of sight


def unsupported_reason(
    method: str, attention_backend: str, device: torch.device | None = None, dropout: float = 0.0
) -> str | None:
    """Why a method cannot work with this attention backend on this device; None if it can.

    Args:
        method: one of METHODS.
        attention_backend: one of attention_support.BACKENDS, or auto.
        device: where the model lies; None is a GPU if there is one.
        dropout: of the attention weights.
    """
    kind = device.type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if method not in METHODS:
        return f"gradient_checkpointing {method} is unknown; choose one of {', '.join(METHODS)}"
    if method == "offload" and kind != "cuda":
        return "offload needs a GPU: without one host memory is the same memory; take block"
    if method not in KEPT_OPERATORS:
        return None
    if attention_backend in NO_KEPT_OPERATOR:
        return (
            f"{method} keeps the output of a fused attention operator and {attention_backend} has none; take "
            "attention_backend sdpa or flash_attn, or checkpoint by block"
        )
    if kind == "cpu" and dropout > 0:
        return (
            f"{method} keeps the output of a fused attention operator, and PyTorch has none with dropout on a CPU; "
            "set --dropout 0 or checkpoint by block"
        )
    return None


# --------------------------------------------------------------------------------------------------------------------
# Whole blocks, and blocks of which some operators are kept
# --------------------------------------------------------------------------------------------------------------------


def checkpointed(block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Run a block, keeping only its input for the backward pass.

    Args:
        block: a module of one argument.
        hidden_states: (batch, tokens, width).

    Returns:
        What the block returns; the same shape for a transformer block.
    """
    return checkpoint(block, hidden_states, use_reentrant=False)


class RandomStateOfKept(TorchDispatchMode):
    """Around one of PyTorch's two selective contexts: moves the random state on where a kept operator is skipped.

    A kept attention kernel does not run again and so draws no numbers for its dropout; every later dropout of the block
    would then draw other ones than in the forward pass, and the gradients would be wrong.
    """

    def __init__(self, context: TorchDispatchMode, states: deque[torch.Tensor], recompute: bool):
        super().__init__()
        self.context, self.states, self.recompute = context, states, recompute

    def __enter__(self) -> "RandomStateOfKept":
        self.context.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.context.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if operator_name(func) in ATTENTION_OPERATORS:
            device = result[0].device
            cuda = device.type == "cuda"
            generator = torch.cuda.default_generators[device.index] if cuda else torch.default_generator
            if self.recompute:
                generator.set_state(self.states.popleft())
            else:
                self.states.append(generator.get_state())
        return result


operator_name = functools.cache(str)  # such as aten.mm.default


def _policy(kept: tuple[str, ...], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator_name(operator) in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(kept: tuple[str, ...]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    forward, recompute = create_selective_checkpoint_contexts(functools.partial(_policy, kept))
    states: deque[torch.Tensor] = deque()
    return RandomStateOfKept(forward, states, False), RandomStateOfKept(recompute, states, True)


def _without_cast_cache(block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    # Autocast remembers the 16-bit weights of an earlier forward pass in the same region; the backward pass, outside of
    # it, would then meet casts that the forward pass did not make, which PyTorch's selective contexts refuse.
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return block(hidden_states)
    finally:
        torch.set_autocast_cache_enabled(enabled)


def selectively_checkpointed(
    block: nn.Module, hidden_states: torch.Tensor, method: str, random: bool = True
) -> torch.Tensor:
    """Run a block, keeping its input and the outputs of the operators that KEPT_OPERATORS names for the method.

    Every operator passes through Python here, twice in the forward pass and twice in the recomputation: where the GPU
    does not have enough to do, that is the time of the step, unless torch.compile takes it away.

    Arguments and result as in `checkpointed`; `random` says whether the block draws random numbers (dropout). The
    backward pass can run once only (no retain_graph).
    """
    kept = KEPT_OPERATORS[method]
    plain = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, kept))
    if torch.compiler.is_compiling():  # the compiler draws and replays random numbers itself, and has no cast cache
        return checkpoint(block, hidden_states, use_reentrant=False, context_fn=plain)
    contexts = functools.partial(_contexts, kept) if random else plain
    return checkpoint(_without_cast_cache, block, hidden_states, use_reentrant=False, context_fn=contexts)


# --------------------------------------------------------------------------------------------------------------------
# Inputs in host memory
# --------------------------------------------------------------------------------------------------------------------


def offloaded(
    blocks: Iterable[nn.Module], hidden_states: torch.Tensor, terms: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """Run blocks one after another, their inputs in host memory until the backward pass; otherwise as `run_blocks`."""
    blocks, offload = list(blocks), HostOffload(hidden_states.device)
    try:
        for index, block in enumerate(blocks):
            result = offload.run(block, hidden_states, stays=index == len(blocks) - 1)
            hidden_states = without_term(result, terms)
    finally:
        offload.finish()
    return hidden_states


# --------------------------------------------------------------------------------------------------------------------
# The seam, the compiler's budget, the formula
# --------------------------------------------------------------------------------------------------------------------


def without_term(result: Any, terms: list[torch.Tensor] | None) -> torch.Tensor:
    """A block's hidden states; a term of the loss that it returned beside them is appended to `terms`."""
    if not isinstance(result, tuple):
        return result
    hidden_states, term = result
    terms.append(term)
    return hidden_states


def run_blocks(
    blocks: Iterable[nn.Module],
    hidden_states: torch.Tensor,
    method: str,
    *,
    every: int = 2,
    random: bool = True,
    terms: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run blocks one after another with a method of METHODS; without gradients they just run.

    Args:
        blocks: modules of one argument that return its shape.
        hidden_states: (batch, tokens, width).
        method: one of METHODS; ask `unsupported_reason` first.
        every: with every_k, block 0, every, 2 every, ... are checkpointed.
        random: whether the blocks draw random numbers (dropout); False spares the selective methods some bookkeeping.
        terms: blocks may return (hidden_states, term), such as `decatt.decorrelation`: their terms are appended here,
            and gradients flow through them as through the hidden states.

    Returns:
        (batch, tokens, width)

    Raises:
        SettingsError: an unknown method, `every` below 2, or offload without a GPU.
    """
    if method not in METHODS or (method == "offload" and hidden_states.device.type != "cuda"):
        raise SettingsError(f"--gradient_checkpointing: {unsupported_reason(method, 'auto', hidden_states.device)}")
    if method == "every_k" and every < 2:
        raise SettingsError(f"--checkpoint_every must be at least 2, not {every}; 1 is --gradient_checkpointing block")
    if method == "offload" and torch.is_grad_enabled():
        return offloaded(blocks, hidden_states, terms)
    for index, block in enumerate(blocks):
        if method == "none" or not torch.is_grad_enabled() or (method == "every_k" and index % every):
            result = block(hidden_states)
        elif method in KEPT_OPERATORS:
            result = selectively_checkpointed(block, hidden_states, method, random)
        else:
            result = checkpointed(block, hidden_states)
        hidden_states = without_term(result, terms)
    return hidden_states


def set_activation_memory_budget(budget: float | None) -> None:
    """How much of its activations a graph compiled from now on keeps: 1 is PyTorch's default, 0 recomputes everything.

    In between the compiler solves a knapsack: the dearest to recompute stay. Nothing changes without torch.compile.

    Args:
        budget: from 0 to 1, as a part of what the default keeps; None is the default.

    Raises:
        SettingsError: out of range, or this PyTorch has no such setting.
    """
    from torch._functorch import config

    if budget is not None and not 0 <= budget <= 1:
        raise SettingsError(f"--activation_memory_budget must be from 0 to 1, not {budget}")
    if hasattr(config, "activation_memory_budget"):
        config.activation_memory_budget = 1.0 if budget is None else float(budget)
    elif budget is not None:
        raise SettingsError(
            f"--activation_memory_budget needs a PyTorch that has it (2.6 or newer), this is {torch.__version__}; "
            "leave it out or take --gradient_checkpointing"
        )


def saved_bytes_per_token(
    method: str,
    *,
    num_layers: int,
    width: int,
    num_heads: int,
    activation_bytes: int,
    residual_bytes: int = 4,
    every: int = 2,
) -> float:
    """Bytes a token that the blocks keep on the device for the backward pass, with the one block being rebuilt.

    For pre-norm blocks with fused attention, an MLP of 4 x width with GELU, no dropout. What a kept tensor and the
    rebuilt block share is counted once; gradients are not counted, nor are the 16-bit copies of the weights that
    autocast keeps whatever the batch (24 x width^2 bytes a block that is not checkpointed).

    Args:
        activation_bytes: of a number that a matrix product reads or writes: 2 under autocast, else 4.
        residual_bytes: of a number in the residual stream, 4 under autocast too.
        every: of every_k.
    """
    entry, wide = residual_bytes * width, activation_bytes * width  # a block's input; a tensor of width numbers
    attention = wide + 4 * num_heads  # output and log-sum-exp
    # Inputs of both norms, their outputs, q, k and v, the MLP's hidden layer before and after GELU; mean and 1 / std.
    whole = 2 * entry + 2 * wide + 3 * wide + attention + 8 * wide + 16
    if method == "none":
        return num_layers * whole
    if method == "every_k":
        inputs = -(-num_layers // every)
        rebuilt = 0 if (num_layers - 1) % every else whole - entry
        return inputs * entry + (num_layers - inputs) * whole + rebuilt
    if method == "offload":  # the rebuilt block with its input, and the one that arrives for the block before it
        return whole + (entry if num_layers > 1 else 0)
    kept = (
        entry
        + {
            "block": 0,
            "selective": attention,
            "selective_matmul": attention + 9 * wide,  # qkv 3, output 1, MLP 4 and 1
        }[method]
    )
    # Of a block's kept tensors the rebuilt block goes on needing all but the outputs of its two branches: the
    # attention's is freed once it has been added, the MLP's stays until the end.
    unshared = wide if method == "selective_matmul" else 0
    return num_layers * kept + whole - (kept - unshared)


# --------------------------------------------------------------------------------------------------------------------
# The technique alone
# --------------------------------------------------------------------------------------------------------------------

ROUNDING = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 5e-2}  # largest relative error of a gradient that is rounding


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on (batch, tokens, width); dropout on each branch and inside."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0, attention_backend: str = "sdpa"):
        super().__init__()
        self.num_heads, self.dropout, self.attention_backend = num_heads, dropout, attention_backend
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.output = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        mixed = packed_attention(qkv, backend=self.attention_backend, dropout_p=self.dropout)
        x = x + self.drop(self.output(mixed.reshape(batch, tokens, width)))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


@dataclass
class Settings:
    """Settings of `python checkpointing.py`."""

    num_layers: int | None = setting(None, "blocks in the stack (default: 12 on a GPU, 4 without)")
    width: int | None = setting(None, "width of the hidden states (default: 768 on a GPU, 256 without)")
    num_heads: int | None = setting(None, "attention heads (default: one for each 64 of the width)")
    batch_size: int | None = setting(None, "sequences (default: 125 on a GPU, 4 without)")
    context_length: int = setting(256, "tokens in a sequence")
    dropout: float = setting(0.0, "dropout inside the blocks")
    precision: str | None = setting(None, "of the blocks (default: bf16 on a GPU, fp32 without)", list(ROUNDING))
    use_compile: bool | None = setting(None, "compiled rows with memory budgets as well (default: on a GPU)")
    repeats: int = setting(3, "timed steps")
    output_folder: str = setting("outputs", "where the run folder is made")


def complete_settings(settings: Settings, device: torch.device) -> None:
    """Fill in the device's defaults and check everything; raises SettingsError."""
    names = ("num_layers", "width", "batch_size", "precision", "use_compile")
    defaults = (12, 768, 125, "bf16", True) if device.type == "cuda" else (4, 256, 4, "fp32", False)
    for name, default in zip(names, defaults, strict=True):
        if getattr(settings, name) is None:
            setattr(settings, name, default)
    if settings.num_heads is None:
        settings.num_heads = max(1, settings.width // 64)
    for name in ("num_layers", "width", "num_heads", "batch_size", "context_length", "repeats"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    if settings.width % settings.num_heads:
        raise SettingsError(f"--width {settings.width} is not divisible by --num_heads {settings.num_heads}")
    if not 0 <= settings.dropout < 1:
        raise SettingsError(f"--dropout must be at least 0 and below 1, not {settings.dropout}")
    compilers = [shutil.which(os.environ.get("CXX", "g++")), shutil.which("clang++")]
    able = importlib.util.find_spec("triton") if device.type == "cuda" else any(compilers)
    if settings.use_compile and not able:
        missing = "the triton package" if device.type == "cuda" else "a C++ compiler"
        raise SettingsError(f"torch.compile needs {missing}; install it or set --use_compile false")
    set_precision(settings.precision, device)


class Stack:
    """Blocks with random weights, inputs, and a step through them: forward, mean square as the loss, backward."""

    def __init__(
        self, settings: Settings, device: torch.device, shape: tuple[int, int], num_layers: int, width: int, heads: int
    ):
        torch.manual_seed(0)
        self.device, self.precision = device, settings.precision
        self.blocks = nn.ModuleList(PreNormBlock(width, heads, settings.dropout) for _ in range(num_layers)).to(device)
        self.inputs = torch.randn(*shape, width, device=device)  # (batch, tokens, width)

    def step(self, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """One training step without the optimizer; the gradients' memory is there before, as with accumulation."""
        self.blocks.zero_grad(set_to_none=False)
        torch.manual_seed(1)
        with autocast(self.precision, self.device):
            hidden_states = run(self.inputs)
        hidden_states.float().square().mean().backward()

    def runner(self, method: str, every: int = 2) -> Callable[[torch.Tensor], torch.Tensor]:
        """The forward pass with a method."""
        return lambda inputs: run_blocks(self.blocks, inputs, method, every=every)

    def cost(self, run: Callable[[torch.Tensor], torch.Tensor], repeats: int, compiled: bool = False) -> Cost:
        """Peak and time of a step."""
        return measure(
            lambda: self.step(run), self.device, roots=(self.blocks,), repeats=repeats, warm_up=1, compiled=compiled
        )


def measure_methods(study: Study, stack: Stack, settings: Settings) -> None:
    """A row for each method and each memory budget of the compiler; gradients are compared with those of none."""
    formula = formula_of(settings)
    tokens, reference = settings.batch_size * settings.context_length, []

    def add_row(variant, run, baseline, saved=None, compiled=False):
        cost = stack.cost(run, settings.repeats, compiled)
        exactness = error = None
        if cost.status == "ok" and not (compiled and settings.dropout > 0):  # compiled dropout draws other numbers
            gradients = [parameter.grad.clone() for parameter in stack.blocks.parameters()]
            if variant == "none":
                reference.extend(gradients)
            elif reference:
                error = relative_error(gradients, reference)
                within = "within rounding" if error <= ROUNDING[settings.precision] else "changed"
                exactness = within if error else "bitwise"
        study.add(variant, cost, exactness=exactness, error=error, formula_saved_gib=saved, baseline=baseline)

    add_row("none", stack.runner("none"), None)
    for variant, method, every in (
        ("block", "block", 2),
        ("every_k, k = 2", "every_k", 2),
        ("every_k, k = 3", "every_k", 3),
        ("selective", "selective", 2),
        ("selective_matmul", "selective_matmul", 2),
        ("offload", "offload", 2),
    ):
        reason = unsupported_reason(method, "sdpa", stack.device, settings.dropout)
        saved = (formula("none") - formula(method, every=every)) * tokens / GIB
        if reason is None:
            add_row(variant, stack.runner(method, every), "none", saved)
        else:
            study.add(variant, Cost("unsupported"), baseline="none", note=reason)
    for budget in (1.0, 0.5, 0.0) if settings.use_compile else ():
        torch.compiler.reset()
        set_activation_memory_budget(budget)
        baseline = "compiled, memory budget 1.0" if budget < 1 else "none"
        add_row(f"compiled, memory budget {budget}", torch.compile(stack.runner("none")), baseline, compiled=True)
    set_activation_memory_budget(None)


def formula_of(settings: Settings) -> Callable[..., float]:
    """`saved_bytes_per_token` with everything but the method filled in."""
    return functools.partial(
        saved_bytes_per_token,
        num_layers=settings.num_layers,
        width=settings.width,
        num_heads=settings.num_heads,
        activation_bytes=2 if settings.precision == "bf16" else 4,
    )


def main() -> int:
    """Measure every method on a stack of blocks, compare gradients, find where block checkpointing begins to pay."""
    settings = parse_settings(Settings)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    complete_settings(settings, device)
    study = Study("checkpointing", settings, device)
    size = (settings.num_layers, settings.width, settings.num_heads)
    measure_methods(study, Stack(settings, device, (settings.batch_size, settings.context_length), *size), settings)

    def lowers_peak(tokens: int) -> bool:
        # Sequences of 16 make a fine measure; with fused attention a token needs the same at every length.
        stack = Stack(settings, device, (tokens // 16, 16), *size)
        none, block = (stack.cost(stack.runner(method), repeats=1) for method in ("none", "block"))
        return block.status == "ok" and (none.status == "oom" or block.peak_gib < 0.9 * none.peak_gib)

    question = "block lowers the peak of a whole step by more than a tenth"
    largest = 12 if device.type == "cuda" else 10
    study.ask(question, "tokens", lowers_peak, [2**power for power in range(4, largest)], 16)

    def costs_little(width: int) -> bool:
        stack = Stack(settings, device, (64, settings.context_length), 4, width, width // 64)
        none, block = (stack.cost(stack.runner(method), repeats=10) for method in ("none", "block"))
        return none.status == block.status == "ok" and block.ms < 1.25 * none.ms

    if device.type == "cuda":
        question = f"block costs less than a quarter more time (4 blocks, 64 x {settings.context_length} tokens)"
        study.ask(question, "of width", costs_little, [256, 512, 1024, 2048], 128)
    formula = formula_of(settings)
    return study.finish(formula_bytes_per_token={method: formula(method) for method in METHODS})


if __name__ == "__main__":
    run_script(main)
