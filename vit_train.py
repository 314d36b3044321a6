"""Train a vision transformer: fused attention, decorrelated heads and mixed-resolution tokens, each with its control.

    python vit_train.py                                                        the generated sample, about a minute
    python vit_train.py --dataset cifar10 --download true --use_compile true   the 4.2 M model on CIFAR-10
    python vit_train.py --dataset cifar10 --data_path cifar10.npz --tokens mixed --num_tokens 49 --seeds 0,1,2
    python vit_train.py --experiment ablation --dataset cifar10 --data_path cifar10.npz       eight combinations

The whole data set lies on the device as bytes and is augmented there. A part of the training images is the validation
split, by which the best epoch is chosen; test chooses nothing: it is evaluated at the end, with the weights of that
epoch (and with a head of each layer less). Without other flags the sample trains a tiny model and every other set the
small one, with warm-up and cosine, label smoothing, and weight decay for matrices only.

A run leaves run.json, steps.jsonl, epochs.jsonl, memory.csv, pictures and the best weights of each seed in
outputs/<experiment>/<run_name>/; the last line printed is one JSON object with the results. The times of augmenting, of
cutting tokens and of the training step stand apart, on one clock.
"""

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tqdm import tqdm

from attention_kernels import observe_kernel
from attention_support import BACKENDS
from checkpointing import METHODS
from image_dataset import DATASETS, ImageData, load_images, split_images
from mixed_resolution import SCORERS
from precision import PRECISIONS, autocast
from run_folder import RunFolder, StopRequest, check_writable, describe_environment, end_badly, now
from utils import SettingsError, count_parameters, parse_settings, run_script, setting
from vit import HEADS, INITIALISATIONS, MODEL_SIZES, POOLS, POSITIONS
from vit_evaluation import summarise
from vit_fit import Training
from vit_plan import COMPILE_SCOPES, OPTIMIZERS, SCHEDULES, TOKENS, Plan, default_run_name, make_plan

STUDIES = ("ablation", "tokens", "decatt")
SECTIONS = ("data", "augmentation", "model", "techniques", "training", "logging")


