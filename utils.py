"""Tools every script of the lab uses: settings from flags, errors in one sentence, FLOPs and MFU.

Nothing here knows a model or a technique. Sources: FLOPs per token and MFU follow PaLM (Chowdhery et al. 2022,
arXiv 2204.02311, appendix B); peak rates are the vendors' dense figures (no sparsity).
"""

import dataclasses
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from torch import nn
from transformers import HfArgumentParser

GIB = 2**30
Settings = TypeVar("Settings")
Result = TypeVar("Result")


class SettingsError(ValueError):
    """A wrong setting or input: one sentence that names what to change. Scripts print it and exit with status 2."""


# --------------------------------------------------------------------------------------------------------------------
# Settings: a constant in the dataclass and a flag are the same thing
# --------------------------------------------------------------------------------------------------------------------


def setting(default: Any, help_text: str, choices: Sequence[Any] | None = None) -> Any:
    """A dataclass field with a default, a help text and, where the values are few, the list of them."""
    details: dict[str, Any] = {"help": help_text.replace("%", "%%")}
    if choices is not None:
        details["choices"] = list(choices)
    return dataclasses.field(default=default, metadata=details)


def parse_settings(
    settings_class: type[Settings],
    argv: Sequence[str] | None = None,
    *,
    saved: dict[str, Any] | None = None,
    sections: Sequence[str] = (),
) -> Settings:
    """Read flags (`--name value`, bare `--name` for true) over a YAML file (`--config`) over the class's defaults.

    Args:
        settings_class: dataclass whose fields become flags; a field named `config` holds the path of a YAML file.
        argv: the words after the script's name; those of this process if None.
        saved: values that replace the defaults, for example those of the run that is being resumed.
        sections: names under which the YAML file may group settings; they are headings and mean nothing else.

    Raises:
        SettingsError: the YAML file is missing, malformed or has an unknown key.
        SystemExit: status 2 with a usage line for an unknown flag or a value of the wrong type (argparse).
    """
    parser = HfArgumentParser(settings_class, allow_abbrev=False)
    known = {field.name for field in dataclasses.fields(settings_class)}
    defaults = dict(saved or {})
    path = parser.parse_known_args(argv)[0].config if "config" in known else None
    if path is not None:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise SettingsError(f"--config {path} cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise SettingsError(f"--config {path} cannot be read as YAML: {reason}") from None
        if isinstance(content, dict):
            content = flatten_sections(content, sections, path)
            unknown = sorted(map(str, set(content) - (known - {"config"})))
        else:
            raise SettingsError(f"--config {path} is not a mapping of settings to values")
        if unknown:
            raise SettingsError(f"--config {path} has unknown settings: {', '.join(unknown)}")
        # YAML values go through the same conversion as a flag's text, so a wrong type is caught in the same way.
        words = [f"--{name}={value}" for name, value in content.items() if value is not None]
        defaults |= {name: getattr(parser.parse_args(words), name) for name in content}
    parser.set_defaults(**defaults)
    return settings_class(**vars(parser.parse_args(argv)))


def flatten_sections(content: dict[Any, Any], sections: Sequence[str], path: str) -> dict[Any, Any]:
    """The settings of a YAML file without its headings.

    Raises:
        SettingsError: a heading without settings below it, or a setting given twice.
    """
    flat: dict[Any, Any] = {}
    for key, value in content.items():
        if key in sections and not isinstance(value, dict | None):
            raise SettingsError(f"--config {path}: {key} is a heading and needs settings below it, not {value!r}")
        for name, inner in ((value or {}) if key in sections else {key: value}).items():
            if name in flat:
                raise SettingsError(f"--config {path} gives {name} twice")
            flat[name] = inner
    return flat


def read_seeds(text: str) -> list[int]:
    """ "0,1,2" as a list.

    Raises:
        SettingsError: no whole numbers from 0 up, or one twice.
    """
    try:
        seeds = [int(word) for word in str(text).split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**31 or len(set(seeds)) < len(seeds):
        raise SettingsError(f"--seeds {text} must be different whole numbers from 0 up, such as 0,1,2")
    return seeds


def read_names(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """ "a,b" as a list.

    Raises:
        SettingsError: nothing, an unknown name, or one twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(known) or len(set(names)) < len(names):
        raise SettingsError(f"--{flag} {text} must be different ones of {', '.join(known)}")
    return names


def read_rising(flag: str, text: str, *, most: int | None = None, multiple: int = 1) -> list[int]:
    """ "8,16,32" as a list.

    Raises:
        SettingsError: no rising whole numbers from 1 up to `most`, or one that `multiple` does not divide.
    """
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    rising = numbers and numbers == sorted(set(numbers)) and numbers[0] >= 1
    if not rising or (most is not None and numbers[-1] > most) or any(number % multiple for number in numbers):
        bounds = (f" up to {most}" if most is not None else "") + (f", multiples of {multiple}" if multiple > 1 else "")
        example = ",".join(str(number * multiple) for number in (4, 8, 16))
        raise SettingsError(f"--{flag} {text} must be rising numbers{bounds}, such as {example}")
    return numbers


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is the device's (or the budget's) memory running out, and not a bug or a limit of a kernel."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def unless_out_of_memory(function: Callable[[], Result]) -> Result | None:
    """What a function returns; None if memory runs out in it. Every other error is raised."""
    try:
        return function()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None  # after the except block, so that the frames of the error and their tensors can go


def run_script(main: Callable[[], int | None]) -> None:
    """Call a script's main(); a SettingsError becomes one sentence on standard error and exit status 2.

    So does memory that runs out where the script does not expect it, with exit status 1.
    """
    try:
        sys.exit(main())
    except SettingsError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0]
        print(f"{Path(sys.argv[0]).name}: error: these sizes do not fit into memory ({reason})", file=sys.stderr)
        sys.exit(1)


def device_name(device: torch.device) -> str:
    """The GPU's name as the driver tells it, or the processor's and its number of usable cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = found.group(1).strip() if found else name
    return f"{name} ({torch.get_num_threads()} threads)"


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Percentile by linear interpolation; None for no values."""
    return float(np.percentile(values, percent)) if len(values) else None


# --------------------------------------------------------------------------------------------------------------------
# FLOPs and MFU
# --------------------------------------------------------------------------------------------------------------------

# Dense peak rates in TFLOP/s: the GPU's name (as a full regular expression), then bf16 and fp16, tf32 (half of bf16),
# fp32 without tensor cores, fp8 (twice bf16 where there are such units). None, or no entry: no such unit, or no figure
# with a source. A name that matches no row gives no MFU.
PEAK_TFLOPS = (
    (
        r"NVIDIA (GH200.*|H200|H100 80GB HBM3)",
        {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9, "fp8": 1978.8},
    ),
    (r"NVIDIA H100 PCIe", {"bf16": 756.0, "fp16": 756.0, "tf32": 378.0, "fp32": None, "fp8": 1512.0}),
    (r"NVIDIA H100 NVL", {"bf16": 835.0, "fp16": 835.0, "tf32": 417.5, "fp32": None, "fp8": 1670.0}),
    (r"NVIDIA B200", {"bf16": 2250.0, "fp16": 2250.0, "tf32": 1125.0, "fp32": None, "fp8": 4500.0}),
    (r"(NVIDIA )?A100.*", {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    (r"NVIDIA A40", {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    (r"NVIDIA A30", {"bf16": 165.0, "fp16": 165.0, "tf32": 82.5, "fp32": None}),
    (r"NVIDIA L40S", {"bf16": 362.0, "fp16": 362.0, "tf32": 181.0, "fp32": None, "fp8": 724.0}),
    (r"NVIDIA L4", {"bf16": 121.0, "fp16": 121.0, "tf32": 60.5, "fp32": None, "fp8": 242.0}),
    (r"NVIDIA RTX A6000", {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": None}),
    (r"NVIDIA GeForce RTX 3090", {"bf16": 71.0, "fp16": 71.0, "tf32": 35.5, "fp32": None}),
    (r"NVIDIA GeForce RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": None, "fp8": 330.4}),
    (r"NVIDIA GeForce RTX 5090", {"bf16": 209.5, "fp16": 209.5, "tf32": 104.75, "fp32": None, "fp8": 419.0}),
    (r"(NVIDIA |Tesla )V100.*SXM.*", {"bf16": None, "fp16": 125.0, "tf32": None, "fp32": 15.7}),
    (r"(NVIDIA |Tesla )V100.*PCIE.*", {"bf16": None, "fp16": 112.0, "tf32": None, "fp32": None}),
    (r"(NVIDIA |Tesla )T4", {"bf16": None, "fp16": 65.0, "tf32": None, "fp32": 8.1}),
)


def peak_tflops(name: str, precision: str) -> float | None:
    """This GPU's dense peak in TFLOP/s for fp32, tf32, bf16, fp16 or fp8; None where unknown (a CPU, MIG slices)."""
    if "MIG" in name:
        return None
    for pattern, rates in PEAK_TFLOPS:
        if re.fullmatch(pattern, name):
            return rates.get(precision)
    return None


def count_parameters(model: nn.Module) -> int:
    """All parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_matmul_parameters(model: nn.Module) -> int:
    """Parameters in matrix products: the weights of linear layers. Embedding tables are looked up, not multiplied."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def training_flops_per_token(
    matmul_parameters: int, num_layers: int, embedding_dim: int, context_length: int, attended_fraction: float = 1.0
) -> float:
    """Floating-point operations of forward and backward for one token (recomputation is not counted).

    6 x the parameters that take part in matrix products (not the embedding tables, norms and biases), plus
    12 x layers x width x context for the two attention products. As in PaLM, nanoGPT and the FlashAttention-2 paper the
    attention term is counted in full; `attended_fraction` scales it where a causal mask (0.5) or a window is credited.
    """
    return 6 * matmul_parameters + 12 * num_layers * embedding_dim * context_length * attended_fraction


def model_flops_utilisation(tokens_per_s: float, flops_per_token: float, peak: float | None) -> float | None:
    """MFU = model FLOP/s over the dense peak (TFLOP/s); None if the peak is unknown."""
    return None if peak is None else tokens_per_s * flops_per_token / (peak * 1e12)
