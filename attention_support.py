"""Which attention backends run on this machine with these tensors, why the others do not, and which one `auto` picks.

`attention.py` holds the backends themselves; here is what each of them asks for. A backend asked for by name runs or is
an error with the reason and the remedy; nothing else is put in its place. Only `auto` chooses, by the rule in
`choose_backend`, and says what it chose.

    python attention.py     prints the verdict for every backend on this machine

Sources: flash-attn 2.8.3 and PyTorch 2.11 and 2.15, read and tried; the rule for Hopper: outputs/attention_benchmark.
"""

import functools
import importlib
import importlib.util
import inspect
import platform
import sys
import warnings

import torch
from torch.nn.attention import SDPBackend

from short_attention import interpreted, short_attention_refusal
from utils import SettingsError

# Name -> what it is. The order is the one of tables and figures.
BACKENDS = {
    "eager": "textbook: matmul, fp32 softmax, matmul; all scores in memory",
    "sdpa": "torch scaled_dot_product_attention, PyTorch picks the kernel",
    "sdpa_math": "the same, unfused kernel forced",
    "sdpa_flash": "the same, PyTorch's copy of FlashAttention-2 forced",
    "sdpa_efficient": "the same, xFormers' memory-efficient kernel forced",
    "sdpa_cudnn": "the same, cuDNN's fused kernel forced",
    "flash_attn": "the flash-attn package (FlashAttention-2)",
    "flash_attn_3": "FlashAttention-3 through torch's activate_flash_attention_impl",
    "flash_attn_4": "FlashAttention-4 through torch's activate_flash_attention_impl",
    "varlen": "torch.nn.attention.varlen: a fused kernel with a window, without the package",
    "flex": "torch flex_attention, compiled for the mask",
    "short": "this lab's kernel for sequences of up to 128 tokens (short_attention.py)",
}
SDPA_KERNELS = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
# Backend -> (name in PyTorch's registry, module that has the kernels, compute capabilities, how to get it).
FLASH_IMPLEMENTATIONS = {
    "flash_attn_3": (
        "FA3",
        "flash_attn_interface",
        (9,),
        "build it from the hopper folder of the flash-attention repository (H100 or H800, CUDA 12.3)",
    ),
    "flash_attn_4": (
        "FA4",
        "flash_attn.cute.interface",
        (9, 10),
        "install it with `uv pip install flash-attn-4` (Hopper or Blackwell)",
    ),
}
WINDOWED = ("eager", "flash_attn", "flash_attn_3", "flash_attn_4", "varlen", "flex")
WITHOUT_DROPOUT = ("flash_attn_3", "flash_attn_4", "varlen", "flex", "short")
SHARES_HEADS = ("sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attn")  # take fewer heads of keys and values as they are
MAX_SEQUENCES = 65535  # an axis of a CUDA grid; these kernels lay the sequences of a batch along one
LIMITED_SEQUENCES = ("sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attn", "flash_attn_3", "flash_attn_4")
FULL = (-1, -1)  # no window: every key that the causal rule allows
INSTALL_FLASH_ATTN = "install it with `uv sync --extra flash` (Linux, NVIDIA GPU, CUDA 12 or newer)"


@functools.cache
def flash_attn_error() -> str | None:
    """Why the flash-attn package cannot be imported with its kernels; None if it can."""
    try:
        importlib.import_module("flash_attn_2_cuda")
        importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError as error:
        return f"flash-attn is not installed with its kernels ({' '.join(str(error).split())}); {INSTALL_FLASH_ATTN}"
    return None


def flash_attn_wheel() -> str:
    """File name, with a star for the version, of the flash-attn release wheel that fits this Python and torch.

    Source: the naming in flash-attn's setup.py, https://github.com/Dao-AILab/flash-attention/blob/main/setup.py
    """
    cuda = (torch.version.cuda or "12").split(".")[0]
    release = ".".join(torch.__version__.split(".")[:2])
    abi = str(torch.compiled_with_cxx11_abi()).upper()
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    system = f"{platform.system().lower()}_{platform.machine()}"
    return f"flash_attn-*+cu{cuda}torch{release}cxx11abi{abi}-{python}-{python}-{system}.whl"


@functools.cache
def varlen_error() -> str | None:
    """Why torch.nn.attention.varlen cannot be used; None if it can."""
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return f"varlen needs torch 2.11, this is {torch.__version__}; take attention_backend flash_attn or flex"
    if "window_size" not in inspect.signature(varlen.varlen_attn).parameters:
        needed = "varlen has its window since torch 2.11"
        return f"{needed}, this is {torch.__version__}; take attention_backend flash_attn or flex"
    return None


