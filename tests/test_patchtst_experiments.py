"""The experiments of patchtst_train.py, the benchmark against transformers, and the figures made from their files."""

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from test_patchtst_train import BASE

import case_runner
import patchtst_benchmark
import patchtst_experiments
import patchtst_train
import plot_patchtst
import plot_patchtst_studies
from patchtst_experiments import make_cases
from patchtst_train import EXPERIMENTS, SECTIONS, Settings
from run_results import Case
from utils import SettingsError, parse_settings, run_script

CPU = torch.device("cpu")
PNG = b"\x89PNG"
PUBLISHED_SETTINGS = {"dataset": "ETTm1", "data_path": "ETTm1.csv"}


def call(*words: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["patchtst_train.py", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        run_script(patchtst_train.main)
    return caught.value.code, out.getvalue(), err.getvalue()


def flags_of(folder: Path, series: Path) -> list[str]:
    shape = {name: value for name, value in BASE.items() if name != "figures"}
    shape |= {"data_path": series, "output_folder": folder, "epochs": 2}
    return [f"--{name}={value}" for name, value in shape.items()]


# --- Cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("name", [name.removesuffix("_exp") for name in EXPERIMENTS])
def test_every_case_has_flags_that_the_script_knows_and_a_name_of_its_own(name, gpu, tmp_path):
    settings = Settings(**PUBLISHED_SETTINGS)
    cases = make_cases(name, settings, gpu, {"dataset": "ETTm1", "data_path": "ETTm1.csv"})
    assert len({case.name for case in cases}) == len(cases) > 3
    for case in cases:
        words = case_runner.command(case, tmp_path / name, {"cache_folder": "x"})[2:]
        parsed = parse_settings(Settings, words, sections=SECTIONS)
        assert parsed.data_path == "ETTm1.csv" and parsed.run_name == case.name and parsed.figures is False


def test_a_sweep_changes_one_thing_at_equal_precision():
    for name, varied, values in (
        ("patch_size", "patch_length", [12, 24, 48, 96, 192]),
        ("batch_size", "batch_size", [32, 64, 128, 256, 512]),
        ("num_workers", "num_workers", [0, 2, 4, 8, 16]),
    ):
        cases = make_cases(name, Settings(), True, {})
        assert {case.flags["precision"] for case in cases} == {"bf16"}
        found = [int(case.flags[varied]) for case in cases if case.name.endswith("flash") and varied in case.flags]
        assert found == values
        by_value: dict[str, list[dict]] = {}
        for case in cases:
            rest = {key: value for key, value in case.flags.items() if key != "attn_type"}
            by_value.setdefault(case.name.rsplit("-", 1)[0], []).append(rest)
        assert all(all(rest == rests[0] for rest in rests) for rests in by_value.values())
        kinds = {case.flags["attn_type"] for case in cases}
        assert kinds == ({"vanilla", "flash"} if name == "num_workers" else {"vanilla", "flash", "auto"})
    assert {case.flags["precision"] for case in make_cases("patch_size", Settings(), False, {})} == {"fp32"}


def test_horizons_and_seeds():
    cases = make_cases("horizon", Settings(), True, {})
    assert [case.name for case in cases][:4] == [f"horizon-96-seed-{seed}" for seed in (0, 1, 2)] + [
        "horizon-192-seed-0"
    ]
    assert len(cases) == 12
    assert len(make_cases("horizon", Settings(seeds="5", horizon=48), True, {})) == 1


def test_the_pruning_study_has_its_controls():
    names = {case.name.rsplit("-seed-", 1)[0] for case in make_cases("pruning", Settings(), True, {})}
    assert names == {
        "whole", "static-conservative-1", "static-random-5", "dynamic-5", "dynamic-5-masked", "dynamic-5-weight-norm",
        "dynamic-8", "dynamic-0", "static-random-8",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--patch_size_exp", "--patch_length=12"], "--patch_length is what --patch_size_exp sets itself"),
        (["--batch_size_exp", "--attn_type=flash"], "--attn_type is what --batch_size_exp sets itself"),
        (["--patch_size_exp", "--parallel_runs=2"], "--parallel_runs above 1 would spoil the times"),
        (["--batch_size_exp", "--gpus=0,1"], "--gpus above 1 would spoil the times"),
        (["--horizon_exp", "--parallel_runs=0"], "--parallel_runs must be at least 1"),
        (["--horizon_exp", "--only=x"], "--only: no case is named x"),
        (["--horizon_exp", "--seeds=a"], "--seeds a must be different"),
        (["--horizon_exp", "--data_path=missing.csv"], "--data_path missing.csv cannot be read"),
    ],
)
def test_wrong_settings(tmp_path, words, sentence):
    status, _, err = call(*words, "--device=cpu", f"--output_folder={tmp_path}")
    assert status == 2 and sentence in err and not (tmp_path / "patchtst").exists()
    if not torch.cuda.is_available():
        assert "there is none here" in call("--horizon_exp", "--gpus=0", f"--output_folder={tmp_path}")[2]


# --- Running ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, series):
    """A horizon and a patch-size experiment, run for real with a tiny model; patches of 999 are longer than it sees."""
    folder = tmp_path_factory.mktemp("experiments")
    with patch.object(patchtst_experiments, "PATCH_LENGTHS", (8, 999)):
        words = [word for word in flags_of(folder, series) if not word.startswith(("--patch_", "--epochs"))]
        sweep = call("--patch_size_exp", *words)
    horizon = call("--horizon_exp", "--horizon=8", "--seeds=0,1", "--parallel_runs=2", *flags_of(folder, series))
    return folder, sweep, horizon


def test_an_experiment_runs_every_case_and_draws_those_that_fail_too(finished):
    folder, (status, out, err), (status_2, out_2, _) = finished
    assert status == status_2 == 0, err
    place = folder / "patchtst" / "patch_size-waves-context-32"
    content = json.loads((place / "experiment.json").read_text())
    assert {case["name"]: case["status"] for case in content["cases"]} == {
        "patch-8-vanilla": "ok", "patch-8-flash": "ok",
        "patch-999-vanilla": "unsupported", "patch-999-flash": "unsupported",
    }  # fmt: skip
    assert content["finished"] and "longer than --context_length" in content["cases"][2]["error"] and "longer" in out
    assert (place / "patchsize_plot.png").read_bytes()[:4] == PNG and str(place / "patchsize_plot.png") in out
    for case in content["cases"][:2]:
        results = json.loads((place / case["name"] / "run.json").read_text())["results"]
        assert results["epoch_total_s"] == pytest.approx(results["epoch_data_s"] + results["epoch_compute_s"], abs=1e-5)
    waves = folder / "patchtst" / "horizon-waves-context-32"
    assert {path.name for path in waves.glob("*.png")} == {"test_mse.png", "mse_curves.png"}
    assert json.loads(out_2.splitlines()[-1])["status"] == "ok"


def test_finished_cases_are_not_run_again(finished, series):
    folder, _, _ = finished
    before = (folder / "patchtst" / "horizon-waves-context-32" / "horizon-8-seed-0" / "run.json").read_text()
    status, out, _ = call("--horizon_exp", "--horizon=8", "--seeds=0,1", *flags_of(folder, series))
    assert status == 0 and "2 cases, 0 to run" in out
    assert (folder / "patchtst" / "horizon-waves-context-32" / "horizon-8-seed-0" / "run.json").read_text() == before


def test_other_flags_are_said_and_run_anew(tmp_path, series):
    words = ["--horizon_exp", "--horizon=8", "--seeds=0", *flags_of(tmp_path, series)]
    assert call(*words)[0] == 0
    status, out, err = call(*words, "--dropout=0.1")
    assert status == 0, err
    assert "horizon-8-seed-0 was made with other flags and is run anew: --dropout was not given, is 0.1" in out


def test_an_experiment_without_a_trained_case_is_not_ok(tmp_path, series):
    words = ["--patch_size_exp", "--only=patch-999-vanilla", *flags_of(tmp_path, series)]
    with patch.object(patchtst_experiments, "PATCH_LENGTHS", (999,)):
        status, out, _ = call(*[word for word in words if not word.startswith(("--patch_l", "--patch_st", "--epochs"))])
    assert status == 1 and json.loads(out.splitlines()[-1])["status"] == "failed" and "no case trained" in out


def test_the_pruning_experiment_draws_its_figure(tmp_path, series):
    table = (patchtst_experiments.PRUNING_CASES[0], patchtst_experiments.PRUNING_CASES[3])
    with patch.object(patchtst_experiments, "PRUNING_CASES", table):
        status, out, err = call("--pruning_exp", "--seeds=0", "--parallel_runs=2", *flags_of(tmp_path, series))
    assert status == 0, err
    assert (tmp_path / "patchtst" / "pruning-waves-context-32" / "val_mse_pruning.png").read_bytes()[:4] == PNG
    assert "dynamic-1-seed-0" in out


# --- Figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_runs_and_experiments_from_the_command_line(finished, monkeypatch, capsys):
    folder, _, _ = finished
    run = folder / "patchtst" / "horizon-waves-context-32" / "horizon-8-seed-0"
    monkeypatch.setattr(sys, "argv", ["plot_patchtst.py", str(run), str(run.parent)])
    assert plot_patchtst.main() == 0
    printed = capsys.readouterr().out.splitlines()
    for name in ("mse_curves.png", "forecast.png", "memory_per_phase.png"):
        assert (run / name).read_bytes()[:4] == PNG and str(run / name) in printed
    monkeypatch.setattr(sys, "argv", ["plot_patchtst.py", str(folder)])
    with pytest.raises(SettingsError, match=r"neither run.json nor experiment.json"):
        plot_patchtst.main()
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "experiment.json").write_text("{")
    monkeypatch.setattr(sys, "argv", ["plot_patchtst.py", str(folder / "broken")])
    with pytest.raises(SettingsError, match="is damaged"):
        plot_patchtst.main()


