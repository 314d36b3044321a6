"""What runs where and what `auto` picks, on GPUs that are only pretended."""

import importlib.util
import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import attention_support
from attention_support import (
    BACKENDS,
    FLASH_IMPLEMENTATIONS,
    FULL,
    SDPA_KERNELS,
    WINDOWED,
    WITHOUT_DROPOUT,
    choose_backend,
    choose_flash_backend,
    flash_attn_wheel,
    parse_window,
    unsupported_reason,
)
from utils import SettingsError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WINDOW = (64, 0)
HOPPER, AMPERE, BLACKWELL, TURING = (9, 0), (8, 0), (10, 0), (7, 5)
find_spec = importlib.util.find_spec
CACHED = [function for function in vars(attention_support).values() if hasattr(function, "cache_clear")]


@pytest.fixture(autouse=True)
def no_memory():
    """What was found out about one pretended machine is forgotten on the next."""
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """gpu(HOPPER, without=["flash_attn"]): such a GPU; what is not in `without` is there and agrees to everything."""

    def pretend(capability, without=()):
        def missing(name):
            return f"{name} is missing" if name in without else None

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(attention_support, "flash_attn_error", lambda: missing("flash_attn"))
        monkeypatch.setattr(attention_support, "varlen_error", lambda: missing("varlen"))
        monkeypatch.setattr(attention_support, "flash_implementation_error", missing)
        monkeypatch.setattr(attention_support, "pytorch_refusal", lambda backend, *others: missing(backend))
        triton = None if missing("triton") else SimpleNamespace(name="triton")
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *others: triton if name == "triton" else find_spec(name, *others)
        )
        choose_backend.cache_clear()

    return pretend


def chosen(*args, tokens=1024, **options):
    return choose_backend(*args, tokens=tokens, **options)[0]


def test_the_lists_fit_together():
    assert set(SDPA_KERNELS) | set(FLASH_IMPLEMENTATIONS) | set(WINDOWED) | set(WITHOUT_DROPOUT) <= set(BACKENDS)
    assert "auto" not in BACKENDS
    assert not set(SDPA_KERNELS) & set(WINDOWED)


# --------------------------------------------------------------------------------------------------------- auto's table


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_hopper_takes_cudnn(gpu, dtype, causal, packed):
    gpu(HOPPER)
    for tokens in (1024, 4096, 32768):
        assert choose_backend(CUDA, dtype, FULL, 64, tokens=tokens, causal=causal, packed=packed) == (
            "sdpa_cudnn",
            "the fastest kernel on Hopper",
        )
    assert chosen(CUDA, dtype, FULL, 64, tokens=64, causal=causal, packed=False) == "sdpa_cudnn"


@pytest.mark.parametrize(
    ("causal", "tokens", "expected"),
    [
        (True, 1, "flash_attn"),
        (True, 256, "flash_attn"),
        (True, 257, "flash_attn"),
        (True, 512, "flash_attn"),
        (True, 513, "sdpa_cudnn"),
        (False, 1, "flash_attn"),
        (False, 256, "flash_attn"),
        (False, 257, "sdpa_cudnn"),
        (False, 512, "sdpa_cudnn"),
    ],
)
def test_hopper_trains_short_contexts_out_of_one_packed_tensor_with_flash_attn(gpu, causal, tokens, expected):
    gpu(HOPPER)
    choice, why = choose_backend(CUDA, BF16, FULL, 64, tokens=tokens, causal=causal, packed=True)
    assert choice == expected
    assert ("short context" in why) == (expected == "flash_attn")
    assert chosen(CUDA, BF16, FULL, 64, tokens=tokens, causal=causal, packed=True, training=False) == "sdpa_cudnn"
    assert chosen(CUDA, BF16, FULL, 64, tokens=tokens, causal=causal, packed=False) == "sdpa_cudnn"
    gpu(HOPPER, without=["flash_attn"])
    assert chosen(CUDA, BF16, FULL, 64, tokens=tokens, causal=causal, packed=True) == "sdpa_cudnn"


