"""DeCAtt: a loss that decorrelates the outputs of a layer's attention heads, without a copy of them.

    python decatt.py                       cost of the term in ms and MiB beside a textbook version, on this machine
    python decatt.py --num_heads 6 --tokens 197 --batch_size 128
    python vit_train.py --decatt_weight 10       in training

O (batch, tokens, heads, head_dim) is what the heads of a layer return, before the output projection. Flattened over
tokens and head_dim, head i of image b is a vector a_bi, and

    C_bij = <a_bi, a_bj> / (|a_bi| |a_bj|)        L = mean over images, pairs i != j and layers of C_bij^2

so identical heads give 1, orthogonal ones 0, and random ones 1 / (tokens x head_dim) in the mean. The model's loss is
cross-entropy + decatt_weight x L. Only O is needed and never the maps of scores, so every fused attention kernel works.

The textbook form copies O to (batch, heads, tokens x head_dim) in fp32 and normalises the copy: autograd keeps both, 8
bytes a number beside the 2 of O itself. Here the Gram matrix A A^T (batch, heads, heads)
is a sum over tokens read straight from O, in fp32, and the norms are its diagonal. The backward pass needs O, which the
output projection keeps anyway, and that small matrix: nothing is kept that grows with the tokens.

When it does not help: nothing here saves time or memory; it is a regulariser. Heads that are nearly uncorrelated by
themselves leave nothing to remove, so the value without the loss (`vit_train.py` logs both) tells whether to try it.

Source: Bhattacharyya, Chattopadhyay, Nag 2023, DeCAtt: Efficient Vision Transformers with Decorrelated Attention Heads,
CVPR Workshops, pp. 4695-4699. The paper's weight is not known here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attention import packed_attention, prepare_for_compile
from attention_support import choose_backend
from precision import AUTOCAST_DTYPES, autocast, set_precision
from technique_bench import Cost, Study, compare, interleaved, middle
from utils import GIB, SettingsError, parse_settings, run_script, setting

CHUNK_NUMBERS = 2**22  # of O that are in fp32 at a time (16 MiB), where no compiler fuses the products
SMALLEST_NORM = 1e-24  # of a squared norm; a head that is all zeros correlates with nothing

# --------------------------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------------------------


def _gram(heads: torch.Tensor) -> torch.Tensor:
    """(images, tokens, heads, head_dim) -> (images, heads, heads), products and sums in fp32."""
    heads = heads.float()
    rows = [(heads[:, :, i : i + 1] * heads).sum((1, 3)) for i in range(heads.shape[2])]  # each (images, heads)
    return torch.stack(rows, dim=1)


def _mixed(weights: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """(images, heads, heads) times (images, tokens, heads, head_dim) over the second heads, in the dtype of heads."""
    parts = [weights[:, None, :, j, None] * heads[:, :, j : j + 1] for j in range(heads.shape[2])]
    return sum(parts[1:], parts[0]).to(heads.dtype)  # (images, tokens, heads, head_dim)


def _in_chunks(function: Callable[..., torch.Tensor], heads: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    """Run `function(*more, heads)` on a part of the images at a time; in one piece where the compiler fuses it."""
    images = max(1, CHUNK_NUMBERS // max(1, heads[0].numel()))
    if torch.compiler.is_compiling() or images >= len(heads):
        return function(*more, heads)
    pieces = zip(*(tensor.split(images) for tensor in (*more, heads)), strict=True)
    return torch.cat([function(*piece) for piece in pieces])


class HeadGram(torch.autograd.Function):
    """The Gram matrix of each image's heads; keeps a reference to its input and nothing else."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(heads)
        return _in_chunks(_gram, heads)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (heads,) = ctx.saved_tensors
        return _in_chunks(_mixed, heads, gradient + gradient.transpose(1, 2))


