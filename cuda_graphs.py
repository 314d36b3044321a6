"""CUDA graphs: record the kernels of a training step once and launch them all by one call in every later step.

    python cuda_graphs.py                                     a step launched and recorded, by rows of a batch (a GPU)
    python cuda_graphs.py --num_layers 48 --width 384         another stack of layers
    python vit_train.py --use_cuda_graphs true                in training

Python and PyTorch need 5 to 20 microseconds to launch a kernel, and a step of a small model has hundreds of them that
run for less: the GPU waits. A graph holds the launches with all their arguments, so that a replay costs the host one
call. The kernels are the same ones in the same order, so the results are those of the launched step, bit for bit.

What it asks for: fixed shapes; inputs that are copied to fixed places; no step may wait for the GPU or decide by what
it finds there; numbers that change from step to step (a learning rate) must lie on the GPU. Random numbers of PyTorch's
default generator go on from replay to replay.

It saves time and no memory: what a step allocates stays reserved for its replays. It does not help where kernels run
for longer than their launches take: what is printed last is the size from which on less than 5 % is saved.

Source: Nguyen, Carilli and others 2021, Accelerating PyTorch with CUDA Graphs (the PyTorch blog); torch.cuda.graph.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from optimizers import Stack, make_optimizer
from precision import autocast, set_precision
from technique_bench import Study, compare, interleaved, middle
from utils import GIB, SettingsError, parse_settings, read_rising, run_script, setting

Step = Callable[..., torch.Tensor]


def unsupported_reason(device: torch.device, precision: str = "bf16") -> str | None:
    """Why a training step cannot be recorded here, a sentence that ends with what to change; None if it can."""
    if device.type != "cuda":
        return "CUDA graphs need an NVIDIA GPU; leave --use_cuda_graphs out"
    if precision == "fp16":
        return "fp16's loss scaling decides on the host whether to step; use --precision bf16 with --use_cuda_graphs"
    return None


def make_recordable(optimizer: torch.optim.Optimizer) -> None:
    """Keep the learning rates of a fused or plain AdamW on the GPU, where a scheduler fills in new ones.

    Call it before the scheduler is made, and before the first step.
    """
    for group in optimizer.param_groups:
        group["capturable"] = True
        group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)


class RecordedStep:
    """A function that is recorded as a CUDA graph at its first call and replayed at every later one.

    The first call copies its inputs to the fixed places, runs the function on them (this is the step, and it compiles
    and allocates what later ones keep), and then records it, which runs nothing.

    Args:
        function: takes tensors (or None) of the same shapes at each call, does a whole training step, and returns one
            tensor. It has to leave no gradients behind.
    """

    def __init__(self, function: Step):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[torch.Tensor | None, ...] = ()
        self.output: torch.Tensor | None = None

    def __call__(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Run the step on these inputs; the tensor returned is the caller's own.

        Raises:
            ValueError: an input has another shape or type than the recorded one.
        """
        if self.graph is None:
            return self.record(inputs)
        for place, (mine, given) in enumerate(zip(self.inputs, inputs, strict=True)):
            if mine is None or given is None:
                if mine is not given:
                    raise ValueError(f"input {place} of a recorded step must stay None, or a tensor")
                continue
            if mine.shape != given.shape or mine.dtype != given.dtype:
                raise ValueError(
                    f"input {place} of a recorded step is {mine.dtype} {tuple(mine.shape)}, "
                    f"not {given.dtype} {tuple(given.shape)}"
                )
            mine.copy_(given)
        self.graph.replay()
        return self.output.clone()

    def record(self, inputs: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        """Do the first step, then record the next ones; returns what the first gave."""
        self.inputs = tuple(None if given is None else given.detach().clone() for given in inputs)
        stream = torch.cuda.Stream()  # what is recorded may not meet what the default stream has begun
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.function(*self.inputs).clone()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.output = self.function(*self.inputs)
        self.graph = graph
        return result


# --------------------------------------------------------------------------------------------------------------------
# Measuring it alone
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Settings of `python cuda_graphs.py`."""

    num_layers: int = setting(24, "residual linear layers")
    width: int = setting(192, "of the hidden states")
    rows: str = setting("256,1024,4096,16384,65536,262144", "rows (tokens) of a batch, rising")
    precision: str = setting("bf16", "of the products", ["fp32", "tf32", "bf16"])
    rounds: int = setting(5, "measurements of each variant, in turn")
    repeats: int = setting(20, "timed steps of a measurement")
    output_folder: str = setting("outputs", "folder of all results")


class Problem:
    """A stack, its optimizer and a batch."""

    def __init__(self, settings: Settings, rows: int, recorded: bool, device: torch.device):
        torch.manual_seed(0)
        self.settings, self.device = settings, device
        self.model = Stack(settings.num_layers, settings.width).to(device)
        self.optimizer = make_optimizer(
            "adamw", self.model.parameters(), learning_rate=1e-3, weight_decay=0.0, device=device
        )
        make_recordable(self.optimizer)
        self.inputs = torch.randn(rows, settings.width, device=device)
        self.called: Step = RecordedStep(self.train) if recorded else self.train

    def train(self, inputs: torch.Tensor) -> torch.Tensor:
        """A whole training step; returns the loss."""
        with autocast(self.settings.precision, self.device):
            loss = F.mse_loss(self.model(inputs).float(), inputs.flip(1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def step(self) -> None:
        self.called(self.inputs)

    def results(self, steps: int) -> list[torch.Tensor]:
        """The losses of some steps on inputs that change, and the parameters after them."""
        losses = [self.called(self.inputs * (1 + 0.1 * place)) for place in range(steps)]
        return [torch.stack(losses), *(parameter.detach().clone() for parameter in self.model.parameters())]


def main() -> int:
    """A training step launched kernel by kernel and as a graph, at every number of rows."""
    settings = parse_settings(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = read_rising("rows", settings.rows)
    for name in ("num_layers", "width", "rounds", "repeats"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    if device.type != "cuda":
        raise SettingsError("python cuda_graphs.py needs an NVIDIA GPU: nothing else has CUDA graphs")
    set_precision(settings.precision, device)
    study, costs = Study("cuda_graphs", settings, device), {}

    def measure_rows(count: int) -> bool:
        """Add the two lines of a number of rows; whether recording saves a twentieth of the time or more."""
        exactness, error = compare(*(Problem(settings, count, r, device).results(4) for r in (True, False, False)))
        problems, reserved = {}, 0
        for name in ("launched", "recorded"):
            gc.collect()
            torch.cuda.empty_cache()
            reserved = torch.cuda.memory_reserved()
            problems[name] = Problem(settings, count, name == "recorded", device)
            problems[name].step()
        torch.cuda.empty_cache()
        reserved = (torch.cuda.memory_reserved() - reserved) / GIB  # of the recorded one
        steps = {name: (problem.step, (problem.model,)) for name, problem in problems.items()}
        found = interleaved(steps, device, rounds=settings.rounds, repeats=settings.repeats)
        costs[f"{count:,} rows"] = {name: [row.ms for row in rounds] for name, rounds in found.items()}
        base, graph = f"launched, {count:,} rows", middle(found["recorded"])
        study.add(base, middle(found["launched"]))
        study.add(
            f"recorded, {count:,} rows",
            replace(graph, start_gib=None, peak_gib=None),  # a replay allocates nothing
            exactness=exactness,
            error=error,
            baseline=base,
            note=f"keeps {reserved:.3f} GiB reserved",
        )
        return graph.ms <= 0.95 * middle(found["launched"]).ms

    saves = {count: measure_rows(count) for count in rows}
    study.ask("recording saves less than 5 %", "rows", lambda count: not saves[count], rows, step=rows[-1])
    return study.finish(ms_of_rounds=costs)


if __name__ == "__main__":
    run_script(main)
