"""What the settings of patchtst_train.py mean on this machine: every check of them, and what they leave open.

Device, precision, attention kernel, model shape and recipe are decided here, before anything is loaded or written, so
that patchtst_train.py itself reads as settings, loop and results.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import head_pruning
from attention_support import FULL, choose_backend, choose_flash_backend, unsupported_reason
from patchtst import PatchTSTConfig, patchtst_config
from precision import AUTOCAST_DTYPES, set_precision
from utils import SettingsError, read_seeds

ATTENTION_TYPES = ("vanilla", "flash", "auto")
SCHEDULES = ("constant", "decay", "onecycle")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
TRAINING = ("batch_size", "epochs", "patience", "learning_rate", "schedule", "warm_up_share")

# The official scripts' values by dataset: shape of the model (for --model_variant official) and training.
SMALL = {"embedding_dim": 16, "num_heads": 4, "ffn_dim": 128, "dropout": 0.3}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ETTh": (SMALL, {"batch_size": 128, "epochs": 100, "patience": 100, "learning_rate": 1e-4, "schedule": "decay"}),
    "ETTm": (
        {},
        {"batch_size": 128, "epochs": 100, "patience": 20, "learning_rate": 1e-4, "schedule": "onecycle"}
        | {"warm_up_share": 0.4},
    ),
    "traffic": (
        {},
        {"batch_size": 24, "epochs": 100, "patience": 10, "learning_rate": 1e-4, "schedule": "onecycle"}
        | {"warm_up_share": 0.2},
    ),
    "sample": (
        SMALL | {"context_length": 96, "horizon": 24, "dropout": 0.1},
        {"batch_size": 64, "epochs": 8, "patience": 3, "learning_rate": 2e-3, "schedule": "decay"},
    ),
    "other": (SMALL, {"batch_size": 128, "epochs": 100, "patience": 10, "learning_rate": 1e-4, "schedule": "decay"}),
}
SHAPE = (
    "context_length", "horizon", "patch_length", "patch_stride", "num_layers", "embedding_dim", "num_heads", "ffn_dim",
    "dropout", "head_dropout", "norm", "norm_position", "positions",
)  # fmt: skip
DYNAMIC = ("prune_rounds", "prune_every_epochs", "prune_learning_rate", "prune_importance")
MAX_WORKERS = 256  # processes
PRUNING = ("prune_heads_per_layer", "prune_mode", *DYNAMIC)


@dataclass
class Plan:
    """What the settings mean on this machine."""

    device: torch.device
    precision: str
    model: PatchTSTConfig
    batch_size: int
    epochs: int
    patience: int
    learning_rate: float
    schedule: str
    warm_up_share: float
    seeds: list[int]
    heads_to_prune: int  # of each layer
    prune_rounds: int
    notes: list[str]


def recipe_of(dataset: str | None, data_path: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and training values of a dataset's official script; those of the sample or of any other series."""
    if dataset is None:
        return RECIPES["sample" if data_path is None else "other"]
    return RECIPES[dataset if dataset in RECIPES else dataset[:4]]


