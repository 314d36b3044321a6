"""The tables of FP8: rows stand against the bf16 run of the same model and seed, and say what has not been run."""

import json
import sys
from pathlib import Path

import pytest

import fp8_results
import plot_fp8
import report_fp8
from utils import SettingsError, run_script

RESULTS = {
    "tokens_per_s": 1000.0, "step_ms_median": 50.0, "step_ms_p20": 49.0, "step_ms_p80": 51.0, "mfu": 0.5,
    "peak_allocated_gib": 10.0, "compile_s": 20.0, "flops_per_token": 4500,
}  # fmt: skip


def make_run(outputs: Path, name: str, *, seed: int = 0, losses: float = 5.0, status: str = "ok", fp8=None, **more):
    folder = outputs / "fp8" / name
    folder.mkdir(parents=True)
    settings = {"seed": seed, "batch_size": 8, "parameters": "fp32", "context_length": None, "learning_rate": 0.1}
    info = {
        "run_name": name, "status": status, "model_size": "llama-1b", "precision": "fp8" if fp8 else "bf16", "fp8": fp8,
        "device_name": "card", "settings": settings, "results": RESULTS | more,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(info))
    rows = [{"step": step, "loss": losses + (step <= 25)} for step in range(1, 61)]
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


FP8 = {
    "recipe": "tensorwise", "layers": "all", "emulated": False, "kept": [{"name": "head"}],
    "converted": [{"name": "a", "inputs": 10, "outputs": 20, "count": 3}],
}  # fmt: skip


@pytest.fixture
def outputs(tmp_path) -> Path:
    make_run(tmp_path, "c", fp8=FP8, losses=5.1, tokens_per_s=1300.0, mfu=0.3, mfu_bf16_peak=0.6, mfu_fp8_peak=0.3)
    make_run(tmp_path, "a", losses=5.0)
    make_run(tmp_path, "b", seed=1, losses=5.4, tokens_per_s=900.0)
    make_run(tmp_path, "d", seed=1, fp8=FP8 | {"kept": [], "recipe": "rowwise"}, status="oom")
    return tmp_path


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_training_rows(outputs):
    rows = cells(report_fp8.training_table(outputs))
    assert {tuple(row[:2]) for row in rows} == {("card", "`llama-1b`, no warm-up")}
    assert [row[2:4] for row in rows] == [
        ["bf16", "0"], ["bf16", "1"], ["fp8 rowwise, head too", "1"], ["fp8 tensorwise", "0"],
    ]  # fmt: skip
    assert rows[2][4] == "oom" and set(rows[2][5:]) == {"-"}
    # 6 x 10 x 20 x 3 = 3600 of 4500 FLOPs in FP8: if they took half the time, 1 / (0.2 + 0.4).
    assert rows[3][4:11] == ["1,300", "50.0 (49.0-51.0)", "1.300", "80.0 %", "1.67", "60.0 %", "30.0 %"]
    assert rows[0][6:9] == ["-"] * 3 and rows[0][9:11] == ["50.0 %", "-"] and rows[0][-1] == "5.000 at 60"
    assert len({len(row) for row in rows}) == 1


def test_an_emulated_run_has_no_speed(tmp_path):
    make_run(tmp_path, "a", losses=5.0)
    make_run(tmp_path, "b", fp8=FP8 | {"emulated": True}, losses=5.2, tokens_per_s=3.0)
    row = cells(report_fp8.training_table(tmp_path))[1]
    assert row[2] == "fp8 tensorwise, emulated" and set(row[4:-1]) == {"-"} and row[-1] == "5.200 at 60"


def test_parity_rows(outputs):
    rows = cells(report_fp8.parity_table(outputs))
    assert rows == [
        ["`llama-1b`, no warm-up", "bf16", "0 and 1, card", "50", "0.400", "0.400", "-0.400"],
        ["`llama-1b`, no warm-up", "fp8 tensorwise", "0, card", "50", "0.100", "0.100", "+0.100"],
    ]


def test_losses_of_a_run_repeated_and_of_another_warm_up(outputs):
    make_run(outputs, "repeat", losses=5.02)
    make_run(outputs, "warm", losses=4.0)
    for name, change in (("repeat", {"device_name": "other card"}), ("warm", {"warm_up_steps": 50})):
        path = outputs / "fp8" / name / "run.json"
        info = json.loads(path.read_text())
        info["settings"] |= {key: value for key, value in change.items() if key == "warm_up_steps"}
        path.write_text(json.dumps(info | {key: value for key, value in change.items() if key == "device_name"}))
    rows = cells(report_fp8.parity_table(outputs))
    assert [row[2] for row in rows if row[1] == "bf16"] == [
        "0 and 1, card", "0 and 0, card and other card", "1 and 0, card and other card",
    ]  # fmt: skip
    assert {row[0] for row in rows} == {"`llama-1b`, no warm-up"}  # the run with a warm-up has no twin
    assert report_fp8.model_words(report_fp8.runs_of(outputs)[0]) == "`llama-1b`"


