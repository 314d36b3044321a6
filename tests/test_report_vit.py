"""The tables of the ViT: numbers of made-up runs, no difference where seeds overlap, one line for what was not run."""

import json
import math
import sys
from pathlib import Path

import pytest

import report_vit
from report_vit import (
    ablation_table,
    decatt_table,
    difference,
    effects_table,
    goal_table,
    peer_table,
    tokens_table,
)
from utils import SettingsError
from vit_results import seed_noise, seen_by_chance, student


def write_run(folder: Path, accuracies: tuple = (0.78, 0.8), tokens: int = 64, weight: float = 0.0, **more) -> None:
    folder.mkdir(parents=True)
    seeds = [
        {"seed": seed, "epochs": 50, "test_accuracy": value, "validation_accuracy": value + 0.01}
        | {"test_accuracy_without_a_redundant_head": value - 0.1, "test_accuracy_without_a_random_head": value - 0.2}
        | {
            "step_ms_median": 7.5 + seed,
            "flops_per_image": 1.5e9,
            "training_minutes": 1.25 - seed / 4,
            "first_step_ms": 15000 * (1 - seed),
        }
        for seed, value in enumerate(accuracies)
    ]
    results = {"parameters": 4197994, "training_minutes": 1.25, "total_minutes": 2.5, "images_per_s": 50000.0}
    results |= {"validation_accuracy": seeds[0]["validation_accuracy"], "peak_allocated_gib": 2.125, "seeds": seeds}
    results |= {"step_ms_median": 8.0, "augment_ms_median": 1.0, "tokenise_ms_median": 1.0}
    results |= {"head_correlation_squares": 0.0012, "head_correlation_at_start_squares": 0.022}
    results |= {"head_correlation_magnitudes": 0.0211, "head_correlation_at_start_magnitudes": 0.123}
    model = {"num_tokens": tokens, "num_layers": 12, "decorrelated_layers": 3 if weight else 0}
    info = {"status": "ok", "device_name": "a GPU", "batch_size": 500, "model": model, "decatt_weight": weight}
    (folder / "run.json").write_text(json.dumps(info | {"results": results} | more))


def write_study(folder: Path, study: str, cases: dict[str, dict]) -> None:
    folder.mkdir(parents=True)
    rows = []
    for name, options in cases.items():
        status = options.pop("status", "ok")
        rows.append({"name": name, "words": f"words of {name}", "status": status})
        if status == "ok":
            write_run(folder / name, **options)
    (folder / "experiment.json").write_text(json.dumps({"experiment": study, "cases": rows}))


