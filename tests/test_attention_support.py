"""What runs where and what `auto` picks, on GPUs that are only pretended."""

import importlib.util
import itertools
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
NO_GPU = "{} needs an NVIDIA GPU; take attention_backend sdpa, or eager for a window"
FLEX_ON_CPU = "flex has no backward pass on a CPU; take attention_backend sdpa, or eager for a window"
OTHER_HEADS = "; change --num_heads or --embedding_dim"
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


WHY = {
    "sdpa_cudnn": "fastest first on Hopper",
    "sdpa_efficient": "fastest first on Hopper at so short a context",
    "flash_attn": "short context: flash-attn's packed kernel spares joining the gradients of q, k and v",
}
EFFICIENT, CUDNN, FLASH = "sdpa_efficient", "sdpa_cudnn", "flash_attn"
ON_HOPPER = [  # tokens, then: forward only, training, training packed (all keys), training packed (causal)
    (1, EFFICIENT, EFFICIENT, EFFICIENT, EFFICIENT),
    (63, EFFICIENT, EFFICIENT, EFFICIENT, EFFICIENT),
    (64, EFFICIENT, EFFICIENT, EFFICIENT, EFFICIENT),
    (65, CUDNN, EFFICIENT, EFFICIENT, EFFICIENT),
    (127, CUDNN, EFFICIENT, EFFICIENT, EFFICIENT),
    (128, CUDNN, EFFICIENT, FLASH, EFFICIENT),
    (129, CUDNN, CUDNN, CUDNN, CUDNN),
    (192, CUDNN, CUDNN, CUDNN, CUDNN),
    (255, CUDNN, CUDNN, CUDNN, CUDNN),
    (256, CUDNN, CUDNN, FLASH, FLASH),
    (257, CUDNN, CUDNN, CUDNN, CUDNN),
    (384, CUDNN, CUDNN, CUDNN, FLASH),
    (511, CUDNN, CUDNN, CUDNN, CUDNN),
    (512, CUDNN, CUDNN, CUDNN, FLASH),
    (513, CUDNN, CUDNN, CUDNN, CUDNN),
    (640, CUDNN, CUDNN, CUDNN, CUDNN),
    (1024, CUDNN, CUDNN, CUDNN, CUDNN),
    (32768, CUDNN, CUDNN, CUDNN, CUDNN),
]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("row", ON_HOPPER, ids=lambda row: str(row[0]))
def test_what_hopper_takes(gpu, row, dtype):
    tokens, forward, training, packed_all, packed_causal = row

    def choice(**options):
        return choose_backend(CUDA, dtype, FULL, 64, tokens=tokens, **options)

    for without in ([], ["flash_attn"]):
        gpu(HOPPER, without)
        for causal, packed in itertools.product((True, False), (True, False)):
            options = {"causal": causal, "packed": packed}
            assert choice(**options, training=False) == (forward, WHY[forward])
            expected = (packed_causal if causal else packed_all) if packed else training
            if expected in without:
                assert choice(**options) == ("sdpa_cudnn", f"{WHY[expected]}; flash_attn cannot run here")
            else:
                assert choice(**options) == choice(**options, training=True) == (expected, WHY[expected])


def test_every_hopper_is_one_and_no_other_gpu(gpu):
    for capability, expected in (((9, 0), CUDNN), ((9, 1), CUDNN), ((8, 9), FLASH), ((10, 0), FLASH)):
        gpu(capability)
        assert chosen(CUDA, BF16) == expected


