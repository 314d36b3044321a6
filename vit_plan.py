"""What the settings of vit_train.py mean on this machine: every check of them, and what they leave open.

Device, precision, attention kernel, tokens, model shape and recipe are decided here, before anything is loaded or
written, so that vit_train.py itself reads as settings, loop and results.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import checkpointing
from attention_support import FULL, choose_backend, choose_flash_backend, unsupported_reason
from cuda_graphs import unsupported_reason as cuda_graphs_refusal
from image_augmentation import Augmentation
from image_set import ImageSet
from mixed_resolution import SCORERS, STRIDE
from precision import AUTOCAST_DTYPES, set_precision
from precision import unsupported_reason as precision_refusal
from quadtree import Quadtree, quadtree
from utils import SettingsError, read_seeds
from vit import ViTConfig, vit_config

TOKENS = ("uniform", "mixed")
SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("adamw", "muon")
COMPILE_SCOPES = ("model", "block")
MIXED = ("num_tokens", "min_patch", "max_patch", "scorer")
SHAPE = (
    "num_layers", "embedding_dim", "num_heads", "mlp_dim", "dropout", "attention_dropout", "drop_path", "pool",
    "positions", "head", "final_norm", "initialisation", "gradient_checkpointing", "checkpoint_every",
)  # fmt: skip

# Training by data set: what the sample takes on a laptop, and what a real set takes.
RECIPES: dict[str, dict[str, Any]] = {
    "sample": {"model_size": "tiny", "batch_size": 100, "epochs": 22, "learning_rate": 2e-3, "warm_up_epochs": 2}
    | {"optimizer": "adamw", "augment_operations": 0, "crop_padding": 2, "label_smoothing": 0.0},
    "other": {"model_size": "small", "batch_size": 512, "epochs": 100, "learning_rate": 2e-3, "warm_up_epochs": 5}
    | {"optimizer": "muon", "augment_operations": 2, "crop_padding": 4, "label_smoothing": 0.1},
}


@dataclass
class Plan:
    """What the settings mean on this machine."""

    device: torch.device
    precision: str
    model: ViTConfig
    model_size: str
    tokens: str
    image_size: int  # of the image that is cut into tokens
    patch_size: int  # uniform tokens
    tree: Quadtree | None
    scorer: str | None
    augmentation: Augmentation
    batch_size: int
    epochs: int
    optimizer: str
    learning_rate: float
    warm_up_epochs: float
    decatt_weight: float
    use_compile: bool
    use_cuda_graphs: bool
    seeds: list[int]
    notes: list[str]


def check_numbers(settings: Any) -> None:
    """Raise for a number that is out of range or a name that is no folder."""
    for name in ("batch_size", "epochs", "learning_rate", "tracked_steps", "log_every", "evaluate_every"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < float("inf"):
            raise SettingsError(f"--{name} must be above 0 and finite, not {value}")
    for name in ("weight_decay", "gradient_clip", "warm_up_epochs"):
        value = getattr(settings, name)
        if value is not None and not 0 <= value < float("inf"):
            raise SettingsError(f"--{name} must be at least 0 and finite, not {value}")
    for name in ("max_steps", "scorer_epochs", "patch_size"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise SettingsError(f"--{name} must be at least 1, not {value}")
    if settings.image_size is not None and not 8 <= settings.image_size <= 512:
        raise SettingsError(f"--image_size must be from 8 to 512, not {settings.image_size}")
    if not 0 <= settings.average_decay < 1:
        raise SettingsError(f"--average_decay must be at least 0 and below 1, not {settings.average_decay}")
    for name in ("experiment", "run_name"):
        value = getattr(settings, name)
        if value is not None and (value in ("", ".", "..") or Path(value).name != value or len(value) > 200):
            raise SettingsError(f"--{name} must be one folder name of at most 200 characters, not '{value[:80]}'")


def make_recipe(settings: Any, images: ImageSet) -> tuple[dict[str, Any], Augmentation]:
    """The recipe of the data set with what the settings change in it; needs no device.

    Raises:
        SettingsError: values out of range, or that have no effect.
    """
    check_numbers(settings)
    recipe = RECIPES["sample" if images.source["name"] == "sample" else "other"].copy()
    recipe |= {name: getattr(settings, name) for name in recipe if getattr(settings, name) is not None}
    if settings.schedule == "constant" and settings.warm_up_epochs is None:
        recipe["warm_up_epochs"] = 0
    if recipe["warm_up_epochs"] >= recipe["epochs"] and settings.warm_up_epochs is None:
        recipe["warm_up_epochs"] = recipe["epochs"] / 10
    if recipe["warm_up_epochs"] >= recipe["epochs"]:
        raise SettingsError(
            f"--warm_up_epochs {recipe['warm_up_epochs']:g} must be fewer than --epochs {recipe['epochs']}"
        )
    if settings.augment_magnitude is not None and not recipe["augment_operations"]:
        raise SettingsError("--augment_magnitude has no effect without --augment_operations")
    augmentation = Augmentation(
        flip=settings.flip,
        crop_padding=recipe["crop_padding"],
        rotation_degrees=settings.rotation_degrees,
        operations=recipe["augment_operations"],
        magnitude=Augmentation.magnitude if settings.augment_magnitude is None else settings.augment_magnitude,
        cutout=settings.cutout,
        mixup_alpha=settings.mixup_alpha,
        cutmix_alpha=settings.cutmix_alpha,
        label_smoothing=recipe["label_smoothing"],
    )
    augmentation.check(images.image_size)
    return recipe, augmentation


def make_plan(settings: Any, images: ImageSet) -> Plan:
    """Check the settings against each other, the data and this machine, and fill in what they leave open.

    Raises:
        SettingsError: values out of range, settings that exclude each other or have no effect, kernels that cannot run.
    """
    recipe, augmentation = make_recipe(settings, images)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu")
    device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    side = images.image_size
    tree, image_size, patch_size = choose_tokens(settings, side)
    shape = {name: getattr(settings, name) for name in SHAPE if getattr(settings, name) is not None}
    patch = tree.min_patch if tree else patch_size
    shape |= {"num_classes": len(images.class_names), "patch_values": 3 * patch * patch}
    shape["num_tokens"] = tree.num_tokens if tree else (image_size // patch_size) ** 2
    if tree is not None:
        if settings.positions == "learned":
            raise SettingsError("--positions learned needs a regular grid; with --tokens mixed leave it out")
        shape["positions"] = "centres"
    config = vit_config(recipe["model_size"], **shape)
    weight, layers = check_decatt(settings, config)
    config = replace(config, decorrelated_layers=layers)
    config = vit_config(recipe["model_size"], **vars(config))
    precision, backend, notes = choose_precision_and_kernel(settings, config, device)
    config = replace(config, attention_backend=backend)
    reason = checkpointing.unsupported_reason(
        config.gradient_checkpointing, backend, device, dropout=config.attention_dropout
    )
    if reason is not None:
        raise SettingsError(f"--gradient_checkpointing: {reason}")
    if settings.compile_scope is not None and not settings.use_compile:
        raise SettingsError("--compile_scope has no effect without --use_compile true")
    if settings.compile_scope == "block" and config.gradient_checkpointing != "none":
        raise SettingsError("--compile_scope block cannot follow --gradient_checkpointing; use --compile_scope model")
    if settings.use_cuda_graphs:
        reason = cuda_graphs_refusal(device, precision)
        if reason is None and config.gradient_checkpointing != "none" and not settings.use_compile:
            reason = "the random state that checkpointing keeps cannot be recorded; add --use_compile true"
        if reason is not None:
            raise SettingsError(f"--use_cuda_graphs true: {reason}")
    if settings.checkpoint_every is not None and config.gradient_checkpointing != "every_k":
        raise SettingsError("--checkpoint_every has no effect without --gradient_checkpointing every_k")
    if config.checkpoint_every < 2:
        raise SettingsError(
            f"--checkpoint_every must be at least 2, not {config.checkpoint_every}; 1 is --gradient_checkpointing block"
        )
    return Plan(
        device=device,
        precision=precision,
        model=config,
        model_size=recipe["model_size"],
        tokens=settings.tokens,
        image_size=image_size,
        patch_size=patch_size,
        tree=tree,
        scorer=None if tree is None else settings.scorer or SCORERS[0],
        augmentation=augmentation,
        batch_size=recipe["batch_size"],
        epochs=recipe["epochs"],
        optimizer=recipe["optimizer"],
        learning_rate=recipe["learning_rate"],
        warm_up_epochs=recipe["warm_up_epochs"],
        decatt_weight=weight,
        use_compile=bool(settings.use_compile),
        use_cuda_graphs=bool(settings.use_cuda_graphs),
        seeds=read_seeds(settings.seeds or "0"),
        notes=notes,
    )


def choose_tokens(settings: Any, side: int) -> tuple[Quadtree | None, int, int]:
    """The quadtree (None for a regular grid), the side of the image that is cut, and the side of a uniform patch.

    Mixed tokens of a small image are cut out of the image at twice its size, so that the smallest patch has as many
    numbers as a uniform one.

    Raises:
        SettingsError: settings of the other kind of tokens, or sides that do not fit.
    """
    if settings.tokens == "mixed":
        if settings.patch_size is not None:
            raise SettingsError("--patch_size belongs to --tokens uniform; mixed tokens have --min_patch, --max_patch")
        image_size = 16 * math.ceil(side / 8) if settings.image_size is None else settings.image_size
        smallest = max(1, image_size // 16) if settings.min_patch is None else settings.min_patch
        largest = 4 * smallest if settings.max_patch is None else settings.max_patch
        count = 64 if settings.num_tokens is None else settings.num_tokens
        if settings.scorer_epochs is not None and settings.scorer != "trained":
            raise SettingsError("--scorer_epochs has no effect without --scorer trained")
        tree = quadtree(image_size, smallest, largest, count)
        if settings.scorer == "trained" and any(size % STRIDE for size in tree.sizes[:-1]):
            raise SettingsError(
                f"--scorer trained has a feature every {STRIDE} pixels and needs patches above --min_patch that are "
                f"multiples of {STRIDE}; raise --image_size or --min_patch"
            )
        return tree, image_size, smallest
    for name in (*MIXED, "scorer_epochs"):
        if getattr(settings, name) is not None:
            raise SettingsError(f"--{name} has no effect without --tokens mixed")
    image_size = side if settings.image_size is None else settings.image_size
    divisors = [size for size in range(1, image_size + 1) if image_size % size == 0]
    default = min(divisors, key=lambda size: abs(size - image_size / 8))
    patch_size = default if settings.patch_size is None else settings.patch_size
    if image_size % patch_size:
        words = ", ".join(str(size) for size in divisors if size <= image_size / 2)
        raise SettingsError(f"--patch_size {patch_size} does not divide images of {image_size} pixels; take {words}")
    return None, image_size, patch_size


def check_decatt(settings: Any, config: ViTConfig) -> tuple[float, int]:
    """Weight of DeCAtt's term and how many of the first layers it is taken from; (0, 0) without it."""
    if settings.decatt_weight is None:
        if settings.decatt_layers is not None:
            raise SettingsError("--decatt_layers has no effect without --decatt_weight")
        return 0.0, 0
    if not 0 < settings.decatt_weight < float("inf"):
        raise SettingsError(f"--decatt_weight must be above 0 and finite, not {settings.decatt_weight:g}")
    if settings.decatt_layers is not None and settings.decatt_layers < 1:
        raise SettingsError(f"--decatt_layers must be at least 1, not {settings.decatt_layers}")
    return settings.decatt_weight, settings.decatt_layers or config.num_layers


