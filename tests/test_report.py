"""The README's tables are those of the committed runs, and the rule of `auto` agrees with what was measured."""

import csv
import json
from pathlib import Path

import pytest
import torch

import attention_support
import report
from attention_support import FULL, choose_backend
from utils import SettingsError

ROOT = Path(__file__).parent.parent
BENCHMARK = ROOT / "outputs" / "attention_benchmark"


def test_the_readme_shows_the_committed_runs():
    text = report.README.read_text(encoding="utf-8")
    assert report.replace_tables(text) == text


def test_check_finds_a_changed_number(monkeypatch, tmp_path, capsys):
    text = report.README.read_text(encoding="utf-8")
    changed = tmp_path / "README.md"
    changed.write_text(text.replace("644.0005", "644.0006", 1), encoding="utf-8")
    monkeypatch.setattr(report, "README", changed)
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    assert report.main() == 1 and "disagree" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["report.py"])
    assert report.main() == 0 and changed.read_text(encoding="utf-8") == text
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    assert report.main() == 0


@pytest.mark.parametrize(
    "text",
    [
        "no table at all",
        "<!-- table: a -->\n<!-- end of table -->\n<!-- table: a -->\n<!-- end of table -->",
        "<!-- table: b -->\n<!-- end of table -->",
    ],
)
def test_a_missing_double_or_unknown_marker_is_an_error(text):
    with pytest.raises(SettingsError, match="same tables"):
        report.replace_tables(text, {"a": lambda: "x"})


def test_a_missing_run_folder_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    for table in (report.llm_table, report.break_even_table, report.parameters_table):
        with pytest.raises(SettingsError, match="is missing"):
            table()


def test_number_wants_exactly_one_row():
    rows = [
        {"metric": "time", "direction": "forward", "value": "1.5", "backend": "a", "status": "ok"},
        {"metric": "status", "direction": "forward_backward", "value": "", "backend": "b", "status": "oom"},
    ]
    assert report.number(rows, "time", "forward", backend="a") == 1.5
    assert report.number(rows, "time", "forward", backend="b") == "oom"
    with pytest.raises(SettingsError, match="0 rows"):
        report.number(rows, "time", "forward", backend="c")
    with pytest.raises(SettingsError, match="2 rows"):
        report.number([rows[0], rows[0]], "time", "forward", backend="a")


@pytest.mark.parametrize(
    ("value", "text"), [(0.09481, "0.0948"), (1.0, "1.00"), (33.04, "33.0"), (434.6, "435"), (17408.2, "17,408")]
)
def test_shown_numbers(value, text):
    assert report.shown(value) == text


# ------------------------------------------------------------------------------------------------- the rule of `auto`


@pytest.fixture
def hopper(monkeypatch):
    """The machine of the committed runs, as far as the rule looks at it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for name in ("flash_attn_error", "varlen_error", "pytorch_refusal"):
        monkeypatch.setattr(attention_support, name, lambda *arguments: None)
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


def measured_cells(sweep: str) -> dict[tuple[str, ...], dict[str, float]]:
    """(layout, context, heads, head width, causal, window, batch) -> kernel -> ms of forward and backward."""
    cells: dict[tuple[str, ...], dict[str, float]] = {}
    columns = ("layout", "context_length", "num_heads", "head_dim", "causal", "window", "batch_size")
    with (BENCHMARK / sweep / "results.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if (row["metric"], row["direction"]) == ("time", "forward_backward"):
                cells.setdefault(tuple(row[name] for name in columns), {})[row["backend"]] = float(row["value"])
    return cells


def picked(cell: tuple[str, ...]) -> str:
    layout, context, _, head_dim, causal, window, _ = cell
    return choose_backend(
        torch.device("cuda"),
        torch.bfloat16,
        FULL if window == "none" else (int(window), 0),
        int(head_dim),
        tokens=int(context),
        causal=causal == "true",
        packed=layout == "packed",
    )[0]


SWEEPS = sorted(path.parent.name for path in BENCHMARK.glob("*/results.csv"))


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_rule_is_within_3_percent_of_the_fastest_kernel(sweep, hopper):
    """In every measured cell; flex stands outside (auto leaves it out for its compilation), as the README says."""
    checked = 0
    for cell, times in measured_cells(sweep).items():
        named = {name: ms for name, ms in times.items() if name not in ("auto", "flex")}
        if len(named) > 1 and picked(cell) in named:
            assert named[picked(cell)] <= 1.03 * min(named.values()), (cell, picked(cell), named)
            checked += 1
    assert checked > 0 or sweep == "window_flex"


@pytest.mark.parametrize(("sweep", "cells"), [("comparison", 18), ("comparison_packed", 18)])
def test_auto_itself_was_measured_within_3_percent(sweep, cells):
    """The contract of `auto`: its own row, not what the rule would pick today."""
    behind = [
        times["auto"] / min(ms for name, ms in times.items() if name != "auto") - 1
        for times in measured_cells(sweep).values()
    ]
    assert len(behind) == cells and max(behind) <= 0.03


def test_what_flex_wins_is_what_the_readme_says():
    """Heads of 16 by 6 %, windows of 256 by 1 to 4 %."""
    heads = {cell[3]: times for cell, times in measured_cells("head_dim").items()}
    assert min(heads["16"], key=heads["16"].get) == "flex"
    assert round(100 * (heads["16"]["sdpa_cudnn"] / heads["16"]["flex"] - 1)) == 6
    windows = [times for cell, times in measured_cells("window_flex").items() if cell[5] == "256"]
    gains = [round(100 * (times["flash_attn"] / times["flex"] - 1)) for times in windows]
    assert sorted(gains) == [1, 4, 4]


def test_a_window_never_saves_memory():
    """The peak of flash-attn with a window is that without it, to the byte, at every context."""
    peaks: dict[str, set[str]] = {}
    with (BENCHMARK / "window" / "results.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = (row["backend"], row["metric"], row["direction"])
            if key == ("flash_attn", "peak_memory", "forward_backward"):
                peaks.setdefault(row["context_length"], set()).add(row["value"])
    assert len(peaks) == 7 and all(len(values) == 1 for values in peaks.values())


def test_the_peak_of_flash_attn_is_the_formula_to_the_byte():
    """20 B T E + 8 B H T + 512 bytes for q, k and v packed, in every committed cell where it ran."""
    checked = 0
    for sweep in ("comparison_packed", "batch_size", "context_length", "num_heads", "embedding_dim", "causal"):
        with (BENCHMARK / sweep / "results.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if (row["backend"], row["metric"], row["direction"]) == (
                    "flash_attn",
                    "peak_memory",
                    "forward_backward",
                ):
                    tokens = int(row["batch_size"]) * int(row["context_length"])
                    expected = tokens * (20 * int(row["embedding_dim"]) + 8 * int(row["num_heads"])) + 512
                    assert float(row["value"]) * 2**30 == expected
                    checked += 1
    assert checked == 30


def test_the_seam_costs_less_than_2_percent():
    answers = json.loads((BENCHMARK / "overhead" / "run.json").read_text())["results"]["overhead"]
    assert len(answers) == 12 and all(answer["overhead"] <= 0.02 for answer in answers)
