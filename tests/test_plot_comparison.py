"""The figures of the comparison hold the numbers of made-up run folders, and crosses for what did not end well."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_report_comparison import (
    FAILED,
    LOSSES,
    SEED,
    change_status,
    make_factorial,
    make_max_batch,
    make_outputs,
    make_quality,
    make_run,
    make_seed,
    write_json,
)

import plot_comparison
from figure_parts import RED, new_figure
from plot_comparison import figures_of, memory_segments, pareto_front
from plot_comparison_parts import place_labels
from report_comparison import Case, read_cases
from utils import SettingsError

FILES = {
    "seed": ["time_execution.png", "memory_per_phase.png", "memory_against_speed.png", "step_profile.png"],
    "factorial": ["interactions.png", "memory_against_speed.png"],
    "max_batch": ["max_batch.png"],
    "quality": ["test_loss.png", "test_perplexity.png", "quality_against_updates.png"],
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return make_outputs(tmp_path_factory.mktemp("outputs"))


def draw(outputs: Path, experiment: str, name: str) -> Figure:
    return figures_of(outputs, experiment)[name]()


def words_in(figure: Figure) -> list[str]:
    """Every text in the axes and the legend."""
    words = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return words + [text.get_text() for ax in figure.axes for text in ax.texts]


def crosses(figure: Figure, ax: int = 0) -> list:
    return [
        line for line in figure.axes[ax].lines if line.get_marker() == "x" and to_hex(line.get_color()) == RED.lower()
    ]


def assert_no_overlap(figure: Figure) -> None:
    """No two texts inside the axes touch, and none is cut off."""
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    for ax in figure.axes:
        boxes = [Text.get_window_extent(text, renderer) for text in ax.texts if text.get_text()]  # without leaders
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 for box in boxes)


# ----------------------------------------------------------------------------------------------------- command line


def test_every_figure_is_written_into_its_experiment(tmp_path, capsys):
    make_outputs(tmp_path, "smoke_")
    assert plot_comparison.main([str(tmp_path)]) == 0
    expected = [tmp_path / f"smoke_{name}" / file for name, files in FILES.items() for file in files]
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == sorted(map(str, expected))
    for path in expected:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 12_000


def test_one_experiment_and_errors_in_one_sentence(tmp_path, capsys):
    make_factorial(tmp_path)
    assert plot_comparison.main(["--experiment", "factorial", "--output_folder", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2

    def error_of(*words: str) -> str:
        assert plot_comparison.main([*words]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1
        return output.err

    assert "comparison.json is missing" in error_of(str(tmp_path), "--experiment", "seed")
    assert "none of seed, factorial" in error_of(str(tmp_path), "--experiment", "llm")
    assert "holds no experiment" in error_of(str(tmp_path / "nowhere"))
    (tmp_path / "factorial" / "effects.json").write_text('{"peak_gib": {"main": {"bf16": "x"}}}')
    assert "interactions.png cannot be drawn" in error_of(str(tmp_path))
    (tmp_path / "factorial" / "effects.json").unlink()
    assert "effects.json is missing" in error_of(str(tmp_path))


def test_a_figure_without_its_files_is_left_out_and_said(tmp_path, capsys):
    folder = make_seed(tmp_path)
    (folder / "everything-batch-125" / "profile.json").unlink()
    paths = plot_comparison.plot_comparison(tmp_path, "seed")
    assert [path.name for path in paths] == FILES["seed"][:3]
    assert "step_profile.png: no case of seed" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- time and memory


def test_time_bars_and_crosses(outputs):
    figure = draw(outputs, "seed", "time_execution.png")
    steps, epochs = figure.axes
    assert [bar.get_width() for bar in steps.patches] == [case[-1] for case in SEED]
    assert [bar.get_width() for bar in epochs.patches] == pytest.approx([326 * case[-1] / 60_000 for case in SEED])
    assert (
        [line.get_ydata()[0] for line in crosses(figure)]
        == [7, 8, 9]
        == [line.get_ydata()[0] for line in crosses(figure, 1)]
    )
    assert {"oom", "unsupported", "error"} <= set(words_in(figure))
    assert "(ms)" in steps.get_xlabel() and "(minutes)" in epochs.get_xlabel()
    assert "H100" in figure.get_suptitle() and "n = 20 timed steps" in figure.get_suptitle()


def test_the_memory_bars_end_at_the_peak_of_the_step(outputs):
    figure = draw(outputs, "seed", "memory_per_phase.png")
    (ax,) = figure.axes
    ends: dict[int, float] = {}
    for bar in ax.patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        assert bar.get_x() == pytest.approx(ends.get(row, 0.0)) and bar.get_width() > 0
        ends[row] = bar.get_x() + bar.get_width()
    assert list(ends.values()) == pytest.approx([max(case[4]) for case in SEED])
    assert [line.get_ydata()[0] for line in crosses(figure)] == [7, 8, 9]
    reserved = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "|"]
    assert reserved == pytest.approx([max(case[4]) + 2 for case in SEED])
    assert "35.20 (37.20 reserved)" in words_in(figure) and "(GiB)" in ax.get_xlabel()
    assert {"forward", "loss", "backward"} <= set(words_in(figure)) and "outside these phases" not in words_in(figure)


def test_a_phase_below_the_highest_allocation_so_far_has_no_segment(tmp_path):
    make_seed(tmp_path)
    cases = {case.name: case for case in read_cases(tmp_path, "seed")}
    segments = memory_segments(cases["chunked-loss-checkpointing-batch-125"])
    expected = {"start": 1.5, "forward_pass": 2.6, "loss": 0.0, "backward_pass": 0.77, "optimizer_step": 0.0}
    assert segments == pytest.approx(expected | {"between": 0.0})
    path = tmp_path / "seed" / "hf-gpt2-compiled-batch-125" / "memory.csv"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], *(row for row in rows if "training_step" in row)]) + "\n")
    segments = memory_segments(cases["hf-gpt2-compiled-batch-125"])
    assert segments["start"] == 1.5 and segments["between"] == 12.5 and segments["forward_pass"] == 0
    path.write_text(rows[0] + "\n")
    with pytest.raises(SettingsError, match="no row training_step"):
        memory_segments(cases["hf-gpt2-compiled-batch-125"])


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(5, 100), (4, 90), (4, 95), (6, 100), (7, 120), (7, 119), (3, 10)], [6, 2, 0, 4]),
        ([(5, 100), (5, 100), (6, 99)], [0, 1]),  # equal points are both members
        ([(1, 1)], [0]),
        ([], []),
    ],
)
def test_pareto_front(points, front):
    assert pareto_front(points) == front


def test_memory_against_speed(outputs):
    figure = draw(outputs, "seed", "memory_against_speed.png")
    (ax,) = figure.axes
    lines = {line.get_label(): line for line in ax.lines}
    speed = {case[0]: (max(case[4]), 256_000 * case[1] / case[5]) for case in SEED if case[1] == 125}
    front = [speed["everything-batch-125"], speed["hf-gpt2-compiled-batch-125"]]
    assert lines["Pareto front"].get_xydata() == pytest.approx(np.array(front))
    assert lines["Pareto front"].get_drawstyle() == "steps-post"
    peer = lines["hf-gpt2-compiled, the peer"]
    assert peer.get_marker() == "*" and peer.get_xydata() == pytest.approx(np.array(front[1:]))
    behind = {tuple(point) for point in lines["behind it"].get_xydata()}
    assert behind == set(speed.values()) - set(front)  # neither the batch of 195
    names = [text.get_text() for text in ax.texts if text.get_text()]
    assert names == ["everything-batch-125", "hf-gpt2-compiled-batch-125", "fp32-baseline-batch-125"]
    assert {"fp8-batch-125: unsupported", "fused-loss-batch-125: error"} <= set(words_in(figure))
    assert len(crosses(figure)) == 2  # the third failed at another batch
    assert_no_overlap(figure)


def test_many_cases_without_a_place_are_counted(outputs):
    """A name each would leave the axes no room."""
    cases = read_cases(outputs, "seed")
    cases += [Case(f"offload-{i}", {"batch_size": "125"}, "unsupported", Path(), {}) for i in range(8)]
    words = words_in(plot_comparison.speed_figure(cases))
    assert "9 cases: unsupported" in words and "1 case: error" in words
    assert not any("offload" in text for text in words)


def test_many_crowded_names_do_not_overlap():
    figure, (ax,) = new_figure("crowded", "", 1, 6.0)
    points = [(10 + 0.1 * place, 100 + 2.0 * place) for place in range(8)]
    ax.plot(*zip(*points, strict=True), "o")
    ax.set(xlim=(0, 30), ylim=(0, 200))
    names = [f"flash-checkpointing-chunked-loss-{place}" for place in range(8)]
    labels = place_labels(ax, points, names, [(12, 100)], points)
    assert [label.get_text() for label in labels] == names
    assert_no_overlap(figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for label in labels:
        box = label.get_window_extent(renderer)
        assert not any(box.contains(*ax.transData.transform(point)) for point in [*points, (12, 100)])


def test_the_profile_stacks_its_categories_over_the_floor(outputs):
    figure = draw(outputs, "seed", "step_profile.png")
    (ax,) = figure.axes
    stacked = [bar for bar in ax.patches if bar.get_y() < 0.5]
    assert [bar.get_width() for bar in stacked] == pytest.approx([31.0, 5.0, 12.0, 1.4, 12.0, 4.0, 3.0])
    assert stacked[-1].get_x() + stacked[-1].get_width() == pytest.approx(68.4)
    assert [bar.get_width() for bar in ax.patches if bar not in stacked] == [30.8]
    without = [line.get_xdata()[0] for line in ax.lines]
    assert without == [66.2]
    assert {"68.40", "30.80", "matrix products", "idle"} <= set(words_in(figure))
    assert "5 profiled steps" in figure.get_suptitle() and "(ms)" in ax.get_xlabel()
    assert_no_overlap(figure)


# ---------------------------------------------------------------------------------------------------------- quality


def test_quality_draws_every_seed_the_mean_and_the_confounded_runs_apart(outputs):
    figure = draw(outputs, "quality", "test_loss.png")
    (ax,) = figure.axes
    seeds = [line for line in ax.lines if line.get_marker() == "o"]
    assert [tuple(line.get_xdata()) for line in seeds] == list(LOSSES.values())
    means = [line.get_xdata()[0] for line in ax.lines if line.get_linewidth() == 2.2 and len(line.get_xdata()) == 2]
    assert means == pytest.approx([sum(values) / 3 for values in LOSSES.values()])
    confounded = {line.get_ydata()[0]: line.get_xdata()[0] for line in ax.lines if line.get_marker() == "D"}
    assert confounded == pytest.approx({3: math.log(741), 4: math.log(905), 5: math.log(1258)})
    assert [line.get_ydata()[0] for line in crosses(figure)] == [6] and "oom" in words_in(figure)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[0] == "fp32-baseline (326 updates)" and names[6] == "confounded-fp32-baseline-batch-303"
    assert names[5] == "confounded-flash-attention-batch-445 (91 updates)"
    assert "(nats per token)" in ax.get_xlabel() and "not begin at 0" in ax.get_xlabel()
    assert_no_overlap(figure)


def test_a_failed_seed_is_a_cross_beside_the_others(tmp_path):
    make_quality(tmp_path)
    change_status(tmp_path, "quality", "flash-seed-2", "oom")
    figure = draw(tmp_path, "quality", "test_perplexity.png")
    assert [line.get_ydata()[0] for line in crosses(figure)] == [1, 6]
    assert "seed 2: oom" in words_in(figure)
    assert [len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() == "o"] == [3, 2, 3]
    assert_no_overlap(figure)


def test_one_seed_is_enough(tmp_path):
    make_quality(tmp_path, seeds=1)
    for name in FILES["quality"]:
        assert draw(tmp_path, "quality", name).axes[0].lines


def test_perplexity_against_updates(outputs):
    figure = draw(outputs, "quality", "quality_against_updates.png")
    (ax,) = figure.axes
    lines = {line.get_label(): line for line in ax.lines}
    expected = [[326, math.exp(loss)] for losses in LOSSES.values() for loss in losses]
    assert lines["equal updates"].get_xydata() == pytest.approx(np.array(expected))
    assert lines["as many tokens at a larger batch"].get_xydata().tolist() == [[326, 741], [209, 905], [91, 1258]]
    expected = {"batch 125, one run", "batch 195, one run", "batch 445, one run"}
    assert expected | {"326 updates in each, 9 runs: 734 to 829"} <= set(words_in(figure))
    assert "confounded-fp32-baseline-batch-303: oom" in words_in(figure)
    assert_no_overlap(figure)


# ----------------------------------------------------------------------------------------- largest batch and effects


def test_largest_batches(outputs):
    figure = draw(outputs, "max_batch", "max_batch.png")
    (ax,) = figure.axes
    found = [line.get_xydata().tolist() for line in ax.lines if line.get_linestyle() == "-"]
    assert found == [[[24, 76]], [[8, 40], [24, 140]], [[8, 90], [24, 4096]]]
    hollow = [line.get_xydata().tolist() for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert hollow == [[[24, 64]], [[24, 125]], [[8, 80], [24, 4096]]]
    assert sorted(budget for line in crosses(figure) for budget in line.get_xdata()) == [8, 8, 24]
    words = set(words_in(figure))
    for expected in ("fp32-baseline: oom (8 GiB)", "fp8: unsupported ("):
        assert any(text.startswith(expected) for text in words), expected
    on_points = [line.get_xydata().tolist() for line in crosses(figure) if line.get_transform() == ax.transData]
    assert len(on_points) == 1 and on_points[0][0] in found[2]
    assert "the training after the search ended with oom" in figure.get_suptitle()
    assert "flash" in words and "(GiB)" in ax.get_xlabel()
    assert ax.get_yscale() == "log"
    assert_no_overlap(figure)


def test_names_of_lines_that_end_together_do_not_overlap(tmp_path):
    probes = {f"configuration-{i}": {8: ([(64 + i, "ok"), (80, "oom")], "ok")} for i in range(6)}
    make_max_batch(tmp_path, probes=probes)
    figure = draw(tmp_path, "max_batch", "max_batch.png")
    assert {f"configuration-{i}" for i in range(6)} <= set(words_in(figure))
    assert_no_overlap(figure)


def test_interactions(outputs, tmp_path):
    figure = draw(outputs, "factorial", "interactions.png")
    memory, time = figure.axes[:2]
    grid = memory.images[0].get_array()
    assert grid.tolist() == [[-10.25, 1.5, -3.25], [1.5, -5.0, 0.0], [-3.25, 0.0, -0.5]]
    assert memory.images[0].norm.vmin == -10.25 and memory.images[0].norm.vmax == 10.25
    red, green, blue, _ = memory.images[0].cmap(memory.images[0].norm(0.0))
    assert min(red, green, blue) > 0.95
    assert [text.get_text() for text in time.texts] == [
        *("-300.0", "-2.000", "+20.0"),
        *("-2.000", "+9.500", "+0.125"),
        *("+20.0", "+0.125", "-40.0"),
    ]
    assert [memory.get_title("left"), time.get_title("left")] == ["peak, GiB", "step, ms"]
    assert_no_overlap(figure)
    folder = make_factorial(tmp_path)
    effects = json.loads((folder / "effects.json").read_text())
    effects["peak_gib"] = {"main": None, "interactions": None, "reason": "no value for bf16"}
    write_json(folder / "effects.json", effects)
    figure = draw(tmp_path, "factorial", "interactions.png")
    assert len(crosses(figure)) == 9 and not crosses(figure, 1)
    assert "no value for bf16" in figure.get_suptitle()


def test_an_experiment_in_which_nothing_ran_is_drawn(tmp_path):
    folder = make_seed(tmp_path, cases=[])
    make_run(folder / FAILED[0][0], 303, status="oom")
    for name in FILES["seed"][:3]:
        figure = draw(tmp_path, "seed", name)
        assert crosses(figure)


def test_compiled_code_without_a_gpu_is_named_but_has_no_memory(tmp_path):
    path = make_seed(tmp_path) / "everything-batch-125"
    (path / "memory.csv").unlink()
    info = json.loads((path / "run.json").read_text())
    info["results"] |= {"tracked_steps": 0, "peak_allocated_gib": None}
    write_json(path / "run.json", info)
    assert plot_comparison.NOT_TRACKED in words_in(draw(tmp_path, "seed", "memory_per_phase.png"))
    figure = draw(tmp_path, "seed", "memory_against_speed.png")
    assert f"everything-batch-125: {plot_comparison.NOT_TRACKED}" in words_in(figure)
    assert not any(text.get_text() == "everything-batch-125" for text in figure.axes[0].texts)