@pytest.mark.parametrize(
    ("without", "expected", "why"),
    [
        (["sdpa_cudnn"], "flash_attn", "sdpa_cudnn cannot run here"),
        (["sdpa_cudnn", "flash_attn"], "sdpa_flash", "sdpa_cudnn, flash_attn cannot run here"),
        (["sdpa_cudnn", "flash_attn", "sdpa_flash"], "sdpa_efficient", "sdpa_cudnn, flash_attn, sdpa_flash cannot"),
        (["sdpa_cudnn", "flash_attn", "sdpa_flash", "sdpa_efficient"], "sdpa", "sdpa_efficient cannot run here"),
    ],
)
def test_what_hopper_takes_instead(gpu, without, expected, why):
    gpu(HOPPER, without)
    for packed, tokens in ((False, 1024), (True, 1024)):
        choice, reason = choose_backend(CUDA, BF16, FULL, 64, packed=packed, tokens=tokens)
        assert choice == expected and why in reason


@pytest.mark.parametrize("capability", [HOPPER, AMPERE, (8, 6), (8, 9), BLACKWELL, (12, 0)])
@pytest.mark.parametrize("tokens", [64, 1024])
def test_every_gpu_takes_the_same_with_a_window(gpu, capability, tokens):
    def with_window(**options):
        return choose_backend(CUDA, BF16, WINDOW, options.pop("head_dim", 64), tokens=tokens, packed=True, **options)

    gpu(capability)
    assert with_window() == ("flash_attn", "the fastest kernel with a window")
    gpu(capability, without=["flash_attn"])
    assert with_window() == ("varlen", "flash_attn cannot run here")
    assert with_window(head_dim=20) == ("flex", "flash_attn, varlen cannot run here")  # varlen goes in steps of 8
    assert with_window(head_dim=12) == ("eager", "flash_attn, varlen, flex cannot run here")  # flex begins at 16
    gpu(capability, without=["flash_attn", "varlen"])
    assert with_window() == ("flex", "flash_attn, varlen cannot run here")
    gpu(capability, without=["flash_attn", "varlen", "triton"])
    assert with_window() == ("eager", "flash_attn, varlen, flex cannot run here")


@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
def test_dropout_with_a_window(gpu, capability):
    gpu(capability)
    assert chosen(CUDA, BF16, WINDOW, 64, dropout_p=0.1) == "flash_attn"
    gpu(capability, without=["flash_attn"])
    assert chosen(CUDA, BF16, WINDOW, 64, dropout_p=0.1) == "eager"


@pytest.mark.parametrize("capability", [HOPPER, AMPERE, TURING])
def test_fp32_takes_the_efficient_kernel(gpu, capability):
    gpu(capability)
    for packed, tokens in ((True, 256), (False, 1024)):
        choice, why = choose_backend(CUDA, FP32, FULL, 64, packed=packed, tokens=tokens)
        assert choice == "sdpa_efficient" and "cannot run here" in why
    assert chosen(CUDA, FP32, WINDOW, 64) == "flex"
    gpu(capability, without=["sdpa_efficient", "triton"])
    assert chosen(CUDA, FP32, FULL, 64) == "sdpa"
    assert chosen(CUDA, FP32, WINDOW, 64) == "eager"


