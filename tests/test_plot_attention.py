"""plot_attention.py draws what results.csv says: no case dropped, none made up; broken files cost one sentence."""

import csv
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import plot_attention
from attention_measure import Case, Measurement, attention_flops
from attention_results import COLUMNS, csv_rows, write_csv
from attention_support import BACKENDS
from plot_attention import STYLES, break_even_figure, plot_sweep, read_results, sweep_figures, window_map
from run_results import RunFolderError
from utils import GIB

ENVIRONMENT = {
    "device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "torch_version": "2.11.0", "cuda_version": "13.0",
    "flash_attn_version": "2.8.3",
}  # fmt: skip
CELL = Case("eager", 32, 1024, 32, 64, causal=False, layout="packed")
SPEED = {name: 10.0 / (place + 1) for place, name in enumerate(["eager", "sdpa_flash", "sdpa_cudnn", "flash_attn"])}


def made(case: Case, ms: float | None = None, status: str = "ok", reason: str = "") -> Measurement:
    """A made-up measurement of 2 rounds of 3 repetitions: 20th percentile 0.9 ms, median ms, 80th 1.1 ms."""
    chosen = "sdpa_cudnn" if case.backend == "auto" else case.backend
    measurement = Measurement(case, status, reason, chosen)
    if status == "ok":
        ms = SPEED.get(case.backend, 4.0) * case.batch_size * case.context_length / 32768 if ms is None else ms
        times = [ms * factor for factor in (0.9, 1.0, 1.1)]
        one = {"forward": [t / 4 for t in times], "backward": [3 * t / 4 for t in times], "forward_backward": times}
        measurement.rounds = [one, one]
        peak = case.batch_size * case.context_length * 2**15
        measurement.peak_above_inputs_bytes = {"forward": peak // 2, "forward_backward": peak}
        measurement.peak_bytes = {
            name: value + case.inputs_bytes for name, value in measurement.peak_above_inputs_bytes.items()
        }
    return measurement


def folder_of(tmp_path: Path, sweep: str, measurements: list[Measurement]) -> Path:
    folder = tmp_path / sweep
    folder.mkdir()
    write_csv(folder / "results.csv", [row for m in measurements for row in csv_rows(sweep, m, ENVIRONMENT)])
    return folder


def rows_of(tmp_path: Path, measurements: list[Measurement], sweep: str = "custom") -> list[dict[str, str]]:
    return read_results(folder_of(tmp_path, sweep, measurements))


def comparison() -> list[Measurement]:
    """2 batches x 3 contexts x 2 masks x 5 kernels; eager has no memory at the largest contexts, flex cannot run."""
    measurements = []
    backends = ["eager", "sdpa_cudnn", "flash_attn", "flex", "auto"]
    for batch, context, causal, backend in itertools.product((16, 64), (512, 1024, 2048), (False, True), backends):
        case = replace(CELL, backend=backend, batch_size=batch, context_length=context, causal=causal)
        if backend == "flex":
            measurements.append(made(case, status="unsupported", reason="flex needs triton"))
        elif backend == "eager" and context == 2048:
            measurements.append(made(case, status="oom", reason="full"))
        else:
            measurements.append(made(case))
    return measurements


def window_sweep() -> list[Measurement]:
    """Context x window at 16384 tokens: a window takes 0.5 ms a 1024 of context, without it 1 ms, cuDNN 0.8 ms."""
    measurements = []
    for context in (256, 1024, 4096):
        shape = replace(CELL, batch_size=16384 // context, context_length=context, causal=True, layout="separate")
        measurements.append(made(replace(shape, backend="sdpa_cudnn"), 0.8 * context / 1024))
        for backend in ("flash_attn", "varlen"):
            measurements.append(made(replace(shape, backend=backend), context / 1024))
            for window in (64, 512):
                if window < context - 1:
                    measurements.append(made(replace(shape, backend=backend, window=(window, 0)), 0.5 * context / 1024))
    return measurements


def texts(figure) -> list[str]:
    """Every piece of text a reader sees in the figure."""
    found = [figure.get_suptitle()]
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    found += [text.get_text() for legend in legends for text in legend.get_texts()]
    for ax in figure.axes:
        found += [ax.get_title(), ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()]
        found += [text.get_text() for text in ax.texts]
    return found


def line_of(ax, backend: str):
    """The kernel's line in a panel, as {x: y}."""
    style = STYLES[backend]
    (line,) = (
        line
        for line in ax.lines
        if line.get_marker() == style["marker"] and line.get_color() == style["color"] and line.get_marker() != "x"
    )
    return dict(zip(line.get_xdata(), line.get_ydata(), strict=True))


def crosses(ax) -> list[tuple[float, str]]:
    return [(line.get_xdata()[0], line.get_color()) for line in ax.lines if line.get_marker() == "x"]


def assert_is_figure(path: Path) -> None:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 12_000


# ------------------------------------------------------------------------------------------------------ what is drawn


def test_every_kernel_has_a_look_of_its_own():
    assert set(STYLES) == {"auto", *BACKENDS}
    looks = [(style["color"], style["marker"]) for style in STYLES.values()]
    assert len(set(looks)) == len(looks) and "x" not in {marker for _, marker in looks}


def test_files_of_a_comparison(tmp_path):
    folder = folder_of(tmp_path, "comparison", comparison())
    paths = plot_sweep(folder)
    assert [path.name for path in paths] == ["sweep_causal_false.png", "sweep_causal_true.png"]
    for path in paths:
        assert path.parent == folder
        assert_is_figure(path)


def test_panels_and_lines_of_a_comparison(tmp_path):
    """Rows: time, TFLOP/s, memory; columns: batches; in each panel every number of the file and no other."""
    measurements = comparison()
    rows = rows_of(tmp_path, measurements, "comparison")
    figures = sweep_figures(rows)
    for causal in (False, True):
        figure = figures[f"sweep_causal_{str(causal).lower()}.png"]
        assert len(figure.axes) == 6
        for column, batch in enumerate((16, 64)):
            panels = figure.axes[column::2]
            assert batch == int(panels[0].get_title().split()[-1]) and panels[0].get_title().startswith("batch")
            for backend in ("eager", "sdpa_cudnn", "flash_attn", "auto"):
                own = {
                    m.case.context_length: m
                    for m in measurements
                    if (m.case.backend, m.case.batch_size, m.case.causal, m.status) == (backend, batch, causal, "ok")
                }
                ms = {context: m.rounds[0]["forward_backward"][1] for context, m in own.items()}
                assert list(ms) == ([512, 1024] if backend == "eager" else [512, 1024, 2048])
                assert line_of(panels[0], backend) == pytest.approx(ms)
                assert line_of(panels[1], backend) == pytest.approx(
                    {
                        context: attention_flops(m.case, "forward_backward") / ms[context] / 1e9
                        for context, m in own.items()
                    }
                )
                assert line_of(panels[2], backend) == {
                    context: m.peak_above_inputs_bytes["forward_backward"] / GIB for context, m in own.items()
                }
        assert ("causal" if causal else "not causal") == figure.get_suptitle().splitlines()[0].split(", ")[-1]
    words = [ax.get_ylabel() for ax in figure.axes[::2]]
    assert words == ["time (ms)", "TFLOP/s", "peak memory above\nthe inputs (GiB)"]
    assert figure.axes[-1].get_xlabel() == "context (tokens)"
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["512", "1024", "2048"]


def test_bars_reach_from_the_20th_to_the_80th_percentile(tmp_path):
    rows = rows_of(tmp_path, [made(replace(CELL, context_length=context), 10.0) for context in (512, 1024)])
    (figure,) = sweep_figures(rows).values()
    bars = [line for line in figure.axes[0].lines if line.get_marker() in ("None", None, "")]
    assert [list(bar.get_xdata()) for bar in bars] == [[512, 512], [1024, 1024]]
    for bar in bars:
        assert list(bar.get_ydata()) == pytest.approx([9.0, 11.0])


def test_out_of_memory_is_a_cross_in_the_colour_of_its_kernel(tmp_path):
    figures = sweep_figures(rows_of(tmp_path, comparison()))
    for figure in figures.values():
        for ax in figure.axes:
            assert crosses(ax) == [(2048, STYLES["eager"]["color"])]
        assert "out of memory, in the kernel's colour" in texts(figure)


def test_crosses_of_several_kernels_do_not_hide_each_other(tmp_path):
    cases = [replace(CELL, backend=b, context_length=c) for b in ("eager", "sdpa_flash", "flex") for c in (512, 1024)]
    rows = rows_of(tmp_path, [made(c, status="oom" if c.context_length == 1024 else "ok") for c in cases])
    (figure,) = sweep_figures(rows).values()
    for ax in figure.axes:
        places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "x"]
        assert len(places) == len(set(places)) == 3 and {x for x, _ in places} == {1024}
        assert all(0.5 < y < 1 for _, y in places)  # near the top, in the panel


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("status", ["oom", "unsupported", "error"])
@pytest.mark.parametrize("contexts", [(512,), (512, 1024)])
def test_where_nothing_ran_there_is_a_figure_all_the_same(tmp_path, status, contexts):
    nothing_ran = [made(replace(CELL, context_length=context), status=status) for context in contexts]
    assert [path.name for path in plot_sweep(folder_of(tmp_path, "custom", nothing_ran))] == ["sweep.png"]


def test_a_panel_where_nothing_ran_beside_others(tmp_path):
    cases = [replace(CELL, batch_size=b, context_length=c) for b in (16, 64) for c in (512, 1024)]
    measurements = [made(case, status="oom" if case.batch_size == 64 else "ok") for case in cases]
    folder = folder_of(tmp_path, "custom", measurements)
    (figure,) = sweep_figures(read_results(folder)).values()
    for left, right in zip(figure.axes[::2], figure.axes[1::2], strict=True):
        assert list(line_of(left, "eager")) == [512, 1024] and not crosses(left)
        assert [x for x, _ in crosses(right)] == [512, 1024]
    assert len(plot_sweep(folder)) == 1


def test_the_legend_says_what_did_not_run(tmp_path):
    measurements = comparison()
    measurements.append(made(replace(CELL, backend="varlen", batch_size=16, context_length=512)))
    case = replace(CELL, backend="varlen", batch_size=16, context_length=1024)
    measurements.append(made(case, status="error", reason="parity: output"))
    figures = sweep_figures(rows_of(tmp_path, measurements))
    found = texts(figures["sweep_causal_false.png"])
    assert {"eager", "sdpa_cudnn", "flash_attn", "auto (sdpa_cudnn)"} <= set(found)
    assert "flex (unsupported)" in found and "varlen (partly error)" in found
    assert not any("varlen" in text for text in texts(figures["sweep_causal_true.png"]))
    no_oom = [m for m in measurements if m.status != "oom"]
    (tmp_path / "two").mkdir()
    for figure in sweep_figures(rows_of(tmp_path / "two", no_oom)).values():
        assert not any("memory, in" in text for text in texts(figure)) and not crosses(figure.axes[0])


def test_the_caption_names_device_dtype_and_n(tmp_path):
    rows = rows_of(tmp_path, comparison())
    for figure in sweep_figures(rows).values():
        caption = figure.get_suptitle().splitlines()[-1]
        for fact in (
            "NVIDIA H100 80GB HBM3",
            "bf16",
            "torch 2.11.0",
            "flash-attn 2.8.3",
            "n = 6 repetitions",
            "median",
        ):
            assert fact in caption
        assert "32 heads of width 64, packed q, k, v" in figure.get_suptitle()
    uneven = made(replace(CELL, context_length=512))
    uneven.rounds = uneven.rounds[:1]
    (tmp_path / "two").mkdir()
    (figure,) = sweep_figures(rows_of(tmp_path / "two", [uneven, made(CELL)])).values()
    assert "n = 3 to 6 repetitions" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("cases", "files", "label"),
    [
        ([replace(CELL, batch_size=b) for b in (16, 32, 64)], ["sweep.png"], "batch (sequences)"),
        ([replace(CELL, causal=causal) for causal in (False, True)], ["sweep.png"], "causal"),
        ([CELL], ["sweep.png"], "context (tokens)"),
        (
            [replace(CELL, context_length=c, layout=layout) for layout in ("separate", "packed") for c in (512, 1024)],
            ["sweep_layout_separate.png", "sweep_layout_packed.png"],
            "context (tokens)",
        ),
        (
            [replace(CELL, num_heads=2048 // width, head_dim=width) for width in (64, 128, 256)],
            ["sweep.png"],
            "head width",
        ),
        (
            [replace(CELL, context_length=c, batch_size=8192 // c) for c in (512, 1024)],
            ["sweep.png"],
            "context (tokens)",
        ),
    ],
)
def test_what_was_varied_is_the_x_axis(tmp_path, cases, files, label):
    figures = sweep_figures(rows_of(tmp_path, [made(case) for case in cases]))
    assert list(figures) == files
    for figure in figures.values():
        assert len(figure.axes) == 3 and figure.axes[-1].get_xlabel() == label
        assert len(line_of(figure.axes[0], "eager")) == len(cases) // len(files)


@pytest.mark.parametrize(
    ("sweep", "cases", "label"),
    [
        ("num_heads", [replace(CELL, num_heads=h, head_dim=2048 // h) for h in (8, 16, 32)], "heads"),
        ("embedding_dim", [replace(CELL, num_heads=16, head_dim=w) for w in (64, 128, 256)], "embedding width"),
    ],
)
def test_the_parameter_of_the_experiment_is_the_x_axis(tmp_path, sweep, cases, label):
    """The head's width follows from it, and comes first in AXES."""
    (figure,) = sweep_figures(rows_of(tmp_path, [made(case) for case in cases], sweep)).values()
    assert figure.axes[-1].get_xlabel() == label


def test_three_varied_numbers_are_not_joined_in_one_line(tmp_path):
    cases = itertools.product((512, 1024), (16, 32), (16, 32))
    measurements = [made(replace(CELL, context_length=c, batch_size=b, num_heads=h)) for c, b, h in cases]
    for figure in sweep_figures(rows_of(tmp_path, measurements)).values():
        for ax in figure.axes:
            for line in ax.lines:
                if line.get_marker() == STYLES["eager"]["marker"]:
                    assert len(set(line.get_xdata())) == len(line.get_xdata())


# ------------------------------------------------------------------------------------------------------------ windows


def test_files_and_panels_of_a_window_experiment(tmp_path):
    folder = folder_of(tmp_path, "window", window_sweep())
    paths = plot_sweep(folder)
    assert [path.name for path in paths] == ["sweep.png", "window_map.png"]
    for path in paths:
        assert_is_figure(path)
    (figure,) = sweep_figures(read_results(folder)).values()
    assert [ax.get_title() for ax in figure.axes[:3]] == ["no window", "window 64", "window 512"]
    assert line_of(figure.axes[0], "flash_attn") == pytest.approx({256: 0.25, 1024: 1.0, 4096: 4.0})
    assert line_of(figure.axes[1], "flash_attn") == pytest.approx({256: 0.125, 1024: 0.5, 4096: 2.0})
    assert line_of(figure.axes[2], "varlen") == pytest.approx({1024: 0.5, 4096: 2.0})


def test_the_map_of_windows_by_hand(tmp_path):
    figure = window_map(rows_of(tmp_path, window_sweep(), "window"))
    titles = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_title(loc="left")}
    assert list(titles) == [
        "flash_attn with a window over itself without",
        "flash_attn with a window over sdpa_cudnn without",
        "varlen with a window over itself without",
    ]
    for title, ax in titles.items():
        ratio = "0.62" if "sdpa_cudnn" in title else "0.50"  # 0.5 / 0.8
        cells = {tuple(text.get_position()): text.get_text() for text in ax.texts}
        # window 64 everywhere, window 512 from context 1024 on: at 256 it hides nothing
        assert cells == dict.fromkeys([(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)], ratio)
        assert [label.get_text() for label in ax.get_yticklabels()] == ["64", "512"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["256", "1024", "4096"]
    assert "NVIDIA H100" in figure.get_suptitle() and "causal" in figure.get_suptitle()


def test_no_map_without_a_case_to_compare_with(tmp_path):
    """The cases without a window ran out of memory."""
    measurements = window_sweep()
    for m in measurements:
        if m.case.window == (-1, -1):
            m.status, m.rounds, m.peak_bytes, m.peak_above_inputs_bytes = "oom", [], {}, {}
    folder = folder_of(tmp_path, "window", measurements)
    assert window_map(read_results(folder)) is None
    assert [path.name for path in plot_sweep(folder)] == ["sweep.png"]


# --------------------------------------------------------------------------------------------------------- break-even


def break_even_cases() -> list[Measurement]:
    """Fused takes 2, 1 and 0.5 of eager's time; a window 1.5 and 0.75 of the full mask's."""
    measurements = []
    for context, factor in ((64, 2.0), (128, 1.0), (256, 0.5)):
        shape = replace(CELL, context_length=context, batch_size=4096 // context, causal=True, layout="separate")
        measurements += [
            made(replace(shape, backend="eager"), 4.0),
            made(replace(shape, backend="flash_attn"), 4 * factor),
        ]
        measurements.append(made(replace(shape, backend="sdpa_flash"), status="unsupported", reason="no"))
    for context, factor in ((128, 1.5), (256, 0.75)):
        full = next(m for m in measurements if (m.case.backend, m.case.context_length) == ("flash_attn", context))
        ms = full.rounds[0]["forward_backward"][1] * factor
        measurements.append(made(replace(full.case, window=(64, 0)), ms))
    return measurements


def test_break_even_by_hand(tmp_path):
    folder = folder_of(tmp_path, "break_even", break_even_cases())
    (path,) = plot_sweep(folder)
    assert path == folder / "break_even.png"
    assert_is_figure(path)
    figure = break_even_figure(read_results(folder))
    fused, windowed = figure.axes
    drawn = [
        {line.get_label(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in ax.lines[:-1]}
        for ax in (fused, windowed)
    ]
    assert drawn[0] == {"flash_attn": pytest.approx({64: 2.0, 128: 1.0, 256: 0.5})}
    assert drawn[1] == {"flash_attn, window 64": pytest.approx({128: 1.5, 256: 0.75})}
    assert set(fused.lines[-1].get_ydata()) == {1.0}  # the line on which it neither saves nor costs
    assert fused.get_ylabel() == "time / that of eager" and "same kernel" in windowed.get_ylabel()
    assert "NVIDIA H100 80GB HBM3" in figure.get_suptitle() and "n = 6" in figure.get_suptitle()


def test_break_even_with_half_of_the_questions(tmp_path):
    only_fused = [m for m in break_even_cases() if m.case.window == (-1, -1)]
    figure = break_even_figure(rows_of(tmp_path, only_fused, "break_even"))
    assert len(figure.axes) == 1 and figure.axes[0].get_ylabel() == "time / that of eager"
    nothing = [made(replace(CELL, backend="eager"), status="oom")]
    (tmp_path / "two").mkdir()
    assert [p.name for p in plot_sweep(folder_of(tmp_path / "two", "break_even", nothing))] == ["break_even.png"]


# ------------------------------------------------------------------------------------------------------- broken folders


def without(path: Path, *columns: str) -> None:
    """Rewrite a CSV file without some of its columns."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = [name for name in COLUMNS if name not in columns]
    with path.open("w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def broken(tmp_path: Path, kind: str) -> Path:
    folder = folder_of(tmp_path, "custom", [made(CELL)])
    path = folder / "results.csv"
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_text("")
    elif kind == "header":
        path.write_text(",".join(COLUMNS) + "\n")
    elif kind == "columns":
        without(path, "window", "metric")
    elif kind == "other file":
        path.write_text("step,phase\n1,forward\n")
    return folder


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("missing", "has no results.csv"),
        ("empty", "has no rows"),
        ("header", "has no rows"),
        ("columns", "lacks the columns window, metric"),
        ("other file", "lacks the columns layout"),
    ],
)
def test_a_broken_folder_costs_one_sentence(tmp_path, capsys, monkeypatch, kind, sentence):
    folder = broken(tmp_path, kind)
    with pytest.raises(RunFolderError, match=sentence) as caught:
        plot_sweep(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(sys, "argv", ["plot_attention.py", str(folder)])
    assert plot_attention.main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("plot_attention.py: ") and sentence in err and err.count("\n") == 1
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize("column", ["direction", "n", "p20", "device", "sweep", "embedding_dim", "chosen_backend"])
def test_any_column_that_is_drawn_may_be_missing(tmp_path, column):
    """KeyError, or a figure without its bars."""
    folder = folder_of(tmp_path, "custom", [made(replace(CELL, backend="auto", context_length=c)) for c in (512, 1024)])
    without(folder / "results.csv", column)
    with pytest.raises(RunFolderError, match=f"lacks the columns {column}"):
        plot_sweep(folder)


@pytest.mark.parametrize(
    "damage", [lambda data: data.replace(b",ms,10,", b",ms,ten,"), lambda data: data + b"\xff\xfe"]
)
def test_a_damaged_file_costs_one_sentence(tmp_path, damage):
    folder = folder_of(tmp_path, "custom", [made(CELL, 10.0)])
    path = folder / "results.csv"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunFolderError, match=r"results\.csv"):
        plot_sweep(folder)


def test_main_draws_every_folder_it_is_given(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot_attention, "save", lambda figure, path: drawn.append(path) or path)
    folders = [folder_of(tmp_path, "custom", [made(CELL)]), folder_of(tmp_path, "break_even", break_even_cases())]
    monkeypatch.setattr(sys, "argv", ["plot_attention.py", *map(str, folders)])
    assert plot_attention.main() == 0
    assert drawn == [folders[0] / "sweep.png", folders[1] / "break_even.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in drawn]


def test_a_folder_without_cases_does_not_keep_the_others_from_being_drawn(tmp_path, monkeypatch):
    """`plot_attention.py outputs/attention_benchmark/*` meets the folder of overhead, which has no results.csv."""
    drawn = []
    monkeypatch.setattr(plot_attention, "save", lambda figure, path: drawn.append(path) or path)
    (tmp_path / "overhead").mkdir()
    window = folder_of(tmp_path, "window", window_sweep())
    monkeypatch.setattr(sys, "argv", ["plot_attention.py", str(tmp_path / "overhead"), str(window)])
    plot_attention.main()
    assert window / "sweep.png" in drawn


@pytest.mark.parametrize(("argv", "status"), [([], 2), (["--help"], 0), (["-h"], 0), (["--folder"], 2)])
def test_main_without_a_folder_shows_how_to_use_it(capsys, monkeypatch, argv, status):
    monkeypatch.setattr(sys, "argv", ["plot_attention.py", *argv])
    assert plot_attention.main() == status
    assert "python plot_attention.py outputs/attention_benchmark/comparison" in capsys.readouterr().out
