"""What the settings of llm_train.py mean on this machine: every check of them, and what they leave open.

Device, precision, attention kernel, model shape, batch size and memory budget are decided here, before anything is
loaded or written, so that llm_train.py itself reads as settings, loop and results.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import checkpointing
import cross_entropy
import optimizers
import tensorboard_log
from attention_support import FULL, choose_backend, choose_flash_backend, parse_window, unsupported_reason
from cross_entropy import CHUNK_TOKENS
from dataset import TextData
from parallel import check_batches, check_parallel
from precision import AUTOCAST_DTYPES, FP8_MULTIPLE, fp8_unsupported_reason, set_precision
from transformer_based_llm import SHAPE, ModelConfig, model_config, type_of_size
from utils import GIB, SettingsError

MUST_BE_POSITIVE = (
    "batch_size", "max_batch_size", "memory_budget_gib", "tokens_per_update", "epochs", "max_steps", "log_every",
    "max_training_minutes", "checkpoint_every_minutes", "learning_rate", "tracked_steps", "measured_steps",
    "loss_chunk_tokens", "checkpoint_every",
)  # fmt: skip
NOT_COMPILED = ("flex", "flash_attn_3", "flash_attn_4")  # they compile themselves or switch PyTorch's kernels


@dataclass
class Plan:
    """What the settings mean on this machine."""

    device: torch.device
    precision: str
    model: ModelConfig
    model_size: str
    loss: str
    loss_chunk_tokens: int
    use_compile: bool
    autocast_precision: str  # fp32 (no autocast) where the parameters themselves are bf16
    fp8: dict[str, Any] | None  # what precision.convert_to_fp8 is given; None without FP8
    batch_size: int
    search_margin: float  # share of the memory that a search leaves free
    capacity_gib: float  # of the GPU or the budget
    limit_bytes: int | None  # budget for live tensors without a GPU; on a GPU the allocator keeps it
    notes: list[str]
    world_size: int = 1  # processes; the batch size is that of all of them together


def make_plan(settings: Any, world_size: int = 1) -> Plan:
    """Check the settings against each other and this machine, and fill in what they leave open.

    Raises:
        SettingsError: values out of range, settings that exclude each other or have no effect, kernels that cannot run.
    """
    for name in MUST_BE_POSITIVE:
        value = getattr(settings, name)
        if value is not None and not 0 < value < float("inf"):
            raise SettingsError(f"--{name} must be above 0 and finite, not {value}")
    for name in ("weight_decay", "warm_up_steps", "seed", "split_seed", "profile_steps"):
        if not 0 <= getattr(settings, name) < 2**63:
            raise SettingsError(f"--{name} must be at least 0 and below 2^63, not {getattr(settings, name)}")
    for name in ("experiment", "run_name"):
        value = getattr(settings, name)
        if value is not None and (value in ("", ".", "..") or Path(value).name != value or len(value) > 200):
            raise SettingsError(f"--{name} must be one folder name of at most 200 characters, not '{value[:80]}'")
    if settings.search_margin is not None and not 0 <= settings.search_margin < 1:
        raise SettingsError(f"--search_margin is a share from 0 to below 1, not {settings.search_margin}")
    for name in ("batch_size_search", "max_batch_size", "search_margin"):
        if getattr(settings, name) is not None and not settings.adjust_batch_size:
            raise SettingsError(f"--{name} has no effect without --adjust_batch_size true")
    if settings.use_flash_attention and settings.attention_backend is not None:
        raise SettingsError("--use_flash_attention true and --attention_backend exclude each other; give one of them")
    if settings.use_fp16 and settings.precision not in (None, "bf16"):
        raise SettingsError(f"--use_fp16 true means bf16 and contradicts --precision {settings.precision}; give one")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu")

    notes = []
    if settings.optimizer == "adam" and settings.weight_decay > 0:
        notes.append(
            f"adam adds weight_decay {settings.weight_decay} to the gradient (L2), which can hold learning back: "
            "compare the perplexity with the unigram's; --optimizer adamw decays the weights instead"
        )
    device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    half = settings.use_flash_attention or settings.use_fp16 or settings.parameters != "fp32"
    precision = settings.precision or ("bf16" if half else "fp32")
    if settings.use_fp16:
        notes.append(
            "--use_fp16 is the plwiki lab's name for BF16 autocast: this run is bf16 (real fp16: --precision fp16)"
        )
    set_precision(precision, device)

    check_techniques(settings, precision, device)
    model_size = settings.model_size
    if model_size == "auto":
        auto_sizes = {"transformer": ("gpt2", "tiny"), "llama": ("llama-1b", "llama-tiny")}
        model_size = auto_sizes[settings.model_type][device.type != "cuda"]
    if type_of_size(model_size) != settings.model_type:
        raise SettingsError(
            f"--model_size {model_size} is a {type_of_size(model_size)}, and --model_type is {settings.model_type}; "
            f"add --model_type {type_of_size(model_size)}"
        )
    window = parse_window(settings.attention_window)
    shape = {name: getattr(settings, name) for name in SHAPE}
    model = model_config(
        model_size,
        **shape,
        dropout=settings.dropout,
        attention_window=window,
        gradient_checkpointing="block" if settings.use_gradient_checkpointing else settings.gradient_checkpointing,
        checkpoint_every=settings.checkpoint_every,
        gelu=settings.gelu,
    )
    if window != FULL and not (window[1] == 0 and 0 <= window[0] < model.context_length - 1):
        raise SettingsError(
            f"--attention_window {settings.attention_window} would hide nothing that the causal mask shows: use LEFT,0 "
            f"with LEFT below {model.context_length - 1} (context length - 1)"
        )
    if device.type == "cpu" and not settings.expandable_segments:
        raise SettingsError("--expandable_segments false has no effect without a GPU; leave it out")
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    if settings.use_flash_attention:
        if precision in ("fp32", "tf32") and device.type == "cuda":
            raise SettingsError(
                f"--use_flash_attention true with --precision {precision}: flash kernels exist for bf16 and fp16 "
                "only; leave --precision out or use bf16"
            )
        backend = choose_flash_backend(device, dtype, window, model.head_dim, model.dropout)
        notes.append(f"--use_flash_attention: attention_backend {backend}")
        if backend != "flash_attn":
            reason = unsupported_reason("flash_attn", device, dtype, window, model.head_dim)
            notes[-1] += f" ({reason.split('; take attention_backend')[0]})"
    else:
        backend = settings.attention_backend or "sdpa"
        if backend == "auto":
            backend, why = choose_backend(
                device,
                dtype,
                window,
                model.head_dim,
                tokens=model.context_length,
                packed=True,
                dropout_p=model.dropout,
            )
            notes.append(f"--attention_backend auto: {backend} ({why})")
        reason = unsupported_reason(backend, device, dtype, window, model.head_dim, dropout_p=model.dropout)
        if reason is not None:
            raise SettingsError(f"--attention_backend {backend} cannot run here: {reason}")
        if backend == "eager" and window != FULL:
            notes.append(
                "eager attention computes all scores and masks them: this window changes the result, saves nothing"
            )
    model = model_config(model_size, **(asdict(model) | {"attention_backend": backend}))
    reason = checkpointing.unsupported_reason(model.gradient_checkpointing, backend, device, model.dropout)
    if reason is not None:
        raise SettingsError(f"--gradient_checkpointing {model.gradient_checkpointing} cannot run here: {reason}")
    if settings.use_compile and backend in NOT_COMPILED:
        raise SettingsError(
            f"--use_compile true has not been made to work with attention_backend {backend}; take sdpa or flash_attn"
        )

    if settings.tokens_per_update is not None and settings.tokens_per_update % model.context_length:
        raise SettingsError(
            f"--tokens_per_update {settings.tokens_per_update} is not a multiple of the context length "
            f"{model.context_length}"
        )
    default_batch = 8 if model_size.endswith("tiny") else 64 if settings.model_type == "transformer" else 4
    batch_size = settings.batch_size or default_batch
    if settings.tokens_per_update is not None and batch_size * model.context_length > settings.tokens_per_update:
        if settings.batch_size is not None:
            raise SettingsError(
                f"--batch_size {batch_size} x {model.context_length} tokens is more than --tokens_per_update "
                f"{settings.tokens_per_update}; lower one or raise the other"
            )
        batch_size = settings.tokens_per_update // model.context_length
    if settings.optimizer_in_backward and settings.tokens_per_update and settings.adjust_batch_size:
        raise SettingsError(
            "--optimizer_in_backward true makes an update of every batch, and how many batches --tokens_per_update is "
            "depends on what --adjust_batch_size true will find; leave one of them out"
        )
    if settings.optimizer_in_backward and (settings.tokens_per_update or 0) > batch_size * model.context_length:
        raise SettingsError(
            "--optimizer_in_backward true drops each gradient at once, so an update is one batch: --tokens_per_update "
            f"must not be above --batch_size x context length ({batch_size} x {model.context_length})"
        )
    if settings.parameters != "fp32" and (settings.tokens_per_update or 0) > batch_size * model.context_length:
        notes.append(
            f"--parameters {settings.parameters}: gradients are bf16, so the sum over the batches of an update is "
            "rounded to bf16 after each of them"
        )
    check_batches(batch_size, settings.tokens_per_update, model.context_length, world_size)
    if settings.max_batch_size is not None and batch_size > settings.max_batch_size:
        if settings.batch_size is not None:
            raise SettingsError(f"--batch_size {batch_size} is above --max_batch_size {settings.max_batch_size}")
        batch_size = settings.max_batch_size
    fp8 = plan_fp8(settings, precision, model.context_length)
    margin = settings.search_margin
    if margin is None:
        margin = 0.01 if device.type == "cuda" else 0.0  # counted live tensors have no pieces to fit in
    capacity = settings.memory_budget_gib
    if device.type == "cuda":
        limit_bytes = None
        capacity = capacity or torch.cuda.get_device_properties(device).total_memory / GIB
    else:
        free = psutil.virtual_memory().available / GIB
        capacity = capacity or (free / 2 if settings.adjust_batch_size else None)
        limit_bytes = None if capacity is None else int(capacity * GIB)
    return Plan(
        device=device,
        precision=precision,
        model=model,
        model_size=model_size,
        loss=settings.loss,
        loss_chunk_tokens=settings.loss_chunk_tokens
        or min(CHUNK_TOKENS, -(-batch_size // world_size * model.context_length // 8)),
        use_compile=settings.use_compile,
        autocast_precision=precision if settings.parameters == "fp32" else "fp32",
        fp8=fp8,
        batch_size=batch_size,
        search_margin=margin,
        capacity_gib=capacity or free,
        limit_bytes=limit_bytes,
        notes=notes,
        world_size=world_size,
    )


def check_techniques(settings: Any, precision: str, device: torch.device) -> None:
    """Raise where a technique's settings exclude each other, have no effect, or cannot run on this device."""
    if settings.use_gradient_checkpointing and settings.gradient_checkpointing not in (None, "block"):
        raise SettingsError(
            "--use_gradient_checkpointing true means block and contradicts "
            f"--gradient_checkpointing {settings.gradient_checkpointing}; give one"
        )
    if settings.checkpoint_every is not None and settings.gradient_checkpointing != "every_k":
        raise SettingsError("--checkpoint_every has no effect without --gradient_checkpointing every_k")
    if settings.loss_chunk_tokens is not None and settings.loss != "chunked":
        raise SettingsError("--loss_chunk_tokens has no effect without --loss chunked")
    reason = cross_entropy.unsupported_reason(settings.loss, device)
    if reason is not None:
        raise SettingsError(f"--loss {settings.loss} cannot run here: {reason}")
    if settings.parallel is not None:
        check_parallel(settings)
    reason = optimizers.unsupported_reason(
        settings.optimizer, settings.parameters, settings.optimizer_in_backward, device
    )
    if reason is not None:
        raise SettingsError(f"--optimizer {settings.optimizer} cannot run here: {reason}")
    if precision == "fp8":
        reason = fp8_unsupported_reason(device, settings.use_compile, settings.fp8_emulation)
        if reason is not None:
            raise SettingsError(f"--precision fp8 cannot run here: {reason}")
        if settings.gelu != "plain":
            raise SettingsError(
                f"--gelu {settings.gelu} multiplies with the MLP's weights itself, in 16 bits: --precision fp8 would "
                "miss the largest layers; leave one of them out"
            )
    if settings.parameters != "fp32" and precision not in ("bf16", "fp8"):
        raise SettingsError(f"--parameters {settings.parameters} are bf16 and contradict --precision {precision}")
    if settings.optimizer_in_backward and precision == "fp16":
        raise SettingsError(
            "--optimizer_in_backward true updates before fp16's gradient scaler has seen all gradients; use "
            "--precision bf16"
        )
    if settings.tensorboard and (reason := tensorboard_log.missing_reason()) is not None:
        raise SettingsError(f"--tensorboard true: {reason}")
    if settings.profile_steps and device.type != "cuda":
        raise SettingsError("--profile_steps reads the GPU's kernels and there is no GPU here; leave it out")
    if settings.activation_memory_budget is not None:
        if not settings.use_compile:
            raise SettingsError("--activation_memory_budget has no effect without --use_compile true")
        if settings.use_gradient_checkpointing or settings.gradient_checkpointing not in (None, "none"):
            raise SettingsError(
                "--activation_memory_budget lets the compiler choose what to recompute, --gradient_checkpointing says "
                "it; give one of them"
            )
    counted = settings.adjust_batch_size or settings.memory_budget_gib is not None
    if device.type == "cpu" and counted and settings.optimizer == "adamw_8bit":
        raise SettingsError(
            "--adjust_batch_size and --memory_budget_gib count live tensors without a GPU, and those inside torchao's "
            "compiled step cannot be counted; use --optimizer adamw"
        )
    if not settings.use_compile:
        return
    if settings.gradient_checkpointing == "offload":
        raise SettingsError("--gradient_checkpointing offload moves tensors between blocks, and --use_compile has none")
    if settings.optimizer_in_backward:
        raise SettingsError(
            "--optimizer_in_backward true saves nothing with --use_compile true: a compiled backward pass returns all "
            "gradients at once; leave one of them out"
        )
    if device.type == "cpu" and counted:
        raise SettingsError(
            "--adjust_batch_size and --memory_budget_gib count live tensors without a GPU, and compiled code cannot be "
            "counted; leave --use_compile out"
        )


