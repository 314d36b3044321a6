"""patchtst_train.py: every flag does what it says, an epoch adds up, pruning in training, errors in one sentence."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas
import pytest
import torch
import yaml
from safetensors.torch import load_file

import head_pruning
import patchtst_fit
import patchtst_plan
import patchtst_pruning
import patchtst_train
from head_pruning import attention_layers, head_numbers
from patchtst import PatchTST, patchtst_config
from patchtst_plan import make_plan
from patchtst_pruning import removals
from patchtst_train import SECTIONS, Settings
from run_folder import LapClock
from time_series_dataset import split_series
from time_series_files import load_series
from utils import SettingsError, parse_settings, run_script

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
BASE = {
    "context_length": 32, "horizon": 8, "embedding_dim": 8, "num_heads": 4, "ffn_dim": 16, "num_layers": 2,
    "patch_length": 8, "patch_stride": 4, "batch_size": 32, "epochs": 2, "device": "cpu", "figures": "false",
}  # fmt: skip
STEP_KEYS = ["step", "epoch", "tokens", "loss", "step_ms", "data_ms", "tokens_per_s", "mfu", "peak_gib"]


@dataclasses.dataclass
class Run:
    status: int
    stdout: str
    stderr: str
    folder: Path  # of outputs/patchtst

    def path(self, name: str | None = None) -> Path:
        found = sorted(path.parent for path in self.folder.glob("*/run.json"))
        return self.folder / name if name else found[0]

    def info(self, name: str | None = None) -> dict:
        return json.loads((self.path(name) / "run.json").read_text())

    def lines(self, file: str, name: str | None = None) -> list[dict]:
        return [json.loads(line) for line in (self.path(name) / file).read_text().splitlines()]

    @property
    def last(self) -> dict:
        return json.loads(self.stdout.splitlines()[-1])


def run(folder: Path, series: Path | None, **flags) -> Run:
    """`python patchtst_train.py ...` without a new process."""
    given = BASE | ({"data_path": series} if series else {}) | flags
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    out, err = io.StringIO(), io.StringIO()
    argv = ["patchtst_train.py", *words, f"--output_folder={folder}"]
    with (
        patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        run_script(patchtst_train.main)
    return Run(caught.value.code, out.getvalue(), err.getvalue(), folder / "patchtst")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, series) -> Run:
    """Two epochs, fp32, everything by default."""
    return run(tmp_path_factory.mktemp("plain"), series, figures="true")


# --- What a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_readme_says(plain):
    assert plain.status == 0, plain.stderr
    names = {path.name for path in plain.path().iterdir()}
    assert names == {
        "run.json", "steps.jsonl", "epochs.jsonl", "memory.csv", "forecast.csv", "model_summary.txt", "checkpoint",
        "mse_curves.png", "forecast.png", "memory_per_phase.png",
    }  # fmt: skip
    info, results = plain.info(), plain.info()["results"]
    assert info["status"] == "ok" and info["seed"] == 0 and info["dataset"]["name"] == "waves.csv"
    assert info["dataset"]["windows"]["train"] == 280 - 40 + 1 and info["parameters"] == results["parameters"]
    assert plain.last == {"run": str(plain.path()), "status": "ok", **results}
    steps = plain.lines("steps.jsonl")
    assert list(steps[0]) == STEP_KEYS and len(steps) == results["steps"] == 2 * (241 // 32)
    assert [row["epoch"] for row in steps] == [1] * 7 + [2] * 7
    assert steps[-1]["tokens"] == 14 * 32 * 2 * 8  # 14 steps of 32 windows, 2 channels, 8 patches
    with (plain.path() / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["phase"] for row in rows} == {
        "training_step", "forward_pass", "loss", "backward_pass", "optimizer_step",
    }  # fmt: skip
    assert {int(row["step"]) for row in rows} == {2, 3, 4} and results["tracked_steps"] == 3
    peaks = [float(row["peak_allocated_gib"]) for row in rows if row["phase"] == "training_step"]
    assert results["peak_allocated_gib"] == max(peaks) > 0


def test_data_time_and_compute_time_are_the_epoch(plain):
    """One clock without gaps: the parts add up to the total, and the total to the host's time around it."""
    epochs, steps = plain.lines("epochs.jsonl"), plain.lines("steps.jsonl")
    for row in epochs:
        own = [step for step in steps if step["epoch"] == row["epoch"]]
        assert row["data_s"] == pytest.approx(sum(step["data_ms"] for step in own) / 1000, abs=1e-4)
        assert row["compute_s"] == pytest.approx(sum(step["step_ms"] for step in own) / 1000, abs=1e-4)
        assert row["total_s"] == pytest.approx(row["data_s"] + row["compute_s"], abs=2e-6)
        assert row["total_s"] <= row["wall_s"] + 1e-4 and row["total_s"] > 0.8 * row["wall_s"]
    results = plain.info()["results"]
    assert results["timed_epochs"] == 1 and results["epoch_total_s"] == pytest.approx(epochs[1]["total_s"], abs=1e-5)
    expected = epochs[1]["data_s"] / epochs[1]["total_s"]
    assert results["data_share"] == pytest.approx(expected, rel=1e-2)


