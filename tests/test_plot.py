"""plot.py draws what the files of a run folder say, drops no failed run, and answers broken ones with one sentence."""

import itertools
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import figure_parts
import plot

# name, precision, batch size, median step time (ms), peak allocated (GiB)
RUNS = [
    ("fp32-baseline-batch-125", "fp32", 125, 612.0, 70.1),
    ("fp16-batch-125", "fp16", 125, 331.0, 44.9),
    ("fp16-batch-195", "fp16", 195, 502.0, 69.7),
    ("flash-attention-batch-125", "fp16", 125, 244.0, 36.5),
    ("flash-attention-batch-195", "fp16", 195, 377.0, 56.2),
    ("flash-attention-window-(64,0)-batch-125", "fp16", 125, 246.0, 36.4),
    ("flash-attention-window-(64,0)-batch-195", "fp16", 195, 371.0, 56.1),
    ("fp32-gradient-checkpointing-batch-125", "fp32", 125, 801.0, 31.9),
    ("fp32-gradient-checkpointing-batch-303", "fp32", 303, 1921.0, 76.4),
]
COMPARISON_FILES = ["time_execution.png", "test_loss.png", "test_perplexity.png", "peak_memory.png"]
PHASES = [  # phase, start and peak as a fraction of the run's peak
    ("training_step", 0.12, 1.0),
    ("forward_pass", 0.12, 0.72),
    ("loss", 0.6, 0.86),
    ("backward_pass", 0.68, 1.0),
    ("optimizer_step", 0.17, 0.24),
]


def make_run(
    root: Path, name: str, precision: str, batch_size: int, step_ms: float, gib: float, steps: int = 80
) -> Path:
    """A finished run's folder with plausible values; memory shrinks by 0.01 GiB with each of 5 measured steps."""
    folder = root / name
    folder.mkdir(parents=True)
    results = {
        "batch_size": batch_size,
        "steps": steps,
        "step_ms_median": step_ms,
        "step_ms_p20": 0.9 * step_ms,
        "step_ms_p80": 1.2 * step_ms,
        "training_minutes": step_ms * steps / 60_000,
        "peak_allocated_gib": gib,
        "peak_reserved_gib": 1.08 * gib,
        "peak_phase": "backward_pass",
        "test_loss": 4.25,
        "test_perplexity": math.exp(4.25),
        "test_tokens": 100_000,
    }
    info = {
        "status": "ok",
        "experiment": "llm",
        "run_name": name,
        "settings": {"precision": precision, "batch_size": batch_size, "context_length": 256, "seed": 0},
        "device_name": "NVIDIA H100 80GB HBM3",
        "dataset": {"name": "plwiki", "description": "articles", "generated": False},
        "results": results,
    }
    (folder / "run.json").write_text(json.dumps(info))
    rows = [{"step": i, "tokens": (i + 1) * batch_size * 256, "loss": 10 - i / 20, "mfu": None} for i in range(steps)]
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    header = (
        "step,phase,start_allocated_gib,peak_allocated_gib,end_allocated_gib,start_reserved_gib,peak_reserved_gib\n"
    )
    lines = [
        f"{step},{phase},{start * gib - 0.01 * step},{peak * gib - 0.01 * step},1.0,{gib},{1.08 * gib}\n"
        for step in range(5)
        for phase, start, peak in PHASES
    ]
    (folder / "memory.csv").write_text(header + "".join(lines))
    return folder


def change_run(folder: Path, **changes: object) -> Path:
    """Overwrite top-level keys of run.json."""
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def make_oom_run(root: Path, name: str = "fp32-baseline-batch-303") -> Path:
    """A run that ran out of memory in its first step: run.json without results and nothing else."""
    folder = make_run(root, name, "fp32", 303, 1.0, 1.0)
    (folder / "steps.jsonl").unlink()
    (folder / "memory.csv").unlink()
    return change_run(folder, status="oom", results={})


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "llm", *RUNS[1])


@pytest.fixture
def all_folders(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / "llm", *row) for row in RUNS] + [make_oom_run(tmp_path / "llm")]


def texts(figure) -> list[str]:
    """Every piece of text a reader sees in the figure."""
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    for ax in figure.axes:
        legends += [text.get_text() for text in (ax.get_legend().get_texts() if ax.get_legend() else [])]
        legends += [text.get_text() for text in ax.texts] + [label.get_text() for label in ax.get_yticklabels()]
        legends += [ax.get_xlabel(), ax.get_ylabel()]
    return [figure.get_suptitle(), *legends]


