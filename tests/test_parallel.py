"""llm_train.py in two processes: the loss curve of one, no window twice or never, and a clear end when one is gone.

Two runs of torchrun do nearly all of it (see parallel_driver.py): importing PyTorch takes longer than the training.
"""

import csv
import json
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from parallel_tools import BASE, DRIVER, Run, difference, drive, flags, torchrun

import llm_plan
import llm_train
import parallel
import plot
import processes
import run_restart
from processes import Ranks
from run_folder import RunFolder
from utils import SettingsError

CASES = {
    "plain": {},
    "micro": {"tokens_per_update": 768},  # three micro-batches an update
    "uneven": {"batch_size": 16, "tokens_per_update": 1280},  # the last micro-batch is smaller
    "chunked": {"loss": "chunked", "dropout": 0.0, "gradient_checkpointing": "selective"},
    "master": {"parameters": "bf16_master"},
    "stochastic": {"parameters": "bf16_stochastic"},
    "scaled": {"precision": "fp16"},
    "compiled": {"use_compile": True, "gradient_checkpointing": "every_k", "num_layers": 3, "max_steps": 10},
}
IN_BACKWARD = {"optimizer_in_backward": True}  # FSDP alone can: it calls the hooks when a gradient has been averaged
ROUNDING = {"master": 1e-3, "stochastic": 1e-3, "scaled": 1e-4}  # 16 bits; otherwise 1e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def one(place) -> dict[str, Run]:
    cases = CASES | {"in-backward": IN_BACKWARD}
    return drive(place, {name: case | {"run_name": f"{name}-one"} for name, case in cases.items()}, processes=1)


@pytest.fixture(scope="module")
def two(place, one) -> dict[str, Run]:  # after `one`, which makes the token files
    cases = {
        f"{name}-{method}": case | {"parallel": method} for name, case in CASES.items() for method in ("ddp", "fsdp")
    }
    counted = {"_count": True, "max_steps": 3, "evaluate_on": "none"}
    return drive(
        place,
        {
            **cases,
            "in-backward-fsdp": IN_BACKWARD | {"parallel": "fsdp"},
            "once-ddp": counted | {"parallel": "ddp"},
            "once-fsdp": counted | {"parallel": "fsdp"},
            "often-ddp": counted | {"parallel": "ddp", "tokens_per_update": 1024},
            "often-fsdp": counted | {"parallel": "fsdp", "tokens_per_update": 1024},
            "dropout": {"parallel": "ddp", "dropout": 0.3, "max_steps": 3, "evaluate_on": "none"},
            "odd": {"parallel": "fsdp", "batch_size": 6, "max_steps": 2},
            "bf16": {"parallel": "fsdp", "precision": "bf16"},
            "stopped": {"parallel": "fsdp", "_signal": "SIGTERM", "_step": 3},
            "late": {"parallel": "ddp", "max_training_minutes": 1e-9},
            "not-divisible": {"parallel": "ddp", "batch_size": 7},
            "no-text": {"parallel": "ddp", "dataset_path": place / "nothing.txt"},
            "no-method": {},
            "no-memory": {"parallel": "fsdp", "memory_budget_gib": 0.0007},
            "overflow": {"_script": "overflow"},
            "alone": {"_script": "parallel", "repeats": 2, "num_layers": 2, "width": 64},
        },
    )


@pytest.mark.parametrize(
    ("name", "method"), [*((name, method) for name in CASES for method in parallel.METHODS), ("in-backward", "fsdp")]
)
def test_the_loss_curve_is_that_of_one_process(one, two, name, method):
    run, alone = two[f"{name}-{method}"], one[name]
    assert [rank["status"] for rank in run.ranks] == [0, 0], run.ranks[0]["stderr"] + run.ranks[1]["stderr"]
    assert len(run.losses) == BASE["max_steps"] - 2 * (name == "compiled")
    bound = ROUNDING.get(name, 1e-5)
    assert difference(run.losses, alone.losses) < bound
    assert difference([run.info["results"]["test_loss"]], [alone.info["results"]["test_loss"]]) < bound
    assert run.info["results"]["test_tokens"] == alone.info["results"]["test_tokens"]
    assert run.info["results"]["tokens_per_update"] == alone.info["results"]["tokens_per_update"]


def test_bf16_is_bf16(two):
    assert two["bf16"].info["status"] == "ok" and two["bf16"].info["precision"] == "bf16"