def test_lap_clock_adds_up():
    clock = LapClock(CPU)
    for _ in range(4):
        clock.mark()
    marks = list(clock.marks)
    laps = clock.read()
    assert len(laps) == 3 and sum(laps) == pytest.approx(1000 * (marks[-1] - marks[0])) and clock.read() == []


def test_metrics_are_those_of_every_window(plain, series):
    """MSE and MAE recomputed from the saved weights, one window at a time, last partial batch included."""
    info, results = plain.info(), plain.info()["results"]
    model = PatchTST(patchtst_config("official", **{name: info["model"][name] for name in patchtst_plan.SHAPE}))
    model.load_state_dict(load_file(plain.path() / "checkpoint" / "best.safetensors"))
    model.eval()
    data = split_series(load_series(None, str(series)), context_length=32, horizon=8, device=CPU)
    test = data.splits["test"]
    assert results["test_windows"] == len(test) == 80 + 32 - 40 + 1
    with torch.no_grad():
        pairs = [(model(inputs), targets) for inputs, targets in (test.batch(torch.tensor([n])) for n in range(73))]
    difference = torch.cat([forecast - targets for forecast, targets in pairs])
    assert results["test_mse"] == pytest.approx(difference.square().mean().item(), rel=1e-5)
    assert results["test_mae"] == pytest.approx(difference.abs().mean().item(), rel=1e-5)
    assert "test_in_whole_batches" not in results  # fewer than 128 windows
    row = min(plain.lines("epochs.jsonl"), key=lambda row: row["validation_mse"])
    assert results["best_epoch"] == row["epoch"] and results["validation_mse"] == row["validation_mse"]


def test_the_forecast_file_is_the_forecast(plain):
    rows = list(csv.DictReader((plain.path() / "forecast.csv").open()))
    assert [int(row["row"]) for row in rows] == list(range(-32, 8))
    assert set(rows[0]) == {"date", "row", "left", "right", "left forecast", "right forecast"}
    assert all(row["left forecast"] == "" for row in rows[:32]) and all(row["left forecast"] for row in rows[32:])
    truth = np.array([float(row["right"]) for row in rows[32:]])
    forecast = np.array([float(row["right forecast"]) for row in rows[32:]])
    assert np.abs(truth - forecast).mean() < 2


def test_the_model_learns_and_beats_repeating(tmp_path, series):
    done = run(tmp_path, series, epochs=12, learning_rate=0.003)
    results = done.info()["results"]
    assert results["test_mse"] < 0.7 * results["baselines"]["repeat last row"]["mse"]
    losses = [row["train_mse"] for row in done.lines("epochs.jsonl")]
    assert losses[-1] < 0.5 * losses[0]


def test_whole_batches_are_reported_beside_all_windows(tmp_path, series, monkeypatch):
    monkeypatch.setattr(patchtst_train, "PUBLISHED_BATCH", 32)
    results = run(tmp_path, series).info()["results"]
    whole = results["test_in_whole_batches"]
    assert whole["windows"] == 64 and whole["mse"] != results["test_mse"]
    monkeypatch.undo()
    assert patchtst_train.PUBLISHED_BATCH == 128  # of the official scripts' test loader


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path, series, plain):
    again = run(tmp_path / "again", series, figures="false")
    other = run(tmp_path / "other", series, seeds="1")
    losses = [[row["loss"] for row in done.lines("steps.jsonl")] for done in (plain, again, other)]
    assert losses[0] == losses[1] and losses[0] != losses[2]


