"""The README's numbers are those of the committed runs, and its commands exist."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

import llm_train
from utils import parse_settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = {  # run folder -> first cell
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
HEADER = (
    "| run | batch | forward | loss | backward | optimizer | peak reserved | step ms (20th-80th percentile) | tokens/s "
    "| MFU | updates | test perplexity | bits per byte |"
)


def results_table() -> str:
    """The README's table, made from the run folders."""
    lines = [HEADER, "|" + " --- |" * HEADER.count(" | ") + " --- |"]
    for folder, label in ROWS.items():
        path = ROOT / "outputs" / "llm" / folder
        info = json.loads((path / "run.json").read_text())
        if info["status"] != "ok":
            cells = [label, str(info["batch_size"]), info["status"], *["-"] * (HEADER.count(" | ") - 2)]
            lines.append("| " + " | ".join(cells) + " |")
            continue
        results = info["results"]
        rows = [line.split(",") for line in (path / "memory.csv").read_text().splitlines()]
        peaks = [
            f"{max(float(row[3]) for row in rows if row[1] == phase):.1f}"
            for phase in ("forward_pass", "loss", "backward_pass", "optimizer_step")
        ]
        cells = [
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
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_table_is_that_of_the_runs():
    shown = re.search(r"<!-- results: outputs/llm -->\n(.*?)\n<!-- end of results -->", README, re.DOTALL).group(1)
    assert shown == results_table()


def test_checkpointing_changed_no_loss():
    """The README says bit for bit."""
    plain, checkpointed = (
        [
            json.loads(line)["loss"]
            for line in (ROOT / "outputs" / "llm" / name / "steps.jsonl").read_text().splitlines()
        ]
        for name in ("gpt2-fp32-eager-batch-125", "gpt2-fp32-eager-gradient-checkpointing-batch-125")
    )
    assert len(plain) == 326 and plain == checkpointed


def test_every_link_to_a_file_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)]+(?:\([^)]*\)[^)]*)?)\)", README):
        assert (ROOT / target).exists(), target


def commands() -> list[str]:
    text = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL) + re.findall(r"`([^`\n]+)`", README))
    return [line.split("#")[0].strip() for line in text.splitlines() if re.search(r"\w+\.py( |$)", line)]


@pytest.mark.parametrize("command", commands())
def test_every_command_names_a_script_and_flags_that_exist(command):
    words = shlex.split(command.replace("\\|", "|"))
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[place]).exists()
    if words[place] == "llm_train.py" and words[:place] != []:
        settings = parse_settings(llm_train.Settings, words[place + 1 :])
        llm_train.make_plan(dataclasses.replace(settings, use_flash_attention=False))


def test_every_flag_in_the_readme_exists():
    known = {field.name for field in dataclasses.fields(llm_train.Settings)} | {"extra", "help"}
    assert set(re.findall(r"--(\w+)", README)) <= known


def test_the_floors_list_every_script():
    listed = set(re.findall(r"`(\w+\.py)`", README[README.index("## The house") :]))
    assert listed == {path.name for path in ROOT.glob("*.py")}
