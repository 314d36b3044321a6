"""Train a GPT-2-like or Llama-like decoder on Polish text and log what each phase of a step costs: memory, time, loss.

    python llm_train.py                                                        built-in text, tiny model without a GPU
    python llm_train.py --use_flash_attention true --adjust_batch_size true    the largest batch that fits
    python llm_train.py --dataset_name plwiki --tokenizer_type transformers --max_training_minutes 120
    python llm_train.py --model_type llama --precision fp8 --use_compile true  1.1 G parameters, FP8 products (Hopper)
    python llm_train.py --resume outputs/llm/RUN                               go on after an interruption
    torchrun --nproc_per_node=2 llm_train.py --parallel ddp                    several GPUs; fsdp shards the model

Every technique is one flag, and one run changes one thing: --use_flash_attention, --attention_backend,
--attention_window, --precision (--use_fp16, --fp8_recipe), --loss, --gelu, --gradient_checkpointing, --optimizer,
--optimizer_in_backward, --parameters, --use_compile, --batch_size. A run leaves run.json, steps.jsonl, memory.csv and
pictures in outputs/<experiment>/<run_name>/; the last line printed is one JSON object with the results.

Perplexity follows the number of updates, and a larger batch makes fewer of them in an epoch: to compare the quality of
two techniques keep --tokens_per_update and --max_steps equal.
"""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from attention_support import BACKENDS
from batch_size import METHODS as SEARCH_METHODS
from batch_size import set_memory_budget, use_expandable_segments
from checkpointing import METHODS, set_activation_memory_budget
from cross_entropy import LOSSES
from dataset import DATASET_NAMES, DEFAULT_TOKENIZER, TextData, load_text_data
from fused_gelu import GELUS
from llm_fit import Training
from llm_plan import Plan, check_corpus, default_run_name, make_plan
from llm_step import evaluate, unigram_perplexity
from optimizers import OPTIMIZERS, PARAMETERS
from parallel import METHODS as PARALLEL
from precision import FP8_LAYERS, FP8_RECIPES, PRECISIONS, describe_fp8
from processes import AgreedError, Ranks, check_launch, end_at_once, is_lost, last_words, leave, process_group
from run_folder import (
    Interrupted,
    RunFolder,
    StepLog,
    StopRequest,
    check_writable,
    describe_environment,
    now,
)
from run_restart import earlier_run, end_lost, how_to_go_on, is_restart, launcher, note_failure
from sharded_checkpoint import newest
from tensorboard_log import TensorBoardLog
from transformer_based_llm import MODEL_SIZES, MODEL_TYPES, model_summary
from utils import (
    SettingsError,
    count_parameters,
    is_out_of_memory,
    parse_settings,
    run_script,
    setting,
)

EVALUATE_ON = ("test", "validation", "none")


