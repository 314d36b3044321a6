"""The table of runs in several processes: against one process with the same work a GPU, memory beside the formula."""

import json
from pathlib import Path

import report_parallel
from utils import GIB

RESULTS = {"step_ms_median": 10.0, "step_ms_p20": 9.0, "step_ms_p80": 11.0, "timed_steps": 5, "mfu": 0.5}
STATE = {"optimizer": "adamw", "parameters": "fp32"}


def make_run(outputs: Path, name: str, rate: float, *, batch: int, status: str = "ok", device: str = "card", **more):
    folder = outputs / "parallel" / name
    folder.mkdir(parents=True)
    settings = STATE | {"batch_size": batch, "run_name": name, "parallel": more.get("parallel"), "seed": 0}
    info = {
        "status": status, "device_name": device, "model_size": "tiny", "batch_size": batch, "parameters": GIB,
        "settings": settings, "results": RESULTS | {"tokens_per_s": rate, "peak_allocated_gib": 20.0}, **more,
    }  # fmt: skip
    info["results"] |= {"peak_allocated_gib_by_rank": [20.0, 21.0]} if "parallel" in more else {}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "memory.csv").write_text("step,phase,start_allocated_gib\n2,forward_pass,8.5\n2,loss,9.0\n")


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_rows(tmp_path):
    make_run(tmp_path, "z", 1000.0, batch=4)  # one process comes first
    make_run(tmp_path, "b", 1900.0, batch=8, parallel="ddp", world_size=2)
    make_run(tmp_path, "c", 1880.0, batch=8, parallel="fsdp", world_size=2)
    make_run(tmp_path, "d", 1700.0, batch=4, parallel="ddp", world_size=2)  # half the work a GPU: no comparison
    make_run(tmp_path, "e", 1950.0, batch=8, parallel="ddp", world_size=2, device="other card")
    make_run(tmp_path, "f", 0.0, batch=8, parallel="fsdp", world_size=2, status="oom")
    rows = cells(report_parallel.parallel_table(tmp_path))
    assert [row[0] for row in rows][:2] == ["`z`", "`d`"]
    rows = [row[1:] for row in rows]
    assert [row[7] for row in rows] == ["-", "-", "1.900", "1.880", "-", "-"]
    assert rows[2][:5] == ["2 x card", "ddp", "`tiny`", "8", "1,900"] and rows[4][4] == "oom"
    # fp32 with AdamW and 2^30 parameters: 12 GiB without gradients, 16 with DDP's buckets, half of 12 a shard.
    assert [row[10] for row in rows[:4]] == ["12.0", "16.0", "16.0", "6.00"]
    assert rows[3][8:] == ["50.0 %", "8.50", "6.00", "20.0, 21.0"] and rows[0][11] == "20.0"
    assert len({len(row) for row in rows}) == 1


def test_a_resumed_run_and_one_of_fewer_layers_say_so(tmp_path):
    make_run(tmp_path, "one", 1000.0, batch=4, resumed=[{"step": 12}])  # partly of two processes
    make_run(tmp_path, "two", 1900.0, batch=8, parallel="ddp", world_size=2)
    path = tmp_path / "parallel" / "two" / "run.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"settings": info["settings"] | {"num_layers": 1}}))
    (tmp_path / "parallel" / "other").mkdir()
    (tmp_path / "parallel" / "other" / "run.json").write_text('{"status": "ok"}')  # another script's
    one, two = (row[1:] for row in cells(report_parallel.parallel_table(tmp_path)))
    assert one[4:] == ["ok, resumed after step 12", *["-"] * 7]
    assert two[2] == "`tiny`, 1 of its layers" and two[7] == "-"


def test_nothing_run(tmp_path):
    assert report_parallel.parallel_table(tmp_path).startswith("Not run yet: a training in several processes")
