"""Train PatchTST on a time series: textbook against fused attention, and heads that are really removed.

    python patchtst_train.py                                                   the generated sample, half a minute
    python patchtst_train.py --dataset ETTm1 --download true --seeds 0,1,2     a published series, three seeds
    python patchtst_train.py --attn_type flash --patch_length 12 --dataset ETTh1 --data_path ETTh1.csv
    python patchtst_train.py --config patchtst_config.yaml                     settings of a file; flags win
    python patchtst_train.py --patch_size_exp --dataset ETTm1 --data_path ETTm1.csv      a sweep of the course project

Without other flags the shape and the recipe are those of the paper's script for the dataset. The loss is the mean
squared error of the standardised channels; early stopping chooses by validation MSE, and test is evaluated once, with
the best weights and over every window. A run leaves run.json, steps.jsonl, epochs.jsonl, memory.csv, forecast.csv and
pictures in outputs/<experiment>/<run_name>/; the last line printed is one JSON object with the results.

An epoch is data time plus compute time, on one clock and without a gap: on a GPU the marks are events in its own
stream, so that loading which is hidden behind computing costs nothing and loading that the GPU waits for counts.
"""

import copy
import csv
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from tqdm import tqdm

import head_pruning
import utils
from attention import observe_kernel, prepare_for_compile
from attention_support import BACKENDS, MAX_SEQUENCES, sequences_refusal
from head_pruning import IMPORTANCES, METHODS, MODES, attention_layers, head_numbers, remove_heads
from memory_tracker import MemoryTracker
from optimizers import make_optimizer
from patchtst import MODEL_VARIANTS, NORM_POSITIONS, NORMS, POSITIONS, PatchTST, flops_per_window
from patchtst_plan import ATTENTION_TYPES, COMPILE_MODES, SCHEDULES, Plan, default_run_name, make_plan
from precision import PRECISIONS, autocast, make_scaler
from run_folder import (
    Interrupted,
    LapClock,
    RunFolder,
    StopRequest,
    check_writable,
    describe_environment,
    now,
    step_times,
)
from time_series_dataset import (
    DATASETS,
    SPLITS,
    Errors,
    SeriesData,
    WindowLoader,
    baseline_errors,
    load_series,
    split_series,
)
from utils import SettingsError, count_parameters, is_out_of_memory, parse_settings, run_script, setting

SECTIONS = ("data", "model", "training", "pruning", "logging")
Batch = tuple[torch.Tensor, torch.Tensor]


