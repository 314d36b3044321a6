"""The training of llm_train.py: what a run holds, its loop, its checkpoints, and what it measured.

One loop for one process and for many: what the ranks have to agree on goes through `Ranks`, which alone agrees with
itself. The order of the data follows from seed and epoch, so a checkpoint needs no state of it.
"""

import json
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import utils
from attention_kernels import observe_kernel
from batch_size import Probe, find_batch_size, memory_kept_free
from dataset import TextData
from llm_plan import Plan
from llm_step import Batch, Objective, entry_of, training_step
from memory_tracker import MemoryTracker
from optimizers import make_optimizer, set_learning_rate
from parallel import eager, lower_parameters, place_model
from precision import convert_to_fp8, make_scaler
from processes import ALONE, Ranks
from run_folder import RunFolder, StepLog, StopRequest, write_atomically
from sharded_checkpoint import SINGLE, load_checkpoint, newest, remove_others, save_sharded
from step_profile import profile_steps, profile_table
from training_state import capture, load_state, restore, save_state
from transformer_based_llm import TransformerLM
from utils import SettingsError, count_matmul_parameters


class Training:
    """What one run holds: model, optimizer, data, tracker, folder, and where it is."""

    ranks: Ranks = ALONE

    def __init__(self, settings: Any, plan: Plan, data: TextData, run: RunFolder, stop: StopRequest, ranks: Ranks):
        self.settings, self.plan, self.run, self.stop, self.device = settings, plan, run, stop, plan.device
        self.ranks = ranks
        self.split = data.splits["train"]
        self.context_length = plan.model.context_length
        self.num_windows = self.split.num_windows(self.context_length)
        torch.manual_seed(settings.seed)
        model = TransformerLM(plan.model)
        self.fp8 = None if plan.fp8 is None else convert_to_fp8(model, **plan.fp8)
        self.model = place_model(model, ranks, self.device, plan.precision, entry_of(plan))
        exact = lower_parameters(self.model, ranks, settings.parameters)
        self.optimizer = make_optimizer(
            settings.optimizer,
            self.model.parameters(),
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            device=self.device,
            parameters=settings.parameters,
            in_backward=settings.optimizer_in_backward,
        )
        if exact is not None and settings.parameters == "bf16_master":
            for parameter, values in zip(self.model.parameters(), exact, strict=True):
                self.optimizer.state[parameter]["master"].copy_(values)
        del exact
        self.objective = Objective(self.model, plan, ranks)
        self.scaler = make_scaler(plan.precision, self.device)
        roots = (self.model, self.optimizer)
        self.tracker = MemoryTracker(self.device, run.path / "memory.csv", roots, plan.limit_bytes)
        if ranks.method is not None:
            self.tracker.collect, self.tracker.writes = ranks.with_rank, ranks.first
            self.tracker.resized = ranks.method == "fsdp"
        # Without a GPU live tensors are counted operator by operator, and compiled code has no operators to count.
        self.can_track = self.device.type == "cuda" or not settings.use_compile
        self.flops_per_token = utils.training_flops_per_token(
            count_matmul_parameters(self.model), plan.model.num_layers, plan.model.embedding_dim, self.context_length
        )
        name, world = utils.device_name(self.device), ranks.world_size  # the peak of all GPUs, as tokens/s are

        def peak_of(precision: str) -> float | None:
            peak = utils.peak_tflops(name, precision)
            return None if peak is None else world * peak

        emulated = self.fp8 is not None and self.fp8["emulated"]  # its products do not run on FP8 units
        self.peak_tflops = None if emulated else peak_of(plan.precision)
        # Of an FP8 run both are told: attention, head and all else run at bf16's rate, so neither is the whole truth.
        self.peaks = {kind: peak_of(kind) for kind in ("bf16", "fp8") if self.fp8 and not emulated}
        self.batch_size = plan.batch_size
        self.step = 0
        self.seconds = 0.0  # of training alone, earlier processes included
        self.retries_before = 0
        self.measured_before: dict = {}
        self.compile_s: float | None = None
        self.epoch, self.order = -1, np.zeros(0, dtype=np.int64)

    def peak_words(self, peak: float | None) -> str | None:
        """ "989.4 TFLOP/s", or "2 x 989.4 TFLOP/s" for two GPUs."""
        world = self.ranks.world_size
        return None if peak is None else f"{f'{world} x ' if world > 1 else ''}{peak / world:g} TFLOP/s"

    @property
    def machine(self) -> str:
        """What the times are of: "2 x NVIDIA H100 80GB HBM3, fsdp"."""
        method = f", {self.ranks.method}" if self.ranks.method is not None else ""
        return f"{self.ranks.world_size} x {utils.device_name(self.device)}{method}"

    @property
    def sequences_per_update(self) -> int:
        tokens = self.settings.tokens_per_update
        return self.batch_size if tokens is None else tokens // self.context_length

    @property
    def steps_per_epoch(self) -> int:
        return self.num_windows // self.sequences_per_update

    @property
    def total_steps(self) -> int:
        total = self.settings.epochs * self.steps_per_epoch
        return min(total, self.settings.max_steps or total)

    def batches_of_step(self, step: int) -> list[Batch]:
        """This rank's part of the micro-batches of step 1, 2, ...

        The order is a function of seed and epoch, so it needs no saved state.
        """
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = self.split.order(self.context_length, self.settings.seed, epoch)
        chosen = self.order[place * self.sequences_per_update : (place + 1) * self.sequences_per_update]
        return [
            self.split.batch(self.ranks.mine(chosen[begin : begin + self.batch_size]), self.context_length, self.device)
            for begin in range(0, len(chosen), self.batch_size)
        ]

    def search_batch_size(self) -> None:
        """Set the largest batch size that trains beside the margin; every probe is a row of batch_size_search.csv."""
        settings = self.settings
        update = (settings.tokens_per_update or 0) // self.context_length  # in sequences; 0: an update is one batch
        maximum = min(size for size in (self.num_windows, settings.max_batch_size, update) if size)
        generator = torch.Generator(self.device).manual_seed(settings.seed)
        silent = MemoryTracker(self.device)

        def train(batch_size: int) -> None:
            self.stop.check()
            shape = (batch_size, self.context_length + 1)
            ids = torch.randint(self.plan.model.vocab_size, shape, device=self.device, generator=generator)
            batch = (ids[:, :-1], ids[:, 1:])
            batches = [batch, batch] if update > batch_size else [batch]  # gradients of the first lie beside the second
            # The first step makes the optimizer's states, the second has them; a GPU's allocator settles in the third.
            for _ in range(2 if self.device.type == "cpu" else 3):
                training_step(self.objective, self.optimizer, self.scaler, batches, silent)
            self.objective.sum_of_losses(*batch)

        def report(probe: Probe) -> None:
            reserved = "" if probe.peak_reserved_gib is None else f", {probe.peak_reserved_gib:.2f} reserved"
            print(f"batch size {probe.batch_size:>6}: {probe.status:<5} {probe.peak_allocated_gib:.2f} GiB{reserved}")

        margin, limit = self.plan.search_margin, self.plan.limit_bytes
        with memory_kept_free(self.device, settings.memory_budget_gib, margin):
            self.batch_size, probes = find_batch_size(
                train,
                model=self.model,
                optimizer=self.optimizer,
                scaler=self.scaler,
                device=self.device,
                start=self.batch_size,
                maximum=maximum,
                method=settings.batch_size_search or "bisect",
                limit_bytes=None if limit is None else int((1 - margin) * limit),
                csv_path=self.run.path / "batch_size_search.csv",
                report=report,
            )
        best = next(probe for probe in probes if probe.status == "ok" and probe.batch_size == self.batch_size)
        headroom = self.plan.capacity_gib - (best.peak_reserved_gib or best.peak_allocated_gib)
        bound = "; the largest allowed" if self.batch_size == maximum else ""
        kept = f" ({100 * margin:g} % kept free by --search_margin)" if margin else ""
        print(
            f"batch size {self.batch_size} after {len(probes)} probes{bound}; headroom {headroom:.2f} of "
            f"{self.plan.capacity_gib:.2f} GiB{kept}"
        )
        self.run.update(batch_size=self.batch_size, search_margin=margin, headroom_gib=round(headroom, 3))

    def compile(self) -> None:
        """Run the next step once so that everything is compiled, note the seconds, and put the state back.

        A resumed run compiles again; its note is that of its own process.
        """
        alone = self.ranks.method is None  # in a parallel run the optimizer waits, so there is nothing to put back
        if alone:
            tensors, details = capture(self.model, self.optimizer, self.scaler, self.device)
        silent = MemoryTracker(self.device)
        step = (self.objective, self.optimizer, self.scaler, self.batches_of_step(self.step + 1))
        begin = time.perf_counter()
        training_step(*step, silent, update=alone).item()
        self.compile_s = round(time.perf_counter() - begin, 2)
        if alone:
            restore(tensors, details, self.model, self.optimizer, self.scaler, self.device)

    def profile(self) -> None:
        """Leave profile.json: where the time of the next steps goes. They train on, after the last logged step."""
        batches = self.batches_of_step(self.step)

        def step(tracker: Any) -> None:
            training_step(self.objective, self.optimizer, self.scaler, batches, tracker)

        options = {"model": self.model, "tokens": batches[0][0].numel(), "batches": len(batches)}
        options["precision"] = self.plan.precision
        result = profile_steps(step, self.settings.profile_steps, **options)
        if self.ranks.first:
            write_atomically(self.run.path / "profile.json", json.dumps(result, indent=2) + "\n")
        print(profile_table(result))

    def train(self, log: StepLog) -> str:
        """Train until the steps are done, the time is up or a signal came; returns done, time or signal."""
        settings, earlier, begin = self.settings, self.seconds, time.perf_counter()
        self.retries_before = self.alloc_retries()  # those of the search are no news
        saved = flushed = begin
        limit = 60 * (settings.max_training_minutes or float("inf"))
        save_after = 60 * (settings.checkpoint_every_minutes or float("inf"))
        outcome = "done"
        options = {"unit": "step", "desc": "training", "disable": not self.ranks.first}
        with tqdm(total=self.total_steps, initial=self.step, **options) as bar:
            while self.step < self.total_steps:
                fetch = time.perf_counter()
                self.seconds = earlier + fetch - begin
                stop, late, due = self.ranks.agree(
                    self.stop.signal is not None, self.seconds >= limit, fetch - saved >= save_after
                )
                if stop or late:
                    outcome = "signal" if stop else "time"
                    break
                if due:
                    self.flush(log, bar)
                    self.save(log)
                    saved = fetch = time.perf_counter()

                self.step += 1
                batches = None  # so that the next ones lie where these lay, and not beside them
                batches = self.batches_of_step(self.step)
                data_ms = 1000 * (time.perf_counter() - fetch)
                if self.step <= settings.warm_up_steps + 1:  # one more: a resumed run may begin right after it
                    share = min(1.0, self.step / (settings.warm_up_steps + 1))
                    set_learning_rate(self.optimizer, share * settings.learning_rate)
                tracked = self.can_track and log.is_tracked(self.step)
                log.clock.start()
                self.objective.place = (settings.seed, self.step)
                with self.tracker.step(self.step) if tracked else nullcontext():
                    loss = training_step(self.objective, self.optimizer, self.scaler, batches, self.tracker)
                if not self.ranks.first:
                    continue
                log.clock.stop()
                log.add(self.step, loss, data_ms)

                bar.update()
                if tracked or self.step % settings.log_every == 0 or time.perf_counter() - flushed > 2:
                    row = self.flush(log, bar)
                    flushed = time.perf_counter()
                    if self.step % settings.log_every == 0:
                        bar.write(f"step {self.step}: loss {row['loss']:.4f}, perplexity {row['perplexity']:.1f}")
            self.flush(log, bar)
        self.seconds = earlier + time.perf_counter() - begin
        return outcome

    def flush(self, log: StepLog, bar: tqdm) -> dict | None:
        """Write the finished steps and show the last one in the bar."""
        peak = self.tracker.summary().get("training_step", {}).get("peak_allocated_gib")
        row = log.flush(peak)
        if row is not None:
            shown = {"loss": f"{row['loss']:.3f}", "tokens/s": f"{row['tokens_per_s']:,.0f}"}
            bar.set_postfix(shown | ({} if peak is None else {"peak GiB": f"{peak:.2f}"}))
        return row

    def measured(self, log: StepLog) -> dict:
        """Numbers of time and memory: this process's, or an earlier one's that timed more steps on the same devices."""
        headline = log.headline()
        step_ms, rate = headline["step_ms_median"], headline["tokens_per_s"]
        epoch = None if step_ms is None else round(self.steps_per_epoch * step_ms / 60000, 4)
        for kind, peak in self.peaks.items():
            mfu = None if rate is None else utils.model_flops_utilisation(rate, self.flops_per_token, peak)
            headline |= {f"mfu_{kind}_peak": None if mfu is None else round(mfu, 4), f"{kind}_peak_tflops": peak}
        now_measured = {**headline, "epoch_minutes": epoch, "compile_s": self.compile_s, **self.memory_headline()}
        now_measured["measured_on"] = self.machine
        return max(self.measured_before, now_measured, key=lambda numbers: numbers.get("timed_steps", -1))

    def save(self, log: StepLog) -> None:
        """Keep the training state in checkpoint/: one file, of a parallel run the shards of all processes."""
        folder = self.run.path / "checkpoint"
        place = {"step": self.step, "seconds": self.seconds, "batch_size": self.batch_size}
        place |= {"measured": self.measured(log)}
        if self.ranks.method is not None:
            save_sharded(folder, self.model, self.optimizer, self.scaler, place, self.ranks)
            return
        tensors, details = capture(self.model, self.optimizer, self.scaler, self.device)
        save_state(folder / SINGLE, tensors, details | place)
        remove_others(folder, folder / SINGLE)

    def load(self, required: bool) -> bool:
        """Go on from the newest checkpoint: everything the losses depend on comes from it. Whether there was one.

        Args:
            required: without a checkpoint raise SettingsError; otherwise the run begins again.
        """
        folder = self.run.path / "checkpoint"
        path = self.ranks.broadcast(self.ranks.first_alone(lambda: newest(folder)))
        details = None
        if self.ranks.method is None and path in (None, folder / SINGLE):
            if path is not None or required:
                tensors, details = load_state(folder / SINGLE)
                restore(tensors, details, self.model, self.optimizer, self.scaler, self.device)
        elif path is not None:
            details = load_checkpoint(path, self.model, self.optimizer, self.scaler, self.ranks)
            torch.manual_seed(self.settings.seed + details["step"])  # a checkpoint of several processes has no state
        elif required:
            raise SettingsError(f"--resume: there is no checkpoint in {folder}; the run ended before one was saved")
        if details is not None:
            self.step, self.seconds, self.batch_size = details["step"], details["seconds"], details["batch_size"]
            if details["measured"].get("measured_on") == self.machine:  # else its times are of something else
                self.measured_before = details["measured"]
        self.run.drop_rows_after(self.step)
        if self.ranks.method is not None:
            self.run.add_rank_column()
        elif self.run.has_rank_column():
            self.tracker.collect = self.ranks.with_rank
        return details is not None

    def observe_attention_kernel(self) -> str:
        """Which attention kernel this model really calls: one forward pass of one sequence, random state kept."""
        inputs, _ = self.split.batch(np.zeros(1, dtype=np.int64), self.context_length, self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            observe_kernel() as observer,
            self.objective.autocast(),
            eager(self.ranks, self.plan.use_compile),
        ):
            self.objective.plain(inputs)
        return observer.name

    def alloc_retries(self) -> int:
        """The CUDA allocator's count since the process began; 0 without a GPU."""
        return torch.cuda.memory_stats()["num_alloc_retries"] if self.tracker.cuda else 0

    def memory_headline(self) -> dict[str, Any]:
        """Peaks of a step, and how often the allocator gave memory back and asked again: above 0 it is nearly full."""
        retries = self.alloc_retries() - self.retries_before if self.tracker.cuda else None
        by_rank: dict[int, float] = {}
        for row in self.tracker.rows:
            if "rank" in row and row["phase"] == "training_step":
                by_rank[row["rank"]] = max(by_rank.get(row["rank"], 0.0), row["peak_allocated_gib"])
        ranks = {"peak_allocated_gib_by_rank": list(by_rank.values())} if self.ranks.method is not None else {}
        return self.tracker.headline() | {"alloc_retries": retries} | ranks

    def report(self, results: dict[str, Any]) -> None:
        """Print what the run measured of memory and time."""
        print(self.tracker.table())
        if self.compile_s is not None:
            print(f"compiled in {self.compile_s} s, first step {results['first_step_ms']:.0f} ms")
        if results["alloc_retries"]:
            smaller = "a higher --search_margin" if self.settings.adjust_batch_size else "a smaller batch"
            print(f"the allocator ran short {results['alloc_retries']} times: {smaller} may be faster")
        if not results["timed_steps"]:
            return
        shares = {kind: results[f"mfu_{kind}_peak"] for kind in self.peaks} or {self.plan.precision: results["mfu"]}
        known = [
            f"{share:.1%} of {self.peak_words(self.peaks.get(kind, self.peak_tflops))} ({kind})"
            for kind, share in shares.items()
            if share is not None
        ]
        mfu = f", MFU {', '.join(known)}" if known else ""
        print(
            f"step {results['step_ms_median']:.1f} ms (20th-80th percentile {results['step_ms_p20']:.1f}-"
            f"{results['step_ms_p80']:.1f}, n = {results['timed_steps']}), {results['tokens_per_s']:,.0f} tokens/s{mfu}"
        )