# fmt: off
@dataclass
class Settings:
    """Every setting is a constant here and a flag; `--config FILE.yaml` sets several."""

    # model
    model_type: str = setting("transformer", "transformer is GPT-2-like, llama has its blocks", MODEL_TYPES)
    model_size: str = setting("auto", "auto: gpt2 (134 M) or llama-1b with a GPU, tiny without", ["auto", *MODEL_SIZES])
    num_layers: int | None = setting(None, "blocks (default: by model_size)")
    embedding_dim: int | None = setting(None, "width (default: by model_size)")
    num_heads: int | None = setting(None, "attention heads (default: by model_size)")
    num_kv_heads: int | None = setting(None, "llama: heads of keys and values (default: by model_size)")
    mlp_dim: int | None = setting(None, "llama: inner width of the MLP (default: by model_size)")
    context_length: int | None = setting(None, "tokens in a sequence (default: 256, tiny 128, llama 4096)")
    vocab_size: int | None = setting(None, "entries of embedding, head and trained BPE (default: 32000, tiny 2048)")
    dropout: float = setting(0.0, "dropout of embeddings, attention weights and both branches of a block")

    # techniques
    use_flash_attention: bool = setting(False, "flash-attn if it runs here, else PyTorch's flash kernel; implies bf16")
    attention_backend: str | None = setting(
        None, "attention kernel by name, or auto (default: sdpa)", ["auto", *BACKENDS]
    )
    attention_window: str | None = setting(None, "keys seen before and after, such as 64,0 (default: all)")
    precision: str | None = setting(None, "default: fp32, or bf16 with flash attention", [*PRECISIONS, "fp8"])
    fp8_recipe: str | None = setting(None, "how numbers are scaled into 8 bits (default: tensorwise)", FP8_RECIPES)
    fp8_layers: str | None = setting(None, "linear layers in FP8: all, or those large enough to gain", FP8_LAYERS)
    fp8_head: bool = setting(False, "the head in FP8 too (its products are the largest)")
    fp8_emulation: bool = setting(False, "FP8's rounding on any device, for its quality: slower, saves nothing")
    use_fp16: bool = setting(False, "the plwiki lab's name for BF16 autocast; the same as --precision bf16")
    loss: str = setting("full", "full holds all logits, chunked some, fused is liger-kernel's chunked loss", LOSSES)
    loss_chunk_tokens: int | None = setting(None, "tokens whose logits live at a time (2048, or 1/8 batch)")
    gelu: str = setting("plain", "fused: one kernel with bias and its gradient; recomputed: its output not kept", GELUS)
    use_gradient_checkpointing: bool = setting(False, "the same as --gradient_checkpointing block")
    gradient_checkpointing: str | None = setting(None, "what the blocks keep for the backward pass", METHODS)
    checkpoint_every: int | None = setting(None, "with every_k: checkpoint every k-th block (default: 2)")
    use_compile: bool = setting(False, "torch.compile the model and the loss")
    activation_memory_budget: float | None = setting(None, "compiled: 1 keeps all that is saved, 0 recomputes all")
    optimizer: str = setting("adamw", "adamw (fused on a GPU), adam (decay as L2), torchao's 8-bit", OPTIMIZERS)
    optimizer_in_backward: bool = setting(False, "update each parameter as soon as its gradient is there")
    parameters: str = setting("fp32", "bf16 parameters with an fp32 master copy or stochastic rounding", PARAMETERS)
    parallel: str | None = setting(None, "under torchrun: ddp keeps a replica in each process, fsdp a shard", PARALLEL)
    learning_rate: float = setting(0.0005, "constant learning rate (after the warm-up)")
    warm_up_steps: int = setting(0, "updates over which the learning rate rises to it, in a line from nothing")
    weight_decay: float = setting(0.1, "weight decay")

    # batch
    batch_size: int | None = setting(None, "sequences in a batch, or where the search starts (default: 64, tiny 8)")
    adjust_batch_size: bool = setting(False, "search the largest batch size that trains")
    batch_size_search: str | None = setting(None, "grow by a quarter only, or bisect then (default)", SEARCH_METHODS)
    max_batch_size: int | None = setting(None, "upper bound of the search")
    search_margin: float | None = setting(None, "share of the memory that the search leaves free (GPU 0.01, else 0)")
    memory_budget_gib: float | None = setting(None, "play a card of this size (no GPU: half the free memory)")
    expandable_segments: bool = setting(True, "CUDA allocator that does not fragment; false is PyTorch's default")
    tokens_per_update: int | None = setting(None, "tokens of an optimizer step, by accumulation (default: one batch)")

    # data
    dataset_name: str | None = setting(None, "sample (generated, the default), plwiki or plwiki_hf", DATASET_NAMES)
    dataset_path: str | None = setting(None, ".txt, .jsonl, .parquet file (plain, .gz, .xz, .zst) or a folder of them")
    max_documents: int | None = setting(None, "at most this many documents")
    split_seed: int = setting(0, "which documents are train, validation and test (80/10/10)")
    tokenizer_type: str = setting("bpe", "bpe: trained on the training split", ["bpe", "transformers"])
    tokenizer: str | None = setting(None, f"hub name or folder for type transformers (default {DEFAULT_TOKENIZER})")
    cache_folder: str = setting(".cache/tokens", "where token files are kept")

    # length
    epochs: int = setting(1, "passes over the training split")
    max_steps: int | None = setting(None, "stop after this many optimizer steps")
    max_training_minutes: float | None = setting(None, "stop, save and evaluate after this long")
    evaluate_on: str = setting("test", "split of the final metrics: choose on validation", EVALUATE_ON)

    # measuring
    tracked_steps: int = setting(5, "steps whose memory is tracked, from the second on; they also warm up")
    measured_steps: int = setting(20, "steps after those whose median time is reported")
    profile_steps: int = setting(0, "steps profiled at the end: where the time goes (a GPU)")
    tensorboard: bool = setting(False, "write TensorBoard event files too (uv sync --extra tensorboard)")
    figures: bool = setting(True, "draw this run's figures at its end (plot.py can draw them later)")
    log_every: int = setting(100, "steps between printed lines")

    # run
    seed: int = setting(0, "initial weights, order of the data, dropout")
    deterministic: bool = setting(False, "kernels that give the same bits every time, where PyTorch has them; slower")
    device: str = setting("auto", "auto is cuda if there is one", ["auto", "cpu", "cuda"])
    checkpoint_every_minutes: float | None = setting(None, "save the state this often")
    resume: str | None = setting(None, "run folder to go on with; its settings are used")
    auto_resume: bool = setting(False, "go on with the run of --run_name if it was begun, else begin it")
    output_folder: str = setting("outputs", "folder of all results")
    experiment: str = setting("llm", "folder of this experiment's runs")
    run_name: str | None = setting(None, "folder of this run (default: named after its techniques)")
    config: str | None = setting(None, "YAML file of settings; flags win over it")