def test_dropout_changes_nothing_on_hopper(gpu):
    gpu(HOPPER)
    for tokens, _, training, _, packed_causal in ON_HOPPER:
        assert chosen(CUDA, BF16, tokens=tokens, dropout_p=0.1) == training
        assert chosen(CUDA, BF16, tokens=tokens, dropout_p=0.1, packed=True) == packed_causal


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
    for packed in (False, True):
        choice, reason = choose_backend(CUDA, BF16, FULL, 64, packed=packed, tokens=1024)
        assert choice == expected and why in reason
        assert reason.startswith("fastest first on Hopper; sdpa_cudnn") and reason.endswith(" cannot run here")


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        (["sdpa_efficient"], "sdpa_cudnn"),
        (["sdpa_efficient", "sdpa_cudnn"], "flash_attn"),
        (["sdpa_efficient", "sdpa_cudnn", "flash_attn"], "sdpa_flash"),
        pytest.param(
            ["sdpa_efficient", "sdpa_cudnn", "flash_attn", "sdpa_flash"],
            "sdpa",
        ),
    ],
)
def test_what_hopper_takes_instead_at_a_short_context(gpu, without, expected):
    gpu(HOPPER, without)
    why = f"{WHY['sdpa_efficient']}; {', '.join(without)} cannot run here"
    assert choose_backend(CUDA, BF16, FULL, 64, tokens=64) == (expected, why)


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        (["flash_attn"], "sdpa_cudnn"),
        (["flash_attn", "sdpa_cudnn"], "sdpa_flash"),
        (["flash_attn", "sdpa_cudnn", "sdpa_flash"], "sdpa_efficient"),
        (["flash_attn", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient"], "sdpa"),
    ],
)
def test_what_hopper_takes_instead_of_the_packed_kernel(gpu, without, expected):
    gpu(HOPPER, without)
    why = f"{WHY['flash_attn']}; {', '.join(without)} cannot run here"
    assert choose_backend(CUDA, BF16, FULL, 64, tokens=256, packed=True) == (expected, why)


@pytest.mark.parametrize("capability", [HOPPER, AMPERE, (8, 6), (8, 9), BLACKWELL, (12, 0)])
@pytest.mark.parametrize("tokens", [64, 1024])
def test_every_gpu_takes_the_same_with_a_window(gpu, capability, tokens):
    def with_window(**options):
        return choose_backend(CUDA, BF16, WINDOW, options.pop("head_dim", 64), tokens=tokens, packed=True, **options)

    first = "fastest first with a window"
    gpu(capability)
    assert with_window() == with_window(training=False) == ("flash_attn", first)
    gpu(capability, without=["flash_attn"])
    assert with_window() == ("varlen", f"{first}; flash_attn cannot run here")
    assert with_window(head_dim=20) == (
        "flex",
        f"{first}; flash_attn, varlen cannot run here",
    )  # varlen goes in steps of 8
    assert with_window(head_dim=12) == (
        "eager",
        f"{first}; flash_attn, varlen, flex cannot run here",
    )  # flex begins at 16
    gpu(capability, without=["flash_attn", "varlen"])
    assert with_window() == ("flex", f"{first}; flash_attn, varlen cannot run here")
    gpu(capability, without=["flash_attn", "varlen", "triton"])
    assert with_window() == ("eager", f"{first}; flash_attn, varlen, flex cannot run here")


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
        assert (choice, why) == ("sdpa_flash", "not measured on this GPU; flash_attn cannot run here")


