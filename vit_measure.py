"""One variant of a vision transformer's training step: started, held against a reference, recorded and timed.

vit_benchmark.py asks the questions. A variant that fails, or whose results are not those of the reference, gets no
time.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attention import prepare_for_compile, profiled_kernel
from cuda_graphs import RecordedStep, make_recordable
from optimizers import make_optimizer
from precision import autocast
from simple_vit_peer import OnImages, SimpleViT, copy_weights, in_our_order
from technique_bench import EXACTNESS, Cost, Study, compare, interleaved, middle, relative_error
from utils import GIB, SettingsError, count_parameters, is_out_of_memory
from vit import ViT

DECATT_WEIGHT = 10.0
RECORDED = ", recorded"  # in the name of a row
REPLAY_TOLERANCE = 0.05  # of a step's change of the parameters; some backward passes add in no fixed order


# --------------------------------------------------------------------------------------------------------------------
# A model in training
# --------------------------------------------------------------------------------------------------------------------


class Trial:
    """A model with its optimizer and a batch; `step` trains on it once."""

    def __init__(
        self,
        model: nn.Module,
        precision: str,
        device: torch.device,
        batch: tuple[torch.Tensor, ...],
        recordable: bool = False,
    ):
        self.module, self.precision, self.device, self.batch = model.to(device), precision, device, batch
        self.called: Callable[..., Any] = self.module
        options = {"learning_rate": 1e-4, "weight_decay": 0.0, "device": device}
        self.optimizer = make_optimizer("adamw", model.parameters(), **options)
        if recordable:
            make_recordable(self.optimizer)
        self.recorded: RecordedStep | None = None
        model.register_buffer("batch_inputs", batch[0], persistent=False)  # so that the tracker sees them without a GPU
        model.register_buffer("batch_labels", batch[1], persistent=False)

    @property
    def model(self) -> nn.Module:
        return self.module.model if isinstance(self.module, OnImages) else self.module

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def start(self, compiled: bool) -> float:
        """Compile the model if asked to and run the first step; returns its seconds."""
        if compiled:
            prepare_for_compile()
            # One entry for each variant, and no silent return to uncompiled code.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            self.called = torch.compile(self.module, dynamic=False)
        begin = time.perf_counter()
        self.step()
        self.synchronise()
        return round(time.perf_counter() - begin, 2)

    def loss(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy, with DeCAtt's term where the model returns one; and the logits."""
        with autocast(self.precision, self.device):
            result = self.called(self.batch[0])
            logits, term = result if isinstance(result, tuple) else (result, None)
            loss = F.cross_entropy(logits, self.batch[1])
        return loss if term is None else loss + DECATT_WEIGHT * term, logits

    def launch(self) -> torch.Tensor:
        """A training step, kernel by kernel."""
        loss = self.loss()[0]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def record(self) -> None:
        """Make every later step the replay of a CUDA graph."""
        self.recorded = RecordedStep(self.launch)
        self.step()

    def changes(self, replay: bool) -> list[torch.Tensor]:
        """What one step changes the parameters by, launched or replayed; everything is as before afterwards."""
        states = [
            value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        tensors = [parameter.detach() for parameter in self.module.parameters()]
        before = [tensor.clone() for tensor in (*tensors, *states)]
        self.recorded() if replay else self.launch()
        after = [tensor.clone() for tensor in tensors]
        for tensor, value in zip((*tensors, *states), before, strict=True):
            tensor.copy_(value)
        return [new - old for new, old in zip(after, before, strict=False)]

    def step(self) -> None:
        self.launch() if self.recorded is None else self.recorded()

    def kernel(self) -> str:
        return profiled_kernel(self.step, compiled=self.called is not self.module)

    def own_gib(self) -> float:
        """Parameters, optimizer states and the batch."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.module.parameters(), *self.module.buffers(), *filter(torch.is_tensor, states)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / GIB

    def results(self, names: list[str]) -> list[torch.Tensor]:
        """Logits and gradients of the named parameters, in this lab's order; of what is timed: compiled if it is."""
        self.module.zero_grad(set_to_none=True)
        loss, logits = self.loss()
        loss.backward()
        gradients = [self.model.get_parameter(name).grad.clone() for name in names]
        self.module.zero_grad(set_to_none=True)
        if isinstance(self.model, SimpleViT):
            gradients = [in_our_order(name, values) for name, values in zip(names, gradients, strict=True)]
        return [logits.detach(), *gradients]


class Gate:
    """What a model computes in fp64 and, uncompiled, in the benchmark's precision; others are held against it.

    The bias of q, k and v is left out: softmax ignores what k's adds, so a third of its gradient is rounding alone.
    """

    def __init__(self, make: Callable[[], nn.Module], precision: str, device: torch.device, batch: tuple):
        torch.manual_seed(0)
        plain = Trial(make(), precision, device, batch)
        self.names = [name for name, _ in plain.model.named_parameters() if not name.endswith("qkv.bias")]
        self.state = {name: value.clone() for name, value in plain.model.state_dict().items() if "batch_" not in name}
        exact = Trial(make().double(), "fp32", device, (batch[0].double(), batch[1]))  # no autocast
        exact.model.load_state_dict(self.state)
        self.from_peer = isinstance(plain.model, SimpleViT)
        self.plain, self.exact = plain.results(self.names), exact.results(self.names)
        self.plain_error = relative_error(self.plain, self.exact)

    def check(self, trial: Trial) -> tuple[str, float]:
        """Exactness and error of a trial with the same weights, as `compare` has them."""
        if self.from_peer and isinstance(trial.model, ViT):
            copy_weights(trial.model, self.state)
        else:
            trial.model.load_state_dict(self.state)
        found = trial.results(self.names)
        logits, gradients = (
            compare(found[part], self.plain[part], self.exact[part]) for part in (slice(1), slice(1, None))
        )  # apart: the noise of the worst gradient would hide wrong logits
        return max(logits, gradients, key=lambda result: EXACTNESS.index(result[0]))[0], max(logits[1], gradients[1])


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Variant:
    """A model to time. `refused` says why it cannot run here; `facts` go into its row."""

    name: str
    make: Callable[[], nn.Module]
    batch: tuple[torch.Tensor, torch.Tensor]
    compiled: bool
    refused: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def begin(trial: Trial, compiled: bool) -> tuple[float | None, str, str]:
    """First steps: (seconds of the first, the kernel or what went wrong, status ok, oom or failed)."""
    try:
        return trial.start(compiled), trial.kernel(), "ok"
    except (SettingsError, RuntimeError) as error:
        status, reason = "oom" if is_out_of_memory(error) else "failed", " ".join(str(error).split())[:300]
    return None, reason, status


def run_variants(
    study: Study, settings: Any, device: torch.device, variants: list[Variant], base: str, gate: Gate | None = None
) -> list[dict[str, Any]]:
    """Start, check and time variants in turn; returns their rows. What fails or is `changed` gets no time.

    With CUDA graphs the compiled ones are timed twice, launched and recorded; a recorded row has the launched step's
    peak, because a replay allocates nothing.
    """
    recorded = bool(settings.use_cuda_graphs) and any(variant.compiled for variant in variants)
    trials: dict[str, Trial] = {}
    notes, facts, parity, statuses = {}, {}, {}, {}
    for variant in variants:
        name = variant.name
        facts[name], parity[name] = {"compile_s": None, "kernel": None}, (None, None)
        if variant.refused is not None:
            statuses[name], notes[name] = "unsupported", f"unsupported: {variant.refused}"
            continue
        torch.manual_seed(0)
        trial = Trial(variant.make(), settings.precision, device, variant.batch, recorded)
        seconds, notes[name], statuses[name] = begin(trial, variant.compiled)
        if statuses[name] == "ok":
            facts[name] = {"compile_s": seconds if variant.compiled else None, "kernel": notes[name]}
            facts[name]["parameters"] = count_parameters(trial.model)
            if gate is not None:
                exactness, error = gate.check(trial)
                peer = isinstance(trial.model, SimpleViT)  # what the others are held against
                parity[name] = (None if peer else exactness, error)
            if parity[name][0] == "changed":
                statuses[name], notes[name] = "not timed", "not timed: its results are not those of the reference"
            else:
                trials[name] = trial
        del trial
        gc.collect()
    steps = {name: (trial.step, (trial.module, trial.optimizer)) for name, trial in trials.items()}
    compiled = any(variant.compiled for variant in variants)
    options = {"rounds": settings.rounds, "repeats": settings.repeats, "compiled": compiled}
    rows, peaks = [], {}
    for word in ("", RECORDED)[: 1 + recorded]:
        if word:
            for name, trial in list(trials.items()):
                trial.record()
                replayed, launched = torch.cat([c.flatten() for c in trial.changes(True)]), trial.changes(False)
                launched = torch.cat([change.flatten() for change in launched])
                if (replayed - launched).norm() > REPLAY_TOLERANCE * launched.norm():
                    statuses[name], notes[name] = "not timed", "not timed: its replay is not the launched step"
                    del steps[name], trials[name]
        costs = interleaved(steps, device, **options)
        for variant in variants:
            name, rounds = variant.name, costs.get(variant.name, [])
            cost = middle(rounds) if rounds else Cost(statuses[name])
            if cost.peak_gib is not None and not word:  # without what the other variants keep
                own = trials[name].own_gib()
                peaks[name] = (round(own, 4), round(cost.peak_gib - cost.start_gib + own, 4))
            start, peak = peaks.get(name, (None, None))
            cost = replace(cost, start_gib=start, peak_gib=peak)
            exactness, error = parity[name]
            against = None if name == base else base + word
            options_of_row = {"exactness": exactness, "error": error, "baseline": against, "note": notes[name]}
            study.add(name + word, cost, **options_of_row)
            images = len(variant.batch[0])
            row = study.rows[-1]
            row |= {"compiled": variant.compiled, "recorded": bool(word), "batch_size": images}
            row |= facts[name] | variant.facts
            row["ms_of_rounds"] = [part.ms for part in rounds]
            row["images_per_s"] = None if cost.ms is None else round(1000 * images / cost.ms, 1)
            rows.append(row)
    del trials, steps
    free(device)
    return rows


def free(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