def make_plan(settings: Any) -> Plan:
    """Check the settings against each other and this machine, and fill in what they leave open.

    Raises:
        SettingsError: values out of range, settings that exclude each other or have no effect, kernels that cannot run.
    """
    for name in ("batch_size", "epochs", "patience", "learning_rate", "tracked_steps", "log_every"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < float("inf"):
            raise SettingsError(f"--{name} must be above 0 and finite, not {value}")
    if settings.max_steps is not None and settings.max_steps < 1:
        raise SettingsError(f"--max_steps must be at least 1, not {settings.max_steps}")
    if not 0 <= settings.weight_decay < float("inf"):
        raise SettingsError(f"--weight_decay must be at least 0 and finite, not {settings.weight_decay}")
    if settings.num_workers is not None and not 0 <= settings.num_workers <= MAX_WORKERS:
        raise SettingsError(f"--num_workers must be from 0 to {MAX_WORKERS}, not {settings.num_workers}")
    for name in ("experiment", "run_name"):
        value = getattr(settings, name)
        if value is not None and (value in ("", ".", "..") or Path(value).name != value or len(value) > 200):
            raise SettingsError(f"--{name} must be one folder name of at most 200 characters, not '{value[:80]}'")
    if settings.use_compile and settings.attention_backend in ("flex", "flash_attn_3", "flash_attn_4"):
        raise SettingsError(
            f"--attention_backend {settings.attention_backend} compiles itself or switches PyTorch's kernels, which "
            "--use_compile true cannot follow; leave one of them out"
        )
    if settings.compile_mode is not None and not settings.use_compile:
        raise SettingsError("--compile_mode has no effect without --use_compile true")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu")
    device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    if settings.compile_mode == "reduce-overhead" and device.type == "cpu":
        raise SettingsError(
            "--compile_mode reduce-overhead is CUDA graphs and has no effect without a GPU; leave it out"
        )

    shape, training = recipe_of(settings.dataset, settings.data_path)
    shape = shape if settings.model_variant == "official" else {}  # another variant brings its own shape
    given = {name: getattr(settings, name) for name in SHAPE if getattr(settings, name) is not None}
    if "patch_length" in given and "patch_stride" not in given and settings.model_variant == "transformers":
        given["patch_stride"] = given["patch_length"]  # patches that do not overlap, as that variant's
    config = patchtst_config(settings.model_variant, **(shape | given))
    values = {"patience": None, "warm_up_share": None} | training
    values |= {name: getattr(settings, name) for name in TRAINING if getattr(settings, name) is not None}
    if values["schedule"] != "onecycle":
        if settings.warm_up_share is not None:
            raise SettingsError("--warm_up_share has no effect without --schedule onecycle")
        values["warm_up_share"] = 0.0
    elif not 0 < (values["warm_up_share"] or 0.3) < 1:
        raise SettingsError(f"--warm_up_share is a share between 0 and 1, not {values['warm_up_share']}")
    values["warm_up_share"] = 0.3 if values["warm_up_share"] is None else values["warm_up_share"]
    if settings.evaluate_on == "none" and settings.patience is not None:
        raise SettingsError("--patience has no effect with --evaluate_on none: without validation nothing stops early")

    precision, backend, notes = choose_precision_and_kernel(settings, config, device)
    heads, rounds = check_pruning(settings, config)
    config = replace(config, attention_backend=backend)
    return Plan(
        device=device,
        precision=precision,
        model=config,
        seeds=read_seeds(settings.seeds or "0"),
        heads_to_prune=heads,
        prune_rounds=rounds,
        notes=notes,
        **values,
    )


def choose_precision_and_kernel(
    settings: Any, config: PatchTSTConfig, device: torch.device
) -> tuple[str, str, list[str]]:
    """Precision, attention backend and what to tell the reader about them.

    Raises:
        SettingsError: both ways to name a kernel, or a kernel or precision that cannot run here.
    """
    if settings.attn_type is not None and settings.attention_backend is not None:
        raise SettingsError("--attn_type and --attention_backend exclude each other; give one of them")
    kind = settings.attn_type or ("auto" if settings.attention_backend is None else "by name")
    precision = settings.precision or ("bf16" if kind == "flash" and device.type == "cuda" else "fp32")
    set_precision(precision, device)
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    notes = []
    if kind == "flash":
        if dtype == torch.float32 and device.type == "cuda":
            raise SettingsError(
                f"--attn_type flash with --precision {precision}: flash kernels exist for bf16 and fp16 only; leave "
                "--precision out or use bf16"
            )
        backend = choose_flash_backend(device, dtype, FULL, config.head_dim)
        notes.append(f"--attn_type flash: attention_backend {backend}")
        if backend != "flash_attn":
            reason = unsupported_reason("flash_attn", device, dtype, FULL, config.head_dim, causal=False)
            notes[-1] += f" ({reason.split('; take attention_backend')[0]})"
        return precision, backend, notes
    if kind == "vanilla":
        return precision, "eager", notes
    backend = settings.attention_backend or "auto"
    if backend == "auto":
        options = {"tokens": config.num_patches, "causal": False, "packed": True}
        backend, why = choose_backend(device, dtype, FULL, config.head_dim, **options)
        notes.append(f"attention auto: {backend} ({why})")
    options = {"causal": False, "tokens": config.num_patches}
    reason = unsupported_reason(backend, device, dtype, FULL, config.head_dim, **options)
    if reason is not None:
        raise SettingsError(f"--attention_backend {backend} cannot run here: {reason}")
    return precision, backend, notes


def check_pruning(settings: Any, config: PatchTSTConfig) -> tuple[int, int]:
    """Heads to remove from each layer, and in how many rounds.

    Raises:
        SettingsError: settings of pruning that have no effect or leave no head.
    """
    if settings.prune is None:
        for name in PRUNING:
            if getattr(settings, name) is not None:
                raise SettingsError(f"--{name} has no effect without --prune {'|'.join(head_pruning.METHODS)}")
        return 0, 0
    if settings.evaluate_on == "none":
        raise SettingsError("--prune compares errors, so it needs --evaluate_on test; leave --evaluate_on out")
    if settings.prune == "dynamic" and settings.max_steps is not None:
        raise SettingsError("--max_steps would end --prune dynamic before heads are removed; give --epochs instead")
    if settings.prune != "dynamic":
        for name in DYNAMIC:
            if getattr(settings, name) is not None:
                raise SettingsError(f"--{name} has no effect with --prune {settings.prune}; it belongs to dynamic")
    heads = settings.prune_heads_per_layer
    if heads is None:
        heads = 1 if settings.prune == "static_conservative" else min(5, config.num_heads - 1)
    least = 0 if settings.prune == "dynamic" else 1  # 0 is the control: the same further training of the whole model
    if not least <= heads < config.num_heads:
        raise SettingsError(
            f"--prune_heads_per_layer must be from {least} to {config.num_heads - 1} (a layer has {config.num_heads} "
            f"heads), not {heads}"
        )
    rounds = max(1, min(5, heads or 5)) if settings.prune_rounds is None else settings.prune_rounds
    if rounds < 1 or (heads and rounds > heads):
        raise SettingsError(f"--prune_rounds must be from 1 to the {heads} heads that are removed, not {rounds}")
    if settings.prune_every_epochs is not None and settings.prune_every_epochs < 1:
        raise SettingsError(f"--prune_every_epochs must be at least 1, not {settings.prune_every_epochs}")
    rate = settings.prune_learning_rate
    if rate is not None and not 0 < rate < float("inf"):
        raise SettingsError(f"--prune_learning_rate must be above 0 and finite, not {rate:g}")
    return heads, rounds if settings.prune == "dynamic" else 1


def default_run_name(settings: Any, plan: Plan) -> str:
    """Named after the data and what differs from the defaults, such as ETTm1-96-bf16-flash_attn-patch-12."""
    model = plan.model
    data = settings.dataset or ("sample" if settings.data_path is None else Path(settings.data_path).name.split(".")[0])
    parts = [data, str(model.horizon), plan.precision, model.attention_backend]
    parts += ["compiled"] if settings.use_compile else []
    if settings.model_variant != "official":
        parts.append(settings.model_variant)
    for name, word in (("patch_length", "patch"), ("batch_size", "batch"), ("num_workers", "workers")):
        if getattr(settings, name) is not None:
            parts += [word, str(getattr(settings, name))]
    if settings.prune is not None:
        parts += [settings.prune.replace("_", "-"), str(plan.heads_to_prune)]
    return "-".join(parts)