def test_several_seeds_are_several_runs_and_their_mean(tmp_path, series):
    done = run(tmp_path, series, seeds="3,1", run_name="two")
    names = [Path(path).name for path in done.last["runs"]]
    assert names == ["two-seed-3", "two-seed-1"]
    values = [done.info(name)["results"]["test_mse"] for name in names]
    assert done.last["test_mse_mean"] == pytest.approx(sum(values) / 2)
    assert done.last["test_mse_spread"] == pytest.approx(abs(values[0] - values[1]))
    assert [done.info(name)["seed"] for name in names] == [3, 1]


def test_workers_train_the_same(tmp_path, series, plain):
    done = run(tmp_path, series, num_workers=1)
    losses = [[row["loss"] for row in run.lines("steps.jsonl")] for run in (plain, done)]
    assert losses[0] == losses[1] and "workers-1" in done.path().name


def test_early_stopping_goes_back_to_the_best_weights(tmp_path, series, monkeypatch):
    """Validation gets worse after the second epoch: stopped `patience` epochs later, the second one's weights kept."""
    answers, seen = iter([0.5, 0.4, 0.45, 0.41, 0.9]), []

    def evaluate(self, name, model=None, windows=None):
        seen.append((name, self.model.head.bias.detach().clone()))
        return {"mse": next(answers) if name == "validation" else 7.0, "mae": 0.1}

    monkeypatch.setattr(patchtst_fit.Training, "evaluate", evaluate)
    done = run(tmp_path, series, epochs=9, patience=2)
    results = done.info()["results"]
    assert (results["epochs"], results["best_epoch"], results["stopped_by"]) == (4, 2, "early")
    assert results["validation_mse"] == 0.4 and results["test_mse"] == 7.0
    saved = load_file(done.path() / "checkpoint" / "best.safetensors")
    validation = [bias for name, bias in seen if name == "validation"]
    assert torch.equal(saved["head.bias"], validation[1]) and not torch.equal(saved["head.bias"], validation[3])
    assert [name for name, _ in seen] == ["validation"] * 4 + ["test"]  # test once


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_attention_types(tmp_path, series):
    kernels = {}
    for kind in ("vanilla", "flash", "auto"):
        info = run(tmp_path / kind, series, attn_type=kind, epochs=1).info()
        kernels[kind] = (info["model"]["attention_backend"], info["attention_kernel"])
    assert kernels["vanilla"] == ("eager", "eager (matmul, softmax, matmul)")
    assert kernels["flash"][0] == "sdpa_flash" and "flash_attention_for_cpu" in kernels["flash"][1]
    assert kernels["auto"][0] == "sdpa"