def test_old_gpus_take_the_efficient_kernel(gpu):
    gpu(TURING)
    assert choose_backend(CUDA, FP16, FULL, 64, tokens=1024) == (
        "sdpa_efficient",
        "not measured on this GPU; flash_attn, sdpa_flash cannot run here",
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("packed", [False, True])
def test_a_cpu_takes_sdpa_and_eager_with_a_window(dtype, packed):
    for tokens, causal in ((1, True), (128, True), (128, False), (4096, True)):
        options = {"tokens": tokens, "causal": causal, "packed": packed}
        assert choose_backend(CPU, dtype, FULL, 64, **options) == ("sdpa", "PyTorch's choice without a GPU")
        assert chosen(CPU, dtype, FULL, 64, **options, training=False, dropout_p=0.1) == "sdpa"
        for training, dropout_p in itertools.product((True, False), (0.0, 0.1)):
            assert choose_backend(CPU, dtype, WINDOW, 64, **options, training=training, dropout_p=dropout_p) == (
                "eager",
                "the only one with a window that trains without a GPU",
            )


@pytest.mark.parametrize("head_dim", [8, 12, 64, 256, 512])
@pytest.mark.parametrize("window", [FULL, WINDOW, (3, 2)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("capability", [HOPPER, AMPERE, TURING])
def test_what_auto_picks_can_run(gpu, capability, dropout_p, window, head_dim):
    for without in ([], ["flash_attn"], ["flash_attn", "varlen", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient"]):
        gpu(capability, without)
        for dtype in (BF16, FP32):
            for tokens, packed in ((64, False), (128, True), (1024, False)):
                options = {"dropout_p": dropout_p, "tokens": tokens}
                choice = chosen(CUDA, dtype, window, head_dim, packed=packed, **options)
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

ANY_GPU = ["eager", "sdpa", "sdpa_math", "sdpa_efficient", "flex"]
ANY_DTYPE = [*ANY_GPU, "short"]


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
    assert unsupported_reason(backend, CUDA, FP32, tokens=64) is None


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ANY_GPU])
def test_old_gpus_are_refused(gpu, backend):
    gpu(TURING)
    assert unsupported_reason(backend, CUDA, FP16) == (
        f"{backend} needs compute capability 8.0, this GPU has 7.5; "
        "take attention_backend sdpa_efficient, or eager for a window"
    )


@pytest.mark.parametrize("backend", ANY_GPU)
def test_old_gpus_run_the_rest(gpu, backend):
    gpu(TURING)
    assert unsupported_reason(backend, CUDA, FP16) is None


@pytest.mark.parametrize(
    ("backend", "capability", "reason"),
    [
        ("flash_attn_3", HOPPER, None),
        ("flash_attn_4", HOPPER, None),
        ("flash_attn_4", BLACKWELL, None),
        (
            "flash_attn_3",
            AMPERE,
            "flash_attn_3 needs compute capability 9.x, this GPU has 8.0; take attention_backend auto",
        ),
        (
            "flash_attn_3",
            BLACKWELL,
            "flash_attn_3 needs compute capability 9.x, this GPU has 10.0; take attention_backend auto",
        ),
        (
            "flash_attn_4",
            AMPERE,
            "flash_attn_4 needs compute capability 9.x or 10.x, this GPU has 8.0; take attention_backend auto",
        ),
        (
            "flash_attn_4",
            (12, 0),
            "flash_attn_4 needs compute capability 9.x or 10.x, this GPU has 12.0; take attention_backend auto",
        ),
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
            f"{backend} needs a torch that can activate {name} (2.11 or newer), this is {torch.__version__}; "
            "take attention_backend auto"
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
    remedy = "take attention_backend flash_attn or flex"
    assert error() == f"varlen needs torch 2.11, this is {torch.__version__}; {remedy}"
    error.cache_clear()
    monkeypatch.setitem(
        sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=lambda query, key, is_causal: None)
    )
    assert error() == f"varlen has its window since torch 2.11, this is {torch.__version__}; {remedy}"
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
        ("flash_attn", 264, "flash_attn takes heads up to 256 wide, not 264" + OTHER_HEADS),
        ("varlen", 8, None),
        ("varlen", 256, None),
        ("varlen", 12, "varlen takes heads up to 256 wide in steps of 8, not 12" + OTHER_HEADS),
        ("varlen", 264, "varlen takes heads up to 256 wide in steps of 8, not 264" + OTHER_HEADS),
        ("flex", 16, None),
        ("flex", 15, "flex takes heads from 16 wide up on a GPU, not 15" + OTHER_HEADS),
        ("eager", 1000, None),
    ],
)
def test_widths_of_heads(gpu, backend, head_dim, reason):
    gpu(HOPPER)
    assert unsupported_reason(backend, CUDA, BF16, FULL, head_dim) == reason


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in WINDOWED])
def test_no_window(gpu, backend):
    gpu(HOPPER)
    sentence = "attention_window needs attention_backend flash_attn, varlen or flex (without a GPU: eager); "
    sentence += f"{backend} has no window"
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


@pytest.mark.parametrize("backend", [pytest.param(name) if name == "flex" else name for name in BACKENDS])
def test_on_a_cpu(backend):
    reason = unsupported_reason(backend, CPU, FP32)
    if backend in ("eager", "sdpa", "sdpa_math", "sdpa_flash"):
        assert reason is None
    elif backend == "flex":
        assert reason == FLEX_ON_CPU
    else:
        assert reason == NO_GPU.format(backend)


