"""The comparison from end to end at laptop size: real processes, then every table and figure from what they left.

Slow, two to three minutes on two cores: each of the 14 cases is a process of its own that imports PyTorch and trains.
Everywhere else in the tests a fake trainer or made-up run folders stand in for one side; only here do the numbers of
real runs pass through the runner, the tables and the figures, so that a renamed result or file is found.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread
from test_report_comparison import cells, make_techniques

import compare_techniques
from comparison_cases import EXPERIMENTS
from plot_comparison import plot_comparison
from report_comparison import comparison_tables
from sample_documents import generate_documents
from utils import SettingsError

CASES = {
    "seed": ["fp32-baseline-batch-125", "flash-attention-batch-125", "flash-attention-window-(64,0)-batch-125"],
    "factorial": ["baseline", "bf16", "chunked-loss", "bf16+chunked-loss"],
    "max_batch": ["flash-0.05-gib", "flash-0.08-gib"],
    "quality": [
        "fp32-baseline-seed-0",
        "fp32-baseline-seed-1",
        "flash-seed-0",
        "flash-seed-1",
        "confounded-flash-attention-batch-195",
    ],
}
FIGURES = {
    "seed": ["time_execution.png", "memory_per_phase.png", "memory_against_speed.png"],  # the profile needs a GPU
    "factorial": ["interactions.png", "memory_against_speed.png"],
    "max_batch": ["max_batch.png"],
    "quality": ["test_loss.png", "test_perplexity.png", "quality_against_updates.png"],
}
UNSUPPORTED = "flash-attention-window-(64,0)-batch-125"  # no kernel with a window without a GPU

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """Output folder of one run of compare_techniques.py over the CASES of all four experiments."""
    root = tmp_path_factory.mktemp("comparison")
    (root / "text.txt").write_text("\n\n".join(generate_documents(150, seed=7)), encoding="utf-8")
    words = ["--experiment", ",".join(EXPERIMENTS), "--size", "smoke", "--device", "cpu", "--processes", "2"]
    words += ["--factors", "bf16,chunked-loss", "--memory_budget_gib", "0.05,0.08", "--seeds", "0,1", "--updates", "4"]
    words += ["--cases", ",".join(name for names in CASES.values() for name in names)]
    words += ["--dataset_path", "text.txt", "--cache_folder", "cache", "--output_folder", "outputs"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.dont_write_bytecode:  # compiling PyTorch's sources anew would be half of each process's time
        environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(root / "bytecode")}
    command = [sys.executable, compare_techniques.__file__, *words]
    process = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert json.loads(process.stdout.splitlines()[-1])["status"] == "ok", process.stdout
    make_techniques(root / "outputs")  # made up: the comparison does not run the technique files
    return root / "outputs"


def info(outputs: Path, experiment: str, name: str) -> dict:
    return json.loads((outputs / f"smoke_{experiment}" / name / "run.json").read_text(encoding="utf-8"))


def results(outputs: Path, experiment: str, name: str) -> dict:
    return info(outputs, experiment, name)["results"]


def table(outputs: Path, name: str) -> dict[str, list[str]]:
    return cells(comparison_tables(outputs, prefix="smoke_")[f"comparison {name}"]())


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_case_ended_as_it_should(outputs, experiment):
    comparison = json.loads((outputs / f"smoke_{experiment}" / "comparison.json").read_text(encoding="utf-8"))
    statuses = {row["name"]: row["status"] for row in comparison["cases"]}
    assert [name for name in statuses if statuses[name] != "missing"] == [
        name for name in statuses if name in CASES[experiment]
    ]
    assert comparison["finished"] is (experiment == "factorial")  # of the others some cases were chosen
    for name in CASES[experiment]:
        found = info(outputs, experiment, name)
        assert statuses[name] == found["status"] == ("unsupported" if name == UNSUPPORTED else "ok"), found.get("error")
        assert not list((outputs / f"smoke_{experiment}" / name).glob("*.png")), "--figures false"


def test_memory_and_time(outputs):
    memory, time = table(outputs, "memory"), table(outputs, "time")
    for name in CASES["seed"][:2]:
        own = results(outputs, "seed", name)
        batch, *phases, step, reserved, peak = memory[name]
        assert batch == time[name][0] == str(own["batch_size"]) == "8" and reserved == "-"
        assert number(step) == pytest.approx(own["peak_allocated_gib"], rel=0.005)
        assert max(map(number, phases)) == number(step) and own["peak_phase"].startswith(peak)
        assert time[name][1].startswith(f"{own['step_ms_median']:,.1f} ({own['step_ms_p20']:,.1f}-")
        assert number(time[name][2]) == pytest.approx(own["first_step_ms"], rel=0.001, abs=0.5)
        assert number(time[name][5]) == round(own["tokens_per_s"]) and own["timed_steps"] == 4
    assert memory[UNSUPPORTED][:2] == time[UNSUPPORTED][:2] == ["8", "unsupported"]
    assert memory["fp16-batch-195"][1] == "missing" and "NVIDIA GPU" in info(outputs, "seed", UNSUPPORTED)["error"]
    assert table(outputs, "peer")["hf-gpt2-compiled-batch-125"][1] == "missing"


def test_effects(outputs):
    own = {name: results(outputs, "factorial", name) for name in CASES["factorial"]}
    off, bf16, chunked, both = (own[name] for name in CASES["factorial"])
    effects, interactions = table(outputs, "effects"), table(outputs, "interactions")
    for column, key in enumerate(["peak_allocated_gib", "step_ms_median"]):
        y, a, b, ab = (entry[key] for entry in (off, bf16, chunked, both))
        close = {"abs": 0.00051 if column == 0 else 0.051, "rel": 0.0005}
        assert number(effects["bf16"][column]) == pytest.approx((a - y + ab - b) / 2, **close)
        assert number(effects["chunked-loss"][column]) == pytest.approx((b - y + ab - a) / 2, **close)
        assert number(interactions["bf16 x chunked-loss"][column]) == pytest.approx((ab - b - a + y) / 2, **close)
    assert number(effects["chunked-loss"][0]) < 0, "a quarter of the logits at a time must need less"
    ratio = math.sqrt(bf16["step_ms_median"] * both["step_ms_median"])
    ratio /= math.sqrt(off["step_ms_median"] * chunked["step_ms_median"])
    assert number(effects["bf16"][2]) == pytest.approx(ratio, abs=0.0006)


def test_max_batch(outputs):
    found = table(outputs, "max batch")
    assert found["largest batch by bisection (by the grid)"] == ["0.05 GiB", "0.08 GiB"]
    sizes = []
    for name, cell in zip(CASES["max_batch"], found["flash"], strict=True):
        own = results(outputs, "max_batch", name)
        size, grid = (int(word.strip("()")) for word in cell.split())
        assert size == own["batch_size"] and 8 <= grid <= size
        assert own["peak_allocated_gib"] <= float(name.split("-")[1])
        sizes.append(size)
    assert sizes[0] < sizes[1] and found["bf16"] == ["missing", "missing"]


def test_quality(outputs):
    quality, confounded = table(outputs, "quality"), table(outputs, "confounded")
    for name in ("fp32-baseline", "flash"):
        runs = [results(outputs, "quality", f"{name}-seed-{seed}") for seed in (0, 1)]
        losses = [run["test_loss"] for run in runs]
        assert losses[0] != losses[1]
        expected = ["2", "4", "1,024", f"{sum(losses) / 2:.4f}", f"{abs(losses[0] - losses[1]):.4f}"]
        assert quality[name][:6] == [*expected, f"{losses[0]:.4f}, {losses[1]:.4f}"]
        assert number(quality[name][6]) == pytest.approx(sum(run["test_perplexity"] for run in runs) / 2, abs=0.5)
        assert quality[name][7] == f"{sum(run['test_bits_per_byte'] for run in runs) / 2:.3f}"
    assert quality["bf16"][:2] == ["0", "missing"]
    name = "confounded-flash-attention-batch-195"
    own = results(outputs, "quality", name)
    assert confounded[name][:2] == ["12", "2"]
    assert number(confounded[name][2]) == pytest.approx(own["test_perplexity"], abs=0.5)
    assert confounded[name][3:] == ["flash", "4", quality["flash"][6]]


def test_the_remaining_tables(outputs):
    tables = comparison_tables(outputs, prefix="smoke_")
    for name, make in tables.items():
        if name == "comparison profile":  # it shows a GPU's kernels
            with pytest.raises(SettingsError, match=r"no case of .*smoke_seed has a profile\.json"):
                make()
        else:
            assert make().count("| --- |") >= 1, name


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_figure_is_drawn(outputs, experiment):
    folder = outputs / f"smoke_{experiment}"
    assert plot_comparison(outputs, f"smoke_{experiment}") == [folder / name for name in FIGURES[experiment]]
    for name in FIGURES[experiment]:
        image = imread(folder / name)
        assert min(image.shape[:2]) > 200 and image.min() < 0.5 < image.max(), f"{name} is empty"