def made_up_case(name: str, results: dict, epochs: list[tuple[float, int]]) -> Case:
    """A case of an experiment; `epochs` are validation errors and heads."""
    rows = [{"epoch": i, "validation_mse": mse, "heads": [heads]} for i, (mse, heads) in enumerate(epochs, start=1)]
    info = {"dataset": {"name": "ETTh1"}, "model": {"context_length": 336}, "results": results}
    return Case(name, name, "ok", None, info, rows)


@pytest.mark.parametrize("with_whole", [True, False])
def test_pruning_figure_keeps_first_and_further_training_apart(with_whole):
    first = [(0.5, 4), (0.4, 4), (0.45, 4)]
    further = {"after": {"test_mse": 0.44}, "further": {"test_mse": 0.41}}
    cases = [made_up_case("whole-seed-0", {"test_mse": 0.42}, first)] if with_whole else []
    results = {"test_mse": 0.41, "pruning": further}
    cases += [made_up_case("dynamic-2-seed-0", results, [*first, (0.41, 3), (0.43, 2)])]
    cases += [made_up_case("static-random-2-seed-0", {"test_mse": 0.43}, [(0.6, 2), (0.5, 2), (0.52, 2)])]
    left, right, below = plot_patchtst_studies.pruning_figure(cases).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    whole = [[1, 0.5], [2, 0.4], [3, 0.45]]
    assert lines["whole" if with_whole else "dynamic-2"] == whole and len(lines) == 2
    assert [line.get_xydata().tolist() for line in right.lines] == [[[1, 0.41], [2, 0.43]]]
    points = [point for line in below.lines for point in line.get_xdata()]
    assert sorted(points) == sorted([*([0.42] * 2 if with_whole else []), 0.41, 0.41, 0.44, 0.43, 0.43])


