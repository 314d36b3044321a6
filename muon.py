"""Muon: one state a weight instead of AdamW's two, and updates whose directions are all of the same size.

    python muon.py                                            beside AdamW and PyTorch's Muon: memory, time, error
    python muon.py --num_layers 48 --width 1024               other matrices
    python vit_train.py --optimizer muon                      in training

A momentum M of a weight matrix's gradients is replaced by the nearest matrix whose singular values are all 1, U V^T of
M = U S V^T, and that is the update: directions that AdamW leaves small are learnt as fast as the others. Five steps of
a Newton-Schulz iteration in bf16, products of matrices alone, come close enough (singular values from 0.7 to 1.2). The
update is scaled by 0.2 sqrt(max(rows, columns)), about what AdamW's updates have for a root mean square, so that both
take the same learning rate and weight decay.

State, bytes a parameter in fp32: AdamW 8 (two moments), Muon 4 (the momentum).

It is for matrices between hidden states; one that makes q, k and v at once counts as one matrix. Embeddings, the last
layer, biases and norms go on with AdamW, in the same object. torch.optim.Muon works matrix by matrix, some twenty small
kernels each; here all matrices of one shape are iterated together, 4 million numbers at a time at most (what is stacked
takes about 16 bytes each for that long), and nothing is read back from the GPU, so that a step can be recorded as a
CUDA graph.

When it does not help: the iteration costs about 5 x 2 x (2 m^2 n + m^3) operations for an m x n matrix, m <= n,
whatever the batch: with few tokens in a batch that is a large part of a step. A fused AdamW step is faster alone.

Sources: Jordan and others 2024, Muon: An optimizer for hidden layers in neural networks (kellerjordan.github.io), whose
coefficients these are; Liu and others 2025, Muon is Scalable for LLM Training, arXiv 2502.16982 (the scale).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from optimizers import Stack
from technique_bench import Cost, Study, compare, measure
from utils import GIB, SettingsError, parse_settings, run_script, setting

MOMENTUM, ITERATIONS, EPSILON = 0.95, 5, 1e-7
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TOGETHER = 2**22  # numbers that are iterated at a time at most
RMS = 0.2  # of an update before the learning rate, about that of AdamW


def orthogonalise(matrices: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest matrices with all singular values 1.

    Args:
        matrices: (count, rows, columns), iterated together.
        dtype: of the products.

    Returns:
        (count, rows, columns) of that dtype.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPSILON)  # no singular value above 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for everything else, one optimizer to the outside.

    `param_groups` holds the matrices' group first and AdamW's groups after it, `state` a `momentum` for each matrix and
    AdamW's states for the others. A learning rate may be a tensor on the GPU.

    Args:
        matrices: two-dimensional parameters.
        others: AdamW's groups (dictionaries with `params` and, if they like, `weight_decay`).
        learning_rate, weight_decay: of the matrices, and where a group of the others has none.

    Raises:
        ValueError: a parameter among the matrices is none.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        weight_decay: float,
    ):
        matrices, others = list(matrices), list(others)
        if any(matrix.dim() != 2 for matrix in matrices):
            raise ValueError("Muon's updates are for matrices; give every other parameter to `others`")
        super().__init__([{"params": matrices, "lr": learning_rate, "weight_decay": weight_decay}], {})
        self.adamw = None
        if others:
            fused = all(parameter.is_cuda for group in others for parameter in group["params"])
            self.adamw = torch.optim.AdamW(others, lr=learning_rate, weight_decay=weight_decay, fused=fused)
        self.join()

    def join(self) -> None:
        """Make AdamW's groups and states part of this optimizer's."""
        if self.adamw is not None:
            self.param_groups = [self.param_groups[0], *self.adamw.param_groups]
            self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.adamw is not None:
            self.adamw.param_groups = self.param_groups[1:]
        self.join()

    def update(self, parameters: list[nn.Parameter], lr: float | torch.Tensor, weight_decay: float) -> None:
        """Step matrices of one shape together."""
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))  # Nesterov's
        updates = orthogonalise(ahead).float() * (-RMS * max(parameters[0].shape) ** 0.5 * lr)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, list(updates.unbind(0)))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what the closure returns."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        group = self.param_groups[0]
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                shapes.setdefault(parameter.shape, []).append(parameter)
                if "momentum" not in self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        for shape, parameters in shapes.items():
            count = max(1, TOGETHER // shape.numel())
            for begin in range(0, len(parameters), count):
                self.update(parameters[begin : begin + count], group["lr"], group["weight_decay"])
        if self.adamw is not None:
            self.adamw.step()
        return result


# --------------------------------------------------------------------------------------------------------------------
# Measuring it alone
# --------------------------------------------------------------------------------------------------------------------

PART = 0.05  # of a training step


@dataclass
class Settings:
    """Settings of `python muon.py`."""

    num_layers: int = setting(24, "residual linear layers, each a square matrix")
    width: int | None = setting(None, "of the hidden states (default: 768, without a GPU 64)")
    repeats: int = setting(10, "timed steps")
    learning_rate: float = setting(0.001, "learning rate")
    weight_decay: float = setting(0.1, "weight decay")
    output_folder: str = setting("outputs", "folder of all results")


OPTIMIZERS = ("adamw", "torch.optim.Muon", "muon")


class Problem:
    """A stack, its gradients and an optimizer."""

    def __init__(self, settings: Settings, name: str, device: torch.device, tokens: int = 64):
        torch.manual_seed(0)
        self.device, self.model = device, Stack(settings.num_layers, settings.width).to(device)
        options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        parameters = list(self.model.parameters())
        if name == "adamw":
            self.optimizer = torch.optim.AdamW(parameters, **options, fused=device.type == "cuda")
        elif name == "muon":
            self.optimizer = Muon(parameters, [], learning_rate=options["lr"], weight_decay=options["weight_decay"])
        else:
            self.optimizer = torch.optim.Muon(parameters, **options, adjust_lr_fn="match_rms_adamw")
        self.inputs = torch.randn(tokens, settings.width).to(device)
        self.backward()

    def backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            outputs = self.model(self.inputs)
        (outputs.float() - self.inputs.flip(1)).square().mean().backward()

    def train(self) -> None:
        self.backward()
        self.optimizer.step()

    def change(self) -> list[torch.Tensor]:
        """What the first step changes every matrix by, fp64 on the host."""
        before = [parameter.detach().double().cpu() for parameter in self.model.parameters()]
        self.optimizer.step()
        after = [parameter.detach().double().cpu() for parameter in self.model.parameters()]
        return [new - old for new, old in zip(after, before, strict=True)]

    def exact_change(self, settings: Settings) -> list[torch.Tensor]:
        """The same by Muon's formula, its iteration in fp64."""
        changes = []
        for parameter in self.model.parameters():
            momentum = (1 - MOMENTUM) * parameter.grad.double()
            ahead = torch.lerp(parameter.grad.double(), momentum, MOMENTUM)
            update = RMS * max(parameter.shape) ** 0.5 * orthogonalise(ahead[None], torch.float64)[0]
            decay = settings.weight_decay * parameter.detach().double()
            changes.append((-settings.learning_rate * (update + decay)).cpu())
        return changes