@pytest.mark.parametrize(
    "flags",
    [
        {"learning_rate": 0.01}, {"schedule": "constant", "epochs": 6}, {"schedule": "onecycle"}, {"precision": "bf16"},
        {"weight_decay": 0.5, "learning_rate": 0.01}, {"dropout": 0.0}, {"norm": "layer"}, {"batch_size": 64},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_of_training_changes_the_losses(tmp_path, series, flags):
    base = {name: value for name, value in flags.items() if name in ("epochs", "learning_rate") and len(flags) > 1}
    losses = [
        [row["loss"] for row in run(tmp_path / name, series, **given).lines("steps.jsonl")]
        for name, given in (("base", base), ("changed", flags))
    ]
    assert losses[0] != losses[1]


def test_schedules():
    """Rates by hand: x 0.9 an epoch from the fourth on; OneCycle up from 1/25 and down again."""
    model = torch.nn.Linear(2, 2)

    def rates(schedule, epochs, steps, **more):
        plan = make_plan(Settings(schedule=schedule, epochs=epochs, learning_rate=0.01, **more))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = patchtst_fit.make_schedule(plan, optimizer, steps)
        found = []
        for _ in range(epochs * steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return found

    assert rates("constant", 3, 2) == [0.01] * 6
    decay = rates("decay", 7, 2)
    assert decay[:8] == [0.01] * 8 and decay[8] == pytest.approx(0.009) and decay[13] == pytest.approx(0.00729)
    cycle = rates("onecycle", 10, 10, warm_up_share=0.4)
    assert cycle[0] == pytest.approx(0.01 / 25) and max(cycle) == pytest.approx(0.01, rel=1e-3)
    assert abs(cycle.index(max(cycle)) - 40) <= 1 and cycle[-1] < 1e-5


def test_recipes_of_the_published_scripts(monkeypatch):
    plan = make_plan(Settings(dataset="ETTh2"))
    assert (plan.model.embedding_dim, plan.model.num_heads, plan.model.ffn_dim) == (16, 4, 128)
    assert (plan.batch_size, plan.epochs, plan.patience, plan.schedule) == (128, 100, 100, "decay")
    plan = make_plan(Settings(dataset="ETTm1", context_length=512))
    assert (plan.model.embedding_dim, plan.model.num_heads, plan.model.ffn_dim) == (128, 16, 256)
    assert (plan.patience, plan.schedule, plan.warm_up_share, plan.model.num_patches) == (20, "onecycle", 0.4, 64)
    plan = make_plan(Settings(dataset="traffic"))
    assert (plan.batch_size, plan.patience, plan.warm_up_share, plan.model.dropout) == (24, 10, 0.2, 0.2)
    plan = make_plan(Settings(dataset="ETTh1", model_variant="transformers", patch_length=24))
    assert (plan.model.embedding_dim, plan.model.patch_stride, plan.model.num_patches) == (128, 24, 21)
    assert make_plan(Settings()).model.horizon == 24  # the sample


def test_yaml_with_headings_and_flags_that_win(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data:\n  horizon: 48\nmodel:\n  num_heads: 2\ntraining:\nbatch_size: 7\n")
    settings = parse_settings(Settings, ["--config", str(path), "--num_heads", "8"], sections=SECTIONS)
    assert (settings.horizon, settings.num_heads, settings.batch_size) == (48, 8, 7)
    for text, words in (
        ("data:\n  horizont: 48\n", "unknown settings: horizont"),
        ("dataa:\n  horizon: 48\n", "unknown settings: dataa"),
        ("data: 48\n", "data is a heading and needs settings below it"),
        ("horizon: 1\ndata:\n  horizon: 2\n", "gives horizon twice"),
        ("- 1\n", "not a mapping"),
    ):
        path.write_text(text)
        with pytest.raises(SettingsError, match=words):
            parse_settings(Settings, ["--config", str(path)], sections=SECTIONS)
    path.write_text("data:\n  horizon: long\n")
    with pytest.raises(SystemExit):
        parse_settings(Settings, ["--config", str(path)], sections=SECTIONS)


def test_the_example_file_is_the_course_projects_configuration():
    settings = parse_settings(Settings, ["--config", str(ROOT / "patchtst_config.yaml")], sections=SECTIONS)
    plan = make_plan(settings)
    with torch.device("meta"):
        model = PatchTST(plan.model)
    assert sum(p.numel() for p in model.parameters()) == 1_118_048 - 42 * 128
    assert (plan.batch_size, plan.patience, plan.model.attention_backend) == (32, 30, "eager")
    content = yaml.safe_load((ROOT / "patchtst_config.yaml").read_text())
    assert set(content) <= set(SECTIONS)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"attn_type": "flash", "attention_backend": "sdpa"}, "exclude each other"),
        ({"attention_backend": "flash_attn"}, "--attention_backend flash_attn cannot run here"),
        ({"warm_up_share": 0.3}, "--warm_up_share has no effect without --schedule onecycle"),
        ({"schedule": "onecycle", "warm_up_share": 1.5}, "--warm_up_share is a share"),
        ({"compile_mode": "default"}, "--compile_mode has no effect without --use_compile true"),
        ({"use_compile": "true", "compile_mode": "reduce-overhead"}, "has no effect without a GPU"),
        ({"num_workers": -1}, "--num_workers must be from 0 to 256"),
        ({"num_workers": 99999}, "--num_workers must be from 0 to 256"),
        ({"batch_size": 0}, "--batch_size must be above 0"),
        ({"batch_size": 5000}, "--batch_size asks for 5000 windows, but the training split has only 241"),
        ({"learning_rate": "nan"}, "--learning_rate must be above 0"),
        ({"weight_decay": -1}, "--weight_decay must be at least 0"),
        ({"max_steps": 0}, "--max_steps must be at least 1"),
        ({"seeds": "0,0"}, "--seeds 0,0 must be different"),
        ({"seeds": "a"}, "--seeds a must be different"),
        ({"evaluate_on": "none", "patience": 3}, "--patience has no effect with --evaluate_on none"),
        ({"prune_heads_per_layer": 2}, "--prune_heads_per_layer has no effect without --prune"),
        ({"prune": "static_random", "prune_rounds": 2}, "it belongs to dynamic"),
        ({"prune": "static_random", "prune_heads_per_layer": 0}, "must be from 1 to 3"),
        ({"prune": "dynamic", "prune_heads_per_layer": 4}, "must be from 0 to 3"),
        ({"prune": "dynamic", "max_steps": 5}, "--max_steps would end --prune dynamic before heads are removed"),
        ({"prune": "dynamic", "prune_heads_per_layer": 2, "prune_rounds": 3}, "--prune_rounds must be from 1 to"),
        ({"prune": "dynamic", "prune_rounds": 0}, "--prune_rounds must be from 1 to"),
        ({"prune": "dynamic", "prune_learning_rate": 0.0}, "--prune_learning_rate must be above 0"),
        ({"prune": "static_random", "prune_learning_rate": 0.1}, "it belongs to dynamic"),
        ({"prune": "dynamic", "evaluate_on": "none"}, "needs --evaluate_on test"),
        ({"run_name": "a/b"}, "--run_name must be one folder name"),
        ({"only": "x"}, "--only has no effect without one of --patch_size_exp"),
        ({"context_length": 300}, "the train split has 280 rows"),
        ({"patch_length": 64}, "longer than --context_length"),
        ({"data_path": "nowhere.csv"}, "nowhere.csv cannot be read"),
        ({"device": "cuda"}, "PyTorch finds no NVIDIA GPU"),
    ],
)
def test_wrong_settings_cost_one_sentence_and_leave_nothing(tmp_path, series, flags, words):
    if flags.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(tmp_path, series, **flags)
    assert done.status == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not done.folder.exists()