@pytest.mark.parametrize("capability", [AMPERE, (8, 6), (8, 9), BLACKWELL, (12, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_other_gpus_take_flash_attn_unmeasured(gpu, capability, packed):
    for tokens in (64, 512, 4096):
        gpu(capability)
        assert choose_backend(CUDA, BF16, FULL, 64, tokens=tokens, packed=packed) == (
            "flash_attn",
            "not measured on this GPU",
        )
        gpu(capability, without=["flash_attn"])
        choice, why = choose_backend(CUDA, BF16, FULL, 64, tokens=tokens, packed=packed)
        assert choice == "sdpa_flash" and "flash_attn cannot run here" in why


def test_other_gpus_say_so_without_flash_attn_too(gpu):
    gpu(AMPERE, without=["flash_attn"])
    assert "not measured" in choose_backend(CUDA, BF16, FULL, 64, tokens=1024)[1]


def test_old_gpus_take_the_efficient_kernel(gpu):
    gpu(TURING)
    assert chosen(CUDA, FP16, FULL, 64) == "sdpa_efficient"


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("packed", [False, True])
def test_a_cpu_takes_sdpa_and_eager_with_a_window(dtype, packed):
    for tokens, causal in ((1, True), (128, True), (128, False), (4096, True)):
        options = {"tokens": tokens, "causal": causal, "packed": packed}
        assert choose_backend(CPU, dtype, FULL, 64, **options) == ("sdpa", "PyTorch's choice without a GPU")
        assert chosen(CPU, dtype, FULL, 64, **options, training=False, dropout_p=0.1) == "sdpa"
        assert choose_backend(CPU, dtype, WINDOW, 64, **options)[0] == "eager"
        assert chosen(CPU, dtype, WINDOW, 64, **options, dropout_p=0.1) == "eager"


def test_a_cpu_takes_eager_with_a_window_without_gradients_too():
    assert chosen(CPU, FP32, WINDOW, 64, training=False) == "eager"


@pytest.mark.parametrize("head_dim", [8, 12, 64, 256, 512])
@pytest.mark.parametrize("window", [FULL, WINDOW, (3, 2)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("capability", [HOPPER, AMPERE, TURING])
def test_what_auto_picks_can_run(gpu, capability, dropout_p, window, head_dim):
    for without in ([], ["flash_attn"], ["flash_attn", "varlen", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient"]):
        gpu(capability, without)
        for dtype in (BF16, FP32):
            options = {"dropout_p": dropout_p, "tokens": 128}
            choice = chosen(CUDA, dtype, window, head_dim, **options)
            assert unsupported_reason(choice, CUDA, dtype, window, head_dim, **options) is None


def test_the_choice_is_remembered(gpu, monkeypatch):
    """`auto` asks before every call: it may not cost a call."""
    gpu(HOPPER)
    asked = []
    monkeypatch.setattr(attention_support, "pytorch_refusal", lambda *args: asked.append(args))
    for _ in range(3):
        chosen(CUDA, BF16, FULL, 64)
    assert len(asked) == 1


# -------------------------------------------------------------------------------------------------------------- reasons

ANY_DTYPE = ["eager", "sdpa", "sdpa_math", "sdpa_efficient", "flex"]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in FLASH_IMPLEMENTATIONS])
def test_a_gpu_with_everything_refuses_nothing(gpu, backend):
    gpu(HOPPER)
    assert unsupported_reason(backend, CUDA, BF16) is None
    assert (unsupported_reason(backend, CUDA, BF16, WINDOW) is None) == (backend in WINDOWED)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ANY_DTYPE])
def test_fp32_is_refused_with_the_setting_to_change(gpu, backend):
    gpu(HOPPER)
    assert unsupported_reason(backend, CUDA, FP32) == (
        f"{backend}'s kernels run in bf16 or fp16, not torch.float32; change --precision"
    )


@pytest.mark.parametrize("backend", ANY_DTYPE)
def test_fp32_runs_elsewhere(gpu, backend):
    gpu(HOPPER)
    assert unsupported_reason(backend, CUDA, FP32) is None


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ANY_DTYPE])
def test_old_gpus_are_refused(gpu, backend):
    gpu(TURING)
    assert unsupported_reason(backend, CUDA, FP16) == f"{backend} needs compute capability 8.0, this GPU has 7.5"


@pytest.mark.parametrize("backend", ANY_DTYPE)
def test_old_gpus_run_the_rest(gpu, backend):
    gpu(TURING)
    assert unsupported_reason(backend, CUDA, FP16) is None


@pytest.mark.parametrize(
    ("backend", "capability", "reason"),
    [
        ("flash_attn_3", HOPPER, None),
        ("flash_attn_4", HOPPER, None),
        ("flash_attn_4", BLACKWELL, None),
        ("flash_attn_3", AMPERE, "flash_attn_3 needs compute capability 9.x, this GPU has 8.0"),
        ("flash_attn_3", BLACKWELL, "flash_attn_3 needs compute capability 9.x, this GPU has 10.0"),
        ("flash_attn_4", AMPERE, "flash_attn_4 needs compute capability 9.x or 10.x, this GPU has 8.0"),
        ("flash_attn_4", (12, 0), "flash_attn_4 needs compute capability 9.x or 10.x, this GPU has 12.0"),
    ],
)
def test_gpus_of_flash_attn_3_and_4(gpu, backend, capability, reason):
    gpu(capability)
    assert unsupported_reason(backend, CUDA, BF16) == unsupported_reason(backend, CUDA, BF16, WINDOW) == reason
    if reason is None:
        gpu(capability, without=[backend])
        assert unsupported_reason(backend, CUDA, BF16) == f"{backend} is missing"


@pytest.mark.parametrize(
    ("backend", "module", "remedy"),
    [
        ("flash_attn_3", "flash_attn_interface", "build it from the hopper folder of the flash-attention repository"),
        ("flash_attn_4", "flash_attn.cute.interface", "install it with `uv pip install flash-attn-4`"),
    ],
)
def test_packages_of_flash_attn_3_and_4(monkeypatch, backend, module, remedy):
    error = attention_support.flash_implementation_error
    name = FLASH_IMPLEMENTATIONS[backend][0]
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: [name], raising=False)
    for part in ("flash_attn", "flash_attn.cute", module):
        monkeypatch.setitem(sys.modules, part, SimpleNamespace(__path__=[]))
    assert error(backend) is None
    error.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    assert error(backend).startswith(f"the package of {backend} is not installed (")
    assert remedy in error(backend)
    assert "\n" not in error(backend)
    for function in (list, None):  # a torch that knows other kernels only, and one that knows none
        error.cache_clear()
        if function is None:
            monkeypatch.delattr(torch.nn.attention, "list_flash_attention_impls")
        else:
            monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", function)
        assert error(backend) == (
            f"{backend} needs a torch that can activate {name} (2.11 or newer), this is {torch.__version__}"
        )


