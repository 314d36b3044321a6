"""plot.py --config draws what the YAML file and the run folders say, and answers a wrong file with one sentence."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import plot
from figure_parts import RED
from plot_config import FIGURES, SPEED_FIGURES, plot_config, read_config, read_runs
from run_results import read_run
from utils import SettingsError

ROOT = Path(__file__).parent.parent
FLOPS_PER_TOKEN = 6.6e9
H100 = "NVIDIA H100 80GB HBM3"
STEPS, WARM_UP, SMOOTHING = 40, 5, 4
SMALL = {"precision": "bf16", "batch_size": 8, "context_length": 128}


def step_ms(place: int, ms: float) -> float:
    """A slow first step, two slow ones, and then `ms` with a little noise that has a known median."""
    return 50 * ms if place == 0 else 3 * ms if place < 3 else ms * (1 + 0.01 * (place % 5 - 2))


def make_run(root: Path, name: str, ms: float, *, seed: int = 0, lift: float = 0.0, **info: object) -> Path:
    """A finished run: 1024 tokens a step, a loss that falls by 0.05 a step from 8 + lift, and memory of ms / 10 GiB."""
    folder = root / name
    folder.mkdir(parents=True)
    info = {"status": "ok", "device_name": H100, "world_size": 1, **SMALL} | info
    info["settings"] = {"seed": seed, **SMALL}
    info["dataset"] = {"name": "sample", "generated": True}
    own_peak = 1978.8 if info["precision"] == "fp8" else 989.4
    results = {
        "steps": STEPS,
        "timed_steps": 10,
        "step_ms_median": ms,
        "step_ms_p20": 0.98 * ms,
        "step_ms_p80": 1.05 * ms,
        "tokens_per_s": 1024e3 / ms,
        "flops_per_token": FLOPS_PER_TOKEN,
        "mfu": 1024e3 / ms * FLOPS_PER_TOKEN / (own_peak * 1e12),
        "mfu_denominator_tflops": own_peak,
        "training_minutes": ms / 100,
        "tracked_steps": 3,
        "peak_allocated_gib": ms / 10,
        "peak_reserved_gib": ms / 8,
    }
    if info["precision"] == "fp8":
        results |= {"mfu_fp8_peak": results["mfu"], "mfu_bf16_peak": 2 * results["mfu"]}
    info["results"] = results | info.get("results", {})
    (folder / "run.json").write_text(json.dumps(info))
    rows = []
    for place in range(STEPS):
        took = step_ms(place, ms)
        rate = 1024e3 / took
        row = {"step": place + 1, "tokens": 1024 * (place + 1), "loss": 8 + lift - 0.05 * place, "step_ms": took}
        rows.append(row | {"tokens_per_s": rate, "mfu": rate * FLOPS_PER_TOKEN / (own_peak * 1e12)})
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def change_run(folder: Path, **changes: object) -> None:
    """Overwrite top-level keys of run.json."""
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def content(tmp_path: Path) -> dict:
    """Two seeds of bf16, two of fp8 tensorwise, one of fp8 rowwise, and a run that ran out of memory."""
    make_run(tmp_path, "bf16-0", 10.0, seed=0, lift=0.1)
    make_run(tmp_path, "bf16-1", 12.0, seed=1, lift=-0.1)
    make_run(tmp_path, "tensorwise-0", 8.0, seed=0, lift=0.13, precision="fp8")
    make_run(tmp_path, "tensorwise-1", 8.4, seed=1, lift=-0.06, precision="fp8")
    make_run(tmp_path, "rowwise", 9.0, seed=0, lift=0.2, precision="fp8")
    make_run(tmp_path, "large", 9.0, status="oom", results={})
    (tmp_path / "large" / "steps.jsonl").unlink()
    return {
        "title": "a small model",
        "output_folder": str(tmp_path / "figures"),
        "figures": list(FIGURES),
        "baseline": "bf16",
        "warm_up_steps": WARM_UP,
        "smoothing_steps": SMOOTHING,
        "runs": [
            {"label": "bf16", "folders": [str(tmp_path / "bf16-0"), str(tmp_path / "bf16-1")], "colour": "#0072B2"},
            {"label": "tensorwise", "folders": [str(tmp_path / "tensorwise-0"), str(tmp_path / "tensorwise-1")]},
            {"label": "rowwise", "folder": str(tmp_path / "rowwise")},
            {"label": "large", "folder": str(tmp_path / "large")},
        ],
    }


def write(content: object, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def draw(content: dict, folder: Path, name: str) -> Figure:
    comparison = read_config(write(content, folder))
    read_runs(comparison)
    return FIGURES[name](comparison)


def words_in(figure: Figure) -> str:
    """Every piece of text that a reader sees, with plain spaces."""
    words = [figure.get_suptitle()]
    for legend in (*figure.legends, *(ax.get_legend() for ax in figure.axes)):
        words += [text.get_text() for text in legend.get_texts()] if legend else []
    for ax in figure.axes:
        words += [text.get_text() for text in (*ax.texts, *ax.get_yticklabels())]
        words += [ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")]
    return "\n".join(words).replace("\u00a0", " ")


def bars_of(ax) -> list[float]:
    return [bar.get_width() for bar in ax.patches]


def crosses(figure: Figure) -> list:
    return [line for ax in figure.axes for line in ax.lines if line.get_marker() == "x" and line.get_color() == RED]


def lines_of(ax, width: float) -> list:
    return [line for line in ax.lines if line.get_linewidth() == width]


def rate(folder: Path) -> np.ndarray:
    """Tokens/s of the steps after warm-up."""
    return np.array([row["tokens_per_s"] for row in read_run(folder).steps[WARM_UP:]])


def test_all_figures_are_written_and_named_by_what_they_show(content, tmp_path, capsys):
    path = write(content, tmp_path)
    assert plot.main(["--config", str(path)]) == 0
    paths = [tmp_path / "figures" / f"{name}.png" for name in FIGURES]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 12_000 for path in paths)
    content["figures"] = ["mfu"]
    assert plot_config(write(content, tmp_path), tmp_path / "elsewhere") == [tmp_path / "elsewhere" / "mfu.png"]


def test_speed_is_the_median_after_warm_up_with_its_percentiles_and_the_seeds(content, tmp_path):
    figure = draw(content, tmp_path, "tokens_per_s")
    (ax,) = figure.axes
    folders = [["bf16-0", "bf16-1"], ["tensorwise-0", "tensorwise-1"], ["rowwise"]]
    medians = [[np.median(rate(tmp_path / name)) for name in names] for names in folders]
    assert bars_of(ax) == pytest.approx([np.mean(values) for values in medians])
    assert medians[2][0] == pytest.approx(1024e3 / 9.0)  # 40 steps with the first five would give less
    dots = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    assert dots == pytest.approx([*medians[0], *medians[1]])
    seeds = [list(line.get_xdata()) for line in lines_of(ax, 0.9)]
    assert seeds[0] == pytest.approx(list(np.percentile(rate(tmp_path / "bf16-0"), (20, 80))))
    (single,) = lines_of(ax, 1.6)
    assert list(single.get_xdata()) == pytest.approx(list(np.percentile(rate(tmp_path / "rowwise"), (20, 80))))
    words = words_in(figure)
    factor = np.mean(medians[1]) / np.mean(medians[0])
    assert f"{factor:.2f}x" in words and words.count("x\n") == 2 and "1.00x is bf16" in words
    assert "warm-up: the first 5 steps are left out" in words and "n = 35 steps" in words
    assert "20th to 80th percentile" in words and "tokens per second" in words
    assert "bf16 (2 seeds)" in words and "rowwise (" not in words


def test_without_warm_up_steps_the_runs_own_timed_steps_count(content, tmp_path):
    del content["warm_up_steps"]
    figure = draw(content, tmp_path, "tokens_per_s")
    assert bars_of(figure.axes[0]) == pytest.approx(
        [(1024e3 / 10 + 1024e3 / 12) / 2, (1024e3 / 8 + 1024e3 / 8.4) / 2, 1024e3 / 9]
    )
    (single,) = lines_of(figure.axes[0], 1.6)
    assert list(single.get_xdata()) == pytest.approx([1024e3 / 9 / 1.05, 1024e3 / 9 / 0.98])
    assert "warm-up: as the run itself left it out" in words_in(figure) and "n = 10 steps" in words_in(figure)
    content["warm_up_steps"] = 0
    assert "n = 40 steps" in words_in(draw(content, tmp_path, "tokens_per_s"))


def test_mfu_has_one_denominator_for_all_and_a_second_bar_for_fp8(content, tmp_path):
    for warm_up in (WARM_UP, None):
        content["warm_up_steps"] = warm_up
        if warm_up is None:
            del content["warm_up_steps"]
        figure = draw(content, tmp_path, "mfu")
        (ax,) = figure.axes
        shares = {ms: 100 * 1024e3 / ms * FLOPS_PER_TOKEN / 989.4e12 for ms in (10, 12, 8, 8.4, 9)}
        filled = [bar.get_width() for bar in ax.patches if not bar.get_hatch()]
        hatched = [bar.get_width() for bar in ax.patches if bar.get_hatch()]
        fp8 = [(shares[8] + shares[8.4]) / 2, shares[9]]
        assert filled == pytest.approx([(shares[10] + shares[12]) / 2, *fp8])
        assert hatched == pytest.approx([share * 989.4 / 1978.8 for share in fp8])
        words = words_in(figure)
        assert "dense bf16 peak: 989.4 TFLOP/s per GPU" in words
        assert "hatched: the same run, % of the dense fp8 peak: 1978.8 TFLOP/s per GPU" in words
        assert "every precision against the same bf16 peak" in words
        assert words.count("x\n") == 2  # no factor between different denominators


def test_mfu_is_per_gpu_and_not_recorded_where_the_peak_is_unknown(content, tmp_path):
    content["runs"] = content["runs"][:1]
    before = bars_of(draw(content, tmp_path, "mfu").axes[0])
    for name in ("bf16-0", "bf16-1"):
        change_run(tmp_path / name, world_size=2)
    assert bars_of(draw(content, tmp_path, "mfu").axes[0]) == pytest.approx([before[0] / 2])
    change_run(tmp_path / "bf16-1", device_name="a card of tomorrow")
    figure = draw(content, tmp_path, "mfu")
    assert "of the bf16 peak: not recorded (1 of 2)" in words_in(figure)
    change_run(tmp_path / "bf16-0", device_name="a card of tomorrow")
    figure = draw(content, tmp_path, "mfu")
    assert "of the bf16 peak: not recorded" in words_in(figure) and not figure.axes[0].patches
    assert "not known for this device" in words_in(figure) and "no factors: bf16 has no number" in words_in(figure)


def test_memory_and_time(content, tmp_path):
    figure = draw(content, tmp_path, "peak_memory")
    assert bars_of(figure.axes[0]) == pytest.approx([1.1, 11 / 8, 0.82, 8.2 / 8, 0.9, 9 / 8])
    words = words_in(figure)
    assert "(GiB)" in words and "n = 3 tracked steps" in words and "allocated, peak\nreserved, peak" in words
    change_run(tmp_path / "rowwise", results={"peak_allocated_gib": 3.0})
    assert "reserved, peak: not recorded" in words_in(draw(content, tmp_path, "peak_memory"))

    figure = draw(content, tmp_path, "training_time")
    step, minutes = figure.axes
    assert bars_of(step) == pytest.approx([11.0, 8.2, 9.0])
    assert bars_of(minutes) == pytest.approx([0.11, 0.082])  # that of rowwise was taken away above
    words = words_in(figure)
    assert "(ms)" in words and "training time (minutes) of 40 steps" in words and "0.75x" in words
    assert "minutes: not recorded" in words and "compiling" not in words
    results = json.loads((tmp_path / "bf16-0" / "run.json").read_text())["results"]
    change_run(tmp_path / "bf16-0", results=results | {"compile_s": 33.6})
    for name in ("training_time", "loss_against_minutes"):
        expected = "not in the minutes: compiling before the first step (bf16 34 s)"
        assert expected in words_in(draw(content, tmp_path, name))


@pytest.mark.parametrize("measure", ["steps", "tokens", "minutes"])
def test_loss_curves_are_smoothed_and_the_mean_of_the_seeds(content, tmp_path, measure):
    figure = draw(content, tmp_path, f"loss_against_{measure}")
    ax = figure.axes[0]
    bf16, tensorwise, rowwise = lines_of(ax, 1.8)
    # the mean of neighbours on a straight line is the line at their mean place
    places = np.arange(STEPS - SMOOTHING + 1) + (SMOOTHING - 1) / 2
    assert list(bf16.get_ydata()) == pytest.approx(list(8 - 0.05 * places))
    assert list(tensorwise.get_ydata()) == pytest.approx(list(8.035 - 0.05 * places))
    assert list(rowwise.get_ydata()) == pytest.approx(list(8.2 - 0.05 * places))
    thin = lines_of(ax, 0.7)
    assert [line.get_ydata()[0] for line in thin] == pytest.approx(
        [8 - 0.05 * 1.5 + lift for lift in (0.1, -0.1, 0.13, -0.06)]
    )
    elapsed = np.cumsum([row["step_ms"] for row in read_run(tmp_path / "rowwise").steps]) / 60_000
    x = {"steps": places + 1, "tokens": 1024 * (places + 1)}.get(measure)
    x = np.convolve(elapsed, np.full(SMOOTHING, 1 / SMOOTHING), "valid") if x is None else x
    assert list(rowwise.get_xdata()) == pytest.approx(list(x))
    assert to_hex(bf16.get_color()) == "#0072b2" and len({line.get_linestyle() for line in (bf16, rowwise)}) == 2
    words = words_in(figure)
    assert "smoothing: running mean of 4 steps" in words and "n = 40 steps" in words and "large: oom" in words
    assert "(nats per token)" in words
    if measure == "minutes":
        assert len(figure.axes) == 1 and "time of training steps (minutes)" in words
    content["smoothing_steps"] = 1
    figure = draw(content, tmp_path, f"loss_against_{measure}")
    assert "smoothing: none" in words_in(figure) and len(lines_of(figure.axes[0], 1.8)[0].get_ydata()) == STEPS


def test_differences_are_those_of_the_same_seed(content, tmp_path):
    content["runs"][2]["folder"] = str(make_run(tmp_path, "rowwise-seed-7", 9.0, seed=7))
    figure = draw(content, tmp_path, "loss_against_steps")
    below = figure.axes[1]
    for line, apart in zip(lines_of(below, 1.2)[1:], (0.03, 0.04), strict=True):  # one a seed, after the zero
        assert list(line.get_ydata()) == pytest.approx([apart] * (STEPS - SMOOTHING + 1))
    band = below.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((-0.2, 0.2))
    words = words_in(figure)
    assert "rowwise: no difference, bf16 has no run of its seed at the same steps" in words
    assert "loss minus that of bf16, of the same seed" in words and "how far the seeds of bf16 lie apart" in words
    del content["baseline"]
    figure = draw(content, tmp_path, "loss_against_steps")
    assert len(figure.axes) == 1 and "1.00x" not in words_in(draw(content, tmp_path, "tokens_per_s"))


@pytest.mark.parametrize("status", ["oom", "error", "unsupported", "interrupted"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_run_that_failed_is_a_cross_with_its_status(content, tmp_path, name, status):
    change_run(tmp_path / "large", status=status)
    change_run(tmp_path / "tensorwise-1", status=status)  # one of two seeds, after all of its steps
    figure = draw(content, tmp_path, name)
    words = words_in(figure)
    panels = 2 if name == "training_time" else 1
    assert len(crosses(figure)) == panels * (3 if name.startswith("loss") else 2)
    assert words.count(f"{status} (1 of 2)") == panels
    if not name.startswith("loss"):
        assert [cross.get_ydata()[0] for cross in crosses(figure)] == [1, 3] * panels
        assert status in [text.get_text() for text in figure.axes[0].texts]
    if name == "tokens_per_s":
        assert bars_of(figure.axes[0])[1] == pytest.approx(1024e3 / 8)  # of the other seed alone


def test_a_run_without_the_numbers_is_said(content, tmp_path):
    (tmp_path / "rowwise" / "steps.jsonl").unlink()
    assert "tokens/s: not recorded" in words_in(draw(content, tmp_path, "tokens_per_s"))
    assert "rowwise: not recorded" in words_in(draw(content, tmp_path, "loss_against_tokens"))


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_lies_outside_or_on_something_else(content, tmp_path, name):
    content["runs"][1]["label"] = "fp8 tensorwise with a label as long as a line of the axis may be"
    figure = draw(content, tmp_path, name)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    for ax in figure.axes:
        assert ax.get_window_extent().width > 0.25 * figure.bbox.width
        texts = [text for text in (*ax.texts, *ax.get_yticklabels()) if text.get_text()]
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_visible()]
        if ax is figure.axes[0]:
            assert all(box.x0 >= 0 for box in boxes)
        assert all(box.x1 <= figure.bbox.width for box in boxes)
        labels = [text.get_window_extent(renderer) for text in ax.texts]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(labels, 2))


def error_of(content: object, tmp_path: Path, capsys) -> str:
    path = write(content, tmp_path)
    assert plot.main(["--config", str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and f"--config {path}" in output.err
    assert not (tmp_path / "figures").exists()
    return output.err


WRONG = {
    "no mapping": (lambda c: ["title"], "the file is not a mapping"),
    "empty": (lambda c: "", "the file is not a mapping"),
    "no YAML": (lambda c: "title: [", "cannot be read as YAML"),
    "twice": (lambda c: "title: one\ntitle: two\n", "title is given twice"),
    "unknown key": (lambda c: c | {"smooth": 3}, "the file has unknown keys: smooth; known are title"),
    "missing key": (lambda c: {k: v for k, v in c.items() if k != "runs"}, "runs is missing or empty"),
    "no runs": (lambda c: c | {"runs": []}, "runs is missing or empty"),
    "wrong type": (lambda c: c | {"warm_up_steps": "ten"}, "warm_up_steps of the file must be a whole number"),
    "a truth": (lambda c: c | {"smoothing_steps": True}, "smoothing_steps of the file must be a whole number"),
    "negative": (lambda c: c | {"warm_up_steps": -1}, "warm_up_steps must be at least 0"),
    "zero": (lambda c: c | {"smoothing_steps": 0}, "smoothing_steps must be at least 1"),
    "figure": (lambda c: c | {"figures": ["mfu", "speed"]}, "figures has unknown names: speed; known are tokens_per_s"),
    "figure of a figure": (lambda c: c | {"figures": [["mfu"]]}, "figures has unknown names: ['mfu']"),
    "figure twice": (lambda c: c | {"figures": ["mfu", "mfu"]}, "figures mfu is named twice"),
    "baseline": (lambda c: c | {"baseline": "fp32"}, "baseline fp32 is no label of runs; the labels are bf16, tensor"),
    "label twice": (
        lambda c: c | {"runs": [*c["runs"], {"label": "bf16", "folder": "x"}]},
        "label bf16 is named twice",
    ),
    "folder twice": (
        lambda c: c | {"runs": [*c["runs"], {"label": "again", "folder": c["runs"][2]["folder"]}]},
        "rowwise is named twice",
    ),
    "no label": (lambda c: c | {"runs": [{"folder": "x"}]}, "entry 1 of runs has no label"),
    "run key": (lambda c: c | {"runs": [{"label": "x", "color": "red"}]}, "entry 1 of runs has unknown keys: color"),
    "run text": (lambda c: c | {"runs": ["outputs/x"]}, "entry 1 of runs is not a mapping"),
    "label type": (lambda c: c | {"runs": [{"label": 8, "folder": "x"}]}, "label of entry 1 of runs must be text"),
    "no folder": (lambda c: c | {"runs": [{"label": "x"}]}, "entry 1 of runs (x) needs either folder or"),
    "empty folders": (lambda c: c | {"runs": [{"label": "x", "folders": []}]}, "has a folder that is not the path"),
    "colour": (
        lambda c: c | {"runs": [{"label": "x", "folder": "y", "colour": "blueish"}]},
        "colour blueish of entry 1 of runs (x) is no colour",
    ),
    "missing run": (
        lambda c: c | {"runs": [{"label": "bf16", "folder": "nowhere/run"}]},
        "label bf16: nowhere/run is not a folder; give a run folder",
    ),
    "warm-up": (lambda c: c | {"warm_up_steps": 40}, "warm_up_steps 40 leaves none of the 40 steps of"),
    "smoothing": (lambda c: c | {"smoothing_steps": 41}, "smoothing_steps 41 is more than the 40 steps of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_sentence(content, tmp_path, capsys, case):
    change, sentence = WRONG[case]
    assert sentence in error_of(change(content), tmp_path, capsys)


def test_wrong_runs_are_one_sentence(content, tmp_path, capsys):
    rows = [json.dumps(row | {"tokens": 2 * row["tokens"]}) for row in read_run(tmp_path / "bf16-1").steps]
    (tmp_path / "bf16-1" / "steps.jsonl").write_text("\n".join(rows) + "\n")
    assert "the runs under the label bf16 took different numbers of tokens" in error_of(content, tmp_path, capsys)
    (tmp_path / "rowwise" / "run.json").unlink()
    assert "label rowwise: " in (sentence := error_of(content, tmp_path, capsys)) and "no run.json" in sentence
    assert plot.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml cannot be read: No such file" in capsys.readouterr().err
    for words in ([], [str(tmp_path / "bf16-0"), "--config", str(tmp_path / "config.yaml")]):
        assert plot.main(words) == 2
        assert "name either run folders or, with --config, a YAML file" in capsys.readouterr().err


def test_emulated_fp8_has_no_speed_to_show(content, tmp_path, capsys):
    change_run(tmp_path / "rowwise", fp8={"emulated": True})
    for name in SPEED_FIGURES:
        sentence = error_of(content | {"figures": ["peak_memory", name]}, tmp_path, capsys)
        assert (
            "rowwise is emulated fp8, which has no speed to show" in sentence and f"{name} out of figures" in sentence
        )
    slow = [name for name in FIGURES if name not in SPEED_FIGURES]
    assert len(plot_config(write(content | {"figures": slow}, tmp_path))) == 3


@pytest.mark.parametrize("path", sorted((ROOT / "plot_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_committed_files_parse_and_draw(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = read_config(path)
    read_runs(comparison)
    assert all(run.info["status"] == "ok" for run in comparison.runs)
    assert len({run.info["batch_size"] for run in comparison.runs}) == 1
    card = comparison.runs[0].info["device_name"]
    for group in comparison.groups:  # a label says so where the card is another one
        others = {run.info["device_name"] for run in group.runs} - {card}
        assert all(f"({name.removeprefix('NVIDIA ')})" in group.label for name in others)
    for name in comparison.figures:
        assert not crosses(FIGURES[name](comparison)), name


def test_recorded_and_drawn_mfu_of_a_bf16_run_agree(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load((ROOT / "plot_configs" / "attention_kernels.yaml").read_text())
    del content["warm_up_steps"]
    content["runs"] = content["runs"][2:]  # those in bf16
    drawn = bars_of(draw(content, tmp_path, "mfu").axes[0])
    recorded = [100 * read_run(Path(entry["folder"])).info["results"]["mfu"] for entry in content["runs"]]
    assert drawn == pytest.approx(recorded, abs=0.006)


def test_errors_reach_a_caller_as_settings_errors(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        plot_config(tmp_path / "none.yaml")
