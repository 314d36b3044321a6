"""The training of a ViT with one seed: augmentation, tokens and steps on one clock, validation, and what it measured.

vit_train.py reads the settings and writes the results.
"""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import utils
from attention import prepare_for_compile
from cuda_graphs import RecordedStep, make_recordable
from image_augmentation import augment, draw_mixing, draw_numbers, normalise
from image_dataset import ImageData
from memory_tracker import MemoryTracker
from mixed_resolution import Tokens, resize, scores, tokenize, train_scorer, uniform_tokens
from muon import Muon
from optimizers import make_optimizer
from precision import autocast, make_scaler
from run_folder import LapClock, RunFolder, StopRequest, step_times
from utils import count_parameters
from vit import ViT, compiled_by_parts, flops_per_image
from vit_evaluation import accuracy_of, correlation_of, mosaics_of, without_heads
from vit_plan import Plan


@dataclass
class Best:
    """The epoch with the highest validation accuracy so far, and its weights."""

    accuracy: float = -1.0
    loss: float = math.inf
    epoch: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def parameter_groups(model: ViT, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and everything else (norms, biases, positions, the class token), which does not."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name != "positions"]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or name == "positions"]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def hidden_matrices(model: ViT) -> list[torch.nn.Parameter]:
    """The matrices inside the blocks, which lead from hidden states to hidden states: Muon's."""
    return [p for p in model.blocks.parameters() if p.dim() == 2]


def rate_at(step: int, *, warm_up_steps: float, all_steps: int, cosine: bool) -> float:
    """Learning rate of a step as a part of the highest: a linear rise, then half a cosine down to 0, or constant."""
    if step < warm_up_steps:
        return min(1.0, (step + 1) / warm_up_steps)
    if not cosine:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up_steps) / max(1.0, all_steps - warm_up_steps)))


