"""Write the tables of the README from the committed run folders, or check that they agree.

    python report.py            writes every table between its markers anew
    python report.py --check    exit status 1 and a sentence if README.md and outputs/ disagree (part of the tests)

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; no number in it is typed by hand.
"""

import csv
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_comparison import COMPARISON_TABLES, markdown, read_json, shown
from report_fp8 import FP8_TABLES
from report_parallel import PARALLEL_TABLES
from report_patchtst import PATCHTST_TABLES
from report_vit import VIT_TABLES
from run_folder import write_atomically
from utils import SettingsError, parse_settings, run_script, setting

ROOT = Path(__file__).parent
README = ROOT / "README.md"


# --------------------------------------------------------------------------------------------------------------------
# The language model
# --------------------------------------------------------------------------------------------------------------------

LLM_RUNS = {  # run folder -> first cell
    "gpt2-fp32-eager-batch-125": "fp32, textbook attention, Adam",
    "gpt2-fp32-eager-gradient-checkpointing-batch-125": "the same with gradient checkpointing",
    "gpt2-bf16-eager-batch-125": "bf16, textbook attention, Adam",
    "gpt2-bf16-sdpa-batch-125": "bf16, PyTorch's `sdpa` (it picked cuDNN), Adam",
    "gpt2-bf16-flash_attn-batch-125": "bf16, flash-attn, Adam",
    "gpt2-bf16-flash_attn-window-(64,0)-batch-125": "the same with a window of 64",
    "gpt2-bf16-flash_attn-adam-no-decay-batch-125": "bf16, flash-attn, Adam without weight decay",
    "gpt2-bf16-flash_attn-adamw-batch-125": "bf16, flash-attn, fused AdamW",
    "gpt2-bf16-flash_attn-4-epochs-batch-125": "the same, 4 epochs",
    "gpt2-bf16-flash_attn-batch-max": "bf16, flash-attn, fused AdamW, largest batch",
    "gpt2-bf16-flash_attn-default-allocator-batch-max": "the same with PyTorch's default allocator",
}
LLM_HEADER = ["run", "batch", "forward", "loss", "backward", "optimizer", "peak reserved"]
LLM_HEADER += ["step ms (20th-80th percentile)", "tokens/s", "MFU", "updates", "test perplexity", "bits per byte"]


def llm_table() -> str:
    """One row a run: memory of each phase (GiB), time, quality."""
    lines = []
    for folder, label in LLM_RUNS.items():
        path = ROOT / "outputs" / "llm" / folder
        info = read_json(path / "run.json")
        if info["status"] != "ok":
            lines.append([label, str(info["batch_size"]), info["status"], *["-"] * (len(LLM_HEADER) - 3)])
            continue
        results = info["results"]
        with (path / "memory.csv").open(encoding="utf-8", newline="") as file:
            memory = list(csv.DictReader(file))
        peaks = [
            f"{max(float(row['peak_allocated_gib']) for row in memory if row['phase'] == phase):.1f}"
            for phase in ("forward_pass", "loss", "backward_pass", "optimizer_step")
        ]
        lines.append(
            [
                label,
                str(results["batch_size"]),
                *peaks,
                f"{results['peak_reserved_gib']:.1f}",
                f"{results['step_ms_median']:.1f} ({results['step_ms_p20']:.1f}-{results['step_ms_p80']:.1f})",
                f"{results['tokens_per_s']:,.0f}",
                f"{100 * results['mfu']:.1f} %",
                str(results["steps"]),
                f"{results['test_perplexity']:,.0f}",
                f"{results['test_bits_per_byte']:.3f}",
            ]
        )
    return markdown(LLM_HEADER, lines)


# --------------------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------------------

Row = dict[str, str]
KERNELS = {  # backend -> head of its column
    "eager": "textbook (`eager`)",
    "sdpa_math": "`sdpa_math`",
    "sdpa_efficient": "`sdpa_efficient`",
    "sdpa_flash": "`sdpa_flash`",
    "varlen": "`varlen`",
    "flash_attn": "`flash_attn`",
    "sdpa_cudnn": "`sdpa_cudnn`",
    "auto": "`auto`",
}