# fmt: off
@dataclass
class Settings:
    """Every setting is a constant here and a flag; `--config FILE.yaml` sets several, under headings or without."""

    # data
    dataset: str | None = setting(None, "a published set, or the generated sample (the default)", DATASETS)
    data_path: str | None = setting(None, "archive of the binary version, its folder, an .npz, or a folder of images")
    download: bool = setting(False, "fetch CIFAR-10 or CIFAR-100 through the datasets library")
    source_size: int | None = setting(None, "side to which the images of a folder are scaled when read (32)")
    validation_share: float = setting(0.05, "part of the training images that chooses the best epoch")
    cache_folder: str = setting(".cache/images", "where decoded images are kept")

    # augmentation, on the device
    flip: bool = setting(True, "mirror half of the images")
    crop_padding: int | None = setting(None, "pixels by which an image is shifted at most (default: 4, sample 2)")
    rotation_degrees: float = setting(0.0, "rotation by at most this angle")
    augment_operations: int | None = setting(None, "RandAugment: operations an image (default: 2, sample 0)")
    augment_magnitude: float | None = setting(None, "RandAugment: their strength, 0 to 10 (default: 9)")
    cutout: int = setting(0, "side of a square that is blanked out, in pixels")
    mixup_alpha: float = setting(0.0, "blend pairs of images; 0 is off")
    cutmix_alpha: float = setting(0.0, "paste a box of one image into another; 0 is off")
    label_smoothing: float | None = setting(None, "of the targets (default: 0.1, sample 0)")

    # model
    model_size: str | None = setting(None, "shape by name (default: small, sample tiny)", list(MODEL_SIZES))
    num_layers: int | None = setting(None, "blocks (default: by size, 12)")
    embedding_dim: int | None = setting(None, "width (default: by size, 192)")
    num_heads: int | None = setting(None, "attention heads (default: by size, 3)")
    mlp_dim: int | None = setting(None, "width inside the MLP (default: by size, 512)")
    pool: str | None = setting(None, "the head reads the class token (default) or the mean of all tokens", POOLS)
    positions: str | None = setting(None, "learned, or waves of the patches' centres (mixed tokens)", POSITIONS)
    head: str | None = setting(None, "two layers (default) or one", HEADS)
    final_norm: bool = setting(True, "a norm before the head")
    initialisation: str | None = setting(None, "of the weights (default: scaled)", INITIALISATIONS)
    dropout: float | None = setting(None, "inside the MLP and the head (default: 0)")
    attention_dropout: float | None = setting(None, "of the attention weights (default: 0)")
    drop_path: float | None = setting(None, "stochastic depth of the last block, from 0 in the first (default: 0)")

    # techniques
    use_flash_attention: bool = setting(False, "flash-attn, or PyTorch's own flash kernel where it is not installed")
    attention_backend: str | None = setting(None, "attention kernel by name instead", ["auto", *BACKENDS])
    decatt_weight: float | None = setting(None, "weight of the decorrelation of heads in the loss (default: without)")
    decatt_layers: int | None = setting(None, "the first so many layers are decorrelated (default: all)")
    tokens: str = setting("uniform", "patches of one size, or a quadtree of patches of several sizes", TOKENS)
    image_size: int | None = setting(None, "side of the image that is cut (default: the data's; mixed: twice that)")
    patch_size: int | None = setting(None, "uniform: side of a patch (default: about an eighth of the image)")
    num_tokens: int | None = setting(None, "mixed: patches of an image (default: 64)")
    min_patch: int | None = setting(None, "mixed: side of the smallest patch (default: a sixteenth of the image)")
    max_patch: int | None = setting(None, "mixed: side of the largest patch (default: 4 x min_patch)")
    scorer: str | None = setting(None, "mixed: what decides which patch is split (default: pixel_blur)", SCORERS)
    scorer_epochs: int | None = setting(None, "mixed, trained: epochs of the scorer's own training (default: 2)")
    precision: str | None = setting(None, "default: bf16 where the GPU has it, else fp32", PRECISIONS)
    use_compile: bool | None = setting(None, "torch.compile model, augmentation, tokeniser (false; studies, GPU: true)")
    compile_scope: str | None = setting(None, "whole, or one block for all: compiled sooner (model)", COMPILE_SCOPES)
    use_cuda_graphs: bool | None = setting(None, "record a step as a CUDA graph and replay it (as use_compile)")
    gradient_checkpointing: str | None = setting(None, "what is computed again in the backward pass (none)", METHODS)
    checkpoint_every: int | None = setting(None, "every_k: each so many blocks (default: 2)")

    # training
    batch_size: int | None = setting(None, "images in a batch (default: 512, sample 100)")
    epochs: int | None = setting(None, "passes over the training images (default: 100, sample 22)")
    max_steps: int | None = setting(None, "stop after this many optimizer steps")
    optimizer: str | None = setting(None, "muon: for the blocks' matrices alone (default; sample: adamw)", OPTIMIZERS)
    learning_rate: float | None = setting(None, "highest learning rate (default: 0.002)")
    schedule: str = setting("cosine", "of the learning rate after the warm-up", SCHEDULES)
    warm_up_epochs: float | None = setting(None, "epochs in which the rate rises (default: 5, sample 2)")
    weight_decay: float = setting(0.05, "for matrices; norms, biases, positions have none")
    gradient_clip: float = setting(1.0, "largest norm of the gradient; 0 does not clip")
    average_decay: float = setting(0.0, "moving average of the weights, which is evaluated; 0 is off")
    seeds: str | None = setting(None, "weights, order, augmentation: a training each (default: 0; studies 0,1,2)")
    evaluate_every: int = setting(1, "epochs from one validation to the next")

    # logging and measuring
    tracked_steps: int = setting(3, "steps whose memory is tracked, from the second on")
    log_every: int = setting(10, "steps between lines of steps.jsonl")
    figures: bool = setting(True, "draw this run's figures at its end (plot_vit.py can draw them later)")
    device: str = setting("auto", "auto is cuda if there is one", ["auto", "cpu", "cuda"])
    output_folder: str = setting("outputs", "folder of all results")
    experiment: str = setting("vit", f"folder of this run, or a study of many runs: {', '.join(STUDIES)}")
    run_name: str | None = setting(None, "folder of this run (default: named after its data and techniques)")
    config: str | None = setting(None, "YAML file of settings; flags win over it")
    gpus: str | None = setting(None, "studies: such as 0,1 to use these GPUs side by side")
    only: str | None = setting(None, "studies: only these cases, separated by commas")
# fmt: on


# --------------------------------------------------------------------------------------------------------------------
# A run from beginning to end
# --------------------------------------------------------------------------------------------------------------------


def describe_run(settings: Settings, plan: Plan, data: ImageData, run: RunFolder, training: Training) -> None:
    """Write what is known before the first step."""
    tokens = training.tokens_of(data.splits["train"].images[:2])
    training.model.train()  # kernels differ in whether they have a backward pass
    with observe_kernel() as observer, autocast(plan.precision, plan.device):
        training.model(tokens.patches, tokens.centres)
    model = training.model
    run.update(
        status="running",
        experiment=settings.experiment,
        run_name=run.path.name,
        **describe_environment(plan.device),
        precision=plan.precision,
        model=asdict(plan.model),
        settings=asdict(settings),
        seeds=plan.seeds,
        recipe={name: getattr(plan, name) for name in ("epochs", "optimizer", "learning_rate", "warm_up_epochs")}
        | {name: getattr(settings, name) for name in ("schedule", "weight_decay", "average_decay", "gradient_clip")}
        | {"augmentation": asdict(plan.augmentation)},
        tokens={"kind": plan.tokens, "image_size": plan.image_size, "patch_size": plan.patch_size}
        | {"scorer": plan.scorer, "tree": None if plan.tree is None else asdict(plan.tree)},
        decatt_weight=plan.decatt_weight,
        batch_size=plan.batch_size,
        parameters=count_parameters(model),
        attention_kernel=observer.name,
        dataset=data.description,
    )
    (run.path / "model_summary.txt").write_text(f"{model}\n\nparameters: {count_parameters(model):,}\n")
    print(
        f"{run.path}: {count_parameters(model):,} parameters, {plan.model.sequence_length} tokens, "
        f"{training.steps_per_epoch} steps an epoch, {plan.precision}, attention {plan.model.attention_backend} "
        f"({observer.name})"
    )


