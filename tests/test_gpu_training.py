"""llm_train.py on a GPU: it resumes bit for bit, hides its data loading, and plays a smaller card."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]
ROOT = Path(__file__).parent.parent
SIZE = [
    "--num_layers",
    "4",
    "--max_documents",
    "1500",
    "--vocab_size",
    "8000",
    "--batch_size",
    "32",
    "--dropout",
    "0.1",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


def command(outputs, cache, *flags):
    words = [*SIZE, "--output_folder", outputs, "--cache_folder", cache, *flags]
    return [sys.executable, ROOT / "llm_train.py", *map(str, words)]


def run(outputs, cache, *flags):
    result = subprocess.run(command(outputs, cache, *flags), capture_output=True, text=True, cwd=outputs)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def losses(folder):
    return {row["step"]: row["loss"] for row in map(json.loads, (folder / "steps.jsonl").read_text().splitlines())}


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "fp32", "--attention_backend", "eager"],
        ["--use_flash_attention", "true"],
        ["--precision", "fp16", "--use_gradient_checkpointing", "true", "--deterministic", "true"],
        ["--parameters", "bf16_stochastic", "--gradient_checkpointing", "offload", "--loss", "chunked"],
        ["--precision", "bf16", "--optimizer_in_backward", "true", "--gradient_checkpointing", "selective"],
        ["--parameters", "bf16_master", "--use_compile", "true", "--loss", "chunked"],
    ],
    ids=["fp32-eager", "bf16-flash", "fp16-checkpointing-deterministic", "stochastic-offload", "backward", "compile"],
)
def test_resume_after_kill_9_is_bit_identical(tmp_path, cache, flags):
    """The killed and resumed run logs the losses of an uninterrupted one, bit for bit, and the same test loss."""
    flags = [*flags, "--max_steps", "400", "--log_every", "10"]
    whole = run(tmp_path, cache, *flags, "--run_name", "whole", "--epochs", "9")
    process = subprocess.Popen(
        command(
            tmp_path, cache, *flags, "--run_name", "killed", "--epochs", "9", "--checkpoint_every_minutes", "0.005"
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    folder = tmp_path / "llm" / "killed"
    deadline = time.time() + 120
    while not ((folder / "checkpoint" / "state.safetensors").exists() and len(losses(folder)) > 60):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(losses(folder)) < 400
    resumed = run(tmp_path, cache, "--resume", folder)
    assert losses(folder) == losses(tmp_path / "llm" / "whole")
    assert resumed["test_loss"] == whole["test_loss"]


def test_loading_data_costs_less_than_2_percent_of_a_step(tmp_path, cache):
    result = run(tmp_path, cache, "--use_flash_attention", "true", "--max_steps", "60", "--num_layers", "12")
    assert result["timed_steps"] == 20
    assert result["data_ms_median"] < 0.02 * result["step_ms_median"]


def test_flash_attention_at_the_largest_batch_under_a_budget(tmp_path, cache):
    flags = ["--use_flash_attention", "true", "--adjust_batch_size", "true", "--memory_budget_gib", "4"]
    result = run(tmp_path, cache, *flags, "--max_steps", "10")
    rows = (
        Path(result["run"]) if Path(result["run"]).is_absolute() else tmp_path / result["run"]
    ) / "batch_size_search.csv"
    status = {int(line.split(",")[0]): line.split(",")[1] for line in rows.read_text().splitlines()[1:]}
    assert status[result["batch_size"]] == "ok" and status[result["batch_size"] + 1] == "oom"
    kept = [float(line.split(",")[3]) for line in rows.read_text().splitlines()[1:]]
    assert max(kept) <= 0.99 * 4  # the default margin of a GPU
    assert 3 < result["peak_reserved_gib"] <= 4


@pytest.mark.parametrize("flag", ["true", "false"])
def test_the_allocator_is_the_one_asked_for(tmp_path, cache, flag):
    result = run(tmp_path, cache, "--expandable_segments", flag, "--max_steps", "2", "--max_documents", "300")
    info = json.loads((tmp_path / result["run"] / "run.json").read_text())
    assert info["expandable_segments"] is (flag == "true")


def test_flash_attention_in_fp32_is_an_error_that_says_why(tmp_path, cache):
    result = subprocess.run(
        command(tmp_path, cache, "--use_flash_attention", "true", "--precision", "fp32"), capture_output=True, text=True
    )
    assert result.returncode == 2 and "bf16 and fp16" in result.stderr
    assert not (tmp_path / "llm").exists()


def test_profile_adds_up(tmp_path, cache):
    """The categories are the step, and the products of the profile are those that the model has."""
    flags = ["--precision", "bf16", "--max_steps", "40", "--profile_steps", "3", "--evaluate_on", "none"]
    last = run(tmp_path, cache, *flags, "--run_name", "profiled")
    profile = json.loads((tmp_path / "llm" / "profiled" / "profile.json").read_text())
    times = {row["name"]: row["ms"] for row in profile["categories"]}
    assert sum(times.values()) == pytest.approx(profile["step_ms"], rel=0.15)
    assert {"matrix products", "attention", "GELU", "norms", "loss", "optimizer"} <= set(times)
    tokens = 32 * 256
    weights = 4 * 12 * 768**2 + 768 * 8000
    assert profile["matmul_tflop"] == pytest.approx(6 * weights * tokens / 1e12, rel=1e-6)
    assert profile["step_ms"] == pytest.approx(last["step_ms_median"], rel=0.3)


def test_the_largest_batch_trains(tmp_path, cache):
    """Under a budget that is not the card's: what the search finds is what training survives."""
    flags = ["--use_flash_attention", "true", "--loss", "chunked", "--adjust_batch_size", "true"]
    last = run(tmp_path, cache, *flags, "--memory_budget_gib", "6", "--max_steps", "20", "--epochs", "9")
    assert last["status"] == "ok" and last["peak_reserved_gib"] <= 6
