"""Attention heads removed from a model: chosen before training or by importance, masked or cut out of the weights.

    python head_pruning.py                                   half of the heads masked and cut: time, peak, error; from
                                                             which width on cutting is faster
    python head_pruning.py --num_heads 12 --head_dim 64 --sequences 125 --tokens 256 --causal true    the 134 M decoder
    python patchtst_train.py --prune dynamic --prune_heads_per_layer 5        in training

Head h of a layer makes O_h = softmax(q_h k_h^T / sqrt(head_dim)) v_h out of its own rows of the q, k and v weights, and
its own columns of the output projection read it. Removing it is multiplying O_h by 0:

masked      a gate before the output projection. Every matrix stays as large as it was, so no time and no byte is saved
            (PyTorch's torch.nn.utils.prune stores one mask more).
structural  the rows and columns are cut out of the weights and of the optimizer's states: parameters and products of
            the attention shrink to r = kept heads / all heads, and so do q, k, v, O and their gradients. With the
            kernel `short` the peak of the block holds q, k, v, their gradients and that of O: 14 x width bytes a token
            in bf16. Below some 9,000 sequences of 42 tokens the workspace of a matrix product (132 MiB on an H100)
            moves the peak to the output projection: q, k, v, O and its gradient, 10 x width. The MLP, two thirds of a
            block whose MLP is 4 x width, is untouched.

Both compute the same function, and what has been removed has no weights that could grow back.

Which heads: static_conservative takes the first k of each layer and static_random k drawn with a seed, both before
training, when no head knows anything yet: the result is a smaller model trained from scratch. dynamic takes the least
important ones of a trained model, a few at a time, and scores the rest again after each removal. Importance is Michel
et al.'s gradient E_x |dL / d gate_h| = E_x |<O_h, dL/dO_h>|, divided by its 2-norm within the layer, or the norm of the
head's weights.

When it does not help: where the attention is a small part of the step, or where the matrices get narrower without a
kernel getting faster (heads x head_dim that is no multiple of 64, narrow layers that are bound by launches and memory).

Source: Michel, Levy, Neubig 2019, Are Sixteen Heads Really Better than One?, arXiv 1905.10650.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from attention import packed_attention
from attention_support import BACKENDS, choose_backend
from optimizers import OptimizerInBackward
from precision import AUTOCAST_DTYPES, autocast, set_precision
from technique_bench import Study, clearly_faster, compare, interleaved, middle, time_difference
from utils import GIB, SettingsError, parse_settings, read_rising, run_script, setting

METHODS = ("static_conservative", "static_random", "dynamic")
MODES = ("structural", "masked")
IMPORTANCES = ("gradient", "weight_norm")


class PrunableAttention(Protocol):
    """An attention module whose heads can be removed; the decoder's and PatchTST's are.

    `qkv` maps the width to (three, num_heads, head_dim), in this order, and `output` maps (num_heads, head_dim) to the
    width; forward must read `num_heads` and `head_dim` from the module.
    """

    qkv: nn.Linear
    output: nn.Linear
    num_heads: int
    head_dim: int


def attention_layers(model: nn.Module) -> list[PrunableAttention]:
    """The model's attention modules in order.

    Raises:
        SettingsError: it has none.
    """
    wanted = ("qkv", "output", "num_heads", "head_dim")
    layers = [module for module in model.modules() if all(hasattr(module, name) for name in wanted)]
    if not layers:
        raise SettingsError(f"head pruning needs attention modules with {', '.join(wanted)}, and this model has none")
    return layers


def head_numbers(layer: PrunableAttention) -> list[int]:
    """The heads that take part, by the numbers they had at first."""
    return list(getattr(layer, "head_numbers", range(layer.num_heads)))


# --------------------------------------------------------------------------------------------------------------------
# Removing
# --------------------------------------------------------------------------------------------------------------------


def remove_heads(
    layer: PrunableAttention, heads: Iterable[int], *, mode: str = "structural", optimizer: Any = None
) -> None:
    """Remove heads from one layer, in place.

    Args:
        layer: the attention module.
        heads: by the numbers they had at first (`head_numbers`).
        mode: structural cuts weights, biases and optimizer states; masked gates the heads' outputs with 0.
        optimizer: whose parameters and states are cut with the weights; gradients are dropped.

    Raises:
        SettingsError: heads that are not there, none that would be left, another mode than before, or an optimizer
            whose states cannot be cut.
    """
    if mode not in MODES:
        raise SettingsError(f"--prune_mode {mode} is unknown; choose one of {', '.join(MODES)}")
    numbers, gone = head_numbers(layer), set(heads)
    if not gone <= set(numbers):
        raise SettingsError(f"heads {sorted(gone - set(numbers))} are not among the heads that are left: {numbers}")
    if len(gone) == len(numbers):
        raise SettingsError(f"removing {len(gone)} of {len(numbers)} heads would leave none; keep at least one a layer")
    masked = isinstance(layer.output, GatedOutput)
    if mode == "structural" and masked:
        raise SettingsError("this layer has masked heads already; stay with --prune_mode masked")
    if not gone:
        return
    if mode == "masked":
        if not masked:
            layer.output = GatedOutput(layer.output, layer.num_heads)
        layer.output.head_mask[sorted(gone)] = 0.0  # every head is still in place, so its number is its place
    else:
        check_optimizer(optimizer)
        kept = [place for place, number in enumerate(numbers) if number not in gone]
        places = torch.tensor(kept, device=layer.qkv.weight.device)
        columns = (places[:, None] * layer.head_dim + torch.arange(layer.head_dim, device=places.device)).flatten()
        width = layer.num_heads * layer.head_dim
        rows = torch.cat([part * width + columns for part in range(3)])
        cut(layer.qkv, "weight", 0, rows, optimizer)
        if layer.qkv.bias is not None:
            cut(layer.qkv, "bias", 0, rows, optimizer)
        cut(layer.output, "weight", 1, columns, optimizer)
        layer.qkv.out_features, layer.output.in_features = len(rows), len(columns)
        layer.num_heads = len(kept)
    layer.head_numbers = [number for number in numbers if number not in gone]


class GatedOutput(nn.Linear):
    """The output projection of a masked layer: each head's part of its input times 0 or 1.

    A class of its own and no hook: the compiler does not look whether a module has got a hook since it was compiled.
    """

    def __init__(self, output: nn.Linear, num_heads: int):
        super().__init__(output.in_features, output.out_features, bias=output.bias is not None, device="meta")
        self.weight, self.bias = output.weight, output.bias
        ones = torch.ones(num_heads, dtype=torch.float32, device=output.weight.device)
        self.register_buffer("head_mask", ones, persistent=False)

    def forward(self, mixed: torch.Tensor) -> torch.Tensor:
        """(..., heads x head_dim) -> (..., width)"""
        gates = self.head_mask.to(mixed.dtype).repeat_interleave(mixed.shape[-1] // len(self.head_mask))
        return super().forward(mixed * gates)


def bake_masks(model: nn.Module) -> None:
    """Write masked heads into the weights, so that they compute the same function without the mask."""
    for layer in attention_layers(model):
        if isinstance(layer.output, GatedOutput):
            columns = layer.output.head_mask.repeat_interleave(layer.head_dim)
            with torch.no_grad():
                layer.output.weight.mul_(columns.to(layer.output.weight.dtype))


def check_optimizer(optimizer: Any) -> None:
    """Raise unless the states of this optimizer can be cut; None is fine."""
    if isinstance(optimizer, OptimizerInBackward):
        raise SettingsError("an optimizer that steps in backward is tied to its tensors; prune without it")
    states = optimizer.state.values() if optimizer is not None else ()
    if any(is_traceable_wrapper_subclass(value) for state in states for value in state.values()):
        raise SettingsError("8-bit optimizer states share scales between rows and cannot be cut; prune with adamw")


def cut(module: nn.Module, name: str, dim: int, kept: torch.Tensor, optimizer: Any) -> None:
    """Replace a parameter by its rows (dim 0) or columns (dim 1) `kept`, and the optimizer's states of it alike."""
    before = getattr(module, name)
    after = nn.Parameter(before.detach().index_select(dim, kept).contiguous(), requires_grad=before.requires_grad)
    setattr(module, name, after)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [after if parameter is before else parameter for parameter in group["params"]]
    state = optimizer.state.pop(before, None)
    if state is not None:
        optimizer.state[after] = {
            key: value.index_select(dim, kept).contiguous()
            if isinstance(value, torch.Tensor) and value.shape == before.shape
            else value
            for key, value in state.items()
        }