# fmt: on


MAY_CHANGE_ON_RESUME = {
    "max_steps",
    "max_training_minutes",
    "checkpoint_every_minutes",
    "log_every",
    "figures",
    "parallel",
    "resume",
    "auto_resume",
    "config",
}


def read_settings(ranks: Ranks) -> tuple[Settings, RunFolder | None]:
    """Settings from the command line, or those of the run that this one goes on with (see run_restart.py).

    Raises:
        SettingsError: a setting that would change the resumed run was given another value.
    """
    settings = ranks.together(lambda: parse_settings(Settings))
    restarted = ranks.agree(is_restart())[0]
    path = ranks.broadcast(ranks.first_alone(lambda: settings.resume or earlier_run(settings, restarted)))
    if path is None:
        return settings, None
    return ranks.together(lambda: settings_of_run(path, ranks))


def settings_of_run(path: str | Path, ranks: Ranks) -> tuple[Settings, RunFolder]:
    """The settings of the run that is gone on with, with those from the command line that may change."""
    run = RunFolder.open(path)
    run.writes = ranks.first
    known = {field.name for field in fields(Settings)}
    saved = {name: value for name, value in run.info.get("settings", {}).items() if name in known}
    if not ranks.joined:
        saved["parallel"] = None  # a run of several processes goes on in one
    settings = parse_settings(Settings, saved=saved)
    for name, value in saved.items():
        if name not in MAY_CHANGE_ON_RESUME and getattr(settings, name) != value:
            raise SettingsError(
                f"--resume {path}: that run has --{name} {value}, not {getattr(settings, name)}; "
                f"leave --{name} out, or start a new run"
            )
    return settings, run


# --------------------------------------------------------------------------------------------------------------------
# A run from beginning to end
# --------------------------------------------------------------------------------------------------------------------


def start(settings: Settings, plan: Plan, data: TextData, run: RunFolder, stop: StopRequest, ranks: Ranks) -> Training:
    """Build the training; write the beginning of run.json, or, if it is there, go on from the run's checkpoint."""
    resumed = bool(run.info)
    model = json.loads(json.dumps(asdict(plan.model)))  # as run.json holds it
    meant = {"device": plan.device.type, "precision": plan.precision, "model": model}
    if resumed:
        if run.info["model"].keys() != meant["model"].keys():
            raise SettingsError(f"--resume {run.path}: that run was made by another version of this lab")
        if run.info["dataset"]["cache_key"] != data.description["cache_key"]:
            raise SettingsError(f"--resume {run.path}: the text or tokenizer is not the one of that run")
        for name, value in meant.items():
            if run.info[name] != value:
                raise SettingsError(
                    f"--resume {run.path}: that run had {name} {run.info[name]}, here its settings "
                    f"mean {value}; go on with it on a machine like the one it began on"
                )
    training = Training(settings, plan, data, run, stop, ranks)
    loaded = False
    if resumed:
        loaded = training.load(required=settings.resume is not None)
        here = {name: value for name, value in describe_environment(plan.device).items() if run.info.get(name) != value}
        here["step"] = training.step
        run.info.pop("error", None)
        ways = ranks.description()
        if ways or "parallel" in run.info:
            ways = {"parallel": None, "world_size": 1, "launcher": launcher()} | ways
        run.update(status="running", resumed=[*run.info.get("resumed", []), here], **ways)  # when, what was different
    else:
        run.update(
            status="running",
            experiment=settings.experiment,
            run_name=run.path.name,
            **(describe_environment(plan.device) | meant | ranks.description()),
            **({"launcher": launcher()} if ranks.joined else {}),
            settings=asdict(settings),
            batch_size=plan.batch_size,
            loss_chunk_tokens=plan.loss_chunk_tokens if plan.loss == "chunked" else None,
            expandable_segments=plan.device.type == "cuda"
            and any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()),
            memory_budget_gib=plan.capacity_gib if settings.adjust_batch_size else settings.memory_budget_gib,
            fp8=training.fp8,
            model_size=plan.model_size,
            parameters=count_parameters(training.model),
            attention_kernel=training.observe_attention_kernel(),
            dataset=data.description,
            tokenizer=data.tokenizer,
        )
        if ranks.first:
            (run.path / "model_summary.txt").write_text(model_summary(training.model), encoding="utf-8")
    peak = training.peak_words(training.peak_tflops) or "unknown for this device, so no MFU"
    for line in (
        *plan.notes,
        *([describe_fp8(training.fp8)] if training.fp8 else []),
        f"data: {data.description['description']}; {data.tokenizer['description']}",
        f"model: {plan.model_size}, {run.info['parameters']:,} parameters, context {plan.model.context_length}; "
        f"{plan.precision}, attention {plan.model.attention_backend} ({run.info['attention_kernel']})",
        f"{training.flops_per_token / 1e6:,.1f} MFLOP a token; dense {plan.precision} peak: {peak}",
    ):
        print(line)
    if settings.adjust_batch_size and not loaded:
        training.search_batch_size()
    return training