def plan_fp8(settings: Any, precision: str, context_length: int) -> dict[str, Any] | None:
    """What `precision.convert_to_fp8` is to be given; None without FP8. Raises where an FP8 setting has no effect."""
    if precision != "fp8":
        for name, default in (
            ("fp8_recipe", None),
            ("fp8_layers", None),
            ("fp8_head", False),
            ("fp8_emulation", False),
        ):
            if getattr(settings, name) != default:
                raise SettingsError(f"--{name} has no effect without --precision fp8")
        return None
    if settings.fp8_head and settings.loss != "full":
        raise SettingsError(
            f"--fp8_head true has no effect with --loss {settings.loss}, which multiplies with the head's weight "
            "itself; leave one of them out"
        )
    if context_length % FP8_MULTIPLE and not settings.fp8_emulation:
        raise SettingsError(
            f"--precision fp8 needs numbers of tokens that {FP8_MULTIPLE} divides, and --context_length is "
            f"{context_length}; round it"
        )

    def skip(name: str) -> str | None:
        return "--fp8_head is false" if name == "head" and not settings.fp8_head else None

    return {
        "recipe": settings.fp8_recipe or "tensorwise",
        "layers": settings.fp8_layers or "all",
        "skip": skip,
        "emulated": settings.fp8_emulation,
    }


