"""The tables of single techniques: what each technique file measured, and what a technique costs to adopt.

    python report_comparison.py             prints them with the tables of the comparison

The lines of code that a technique takes are counted in the files of this repository when the table is made.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_text import ROOT, markdown, percent, place, plain, read_json, shown, signed
from utils import SettingsError

# --------------------------------------------------------------------------------------------------------------------
# What the technique files measured
# --------------------------------------------------------------------------------------------------------------------


def break_even_words(answer: dict[str, Any]) -> str:
    """From which size on it pays."""
    low, high, unit = answer["low"], answer["high"], answer["unit"]
    if high is None:
        return f"not up to {low:,} {unit}"
    return f"from {high:,} {unit} on " + (f"(not yet at {low:,})" if low is not None else "(the smallest tried)")


def technique_table(outputs: Path, name: str) -> str:
    """What a technique file measured: saved by formula and in fact, extra time, exactness, break-even sizes."""
    info = read_json(outputs / "techniques" / name / "run.json")
    header = ["variant", "against", "peak, GiB", "saved by the formula, GiB", "saved, GiB", "time", "ms", "result"]
    lines = []
    for row in info["results"]["rows"]:
        saved = [signed(row[key]) for key in ("formula_saved_gib", "saved_gib")]
        error = "" if row["error"] is None else f" ({row['error']:.1e})"
        line = [plain(row["variant"]), plain(row["baseline"] or "-")]
        if row["status"] == "ok":
            result = (row["exactness"] or "-") + (error if row["exactness"] != "bitwise" else "")
            line += [shown(row["peak_gib"], 4), *saved, percent(row["extra_time"], sign="+"), shown(row["ms"]), result]
        else:
            line += [row["status"], *["-"] * 5]
        lines.append([*line, plain(row["note"] or "")])
    answers = [
        f"- {plain(answer['question'])}: {plain(break_even_words(answer))}" for answer in info["results"]["break_even"]
    ]
    title = f"`{name}.py` on {plain(info['device_name'])}:"
    return "\n\n".join([title, markdown([*header, "note"], lines), *(["\n".join(answers)] if answers else [])])


def techniques_table(outputs: Path, prefix: str = "") -> str:
    """One table for each technique file that was run, in name order."""
    folder = outputs / "techniques"
    names = sorted(path.parent.name for path in folder.glob("*/run.json"))
    if not names:
        raise SettingsError(f"{place(folder)} has no run folders; run a technique file such as cross_entropy.py")
    return "\n\n".join(technique_table(outputs, name) for name in names)


# --------------------------------------------------------------------------------------------------------------------
# What it takes to adopt a technique
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adoption:
    """What a reader has to know before taking a technique over; the lines are counted when the table is made."""

    technique: str
    flag: str
    code: tuple[tuple[str, tuple[str, ...]], ...]  # (file, functions and classes), those that the technique runs
    packages: str = "none"
    compilation: str = "no"
    capability: str = "any"  # smallest compute capability of the GPU
    measured: tuple[str, str] | None = None  # (folder in outputs/techniques, variant) that says how exact it is


CHECKPOINTING, LOW_PRECISION = "checkpointing.py", "low_precision_adamw.py"
CHUNKED = ("linear_cross_entropy", "ChunkedCrossEntropy", "softmax_gradient", "add_product")
MASTER = ("to_bfloat16", "adamw_update", "LowPrecisionAdamW", "adamw_kernel")
# fmt: off
ADOPTIONS = (
    Adoption("bf16 autocast", "--precision bf16", (("precision.py", ("set_precision", "autocast")),), capability="8.0"),
    Adoption("fp16 autocast with a scaler", "--precision fp16",
             (("precision.py", ("set_precision", "autocast", "make_scaler")),), capability="7.0"),
    Adoption("PyTorch's fused attention", "--attention_backend sdpa", (("attention_kernels.py", ("sdpa_attention",)),),
             capability="5.0 (flash: 8.0)"),
    Adoption("flash-attn", "--attention_backend flash_attn", (("attention_kernels.py", ("flash_attn_attention",)),),
             packages="flash-attn", capability="8.0"),
    Adoption("checkpointing, every block", "--gradient_checkpointing block", ((CHECKPOINTING, ("checkpointed",)),),
             measured=("checkpointing", "block")),
    Adoption("checkpointing, attention kept", "--gradient_checkpointing selective",
             ((CHECKPOINTING, ("RandomStateOfKept", "_policy", "_contexts", "selectively_checkpointed")),),
             measured=("checkpointing", "selective")),
    Adoption("saved tensors in host memory", "--gradient_checkpointing offload",
             (("host_offload.py", ("copy_stream", "Parked", "HostOffload")), (CHECKPOINTING, ("offloaded",))),
             measured=("checkpointing", "offload")),
    Adoption("memory budget of the compiler", "--activation_memory_budget 0.5",
             ((CHECKPOINTING, ("set_activation_memory_budget",)),), compilation="yes", capability="7.0",
             measured=("checkpointing", "compiled, memory budget 0.5")),
    Adoption("chunked loss", "--loss chunked", (("cross_entropy.py", CHUNKED),), measured=("cross_entropy", "chunked")),
    Adoption("fused loss", "--loss fused", (("cross_entropy.py", ("linear_cross_entropy",)),),
             packages="liger-kernel", compilation="no (Triton kernels)", capability="8.0",
             measured=("cross_entropy", "fused (liger-kernel)")),
    Adoption("GELU in one kernel with its bias", "--gelu fused",
             (("fused_gelu.py", ("triton_kernels", "bias_gelu_operator", "bias_gelu_backward_operator", "BiasGelu")),),
             compilation="no (a Triton kernel)", capability="8.0", measured=("fused_gelu", "fused")),
    Adoption("GELU's output made again", "--gelu recomputed",
             (("fused_gelu.py", ("triton_kernels", "bias_gelu_operator", "bias_gelu_backward_operator",
                                 "BiasGeluLinear")),),
             compilation="no (a Triton kernel)", capability="8.0", measured=("fused_gelu", "recomputed")),
    Adoption("8-bit optimizer states", "--optimizer adamw_8bit", (("optimizers.py", ("adamw_8bit_class",)),),
             packages="torchao", compilation="the optimizer's step", capability="8.0",
             measured=("optimizers", "adamw_8bit")),
    Adoption("optimizer step inside backward", "--optimizer_in_backward true",
             (("optimizers.py", ("OptimizerInBackward",)),), measured=("optimizers", "adamw in backward")),
    Adoption("bf16 parameters, fp32 master copy", "--parameters bf16_master",
             ((LOW_PRECISION, MASTER),),
             compilation="no (a Triton kernel)", capability="8.0", measured=("optimizers", "adamw bf16_master")),
    Adoption("bf16 parameters, stochastic rounding", "--parameters bf16_stochastic",
             ((LOW_PRECISION, ("stochastic_round", *MASTER)),),
             compilation="no (a Triton kernel)", capability="8.0", measured=("optimizers", "adamw bf16_stochastic")),
)
# fmt: on


def code_lines(path: Path, names: Sequence[str]) -> int:
    """Source lines of functions and classes (`Class.method` for a method) without blank lines, comments, docstrings.

    Raises:
        SettingsError: the file is missing or has no such name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise SettingsError(f"{place(path)} is missing, so its lines cannot be counted") from None
    found: dict[str, ast.AST] = {}

    def visit(node: ast.AST, before: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[before + child.name] = child
                visit(child, f"{before}{child.name}.")

    visit(ast.parse(text), "")
    missing = [name for name in names if name not in found]
    if missing:
        raise SettingsError(f"{place(path)} has no {', '.join(missing)}, so its lines cannot be counted")
    lines = text.splitlines()
    written = {number for number, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")}
    for node in found.values():
        if ast.get_docstring(node) is not None:
            written -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    counted: set[int] = set()
    for node in (found[name] for name in names):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        counted |= written & set(range(first, node.end_lineno + 1))
    return len(counted)


def measured_exactness(outputs: Path, measured: tuple[str, str] | None) -> str:
    """How exact a variant came out in its technique's run; "-" for a technique without such a run.

    Raises:
        SettingsError: the run is missing.
    """
    if measured is None:
        return "-"
    folder, variant = measured
    rows = read_json(outputs / "techniques" / folder / "run.json")["results"]["rows"]
    own = next((row for row in rows if row["variant"] == variant), None)
    return "not measured" if own is None else own["exactness"] or own["status"]


def adoption_table(outputs: Path, prefix: str = "", adoptions: Sequence[Adoption] = ADOPTIONS) -> str:
    """Cost of adoption: flag, lines of code in this repository, packages, compilation, hardware and exactness."""
    header = ["technique", "flag", "lines of code", "packages beside PyTorch", "needs compilation"]
    header += ["compute capability from", "result"]
    lines = []
    for entry in adoptions:
        count = sum(code_lines(ROOT / file, names) for file, names in entry.code)
        files = ", ".join(f"`{file}`" for file, _ in entry.code)
        lines.append(
            [
                entry.technique,
                f"`{entry.flag}`",
                f"{count} ({files})" if count else "0",
                entry.packages,
                entry.compilation,
                entry.capability,
                measured_exactness(outputs, entry.measured),
            ]
        )
    return markdown(header, lines)