def test_micro_batches_send_no_gradients(two):
    """Four micro-batches an update make as many reductions as one: all but the last accumulate."""
    for method in ("ddp", "fsdp"):
        once, often = (two[f"{words}-{method}"].ranks[0]["collectives"] for words in ("once", "often"))
        assert once["gloo:all_reduce"] > 0
        assert often["gloo:all_reduce"] == once["gloo:all_reduce"]


def test_evaluation_with_ranks_that_have_nothing_to_do(one, two):
    """A batch of 6 windows in slices of 3; whatever the batch, every token counts once."""
    info = two["odd"].info["results"]
    assert info["test_tokens"] == one["plain"].info["results"]["test_tokens"]
    assert info["batch_size"] == 6


def test_every_ranks_memory_is_in_the_folder(two):
    for method in ("ddp", "fsdp"):
        run = two[f"plain-{method}"]
        rows = list(csv.DictReader((run.path / "memory.csv").open()))
        assert {row["rank"] for row in rows} == {"0", "1"}
        for rank in (0, 1):
            own = [row for row in rows if row["rank"] == str(rank) and row["phase"] == "training_step"]
            assert [row["step"] for row in own] == ["2", "3"]
            peak = max(float(row["peak_allocated_gib"]) for row in own)
            assert run.info["results"]["peak_allocated_gib_by_rank"][rank] == peak
        assert run.info["results"]["peak_allocated_gib"] == max(run.info["results"]["peak_allocated_gib_by_rank"])
        assert (run.info["parallel"], run.info["world_size"]) == (method, 2)
    ddp, fsdp = (two[f"plain-{method}"].info["results"]["peak_allocated_gib"] for method in ("ddp", "fsdp"))
    assert fsdp < ddp


def test_figures_take_the_larger_rank(two, tmp_path):
    rows = "step,phase,start_allocated_gib,peak_allocated_gib,end_allocated_gib,start_reserved_gib,peak_reserved_gib"
    table = f"{rows},rank\n2,training_step,1,2,1,,,0\n2,training_step,1,3,1,,,1\n"
    (tmp_path / "memory.csv").write_text(table)
    (tmp_path / "run.json").write_text(json.dumps(two["plain-ddp"].info))
    figure = plot.memory_figure(plot.read_run(tmp_path))
    assert max(bar.get_height() for bar in figure.axes[0].patches) == 3
    assert "1 tracked step" in " ".join(text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")))


def test_only_the_first_rank_prints(two):
    run = two["plain-ddp"]
    assert run.ranks[0]["stdout"].splitlines()[-1].startswith("{")
    assert run.ranks[1]["stdout"] == ""
    assert "step/s" not in run.ranks[1]["stderr"]


def test_a_signal_to_one_rank_stops_both(two):
    run = two["stopped"]
    assert [rank["status"] for rank in run.ranks] == [130, 143]
    assert run.info["status"] == "interrupted" and len(run.losses) == 3
    assert f"torchrun --nproc_per_node=2 llm_train.py --resume {run.path}" in run.ranks[0]["stdout"]
    assert [path.name for path in (run.path / "checkpoint").iterdir()] == ["step-3"]


def test_an_overflow_on_one_rank_skips_the_step_of_all(two):
    assert [rank["stderr"].splitlines()[-1] for rank in two["overflow"].ranks] == ["True 32768.0"] * 2


def test_too_little_memory_is_a_result(two):
    info = two["no-memory"].info
    assert [rank["status"] for rank in two["no-memory"].ranks] == [1, 1]
    assert info["status"] == "oom" and "memory budget" in info["error"]


def test_the_time_limit_is_agreed_on(two):
    assert two["late"].info["stopped_by"] == "time" and two["late"].info["status"] == "ok"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("not-divisible", "--batch_size 7 is the sequences of all processes together and not divisible by the 2"),
        ("no-text", "nothing.txt"),
        ("no-method", "torchrun started 2 processes and each would train the same; add --parallel ddp or"),
    ],
)
def test_wrong_input_is_one_sentence_of_the_first_rank(two, name, words):
    assert [rank["status"] for rank in two[name].ranks] == [2, 2]
    assert two[name].ranks[0]["stderr"].count("error:") == 1 and words in two[name].ranks[0]["stderr"]
    assert two[name].ranks[1]["stderr"] == ""
    assert not two[name].path.exists()