def test_flash_attn_without_its_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", None)
    reason = attention_support.flash_attn_error()
    assert reason.startswith("flash-attn is not installed with its kernels (")
    assert "install it with `uv sync --extra flash`" in reason
    attention_support.flash_attn_error.cache_clear()
    for name in ("flash_attn_2_cuda", "flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    assert attention_support.flash_attn_error() is None


def test_varlen_of_older_torch(monkeypatch):
    error = attention_support.varlen_error
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert error() == f"varlen needs torch 2.11, this is {torch.__version__}"
    error.cache_clear()
    monkeypatch.setitem(
        sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=lambda query, key, is_causal: None)
    )
    assert error() == f"varlen has its window since torch 2.11, this is {torch.__version__}"
    error.cache_clear()
    monkeypatch.setitem(
        sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=lambda query, key, window_size: None)
    )
    assert error() is None


@pytest.mark.parametrize(
    ("backend", "head_dim", "reason"),
    [
        ("flash_attn", 8, None),
        ("flash_attn", 12, None),  # it pads
        ("flash_attn", 256, None),
        ("flash_attn", 264, "flash_attn takes heads up to 256 wide, not 264"),
        ("varlen", 8, None),
        ("varlen", 256, None),
        ("varlen", 12, "varlen takes heads up to 256 wide in steps of 8, not 12"),
        ("varlen", 264, "varlen takes heads up to 256 wide in steps of 8, not 264"),
        ("flex", 16, None),
        ("flex", 15, "flex takes heads from 16 wide up on a GPU, not 15"),
        ("eager", 1000, None),
    ],
)
def test_widths_of_heads(gpu, backend, head_dim, reason):
    gpu(HOPPER)
    assert unsupported_reason(backend, CUDA, BF16, FULL, head_dim) == reason


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in WINDOWED])
def test_no_window(gpu, backend):
    gpu(HOPPER)
    sentence = f"attention_window needs attention_backend flash_attn, varlen or flex; {backend} has no window"
    for device, dropout_p in ((CPU, 0.0), (CUDA, 0.0), (CUDA, 0.1)):
        assert unsupported_reason(backend, device, BF16, (2, 0), dropout_p=dropout_p) == sentence


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(gpu, backend):
    gpu(HOPPER)
    reason = unsupported_reason(backend, CUDA, BF16, dropout_p=0.1)
    assert (reason is not None) == (backend in WITHOUT_DROPOUT)
    if reason is not None:
        assert reason == (
            f"{backend} has no attention dropout; set --dropout 0 or take attention_backend sdpa or flash_attn"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_cpu(backend):
    reason = unsupported_reason(backend, CPU, FP32)
    if backend in ("eager", "sdpa", "sdpa_math", "sdpa_flash"):
        assert reason is None
    elif backend == "flex":
        assert "without gradients only" in reason
        assert unsupported_reason(backend, CPU, FP32, training=False) is None
        assert unsupported_reason(backend, CPU, FP32, WINDOW, training=False) is None
    else:
        assert reason == f"{backend} needs an NVIDIA GPU"


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("eager", "sdpa", "sdpa_math")])
def test_on_a_device_of_another_kind(backend):
    assert "needs an NVIDIA GPU" in unsupported_reason(backend, torch.device("mps"), BF16)