def cells(table: str, first: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_nothing_run_is_said_in_every_table(tmp_path):
    tables = report_vit.vit_tables(tmp_path)
    assert list(tables) == [
        "vit ablation", "vit effects", "vit cifar100", "vit tokens", "vit decatt", "vit goal", "vit peer"
    ]  # fmt: skip
    for name, table in tables.items():
        assert "Not run yet: " in table() and "`python " in table(), name
    table = tables["vit cifar100"]()
    assert cells(table, "large")[2] == "not run: the data could not be had"
    assert cells(table, "large")[-2:] == ["45.72 %", "31.1"] and "--experiment ablation --dataset cifar100" in table


def test_ablation_holds_the_numbers_and_the_course_projects(tmp_path):
    cases = {"large": {"accuracies": (0.85, 0.87)}, "small": {}, "decatt": {"accuracies": (0.79, 0.81), "weight": 10.0}}
    cases |= {"mixed+flash": {"status": "oom"}, "flash": {"accuracies": (0.76, 0.77)}}
    write_study(tmp_path / "vit" / "ablation-cifar10", "ablation", cases)
    table = ablation_table(tmp_path, "cifar10")
    assert cells(table, "large")[2:] == [
        "4,197,994", "1.00 / 1.25", "86.00 %", "86.00 % (85.00-87.00)", "+7.00", "50,000 / 50,000", "2.12", "1.2e-03",
        "78.39 %", "30.9",
    ]  # fmt: skip
    assert cells(table, "small")[6] == "-" and cells(table, "small")[-2:] == ["not trained", "-"]
    assert cells(table, "decatt")[6] == "no difference (+1.00)" and cells(table, "flash")[6] == "no difference (-2.50)"
    assert cells(table, "mixed+flash")[2:4] == ["oom", "-"]
    assert cells(table, "mixed+flash")[-2:] == ["75.18 % (35 of 50 epochs)", "106.3"]
    assert cells(table, "centres")[2] == "not in the study"
    rows = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
    assert rows == list(report_vit.CASES)


@pytest.mark.parametrize(
    ("own", "control", "words"),
    [
        ((0.8, 0.82), (0.81, 0.83), "no difference (-1.00)"),
        ((0.8, 0.82), (0.82, 0.84), "no difference (-2.00)"),
        ((0.8, 0.82), (0.7, 0.72), "+10.00"),
        ((0.8, 0.8), (0.82, 0.82), "no difference (-2.00)"),  # ranges that miss each other by less than the noise
        ((0.8,), (0.7, 0.72), "+9.00 (one seed)"),
        ((0.8,), (), "-"),
    ],
)
def test_a_difference_needs_ranges_that_do_not_overlap_and_more_than_noise(own, control, words):
    first, second = ({"seeds": [{"test_accuracy": value} for value in values]} for values in (own, control))
    assert difference(first, second, (0.01, 20)) == words
    assert difference(first, None, (0.01, 20)) == "-"


def test_noise_of_seeds():
    """Student's t as in printed tables; the deviation within cases, weighted by degrees of freedom."""
    printed = {6: 2.447, 10: 2.228, 18: 2.101, 30: 2.042}
    assert all(abs(student(freedom) - value) < 2e-3 for freedom, value in printed.items())
    assert student(10**6) == pytest.approx(1.95996, abs=1e-4)
    cases = [{"seeds": [{"test_accuracy": value} for value in values]} for values in ((1, 3), (4, 4, 7), (9,))]
    deviation, freedom = seed_noise(cases)
    assert freedom == 3 and deviation == pytest.approx(((2 * 1 + 3 * 2) / 3) ** 0.5)
    assert seen_by_chance((2.0, 18), 3, 6) == pytest.approx(2.101 * 2 * 0.5**0.5, rel=1e-3)
    assert math.isnan(seen_by_chance(seed_noise(cases[2:]), 1, 1))


def test_effects_are_means_over_the_pairs_that_differ_by_one_technique(tmp_path):
    own = {"decatt": 0.01, "mixed": -0.02, "flash": 0.0}
    cases = {}
    for name in report_vit.CASES:
        if name not in ("large", "centres"):
            mean = 0.8 + sum(own[part] for part in name.split("+") if part in own) + 0.03 * (name == "decatt+mixed")
            cases[name] = {"accuracies": (mean - 0.01, mean, mean + 0.01)}
    write_study(tmp_path / "vit" / "ablation-cifar10", "ablation", cases)
    table = effects_table(tmp_path, "cifar10")
    half = 100 * student(16) * 0.01 * (8 / 3) ** 0.5 / 4  # 12 against 12 trainings
    assert half == pytest.approx(100 * student(16) * 0.01 * (2 / 12) ** 0.5)
    expected = {"DeCAtt": 1 + 3 / 4, "mixed-resolution tokens": -2 + 3 / 4, "flash attention": -3 / 4}
    for words, points in expected.items():
        cell = f"{points:+.2f} (+/- {half:.2f})"
        assert cells(table, words)[1:] == [cell, cell, "1.00-1.00", "1.00-1.00"]
    (tmp_path / "vit" / "ablation-cifar10" / "mixed" / "run.json").unlink()
    assert effects_table(tmp_path, "cifar10").startswith("Not run yet: all eight combinations")


def test_tokens(tmp_path):
    cases = {"grid-36": {"tokens": 36}, "mixed-49-random": {"status": "error"}}
    write_study(tmp_path / "vit" / "tokens-cifar10", "tokens", cases)
    table = tokens_table(tmp_path)
    expected = ["grid-36", "words of grid-36", "36", "79.00 %", "79.00 % (78.00-80.00)", "8.00 (7.50-8.50)", "1.00"]
    assert cells(table, "grid-36") == [*expected, "10.0 %", "50,000 / 50,000", "1.500"]
    assert cells(table, "mixed-49-random")[3] == "error"


def test_decatt_stands_beside_the_control(tmp_path):
    cases = {"weight-10-first-3": {"weight": 10.0}, "weight-100": {"status": "unsupported"}}
    write_study(tmp_path / "vit" / "decatt-cifar10", "decatt", cases)
    assert cells(decatt_table(tmp_path), "10")[3] == "-"
    write_study(tmp_path / "vit" / "ablation-cifar10", "ablation", {"flash": {"accuracies": (0.5, 0.6)}})
    table = decatt_table(tmp_path)
    assert cells(table, "0")[1:4] == ["none (ablation, flash)", "55.00 % (50.00-60.00)", "-"]
    assert cells(table, "10")[1:] == [
        "3 of 12", "79.00 % (78.00-80.00)", "+24.00", "2.2e-02, 1.2e-03", "0.123, 0.0211",
        "69.00 % (68.00-70.00)", "59.00 % (58.00-60.00)",
    ]  # fmt: skip
    assert cells(table, "weight-100")[2] == "unsupported"


def test_goal_holds_the_long_runs_beside_the_references(tmp_path):
    recipe = {"weight_decay": 0.5, "augmentation": {"operations": 1, "mixup_alpha": 0.0, "cutmix_alpha": 1.0}}
    model = {"num_tokens": 64, "num_layers": 12, "drop_path": 0.1}
    splits = {"train": 47500, "validation": 2500, "test": 10000}
    write_run(tmp_path / "vit" / "best", recipe=recipe, model=model, dataset={"splits": splits})
    write_run(tmp_path / "vit" / "best-long", status="oom")
    write_run(tmp_path / "vit" / "best-plain", accuracies=(0.5,))
    write_results(tmp_path / "vit" / "best-without")
    table = goal_table(tmp_path)
    own = ["RandAugment 1, cutmix 1, weight decay 0.5, drop path 0.1", "47,500 / 2,500", "4,197,994", "50"]
    own += ["1.00 / 1.25", "2.50", "80.00 % (79.00-81.00)", "79.00 % (78.00-80.00)"]
    assert cells(table, "`best`, a GPU")[1:] == own
    assert cells(table, "`best-long`, a GPU")[1:] == ["oom", *["-"] * 7]
    assert cells(table, "`best-plain`, a GPU")[1:4] == ["-", "-", "4,197,994"]
    assert cells(table, "`best-without`, a GPU")[1:3] == ["no status", "-"]
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "91.38 %" in table and "78.4 %" in table and "Not run" not in table


def technique_row(variant: str, **more) -> dict:
    row = {
        "variant": variant,
        "baseline": None,
        "status": "ok",
        "peak_gib": 1.0,
        "ms": 2.0,
        "ms_p20": 1.9,
        "ms_p80": 2.1,
    }
    row |= {"saved_gib": None, "formula_saved_gib": None, "extra_time": None, "exactness": None, "error": None}
    return row | {"note": ""} | more


def write_results(folder: Path, **results) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"device_name": "a GPU", "results": results}))


def test_peer(tmp_path):
    rows = [
        technique_row("plain"),
        technique_row("with", baseline="plain", ms=3.0, extra_time=0.5, exactness="bitwise"),
    ]
    rows += [technique_row("other", status="oom", note="too large")]
    rows[0]["residual_stream"] = "float32"
    rows[1] |= {"ms_of_rounds": [2.8, 3.3, None], "images_per_s": 1500.0}
    write_results(tmp_path / "vit" / "peer", rows=rows)
    table = peer_table(tmp_path)
    assert cells(table, "with")[1:8] == ["plain", "3.00 (2.80-3.30)", "1.50", "1,500", "1.00", "-", "bitwise"]
    assert cells(table, "plain")[2:7] == ["2.00", "-", "-", "1.00", "float32"] and cells(table, "other")[2] == "oom"
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_main_prints_every_table_or_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report_vit.py", "--output_folder", str(tmp_path)])
    with pytest.raises(SettingsError, match="run vit_train"):
        report_vit.main()
    (tmp_path / "vit").mkdir()
    assert report_vit.main() == 0
    out = capsys.readouterr().out
    assert all(name in out for name in report_vit.VIT_TABLES)