def run_training(
    settings: Settings, plan: Plan, data: TextData, run: RunFolder, stop: StopRequest, ranks: Ranks
) -> int:
    """Train, evaluate, write results and pictures; returns the exit status."""
    training = start(settings, plan, data, run, stop, ranks)
    log = StepLog(
        run,
        plan.device,
        tokens_per_update=training.sequences_per_update * training.context_length,
        flops_per_token=training.flops_per_token,
        peak_tflops=training.peak_tflops,
        tracked_steps=settings.tracked_steps,
        measured_steps=settings.measured_steps,
        done_steps=training.step,
        also=TensorBoardLog(run.path, training.step).add if settings.tensorboard and ranks.first else None,
    )
    if settings.use_compile and not settings.adjust_batch_size and training.step < training.total_steps:
        training.compile()  # after a search everything is compiled, and the time for it lies in the probes
    outcome = training.train(log)
    if outcome != "done" or settings.checkpoint_every_minutes:
        training.save(log)
    results = {
        "batch_size": training.batch_size,
        "tokens_per_update": log.tokens_per_update,
        "steps": training.step,
        "epochs": round(training.step / training.steps_per_epoch, 4),
        "training_minutes": round(training.seconds / 60, 4),
        **training.measured(log),
    }
    if outcome == "signal":
        run.update(results=results)
        raise Interrupted

    metrics = None
    if settings.evaluate_on != "none":
        split = data.splits[settings.evaluate_on]
        try:
            with training.tracker.step(training.step), training.tracker.phase("evaluation"):
                metrics = evaluate(training.objective, split, training.batch_size, stop)
        except Interrupted:
            training.save(log)  # nothing is left to train, but the metrics can be had with --resume
            raise
    if settings.profile_steps:
        training.profile()
    if not ranks.first:
        return 0
    if metrics is not None:
        metrics["unigram_perplexity"] = unigram_perplexity(data.splits["train"], split, plan.model.vocab_size)
        results |= {f"{settings.evaluate_on}_{name}": value for name, value in metrics.items()}
    run.update(status="ok", stopped_by=outcome, finished_at=now(), results=results)
    if settings.figures:
        import plot  # matplotlib takes seconds to load

        title = f"{data.description['description']}; {data.tokenizer['description']}"
        plot.plot_text_lengths(data.document_lengths.tolist(), run.path / "text_length_distribution.png", title)
        plot.plot_run(run.path)

    training.report(results)
    words = "no split was evaluated"
    if metrics is not None:
        words = (
            f"{settings.evaluate_on} loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.2f} per token "
            f"(without context: {metrics['unigram_perplexity']:.2f}), {metrics['bits_per_byte']:.4f} bits per byte"
        ) + (" on generated text" if data.description["generated"] else "")
    print(f"{words}; results in {run.path}")
    print(json.dumps({"run": str(run.path), "status": "ok", **results}))
    return 0


