"""Numeric precision of training: fp32, TF32, BF16 autocast and FP16 autocast with a gradient scaler.

    python precision.py                  the precisions this machine can run, each timed and checked against fp64
    python precision.py --width 4096     larger matrices

fp32   everything in 32 bits, tensor cores off: the reference.
tf32   32-bit tensors; matrix products read 10 bits of mantissa. Saves no memory, only time (Ampere and newer).
bf16   autocast: matrix products and attention in bfloat16 (8 bits of mantissa, fp32's range), norms, softmax, loss in
       fp32, parameters and optimizer states stay fp32. Saved activations shrink by about half; autocast adds a
       16-bit copy of every weight it multiplies with (2 bytes a parameter).
fp16   autocast with float16 (11 bits of mantissa, small range): gradients need a scaler that skips steps on overflow.

When it does not help: the residual stream and everything of the optimizer stay fp32, so a model whose memory is
parameters rather than activations saves nothing (16 bytes a parameter become 18).

The loss is always computed on fp32 logits: under autocast, F.cross_entropy on bf16 logits would round the log
probabilities to 8 bits (PyTorch's autocast lists; https://docs.pytorch.org/docs/stable/amp.html).
Source: Micikevicius et al. 2017, Mixed Precision Training, arXiv 1710.03740; Kalamkar et al. 2019, arXiv 1905.12322.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from utils import SettingsError, parse_settings, percentile, run_script, setting

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def unsupported_reason(precision: str, device: torch.device) -> str | None:
    """Why this device cannot train in this precision; None if it can."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        if precision in ("tf32", "bf16") and capability < (8, 0):
            return (
                f"{name} (compute capability {capability[0]}.{capability[1]}) has no {precision} units; 8.0 is needed"
            )
    elif precision == "tf32":
        return "tf32 is a mode of NVIDIA tensor cores, and this machine has none"
    return None


def set_precision(precision: str, device: torch.device) -> None:
    """Check that the device can run the precision and set the matrix products' mode for the process.

    Raises:
        SettingsError: the device has no such units.
    """
    reason = unsupported_reason(precision, device)
    if reason is not None:
        raise SettingsError(f"--precision {precision} cannot run here: {reason}; choose another --precision")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of the forward pass: autocast for bf16 and fp16, nothing for fp32 and tf32."""
    if precision in AUTOCAST_DTYPES:
        return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[precision])
    return nullcontext()


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The gradient scaler: real for fp16, a disabled one that passes values through for every other precision."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


@dataclass
class Settings:
    """Settings of `python precision.py`."""

    width: int = setting(1024, "width of the square matrices that are multiplied")
    repeats: int = setting(10, "timed products for each precision")


def main() -> int:
    """Time a matrix product in every precision and compare it with the product in fp64."""
    settings = parse_settings(Settings)
    if settings.width < 1 or settings.repeats < 1:
        raise SettingsError("--width and --repeats must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(settings.width, settings.width, generator=generator).to(device) for _ in range(2))
    exact = left.double() @ right.double()
    print(f"{'precision':<11}{'ms':>9}{'TFLOP/s':>10}{'relative error':>17}")
    for precision in PRECISIONS:
        reason = unsupported_reason(precision, device)
        if reason is not None:
            print(f"{precision:<11}{reason}")
            continue
        set_precision(precision, device)
        times = []
        with autocast(precision, device):
            product = left @ right
            for _ in range(settings.repeats):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                product = left @ right
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
        error = ((product.double() - exact).norm() / exact.norm()).item()
        seconds = percentile(times, 50)
        rate = 2 * settings.width**3 / seconds / 1e12
        print(f"{precision:<11}{1000 * seconds:>9.3f}{rate:>10.2f}{error:>17.1e}")
    return 0


if __name__ == "__main__":
    run_script(main)
