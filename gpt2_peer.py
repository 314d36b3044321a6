"""The peer of the comparison: Hugging Face's GPT-2, trained on the same batches and measured with the same tracker.

    python gpt2_peer.py                               30 steps at batch 125 (a tiny model at batch 8 without a GPU)
    python gpt2_peer.py --use_compile true            the same compiled, as the documentation of transformers advises

Why it is here: "faster than our own baseline" says little where the baseline is slow. This is what a reader would use
otherwise: transformers' GPT2LMHeadModel as it comes, with its own loss, PyTorch's SDPA, BF16 autocast and fused AdamW.
Its head is tied to the embedding, so it has 24.6 M parameters less than the lab's decoder and needs 16 bytes a
parameter less (0.37 GiB), but the same matrix products, so its FLOPs a token are the same.

Windows, their order, phases and results are those of llm_train.py; the loss belongs to forward_pass, because the model
computes it itself, from fp32 logits of every token. Its folder reads like any other run's. It saves no checkpoint and
evaluates nothing. Model: Radford et al. 2019; code: https://huggingface.co/docs/transformers/model_doc/gpt2.
"""

import functools
import json
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import utils
from attention_kernels import observe_kernel
from batch_size import use_expandable_segments
from dataset import DATASET_NAMES, TextData, load_text_data
from memory_tracker import MemoryTracker
from precision import autocast, set_precision
from run_folder import Interrupted, RunFolder, StepLog, StopRequest, check_writable, describe_environment, now
from transformer_based_llm import MODEL_SIZES, ModelConfig, model_config
from utils import SettingsError, count_parameters, is_out_of_memory, parse_settings, run_script, setting


@dataclass
class Settings:
    """Settings of `python gpt2_peer.py`; the defaults are those of the comparison."""

    model_size: str = setting("auto", "auto is gpt2 with a GPU and tiny without", ["auto", *MODEL_SIZES])
    use_compile: bool = setting(False, "torch.compile of the whole model with its loss")
    precision: str = setting("bf16", "bf16 is autocast", ["fp32", "bf16"])
    batch_size: int | None = setting(None, "sequences in a batch (default: 125, tiny 8)")
    learning_rate: float = setting(0.0005, "constant learning rate")
    weight_decay: float = setting(0.1, "weight decay")
    max_steps: int = setting(30, "optimizer steps")
    dataset_name: str | None = setting(None, "sample (generated, the default), plwiki or plwiki_hf", DATASET_NAMES)
    dataset_path: str | None = setting(None, "file or folder of text, as in llm_train.py")
    cache_folder: str = setting(".cache/tokens", "where token files are kept")
    tracked_steps: int = setting(5, "steps whose memory is tracked, from the second on; they also warm up")
    measured_steps: int = setting(20, "steps after those whose median time is reported")
    figures: bool = setting(True, "draw this run's figures at its end (plot.py can draw them later)")
    seed: int = setting(0, "initial weights and order of the data")
    device: str = setting("auto", "auto is cuda if there is one", ["auto", "cpu", "cuda"])
    output_folder: str = setting("outputs", "folder of all results")
    experiment: str = setting("llm", "folder of this experiment's runs")
    run_name: str = setting("hf-gpt2", "folder of this run")


def build_model(shape: ModelConfig) -> GPT2LMHeadModel:
    """GPT-2 of this shape with transformers' own initialisation; only the vocabulary, context and dropout differ."""
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context_length,
        n_embd=shape.embedding_dim,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config)


def count_matmul_parameters(model: nn.Module) -> int:
    """Weights in matrix products: transformers' Conv1D (a transposed linear layer) and the head, tied or not."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | Conv1D))


def forward_loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The model's own mean loss in nats over all tokens (scalar); inputs and targets are (sequences, tokens).

    `shift_labels` hands it targets that are shifted already; `labels` alone would leave each sequence's last one out.
    """
    return model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss


def train(settings: Settings, shape: ModelConfig, data: TextData, device: torch.device, run: RunFolder) -> dict:
    """Train and measure; writes the beginning of run.json, steps.jsonl and memory.csv, and returns the results.

    Raises:
        Interrupted: Ctrl-C or SIGTERM.
    """
    context_length, split = shape.context_length, data.splits["train"]
    batch_size = settings.batch_size
    steps_per_epoch = split.num_windows(context_length) // batch_size
    torch.manual_seed(settings.seed)
    model = build_model(shape).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=device.type == "cuda"
    )
    flops_per_token = utils.training_flops_per_token(
        count_matmul_parameters(model), shape.num_layers, shape.embedding_dim, context_length
    )
    inputs, _ = split.batch(np.zeros(1, dtype=np.int64), context_length, device)
    with torch.no_grad(), observe_kernel() as observer, autocast(settings.precision, device):
        model(input_ids=inputs, use_cache=False)
    run.update(
        status="running",
        experiment=settings.experiment,
        run_name=settings.run_name,
        **describe_environment(device),
        precision=settings.precision,
        model=json.loads(json.dumps(model.config.to_diff_dict())),
        settings=asdict(settings),
        batch_size=batch_size,
        model_size=settings.model_size,
        parameters=count_parameters(model),
        attention_kernel=observer.name,
        dataset=data.description,
        tokenizer=data.tokenizer,
    )
    tracker = MemoryTracker(device, run.path / "memory.csv", (model, optimizer))
    log = StepLog(
        run,
        device,
        tokens_per_update=batch_size * context_length,
        flops_per_token=flops_per_token,
        peak_tflops=utils.peak_tflops(utils.device_name(device), settings.precision),
        tracked_steps=settings.tracked_steps,
        measured_steps=settings.measured_steps,
    )

    order = functools.cache(functools.partial(split.order, context_length, settings.seed))

    def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, place = divmod(step - 1, steps_per_epoch)
        chosen = order(epoch)[place * batch_size : (place + 1) * batch_size]
        inputs, targets = split.batch(chosen, context_length, device)
        return inputs.contiguous(), targets.contiguous()

    called = torch.compile(model) if settings.use_compile else model
    compile_s = None
    if settings.use_compile:
        begin = time.perf_counter()
        with autocast(settings.precision, device):
            loss = forward_loss(called, *batch_of(1))
        loss.backward()
        loss.item()  # waits for the device
        optimizer.zero_grad(set_to_none=True)
        compile_s = round(time.perf_counter() - begin, 3)
        del loss
    begin = time.perf_counter()
    with StopRequest() as stop, tqdm(total=settings.max_steps, unit="step", desc="training") as bar:
        for step in range(1, settings.max_steps + 1):
            stop.check()
            fetch = time.perf_counter()
            inputs, targets = batch_of(step)
            data_ms = 1000 * (time.perf_counter() - fetch)
            # Without a GPU compiled code has no operators whose tensors could be counted.
            tracked = log.is_tracked(step) and (device.type == "cuda" or not settings.use_compile)
            log.clock.start()
            with tracker.step(step) if tracked else nullcontext(), tracker.phase("training_step"):
                with tracker.phase("forward_pass"), autocast(settings.precision, device):
                    loss = forward_loss(called, inputs, targets)
                with tracker.phase("backward_pass"):
                    loss.backward()
                with tracker.phase("optimizer_step"):
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            log.clock.stop()
            log.add(step, loss.detach(), data_ms)
            del loss
            bar.update()
            if tracked:
                log.flush(tracker.summary()["training_step"]["peak_allocated_gib"])
        peaks = tracker.summary()
        log.flush(peaks.get("training_step", {}).get("peak_allocated_gib"))
    headline = log.headline()
    step = peaks.get("training_step", {})
    inner = {name: row["peak_allocated_gib"] for name, row in peaks.items() if name != "training_step"}
    return {
        "batch_size": batch_size,
        "tokens_per_update": log.tokens_per_update,
        "steps": settings.max_steps,
        "epochs": round(settings.max_steps / steps_per_epoch, 4),
        "training_minutes": round((time.perf_counter() - begin) / 60, 4),
        "compile_s": compile_s,
        "epoch_minutes": round(steps_per_epoch * headline["step_ms_median"] / 60_000, 4),
        **headline,
        "tracked_steps": len({row["step"] for row in tracker.rows}),
        "peak_allocated_gib": step.get("peak_allocated_gib"),
        "peak_reserved_gib": step.get("peak_reserved_gib") or None,
        "alloc_retries": torch.cuda.memory_stats()["num_alloc_retries"] if device.type == "cuda" else None,
        "peak_phase": max(inner, key=inner.get, default=None),
    }


def main() -> int:
    """Check the settings, make the run folder, train, and record how it ended."""
    settings = parse_settings(Settings)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu")
    device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    if settings.model_size == "auto":
        settings.model_size = "gpt2" if device.type == "cuda" else "tiny"
    settings.batch_size = 125 if settings.batch_size is None and settings.model_size != "tiny" else settings.batch_size
    settings.batch_size = 8 if settings.batch_size is None else settings.batch_size
    for name in ("batch_size", "max_steps", "tracked_steps", "measured_steps", "learning_rate"):
        if getattr(settings, name) <= 0:
            raise SettingsError(f"--{name} must be above 0, not {getattr(settings, name)}")
    needed = 1 + settings.tracked_steps + settings.measured_steps
    if settings.max_steps < needed:
        raise SettingsError(
            f"--max_steps {settings.max_steps} ends before the measured steps do: 1 + tracked_steps + measured_steps "
            f"are {needed}; raise --max_steps or lower --measured_steps"
        )
    set_precision(settings.precision, device)
    check_writable(Path(settings.output_folder) / settings.experiment, "--output_folder")
    use_expandable_segments(device)
    shape = model_config(settings.model_size)
    data = load_text_data(
        dataset_name=settings.dataset_name,
        dataset_path=settings.dataset_path,
        vocab_size=shape.vocab_size,
        cache_folder=settings.cache_folder,
    )
    windows = data.splits["train"].num_windows(shape.context_length)
    if windows < settings.batch_size:
        raise SettingsError(
            f"--batch_size asks for {settings.batch_size} sequences, but the training split has only {windows}; "
            "lower --batch_size or use more text"
        )
    run = RunFolder.create(settings.output_folder, settings.experiment, settings.run_name, unique=False)
    status, reason = "ok", None
    try:
        results = train(settings, shape, data, device, run)
    except (Interrupted, KeyboardInterrupt):
        run.update(status="interrupted")
        print(json.dumps({"run": str(run.path), "status": "interrupted"}))
        return 130
    except Exception as error:
        status = "oom" if is_out_of_memory(error) else "error"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        with suppress(SettingsError):
            run.update(status=status, error=reason)
        if status == "error":
            raise
    if status == "oom":
        print(f"{run.path}: out of memory with batch size {settings.batch_size} ({reason}); lower --batch_size")
        print(json.dumps({"run": str(run.path), "status": status}))
        return 1
    run.update(status="ok", finished_at=now(), results=results)
    if settings.figures:
        import plot  # matplotlib takes seconds to load

        plot.plot_run(run.path)
    print(json.dumps({"run": str(run.path), "status": "ok", **results}))
    return 0


if __name__ == "__main__":
    run_script(main)