@functools.cache
def flash_implementation_error(backend: str) -> str | None:
    """Why FlashAttention-3 or -4 cannot be activated in this process; None if it can."""
    name, module, _, remedy = FLASH_IMPLEMENTATIONS[backend]
    registered = getattr(torch.nn.attention, "list_flash_attention_impls", list)()
    if name not in registered:
        needed = f"{backend} needs a torch that can activate {name} (2.11 or newer)"
        return f"{needed}, this is {torch.__version__}; take attention_backend auto"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"the package of {backend} is not installed ({' '.join(str(error).split())}); {remedy}"
    return None


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # the answer is kept, and depends on whether gradients are wanted: here they are
@torch.enable_grad()
def pytorch_refusal(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool, dropout_p: float, tokens: int
) -> str | None:
    """What PyTorch's own check says against one of its CUDA kernels; None if it would run."""
    check = {
        "sdpa_flash": torch.backends.cuda.can_use_flash_attention,
        "sdpa_efficient": torch.backends.cuda.can_use_efficient_attention,
        "sdpa_cudnn": torch.backends.cuda.can_use_cudnn_attention,
    }[backend]
    q = torch.empty(1, tokens, 1, head_dim, device=device, dtype=dtype, requires_grad=True).transpose(1, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        allowed = check(torch.backends.cuda.SDPAParams(q, q, q, None, dropout_p, causal, False), debug=True)
    if allowed:
        return None
    reasons = [" ".join(str(warning.message).split()).split(" (Triggered internally")[0] for warning in caught]
    return f"PyTorch refuses {backend}: {' '.join(reasons) or 'without a reason'}; take attention_backend sdpa or auto"


def unsupported_reason(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    window: tuple[int, int] = FULL,
    head_dim: int = 64,
    *,
    causal: bool = True,
    dropout_p: float = 0.0,
    training: bool = True,
    tokens: int = 128,
) -> str | None:
    """Why a backend cannot run on this device with these tensors; None if it can.

    Args:
        backend: one of BACKENDS.
        device: where the tensors lie.
        dtype: of q, k and v as they reach the kernel (under autocast: the autocast type).
        window: (left, right) as `attention.py` defines it; -1 is unlimited.
        head_dim: width of a head.
        causal: a query sees no later key.
        dropout_p: probability of dropping an attention weight.
        training: whether a backward pass follows.
        tokens: length of a sequence.
    """
    if backend in ("eager", "sdpa", "sdpa_math"):
        if window != FULL and backend != "eager":
            return window_refusal(backend)
        return None
    if window != FULL and backend not in WINDOWED:
        return window_refusal(backend)
    if dropout_p > 0 and backend in WITHOUT_DROPOUT:
        return f"{backend} has no attention dropout; set --dropout 0 or take attention_backend sdpa or flash_attn"
    if backend == "flex":
        return _flex_refusal(device, head_dim, training)
    if backend == "short" and device.type == "cpu" and interpreted():
        return short_attention_refusal(dtype, tokens, head_dim)
    if device.type != "cuda":
        if backend == "sdpa_flash" and device.type == "cpu":
            if dropout_p > 0:
                return "sdpa_flash has no dropout on a CPU; set --dropout 0 or take attention_backend sdpa"
            return None
        return f"{backend} needs an NVIDIA GPU; take attention_backend sdpa, or eager for a window"
    half = dtype in (torch.bfloat16, torch.float16)
    if not half and backend not in ("sdpa_efficient", "short"):
        return f"{backend}'s kernels run in bf16 or fp16, not {dtype}; change --precision"
    capability = torch.cuda.get_device_capability(device)
    if backend != "sdpa_efficient" and capability < (8, 0):
        return (
            f"{backend} needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}; "
            "take attention_backend sdpa_efficient, or eager for a window"
        )
    if backend == "short":
        return short_attention_refusal(dtype, tokens, head_dim)
    if backend in FLASH_IMPLEMENTATIONS:
        wanted = FLASH_IMPLEMENTATIONS[backend][2]
        if capability[0] not in wanted:
            names = " or ".join(f"{major}.x" for major in wanted)
            seen = f"{capability[0]}.{capability[1]}"
            return f"{backend} needs compute capability {names}, this GPU has {seen}; take attention_backend auto"
        return flash_implementation_error(backend)
    if backend in ("flash_attn", "varlen"):
        missing = flash_attn_error() if backend == "flash_attn" else varlen_error()
        if missing is not None:
            return missing
        if head_dim > 256 or (backend == "varlen" and head_dim % 8):
            steps = " in steps of 8" if backend == "varlen" else ""
            return f"{backend} takes heads up to 256 wide{steps}, not {head_dim}; change --num_heads or --embedding_dim"
        return None
    return pytorch_refusal(backend, device, dtype, head_dim, causal, dropout_p, tokens)


def sequences_refusal(backend: str, device: torch.device, sequences: int) -> str | None:
    """Why a backend cannot take that many sequences at once; None if it can.

    Seen on an H100 with PyTorch 2.11 and flash-attn 2.8.3: 65,535 ran, 70,000 were invalid arguments of a launch. The
    memory-efficient and the short kernel have no such limit.
    """
    if device.type != "cuda" or backend not in LIMITED_SEQUENCES or sequences <= MAX_SEQUENCES:
        return None
    return (
        f"{backend} takes at most {MAX_SEQUENCES:,} sequences at once, not {sequences:,}; take attention_backend "
        "sdpa_efficient, or smaller batches"
    )


def window_refusal(backend: str) -> str:
    """The sentence for a window that a backend does not have."""
    return (
        f"attention_window needs attention_backend flash_attn, varlen or flex (without a GPU: eager); {backend} has no "
        "window"
    )


def _flex_refusal(device: torch.device, head_dim: int, training: bool) -> str | None:
    if device.type == "cpu":
        no_backward = "flex has no backward pass on a CPU; take attention_backend sdpa, or eager for a window"
        return no_backward if training else None
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return (
            "flex needs an NVIDIA GPU with the triton package (part of PyTorch on Linux), or a CPU for inference; "
            "take attention_backend sdpa, or eager for a window"
        )
    if head_dim < 16:
        return f"flex takes heads from 16 wide up on a GPU, not {head_dim}; change --num_heads or --embedding_dim"
    return None


@functools.lru_cache(maxsize=256)
def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    window: tuple[int, int] = FULL,
    head_dim: int = 64,
    *,
    tokens: int,
    causal: bool = True,
    packed: bool = False,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[str, str]:
    """The backend that `auto` means, and why: the first of a short measured list that can run.

    Measured on an H100 (outputs/attention_benchmark; a test holds the rule against those numbers). Without a window
    cuDNN's kernel is the fastest of all, with two exceptions. Up to a context of 128 (64 without a backward pass) the
    memory-efficient kernel wins, whose tiles are the smallest, and in training narrow heads of a packed tensor are
    fastest in this lab's own (outputs/techniques/short_attention). And where training takes q, k and v out of a packed
    tensor and the context is a few whole tiles of 128, the copy that joins the three gradients costs more than cuDNN
    gains; flash-attn's packed kernel writes them in place. With a window flash-attn skips tiles best. Other GPUs have
    not been measured; their order is that of the FlashAttention-2 paper.

    Args:
        tokens: length of a sequence.
        packed: q, k and v are parts of one tensor (`packed_attention`).
        Others as in `unsupported_reason`.

    Returns:
        (backend, why) in which `why` is a phrase for a log.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if window != FULL and device.type == "cuda":
        candidates, why = ["flash_attn", "varlen", "flex", "eager"], "fastest first with a window"
    elif window != FULL:
        candidates, why = ["eager"], "the only one with a window that trains without a GPU"
    elif device.type != "cuda":
        candidates, why = ["sdpa"], "PyTorch's choice without a GPU"
    elif hopper and packed and training and tokens in ((256, 384, 512) if causal else (128, 256)):
        candidates = ["flash_attn", "sdpa_cudnn", "sdpa_flash"]
        why = "short context: flash-attn's packed kernel spares joining the gradients of q, k and v"
    elif hopper and packed and training and tokens <= 64 and head_dim <= 16 and dtype != torch.float32:
        candidates = ["short", "sdpa_efficient", "sdpa_cudnn", "sdpa_flash"]
        why = "fastest first on Hopper for a short sequence of narrow heads"
    elif hopper and tokens <= (128 if training else 64):
        candidates = ["sdpa_efficient", "sdpa_cudnn", "flash_attn", "sdpa_flash"]
        why = "fastest first on Hopper at so short a context"
    elif hopper:
        candidates, why = ["sdpa_cudnn", "flash_attn", "sdpa_flash"], "fastest first on Hopper"
    else:
        candidates, why = ["flash_attn", "sdpa_flash"], "not measured on this GPU"
    refused = []
    for backend in dict.fromkeys([*candidates, "sdpa_efficient", "sdpa"]):
        reason = unsupported_reason(
            backend,
            device,
            dtype,
            window,
            head_dim,
            causal=causal,
            dropout_p=dropout_p,
            training=training,
            tokens=tokens,
        )
        if reason is None:
            return backend, f"{why}; {', '.join(refused)} cannot run here" if refused else why
        refused.append(backend)
    raise AssertionError("sdpa and eager run everywhere")


def choose_flash_backend(
    device: torch.device, dtype: torch.dtype, window: tuple[int, int], head_dim: int, dropout_p: float = 0.0
) -> str:
    """What `--use_flash_attention true` means here: flash-attn if it can run, else PyTorch's own flash kernel.

    With a window PyTorch's own is `varlen`.

    Raises:
        SettingsError: neither can run; the sentence holds both reasons.
    """
    reasons = []
    for backend in ("flash_attn", "sdpa_flash" if window == FULL else "varlen"):
        reason = unsupported_reason(backend, device, dtype, window, head_dim, dropout_p=dropout_p)
        if reason is None:
            return backend
        reasons.append(reason.split("; take attention_backend")[0])
    raise SettingsError(f"--use_flash_attention true cannot run here: {'; '.join(reasons)}; leave the flag out")


def parse_window(text: str | None) -> tuple[int, int]:
    """Read "64,0" as (64, 0); None is no window.

    Raises:
        SettingsError: not two whole numbers from -1 (unlimited) up.
    """
    if text is None:
        return FULL
    try:
        left, right = (int(part) for part in text.strip("() ").split(","))
    except ValueError:
        left = right = -2
    if left < -1 or right < -1:
        raise SettingsError(f"--attention_window {text} is not two whole numbers from -1 up such as 64,0")
    return left, right
