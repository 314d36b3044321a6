"""The README's commands, flags, links and list of files exist (its tables: test_report.py)."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import attention_benchmark
import compare_techniques
import llm_train
import report_comparison
from utils import parse_settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def seed_results(name: str) -> dict:
    """What outputs/seed says about a case at batch 125."""
    return json.loads((ROOT / "outputs" / "seed" / f"{name}-batch-125" / "run.json").read_text())["results"]


def test_what_the_readme_says_about_the_comparison():
    """Sentences beside the generated tables."""
    names = ("everything-fast", "everything-small", "hf-gpt2-compiled", "flash-compile-checkpointing-chunked-loss")
    fast, small, peer, plain = map(seed_results, names)
    for case, sentence in (
        (fast, "`everything-fast` trains {tokens_per_s:,.0f} tokens/s in {peak_allocated_gib:.1f} GiB"),
        (peer, "GPT-2 of transformers makes {tokens_per_s:,.0f} in {peak_allocated_gib:.1f};"),
        (seed_results("flash-compile"), "this lab makes {tokens_per_s:,.0f} in {peak_allocated_gib:.1f}."),
        (small, "`everything-small` trains {tokens_per_s:,.0f} in {peak_allocated_gib:.1f} GiB"),
        (plain, "the plain GELU it is {tokens_per_s:,.0f} in {peak_allocated_gib:.1f}."),
        (seed_results("everything-small-fused-gelu"), "{peak_allocated_gib:.1f} GiB for the same time (`everything"),
    ):
        assert sentence.format(**case) in README
    rate, longest = (
        seed_results("flash-attention-adamw")["tokens_per_s"],
        json.loads((ROOT / "outputs" / "max_batch" / "flash-80-gib" / "run.json").read_text())["results"][
            "tokens_per_s"
        ],
    )
    assert f"{rate:,.0f} with 125, and {longest:,.0f} with 445" in README
    assert f"bring little speed:** {100 * (longest / rate - 1):.0f} % in that example" in README
    assert fast["tokens_per_s"] >= 1.2 * peer["tokens_per_s"]
    assert fast["peak_allocated_gib"] <= peer["peak_allocated_gib"]
    assert small["tokens_per_s"] >= 450_000 and small["peak_allocated_gib"] <= 5
    cases = report_comparison.read_cases(ROOT / "outputs", "max_batch")
    trained = [case for case in cases if case.ok]
    assert f"{len(trained)} of the {len(cases)} answers trained" in README
    largest = next(case.batch for case in trained if case.name == "everything-45-gib")
    assert largest >= 2000 and f"`everything` trains {largest:,} sequences at once" in README


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
    if words[place] == "attention_benchmark.py" and words[:place] != []:
        settings = parse_settings(attention_benchmark.Settings, words[place + 1 :])
        for name in settings.sweep.split(","):
            axes = attention_benchmark.sweep_axes(name, settings, torch.device("cpu"))
            attention_benchmark.check_lists(name, axes, "fp32")
    if words[place] == "llm_train.py" and words[:place] != []:
        settings = parse_settings(llm_train.Settings, words[place + 1 :])
        llm_train.make_plan(dataclasses.replace(settings, use_flash_attention=False))


def test_every_flag_in_the_readme_exists():
    scripts = (llm_train, attention_benchmark, compare_techniques, report_comparison)
    known = {field.name for script in scripts for field in dataclasses.fields(script.Settings)} | {"extra", "help"}
    assert set(re.findall(r"--(\w+)", README)) <= known


def test_the_floors_list_every_script():
    listed = set(re.findall(r"`(\w+\.py)`", README[README.index("## The house") :]))
    assert listed == {path.name for path in ROOT.glob("*.py")}