def main() -> int:
    """Join the processes that torchrun started, or be alone, and run."""
    cuda = parse_settings(Settings).device != "cpu" and torch.cuda.is_available()
    with process_group(cuda) as ranks:
        status = run_once(ranks)
        leave(ranks, status)
        return status


def run_once(ranks: Ranks) -> int:
    """Check everything that can be wrong with the input, make the run folder, run, and record how it ended."""
    settings, run = read_settings(ranks)
    if run is not None and settings.resume is None and run.info.get("status") == "ok":
        print(json.dumps({"run": str(run.path), "status": "ok", "finished": "before", **run.info["results"]}))
        return 0
    ranks = ranks.together(lambda: check_launch(settings.parallel, ranks))
    plan = ranks.together(lambda: make_plan(settings, ranks.world_size))
    folder = Path(settings.output_folder) / settings.experiment
    ranks.first_alone(lambda: check_writable(folder, "--output_folder"))
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if settings.expandable_segments:
        use_expandable_segments(plan.device)
    set_activation_memory_budget(settings.activation_memory_budget)
    if settings.use_compile:  # one graph more for each new batch size; beyond the limit it is an error, never eager
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    set_memory_budget(plan.device, settings.memory_budget_gib)
    name = settings.run_name or default_run_name(settings, plan)

    goes_on = settings.auto_resume or is_restart()
    begun = goes_on and (folder / name).is_dir() and not (folder / name / "run.json").exists()

    def check_name() -> None:
        if run is None and settings.run_name and (folder / name).exists() and not begun:
            raise SettingsError(
                f"--run_name {name}: that folder already exists in {settings.experiment}; choose another"
            )

    ranks.first_alone(check_name)
    data = ranks.first_then_others(
        lambda: load_text_data(
            dataset_name=settings.dataset_name,
            dataset_path=settings.dataset_path,
            max_documents=settings.max_documents,
            split_seed=settings.split_seed,
            tokenizer_type=settings.tokenizer_type,
            tokenizer=settings.tokenizer,
            vocab_size=plan.model.vocab_size,
            cache_folder=settings.cache_folder,
            progress=ranks.first,
        )
    )
    ranks.together(lambda: check_corpus(data, plan, settings))
    if run is None:
        run = ranks.first_alone(
            lambda: (
                RunFolder(folder / name)
                if begun  # and ended before its run.json was written
                else RunFolder.create(
                    settings.output_folder, settings.experiment, name, unique=settings.run_name is None
                )
            )
        )
        path = ranks.broadcast(run and run.path)
        run = run or RunFolder(path, writes=False)

    def give_up() -> None:
        end_lost(run, ranks, RuntimeError("no step ended after the signal to stop"))
        end_at_once(None, ranks.rank)

    with StopRequest(patient=ranks.world_size > 1) as stop, last_words(give_up, ranks):
        try:
            return run_training(settings, plan, data, run, stop, ranks)
        except (Interrupted, KeyboardInterrupt):
            run.update(status="interrupted")
            saved = newest(run.path / "checkpoint") is not None
            print(f"interrupted; {how_to_go_on(run.path, ranks)}" if saved else "interrupted")
            print(json.dumps({"run": str(run.path), "status": "interrupted"}))
            return stop.exit_status
        except Exception as error:
            if ranks.joined and is_lost(error):
                return end_lost(run, ranks, error)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            status = "oom" if is_out_of_memory(error) else "error"
            if isinstance(error, OSError):
                error = SettingsError(f"writing to {run.path} failed ({reason}); free space or change --output_folder")
            if ranks.first and not (run.path / "run.json").exists():
                shutil.rmtree(run.path, ignore_errors=True)  # nothing has begun: leave no half-made folder
            elif ranks.first or not isinstance(error, AgreedError):
                note_failure(run, ranks, status, reason)
            if isinstance(error, SettingsError):
                raise error from None
            if status == "error" and not isinstance(error, FloatingPointError):
                raise
    if status == "oom":
        advice = "lower --batch_size, or use --adjust_batch_size true,"
        if settings.adjust_batch_size:
            advice = "raise --search_margin, or use"
        reason = (
            f"out of memory with batch size {run.info['batch_size']} ({reason}); {advice} "
            "--use_gradient_checkpointing true or --precision bf16"
        )
    print(f"{run.path}: {reason}", file=sys.stdout if ranks.first else sys.stderr)
    print(json.dumps({"run": str(run.path), "status": status}))
    return 1


if __name__ == "__main__":
    run_script(main)