def choose_precision_and_kernel(settings: Any, config: ViTConfig, device: torch.device) -> tuple[str, str, list[str]]:
    """Precision, attention backend and what to tell the reader about them.

    Raises:
        SettingsError: both ways to name a kernel, or a kernel or precision that cannot run here.
    """
    if settings.use_flash_attention and settings.attention_backend is not None:
        raise SettingsError("--use_flash_attention and --attention_backend exclude each other; give one of them")
    if settings.use_compile and settings.attention_backend in ("flex", "flash_attn_3", "flash_attn_4"):
        raise SettingsError(
            f"--attention_backend {settings.attention_backend} compiles itself or switches PyTorch's kernels, which "
            "--use_compile true cannot follow; leave one of them out"
        )
    precision = settings.precision
    if precision is None:
        can = device.type == "cuda" and precision_refusal("bf16", device) is None
        precision = "bf16" if can else "fp32"
    set_precision(precision, device)
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    dropout, notes = config.attention_dropout, []
    if settings.use_flash_attention:
        if dtype == torch.float32 and device.type == "cuda":
            raise SettingsError(
                f"--use_flash_attention true with --precision {precision}: flash kernels exist for bf16 and fp16 only; "
                "use --precision bf16"
            )
        backend = choose_flash_backend(device, dtype, FULL, config.head_dim, dropout)
        notes.append(f"--use_flash_attention true: attention_backend {backend}")
        if backend != "flash_attn":
            reason = unsupported_reason("flash_attn", device, dtype, FULL, config.head_dim, causal=False)
            notes[-1] += f" ({reason.split('; take attention_backend')[0]})"
        return precision, backend, notes
    options = {"tokens": config.sequence_length, "causal": False, "dropout_p": dropout}
    backend = settings.attention_backend or "auto"
    if backend == "auto":
        backend, why = choose_backend(device, dtype, FULL, config.head_dim, packed=True, **options)
        notes.append(f"attention auto: {backend} ({why})")
    reason = unsupported_reason(backend, device, dtype, FULL, config.head_dim, **options)
    if reason is not None:
        raise SettingsError(f"--attention_backend {backend} cannot run here: {reason}")
    return precision, backend, notes


def default_run_name(settings: Any, plan: Plan, data: str) -> str:
    """Named after the data and the techniques, such as cifar10-small-bf16-flash_attn-mixed-49-decatt-10."""
    parts = [data, plan.model_size, plan.precision, plan.model.attention_backend]
    parts += ["compiled"] if plan.use_compile else []
    parts += ["recorded"] if plan.use_cuda_graphs else []
    if plan.model.gradient_checkpointing != "none":
        parts.append(plan.model.gradient_checkpointing)
    if plan.tree is not None:
        parts += ["mixed", str(plan.tree.num_tokens), plan.scorer]
    elif plan.model.num_tokens != 64:
        parts += ["grid", str(plan.model.num_tokens)]
    parts += [settings.optimizer] if settings.optimizer else []
    if plan.decatt_weight:
        parts += ["decatt", f"{plan.decatt_weight:g}"]
    return "-".join(parts)