def test_a_loss_that_is_not_finite_is_an_error_in_run_json(tmp_path, series):
    done = run(tmp_path, series, learning_rate=1e18, schedule="constant", norm="layer", run_name="broken")
    assert done.status == 1 and "the loss is not finite" in done.info("broken")["error"]
    assert done.info("broken")["status"] == "error" and done.last["status"] == "error"
    again = run(tmp_path, series, run_name="broken")
    assert again.status == 2 and "already exists" in again.stderr


def test_out_of_memory_is_a_status(tmp_path, series, monkeypatch):
    def fail(self, inputs, targets):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(patchtst_fit.Training, "training_step", fail)
    done = run(tmp_path, series)
    assert done.status == 1 and done.info()["status"] == "oom" and "lower --batch_size" in done.stdout


def test_ctrl_c_ends_after_the_step_and_is_noted(tmp_path, series, monkeypatch):
    original = patchtst_fit.Training.training_step

    def interrupted(self, inputs, targets):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, inputs, targets)

    monkeypatch.setattr(patchtst_fit.Training, "training_step", interrupted)
    done = run(tmp_path, series)
    assert done.status == 130 and done.info()["status"] == "interrupted" and len(done.lines("steps.jsonl")) == 3


def test_measuring_only(tmp_path, series):
    done = run(tmp_path, series, evaluate_on="none", max_steps=20, epochs=9, log_every=5)
    results = done.info()["results"]
    assert results["steps"] == 20 and "test_mse" not in results and not (done.path() / "checkpoint").exists()
    assert [row["step"] for row in done.lines("steps.jsonl")] == [1, 5, 10, 15, 20]