def head_correlation(heads: torch.Tensor) -> torch.Tensor:
    """How much the heads of a layer point the same way, for each image.

    Args:
        heads: (images, tokens, heads, head_dim), the heads' outputs before the output projection, any dtype and layout.

    Returns:
        (images, heads, heads) fp32, from -1 to 1, ones on the diagonal (zeros for a head that is all zeros).
    """
    if heads.dim() != 4:
        raise SettingsError(
            f"head_correlation wants head outputs (images, tokens, heads, head_dim), not {tuple(heads.shape)}"
        )
    gram = HeadGram.apply(heads)
    norms = gram.diagonal(dim1=1, dim2=2).clamp_min(SMALLEST_NORM).rsqrt()  # (images, heads)
    return gram * norms[:, :, None] * norms[:, None, :]


def decorrelation(heads: torch.Tensor) -> torch.Tensor:
    """The DeCAtt term of one layer: the mean over images and pairs of different heads of the squared correlation.

    Args:
        heads: as in `head_correlation`, at least two of them.

    Returns:
        A scalar in fp32: 1 for identical heads, 0 for orthogonal ones, 1 / (tokens x head_dim) for random ones.

    Raises:
        SettingsError: fewer than two heads.
    """
    count = heads.shape[2] if heads.dim() == 4 else 2
    if count < 2:
        raise SettingsError("the decorrelation of heads needs at least two of them; raise --num_heads")
    pairs = 1 - torch.eye(count, device=heads.device)
    return (head_correlation(heads).square() * pairs).sum() / (len(heads) * count * (count - 1))


def textbook_decorrelation(heads: torch.Tensor) -> torch.Tensor:
    """The same by its definition, in fp32 (or fp64): the reference of tests and the table's comparison."""
    images, tokens, count, head_dim = heads.shape
    flat = heads.transpose(1, 2).reshape(images, count, tokens * head_dim)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    flat = flat / flat.norm(dim=2, keepdim=True)
    squares = (flat @ flat.transpose(1, 2)).square()
    return (squares.sum() - squares.diagonal(dim1=1, dim2=2).sum()) / (images * count * (count - 1))


# --------------------------------------------------------------------------------------------------------------------
# What it costs
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Settings of `python decatt.py`."""

    batch_size: int | None = setting(None, "images (default: 512, without a GPU 16)")
    tokens: int = setting(65, "tokens of an image; 65 is 8 x 8 patches and a class token")
    num_heads: int = setting(3, "heads of a layer")
    head_dim: int = setting(64, "width of a head")
    attention_backend: str = setting("auto", "attention kernel by name")
    precision: str | None = setting(None, "default: bf16 on a GPU, fp32 without", ["fp32", "tf32", "bf16"])
    use_compile: bool | None = setting(None, "compiled variants as well (default: with a GPU)")
    rounds: int = setting(5, "measurements of each variant, in turn")
    repeats: int = setting(20, "timed steps of a measurement")
    output_folder: str = setting("outputs", "folder of all results")


class Layer(nn.Module):
    """The attention of a block and the term of its heads; `kind` is none, decatt or textbook."""

    def __init__(self, settings: Settings, kind: str):
        super().__init__()
        width = settings.num_heads * settings.head_dim
        self.kind, self.backend = kind, settings.attention_backend
        self.num_heads, self.head_dim = settings.num_heads, settings.head_dim
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(images, tokens, width) -> the same shape, and the term"""
        images, tokens, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(images, tokens, 3, self.num_heads, self.head_dim)
        mixed = packed_attention(qkv, backend=self.backend, causal=False)  # (images, tokens, heads, head_dim)
        term = hidden_states.new_zeros((), dtype=torch.float32)
        if self.kind != "none":
            term = decorrelation(mixed) if self.kind == "decatt" else textbook_decorrelation(mixed)
        return self.output(mixed.reshape(images, tokens, -1)), term