def attention_rows(sweep: str) -> list[Row]:
    """results.csv of a committed experiment."""
    path = ROOT / "outputs" / "attention_benchmark" / sweep / "results.csv"
    if not path.is_file():
        raise SettingsError(f"{path.relative_to(ROOT)} is missing, so its table cannot be made")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(rows: list[Row], metric: str, direction: str = "forward_backward", **cell: object) -> float | str:
    """The value of a metric in one case, or its status if it has none.

    Raises:
        SettingsError: no or several such cases.
    """
    own = [row for row in rows if all(row[name] == str(value) for name, value in cell.items())]
    found = [row for row in own if row["metric"] == metric and row["direction"] == direction]
    if len(found) == 1:
        return float(found[0]["value"])
    statuses = [row["status"] for row in own if row["metric"] == "status"]
    if found or len(statuses) != 1:
        raise SettingsError(f"the results have {len(found) or len(statuses)} rows of {metric} {direction} for {cell}")
    return statuses[0]


def comparison_cells(sweep: str, causal: bool) -> tuple[list[Row], list[tuple[int, int]], list[str]]:
    """The rows with that mask, the (batch, context) cells and the kernels that the table has columns for."""
    rows = [row for row in attention_rows(sweep) if row["causal"] == str(causal).lower()]
    cells = sorted({(int(row["batch_size"]), int(row["context_length"])) for row in rows})
    return rows, cells, [name for name in KERNELS if any(row["backend"] == name for row in rows)]


def comparison_table(sweep: str, causal: bool, cell: Callable[[list[Row], dict[str, Any]], str]) -> str:
    """One row for each batch and context, one column a kernel."""
    rows, cells, kernels = comparison_cells(sweep, causal)
    lines = []
    for batch, context in cells:
        values = [cell(rows, {"batch_size": batch, "context_length": context, "backend": name}) for name in kernels]
        lines.append([str(batch), str(context), *values])
    return markdown(["batch", "context", *(KERNELS[name] for name in kernels)], lines)


def forward_and_backward_ms(rows: list[Row], cell: dict[str, Any]) -> str:
    """ "forward + backward" in ms, or the status."""
    parts = [number(rows, "time", direction, **cell) for direction in ("forward", "backward")]
    return parts[0] if isinstance(parts[0], str) else " + ".join(shown(part) for part in parts)


def tflops(rows: list[Row], cell: dict[str, Any]) -> str:
    """TFLOP/s "forward / forward and backward", or the status."""
    parts = [number(rows, "throughput", direction, **cell) for direction in ("forward", "forward_backward")]
    return parts[0] if isinstance(parts[0], str) else " / ".join(shown(part) for part in parts)


def peak_above_inputs(rows: list[Row], cell: dict[str, Any]) -> str:
    """GiB of forward and backward above the inputs, or the status."""
    return shown(number(rows, "peak_memory_above_inputs", **cell))


PARAMETERS = {
    "batch_size": "batch",
    "context_length": "context",
    "num_heads": "heads (width 2048)",
    "embedding_dim": "width (16 heads)",
    "causal": "causal",
}


def parameters_table() -> str:
    """The one-parameter sweeps: flash-attn's packed kernel, its peak to the byte, and the two others that matter."""
    lines = []
    for name, words in PARAMETERS.items():
        rows = attention_rows(name)
        values = list(dict.fromkeys(row[name] for row in rows))
        for value in values:
            cells = {backend: {"backend": backend, name: value} for backend in ("flash_attn", "sdpa_cudnn", "eager")}
            peak = number(rows, "peak_memory", **cells["flash_attn"])
            lines.append(
                [
                    words,
                    value,
                    forward_and_backward_ms(rows, cells["flash_attn"]),
                    tflops(rows, cells["flash_attn"]),
                    peak if isinstance(peak, str) else f"{1024 * peak:,.4f}",
                    tflops(rows, cells["sdpa_cudnn"]),
                    peak_in_mib(rows, cells["sdpa_cudnn"]),
                    tflops(rows, cells["eager"]),
                    peak_in_mib(rows, cells["eager"]),
                ]
            )
    header = ["varied", "value", "flash-attn: ms forward + backward", "TFLOP/s", "peak MiB"]
    return markdown([*header, "cuDNN: TFLOP/s", "peak MiB", "textbook: TFLOP/s", "peak MiB"], lines)


def peak_in_mib(rows: list[Row], cell: dict[str, Any]) -> str:
    peak = number(rows, "peak_memory", **cell)
    return peak if isinstance(peak, str) else f"{1024 * peak:,.0f}"