def test_compiled_is_the_same_function(tmp_path, series, plain):
    done = run(tmp_path, series, use_compile="true", dropout=0.0)
    eager = run(tmp_path / "eager", series, dropout=0.0)
    losses = [[row["loss"] for row in run.lines("steps.jsonl")] for run in (done, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert done.info()["results"]["peak_allocated_gib"] is None  # cannot be counted without a GPU


# --- Pruning in training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["structural", "masked"])
def test_static_pruning_is_a_smaller_model_from_the_start(tmp_path, series, plain, mode):
    done = run(tmp_path, series, prune="static_random", prune_heads_per_layer=2, prune_mode=mode)
    info = done.info()
    assert all(row["heads"] == [2, 2] for row in done.lines("epochs.jsonl"))
    smaller = info["results"]["parameters"] < plain.info()["results"]["parameters"]
    assert smaller == (mode == "structural")
    report = info["results"]["pruning"]["static"]
    assert report["test_mse"] == pytest.approx(info["results"]["test_mse"]) and len(report["heads"][0]) == 2


def test_masked_and_structural_static_pruning_train_alike(tmp_path, series):
    losses = []
    for mode in ("structural", "masked"):
        flags = {"prune": "static_random", "prune_heads_per_layer": 2, "prune_mode": mode, "dropout": 0.0}
        losses.append([row["loss"] for row in run(tmp_path / mode, series, **flags).lines("steps.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("mode", ["structural", "masked"])
def test_dynamic_pruning(tmp_path, series, mode):
    flags = {"prune": "dynamic", "prune_heads_per_layer": 3, "prune_rounds": 2, "prune_every_epochs": 2}
    done = run(tmp_path, series, epochs=3, prune_mode=mode, **flags)
    assert done.status == 0, done.stderr
    rows = done.lines("pruning.jsonl")
    assert [(row["round"], row["layer"], len(row["removed"])) for row in rows] == [
        (1, 0, 1), (1, 1, 1), (2, 0, 2), (2, 1, 2),
    ]  # fmt: skip
    assert len(rows[0]["scores"]) == 4 and len(rows[2]["scores"]) == 3  # scored again without those that are gone
    lowest = min(rows[0]["scores"], key=rows[0]["scores"].get)
    assert rows[0]["removed"] == [int(lowest)] and rows[0]["epoch"] == 3
    heads = [row["heads"] for row in done.lines("epochs.jsonl")]
    assert heads == [[4, 4]] * 3 + [[3, 3]] * 2 + [[1, 1]] * 3  # nothing grows back
    results = done.info()["results"]
    report = results["pruning"]
    assert set(report) == {"before", "after", "further"}
    assert report["further"]["test_mse"] == pytest.approx(results["test_mse"], rel=1e-6)
    assert report["after"]["test_mse"] != report["before"]["test_mse"] != report["further"]["test_mse"]
    assert (report["after"]["parameters"] < report["before"]["parameters"]) == (mode == "structural")
    assert all(len(left) == 1 for left in report["further"]["heads"])
    assert results["best_epoch"] >= 5  # chosen among the state right after the last removal and the epochs from there
    rates = [row["learning_rate"] for row in done.lines("epochs.jsonl")]
    before = min(done.lines("epochs.jsonl")[:3], key=lambda row: row["validation_mse"])
    assert rates[3:] == pytest.approx([0.1 * before["learning_rate"]] * 5)
    assert (report["further"]["gflop_per_window"] < report["before"]["gflop_per_window"]) == (mode == "structural")
    saved = load_file(done.path() / "checkpoint" / "best.safetensors")
    width = 8 if mode == "masked" else 2
    assert saved["layers.0.attention.output.weight"].shape == (8, width)
    if mode == "masked":
        assert (saved["layers.0.attention.output.weight"] == 0).sum() >= 6 * 8


def test_pruning_begins_from_the_best_epoch_and_judges_heads_by_the_last_windows(tmp_path, series, monkeypatch):
    """Validation is made to rise, so that the first epoch is the best: weights and optimizer are those after it."""
    validations, states, judged = [], [], []
    evaluate, importance = patchtst_fit.Training.evaluate, head_pruning.importance
    remove = patchtst_pruning.remove_lowest

    def rising(self, name, *rest, **options):
        found = evaluate(self, name, *rest, **options)
        if name == "validation":
            validations.append(name)
            found["mse"] = float(len(validations))
        return found

    def seen(training, model, count, optimizer):
        if optimizer is not None:
            states.append({int(state["step"]) for state in optimizer.state_dict()["state"].values()})
        return remove(training, model, count, optimizer)

    def noted(model, kind, batches, loss):
        judged.append(torch.cat([batch[0] for batch in batches]))
        return importance(model, kind, batches, loss)

    monkeypatch.setattr(patchtst_fit.Training, "evaluate", rising)
    monkeypatch.setattr(patchtst_pruning, "remove_lowest", seen)
    monkeypatch.setattr(head_pruning, "importance", noted)
    flags = {"prune": "dynamic", "prune_heads_per_layer": 2, "prune_rounds": 1, "epochs": 3, "batch_size": 16}
    done = run(tmp_path, series, **flags)
    assert done.status == 0, done.stderr
    assert states == [{241 // 16}]
    windows = split_series(load_series(None, str(series)), context_length=32, horizon=8, device=CPU).splits["train"]
    last = windows.batch(torch.arange(241 - 8 * 16, 241))[0]
    assert len(judged) == 2 and all(torch.equal(inputs, last) for inputs in judged)


def test_training_on_that_does_not_help_is_not_kept(tmp_path, series):
    """A rate that ruins the model: validation then chooses the state right after the last removal."""
    flags = {"prune": "dynamic", "prune_heads_per_layer": 2, "prune_rounds": 1, "prune_learning_rate": 3.0}
    done = run(tmp_path, series, epochs=2, **flags)
    assert done.status == 0, done.stderr
    results = done.info()["results"]
    assert results["best_epoch"] == 2 and results["epochs"] == 4
    report = results["pruning"]
    assert report["further"]["test_mse"] == pytest.approx(report["after"]["test_mse"], rel=1e-5)
    assert [row["learning_rate"] for row in done.lines("epochs.jsonl")][2:] == [3.0, 3.0]


def test_the_control_of_dynamic_pruning_removes_nothing(tmp_path, series):
    done = run(tmp_path, series, prune="dynamic", prune_heads_per_layer=0, prune_rounds=2)
    assert [row["removed"] for row in done.lines("pruning.jsonl")] == [[]] * 4
    report = done.info()["results"]["pruning"]
    assert report["after"]["test_mse"] == pytest.approx(report["before"]["test_mse"], rel=1e-6)
    assert len(done.lines("epochs.jsonl")) == 2 + 1 + 2


def test_removals_are_even():
    assert removals(5, 5) == [1] * 5 and removals(5, 2) == [2, 3] and removals(0, 3) == [0, 0, 0]
    assert removals(8, 3) == [2, 3, 3]


def test_compiled_and_pruned(tmp_path, series):
    flags = {"prune": "dynamic", "prune_heads_per_layer": 2, "prune_rounds": 1, "use_compile": "true", "epochs": 1}
    done = run(tmp_path, series, **flags)
    assert done.status == 0, done.stderr
    assert done.lines("epochs.jsonl")[-1]["heads"] == [2, 2]


def test_summary_names_the_heads_of_every_layer():
    model = PatchTST(patchtst_config("official", embedding_dim=16, num_heads=4))
    assert [head_numbers(layer) for layer in attention_layers(model)] == [[0, 1, 2, 3]] * 3


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_fetching_data_costs_less_than_1_percent(tmp_path):
    flags = {
        name: None for name in ("context_length", "horizon", "embedding_dim", "num_heads", "ffn_dim", "num_layers")
    }
    flags |= {"patch_length": None, "patch_stride": None, "batch_size": 256, "device": "cuda", "epochs": 3}
    path = tmp_path / "long.csv"  # an epoch begins with a fixed cost, so it is one of a series as long as ETTh1
    rows = pandas.DataFrame(np.random.default_rng(0).normal(size=(17420, 7)), columns=list("abcdefg"))
    rows.insert(0, "date", pandas.date_range("2016-07-01", periods=len(rows), freq="h"))
    rows.to_csv(path, index=False)
    done = run(tmp_path, path, model_variant="transformers", evaluate_on="none", precision="bf16", **flags)
    assert done.status == 0, done.stderr
    assert done.info()["results"]["data_share"] < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_gpu_compiled_trains_and_prunes(tmp_path, series, mode):
    flags = {"prune": "dynamic", "prune_heads_per_layer": 2, "prune_rounds": 1, "use_compile": "true"}
    flags |= {"compile_mode": mode, "device": "cuda", "precision": "bf16", "embedding_dim": 32}
    done = run(tmp_path, series, **flags)
    assert done.status == 0, done.stderr
    results = done.info()["results"]
    assert results["test_mse"] < 2 and done.lines("epochs.jsonl")[-1]["heads"] == [2, 2]
    assert done.info()["attention_kernel"] == "memory_lab.short_attention"


@pytest.mark.gpu
def test_gpu_flash_means_flash(tmp_path, series):
    done = run(tmp_path, series, attn_type="flash", device="cuda", embedding_dim=32)
    info = done.info()
    assert info["precision"] == "bf16" and "flash" in info["attention_kernel"]
    done = run(tmp_path / "fp32", series, attn_type="flash", device="cuda", precision="fp32")
    assert done.status == 2 and "bf16 and fp16" in done.stderr