class Problem:
    """A layer, hidden states for it, and one step: forward and backward pass."""

    def __init__(self, settings: Settings, kind: str, device: torch.device, compiled: bool = False):
        torch.manual_seed(0)
        self.precision, self.device = settings.precision, device
        self.layer = Layer(settings, kind).to(device)
        hidden = torch.randn(settings.batch_size, settings.tokens, settings.num_heads * settings.head_dim).to(device)
        self.hidden = hidden.to(AUTOCAST_DTYPES.get(settings.precision, torch.float32)).requires_grad_()
        self.layer.register_buffer("hidden", self.hidden.detach(), persistent=False)
        self.called = torch.compile(self.layer, dynamic=False, fullgraph=True) if compiled else self.layer

    def result(self) -> list[torch.Tensor]:
        """The term and the gradient of the hidden states for 1000 x the term + the output's squares."""
        self.hidden.grad = None
        self.layer.zero_grad()
        with autocast(self.precision, self.device):
            output, term = self.called(self.hidden)
        (1000 * term + output.float().square().mean()).backward()
        return [term.detach(), self.hidden.grad]

    def step(self) -> None:
        """Forward and backward pass; every gradient is made and dropped."""
        with autocast(self.precision, self.device):
            output, term = self.called(self.hidden)
        torch.autograd.backward((output, term) if term.requires_grad else output, self.gradients(output, term))
        self.hidden.grad = None
        self.layer.zero_grad()

    def gradients(self, output: torch.Tensor, term: torch.Tensor) -> tuple[torch.Tensor, ...] | torch.Tensor:
        return (output.detach(), torch.ones_like(term)) if term.requires_grad else output.detach()


def main() -> int:
    """An attention layer without the term, with it, and with the textbook form of it."""
    settings = parse_settings(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    settings.batch_size = (512 if gpu else 16) if settings.batch_size is None else settings.batch_size
    settings.precision = settings.precision or ("bf16" if gpu else "fp32")
    settings.use_compile = gpu if settings.use_compile is None else settings.use_compile
    for name in ("batch_size", "tokens", "head_dim", "rounds", "repeats"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    if settings.num_heads < 2:
        raise SettingsError("--num_heads must be at least 2: one head has nothing to be decorrelated from")
    set_precision(settings.precision, device)
    dtype = AUTOCAST_DTYPES.get(settings.precision, torch.float32)
    if settings.attention_backend == "auto":
        options = {"head_dim": settings.head_dim, "tokens": settings.tokens, "causal": False, "packed": True}
        settings.attention_backend, why = choose_backend(device, dtype, **options)
        print(f"--attention_backend auto: {settings.attention_backend} ({why})")
    study = Study("decatt", settings, device)
    numbers = settings.batch_size * settings.tokens * settings.num_heads * settings.head_dim
    shape = f"{settings.batch_size} images, {settings.tokens} tokens, {settings.num_heads} heads of {settings.head_dim}"
    print(f"{shape}, {settings.precision}; O is {numbers * dtype.itemsize / 2**20:.1f} MiB")
    if settings.use_compile:
        prepare_for_compile()
    exact_settings = Settings(**(vars(settings) | {"precision": "fp32", "attention_backend": "eager"}))
    details: dict[str, list[float]] = {}
    for compiled in (False, True)[: 1 + settings.use_compile]:
        word = ", compiled" if compiled else ""
        names = {"none": "attention", "textbook": "with the textbook term", "decatt": "with the term"}
        problems = {kind: Problem(settings, kind, device, compiled) for kind in names}
        steps = {kind: (problem.step, (problem.layer,)) for kind, problem in problems.items()}
        costs = interleaved(steps, device, rounds=settings.rounds, repeats=settings.repeats, compiled=compiled)
        reference = Problem(exact_settings, "textbook", device)
        with torch.no_grad():
            reference.hidden.copy_(problems["none"].hidden)
        exact = reference.result()
        plain = problems["textbook"].result()
        for kind, name in names.items():
            cost: Cost = middle(costs[kind])
            details[name + word] = [round(row.ms, 4) for row in costs[kind] if row.ms is not None]
            if kind == "none":
                study.add(name + word, cost)
                continue
            exactness, error = compare(problems[kind].result(), plain, exact)
            exactness = exactness if kind == "decatt" else None  # the textbook form is what it is compared with
            saved = -8 * numbers / GIB if kind == "textbook" and not compiled else None
            base = {"exactness": exactness, "error": error, "baseline": "attention" + word}
            study.add(name + word, cost, formula_saved_gib=saved, **base)
    return study.finish(shape=shape, ms_of_rounds=details)


if __name__ == "__main__":
    run_script(main)