def test_horizon_figure_shows_the_published_windows():
    def results(all_windows: float, whole: float) -> dict:
        return {"test_mse": all_windows, "test_in_whole_batches": {"mse": whole}}

    cases = [made_up_case(f"horizon-96-seed-{i}", results(0.38 + i / 100, 0.36 + i / 100), []) for i in (0, 1)]
    (ax,) = plot_patchtst_studies.horizon_figure(cases).axes
    diamonds = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "D"]
    assert diamonds == [[[0, pytest.approx(0.365)]]]
    assert ax.get_ylim()[0] < 0.365


def test_break_even_figure_draws_no_ratio_where_textbook_attention_did_not_fit(tmp_path):
    times = [
        {"tokens": 4, "windows": 2, "compiled": False, "ms": {"eager": [2.0, 2.0], "short": [1.0, 1.0]}},
        {"tokens": 8, "windows": 1, "compiled": False, "ms": {"eager": [None, None], "short": [1.0, 1.0]}},
    ]
    settings = {"precision": "bf16", "embedding_dim": 16, "num_heads": 4, "rounds": 2}
    info = {"device_name": "a GPU", "settings": settings, "results": {"times": times}}
    (tmp_path / "run.json").write_text(json.dumps(info))
    (ax,) = plot_patchtst_studies.break_even_figure(tmp_path).axes
    (line,) = [line for line in ax.lines if line.get_label() == "short"]
    assert line.get_xydata().tolist() == [[4, 0.5]]
    assert [text.get_text() for text in ax.texts] == ["textbook: oom\n(short: ok)"]


# --- Against transformers ---------------------------------------------------------------------------------------------

TINY = ["--batch_size", "2", "--channels", "2", "--context_length", "48", "--embedding_dim", "16", "--num_heads", "4"]
TINY += ["--ffn_dim", "16", "--rounds", "2", "--repeats", "1", "--break_even_tokens", "4,8"]


