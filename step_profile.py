"""Where the time of a training step goes, kernel by kernel, beside the time that its matrix products alone would need.

    python llm_train.py --use_compile true --profile_steps 3      leaves profile.json in the run folder (a GPU)
    python step_profile.py                                        the matrix products of the 134 M decoder alone (a GPU)

torch.profiler records every kernel and the call that launched it. A kernel belongs to the phase (forward_pass, loss,
backward_pass, optimizer_step) in which it was launched, and to a kind by its name: matrix products, attention, GELU,
norms, copies, other. What is launched in the optimizer's phase is the optimizer's; what the loss launches, but for the
head's products, is the loss's. Compiled kernels are named after the operators fused into them, and one that holds a
norm and the sum before it counts as a norm. The floor is the time of the model's matrix products, forward and twice
backward, each run alone on this card: without fewer products a step cannot be faster than about that.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from precision import AUTOCAST_DTYPES
from run_folder import StepClock
from utils import SettingsError, parse_settings, percentile, run_script, setting

PHASE = "phase: "
KINDS = (  # the first pattern that a kernel's name holds
    ("attention", r"flash|fmha|sdpa|attention|cudnn.*fusion|softmax_warp"),
    ("matrix products", r"gemm|nvjet|xmma|splitk|cutlass|gemv|cublas"),
    ("GELU", r"gelu"),
    ("norms", r"layer_norm|layernorm|gammabeta|rsqrt"),
    ("loss", r"chunk_loss|chunk_scale|nll_loss|log_softmax|logsoftmax|logsumexp|cunn_softmax"),
    ("copies", r"memcpy|memset|copy|catarray|_cat_|stack|clone|fillfunctor|to_copy"),
)
ORDER = ("matrix products", "attention", "GELU", "norms", "loss", "optimizer", "copies", "other", "idle")


class ProfiledPhases:
    """Stands where a MemoryTracker would: its phases are ranges of the profiler."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with record_function(PHASE + name):
            yield


def kind_of(kernel: str, phase: str | None) -> str:
    """The category of a kernel by its name and the phase it was launched in."""
    found = next((kind for kind, pattern in KINDS if re.search(pattern, kernel.lower())), "other")
    if phase == "optimizer_step":
        return "optimizer"
    if phase == "loss" and found != "matrix products":
        return "loss"
    return found