# fmt: off
@dataclass
class Settings:
    """Every setting is a constant here and a flag; `--config FILE.yaml` sets several, under headings or without."""

    # data
    dataset: str | None = setting(None, "a published series, or the generated sample (the default)", DATASETS)
    data_path: str | None = setting(None, "a CSV with a date column and channels of numbers, plain or .gz")
    download: bool = setting(False, "fetch an ETT file from its public address")
    date_column: str = setting("date", "name of the column with the dates")
    allow_gaps: bool = setting(False, "take rows that are not equally far apart")
    split: str | None = setting(None, "borders of train, validation and test (default: by dataset)", SPLITS)
    context_length: int | None = setting(None, "rows that the model sees (default: by dataset, 336)")
    horizon: int | None = setting(None, "rows that it forecasts (default: 96, sample 24)")
    num_workers: int | None = setting(None, "processes that cut windows (default: they are gathered on the device)")
    cache_folder: str = setting(".cache/series", "where fetched files are kept")

    # model (defaults by dataset, as in the paper's scripts)
    model_variant: str = setting("official", "the paper's model, or the transformers library's", list(MODEL_VARIANTS))
    patch_length: int | None = setting(None, "rows of a patch (default: 16; transformers 12)")
    patch_stride: int | None = setting(None, "rows from one patch to the next (default: 8; transformers patch_length)")
    num_layers: int | None = setting(None, "encoder layers (default: 3)")
    embedding_dim: int | None = setting(None, "width")
    num_heads: int | None = setting(None, "attention heads")
    ffn_dim: int | None = setting(None, "width inside the MLP")
    dropout: float | None = setting(None, "dropout of the embedding, the MLP and both branches of a layer")
    head_dropout: float | None = setting(None, "dropout before the head")
    norm: str | None = setting(None, "batch or layer norm", NORMS)
    norm_position: str | None = setting(None, "norm after or before each branch", NORM_POSITIONS)
    positions: str | None = setting(None, "learned or fixed", POSITIONS)
    attn_type: str | None = setting(None, "textbook, flash-attention, or the fastest here (default)", ATTENTION_TYPES)
    attention_backend: str | None = setting(None, "attention kernel by name instead", ["auto", *BACKENDS])

    # training (defaults by dataset)
    batch_size: int | None = setting(None, "windows in a batch")
    epochs: int | None = setting(None, "passes over the training windows, at most")
    max_steps: int | None = setting(None, "stop after this many optimizer steps")
    patience: int | None = setting(None, "stop after this many epochs without a better validation MSE")
    learning_rate: float | None = setting(None, "highest learning rate")
    schedule: str | None = setting(None, "decay: x 0.9 an epoch from the 4th on; onecycle: up and down", SCHEDULES)
    warm_up_share: float | None = setting(None, "onecycle: share of the steps in which the rate rises")
    weight_decay: float = setting(0.0, "decoupled weight decay; 0 is Adam")
    ema_decay: float | None = setting(None, "evaluate an exponential moving average of the weights (0: the weights)")
    precision: str | None = setting(None, "default: fp32, or bf16 with flash attention on a GPU", PRECISIONS)
    use_compile: bool = setting(False, "torch.compile the model")
    compile_mode: str | None = setting(None, "of torch.compile; reduce-overhead is CUDA graphs", COMPILE_MODES)
    seeds: str = setting("0", "initial weights, order of the windows, dropout: one run each, such as 0,1,2")
    evaluate_on: str = setting("test", "none: train and measure only", ["test", "none"])

    # pruning of attention heads
    prune: str | None = setting(None, "heads removed before training, or by importance afterwards (dynamic)", METHODS)
    prune_heads_per_layer: int | None = setting(None, "heads that each layer loses (5; static_conservative 1)")
    prune_mode: str | None = setting(None, "cut out of the weights (default) or masked", MODES)
    prune_importance: str | None = setting(None, "what dynamic ranks heads by (default: gradient)", IMPORTANCES)
    prune_rounds: int | None = setting(None, "dynamic: removals, scored anew each time (default: 5)")
    prune_every_epochs: int | None = setting(None, "dynamic: epochs of training after each removal (default: 1)")

    # logging and measuring
    tracked_steps: int = setting(3, "steps whose memory is tracked, from the second on")
    log_every: int = setting(1, "steps between lines of steps.jsonl")
    figures: bool = setting(True, "draw this run's figures at its end (plot_patchtst.py can draw them later)")
    device: str = setting("auto", "auto is cuda if there is one", ["auto", "cpu", "cuda"])
    output_folder: str = setting("outputs", "folder of all results")
    experiment: str = setting("patchtst", "folder of this experiment's runs")
    run_name: str | None = setting(None, "folder of this run (default: named after its data and techniques)")
    config: str | None = setting(None, "YAML file of settings; flags win over it")

    # experiments: many runs, each in a fresh process
    patch_size_exp: bool = setting(False, "patches of 12 to 192, vanilla against flash")
    batch_size_exp: bool = setting(False, "batches of 32 to 512, vanilla against flash")
    num_workers_exp: bool = setting(False, "0 to 16 worker processes and windows on the device, vanilla against flash")
    horizon_exp: bool = setting(False, "horizons 96 to 720, seeds 0, 1 and 2")
    pruning_exp: bool = setting(False, "every way to prune against the whole model and smaller ones, three seeds")
    parallel_runs: int = setting(1, "horizon_exp, pruning_exp: runs at a time on a GPU; times then say nothing")
    gpus: str | None = setting(None, "experiments: such as 0,1 to use these GPUs side by side")
    only: str | None = setting(None, "experiments: only these cases, separated by commas")
# fmt: on

EXPERIMENTS = ("patch_size_exp", "batch_size_exp", "num_workers_exp", "horizon_exp", "pruning_exp")


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Best:
    """The epoch with the lowest validation MSE so far, and what is needed to go back to it."""

    mse: float = math.inf
    epoch: int = 0
    learning_rate: float = 0.0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