def test_flex_needs_triton(gpu):
    gpu(HOPPER, without=["triton"])
    assert unsupported_reason("flex", CUDA, BF16).startswith("flex needs an NVIDIA GPU with the triton package")


@pytest.mark.parametrize("backend", ["sdpa_flash", "sdpa_efficient", "sdpa_cudnn"])
def test_pytorch_is_asked_with_these_tensors(gpu, monkeypatch, backend):
    gpu(HOPPER)
    asked = []
    monkeypatch.setattr(attention_support, "pytorch_refusal", lambda *args: asked.append(args) or "no")
    assert unsupported_reason(backend, CUDA, BF16, FULL, 80, causal=False, dropout_p=0.1, tokens=99) == "no"
    assert asked == [(backend, CUDA, BF16, 80, False, 0.1, 99)]


@pytest.mark.parametrize(
    ("backend", "check"),
    [
        ("sdpa_flash", "can_use_flash_attention"),
        ("sdpa_efficient", "can_use_efficient_attention"),
        ("sdpa_cudnn", "can_use_cudnn_attention"),
    ],
)
def test_what_pytorch_says_against_a_kernel(monkeypatch, backend, check):
    asked = []

    def says(allowed, *sentences):
        def answer(params, debug):
            asked.append(params)
            for sentence in sentences if debug else ():
                warnings.warn(sentence, stacklevel=1)
            return allowed

        for name in ("can_use_flash_attention", "can_use_efficient_attention", "can_use_cudnn_attention"):
            monkeypatch.setattr(torch.backends.cuda, name, answer if name == check else None)
        attention_support.pytorch_refusal.cache_clear()
        return attention_support.pytorch_refusal(backend, CPU, BF16, 80, True, 0.25, 99)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what PyTorch says is for the sentence, not for the screen
        assert says(True, "ignored") is None
        assert says(False) == f"PyTorch refuses {backend}: without a reason"
        first = "Flash attention\n kernel not used because: (Triggered internally at sdp_utils.cpp:42.)"
        second = "Head dim 80 is odd (Triggered internally at sdp_utils.cpp:43.)"
        assert says(False, first, second) == (
            f"PyTorch refuses {backend}: Flash attention kernel not used because: Head dim 80 is odd"
        )
    params = asked[-1]
    assert tuple(params.query.shape) == tuple(params.key.shape) == tuple(params.value.shape) == (1, 1, 99, 80)
    assert (params.query.dtype, params.query.requires_grad) == (BF16, True)
    assert (params.is_causal, params.dropout, params.attn_mask) == (True, 0.25, None)