def train_seeds(settings: Settings, plan: Plan, data: ImageData, run: RunFolder, stop: StopRequest) -> dict[str, Any]:
    """Train, choose and test every seed in turn; returns the results of all of them together."""
    found: list[dict[str, Any]] = []
    for seed in plan.seeds:
        training = Training(settings, plan, data, run, seed, stop)
        if not found:
            describe_run(settings, plan, data, run, training)
        with tqdm(total=plan.epochs, unit="epoch", desc=f"training, seed {seed}") as bar:
            training.fit(bar)
        found.append(training.results())
        (run.path / "checkpoint").mkdir(exist_ok=True)
        weights = {name: value.contiguous() for name, value in training.best.weights.items()}
        save_file(weights, run.path / "checkpoint" / f"best-seed-{seed}.safetensors")
        if seed == plan.seeds[0]:
            training.write_mosaics()
        results = summarise(found)
        run.update(results=results)
        report(training, found[-1])
        del training
        gc.collect()  # its weights, states and recorded step, before those of the next seed are made
    return results


def report(training: Training, result: dict[str, Any]) -> None:
    """Print what a reader looks for first."""
    if training.tracker.rows:
        print(training.tracker.table())
    if result["timed_steps"]:
        mfu = "" if result["mfu"] is None else f", MFU {100 * result['mfu']:.1f} %"
        print(
            f"step {result['step_ms_median']:.2f} ms (20th-80th percentile {result['step_ms_p20']:.2f}-"
            f"{result['step_ms_p80']:.2f}, n = {result['timed_steps']}), {result['images_per_s']:,.0f} images/s{mfu}; "
            f"beside it augmenting {result['augment_ms_median']:.2f} ms, cutting tokens "
            f"{result['tokenise_ms_median']:.2f} ms"
        )
    print(
        f"seed {result['seed']}: best epoch {result['best_epoch']} of {result['epochs']}, validation "
        f"{100 * result['validation_accuracy']:.2f} %, test {100 * result['test_accuracy']:.2f} % of "
        f"{result['test_images']:,}{' generated' if training.data.description['generated'] else ''} images; "
        f"{result['training_minutes']:.2f} minutes of training"
    )


def run_once(settings: Settings, plan: Plan, data: ImageData, stop: StopRequest) -> int:
    """All seeds in one run folder; returns the exit status."""
    name = settings.run_name or default_run_name(settings, plan, data.description["name"].replace(" ", "-"))
    run = RunFolder.create(settings.output_folder, settings.experiment, name, unique=settings.run_name is None)
    try:
        results = train_seeds(settings, plan, data, run, stop)
    except (Exception, KeyboardInterrupt) as error:
        return end_badly(run, error, stop, plan.batch_size)
    run.update(status="ok", finished_at=now(), results=results)
    if settings.figures:
        import plot_vit  # matplotlib takes seconds to load

        plot_vit.plot_run(run.path)
    shown = ("parameters", "validation_accuracy", "test_accuracy", "test_accuracy_spread", "training_minutes")
    shown += ("step_ms_median", "images_per_s", "peak_allocated_gib")
    print(json.dumps({"run": str(run.path), "status": "ok"} | {name: results[name] for name in shown}))
    return 0


def main() -> int:
    """Train one model with every seed, or run a study."""
    settings = parse_settings(Settings, sections=SECTIONS)
    images = load_images(  # a file that is missing or damaged ends a study before its first process
        settings.dataset,
        settings.data_path,
        fetch=settings.download,
        image_size=settings.source_size,
        cache_folder=settings.cache_folder,
    )
    if settings.experiment in STUDIES:
        import vit_experiments

        return vit_experiments.run(settings, settings.experiment, images)
    for name in ("gpus", "only"):
        if getattr(settings, name) is not None:
            raise SettingsError(f"--{name} has no effect without --experiment {'|'.join(STUDIES)}")
    check_writable(Path(settings.output_folder) / settings.experiment, "--output_folder")
    plan = make_plan(settings, images)
    data = split_images(images, device=plan.device, validation_share=settings.validation_share)
    if len(data.splits["train"]) < plan.batch_size:
        raise SettingsError(
            f"--batch_size asks for {plan.batch_size} images, but the training split has only "
            f"{len(data.splits['train'])}; lower it"
        )
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in data.splits.items())
    for line in (*plan.notes, f"data: {data.description['description']}; {sizes}"):
        print(line)
    with StopRequest() as stop:
        return run_once(settings, plan, data, stop)


if __name__ == "__main__":
    run_script(main)