class Training:
    """What the training of one seed holds: model, optimizer, data, tracker, folder, and where it is."""

    def __init__(self, settings: Any, plan: Plan, data: ImageData, run: RunFolder, seed: int, stop: StopRequest):
        self.settings, self.plan, self.data, self.run, self.stop = settings, plan, data, run, stop
        self.seed, self.device, self.images = seed, plan.device, data.splits["train"]
        self.scorer_s, self.scorer = 0.0, None
        if plan.scorer == "trained":
            self.scorer, self.scorer_s = self.make_scorer()
        torch.manual_seed(seed)
        self.model = ViT(plan.model).to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if settings.average_decay else None
        self.optimizer = self.make_optimizer()
        if plan.use_cuda_graphs:
            make_recordable(self.optimizer)
        self.scaler = make_scaler(plan.precision, self.device)
        shape = {"warm_up_steps": plan.warm_up_epochs * self.steps_per_epoch, "cosine": settings.schedule == "cosine"}
        self.scheduler = LambdaLR(
            self.optimizer, partial(rate_at, all_steps=plan.epochs * self.steps_per_epoch, **shape)
        )
        self.tracker = MemoryTracker(self.device, run.path / "memory.csv", (self.model, self.optimizer))
        # Streams of their own: order, augmentation and random trees here, weights above, dropout in `fit`.
        self.numbers = torch.Generator(self.device).manual_seed(seed + 10**6)  # order, augmentation, random trees
        self.best = Best()
        self.step = self.epoch = 0
        self.first_step_ms: float | None = None
        self.seconds = self.evaluation_s = 0.0
        self.laps: list[dict[str, Any]] = []  # an entry an epoch: milliseconds of each step's parts
        self.at_start = self.correlation(self.model)
        self.build()

    def build(self) -> None:
        """The functions of a step as the settings want them."""
        fixed = {"augmentation": self.plan.augmentation, "num_classes": self.plan.model.num_classes}
        self.augment = partial(augment, mean=self.data.mean, deviation=self.data.deviation, **fixed)
        self.forward, self.cut, self.recorded = self.model, self.cut_tokens, RecordedStep(self.update)
        if self.plan.use_compile:
            prepare_for_compile()
            compiled = partial(torch.compile, dynamic=False, fullgraph=True)
            self.augment, self.cut = compiled(self.augment), compiled(self.cut)
            by_parts = self.settings.compile_scope == "block"
            self.forward = compiled_by_parts(self.model) if by_parts else compiled(self.model)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW, or Muon for the matrices of the blocks and AdamW for the rest; on the device."""
        groups = parameter_groups(self.model, self.settings.weight_decay)
        options = {"learning_rate": self.plan.learning_rate, "weight_decay": self.settings.weight_decay}
        if self.plan.optimizer == "adamw":
            return make_optimizer("adamw", groups, **options, device=self.device)
        matrices = hidden_matrices(self.model)
        mine = set(map(id, matrices))
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in mine]
        return Muon(matrices, groups, **options)

    def make_scorer(self) -> tuple[torch.nn.Module, float]:
        """The scorer's network, trained on the same training images, and the seconds that took."""
        begin = time.perf_counter()
        epochs = self.settings.scorer_epochs or 2
        network = train_scorer(
            self.images.images,
            self.images.labels,
            num_classes=self.plan.model.num_classes,
            mean=self.data.mean,
            deviation=self.data.deviation,
            epochs=epochs,
            batch_size=self.plan.batch_size,
            learning_rate=2e-3,
            seed=self.seed + 3 * 10**6,
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return network, time.perf_counter() - begin

    # -- batches -----------------------------------------------------------------------------------------------------

    @property
    def tracks(self) -> bool:
        """Whether memory is tracked: of the first seed, and without a GPU not of compiled code.

        There live tensors are counted operator by operator, and compiled code has no operators to count.
        """
        return self.seed == self.plan.seeds[0] and (not self.plan.use_compile or self.device.type == "cuda")

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; the rest of an epoch's images come up in another epoch, because the order changes."""
        return len(self.images) // self.plan.batch_size

    def cut_tokens(self, inputs: torch.Tensor, importances: list[torch.Tensor] | None = None) -> Tokens:
        """Normalised images (images, 3, size, size) to tokens; importances are drawn here unless given."""
        plan = self.plan
        inputs = resize(inputs, plan.image_size)
        if plan.tree is None:
            return uniform_tokens(inputs, plan.patch_size)
        if importances is None:
            importances = scores(inputs, plan.tree, plan.scorer, network=self.scorer)
        return tokenize(inputs, plan.tree, importances)

    def random_importances(self, count: int, generator: torch.Generator) -> list[torch.Tensor] | None:
        """Numbers for the random scorer, drawn outside of compiled code; None for every other."""
        tree = self.plan.tree
        if self.plan.scorer != "random":
            return None
        shapes = [(count, (tree.image_size // size) ** 2) for size in tree.sizes if size > tree.min_patch]
        return [torch.rand(shape, generator=generator, device=self.device) for shape in shapes]

    def tokens_of(self, images: torch.Tensor, place: int = 0) -> Tokens:
        """Tokens of images as they are (bytes), for evaluation; `place` seeds the random scorer."""
        inputs = normalise(images, self.data.mean, self.data.deviation)
        generator = torch.Generator(self.device).manual_seed(place)
        return self.cut_tokens(inputs, self.random_importances(len(images), generator))

    def batches(self, clock: LapClock) -> Iterator[tuple[Tokens, torch.Tensor]]:
        """Tokens and soft targets (images, classes) of this epoch's batches; marks the clock after each part."""
        batch, plan = self.plan.batch_size, self.plan
        order = torch.randperm(len(self.images), generator=self.numbers, device=self.device)
        mixing = draw_mixing(self.steps_per_epoch, plan.augmentation, self.seed, self.epoch, self.device)
        for place in range(self.steps_per_epoch):
            chosen = order[place * batch : (place + 1) * batch]
            numbers = draw_numbers(batch, plan.augmentation, self.numbers, self.device)
            images, labels = self.images.images[chosen], self.images.labels[chosen]
            inputs, targets = self.augment(images, labels, numbers, mixing[place])
            clock.mark()
            tokens = self.cut(inputs, self.random_importances(batch, self.numbers))
            clock.mark()
            yield tokens, targets

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, tokens: Tokens, targets: torch.Tensor) -> torch.Tensor:
        """One optimizer step, and the learning rate and the averaged weights after it; returns what `update` does.

        With CUDA graphs the first steps, among them those whose memory is tracked, are launched kernel by kernel.
        """
        launched = 1 + (self.settings.tracked_steps if self.tracks else 0)
        recorded = self.plan.use_cuda_graphs and self.step > launched
        with self.tracker.phase("training_step"):
            update = self.recorded if recorded else self.update
            values = update(tokens.patches, tokens.centres, targets)
            self.scheduler.step()
            self.update_average()
        return values

    def update(self, patches: torch.Tensor, centres: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Forward, loss, backward and the optimizer; nothing in it waits for the GPU or differs from step to step.

        Returns:
            (3,) on the device: cross-entropy, accuracy (with mixed images: of the larger part), DeCAtt's term (0
            without).
        """
        tracker, settings = self.tracker, self.settings
        with tracker.phase("forward_pass"), autocast(self.plan.precision, self.device):
            result = self.forward(patches, centres)
        with tracker.phase("loss"):
            logits, term = result if isinstance(result, tuple) else (result, None)
            loss = F.cross_entropy(logits, targets)
            total = loss if term is None else loss + self.plan.decatt_weight * term
            right = (logits.argmax(1) == targets.argmax(1)).float().mean()
        del result, logits
        with tracker.phase("backward_pass"):
            self.scaler.scale(total).backward()
        with tracker.phase("optimizer_step"):
            if settings.gradient_clip:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.gradient_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        term = torch.zeros_like(right) if term is None else term.detach()
        return torch.stack([loss.detach(), right, term])

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the averaged weights towards the present ones; faster in the beginning, when they are far away."""
        if self.average is None:
            return
        decay = min(self.settings.average_decay, (1 + self.step) / (10 + self.step))
        own = list(self.average.parameters())
        torch._foreach_lerp_(own, list(self.model.parameters()), 1 - decay)

    def train_epoch(self) -> dict[str, float]:
        """One pass over the training images; writes its steps and returns the means of its loss, accuracy and term.

        Raises:
            FloatingPointError: a loss is not finite.
            Interrupted: Ctrl-C or SIGTERM.
        """
        settings, clock, found = self.settings, LapClock(self.device), []
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.model.train()
        begin = time.perf_counter()
        clock.mark()
        for tokens, targets in self.batches(clock):
            self.step += 1
            tracked = self.tracks and 1 < self.step <= 1 + settings.tracked_steps
            with self.tracker.step(self.step) if tracked else nullcontext():
                found.append(self.training_step(tokens, targets))
            clock.mark()
            if self.stop.signal is not None or self.step == settings.max_steps:
                break
        laps = clock.read()
        wall_s = time.perf_counter() - begin
        self.seconds += wall_s
        self.epoch += 1
        epoch = {"learning_rate": rate, "wall_s": wall_s}
        epoch |= {name: laps[place::3] for place, name in enumerate(("augment_ms", "tokenise_ms", "step_ms"))}
        self.first_step_ms = self.first_step_ms or sum(laps[:3])
        self.laps.append(epoch)
        values = torch.stack(found).tolist()
        self.log_steps(values, epoch)
        if not all(math.isfinite(loss) for loss, _, _ in values):
            raise FloatingPointError(f"the loss is not finite in epoch {self.epoch}; lower --learning_rate")
        self.stop.check()
        means = np.mean(values, axis=0).tolist()
        return dict(zip(("train_loss", "train_accuracy", "decorrelation"), means, strict=True))

    def log_steps(self, values: list[list[float]], epoch: dict[str, Any]) -> None:
        """Append the epoch's steps to steps.jsonl."""
        peak = self.tracker.summary().get("training_step", {}).get("peak_allocated_gib")
        first, batch = self.step - len(values), self.plan.batch_size
        rows = []
        for place, (loss, accuracy, term) in enumerate(values):
            number = first + place + 1
            if number % self.settings.log_every and number > 1:
                continue
            step_ms = epoch["step_ms"][place]
            rows.append(
                {
                    "seed": self.seed,
                    "step": number,
                    "epoch": self.epoch,
                    "images": number * batch,
                    "loss": loss if math.isfinite(loss) else None,
                    "accuracy": accuracy,
                    "decorrelation": term if self.plan.decatt_weight and math.isfinite(term) else None,
                    "step_ms": round(step_ms, 4),
                    "augment_ms": round(epoch["augment_ms"][place], 4),
                    "tokenise_ms": round(epoch["tokenise_ms"][place], 4),
                    "images_per_s": round(1000 * batch / step_ms, 1),
                    "mfu": self.mfu(1000 * batch / step_ms),
                    "peak_gib": peak,
                }
            )
        self.run.log_steps(rows)

    def mfu(self, images_per_s: float) -> float | None:
        peak = utils.peak_tflops(utils.device_name(self.device), self.plan.precision)
        value = utils.model_flops_utilisation(images_per_s, flops_per_image(self.model), peak)
        return None if value is None else round(value, 4)

    def fit(self, bar: tqdm) -> None:
        """Train and validate until the epochs are done; keeps the best weights."""
        begin = time.perf_counter()
        torch.manual_seed(self.seed + 2 * 10**6)  # of dropout, whatever looked at the model before
        for _ in range(self.plan.epochs):
            row = {"seed": self.seed, "epoch": self.epoch + 1, **self.train_epoch(), "step": self.step}
            last = self.epoch == self.plan.epochs or self.step == self.settings.max_steps
            if last or self.epoch % self.settings.evaluate_every == 0:
                clock = time.perf_counter()
                validation = self.evaluate("validation")
                self.evaluation_s += time.perf_counter() - clock
                row |= {f"validation_{name}": value for name, value in validation.items()}
                better = (validation["accuracy"], -validation["loss"]) > (self.best.accuracy, -self.best.loss)
                if better:
                    weights = {name: value.clone() for name, value in self.evaluated.state_dict().items()}
                    self.best = Best(validation["accuracy"], validation["loss"], self.epoch, weights)
                bar.set_postfix(loss=f"{row['train_loss']:.3f}", validation=f"{100 * validation['accuracy']:.2f} %")
            self.log_epoch(row)
            bar.update()
            if self.step == self.settings.max_steps:
                break
        self.total_s = time.perf_counter() - begin

    def log_epoch(self, row: dict[str, Any]) -> None:
        """Append a line to epochs.jsonl: loss, accuracies, DeCAtt's term, and the parts of the time in seconds."""
        lap = self.laps[-1]
        if not self.plan.decatt_weight:
            row["decorrelation"] = None
        seconds = {f"{name}_s": round(sum(lap[f"{name}_ms"]) / 1000, 6) for name in ("augment", "tokenise", "step")}
        row |= {"learning_rate": lap["learning_rate"], **seconds, "wall_s": round(lap["wall_s"], 6)}
        self.run.append("epochs.jsonl", [row])

    # -- evaluation --------------------------------------------------------------------------------------------------

    @property
    def evaluated(self) -> ViT:
        """The model whose accuracy counts: the averaged one if there is one."""
        return self.average or self.model

    def evaluate(self, name: str, model: ViT | None = None) -> dict[str, float]:
        """`accuracy_of` every image of a split, of the model whose accuracy counts or of another one."""
        model = self.evaluated if model is None else model
        plan = self.plan
        found = accuracy_of(model, self.data.splits[name], self.tokens_of, 2 * plan.batch_size, plan.precision)
        self.stop.check()
        return found

    def correlation(self, model: ViT) -> dict[str, Any] | None:
        """`correlation_of` the heads over images of validation."""
        return correlation_of(model, self.data.splits["validation"], self.tokens_of, self.plan.precision)

    def results(self) -> dict[str, Any]:
        """Everything that this seed is to be judged by; test is evaluated here, with the best weights and no others."""
        self.evaluated.load_state_dict(self.best.weights)
        test = self.evaluate("test")
        correlation = self.correlation(self.evaluated)
        more = {}
        if correlation is not None:
            for name, model in without_heads(self.evaluated, correlation["matrices"], self.seed):
                more[f"test_accuracy_without_a_{name}_head"] = self.evaluate("test", model)["accuracy"]
        return {
            "seed": self.seed,
            "epochs": self.epoch,
            "steps": self.step,
            "best_epoch": self.best.epoch,
            "validation_accuracy": self.best.accuracy,
            "validation_loss": self.best.loss,
            "test_accuracy": test["accuracy"],
            "test_loss": test["loss"],
            "test_images": len(self.data.splits["test"]),
            **more,
            **self.times(),
            **self.tracker.headline(),
            "parameters": count_parameters(self.model),
            "head_correlation_at_start": self.at_start,
            "head_correlation": correlation,
        }

    def times(self) -> dict[str, Any]:
        """Step times without the first epoch, which warms up; of a single epoch without its first steps."""
        parts = ("step_ms", "augment_ms", "tokenise_ms")
        if len(self.laps) > 1:
            timed = {name: [ms for lap in self.laps[1:] for ms in lap[name]] for name in parts}
        else:
            warm = max(5, 2 + self.settings.tracked_steps, len(self.laps[0]["step_ms"]) // 10)
            timed = {name: self.laps[0][name][warm:] for name in parts}
        # step_times knows tokens: a step has batch_size images, and an image flops_per_image
        batch, flops = self.plan.batch_size, flops_per_image(self.model)
        found = step_times(timed["step_ms"], timed["augment_ms"], self.first_step_ms, batch, flops)
        found["images_per_s"], found["flops_per_image"] = found.pop("tokens_per_s"), found.pop("flops_per_token")
        found["augment_ms_median"] = found.pop("data_ms_median")
        middle = utils.percentile(timed["tokenise_ms"], 50)
        peak = utils.peak_tflops(utils.device_name(self.device), self.plan.precision)
        return found | {
            "tokenise_ms_median": None if middle is None else round(middle, 4),
            "mfu": None if found["images_per_s"] is None else self.mfu(found["images_per_s"]),
            "mfu_denominator_tflops": peak,
            "training_minutes": round((self.seconds + self.scorer_s) / 60, 4),
            "evaluation_minutes": round(self.evaluation_s / 60, 4),
            "total_minutes": round(self.total_s / 60, 4),  # with compiling, validation and logging
            # part of the training's minutes
            "scorer_training_s": round(self.scorer_s, 3) if self.scorer is not None else None,
        }

    def write_mosaics(self) -> None:
        """mosaics.npz, for mixed tokens: what `mosaics_of` some test images holds."""
        if self.plan.tree is not None:
            arrays = mosaics_of(self.data, self.tokens_of, self.plan.tree)
            np.savez_compressed(self.run.path / "mosaics.npz", **arrays)
