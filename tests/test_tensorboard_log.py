"""TensorBoard files hold what steps.jsonl holds, go on after a resume, and their absence is one sentence."""

import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import llm_train
import tensorboard_log
from tensorboard_log import TensorBoardLog
from utils import run_script

pytestmark = pytest.mark.usefixtures("one_thread")


def scalars(folder) -> dict[str, dict[int, float]]:
    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


def test_a_run_writes_both(monkeypatch, tmp_path):
    words = ["--num_layers=1", "--embedding_dim=32", "--num_heads=2", "--context_length=32", "--vocab_size=300"]
    words += ["--max_documents=20", "--max_steps=5", "--tracked_steps=1", "--figures=false", "--tensorboard=true"]
    words += ["--evaluate_on=none", f"--output_folder={tmp_path}", f"--cache_folder={tmp_path / 'cache'}"]
    monkeypatch.setattr(sys, "argv", ["llm_train.py", *words])
    with pytest.raises(SystemExit, match="0"):
        run_script(llm_train.main)
    (folder,) = (path.parent for path in tmp_path.glob("llm/*/run.json"))
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    found = scalars(folder)
    assert len(rows) == 5
    for key in ("loss", "perplexity", "step_ms", "tokens_per_s", "tokens"):
        assert found[key] == {row["step"]: pytest.approx(row[key], rel=1e-6) for row in rows}
    assert "mfu" not in found  # unknown on a CPU: no point rather than a zero


def test_after_a_resume_nothing_is_there_twice(tmp_path):
    TensorBoardLog(tmp_path).add([{"step": step, "loss": 1.0, "mfu": None} for step in (1, 2, 3, 4)])
    TensorBoardLog(tmp_path, done_steps=2).add([{"step": step, "loss": 2.0} for step in (3, 4, 5)])
    assert scalars(tmp_path) == {"loss": {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0}}


def test_without_the_package_it_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tensorboard_log.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["llm_train.py", "--tensorboard=true", f"--output_folder={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        run_script(llm_train.main)
    said = capsys.readouterr().err
    assert "--tensorboard true: tensorboard is not installed; install it with `uv sync --extra tensorboard`" in said