def test_a_blocked_process_has_last_words():
    """Where the main thread hangs, a signal that nothing answers is answered by a thread."""
    said, ranks = threading.Event(), Ranks("ddp", world_size=2)
    before = signal.signal(signal.SIGTERM, lambda *details: None)
    try:
        with processes.last_words(said.set, ranks, seconds=0.05):
            signal.raise_signal(signal.SIGTERM)
            assert said.wait(5)
        said.clear()
        with processes.last_words(said.set, ranks, seconds=0.3):
            signal.raise_signal(signal.SIGTERM)
            for _ in range(10):
                processes.Heart.beats += 1
                time.sleep(0.05)
            assert not said.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_dropout_differs_between_ranks_and_repeats():
    ranks = [Ranks("ddp", rank=rank, world_size=2) for rank in (0, 1)]

    def draw(rank: int, *place: int | str, alike: bool = False) -> list[float]:
        ranks[rank].reseed(*place, alike=alike)
        return torch.rand(3).tolist()

    state = torch.get_rng_state()
    assert draw(0, 7, 1, "dropout") == draw(0, 7, 1, "dropout")
    assert draw(0, 7, 1, "dropout") != draw(1, 7, 1, "dropout")
    assert draw(0, 7, 1, "dropout") != draw(0, 7, 2, "dropout")
    assert draw(0, 7, 1, "update", alike=True) == draw(1, 7, 1, "update", alike=True)
    torch.set_rng_state(state)
    processes.ALONE.reseed(1)  # one process goes on with its own random numbers
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_slices_have_every_window_once(count):
    for size in (12, 7, 1, 0):
        parts = [Ranks("ddp", rank=rank, world_size=count).mine(np.arange(size)) for rank in range(count)]
        assert np.concatenate(parts).tolist() == list(range(size))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_killed_process_and_a_restart(place):
    """Rank 1 is killed in step 6; then rank 0, under a torchrun that may restart once."""

    def case(**changes) -> list[str]:
        defaults = {"output_folder": place / "killed", "cache_folder": place / "cache", "parallel": "ddp"}
        return flags(BASE | defaults | {"checkpoint_every_minutes": 1e-9} | changes)

    cases = [{"argv": case(), "signal": "SIGKILL", "step": 6, "rank": rank} for rank in (0, 1)]
    for rank, killed in enumerate(cases):
        place.joinpath(f"killed-{rank}.json").write_text(json.dumps([killed]))
    status, out, _ = torchrun(DRIVER, str(place / "killed-1.json"))
    path = place / "killed" / "llm" / "tiny-fp32-sdpa-ddp-2-batch-8"
    run = Run([], path)
    assert status == 1
    assert out.count("a process of the run died or was lost") == 1
    assert f"go on with: torchrun --nproc_per_node=2 llm_train.py --resume {path}" in out
    assert json.loads(out.splitlines()[-1]) == {"run": str(path), "status": "lost"}
    assert run.info["status"] == "lost" and "a process of the run died or was lost" in run.info["error"]
    assert [file.name for file in (path / "checkpoint").iterdir()] == ["step-5"]

    status, out, err = torchrun(DRIVER, str(place / "killed-0.json"), options=("--max_restarts=1",))
    assert err.count("a process of the run died or was lost") == 1  # rank 1 says it where rank 0 cannot
    again = Run([], path.with_name(f"{path.name}-2"))
    assert status == 0, out + err
    assert again.info["status"] == "ok" and "error" not in again.info
    assert [row["step"] for row in again.info["resumed"]] == [5]
    assert [row["step"] for row in again.steps] == list(range(1, 13))
    assert run.info["status"] == "lost"  # another torchrun's


def test_parallel_py_measures_both(two):
    said = two["alone"].ranks[0]
    assert said["status"] == 0, said["stderr"]
    rows = {line.split()[0]: line.split() for line in said["stdout"].splitlines() if line.startswith(("ddp", "fsdp"))}
    assert float(rows["fsdp"][2]) < float(rows["ddp"][2])
    assert all(float(row[-1]) < 1e-5 for row in rows.values())


def test_parallel_py_alone_says_how_to_start(capsys):
    with patch.object(sys, "argv", ["parallel.py"]), pytest.raises(SettingsError, match="torchrun --nproc_per_node=2"):
        parallel.main()


# --- Without other processes ------------------------------------------------------------------------------------------


def plan_for(world_size: int = 2, **changes) -> llm_plan.Plan:
    settings = llm_train.Settings(**(BASE | {"parallel": "ddp"} | changes))
    return llm_plan.make_plan(settings, world_size)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer_in_backward": True}, "--optimizer_in_backward true updates a parameter before"),
        (
            {"parallel": "fsdp", "optimizer": "adamw_8bit", "parameters": "bf16_stochastic"},
            "--optimizer adamw_8bit with --parameters bf16_stochastic cannot",
        ),
        ({"adjust_batch_size": True}, "--adjust_batch_size true under --parallel would hang"),
        ({"batch_size": 9}, "--batch_size 9 is the sequences of all processes"),
        ({"tokens_per_update": 32 * 9, "batch_size": None}, "--tokens_per_update 288 is 9 sequences"),
    ],
)
def test_what_cannot_be_combined_is_one_sentence(changes, words):
    with pytest.raises(SettingsError, match=words):
        plan_for(**changes)