def test_another_batch_or_card_is_no_baseline(outputs):
    changes = ({"device_name": "other card"}, {"settings": {"batch_size": 4}}, {"settings": {"use_compile": True}})
    for change in changes:
        path = outputs / "fp8" / "a" / "run.json"
        before = path.read_text()
        info = json.loads(before)
        for key, value in change.items():
            info[key] = info[key] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(info))
        (row,) = (row for row in cells(report_fp8.training_table(outputs)) if row[2] == "fp8 tensorwise")
        assert row[6] == "-"
        path.write_text(before)


def test_a_shorter_run_stands_against_a_longer_one_if_none_is_as_short(tmp_path):
    make_run(tmp_path, "fp8", fp8=FP8)
    make_run(tmp_path, "long")
    for name, steps in (("fp8", 60), ("long", 300)):
        rewrite(tmp_path, name, steps)
    runs = report_fp8.runs_of(tmp_path)
    assert report_fp8.baseline_of(runs[1], runs).name == "long"
    make_run(tmp_path, "short")
    rewrite(tmp_path, "short", 60)
    runs = report_fp8.runs_of(tmp_path)
    assert report_fp8.baseline_of(runs[2], runs).name == "short"


def rewrite(outputs: Path, name: str, max_steps: int) -> None:
    path = outputs / "fp8" / name / "run.json"
    info = json.loads(path.read_text())
    info["settings"]["max_steps"] = max_steps
    path.write_text(json.dumps(info))


def make_benchmark(outputs: Path, name: str, lines: list[str], started: str, **more) -> None:
    folder = outputs / "fp8" / name
    folder.mkdir()
    (folder / "results.csv").write_text("\n".join([",".join(fp8_results.COLUMNS), *lines]) + "\n")
    info = {"status": "ok", "started_at": started, "device_name": "card", "torch_version": "2"} | more
    (folder / "run.json").write_text(json.dumps(info))


def test_the_benchmarks_tables(outputs):
    assert report_fp8.break_even_table(outputs).startswith("Not run yet: the break-even widths")
    lines = [
        "layers,square,1024,64,1024,1024,bf16,ok,1.5,0.5,0.5,5,10,,,,1980,0.1,1,0.002",
        "layers,square,1024,64,1024,1024,tensorwise,oom,,,,0,,,,,1980,,,0.03",
        "layers,square,2048,64,2048,2048,bf16,ok,1.5,0.5,0.5,5,10,,,,1980,0.1,1,0.002",
        "layers,square,2048,64,2048,2048,tensorwise,ok,1,0.5,0.5,5,10,,1.5,yes,1980,0.1,1,0.002",
        "layers,square,512,64,512,512,bf16,ok,9,0.5,0.5,5,10,,,,1980,0.1,1,0.002",
    ]
    make_benchmark(outputs, "benchmark", lines, "2026-01-01")
    lines = [
        "layers,square,512,64,512,512,bf16,ok,0.5,0.5,0.5,5,10,,,,1980,0.1,1,0.002",
        "layers,square,512,64,512,512,tensorwise,ok,0.8,0.8,0.8,5,10,,0.625,no,1980,0.2,1,0.03",
    ]
    make_benchmark(outputs, "mine", lines, "2026-01-02")
    cut = ["layers,square,2048,64,2048,2048,rowwise,ok,2,0.5,0.5,5,10,,0.75,no,1980,0.1,1,0.002"]
    make_benchmark(outputs, "cut", cut, "2026-01-03", status="interrupted")
    other = [line.replace("512", "256").replace("0.625,no", "1.25,yes") for line in lines]
    make_benchmark(outputs, "old", other, "2025-01-01", device_name="other card")
    rows = cells(report_fp8.widths_table(outputs, "layers", ("ms", "speedup")))
    assert rows == [
        ["card", "64", "512 to 512", "0.500", "0.800 / 0.625"],
        ["card", "64", "1,024 to 1,024", "1.50", "oom"],
        ["card", "64", "2,048 to 2,048", "1.50", "1.00 / 1.50"],  # the newer run's row has nothing to stand against
        ["other card", "64", "256 to 256", "0.500", "0.800 / 1.25"],
    ]
    found = [row[-2:] for row in cells(report_fp8.break_even_table(outputs))]
    assert found == [
        ["tensorwise", "2,048 (not yet at 512); not measured: 1,024"],
        ["tensorwise", "256, the smallest"],
    ]
    assert report_fp8.widths_table(outputs, "blocks", ("ms",)).startswith("Not run yet: the benchmark's blocks")
    (outputs / "fp8" / "benchmark" / "run.json").unlink()
    assert [row[-1] for row in cells(report_fp8.break_even_table(outputs))] == [
        "not up to 512", "not up to 2,048", "256, the smallest",
    ]  # fmt: skip