def main() -> int:
    """An optimizer's step alone on the same gradients, then from how many tokens on Muon's is a small part."""
    settings = parse_settings(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    settings.width = (768 if gpu else 64) if settings.width is None else settings.width
    for name in ("num_layers", "width", "repeats"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    for name in ("learning_rate", "weight_decay"):
        if not 0 <= getattr(settings, name) < float("inf"):
            raise SettingsError(f"--{name} must be at least 0 and finite, not {getattr(settings, name)}")
    study = Study("muon", settings, device)
    count = settings.num_layers * settings.width**2
    print(f"{count:,} parameters in {settings.num_layers} matrices {settings.width} x {settings.width}")
    exact = Problem(settings, "muon", device).exact_change(settings)
    plain: list[torch.Tensor] = []
    times: dict[str, Cost] = {}
    for name in OPTIMIZERS:
        exactness, error = None, None
        if name != "adamw":
            plain = plain or Problem(settings, "torch.optim.Muon", device).change()
            exactness, error = compare(Problem(settings, name, device).change(), plain, exact)
        problem = Problem(settings, name, device)
        times[name] = measure(
            problem.optimizer.step, device, roots=(problem.model, problem.optimizer), repeats=settings.repeats
        )
        saved = None if name == "adamw" else 4 * count / GIB
        reference = None if name == "torch.optim.Muon" else exactness
        base = {"exactness": reference, "error": error, "baseline": None if name == "adamw" else "adamw"}
        study.add(name, times[name], formula_saved_gib=saved, **base)
        del problem

    def is_small(tokens: int) -> bool:
        problem = Problem(settings, "muon", device, tokens)
        whole = measure(problem.train, device, roots=(problem.model, problem.optimizer), repeats=settings.repeats)
        if whole.status != "ok":
            raise SettingsError(f"out of memory with {tokens} tokens; lower --width or --num_layers")
        return times["muon"].ms < PART * whole.ms

    sizes = [2**power for power in (range(10, 18) if gpu else range(8, 12))]
    study.ask(f"Muon's step takes less than {PART:.0%} of a training step", "tokens", is_small, sizes, sizes[-1])
    return study.finish(parameters=count)


if __name__ == "__main__":
    run_script(main)