def sum_kernels(trace: dict[str, Any], steps: int) -> tuple[dict[str, float], float]:
    """Milliseconds a step of every category in a trace that torch.profiler exported, and those with any kernel running.

    The second is less than the sum of the first where kernels of two streams overlap.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    phases = [
        (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PHASE))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(PHASE) and "training" not in event["name"]
    ]
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    totals: dict[str, float] = {}
    busy, last = 0.0, -float("inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        at = launched.get(event.get("args", {}).get("correlation"))
        phase = None if at is None else next((name for begin, end, name in phases if begin <= at <= end), None)
        kind = kind_of(event["name"], phase)
        totals[kind] = totals.get(kind, 0.0) + event["dur"] / 1000 / steps
        end = event["ts"] + event["dur"]
        busy += max(0.0, end - max(last, event["ts"])) / 1000 / steps
        last = max(last, end)
    return totals, busy


Product = tuple[int, int, int, str]  # rows, inner, columns, and which operand autograd gives transposed


def matmul_shapes(model: nn.Module, tokens: int) -> dict[Product, int]:
    """The products of a training step and how many there are of each; each linear layer has three.

    Forward inputs @ weight.T ("right"), gradient of the inputs gradient @ weight ("none"), gradient of the weight
    gradient.T @ inputs ("left").
    """
    counts: dict[Product, int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            given, made = module.in_features, module.out_features
            for product in (
                (tokens, given, made, "right"),
                (tokens, made, given, "none"),
                (made, tokens, given, "left"),
            ):
                counts[product] = counts.get(product, 0) + 1
    return counts


def time_products(products: dict[Product, int], dtype: torch.dtype, repeats: int = 10) -> dict[str, Any]:
    """Time every product alone on the GPU, random numbers, operands laid out as autograd's are.

    Returns:
        tflop and floor_ms of all of them, and one row a shape with its TFLOP/s.
    """
    rows, total_ms, total_tflop = [], 0.0, 0.0
    for (height, inner, width, transposed), count in products.items():
        options = {"device": "cuda", "dtype": dtype}
        left = (
            torch.randn(inner, height, **options).T if transposed == "left" else torch.randn(height, inner, **options)
        )
        right = (
            torch.randn(width, inner, **options).T if transposed == "right" else torch.randn(inner, width, **options)
        )
        clock = StepClock(torch.device("cuda"))
        for repeat in range(repeats + 3):
            if repeat >= 3:
                clock.start()
            left @ right
            if repeat >= 3:
                clock.stop()
        milliseconds = percentile(clock.read(), 50)
        tflop = 2 * height * inner * width / 1e12
        total_ms += count * milliseconds
        total_tflop += count * tflop
        shape = f"{height} x {inner} x {width}"
        rows.append(
            {
                "shape": shape,
                "transposed": transposed,
                "count": count,
                "ms": milliseconds,
                "tflops": 1000 * tflop / milliseconds,
            }
        )
    return {"matmul_tflop": total_tflop, "matmul_floor_ms": total_ms, "matmul_rates": rows}


def profile_steps(
    step: Callable[[Any], None], steps: int, *, model: nn.Module, tokens: int, batches: int, precision: str
) -> dict[str, Any]:
    """Profile some training steps.

    Args:
        step: runs one training step, whose phases are those of the object it is given.
        steps: how many.
        model: whose linear layers make the floor.
        tokens: of one batch.
        batches: of one step, all counted as if they had that many tokens.
        precision: of the matrix products. Those of fp8 are timed alone in bf16: FP8 can go below that floor.

    Returns:
        steps, step_ms (median without the profiler), categories (name, ms a step, share of step_ms), the dtype of the
        matrix products alone, their floor and their rates.
    """
    clock = StepClock(torch.device("cuda"))
    phases = ProfiledPhases()
    for _ in range(steps + 2):
        clock.start()
        step(phases)
        clock.stop()
    plain = clock.read()[2:]
    step_ms = percentile(plain, 50)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step(phases)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        totals, busy = sum_kernels(json.loads(path.read_text(encoding="utf-8")), steps)
    totals["idle"] = max(0.0, step_ms - busy)  # the profiler slows the host, not the kernels
    categories = [
        {"name": name, "ms": round(totals[name], 3), "share": round(totals[name] / step_ms, 4)}
        for name in ORDER
        if name in totals
    ]
    counts = {product: batches * count for product, count in matmul_shapes(model, tokens).items()}
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    products = time_products(counts, dtype)
    return {
        "steps": steps,
        "step_ms": round(step_ms, 3),
        "categories": categories,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        **products,
    }


def profile_table(result: dict[str, Any]) -> str:
    """The result of `profile_steps` as aligned text."""
    lines = [f"{'kernels':<18}{'ms':>9}{'share':>8}"]
    lines += [f"{row['name']:<18}{row['ms']:>9.2f}{100 * row['share']:>7.1f} %" for row in result["categories"]]
    rate = 1000 * result["matmul_tflop"] / result["matmul_floor_ms"]
    lines.append(
        f"step {result['step_ms']:.2f} ms; its matrix products alone in {result['matmul_dtype']}, "
        f"{result['matmul_tflop']:.2f} TFLOP at {rate:.0f} TFLOP/s: {result['matmul_floor_ms']:.2f} ms"
    )
    return "\n".join(lines)


@dataclass
class Settings:
    """Settings of `python step_profile.py`."""

    tokens: int = setting(32000, "tokens of a step")
    width: int = setting(768, "width of the model, whose MLP is four times as wide")
    vocab_size: int = setting(32000, "entries of the vocabulary")
    num_layers: int = setting(12, "blocks")


def main() -> int:
    """The rates of a decoder's matrix products on this card."""
    settings = parse_settings(Settings)
    if min(settings.tokens, settings.width, settings.vocab_size, settings.num_layers) < 1:
        raise SettingsError("--tokens, --width, --vocab_size and --num_layers must be at least 1")
    if not torch.cuda.is_available():
        raise SettingsError("step_profile.py times a GPU's matrix products, and PyTorch finds no GPU here")
    width = settings.width
    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * settings.num_layers
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(*size) for size in [*sizes, (width, settings.vocab_size)])
    result = time_products(matmul_shapes(model, settings.tokens), torch.bfloat16)
    print(f"{'rows x inner x columns':<26}{'count':>6}{'ms':>9}{'TFLOP/s':>9}")
    for row in result["matmul_rates"]:
        print(f"{row['shape']:<26}{row['count']:>6}{row['ms']:>9.3f}{row['tflops']:>9.0f}")
    print(f"{result['matmul_tflop']:.2f} TFLOP in {result['matmul_floor_ms']:.2f} ms")
    return 0


if __name__ == "__main__":
    run_script(main)
