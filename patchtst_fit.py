"""The training of a PatchTST with one seed: epochs on one clock, validation, early stopping, and what it all measured.

patchtst_train.py reads the settings and writes the results; patchtst_pruning.py removes heads in between.
"""

import copy
import csv
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from tqdm import tqdm

import utils
from attention import prepare_for_compile
from attention_support import MAX_SEQUENCES
from head_pruning import attention_layers, head_numbers, remove_heads, static_choice
from memory_tracker import MemoryTracker
from optimizers import make_optimizer
from patchtst import PatchTST, flops_per_window
from patchtst_plan import Plan
from precision import autocast, make_scaler
from run_folder import LapClock, RunFolder, StopRequest, step_times
from time_series_dataset import Errors, SeriesData, WindowLoader
from utils import count_parameters

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Best:
    """The epoch with the lowest validation MSE so far, and what is needed to go back to it."""

    mse: float = math.inf
    epoch: int = 0
    learning_rate: float = 0.0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


class Training:
    """What one run (one seed) holds: model, optimizer, data, tracker, folder, and where it is."""

    def __init__(self, settings: Any, plan: Plan, data: SeriesData, run: RunFolder, seed: int, stop: StopRequest):
        self.settings, self.plan, self.data, self.run, self.stop = settings, plan, data, run, stop
        self.seed, self.device, self.windows = seed, plan.device, data.splits["train"]
        torch.manual_seed(seed)
        self.model = PatchTST(plan.model).to(self.device)
        if settings.prune in ("static_conservative", "static_random"):
            for place, layer in enumerate(attention_layers(self.model)):
                chosen = static_choice(settings.prune, layer.num_heads, plan.heads_to_prune, place, seed)
                remove_heads(layer, chosen, mode=settings.prune_mode or "structural")
        self.optimizer = make_optimizer(
            "adamw",
            self.model.parameters(),
            learning_rate=plan.learning_rate,
            weight_decay=settings.weight_decay,
            device=self.device,
        )
        self.scaler = make_scaler(plan.precision, self.device)
        self.scheduler: LRScheduler | None = make_schedule(plan, self.optimizer, self.steps_per_epoch)
        self.tracker = MemoryTracker(self.device, run.path / "memory.csv", (self.model, self.optimizer))
        self.loader = None
        if settings.num_workers is not None:
            self.loader = WindowLoader(self.windows, plan.batch_size, settings.num_workers)
        self.step = self.epoch = 0
        self.first_step_ms: float | None = None
        self.seconds = 0.0  # of training alone
        self.track_from = 1  # memory of the steps after this one is tracked
        self.laps: list[dict[str, Any]] = []  # an entry an epoch: data_ms and step_ms of its steps, wall_s
        self.build()

    def build(self) -> None:
        """The forward pass as the settings want it; again after every change of the model's shape."""
        self.forward = self.model
        self.flops_per_window = flops_per_window(self.model, self.windows.values.shape[1])
        if self.settings.use_compile:
            prepare_for_compile()
            mode = None if self.settings.compile_mode in (None, "default") else self.settings.compile_mode
            self.forward = torch.compile(self.model, mode=mode, dynamic=False, fullgraph=True)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; the rest of an epoch's windows come up in another epoch, because the order changes."""
        return len(self.windows) // self.plan.batch_size

    def batches(self) -> Iterator[Batch]:
        """The batches of this epoch: inputs (batch, context_length, channels), targets (batch, horizon, channels)."""
        order = self.windows.order(self.seed, self.epoch)
        if self.loader is not None:
            return self.loader.batches(order)
        return self.windows.batches(order, self.plan.batch_size)

    def training_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One optimizer step; returns the MSE, a scalar on the device, so that nobody has to wait for the GPU."""
        tracker = self.tracker
        with tracker.phase("training_step"):
            with tracker.phase("forward_pass"), autocast(self.plan.precision, self.device):
                forecast = self.forward(inputs)
            with tracker.phase("loss"):
                loss = F.mse_loss(forecast, targets)
            del forecast
            with tracker.phase("backward_pass"):
                self.scaler.scale(loss).backward()
            with tracker.phase("optimizer_step"):
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.detach()

    def train_epoch(self) -> float:
        """One pass over the training windows; writes its steps and returns its mean MSE.

        Raises:
            FloatingPointError: a loss is not finite.
            Interrupted: Ctrl-C or SIGTERM.
        """
        settings, clock, losses = self.settings, LapClock(self.device), []
        # Without a GPU live tensors are counted operator by operator, and compiled code has no operators to count; CUDA
        # graphs keep their memory between steps, so that the peak of a step is no longer what the step needs.
        graphs = settings.compile_mode in ("reduce-overhead", "max-autotune")
        can_track = not settings.use_compile or (self.device.type == "cuda" and not graphs)
        rate = self.optimizer.param_groups[0]["lr"]
        self.model.train()
        begin = time.perf_counter()
        clock.mark()
        for inputs, targets in self.batches():
            clock.mark()
            self.step += 1
            tracked = can_track and self.track_from < self.step <= self.track_from + settings.tracked_steps
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with self.tracker.step(self.step) if tracked else nullcontext():
                loss = self.training_step(inputs, targets)
            losses.append(loss.clone() if graphs else loss)
            clock.mark()
            if self.stop.signal is not None or self.step == settings.max_steps:
                break
        laps = clock.read()
        wall_s = time.perf_counter() - begin
        self.seconds += wall_s
        self.epoch += 1
        data_ms, step_ms = laps[0::2], laps[1::2]
        self.first_step_ms = self.first_step_ms or step_ms[0]
        epoch = {"epoch": self.epoch, "learning_rate": rate, "wall_s": wall_s, "data_ms": data_ms, "step_ms": step_ms}
        self.laps.append(epoch)
        values = torch.stack(losses).tolist()
        self.log_steps(values, data_ms, step_ms)
        if not all(math.isfinite(value) for value in values):
            raise FloatingPointError(f"the loss is not finite in epoch {self.epoch}; lower --learning_rate")
        self.stop.check()
        return sum(values) / len(values)

    def log_steps(self, losses: list[float], data_ms: list[float], step_ms: list[float]) -> None:
        """Append the epoch's steps to steps.jsonl."""
        peak = self.tracker.summary().get("training_step", {}).get("peak_allocated_gib")
        tokens, first = self.tokens_per_step, self.step - len(losses)
        rows = []
        for place, (loss, data, step) in enumerate(zip(losses, data_ms, step_ms, strict=True), first + 1):
            if place % self.settings.log_every and place > 1:
                continue
            rows.append(
                {
                    "step": place,
                    "epoch": self.epoch,
                    "tokens": place * tokens,
                    "loss": loss if math.isfinite(loss) else None,
                    "step_ms": round(step, 4),
                    "data_ms": round(data, 4),
                    "tokens_per_s": round(1000 * tokens / step, 1),
                    "mfu": self.mfu(1000 * tokens / step),
                    "peak_gib": peak,
                }
            )
        self.run.log_steps(rows)

    @property
    def tokens_per_step(self) -> int:
        """A token is a patch of a channel."""
        return self.plan.batch_size * self.windows.values.shape[1] * self.plan.model.num_patches

    @property
    def flops_per_token(self) -> float:
        return self.flops_per_window * self.plan.batch_size / self.tokens_per_step

    def mfu(self, tokens_per_s: float) -> float | None:
        peak = utils.peak_tflops(utils.device_name(self.device), self.plan.precision)
        value = utils.model_flops_utilisation(tokens_per_s, self.flops_per_token, peak)
        return None if value is None else round(value, 4)

    @torch.no_grad()
    def evaluate(self, name: str, model: PatchTST | None = None, windows: int | None = None) -> dict[str, float]:
        """MSE and MAE over every window of a split (or its first `windows`), in evaluation mode and never compiled."""
        model = self.model if model is None else model
        split, errors = self.data.splits[name], Errors(self.device)
        at_once = max(1, min(4 * self.plan.batch_size, MAX_SEQUENCES // split.values.shape[1]))
        model.eval()
        for numbers in torch.arange(len(split) if windows is None else windows, device=self.device).split(at_once):
            self.stop.check()
            inputs, targets = split.batch(numbers)
            with autocast(self.plan.precision, self.device):
                forecast = model(inputs)
            errors.add(forecast, targets)
        model.train()
        return errors.result()

    def fit(self, epochs: int, patience: int | None, bar: tqdm, start: Best | None = None) -> tuple[Best, str]:
        """Train and validate until the epochs are done or validation has not improved for `patience` of them.

        Args:
            start: the state that it begins from, a candidate for the best one if given.

        Returns:
            The best epoch and why it ended: done or early (stopping).
        """
        best, settings = start or Best(), self.settings
        for _ in range(epochs):
            train_mse = self.train_epoch()
            row = {"epoch": self.epoch, "step": self.step, "train_mse": train_mse}
            if settings.evaluate_on != "none":
                found = self.evaluate("validation")
                row |= {"validation_mse": found["mse"], "validation_mae": found["mae"]}
                if found["mse"] < best.mse:
                    best = self.remember(found["mse"])
            self.log_epoch(row)
            bar.update()
            bar.set_postfix({name: f"{row[name]:.4f}" for name in ("train_mse", "validation_mse") if name in row})
            if self.step == settings.max_steps:
                break
            if patience is not None and settings.evaluate_on != "none" and self.epoch - best.epoch >= patience:
                return best, "early"
        return best, "done"

    def remember(self, mse: float) -> Best:
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        optimizer = copy.deepcopy(self.optimizer.state_dict()) if self.settings.prune == "dynamic" else {}
        return Best(mse, self.epoch, self.laps[-1]["learning_rate"], weights, optimizer)

    def log_epoch(self, row: dict[str, Any]) -> None:
        """Append a line to epochs.jsonl: errors, times in seconds on one clock (and the host's, as a check), heads."""
        laps = self.laps[-1]
        data_s, compute_s = sum(laps["data_ms"]) / 1000, sum(laps["step_ms"]) / 1000
        row |= {
            "learning_rate": laps["learning_rate"],
            "data_s": round(data_s, 6),
            "compute_s": round(compute_s, 6),
            "total_s": round(data_s + compute_s, 6),
            "wall_s": round(laps["wall_s"], 6),
            "heads": [len(head_numbers(layer)) for layer in attention_layers(self.model)],
        }
        self.run.append("epochs.jsonl", [row])

    def describe(self, *splits: str, laps: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Errors, size, time and memory of the model as it is now."""
        steps = timed_steps(self.laps if laps is None else laps)
        step = self.tracker.summary().get("training_step", {})
        errors = {f"{split}_{name}": value for split in splits for name, value in self.evaluate(split).items()}
        return errors | {
            "parameters": count_parameters(self.model),
            "gflop_per_window": round(self.flops_per_window / 1e9, 6),
            "step_ms": round(utils.percentile(steps["step_ms"], 50), 4) if steps["step_ms"] else None,
            "peak_allocated_gib": step.get("peak_allocated_gib"),
            "heads": [head_numbers(layer) for layer in attention_layers(self.model)],
        }

    # -- results -----------------------------------------------------------------------------------------------------

    def times(self) -> dict[str, Any]:
        """Step times without the first epoch, which warms up; of a single epoch without its first steps.

        The seconds are those of the epoch with the median total.
        """
        steps = timed_steps(self.laps)
        tokens = self.tokens_per_step
        headline = step_times(steps["step_ms"], steps["data_ms"], self.first_step_ms, tokens, self.flops_per_token)
        rate = headline["tokens_per_s"]
        device = utils.device_name(self.device)
        whole = [lap for lap in self.laps[1:] if len(lap["step_ms"]) == self.steps_per_epoch]

        totals = sorted(whole, key=lambda lap: sum(lap["data_ms"]) + sum(lap["step_ms"]))
        middle = totals[(len(totals) - 1) // 2] if totals else None  # one epoch, so that its parts add up

        def of_middle(value: Any) -> float | None:
            return None if middle is None else round(value(middle), 6)

        data, compute = sum(steps["data_ms"]), sum(steps["step_ms"])
        return headline | {
            "windows_per_s": None if rate is None else round(rate * self.plan.batch_size / tokens, 1),
            "mfu": None if rate is None else self.mfu(rate),
            "mfu_denominator_tflops": utils.peak_tflops(device, self.plan.precision),
            "timed_epochs": len(whole),
            "epoch_data_s": of_middle(lambda lap: sum(lap["data_ms"]) / 1000),
            "epoch_compute_s": of_middle(lambda lap: sum(lap["step_ms"]) / 1000),
            "epoch_total_s": of_middle(lambda lap: (sum(lap["data_ms"]) + sum(lap["step_ms"])) / 1000),
            "epoch_wall_s": of_middle(lambda lap: lap["wall_s"]),
            "data_share": round(data / (data + compute), 6) if steps["step_ms"] else None,
        }

    @torch.no_grad()
    def write_forecast(self) -> None:
        """forecast.csv: the window in the middle of test, standardised; at most eight channels."""
        split = self.data.splits["test"]
        number = len(split) // 2
        inputs, targets = split.batch(torch.tensor([number], device=self.device))
        self.model.eval()
        with autocast(self.plan.precision, self.device):
            forecast = self.model(inputs)[0].float().cpu()
        names = self.data.series.columns[:8]
        truth = torch.cat([inputs[0], targets[0]]).cpu()
        first = split.first_row + number
        with (self.run.path / "forecast.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["date", "row", *names, *(f"{name} forecast" for name in names)])
            for row in range(len(truth)):
                step = row - split.context_length
                shown = [f"{value:.5f}" for value in forecast[step, : len(names)].tolist()] if step >= 0 else []
                seen = [f"{value:.5f}" for value in truth[row, : len(names)].tolist()]
                writer.writerow([self.data.series.dates[first + row], step, *seen, *(shown or [""] * len(names))])


def timed_steps(laps: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Times of all epochs but the first; of a single epoch all but its first tenth, at least 5 steps."""
    if len(laps) > 1:
        return {name: [ms for lap in laps[1:] for ms in lap[name]] for name in ("step_ms", "data_ms")}
    warm = max(5, len(laps[0]["step_ms"]) // 10) if laps else 0
    return {name: laps[0][name][warm:] if laps else [] for name in ("step_ms", "data_ms")}


def make_schedule(plan: Plan, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> LRScheduler | None:
    """The learning rate of every step: constant, the official `type3` (decay), or OneCycle as PyTorch has it."""
    if plan.schedule == "onecycle":
        total = plan.epochs * steps_per_epoch
        return OneCycleLR(optimizer, plan.learning_rate, total_steps=total + 1, pct_start=plan.warm_up_share)
    if plan.schedule == "decay":
        return LambdaLR(optimizer, lambda step: 0.9 ** max(0, step // steps_per_epoch - 3))
    return None
