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

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from attention_kernels import observe_kernel
from attention_support import BACKENDS, sequences_refusal
from head_pruning import (
    IMPORTANCES,
    METHODS,
    MODES,
    bake_masks,
)
from patchtst import MODEL_VARIANTS, NORM_POSITIONS, NORMS, POSITIONS
from patchtst_fit import Training
from patchtst_plan import ATTENTION_TYPES, COMPILE_MODES, SCHEDULES, Plan, default_run_name, make_plan
from patchtst_pruning import prune_and_train_on
from precision import PRECISIONS, autocast
from run_folder import (
    RunFolder,
    StopRequest,
    check_writable,
    describe_environment,
    end_badly,
    now,
)
from time_series_dataset import SPLITS, SeriesData, baseline_errors, split_series
from time_series_files import DATASETS, load_series
from utils import SettingsError, count_parameters, parse_settings, run_script, setting

PUBLISHED_BATCH = 128  # the official test loader drops the last, smaller batch of 128: on the rest figures compare
SECTIONS = ("data", "model", "training", "pruning", "logging")


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
    precision: str | None = setting(None, "default: fp32, or bf16 with flash attention on a GPU", PRECISIONS)
    use_compile: bool = setting(False, "torch.compile the model")
    compile_mode: str | None = setting(None, "of torch.compile; reduce-overhead is CUDA graphs", COMPILE_MODES)
    seeds: str | None = setting(None, "weights, order of windows, dropout: a run each (default: 0; experiments 0,1,2)")
    evaluate_on: str = setting("test", "none: train and measure only", ["test", "none"])

    # pruning of attention heads
    prune: str | None = setting(None, "heads removed before training, or by importance afterwards (dynamic)", METHODS)
    prune_heads_per_layer: int | None = setting(None, "heads that each layer loses (5; static_conservative 1)")
    prune_mode: str | None = setting(None, "cut out of the weights (default) or masked", MODES)
    prune_importance: str | None = setting(None, "what dynamic ranks heads by (default: gradient)", IMPORTANCES)
    prune_rounds: int | None = setting(None, "dynamic: removals, scored anew each time (default: 5)")
    prune_learning_rate: float | None = setting(None, "dynamic: of training on (default: 0.1 x the best epoch's)")
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
# A run from beginning to end
# --------------------------------------------------------------------------------------------------------------------


def run_seed(settings: Settings, plan: Plan, data: SeriesData, run: RunFolder, seed: int, stop: StopRequest) -> dict:
    """Train, evaluate and write the results of one seed; returns them."""
    training = Training(settings, plan, data, run, seed, stop)
    model = training.model
    inputs, _ = training.windows.batch(torch.zeros(1, dtype=torch.int64, device=plan.device))
    model.eval()  # running statistics stay as they are; with gradients, because kernels differ in whether they have any
    with observe_kernel() as observer, autocast(plan.precision, plan.device):
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
        | {"warm_up_share": plan.warm_up_share},
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
            best, outcome, pruning = prune_and_train_on(training, best, bar)
    results = {
        "batch_size": plan.batch_size,
        "steps": training.step,
        "epochs": training.epoch,
        "stopped_by": outcome,
        "training_minutes": round(training.seconds / 60, 4),
        **times,
        **training.tracker.headline(),
        "parameters": count_parameters(model),
    }
    if settings.evaluate_on != "none":
        model.load_state_dict(best.weights)
        found = {"best_epoch": best.epoch, "validation_mse": best.mse}
        found |= {f"test_{name}": value for name, value in training.evaluate("test").items()}
        found["test_windows"] = len(data.splits["test"])
        whole = found["test_windows"] // PUBLISHED_BATCH * PUBLISHED_BATCH
        if not data.description["generated"] and whole:
            counted = training.evaluate("test", windows=whole)
            found["test_in_whole_batches"] = {"windows": whole, **counted}
        results |= found
        results["baselines"] = baseline_errors(data.splits["test"], data.series.rows_per_day)
        training.write_forecast()
        bake_masks(model)
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
        except (Exception, KeyboardInterrupt) as error:
            return end_badly(run, error, stop, plan.batch_size)
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
    series = load_series(  # a file that is missing or damaged ends an experiment before its first process
        settings.dataset,
        settings.data_path,
        fetch=settings.download,
        date_column=settings.date_column,
        allow_gaps=settings.allow_gaps,
        cache_folder=settings.cache_folder,
    )
    if chosen:
        import patchtst_experiments

        return patchtst_experiments.run(settings, chosen)
    for name in ("gpus", "only"):
        if getattr(settings, name) is not None:
            raise SettingsError(
                f"--{name} has no effect without one of {', '.join(f'--{name}' for name in EXPERIMENTS)}"
            )
    check_writable(Path(settings.output_folder) / settings.experiment, "--output_folder")
    plan = make_plan(settings)
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