def assert_is_figure(path: Path) -> None:
    """A PNG of about 1600 x 800 pixels or taller that holds more than white."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1605 and 800 <= height <= 1600
    assert len(data) > 12_000


def test_a_run_gets_its_figures(run_folder):
    paths = plot.plot_run(run_folder)
    assert [path.name for path in paths] == ["loss_curve.png", "memory_per_phase.png"]
    (run_folder / "batch_size_search.csv").write_text(
        "batch_size,status,peak_allocated_gib,peak_reserved_gib,seconds\n64,ok,20.5,21.5,3\n128,oom,,,2\n"
    )
    paths = plot.plot_run(run_folder)
    assert [path.name for path in paths] == ["loss_curve.png", "memory_per_phase.png", "batch_size_search.png"]
    for path in paths:
        assert path.parent == run_folder
        assert_is_figure(path)


def test_comparison_of_ten_runs(all_folders, tmp_path):
    paths = plot.plot_runs(all_folders, tmp_path / "figures")
    assert paths == [tmp_path / "figures" / name for name in COMPARISON_FILES]
    for path in paths:
        assert_is_figure(path)


def test_bars_are_the_results_in_the_order_given(all_folders):
    runs = [plot.read_run(folder) for folder in reversed(all_folders)]
    step_time, minutes = plot.comparison_figure(runs, "time_execution.png").axes
    assert [bar.get_width() for bar in step_time.patches] == [row[3] for row in reversed(RUNS)]
    assert [bar.get_width() for bar in minutes.patches] == [row[3] * 80 / 60_000 for row in reversed(RUNS)]
    names = [label.get_text() for label in step_time.get_yticklabels()]
    assert names == ["fp32-baseline-batch-303", *(row[0] for row in reversed(RUNS))]
    assert "(ms)" in step_time.get_xlabel() and "(minutes)" in minutes.get_xlabel()
    spreads = [list(line.get_xdata()) for line in step_time.lines if line.get_linestyle() == "-"]
    assert spreads[0] == [0.9 * 1921.0, 1.2 * 1921.0]
    memory = plot.comparison_figure(runs, "peak_memory.png").axes[0]
    assert [bar.get_width() for bar in memory.patches[:2]] == [76.4, 1.08 * 76.4]
    assert "(GiB)" in memory.get_xlabel()


@pytest.mark.parametrize("file_name", COMPARISON_FILES)
@pytest.mark.parametrize("status", ["oom", "error", "unsupported", "interrupted", "running"])
def test_a_failed_run_is_a_cross_with_its_status(all_folders, file_name, status):
    # even where numbers of the unfinished run are known
    change_run(all_folders[0], status=status)
    figure = plot.comparison_figure([plot.read_run(folder) for folder in all_folders], file_name)
    for ax in figure.axes:
        crosses = [line for line in ax.lines if line.get_marker() == "x"]
        assert [line.get_ydata()[0] for line in crosses] == [0, 9]
        assert {status, "oom"} <= {text.get_text() for text in ax.texts}
        columns = 2 if file_name == "peak_memory.png" else 1
        assert len(ax.patches) == columns * 8


def test_a_value_that_was_not_measured_is_said(run_folder):
    results = plot.read_run(run_folder).info["results"] | {"peak_reserved_gib": None, "test_loss": math.nan}
    run = plot.read_run(change_run(run_folder, results=results))
    assert "peak_reserved_gib: not recorded" in texts(plot.comparison_figure([run], "peak_memory.png"))
    assert "test_loss: nan" in texts(plot.comparison_figure([run], "test_loss.png"))


def test_loss_curve_shows_the_files_values(run_folder):
    run = plot.read_run(run_folder)
    figure = plot.loss_figure(run)
    raw, smoothed, test_loss = figure.axes[0].lines
    assert list(raw.get_xdata()) == [row["tokens"] for row in run.steps]
    assert list(raw.get_ydata()) == [row["loss"] for row in run.steps]
    # a centred mean of a straight line is that line
    by_tokens = {row["tokens"]: row["loss"] for row in run.steps}
    assert list(smoothed.get_ydata()) == pytest.approx([by_tokens[x] for x in smoothed.get_xdata()])
    assert test_loss.get_ydata()[0] == 4.25
    assert "test loss 4.250" in texts(figure)
    assert "training tokens seen" in texts(figure) and "loss (nats per token)" in texts(figure)


def test_few_steps_and_no_test_loss_give_one_line(tmp_path):
    run = plot.read_run(change_run(make_run(tmp_path, *RUNS[0], steps=20), results={}))
    assert len(plot.loss_figure(run).axes[0].lines) == 1


def test_memory_bars_are_the_maximum_over_steps_and_mark_the_peak_phase(run_folder):
    figure = plot.memory_figure(plot.read_run(run_folder))
    ax = figure.axes[0]
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx([start * 44.9 for _, start, _ in PHASES] + [peak * 44.9 for _, _, peak in PHASES])
    assert [bar.get_hatch() for bar in ax.patches].index("//") == len(PHASES) + 3
    assert ax.lines[0].get_ydata()[0] == pytest.approx(1.08 * 44.9)
    assert {"peak phase: backward pass", "reserved peak 48.49 GiB", "memory (GiB)", "44.90"} <= set(texts(figure))
    assert "n = 5 tracked steps" in figure.get_suptitle()


def test_memory_on_a_cpu_has_no_reserved_line_and_finds_the_peak_phase_itself(run_folder):
    lines = (run_folder / "memory.csv").read_text().splitlines()
    cut = [lines[0], *(line.rsplit(",", 2)[0] + ",," for line in lines[1:])]
    (run_folder / "memory.csv").write_text("\n".join(cut) + "\n")
    figure = plot.memory_figure(plot.read_run(change_run(run_folder, results={})))
    assert not figure.axes[0].lines
    assert "peak phase: backward pass" in texts(figure)


def test_batch_size_search(run_folder):
    (run_folder / "batch_size_search.csv").write_text(
        "batch_size,status,peak_allocated_gib,peak_reserved_gib,seconds\n"
        "64,ok,20.5,21.5,3\n128,oom,,,2\n125,ok,40.0,42.0,3\n70000,error,,,1\n"
    )
    run = plot.read_run(run_folder)
    assert [probe["batch_size"] for probe in run.probes] == [64, 128, 125, 70000]
    figure = plot.search_figure(run)
    allocated, reserved, oom, error = (points.get_offsets().tolist() for points in figure.axes[0].collections)
    assert allocated == [[64, 20.5], [125, 40.0]] and reserved == [[64, 21.5], [125, 42.0]]
    assert [x for x, _ in oom] == [128] and [x for x, _ in error] == [70000]
    assert oom[0][1] > 42.0
    assert figure.axes[0].lines[0].get_xdata()[0] == 125
    assert {"chosen: 125", "oom (drawn at the top)", "peak memory (GiB)", "batch size (samples)"} <= set(texts(figure))
    run.info["settings"]["memory_budget_gib"] = 50
    figure = plot.search_figure(run)
    assert figure.axes[0].collections[2].get_offsets().tolist() == [[128, 50]]
    assert "memory budget 50.00 GiB" in texts(figure)


def test_an_oom_run_alone_gets_figures_that_say_so(tmp_path):
    folder = make_oom_run(tmp_path)
    for path in plot.plot_run(folder):
        assert_is_figure(path)
    for draw in (plot.loss_figure, plot.memory_figure):
        figure = draw(plot.read_run(folder))
        assert "status: oom" in figure.get_suptitle()
        assert "nothing was recorded; the run's status is oom" in texts(figure)


def test_captions_name_the_conditions(all_folders, tmp_path):
    generated = {"name": "sample", "generated": True}
    change_run(all_folders[3], dataset=generated)
    title = plot.loss_figure(plot.read_run(all_folders[3])).get_suptitle()
    for fact in ("H100", "fp16", "batch 125", "context 256", "sample (generated)", "n = 80 steps", RUNS[3][0]):
        assert fact in title
    runs = [plot.read_run(folder) for folder in all_folders]
    title = plot.comparison_figure(runs, "test_loss.png").get_suptitle().replace("\n", " ")
    for fact in ("H100", "fp32, fp16", "batch 125, 195, 303", "plwiki, sample (generated)", "n = 100,000 test tokens"):
        assert fact in title


def test_cut_last_lines_are_ignored(run_folder):
    with (run_folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 80, "tok')
    with (run_folder / "memory.csv").open("a") as file:
        file.write("5,training_step,99")
    run = plot.read_run(run_folder)
    assert len(run.steps) == 80 and len(run.memory) == 25
    assert run.memory[0]["phase"] == "training_step" and run.memory[0]["peak_allocated_gib"] == 44.9


def test_long_names_do_not_push_the_bars_out(all_folders):
    change_run(all_folders[4], run_name="flash-attention-window-(64,0)-gradient-checkpointing-chunked-loss-batch-195")
    figure = plot.comparison_figure([plot.read_run(folder) for folder in all_folders], "time_execution.png")
    figure.draw_without_rendering()
    for ax in figure.axes:
        assert ax.get_window_extent().width > 0.25 * figure.bbox.width
    labels = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(label.x0 >= 0 for label in labels)
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(labels))


def test_text_lengths(tmp_path):
    counts = [*range(1, 100), 5000, 0]
    path = plot.plot_text_lengths(counts, tmp_path / "figures" / "lengths.png", "sample (generated): texts")
    assert_is_figure(path)
    figure = plot.text_lengths_figure(counts, "sample (generated): texts")
    ax = figure.axes[0]
    assert sum(bar.get_height() for bar in ax.patches) == 100
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "tokens per document"
    assert [line.get_xdata()[0] for line in ax.lines] == [50, 95]
    assert "n = 101 documents" in figure.get_suptitle() and "1 empty" in figure.get_suptitle()
    plot.text_lengths_figure([7], "one document")
    with pytest.raises(ValueError, match="no document"):
        plot.text_lengths_figure([0, 0], "empty")


def test_command_line(all_folders, tmp_path, capsys):
    root = tmp_path / "llm"
    (root / "no-run-in-here").mkdir()
    assert plot.main([str(all_folders[0])]) == 0
    assert capsys.readouterr().out.split() == [
        str(all_folders[0] / "loss_curve.png"),
        str(all_folders[0] / "memory_per_phase.png"),
    ]
    assert plot.main([str(all_folders[1]), str(all_folders[0]), "--output_folder", str(tmp_path / "pair")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "pair" / name) for name in COMPARISON_FILES]
    assert plot.main([str(root)]) == 0
    assert capsys.readouterr().out.split() == [str(root / name) for name in COMPARISON_FILES]
    assert plot.find_runs(root) == sorted(all_folders)


def test_errors_are_one_sentence_and_exit_status_2(run_folder, tmp_path, capsys):
    def error_of(*arguments: object) -> str:
        assert plot.main([str(argument) for argument in arguments]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1
        return output.err

    assert "missing is not a folder" in error_of(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "empty has no run.json" in error_of(tmp_path / "empty")
    assert "has no run.json" in error_of(run_folder, tmp_path / "empty")
    other = make_run(tmp_path / "elsewhere", *RUNS[0])
    assert "--output_folder" in error_of(run_folder, other)
    with (other / "memory.csv").open("a") as file:
        file.write("5,training_step,lots,1,1,1,1\n")
    assert "memory.csv holds a cell that is not a number" in error_of(other)
    (other / "steps.jsonl").write_text('{"step": 0\n{"step": 1, "tokens": 2, "loss": 3}\n')
    (other / "memory.csv").unlink()
    assert "steps.jsonl line 1 is not a JSON object" in error_of(other)
    (run_folder / "run.json").write_text('{"status": "ok",')
    assert "run.json is damaged: it is not valid JSON" in error_of(run_folder)
    (run_folder / "run.json").write_text("[]")
    assert "must hold a JSON object" in error_of(run_folder)
    with pytest.raises(plot.RunFolderError):
        plot.read_run(tmp_path / "empty")


def test_importing_and_drawing_leaves_the_importing_programs_backend_alone(run_folder):
    code = (
        "import sys, matplotlib; matplotlib.use('svg'); import plot; from pathlib import Path\n"
        "plot.plot_run(Path(sys.argv[1]))\n"
        "assert matplotlib.get_backend() == 'svg' and 'matplotlib.pyplot' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(plot.__file__).parent)}
    subprocess.run([sys.executable, "-c", code, str(run_folder)], check=True, env=environment)
    assert_is_figure(run_folder / "loss_curve.png")


def test_a_long_part_of_a_subtitle_breaks_between_words():
    words = [f"word{number}" for number in range(40)]
    figure = figure_parts.blank_figure("title", f"a short part | {' '.join(words)} | one more")
    lines = figure.get_suptitle().splitlines()
    assert " ".join(lines) == f"title a short part | {' '.join(words)} | one more" and max(map(len, lines)) <= 130
    parts = [f"part {number} of some length" for number in range(12)]
    lines = figure_parts.blank_figure("title", " | ".join(parts)).get_suptitle().splitlines()[1:]
    assert [part for line in lines for part in line.split(" | ")] == parts and len(lines) > 1