class WeightAverage:
    """Exponential moving average of a model's weights and running statistics, which is what gets evaluated.

    The average of step n keeps min(decay, (1 + n) / (10 + n)), so that the first steps are soon forgotten.
    """

    def __init__(self, model: PatchTST, decay: float):
        self.model, self.decay, self.steps = copy.deepcopy(model).eval(), decay, 0
        # The tensors themselves: training changes them in place. Counters (of BatchNorm) are nothing to average.
        own, followed = ([t for t in m.state_dict().values() if t.is_floating_point()] for m in (self.model, model))
        self.own, self.followed = own, followed

    @torch.no_grad()
    def update(self) -> None:
        """Take the numbers that the model has now in."""
        self.steps += 1
        kept = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.own, self.followed, 1 - kept)


class Training:
    """What one run (one seed) holds: model, optimizer, data, tracker, folder, and where it is."""

    def __init__(self, settings: Settings, plan: Plan, data: SeriesData, run: RunFolder, seed: int, stop: StopRequest):
        self.settings, self.plan, self.data, self.run, self.stop = settings, plan, data, run, stop
        self.seed, self.device, self.windows = seed, plan.device, data.splits["train"]
        torch.manual_seed(seed)
        self.model = PatchTST(plan.model).to(self.device)
        self.mode = settings.prune_mode or "structural"
        if settings.prune in ("static_conservative", "static_random"):
            for place, layer in enumerate(attention_layers(self.model)):
                chosen = (settings.prune, layer.num_heads, plan.heads_to_prune, place, seed)
                remove_heads(layer, head_pruning.static_choice(*chosen), mode=self.mode)
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
        self.average = WeightAverage(self.model, plan.ema_decay) if plan.ema_decay else None
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
        if self.average is not None:
            self.average.update()
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
    def evaluate(self, name: str, model: PatchTST | None = None) -> dict[str, float]:
        """MSE and MAE over every window of a split, in evaluation mode and never compiled."""
        model = self.model if model is None else model
        split, errors = self.data.splits[name], Errors(self.device)
        at_once = max(1, min(4 * self.plan.batch_size, MAX_SEQUENCES // split.values.shape[1]))
        model.eval()
        for numbers in torch.arange(len(split), device=self.device).split(at_once):
            self.stop.check()
            inputs, targets = split.batch(numbers)
            with autocast(self.plan.precision, self.device):
                forecast = model(inputs)
            errors.add(forecast, targets)
        model.train()
        return errors.result()

    def fit(self, epochs: int, patience: int | None, bar: tqdm) -> tuple[Best, str]:
        """Train and validate until the epochs are done or validation has not improved for `patience` of them.

        Returns:
            The best epoch and why it ended: done or early (stopping).
        """
        best, settings = Best(), self.settings
        for _ in range(epochs):
            train_mse = self.train_epoch()
            row = {"epoch": self.epoch, "step": self.step, "train_mse": train_mse}
            if settings.evaluate_on != "none":
                found = self.evaluate("validation", self.average.model if self.average else None)
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
        model = self.average.model if self.average else self.model
        weights = {name: value.clone() for name, value in model.state_dict().items()}
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

    # -- pruning while training --------------------------------------------------------------------------------------

    def batch_loss(self, batch: Batch, model: PatchTST | None = None) -> torch.Tensor:
        with autocast(self.plan.precision, self.device):
            forecast = (model or self.model)(batch[0])
        return F.mse_loss(forecast, batch[1])

    def remove_lowest(self, model: PatchTST, count: int, optimizer: Any) -> list[dict[str, Any]]:
        """Score the heads that are left on the last training windows and remove the `count` lowest of each layer."""
        size, last = self.plan.batch_size, len(self.windows)
        numbers = torch.arange(max(0, last - 8 * size), last, device=self.device)
        batches = [self.windows.batch(part) for part in numbers.split(size)]
        kind = self.settings.prune_importance or "gradient"
        scores = head_pruning.importance(model, kind, batches, lambda batch: self.batch_loss(batch, model))
        rows = []
        for place, (layer, score) in enumerate(zip(attention_layers(model), scores, strict=True)):
            chosen = head_pruning.lowest(score, layer, count)
            left = head_numbers(layer)
            remove_heads(layer, chosen, mode=self.mode, optimizer=optimizer)
            scored = {str(number): round(value, 6) for number, value in zip(left, score.tolist(), strict=True)}
            rows.append({"layer": place, "removed": chosen, "scores": scored})
        return rows

    def removals(self) -> list[int]:
        """How many heads each round takes from a layer, as even as possible."""
        heads, rounds = self.plan.heads_to_prune, self.plan.prune_rounds
        return [heads * (number + 1) // rounds - heads * number // rounds for number in range(rounds)]

    def prune_and_train_on(self, before: Best, bar: tqdm) -> tuple[Best, str, dict[str, Any]]:
        """Remove heads round by round from the best weights, training on after each removal, then until it stops.

        Beside it, from the same weights: all rounds without any training, which is what pruning itself does.
        """
        self.model.load_state_dict(before.weights)
        report = {"before": self.describe("validation", "test")}
        alone = copy.deepcopy(self.model)
        for count in self.removals():
            self.remove_lowest(alone, count, None)
        after = {
            f"{split}_{name}": v for split in ("validation", "test") for name, v in self.evaluate(split, alone).items()
        }
        report["after"] = after | {"parameters": count_parameters(alone)}
        del alone
        self.optimizer.load_state_dict(before.optimizer)
        self.scheduler = None
        for group in self.optimizer.param_groups:  # go on at the rate of the epoch that the weights come from
            group["lr"] = before.learning_rate
        every = self.settings.prune_every_epochs or 1
        removals = self.removals()
        for number, count in enumerate(removals, 1):
            rows = self.remove_lowest(self.model, count, self.optimizer)
            found = self.evaluate("validation")
            shared = {"round": number, "epoch": self.epoch, "validation_mse": found["mse"]}
            self.run.append("pruning.jsonl", [shared | row for row in rows])
            self.build()
            if number < len(removals):
                self.fit(every, None, bar)
        self.track_from, self.tracker.rows = self.step + 1, []
        self.pruned_at = len(self.laps)
        best, outcome = self.fit(self.plan.epochs, self.plan.patience, bar)
        self.model.load_state_dict(best.weights)
        report["further"] = self.describe("validation", "test", laps=self.laps[self.pruned_at :])
        return best, outcome, report

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
        """Step and epoch times without the first epoch, which warms up; of a single epoch without its first steps."""
        steps = timed_steps(self.laps)
        tokens = self.tokens_per_step
        headline = step_times(steps["step_ms"], steps["data_ms"], self.first_step_ms, tokens, self.flops_per_token)
        rate = headline["tokens_per_s"]
        device = utils.device_name(self.device)
        whole = [lap for lap in self.laps[1:] if len(lap["step_ms"]) == self.steps_per_epoch]

        def middle(value: Any) -> float | None:
            found = utils.percentile([value(lap) for lap in whole], 50)
            return None if found is None else round(found, 6)

        data, compute = sum(steps["data_ms"]), sum(steps["step_ms"])
        return headline | {
            "windows_per_s": None if rate is None else round(rate * self.plan.batch_size / tokens, 1),
            "mfu": None if rate is None else self.mfu(rate),
            "mfu_denominator_tflops": utils.peak_tflops(device, self.plan.precision),
            "timed_epochs": len(whole),
            "epoch_data_s": middle(lambda lap: sum(lap["data_ms"]) / 1000),
            "epoch_compute_s": middle(lambda lap: sum(lap["step_ms"]) / 1000),
            "epoch_total_s": middle(lambda lap: (sum(lap["data_ms"]) + sum(lap["step_ms"])) / 1000),
            "epoch_wall_s": middle(lambda lap: lap["wall_s"]),
            "data_share": round(data / (data + compute), 6) if steps["step_ms"] else None,
        }

    def memory(self) -> dict[str, Any]:
        """Peaks of a step in GiB, and the phase that is the peak."""
        summary = self.tracker.summary()
        step = summary.get("training_step", {})
        phases = {name: row["peak_allocated_gib"] for name, row in summary.items() if name != "training_step"}
        return {
            "tracked_steps": len({row["step"] for row in self.tracker.rows}),
            "peak_allocated_gib": step.get("peak_allocated_gib"),
            "peak_reserved_gib": step.get("peak_reserved_gib") or None,
            "peak_phase": max(phases, key=phases.get, default=None),
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


# --------------------------------------------------------------------------------------------------------------------
# A run from beginning to end
# --------------------------------------------------------------------------------------------------------------------


def run_seed(settings: Settings, plan: Plan, data: SeriesData, run: RunFolder, seed: int, stop: StopRequest) -> dict:
    """Train, evaluate and write the results of one seed; returns them."""
    training = Training(settings, plan, data, run, seed, stop)
    model = training.model
    inputs, _ = training.windows.batch(torch.zeros(1, dtype=torch.int64, device=plan.device))
    with torch.no_grad(), observe_kernel() as observer, autocast(plan.precision, plan.device):
        model.eval()
        model(inputs)
    run.update(
        status="running",
        experiment=settings.experiment,
        run_name=run.path.name,
        **describe_environment(plan.device),
        precision=plan.precision,
        model=asdict(plan.model),
        settings=asdict(settings),
        seed=seed,
        recipe={name: getattr(plan, name) for name in ("epochs", "patience", "learning_rate", "schedule")}
        | {"warm_up_share": plan.warm_up_share, "ema_decay": plan.ema_decay},
        batch_size=plan.batch_size,
        parameters=count_parameters(model),
        attention_kernel=observer.name,
        dataset=data.description,
    )
    (run.path / "model_summary.txt").write_text(f"{model}\n\nparameters: {count_parameters(model):,}\n")
    print(
        f"{run.path}: {count_parameters(model):,} parameters, {training.steps_per_epoch} steps an epoch, "
        f"{plan.precision}, attention {plan.model.attention_backend} ({observer.name})"
    )
    pruning = None
    with tqdm(total=plan.epochs, unit="epoch", desc=f"training, seed {seed}") as bar:
        best, outcome = training.fit(plan.epochs, plan.patience, bar)
        times = training.times()
        if settings.prune == "dynamic":
            best, outcome, pruning = training.prune_and_train_on(best, bar)
    results = {
        "batch_size": plan.batch_size,
        "steps": training.step,
        "epochs": training.epoch,
        "stopped_by": outcome,
        "training_minutes": round(training.seconds / 60, 4),
        **times,
        **training.memory(),
        "parameters": count_parameters(model),
    }
    if settings.evaluate_on != "none":
        model.load_state_dict(best.weights)
        found = {"best_epoch": best.epoch, "validation_mse": best.mse}
        found |= {f"test_{name}": value for name, value in training.evaluate("test").items()}
        found["test_windows"] = len(data.splits["test"])
        results |= found
        results["baselines"] = baseline_errors(data.splits["test"], data.series.rows_per_day)
        training.write_forecast()
        head_pruning.bake_masks(model)
        (run.path / "checkpoint").mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, run.path / "checkpoint/best.safetensors")
    if pruning is not None:
        results["pruning"] = pruning
    elif settings.prune is not None:
        results["pruning"] = {"static": training.describe("validation", "test")}
    run.update(status="ok", finished_at=now(), results=results)
    if settings.figures:
        import plot_patchtst  # matplotlib takes seconds to load

        plot_patchtst.plot_run(run.path)
    report(training, results)
    return results


def report(training: Training, results: dict[str, Any]) -> None:
    """Print what a reader looks for first."""
    print(training.tracker.table())
    if results["timed_steps"]:
        mfu = "" if results["mfu"] is None else f", MFU {100 * results['mfu']:.1f} %"
        print(
            f"step {results['step_ms_median']:.2f} ms (20th-80th percentile {results['step_ms_p20']:.2f}-"
            f"{results['step_ms_p80']:.2f}, n = {results['timed_steps']}), {results['windows_per_s']:,.0f} windows/s"
            f"{mfu}; fetching data is {100 * results['data_share']:.2f} % of an epoch"
        )
    if "test_mse" in results:
        generated = " on generated data" if training.data.description["generated"] else ""
        print(f"best epoch {results['best_epoch']} of {results['epochs']}; results in {training.run.path}")
        print(f"{'test, standardised' + generated:<44}{'MSE':>9}{'MAE':>9}")
        print(f"{'PatchTST':<44}{results['test_mse']:>9.4f}{results['test_mae']:>9.4f}")
        for name, errors in results["baselines"].items():
            print(f"{name + ' (no model)':<44}{errors['mse']:>9.4f}{errors['mae']:>9.4f}")


def run_all(settings: Settings, plan: Plan, data: SeriesData, stop: StopRequest) -> int:
    """Every seed in a run folder of its own; returns the exit status."""
    name = settings.run_name or default_run_name(settings, plan)
    found = []
    for seed in plan.seeds:
        own = f"{name}-seed-{seed}" if len(plan.seeds) > 1 else name
        run = RunFolder.create(settings.output_folder, settings.experiment, own, unique=settings.run_name is None)
        try:
            found.append((run.path, run_seed(settings, plan, data, run, seed, stop)))
        except (Interrupted, KeyboardInterrupt):
            run.update(status="interrupted")
            print(json.dumps({"run": str(run.path), "status": "interrupted"}))
            return stop.exit_status
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            status = "oom" if is_out_of_memory(error) else "error"
            with suppress(SettingsError):
                run.update(status=status, error=reason)
            if status == "error" and not isinstance(error, FloatingPointError):
                raise
            advice = f"out of memory with batch size {plan.batch_size} ({reason}); lower --batch_size"
            print(f"{run.path}: {advice if status == 'oom' else reason}")
            print(json.dumps({"run": str(run.path), "status": status}))
            return 1
    if len(found) == 1:
        print(json.dumps({"run": str(found[0][0]), "status": "ok", **found[0][1]}))
        return 0
    summary: dict[str, Any] = {"runs": [str(path) for path, _ in found], "status": "ok", "seeds": plan.seeds}
    for key in ("test_mse", "test_mae"):
        values = [results[key] for _, results in found if key in results]
        if values:
            mean, spread = sum(values) / len(values), max(values) - min(values)
            summary |= {f"{key}_mean": mean, f"{key}_spread": spread}
            print(f"{key}: mean of {len(values)} seeds {mean:.4f}, largest minus smallest {spread:.4f}")
    print(json.dumps(summary))
    return 0


def main() -> int:
    """Check everything that can be wrong with the input, make the run folders, run, and record how it ended."""
    settings = parse_settings(Settings, sections=SECTIONS)
    chosen = [name for name in EXPERIMENTS if getattr(settings, name)]
    if chosen:
        import patchtst_experiments

        return patchtst_experiments.run(settings, chosen)
    for name in ("gpus", "only"):
        if getattr(settings, name) is not None:
            raise SettingsError(
                f"--{name} has no effect without one of {', '.join(f'--{name}' for name in EXPERIMENTS)}"
            )
    plan = make_plan(settings)
    check_writable(Path(settings.output_folder) / settings.experiment, "--output_folder")
    series = load_series(
        settings.dataset,
        settings.data_path,
        fetch=settings.download,
        date_column=settings.date_column,
        allow_gaps=settings.allow_gaps,
        cache_folder=settings.cache_folder,
    )
    data = split_series(
        series,
        context_length=plan.model.context_length,
        horizon=plan.model.horizon,
        device=plan.device,
        split=settings.split,
    )
    windows = len(data.splits["train"])
    if windows < plan.batch_size:
        raise SettingsError(
            f"--batch_size asks for {plan.batch_size} windows, but the training split has only {windows}; lower it"
        )
    channels = data.description["channels"]
    reason = sequences_refusal(plan.model.attention_backend, plan.device, plan.batch_size * channels)
    if reason is not None:
        raise SettingsError(f"--batch_size {plan.batch_size} of {channels} channels: {reason}")
    for line in (*plan.notes, f"data: {data.description['description']}; split {data.description['split']}"):
        print(line)
    with StopRequest() as stop:
        return run_all(settings, plan, data, stop)


if __name__ == "__main__":
    run_script(main)