def long_table() -> str:
    """Forward and backward at a fixed number of tokens: TFLOP/s and GiB above the inputs against the context."""
    rows = attention_rows("long")
    kernels = [name for name in KERNELS if any(row["backend"] == name for row in rows)]
    lines = []
    for context in sorted({int(row["context_length"]) for row in rows}):
        cells = [{"context_length": context, "backend": name} for name in kernels]
        values = []
        for cell in cells:
            rate = number(rows, "throughput", **cell)
            peak = number(rows, "peak_memory_above_inputs", **cell)
            values.append(rate if isinstance(rate, str) else f"{shown(rate)} ({shown(peak)})")
        lines.append([f"{context:,}", *values])
    return markdown(["context", *(KERNELS[name] for name in kernels)], lines)


def break_even_table() -> str:
    """The answers of the bisection."""
    info = read_json(ROOT / "outputs" / "attention_benchmark" / "break_even" / "run.json")
    lines = []
    for answer in info["results"]["break_even"]:
        low, high = answer["low"], answer["high"]
        words = answer["status"]
        if words == "ok":
            words = f"{high:,} (not yet at {low:,})" if low and high else f"{high:,}, the smallest tried"
            words = words if high else f"not up to {low:,}"
        lines.append([answer["question"].replace("_", "\\_"), words])
    return markdown(["forward and backward, about 16,384 tokens, 32 heads of 64, causal", "from a context of"], lines)


def overhead_table() -> str:
    """Wall time through `attention.py` over that of the direct call."""
    info = read_json(ROOT / "outputs" / "attention_benchmark" / "overhead" / "run.json")
    lines = [
        [
            f"`{case['backend']}`, {case['layout']}",
            f"{case['batch_size']} x {case['context_length']}, {case['num_heads']} heads of {case['head_dim']}",
            f"{case['direct_ms']:.3f}",
            f"{case['seam_ms']:.3f}",
            f"{100 * case['overhead']:+.1f} %",
            f"{100 * case['noise']:.1f} %",
        ]
        for case in info["results"]["overhead"]
    ]
    header = ["kernel, layout", "batch x context, heads", "direct, ms", "through attention.py, ms", "overhead"]
    return markdown([*header, "direct against itself"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "llm": llm_table,
    "attention time": lambda: comparison_table("comparison", False, forward_and_backward_ms),
    "attention throughput": lambda: comparison_table("comparison", False, tflops),
    "attention memory": lambda: comparison_table("comparison", False, peak_above_inputs),
    "attention parameters": parameters_table,
    "attention long": long_table,
    "attention break-even": break_even_table,
    "attention overhead": overhead_table,
    **COMPARISON_TABLES,
    **PATCHTST_TABLES,
    **VIT_TABLES,
    **FP8_TABLES,
    **PARALLEL_TABLES,
}

# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Settings of `python report.py`."""

    check: bool = setting(False, "change nothing; exit status 1 if README.md and the run folders disagree")


def replace_tables(text: str, tables: dict[str, Callable[[], str]] | None = None) -> str:
    """The README with every table made anew.

    Raises:
        SettingsError: a table without a marker, a marker without a table, or a run folder missing.
    """
    tables = TABLES if tables is None else tables
    names = re.findall(r"<!-- table: (.+?) -->", text)
    if sorted(names) != sorted(tables):
        odd = ", ".join(sorted(set(names) ^ set(tables)) or sorted(names))
        raise SettingsError(f"README.md and report.py do not name the same tables, each once: {odd}")

    def anew(match: re.Match) -> str:
        try:
            table = tables[match[1]]()
        except SettingsError:
            raise
        except (KeyError, ValueError, TypeError) as error:
            raise SettingsError(f"the run folders of the table {match[1]} are damaged: {error!r}") from None
        return f"<!-- table: {match[1]} -->\n{table}\n<!-- end of table -->"

    return re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end of table -->", anew, text, flags=re.DOTALL)


def main() -> int:
    """Write or check the tables."""
    settings = parse_settings(Settings)
    try:
        text = README.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{README.name} cannot be read: {error.strerror}") from None
    new = replace_tables(text)
    if settings.check:
        if new != text:
            print("report.py: README.md and outputs/ disagree; run python report.py", file=sys.stderr)
        return int(new != text)
    if new != text:
        write_atomically(README, new)
    print(f"{len(TABLES)} tables written" if new != text else "nothing to change")
    return 0


if __name__ == "__main__":
    run_script(main)