def default_run_name(settings: Any, plan: Plan) -> str:
    """The techniques of a run, such as tiny-bf16-flash_attn-window-(64,0)-batch-125."""
    parts = [plan.precision, plan.model.attention_backend]
    if plan.fp8 is not None:
        parts[0] += f"-{plan.fp8['recipe']}" + ("-emulated" if plan.fp8["emulated"] else "")
        parts[0] += ("-large" if plan.fp8["layers"] == "large" else "") + ("-head" if settings.fp8_head else "")
    if plan.model.attention_window != FULL:
        parts.append("window-({},{})".format(*plan.model.attention_window))
    if plan.model.gradient_checkpointing == "block":
        parts.append("gradient-checkpointing")
    elif plan.model.gradient_checkpointing != "none":
        parts.append(f"{plan.model.gradient_checkpointing}-checkpointing")
    if settings.loss != "full":
        parts.append(f"{settings.loss}-loss")
    if settings.gelu != "plain":
        parts.append(f"{settings.gelu}-gelu")
    if settings.use_compile:
        parts.append("compile")
    if settings.activation_memory_budget is not None:
        parts.append(f"memory-budget-{settings.activation_memory_budget}")
    if settings.optimizer != "adamw":
        parts.append(settings.optimizer)
    if settings.optimizer_in_backward:
        parts.append("in-backward")
    if settings.parameters != "fp32":
        parts.append(settings.parameters)
    if settings.dropout:
        parts.append(f"dropout-{settings.dropout}")
    if settings.deterministic:
        parts.append("deterministic")
    if settings.parallel is not None:
        parts.append(f"{settings.parallel}-{plan.world_size}")
    parts.append("batch-max" if settings.adjust_batch_size else f"batch-{plan.batch_size}")
    if settings.tokens_per_update:
        parts.append(f"update-{settings.tokens_per_update}")
    return "-".join([plan.model_size, *parts])


def check_corpus(data: TextData, plan: Plan, settings: Any) -> None:
    """Raise unless the training split fills an update and the split for the metrics has something to predict."""
    context_length = plan.model.context_length
    windows = data.splits["train"].num_windows(context_length)
    if windows < 1 or (settings.evaluate_on != "none" and len(data.splits[settings.evaluate_on].tokens) < 2):
        raise SettingsError(
            f"{data.description['description']}: shorter than one context of {context_length} tokens after the "
            "80/10/10 split; use more text or a smaller --context_length"
        )
    tokens = settings.tokens_per_update or plan.batch_size * context_length
    if tokens // context_length <= windows:
        return
    if settings.batch_size is None and settings.tokens_per_update is None and windows >= plan.world_size:
        windows -= windows % plan.world_size
        plan.batch_size = windows
        plan.notes.append(f"the training split has only {windows} sequences: batch size {windows}")
        return
    flag = "tokens_per_update" if settings.tokens_per_update else "batch_size"
    raise SettingsError(
        f"--{flag} asks for {tokens // context_length} sequences an update, but the training split has only {windows}; "
        f"lower --{flag} or use more text"
    )
