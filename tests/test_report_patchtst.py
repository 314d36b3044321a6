"""The tables of PatchTST: means by hand, statuses instead of gaps, one line for what was not run."""

import json
from pathlib import Path

import pytest

import report_patchtst
from report_patchtst import context_of, horizon_table, patchtst_tables, pruning_table, sweep_table
from utils import SettingsError


def write_case(folder: Path, name: str, status: str = "ok", totals: tuple = (), **results) -> dict:
    info = {
        "status": status,
        "precision": "bf16",
        "model": {
            "attention_backend": "short" if name.endswith("auto") else "eager",
            "context_length": context_of(folder) if "horizon" in folder.name else 512,
            "patch_length": 12, "patch_stride": 12, "end_padding": False,
        },
        "results": results,
    }  # fmt: skip
    if status == "ok":
        (folder / name).mkdir(parents=True)
        (folder / name / "run.json").write_text(json.dumps(info))
        lines = [json.dumps({"epoch": number, "total_s": seconds}) for number, seconds in enumerate(totals, 1)]
        (folder / name / "epochs.jsonl").write_text("\n".join(lines))
    return {"name": name, "words": f"words of {name}", "flags": {}, "status": status}


def write_experiment(folder: Path, experiment: str, cases: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(json.dumps({"experiment": experiment, "cases": cases}))


def cells(table: str, first: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_nothing_run_is_said_in_every_table(tmp_path):
    (tmp_path / "patchtst").mkdir()
    for name, table in patchtst_tables(tmp_path).items():
        text = table()
        assert "ot run" in text, name
        if name != "patchtst horizon":
            assert text.startswith("Not run yet: ") and "python patchtst_" in text


def test_means_and_statuses_of_the_horizons(tmp_path):
    folder = tmp_path / "patchtst" / "horizon-ETTm1"
    day = {"repeat last day": {"mse": 0.5, "mae": 0.4}}
    rows = []
    for seed, mse in enumerate((0.30, 0.29, 0.31)):
        whole = {"windows": 128, "mse": mse - 0.01, "mae": 0.1}
        options = {"test_mse": mse, "test_mae": 0.35, "baselines": day, "test_in_whole_batches": whole}
        rows.append(write_case(folder, f"horizon-96-seed-{seed}", **options))
    rows.append(write_case(folder, "horizon-192-seed-0", test_mse=0.4, test_mae=0.3, baselines={}))
    rows.append(write_case(folder, "horizon-192-seed-1", status="oom"))
    rows.append(write_case(folder, "horizon-336-seed-0", status="error"))
    write_experiment(folder, "horizon", rows)
    table = horizon_table(tmp_path)
    assert cells(table, "ETTm1 | 336 | 96")[3:8] == ["3", "0.3000", "0.0200", "0.3500", "0.2900"]
    assert cells(table, "ETTm1 | 336 | 96")[8:11] == ["0.290 / 0.342", "0.293 / 0.346", "0.5000"]
    assert (
        cells(table, "ETTm1 | 336 | 192")[3:5] == ["1 of 2", "0.4000"] and cells(table, "ETTm1 | 336 | 192")[7] == "-"
    )
    assert cells(table, "ETTm1 | 336 | 336")[3] == "error" and cells(table, "ETTm1 | 336 | 720")[3] == "not run"
    assert cells(table, "traffic | 336 | 96")[3] == "not run: the data could not be had"


def test_another_data_set_has_rows_without_published_errors(tmp_path):
    folder = tmp_path / "patchtst" / "horizon-mine"
    results = {"test_mse": 0.3, "test_mae": 0.35, "baselines": {}}
    write_experiment(folder, "horizon", [write_case(folder, "horizon-24-seed-0", **results)])
    assert cells(horizon_table(tmp_path), "mine | 336 | 24")[3:10] == ["1", "0.3000", "0.0000", "0.3500", "-", "-", "-"]


def test_horizons_of_a_longer_context_follow_those_of_the_standard_one(tmp_path):
    for context, mse in (("", 0.3), ("-context-1024", 0.1), ("-context-512", 0.2)):
        folder = tmp_path / "patchtst" / f"horizon-ETTh1{context}"
        results = {"test_mse": mse, "test_mae": 0.35, "baselines": {}}
        write_experiment(folder, "horizon", [write_case(folder, "horizon-96-seed-0", **results)])
    found = [
        line.split(" | ")[:5] for line in horizon_table(tmp_path).splitlines() if "ETTh1" in line and "| 96 |" in line
    ]
    assert [(line[1], line[4]) for line in found] == [("336", "0.3000"), ("512", "0.2000"), ("1024", "0.1000")]


def test_a_sweep_with_a_case_that_failed(tmp_path):
    folder = tmp_path / "patchtst" / "batch_size-ETTm1"
    times = {"epoch_data_s": 0.5, "epoch_compute_s": 1.5, "epoch_total_s": 2.0, "peak_allocated_gib": 4.0}
    fast = times | {"epoch_compute_s": 0.5, "epoch_total_s": 1.0}
    times["totals"], fast["totals"] = (9.0, 1.9, 2.0, 2.1), (9.0, 0.9, 1.0, 1.8)
    rows = [write_case(folder, "batch-32-vanilla", **times), write_case(folder, "batch-32-flash", status="unsupported")]
    rows.append(write_case(folder, "batch-32-auto", **fast))
    for totals, batch in (((9.0, 0.9, 1.0, 1.95), 64), ((9.0, 1.0), 128)):
        rows.append(write_case(folder, f"batch-{batch}-vanilla", **times))
        rows.append(write_case(folder, f"batch-{batch}-auto", **fast | {"totals": totals}))
    write_experiment(folder, "batch_size", rows)
    for batch in ("64", "128"):  # an epoch as slow as textbook attention's fastest; one epoch has no spread
        assert cells(sweep_table(tmp_path, "batch_size"), batch)[5] == "+50.0 % (not clear)"
    line = cells(sweep_table(tmp_path, "batch_size"), "32")
    assert line[1] == "0.500 + 1.500 = 2.000" and line[2] == "unsupported + - = -" and line[3] == "-"
    assert line[4:6] == ["0.500 + 0.500 = 1.000", "+50.0 %"] and line[6] == "4.00 / - / 4.00"
    assert line[7] == "24.7, 23.3"  # what the course project reported


def test_the_pruning_table(tmp_path):
    folder = tmp_path / "patchtst" / "pruning-ETTh1"
    rows = []
    for seed, mse in enumerate((0.40, 0.42)):
        stages = {"before": {"test_mse": 0.5}, "after": {"test_mse": 0.6}}
        stages |= {"further": {"test_mse": mse, "gflop_per_window": 0.25}}
        options = {"test_mse": mse, "parameters": 1000, "pruning": stages}
        rows.append(write_case(folder, f"dynamic-5-seed-{seed}", **options))
    rows.append(write_case(folder, "whole-seed-0", status="error"))
    write_experiment(folder, "pruning", rows)
    table = pruning_table(tmp_path)
    assert cells(table, "dynamic-5")[2:] == ["2", "1,000", "0.2500", "0.5000", "0.6000", "0.4100", "0.0200"]
    assert cells(table, "whole")[2] == "error"


def test_main_needs_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report_patchtst.py", "--output_folder", str(tmp_path)])
    with pytest.raises(SettingsError, match=r"is missing; run patchtst_train\.py"):
        report_patchtst.main()
    monkeypatch.setattr("sys.argv", ["report_patchtst.py"])
    assert report_patchtst.main() == 0 and "patchtst break-even" in capsys.readouterr().out