def test_parallel_without_torchrun_shows_the_command():
    argv = ["llm_train.py", *flags(BASE), "--parallel", "fsdp"]
    with (
        patch.object(sys, "argv", argv),
        pytest.raises(SettingsError, match="torchrun --nproc_per_node=2"),
    ):
        llm_train.main()


def test_a_small_corpus_gets_a_batch_that_the_processes_can_share():
    plan = plan_for(batch_size=None, evaluate_on="none")
    split = SimpleNamespace(num_windows=lambda context: 5)
    data = SimpleNamespace(splits={"train": split}, description={"description": "text"})
    llm_plan.check_corpus(data, plan, llm_train.Settings(**(BASE | {"batch_size": None, "evaluate_on": "none"})))
    assert plan.batch_size == 4


def test_bytes_by_hand():
    assert parallel.held_bytes("ddp", 8, 1000) == 16_000
    assert parallel.held_bytes("fsdp", 8, 1000) == 2_000
    assert parallel.in_flight_bytes("ddp", [100, 100], 50) == 0
    assert parallel.in_flight_bytes("fsdp", [100, 300, 200], 50) == 4 * 50 + 4 * 500 + 8 * 300
    assert parallel.in_flight_bytes("fsdp", [100, 300, 200], 50, gathered_bytes=2) == 4 * 50 + 2 * 500 + 6 * 300
    assert parallel.sent_bytes("ddp", 2, 1000) == 4_000
    assert parallel.sent_bytes("fsdp", 2, 1000, gathered_bytes=2) == 4_000
    assert parallel.sent_bytes("fsdp", 4, 1000) == 9_000
    assert parallel.sent_bytes(None, 1, 1000) == 0


def test_mfu_is_of_all_gpus():
    """Twice the tokens/s on twice the GPUs is the same share."""
    log = llm_train.StepLog(
        RunFolder(Path("nowhere")), torch.device("cpu"), tokens_per_update=100, flops_per_token=1e9,
        peak_tflops=2 * 1.0, tracked_steps=1, measured_steps=1,
    )  # fmt: skip
    assert log._mfu(1000.0) == 0.5


def test_a_lost_process_is_known_by_its_words():
    assert processes.is_lost(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1"))
    assert processes.is_lost(processes.ProcessLost("gone"))
    assert not processes.is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not processes.is_lost(SettingsError("connection closed"))


def test_the_first_reason_stays(tmp_path):
    """A rank that ran out of memory wrote so; the other one only noticed that it was gone."""
    run = RunFolder(tmp_path)
    run.update(status="running", settings={})
    run_restart.note_failure(run, Ranks("ddp", rank=1, world_size=2), "oom", "CUDA out of memory")
    assert run_restart.end_lost(RunFolder(tmp_path), Ranks("ddp", world_size=2), RuntimeError("closed")) == 1
    info = json.loads((tmp_path / "run.json").read_text())
    assert (info["status"], info["error"]) == ("oom", "rank 1: CUDA out of memory")


def test_auto_resume_begins_goes_on_and_is_done(place, one):
    """Three calls of one command: begin (broken off before any checkpoint), go on, nothing left to do."""
    argv = ["llm_train.py", *flags(BASE | {"output_folder": place, "cache_folder": place / "cache"})]
    argv += ["--run_name=requeued", "--auto_resume=true"]

    def broken(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with patch.object(sys, "argv", argv):
        with patch.object(llm_train.Training, "train", broken):
            assert llm_train.main() == 130
        path = place / "llm" / "requeued"
        assert json.loads((path / "run.json").read_text())["status"] == "interrupted"
        assert llm_train.main() == 0
        run = Run([], path)
        assert difference(run.losses, one["plain"].losses) < 1e-6
        assert run.info["resumed"][0]["step"] == 0
        with patch.object(llm_train.Training, "train", broken):
            assert llm_train.main() == 0
    with (
        patch.object(sys, "argv", [*argv[:-2], "--auto_resume=true"]),
        pytest.raises(SettingsError, match="--run_name"),
    ):
        llm_train.main()