def test_the_name_of_a_wheel(monkeypatch):
    pattern = r"flash_attn-\*\+cu\d+torch\d+\.\d+cxx11abi(TRUE|FALSE)-cp3\d+-cp3\d+-\w+\.whl"
    assert re.fullmatch(pattern, flash_attn_wheel())
    release = "https://github.com/Dao-AILab/flash-attention/releases/download/v2.8.3/"  # one that is there
    real = release + "flash_attn-2.8.3+cu12torch2.8cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch, "__version__", "2.8.0+cu128")
    monkeypatch.setattr(torch, "compiled_with_cxx11_abi", lambda: True)
    monkeypatch.setattr(sys, "version_info", SimpleNamespace(major=3, minor=12))
    monkeypatch.setattr(attention_support.platform, "system", lambda: "Linux")
    monkeypatch.setattr(attention_support.platform, "machine", lambda: "x86_64")
    assert flash_attn_wheel() == real.rpartition("/")[2].replace("2.8.3", "*", 1)
    monkeypatch.setattr(torch.version, "cuda", None)  # a torch without CUDA
    assert re.fullmatch(pattern, flash_attn_wheel())


# ------------------------------------------------------------------------------------------------ --use_flash_attention


@pytest.mark.parametrize(
    ("capability", "without", "window", "dropout_p", "expected"),
    [
        (HOPPER, [], FULL, 0.0, "flash_attn"),
        (HOPPER, [], FULL, 0.1, "flash_attn"),
        (HOPPER, [], WINDOW, 0.1, "flash_attn"),
        (HOPPER, ["flash_attn"], FULL, 0.0, "sdpa_flash"),
        (HOPPER, ["flash_attn"], FULL, 0.1, "sdpa_flash"),
        (HOPPER, ["flash_attn"], WINDOW, 0.0, "varlen"),
        (AMPERE, ["flash_attn"], FULL, 0.0, "sdpa_flash"),
        (AMPERE, ["flash_attn"], WINDOW, 0.0, "varlen"),
    ],
)
def test_choice_of_the_flash_kernel(gpu, capability, without, window, dropout_p, expected):
    gpu(capability, without)
    for dtype in (BF16, FP16):
        assert choose_flash_backend(CUDA, dtype, window, 64, dropout_p) == expected


def test_choice_of_the_flash_kernel_on_a_cpu():
    assert choose_flash_backend(CPU, BF16, FULL, 64) == "sdpa_flash"


@pytest.mark.parametrize(
    ("device", "capability", "without", "dtype", "window", "dropout_p", "reasons"),
    [
        (CUDA, TURING, [], FP16, FULL, 0.0, ["flash_attn needs compute capability 8.0", "sdpa_flash needs compute"]),
        (CUDA, HOPPER, [], FP32, FULL, 0.0, ["flash_attn's kernels run in bf16 or fp16", "sdpa_flash's kernels run"]),
        (CUDA, HOPPER, ["flash_attn", "varlen"], BF16, WINDOW, 0.0, ["flash_attn is missing", "varlen is missing"]),
        (CUDA, HOPPER, ["flash_attn"], BF16, WINDOW, 0.1, ["flash_attn is missing", "varlen has no attention dropout"]),
        (CPU, HOPPER, [], BF16, WINDOW, 0.0, ["flash_attn needs an NVIDIA GPU", "varlen needs an NVIDIA GPU"]),
        (CPU, HOPPER, [], BF16, FULL, 0.1, ["flash_attn needs an NVIDIA GPU", "sdpa_flash has no dropout on a CPU"]),
    ],
)
def test_no_flash_kernel_says_why(gpu, device, capability, without, dtype, window, dropout_p, reasons):
    gpu(capability, without)
    sentence = "--use_flash_attention true cannot run here: " + ".*; ".join(map(re.escape, reasons))
    with pytest.raises(SettingsError, match=sentence):
        choose_flash_backend(device, dtype, window, 64, dropout_p)


# -------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("text", ["64", "a,b", "1,2,3", "-2,0", "0,-2", "64,", "1.5,0", ""])
def test_bad_window(text):
    with pytest.raises(SettingsError, match="attention_window"):
        parse_window(text)


def test_good_window():
    assert parse_window("64,0") == parse_window("(64, 0)") == (64, 0)
    assert parse_window("-1,3") == (-1, 3)
    assert parse_window(None) == parse_window("-1,-1") == FULL