def test_flex_on_a_cpu_without_gradients():
    assert unsupported_reason("flex", CPU, FP32) is not None
    assert unsupported_reason("flex", CPU, FP32, training=False) is None
    assert unsupported_reason("flex", CPU, FP32, WINDOW, training=False) is None


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("eager", "sdpa", "sdpa_math")])
def test_on_a_device_of_another_kind(backend):
    reason = unsupported_reason(backend, torch.device("mps"), BF16)
    if backend == "flex":
        assert reason.startswith("flex needs an NVIDIA GPU with the triton package")
    else:
        assert reason == NO_GPU.format(backend)


REMEDY = re.compile(rf"attention_backend ({'|'.join(['auto', *BACKENDS])})\b|--(precision|dropout|num_heads)\b")
MACHINES = [(CPU, HOPPER), *((CUDA, capability) for capability in (HOPPER, AMPERE, BLACKWELL, (12, 0), TURING))]


@pytest.mark.parametrize("backend", [pytest.param(name) if name == "flex" else name for name in BACKENDS])
def test_every_refusal_names_what_to_change(gpu, backend):
    """A flag or another backend; missing packages, whose sentences are tested further up, are not pretended here."""
    refusals = set()
    for device, capability in MACHINES:
        gpu(capability)
        options = itertools.product((BF16, FP32), (FULL, WINDOW), (12, 64, 264), (True, False), (0.0, 0.1))
        for dtype, window, head_dim, training, dropout_p in options:
            refusals.add(
                unsupported_reason(backend, device, dtype, window, head_dim, training=training, dropout_p=dropout_p)
            )
    refusals.discard(None)
    assert bool(refusals) == (backend != "eager")
    assert [reason for reason in refusals if not REMEDY.search(reason)] == []
    assert [
        reason for reason in refusals if "\n" in reason or not reason.startswith((backend, "attention_window"))
    ] == []


@pytest.mark.parametrize("backend", ["flash_attn", "flash_attn_3", "flash_attn_4"])
def test_a_missing_package_says_how_to_get_it(monkeypatch, backend):
    """On a Hopper, through the same door as every other refusal."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    names = [entry[0] for entry in FLASH_IMPLEMENTATIONS.values()]
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: names, raising=False)
    for module in ("flash_attn_2_cuda", "flash_attn_interface", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, module, None)
    reason = unsupported_reason(backend, CUDA, BF16)
    assert "is not installed" in reason
    assert re.search(r"; (install it with `uv (sync|pip) .+`|build it from the hopper folder) ?", reason)


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
        remedy = "take attention_backend sdpa or auto"
        assert says(False) == f"PyTorch refuses {backend}: without a reason; {remedy}"
        first = "Flash attention\n kernel not used because: (Triggered internally at sdp_utils.cpp:42.)"
        second = "Head dim 80 is odd (Triggered internally at sdp_utils.cpp:43.)"
        assert says(False, first, second) == (
            f"PyTorch refuses {backend}: Flash attention kernel not used because: Head dim 80 is odd; {remedy}"
        )
    params = asked[-1]
    assert tuple(params.query.shape) == tuple(params.key.shape) == tuple(params.value.shape) == (1, 1, 99, 80)
    assert (params.query.dtype, params.query.requires_grad) == (BF16, True)
    assert (params.is_causal, params.dropout, params.attn_mask) == (True, 0.25, None)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, pytest.param(torch.inference_mode)],
)
def test_pytorch_is_asked_about_training_whatever_the_mode(monkeypatch, mode):
    """The answer is kept for later calls, which may train."""
    asked = []
    monkeypatch.setattr(
        torch.backends.cuda, "can_use_flash_attention", lambda params, debug: asked.append(params) or True
    )
    with mode():
        attention_support.pytorch_refusal("sdpa_flash", CPU, BF16, 64, True, 0.0, 8)
    assert asked[0].query.requires_grad


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