def test_a_line_that_a_kill_cut_off_is_ignored_and_a_damaged_file_is_one_sentence(outputs):
    line = "layers,square,512,64,512,512,bf16,ok,0.5,0.5,0.5,5,10,,,,1980,0.1,1,0.002"
    make_benchmark(outputs, "benchmark", [line, line.replace("512", "768")[:-30]], "2026-01-01")
    path = outputs / "fp8" / "benchmark" / "results.csv"
    path.write_text(path.read_text().rstrip())
    assert [row["width"] for row in fp8_results.read_rows(outputs)] == ["512"]
    for wrong in (line[:-30], line.replace("512", "wide"), line.replace(",512,bf16", ",abc,bf16"), "x"):
        path.write_text(",".join(fp8_results.COLUMNS) + "\n" + wrong + "\n")
        with pytest.raises(SettingsError, match="holds a row that fp8_benchmark"):
            fp8_results.read_rows(outputs)
    path.write_text("question,name,width\nlayers,square,512\n")
    with pytest.raises(SettingsError, match="is of an older fp8_benchmark"):
        fp8_results.read_rows(outputs)


@pytest.mark.parametrize("status", ["running", "oom"])
def test_a_baseline_without_results_is_none(tmp_path, status):
    make_run(tmp_path, "bf16", status=status)
    make_run(tmp_path, "fp8", fp8=FP8)
    rows = cells(report_fp8.training_table(tmp_path))
    assert [row[6] for row in rows] == ["-", "-"]


@pytest.mark.parametrize(
    ("measured_on", "known"), [("1 x card", True), ("1 x other card", False), ("2 x card, ddp", False), (None, False)]
)
def test_a_resumed_run_has_the_speed_of_the_gpu_that_it_names(tmp_path, measured_on, known):
    make_run(tmp_path, "bf16", measured_on=measured_on)
    make_run(tmp_path, "fp8", fp8=FP8)
    path = tmp_path / "fp8" / "bf16" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resumed": [{"step": 3}]}))
    bf16, fp8 = cells(report_fp8.training_table(tmp_path))
    assert (bf16[4], fp8[6]) == (("1,000", "1.000") if known else ("ok, resumed elsewhere", "-"))
    assert known or set(bf16[5:-1]) == {"-"}


def test_a_loss_that_is_not_finite(tmp_path):
    make_run(tmp_path, "bf16")
    path = tmp_path / "fp8" / "bf16" / "steps.jsonl"
    path.write_text(path.read_text() + '{"step": 61, "loss": null}\n')
    (row,) = cells(report_fp8.training_table(tmp_path))
    assert row[-1] == "not finite at 61"
    assert report_fp8.block_means(report_fp8.runs_of(tmp_path)[0]) == [6.0, 5.0]


def test_a_run_too_short_to_time(tmp_path):
    make_run(tmp_path, "fp8", fp8=FP8, tokens_per_s=None)
    (row,) = cells(report_fp8.training_table(tmp_path))
    assert row[4] == "too short to time" and row[-1] == "5.000 at 60"


def test_the_figure_has_a_panel_for_each_question_and_gpu(outputs, monkeypatch, capsys):
    layers = [
        "layers,{0},{1},64,{1},{1},{2},{3},1,1,1,5,10,,{4},,1980,0.1,1,0.002".format(*row)
        for row in [
            ("square", 512, "bf16", "ok", ""), ("square", 512, "tensorwise", "ok", 0.5),
            ("square", 1024, "bf16", "ok", ""), ("square", 1024, "tensorwise", "ok", 1.5),
            ("expand", 512, "tensorwise", "oom", ""),
        ]
    ]  # fmt: skip
    make_benchmark(outputs, "benchmark", layers, "2026-01-01")
    blocks = ["blocks,gpt2,768,64,,,rowwise,ok,1,1,1,20,10,,0.7,no,1980,0.1,1,0.002"]
    make_benchmark(outputs, "blocks", blocks, "2026-01-02", device_name="other card")
    figure = plot_fp8.speedup_figure(outputs)
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.axison]
    assert titles == ["layers, 64 tokens\ncard", "blocks, 64 tokens\nother card"]
    lines = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[512, 0.5], [1024, 1.5]] in lines and [[512, 0.06]] in lines  # the cross of what did not fit
    assert [text.get_text() for text in figure.axes[0].texts] == ["tensorwise:\noom"]
    hollow = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
    assert hollow == [[[1024, 1.5]]]  # not clear
    assert "middle rounds, n = 5 to 20" in figure.get_suptitle()
    monkeypatch.setattr(sys, "argv", ["plot_fp8.py", f"--output_folder={outputs}"])
    assert plot_fp8.main() == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == outputs / "plots" / "fp8" / "speedup_by_width.png" and path.read_bytes()[:4] == b"\x89PNG"


def test_a_figure_of_nothing_is_one_sentence(outputs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot_fp8.py", f"--output_folder={outputs}"])
    with pytest.raises(SystemExit) as end:
        run_script(plot_fp8.main)
    assert end.value.code == 2 and "holds no rows of the benchmark" in capsys.readouterr().err


def test_nothing_run(tmp_path):
    assert report_fp8.training_table(tmp_path).startswith("Not run yet: a training in FP8")
    assert report_fp8.parity_table(tmp_path).startswith("Not run yet: a training in FP8 and its bf16 twin")