def benchmark(monkeypatch, folder, *more):
    monkeypatch.setattr(sys, "argv", ["patchtst_benchmark.py", *TINY, "--output_folder", str(folder), *more])
    return patchtst_benchmark.main()


def test_the_benchmark_answers_its_questions(tmp_path, monkeypatch, capsys):
    assert benchmark(monkeypatch, tmp_path) == 0
    results = {
        name: json.loads((tmp_path / "patchtst" / name / "run.json").read_text())["results"]
        for name in patchtst_benchmark.QUESTIONS
    }
    rows = {row["variant"]: row for row in results["peer"]["rows"]}
    assert {"transformers, eager", "transformers, sdpa", "this lab, eager", "this lab, sdpa"} == set(rows)
    assert [len(row["ms"]) for row in results["peer"]["rounds"]] == [2] * 4
    for name in ("this lab, eager", "this lab, sdpa"):
        assert rows[name]["exactness"] == "within rounding" and rows[name]["baseline"] == "transformers, eager"
    assert "flash_attention_for_cpu" in rows["this lab, sdpa"]["note"]
    assert rows["this lab, eager"]["note"] == "matmul, softmax, matmul (eager)"
    rows = {row["variant"]: row for row in results["pruned_step"]["rows"]}
    assert rows["2 of 4 heads cut"]["peak_gib"] < rows["2 of 4 heads masked"]["peak_gib"]
    sizes = {row["variant"]: (row["parameters"], row["gflop"]) for row in results["pruned_step"]["rounds"]}
    assert sizes["whole"] == sizes["2 of 4 heads masked"] > sizes["1 of 4 heads cut"] > sizes["2 of 4 heads cut"]
    times = results["break_even"]["times"]
    assert {row["tokens"] for row in times} >= {4, 8} and all(set(row["ms"]) == {"eager", "sdpa"} for row in times)
    assert "step with sdpa is faster than with eager" in capsys.readouterr().out
    folder = tmp_path / "patchtst" / "break_even"
    monkeypatch.setattr(sys, "argv", ["plot_patchtst.py", str(folder)])
    assert plot_patchtst.main() == 0 and (folder / "break_even.png").read_bytes()[:4] == PNG


def test_a_wrong_model_does_not_pass_the_parity_check(monkeypatch):
    """A causal fused variant, the course project's mistake, is `changed`."""
    settings = patchtst_benchmark.Settings(
        batch_size=2, channels=2, context_length=48, embedding_dim=16, num_heads=4, ffn_dim=16, precision="fp32"
    )
    batch = patchtst_benchmark.make_batch(settings, 2, CPU)
    model = patchtst_benchmark.our_model(settings, "sdpa")
    trial = patchtst_benchmark.Trial(model, settings, CPU, batch)
    assert patchtst_benchmark.check_parity(trial, settings, CPU, batch)[0] == "within rounding"
    original = patchtst_benchmark.PatchTST.forward.__globals__["packed_attention"]

    def causal(qkv, **options):
        return original(qkv, **(options | {"causal": True}))

    monkeypatch.setitem(sys.modules["patchtst"].__dict__, "packed_attention", causal)
    assert patchtst_benchmark.check_parity(trial, settings, CPU, batch)[0] == "changed"


def test_what_is_compared_and_named_is_what_is_timed(monkeypatch):
    """A compiled model is compared as it is called, so that a mistake of the compiler would not pass."""
    settings = patchtst_benchmark.Settings(
        batch_size=2, channels=2, context_length=48, embedding_dim=16, num_heads=4, ffn_dim=16, precision="fp32"
    )
    batch = patchtst_benchmark.make_batch(settings, 2, CPU)
    trial = patchtst_benchmark.Trial(patchtst_benchmark.our_model(settings, "eager"), settings, CPU, batch)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: lambda inputs: 1.001 * model(inputs))
    trial.compile()
    assert trial.kernel() == "matmul, softmax, matmul (compiled)"
    assert patchtst_benchmark.check_parity(trial, settings, CPU, batch)[0] == "changed"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--questions", "speed"], "--questions speed must be different ones"),
        (["--backends", "flash_attn"], "--backends flash_attn cannot run here"),
        (["--backends", "fast"], "--backends fast cannot run here: it is unknown"),
        (["--break_even_tokens", "8,4"], "must be rising numbers"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--num_heads", "3"], "not divisible by --num_heads 3"),
    ],
)
def test_wrong_settings_of_the_benchmark(tmp_path, monkeypatch, more, words):
    with pytest.raises(SettingsError, match=words):
        benchmark(monkeypatch, tmp_path, *more)