# --------------------------------------------------------------------------------------------------------------------
# Choosing
# --------------------------------------------------------------------------------------------------------------------


def static_choice(method: str, num_heads: int, count: int, layer: int, seed: int) -> list[int]:
    """The heads that a static method removes from a layer: the first `count`, or `count` drawn with seed and layer."""
    if method == "static_conservative":
        return list(range(count))
    if method != "static_random":
        raise SettingsError(f"--prune {method} is unknown; choose one of {', '.join(METHODS)}")
    return sorted(np.random.default_rng([seed, layer]).permutation(num_heads)[:count].tolist())


def lowest(scores: torch.Tensor, layer: PrunableAttention, count: int) -> list[int]:
    """The `count` least important heads of a layer by their first numbers; scores as `importance` gives them."""
    numbers = head_numbers(layer)
    order = torch.argsort(scores, stable=True).tolist()[:count]
    return sorted(numbers[place] for place in order)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and back in its own afterwards; gradients made inside are dropped."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        model.zero_grad(set_to_none=True)


def importance(
    model: nn.Module, kind: str, batches: Iterable[Any] = (), loss: Callable[[Any], torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Importance of the heads that are left, one tensor (heads,) a layer, each of 2-norm 1.

    Args:
        model: neither its weights nor its running statistics change.
        kind: gradient (needs batches and loss) or weight_norm (sum of the 2-norms of the head's rows of q, k and v and
            of its columns of the output projection).
        batches: data that the heads are judged by.
        loss: the model's loss of a batch, a scalar with a graph. A sample is an entry of the attention's first
            dimension (for PatchTST: one channel of one window).

    Raises:
        SettingsError: an unknown kind.
    """
    if kind not in IMPORTANCES:
        raise SettingsError(f"--prune_importance {kind} is unknown; choose one of {', '.join(IMPORTANCES)}")
    layers = attention_layers(model)
    places = [left_places(layer) for layer in layers]
    if kind == "weight_norm":
        scores = [weight_norms(layer) for layer in layers]
    else:
        with evaluating(model):
            scores = gradient_scores(layers, batches, loss)
    kept = [score[place] for score, place in zip(scores, places, strict=True)]
    return [score / score.norm().clamp_min(1e-30) for score in kept]


def left_places(layer: PrunableAttention) -> torch.Tensor:
    """(heads left,) where in the weights the heads that take part lie."""
    masked = isinstance(layer.output, GatedOutput)
    return torch.tensor(head_numbers(layer) if masked else range(layer.num_heads), device=layer.qkv.weight.device)


def weight_norms(layer: PrunableAttention) -> torch.Tensor:
    """(heads,) in fp32: 2-norms of the rows of q, k and v and of the output's columns, added up for each head."""
    rows = layer.qkv.weight.detach().float().view(3, layer.num_heads, -1).norm(dim=2).sum(0)
    columns = layer.output.weight.detach().float().view(-1, layer.num_heads, layer.head_dim).norm(dim=(0, 2))
    return rows + columns


def gradient_scores(
    layers: Sequence[PrunableAttention], batches: Iterable[Any], loss: Callable[[Any], torch.Tensor] | None
) -> list[torch.Tensor]:
    """(heads,) a layer: sum over samples of |<O_h, dL/dO_h>|, which ranks heads as their mean does."""
    totals = [torch.zeros(layer.num_heads, device=layer.qkv.weight.device) for layer in layers]
    samples = 0

    def watch(place: int, layer: PrunableAttention) -> Callable:
        def before_output(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            mixed = inputs[0]
            kept = mixed.detach()

            def add(gradient: torch.Tensor) -> None:
                products = (kept.float() * gradient.float()).unflatten(-1, (layer.num_heads, layer.head_dim))
                inner = products.flatten(1, -3).sum((1, 3))  # (samples, heads)
                totals[place].add_(inner.abs().sum(0))

            mixed.register_hook(add)

        return before_output

    handles = [
        layer.output.register_forward_pre_hook(watch(place, layer), prepend=True) for place, layer in enumerate(layers)
    ]
    try:
        for batch in batches:
            value = loss(batch)
            value.backward()
            samples += 1
    finally:
        for handle in handles:
            handle.remove()
    if samples == 0:
        raise SettingsError("gradient importance needs at least one batch to judge the heads by")
    return totals


def count_attention_flops(layer: PrunableAttention, tokens: int) -> float:
    """Forward and backward of an attention module for one token, not causal: 6 x weights + 12 x heads x head_dim x
    tokens."""
    weights = layer.qkv.weight.numel() + layer.output.weight.numel()
    return 6 * weights + 12 * layer.num_heads * layer.head_dim * tokens


# --------------------------------------------------------------------------------------------------------------------
# What it saves and costs
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Settings of `python head_pruning.py`; the defaults are PatchTST's shape at 2,048 windows of 7 channels."""

    sequences: int | None = setting(None, "sequences (default: 14,336, without a GPU 64)")
    tokens: int = setting(42, "tokens of a sequence")
    num_heads: int = setting(16, "heads before pruning")
    head_dim: int = setting(8, "width of a head; the layer is num_heads x head_dim wide")
    causal: bool = setting(False, "causal attention, as in the decoder")
    precision: str | None = setting(None, "fp32 or bf16 (default: bf16, fp32 without a GPU)", ["fp32", "bf16"])
    attention_backend: str = setting("auto", "attention kernel", ["auto", *BACKENDS])
    rounds: int = setting(5, "measurements of each variant, in turn")
    repeats: int = setting(30, "timed steps of a measurement")
    widths: str | None = setting(None, "widths of the break-even question (64 to 1024, without a GPU 256)")
    output_folder: str = setting("outputs", "folder of all results")


class AttentionBlock(nn.Module):
    """The attention of a block as the lab's models have it: qkv, attention, output."""

    def __init__(self, width: int, num_heads: int, backend: str, causal: bool):
        super().__init__()
        self.num_heads, self.head_dim, self.backend, self.causal = num_heads, width // num_heads, backend, causal
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(sequences, tokens, width) -> (sequences, tokens, width)"""
        sequences, tokens, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(sequences, tokens, 3, self.num_heads, self.head_dim)
        mixed = packed_attention(qkv, backend=self.backend, causal=self.causal)
        return self.output(mixed.reshape(sequences, tokens, -1))


class Problem:
    """An attention block of one width and hidden states for it."""

    def __init__(self, settings: Settings, num_heads: int, device: torch.device):
        torch.manual_seed(0)
        self.precision, self.device = settings.precision, device
        width = num_heads * settings.head_dim
        self.block = AttentionBlock(width, num_heads, settings.attention_backend, settings.causal).to(device)
        hidden = torch.randn(settings.sequences, settings.tokens, width).to(device)
        self.hidden = hidden.to(AUTOCAST_DTYPES.get(settings.precision, torch.float32)).requires_grad_()
        self.block.register_buffer("hidden", self.hidden.detach(), persistent=False)

    def result(self) -> list[torch.Tensor]:
        """Output and the gradient of the hidden states, for the gradient 2 x output."""
        self.hidden.grad = None
        self.block.zero_grad()
        with autocast(self.precision, self.device):
            output = self.block(self.hidden)
        output.float().square().sum().backward()
        return [output.detach(), self.hidden.grad]

    def step(self) -> None:
        """Forward and backward pass; every gradient is made and dropped."""
        with autocast(self.precision, self.device):
            output = self.block(self.hidden)
        output.backward(output.detach())
        self.hidden.grad = None
        self.block.zero_grad()


def steps_of(problems: dict[str, Problem]) -> dict[str, tuple[Callable[[], None], tuple[Any, ...]]]:
    return {name: (problem.step, (problem.block,)) for name, problem in problems.items()}


def main() -> int:
    """All heads against half of them, masked and cut; then the width from which on cutting half is clearly faster."""
    settings = parse_settings(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    settings.sequences = (14336 if gpu else 64) if settings.sequences is None else settings.sequences
    settings.precision = settings.precision or ("bf16" if gpu else "fp32")
    settings.widths = settings.widths or ("64,128,256,512,1024" if gpu else "64,128,256")
    for name in ("sequences", "tokens", "head_dim", "rounds", "repeats"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    if settings.num_heads < 2:
        raise SettingsError("--num_heads must be at least 2, so that some can be removed")
    widths = read_rising("widths", settings.widths, multiple=2 * settings.head_dim)
    set_precision(settings.precision, device)
    dtype = AUTOCAST_DTYPES.get(settings.precision, torch.float32)
    if settings.attention_backend == "auto":
        settings.attention_backend, why = choose_backend(
            device, dtype, head_dim=settings.head_dim, tokens=settings.tokens, causal=settings.causal, packed=True
        )
        print(f"--attention_backend auto: {settings.attention_backend} ({why})")
    study = Study("head_pruning", settings, device)
    heads, half = settings.num_heads, settings.num_heads // 2
    print(
        f"{settings.sequences:,} sequences of {settings.tokens} tokens, {heads} heads of {settings.head_dim}, "
        f"{settings.precision}"
    )
    few = max(1, heads * 5 // 16)  # the share that the course project removed
    kept = {"all heads": (0, "structural"), "all heads, again": (0, "structural")}
    kept |= {f"{count} of {heads} {mode}": (count, mode) for count in sorted({few, half}) for mode in MODES}
    problems = {name: Problem(settings, heads, device) for name in kept}
    for name, (count, mode) in kept.items():
        remove_heads(problems[name].block, static_choice("static_random", heads, count, 0, 0), mode=mode)
    costs = interleaved(steps_of(problems), device, rounds=settings.rounds, repeats=settings.repeats)
    base = costs["all heads"]
    tokens = settings.sequences * settings.tokens
    for name, (count, mode) in kept.items():
        if name == "all heads":
            study.add(name, middle(base))
            continue
        exactness = error = saved = None
        note = "the same as the first row: their difference is noise" if count == 0 else ""
        if count:  # masked and structural are the same function: each is held against the other mode in this precision
            other = f"{count} of {heads} {'masked' if mode == 'structural' else 'structural'}"
            results = [[value.clone() for value in problems[key].result()] for key in (name, other)]
            exact = exact_result(settings, heads, count, device)
            exactness, error = compare(results[0], results[1], exact)
            note = time_difference(costs[name], base)
        if mode == "structural" and count and settings.attention_backend == "short":
            saved = 7 * count * settings.head_dim * dtype.itemsize * tokens / GIB  # q, k, v, gradients of O, q, k, v
        study.add(
            name,
            middle(costs[name]),
            baseline="all heads",
            exactness=exactness,
            error=error,
            formula_saved_gib=saved,
            note=note,
        )

    details = []

    def faster(width: int) -> bool:
        many = width // settings.head_dim
        pair = {"all": Problem(settings, many, device), "half": Problem(settings, many, device)}
        remove_heads(pair["half"].block, range(many // 2))
        found = interleaved(steps_of(pair), device, rounds=settings.rounds, repeats=settings.repeats)
        times = {name: [cost.ms for cost in rows] for name, rows in found.items()}
        details.append({"width": width, "heads": many, "ms": times})
        return clearly_faster(found["half"], found["all"])

    study.ask("half of the heads cut is clearly faster", "of width", faster, widths, 2 * settings.head_dim)
    return study.finish(widths=sorted(details, key=lambda row: row["width"]))


def exact_result(settings: Settings, heads: int, count: int, device: torch.device) -> list[torch.Tensor]:
    """The pruned block's result in fp32 with textbook attention, from the same inputs."""
    plain = Settings(**(vars(settings) | {"precision": "fp32", "attention_backend": "eager"}))
    problem = Problem(settings, heads, device)
    reference = Problem(plain, heads, device)
    with torch.no_grad():
        reference.hidden.copy_(problem.hidden)
    remove_heads(reference.block, static_choice("static_random", heads, count, 0, 0))
    return [value.clone() for value in reference.result()]


if __name__ == "__main__":
    run_script(main)
