"""The tables of the comparison say what made-up run folders hold, to the digit, and lose no case that failed."""

import itertools
import json
import math
from pathlib import Path

import pytest

import report
import report_comparison
import report_techniques
from report_comparison import (
    Case,
    comparison_tables,
    confounded_table,
    effects_table,
    interactions_table,
    max_batch_table,
    memory_table,
    peer_table,
    profile_table,
    quality_runs,
    quality_table,
    read_cases,
    time_table,
)
from report_techniques import ADOPTIONS, Adoption, adoption_table, code_lines, technique_table
from utils import SettingsError

COLUMNS = "step,phase,start_allocated_gib,peak_allocated_gib,end_allocated_gib,start_reserved_gib,peak_reserved_gib"

# name, batch, precision, compiled, peaks of forward, loss, backward, optimizer (GiB), step (ms)
SEED = [
    ("fp32-baseline-batch-125", 125, "fp32", False, (27.5, 31.4, 35.2, 2.6), 510.9),
    ("fp16-batch-125", 125, "bf16", False, (20.4, 27.9, 29.8, 2.6), 121.5),
    ("fp16-batch-195", 195, "bf16", False, (31.0, 42.6, 45.6, 2.6), 188.0),
    ("flash-attention-batch-125", 125, "bf16", False, (13.8, 21.4, 23.3, 2.1), 79.2),
    ("chunked-loss-checkpointing-batch-125", 125, "bf16", False, (4.1, 3.9, 4.87, 2.1), 91.0),
    ("everything-batch-125", 125, "bf16", True, (3.5, 3.6, 4.2, 1.1), 68.4),
    ("hf-gpt2-compiled-batch-125", 125, "bf16", True, (10.0, 12.5, 14.0, 2.1), 58.8),
]
FAILED = [("fp32-baseline-batch-303", "oom"), ("fp8-batch-125", "unsupported"), ("fused-loss-batch-125", "error")]


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_comparison(outputs: Path, experiment: str, cases: list[tuple], flags: dict[str, dict] | None = None) -> Path:
    """comparison.json with names, statuses and flags; returns the experiment's folder."""
    rows = [
        {
            "name": name,
            "words": name,
            "flags": (flags or {}).get(name, {}),
            "status": status,
            "gpu": True,
            "error": None if status == "ok" else "x",
        }
        for name, status in cases
    ]
    info = {"experiment": experiment, "size": "full", "finished": True, "git_commit": "c" * 40}
    write_json(outputs / experiment / "comparison.json", info | {"device_name": "NVIDIA H100 80GB HBM3", "cases": rows})
    return outputs / experiment


def make_run(
    folder: Path,
    batch: int,
    precision: str = "bf16",
    compiled: bool = False,
    peaks: tuple[float, ...] = (13.8, 21.4, 23.3, 2.1),
    step_ms: float = 80.0,
    status: str = "ok",
    start: float = 1.5,
    attention: str = "flash_attn",
    **results: object,
) -> None:
    """run.json and memory.csv of two tracked steps, of which the second is as given and the first 0.1 GiB lower."""
    loss = 4.25
    found = {
        "batch_size": batch,
        "tokens_per_update": 256 * batch,
        "steps": 326,
        "timed_steps": 20,
        "tracked_steps": 2,
        "step_ms_median": step_ms,
        "step_ms_p20": step_ms - 0.5,
        "step_ms_p80": step_ms + 1,
        "first_step_ms": 4 * step_ms,
        "compile_s": 41.25 if compiled else None,
        "epoch_minutes": 326 * step_ms / 60_000,
        "tokens_per_s": 256_000 * batch / step_ms,
        "mfu": 0.25,
        "mfu_denominator_tflops": 66.9 if precision == "fp32" else 989.4,
        "peak_allocated_gib": max(peaks),
        "peak_reserved_gib": max(peaks) + 2,
        "peak_phase": "backward_pass",
        "test_loss": loss,
        "test_perplexity": math.exp(loss),
        "test_bits_per_byte": 2.104,
        "test_tokens": 1_502_222,
    }
    info = {
        "status": status,
        "run_name": folder.name,
        "device_name": "NVIDIA H100 80GB HBM3",
        "settings": {"batch_size": batch, "use_compile": compiled, "optimizer": "adamw", "loss": "full"},
        "precision": precision,
        "model": {"context_length": 256, "attention_backend": attention},
        "dataset": {"name": "local files", "description": "local files: novels.jsonl.xz", "generated": False},
        "results": found | results if status == "ok" else {},
    }
    write_json(folder / "run.json", info)
    phases = ("forward_pass", "loss", "backward_pass", "optimizer_step")
    lines = [COLUMNS]
    for step, less in ((2, 0.1), (3, 0.0)):
        rows = [*zip(phases, peaks, strict=True), ("training_step", max(peaks))]
        lines += [f"{step},{phase},{start},{peak - less},1.5,30.0,{peak + 2}" for phase, peak in rows]
    lines.append(f"326,evaluation,1.5,{max(peaks) + 50},1.5,30.0,90.0")
    (folder / "memory.csv").write_text("\n".join(lines) + "\n")


def make_seed(outputs: Path, experiment: str = "seed", cases: list[tuple] = SEED) -> Path:
    """The seed experiment with cases of every status; the last one named `everything` was profiled."""
    flags = {case[0]: {"batch_size": str(case[1]), "use_compile": str(bool(case[3])).lower()} for case in cases}
    flags |= {"fp8-batch-125": {"batch_size": "125"}, "fp32-baseline-batch-303": {"batch_size": "303"}}
    folder = make_comparison(outputs, experiment, [*((case[0], "ok") for case in cases), *FAILED], flags)
    for name, *rest in cases:
        make_run(folder / name, *rest)
    make_run(folder / FAILED[0][0], 303, "fp32", status="oom")
    (folder / FAILED[0][0] / "memory.csv").unlink()  # ended before a step was tracked
    parts = [("matrix products", 31.0), ("attention", 5.0), ("loss", 12.0), ("optimizer", 1.4)]
    parts += [("elementwise and norms", 12.0), ("copies and casts", 4.0), ("idle", 3.0)]
    profile = {
        "steps": 5,
        "step_ms": 66.2,
        "profiled_step_ms": 68.4,
        "categories": [{"name": name, "ms": ms, "share": ms / 68.4} for name, ms in parts],
        "matmul_tflop": 21.93,
        "matmul_floor_ms": 30.8,
        "matmul_rates": [{"shape": "32000 x 768 x 2304", "tflops": 616.2}],
    }
    write_json(folder / "everything-batch-125" / "profile.json", profile)
    return folder


LOSSES = {"fp32-baseline": (6.601, 6.612, 6.605), "flash": (6.607, 6.598, 6.611), "flash-window": (6.7, 6.71, 6.72)}


def make_quality(outputs: Path, experiment: str = "quality", seeds: int = 3) -> Path:
    """Three configurations at equal updates and their confounded runs, one of which ran out of memory."""
    ways = {"fp32-baseline": ("fp32", "eager"), "flash": ("bf16", "flash_attn"), "flash-window": ("bf16", "varlen")}
    equal = [(f"{name}-seed-{seed}", name, LOSSES[name][seed]) for name in LOSSES for seed in range(seeds)]
    confounded = [
        ("confounded-fp32-baseline-batch-125", "fp32-baseline", 125, 326, 741.0),
        ("confounded-flash-attention-batch-195", "flash", 195, 209, 905.0),
        ("confounded-flash-attention-batch-445", "flash", 445, 91, 1258.0),
    ]
    failed = [("confounded-fp32-baseline-batch-303", "oom")]
    names = [*((row[0], "ok") for row in (*equal, *confounded)), *failed]
    flags = {
        name: {"precision": ways[way][0], "attention_backend": ways[way][1], "seed": name[-1]} for name, way, _ in equal
    }
    for name, way, batch, *_ in confounded:
        flags[name] = {"precision": ways[way][0], "attention_backend": ways[way][1], "batch_size": str(batch)}
    folder = make_comparison(outputs, experiment, names, flags)
    for name, way, loss in equal:
        numbers = {"test_loss": loss, "test_perplexity": math.exp(loss)}
        make_run(folder / name, 125, ways[way][0], attention=ways[way][1], **numbers)
    for name, way, batch, steps, perplexity in confounded:
        numbers = {"steps": steps, "test_perplexity": perplexity, "test_loss": math.log(perplexity)}
        make_run(folder / name, batch, ways[way][0], attention=ways[way][1], **numbers)
    return folder


PROBES = {  # configuration -> budget -> (probes, status)
    "fp32-baseline": {
        8: ([(64, "oom"), (32, "oom"), (16, "oom"), (1, "oom")], "error"),
        24: ([(64, "ok"), (80, "oom"), (72, "ok"), (76, "ok"), (78, "oom")], "ok"),
    },
    "flash": {
        8: ([(64, "oom"), (32, "ok"), (48, "oom"), (40, "ok")], "ok"),
        24: ([(64, "ok"), (80, "ok"), (100, "ok"), (125, "ok"), (156, "oom"), (140, "ok")], "ok"),
    },
    "flash-chunked-loss": {
        8: ([(64, "ok"), (80, "ok"), (100, "oom"), (90, "ok")], "oom"),
        24: ([(64, "ok"), (80, "ok"), (4096, "ok")], "ok"),
    },
}


def make_max_batch(outputs: Path, experiment: str = "max_batch", probes: dict = PROBES) -> Path:
    cases = [(f"{name}-{budget:g}-gib", *own) for name, budgets in probes.items() for budget, own in budgets.items()]
    folder = make_comparison(
        outputs, experiment, [*((name, status) for name, _, status in cases), ("fp8-24-gib", "unsupported")]
    )
    for name, tried, status in cases:
        make_run(folder / name, max([size for size, answer in tried if answer == "ok"], default=64), status=status)
        lines = ["batch_size,status,peak_allocated_gib,peak_reserved_gib,seconds"]
        lines += [f"{size},{answer},1.0,1.5,0.2" for size, answer in tried]
        (folder / name / "batch_size_search.csv").write_text("\n".join(lines) + "\n")
    return folder


def make_factorial(outputs: Path, experiment: str = "factorial") -> Path:
    """All combinations of three techniques, and effects.json (not computed from them)."""
    factors = ("bf16", "chunked_loss", "compile")
    names, effects = [], {}
    for chosen in itertools.product((0, 1), repeat=3):
        names.append("-".join(factor for factor, on in zip(factors, chosen, strict=True) if on) or "none")
    folder = make_comparison(outputs, experiment, [*((name, "ok") for name in names)])
    for index, name in enumerate(names):
        make_run(folder / name, 125, peaks=(10.0, 20.0, 30.0 - 2 * index, 2.0), step_ms=100 - 4 * index)
    effects["peak_gib"] = {
        "main": {"bf16": -10.25, "chunked_loss": -5.0, "compile": -0.5},
        "interactions": {"bf16 x chunked_loss": 1.5, "bf16 x compile": -3.25, "chunked_loss x compile": 0.0},
    }
    effects["step_ms"] = {
        "main": {"bf16": -300.0, "chunked_loss": 9.5, "compile": -40.0},
        "interactions": {"bf16 x chunked_loss": -2.0, "bf16 x compile": 20.0, "chunked_loss x compile": 0.125},
    }
    effects["step_ms_ratio"] = {"main": {"bf16": 0.25, "chunked_loss": 1.05, "compile": 0.7}}
    write_json(folder / "effects.json", effects)
    return folder


def make_techniques(outputs: Path) -> None:
    rows = [
        {
            "variant": "full",
            "baseline": None,
            "status": "ok",
            "peak_gib": 11.75,
            "saved_gib": None,
            "extra_time": None,
            "ms": 20.5,
            "formula_saved_gib": None,
            "exactness": None,
            "error": 0.0012,
            "note": "",
        },
        {
            "variant": "chunked",
            "baseline": "full",
            "status": "ok",
            "peak_gib": 1.25,
            "saved_gib": 10.5,
            "extra_time": -0.021,
            "ms": 20.07,
            "formula_saved_gib": 10.61,
            "exactness": "within rounding",
            "error": 0.0011,
            "note": "2048 tokens",
        },
        {
            "variant": "fused",
            "baseline": "full",
            "status": "oom",
            "peak_gib": None,
            "saved_gib": None,
            "extra_time": None,
            "ms": None,
            "formula_saved_gib": None,
            "exactness": None,
            "error": None,
            "note": "",
        },
    ]
    answers = [
        {"question": "it saves_memory", "unit": "entries", "low": 1000, "high": 1250, "tried": []},
        {"question": "faster", "unit": "tokens", "low": None, "high": 64, "tried": []},
        {"question": "never", "unit": "tokens", "low": 32000, "high": None, "tried": []},
    ]
    info = {"status": "ok", "device_name": "NVIDIA H100", "results": {"rows": rows, "break_even": answers}}
    write_json(outputs / "techniques" / "cross_entropy" / "run.json", info)
    others = {"checkpointing": ("block", "selective"), "fused_gelu": ("fused",), "optimizers": ("adamw_8bit",)}
    for name, variants in others.items():
        own = [rows[1] | {"variant": variant, "baseline": None, "exactness": "bitwise"} for variant in variants]
        write_json(outputs / "techniques" / name / "run.json", info | {"results": {"rows": own, "break_even": []}})


def make_outputs(outputs: Path, prefix: str = "") -> Path:
    """Every experiment."""
    make_seed(outputs, f"{prefix}seed")
    make_quality(outputs, f"{prefix}quality")
    make_max_batch(outputs, f"{prefix}max_batch")
    make_factorial(outputs, f"{prefix}factorial")
    make_techniques(outputs)
    return outputs


def cells(table: str) -> dict[str, list[str]]:
    """First cell -> the others, of the first table in the text."""
    lines = [line[2:-2].split(" | ") for line in table.split("\n\n")[0].splitlines()]
    assert len({len(line) for line in lines}) == 1, "lines of different length"
    return {line[0]: line[1:] for line in lines if set(line[0]) != {"-"}}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return make_outputs(tmp_path_factory.mktemp("outputs"))


DASHES = ["-"] * 20


def test_memory(outputs):
    table = cells(memory_table(outputs))
    assert list(table) == ["case", *(case[0] for case in SEED), *(name for name, _ in FAILED)]
    assert table["fp32-baseline-batch-125"] == ["125", "27.5", "31.4", "35.2", "2.60", "35.2", "37.2", "backward"]
    assert table["chunked-loss-checkpointing-batch-125"][:6] == ["125", "4.10", "3.90", "4.87", "2.10", "4.87"]
    assert table["fp32-baseline-batch-303"] == ["303", "oom", *DASHES[:6]]
    assert table["fp8-batch-125"] == ["125", "unsupported", *DASHES[:6]]
    assert table["fused-loss-batch-125"] == ["-", "error", *DASHES[:6]]


def test_memory_of_a_peer_without_a_loss_phase_and_of_a_machine_without_a_gpu(tmp_path):
    folder = make_seed(tmp_path)
    path = folder / "hf-gpt2-compiled-batch-125"
    rows = [row for row in (path / "memory.csv").read_text().splitlines() if ",loss," not in row]
    (path / "memory.csv").write_text("\n".join(rows) + "\n")
    info = json.loads((path / "run.json").read_text())
    info["results"] |= {"peak_reserved_gib": None, "mfu": None}
    write_json(path / "run.json", info)
    assert cells(memory_table(tmp_path))[path.name] == ["125", "10.0", "-", "14.0", "2.10", "14.0", "-", "backward"]
    assert cells(time_table(tmp_path))[path.name][-1] == "-"


def test_time(outputs):
    table = cells(time_table(outputs))
    assert table["fp32-baseline-batch-125"] == [
        "125",
        "510.9 (510.4-511.9)",
        "2,044",
        "-",
        "2.78",
        "62,635",
        "25.0 % (fp32: 66.9 TFLOP/s)",
    ]
    assert table["everything-batch-125"][3] == "41.2" and "bf16: 989.4" in table["everything-batch-125"][-1]
    assert table["fp32-baseline-batch-303"] == ["303", "oom", *DASHES[:5]]


def test_peer(outputs, tmp_path):
    table = cells(peer_table(outputs))
    assert list(table) == ["case", "hf-gpt2-compiled-batch-125", "everything-batch-125"]  # only what is compiled
    assert table["everything-batch-125"] == ["125", "467,836", "0.86", "4.20", "0.30"]
    make_seed(tmp_path, cases=SEED[:-1])
    with pytest.raises(SettingsError, match="no case hf-gpt2-compiled"):
        peer_table(tmp_path)
    comparison = json.loads((make_seed(tmp_path) / "comparison.json").read_text())
    comparison["cases"][len(SEED) - 1]["status"] = "error"
    write_json(tmp_path / "seed" / "comparison.json", comparison)
    table = cells(peer_table(tmp_path))
    assert table["hf-gpt2-compiled-batch-125"] == ["125", "error", *DASHES[:3]]
    assert table["everything-batch-125"] == ["125", "467,836", "- (the peer: error)", "4.20", "-"]


def test_profile(outputs, tmp_path):
    text = profile_table(outputs)
    lines = text.split("\n\n")[0].splitlines()
    assert lines[0] == "| ms a step (share) | everything-batch-125 |"
    assert lines[2] == "| matrix products | 31.0 (45.3 %) |"
    assert lines[3] == "| the same products, each alone on this card | 30.8 |"
    assert lines[4] == "| attention | 5.00 (7.3 %) |"
    assert lines[-2] == "| idle | 3.00 (4.4 %) |" and len(lines) == 11
    assert lines[-1] == "| the step, timed without the profiler | 66.2 |"
    assert "5 steps" in text and "21.9 TFLOP" in text and "1 shapes at 616 to 616 TFLOP/s alone" in text
    (make_seed(tmp_path) / "everything-batch-125" / "profile.json").unlink()
    with pytest.raises(SettingsError, match=r"no case .* profile\.json"):
        profile_table(tmp_path)


def test_quality(outputs):
    table = cells(quality_table(outputs))
    each = "6.6010, 6.6120, 6.6050"
    perplexity = sum(math.exp(loss) for loss in LOSSES["fp32-baseline"]) / 3
    expected = ["3", "326", "32,000", "6.6060", "0.0110", each, f"{perplexity:.1f}", "2.104"]
    assert table["fp32-baseline"] == [*expected, "+0.0007 (no difference: spread 0.0130)"]
    assert table["flash"][-1] == "-" and table["configuration"][-1] == "loss minus that of flash"
    assert table["flash-window"][-1] == "+0.1047 (larger: spread 0.0200)"


def test_the_confounded_runs_stand_beside_those_with_the_same_flags(outputs):
    table = cells(confounded_table(outputs))
    mean = sum(math.exp(loss) for loss in LOSSES["flash"]) / 3
    expected = ["445", "91", "1,258", "flash", "326", f"{mean:.1f}"]
    assert table["confounded-flash-attention-batch-445"] == expected
    assert table["confounded-flash-attention-batch-195"][:4] == ["195", "209", "905.0", "flash"]
    assert table["confounded-fp32-baseline-batch-303"] == ["-", "oom", *DASHES[:4]]


def test_recomputed_blocks_stand_beside_the_same_without(tmp_path):
    """Checkpointing trains the same bit for bit; any other technique has to be the same."""

    def case(name: str, **flags: str) -> Case:
        return Case(name, flags, "ok", tmp_path, {})

    blocks = {"gradient_checkpointing": "block"}
    cases = [case("plain-seed-0", precision="bf16"), case("blocks-seed-0", precision="fp16", **blocks)]
    cases += [case("confounded-1", precision="bf16", **blocks), case("confounded-2", precision="fp16", **blocks)]
    cases += [case("confounded-3", precision="fp16"), case("confounded-4", precision="fp32", **blocks)]
    _, confounded = quality_runs(cases)
    assert [run.configuration for run in confounded] == ["plain", "blocks", None, None]


def change_status(outputs: Path, experiment: str, name: str, status: str) -> None:
    comparison = json.loads((outputs / experiment / "comparison.json").read_text())
    next(row for row in comparison["cases"] if row["name"] == name)["status"] = status
    write_json(outputs / experiment / "comparison.json", comparison)


def test_one_seed_has_no_spread_and_a_failed_seed_is_named(tmp_path):
    make_quality(tmp_path, seeds=1)
    table = cells(quality_table(tmp_path))
    assert table["flash"][:6] == ["1", "326", "32,000", "6.6070", "-", "6.6070"]
    assert table["flash-window"][-1] == "+0.0930 (one seed has no spread)"
    make_quality(tmp_path, seeds=3)
    change_status(tmp_path, "quality", "flash-window-seed-1", "oom")
    for seed in range(3):
        change_status(tmp_path, "quality", f"fp32-baseline-seed-{seed}", "error")
    table = cells(quality_table(tmp_path))
    assert table["flash-window"][0] == "2 of 3 (seed 1: oom)" and table["flash-window"][5] == "6.7000, oom, 6.7200"
    assert table["fp32-baseline"] == ["0", "error", *DASHES[:7]]
    with pytest.raises(SettingsError, match="no case named confounded"):
        make_comparison(tmp_path, "quality", [("flash-seed-0", "oom")])
        confounded_table(tmp_path)
    with pytest.raises(SettingsError, match="neither"):
        make_comparison(tmp_path, "quality", [("flash", "oom")])
        quality_table(tmp_path)


def test_largest_batches(outputs):
    table = cells(max_batch_table(outputs))
    assert table["largest batch by bisection (by the grid)"] == ["8 GiB", "24 GiB"]
    assert table["fp32-baseline"] == ["oom", "76 (64)"]
    assert table["flash"] == ["40 (oom)", "140 (125)"]
    assert table["flash-chunked-loss"] == ["90 (80), oom in training", "at least 4,096 (4,096)"]
    assert table["fp8"] == ["-", "unsupported"]


@pytest.mark.parametrize(
    ("probes", "largest", "grid"),
    [
        ("64:ok 80:ok 100:ok 125:oom 112:ok 118:ok 121:oom", 118, 100),
        ("64:oom 32:ok 48:ok", 48, None),  # the plwiki lab's search only went up
        ("8:ok 10:ok 12:ok", 12, 12),  # ended at the largest allowed
    ],
)
def test_what_growing_alone_would_have_answered(tmp_path, probes, largest, grid):
    rows = [word.replace(":", ",") for word in probes.split()]
    (tmp_path / "batch_size_search.csv").write_text("\n".join(["batch_size,status", *rows]) + "\n")
    found = report_comparison.largest_batch(report_comparison.Case("flash", {}, "ok", tmp_path, {}))
    assert (found.size, found.grid, found.limited) == (largest, grid, "oom" not in probes)


def test_effects_and_interactions(outputs, tmp_path):
    table = cells(effects_table(outputs))
    assert table["bf16"] == ["-10.2", "-300.0", "0.250"] and table["chunked\\_loss"] == ["-5.000", "+9.500", "1.050"]
    table = cells(interactions_table(outputs))
    assert list(table)[1:] == ["bf16 x compile", "bf16 x chunked\\_loss", "chunked\\_loss x compile"]
    assert table["bf16 x compile"] == ["-3.250", "+20.0"]
    missing = {"main": None, "interactions": None, "reason": "no value for bf16+flash"}
    times = {"main": {"bf16": -1.5}, "interactions": {"bf16 x flash": 0.25}}
    write_json(tmp_path / "factorial" / "effects.json", {"peak_gib": missing, "step_ms": times, "step_ms_ratio": None})
    assert cells(effects_table(tmp_path))["bf16"] == ["-", "-1.500", "-"]
    assert cells(interactions_table(tmp_path))["bf16 x flash"] == ["-", "+0.250"]
    assert effects_table(tmp_path).endswith("\n\nno value for bf16+flash")


def test_techniques(outputs, tmp_path):
    title, table, answers = technique_table(outputs, "cross_entropy").split("\n\n")
    assert title == "`cross_entropy.py` on NVIDIA H100:"
    rows = cells(table)
    result = "within rounding (1.1e-03)"
    assert rows["chunked"] == ["full", "1.250", "+10.6", "+10.5", "-2.1 %", "20.1", result, "2048 tokens"]
    assert rows["fused"][:3] == ["full", "oom", "-"]
    assert answers.splitlines() == [
        "- it saves\\_memory: from 1,250 entries on (not yet at 1,000)",
        "- faster: from 64 tokens on (the smallest tried)",
        "- never: not up to 32,000 tokens",
    ]
    everything = comparison_tables(outputs)["comparison techniques"]()
    places = [everything.index(f"`{name}.py`") for name in ("checkpointing", "cross_entropy", "optimizers")]
    assert places == sorted(places)
    with pytest.raises(SettingsError, match="has no run folders"):
        comparison_tables(tmp_path)["comparison techniques"]()


SOURCE = '''
"""Not counted."""
import functools


@functools.cache
def counted(x: int) -> int:
    """One line.

    Two lines.
    """
    # a comment

    text = "# no comment"
    return len(
        text  # beside code
    )


class Holder:
    """Not counted."""

    def method(self):
        return 1

    def other(self):
        """Only this."""
'''


def test_code_lines_are_counted_without_blank_lines_comments_and_docstrings(tmp_path):
    path = tmp_path / "technique.py"
    path.write_text(SOURCE)
    assert code_lines(path, ["counted"]) == 6
    assert code_lines(path, ["Holder.method"]) == 2 and code_lines(path, ["Holder"]) == 4
    assert code_lines(path, ["Holder", "Holder.method", "counted"]) == 10  # no line twice
    with pytest.raises(SettingsError, match="has no missing"):
        code_lines(path, ["missing"])
    with pytest.raises(SettingsError, match="is missing"):
        code_lines(tmp_path / "nowhere.py", ["counted"])


def test_adoption(outputs, tmp_path, monkeypatch):
    entries = (
        Adoption("a", "--a b", (("technique.py", ("counted", "Holder")),), measured=("cross_entropy", "chunked")),
        Adoption("c", "--c", (("technique.py", ("Holder.other",)),), "pack", "yes", "8.0", ("cross_entropy", "fused")),
        Adoption("d", "--d", (("technique.py", ("counted",)),), measured=("cross_entropy", "nowhere")),
    )
    (tmp_path / "technique.py").write_text(SOURCE)
    monkeypatch.setattr(report_techniques, "ROOT", tmp_path)
    table = cells(adoption_table(outputs, adoptions=entries))
    assert table["a"] == ["`--a b`", "10 (`technique.py`)", "none", "no", "any", "within rounding"]
    assert table["c"] == ["`--c`", "1 (`technique.py`)", "pack", "yes", "8.0", "oom"]
    assert table["d"][-1] == "not measured"
    with pytest.raises(SettingsError, match="cross_entropy"):
        adoption_table(tmp_path, adoptions=entries)


def test_every_adopted_technique_names_code_that_is_there(outputs):
    table = cells(adoption_table(outputs))
    assert len(table) == 1 + len(ADOPTIONS)
    for entry in ADOPTIONS:
        assert int(table[entry.technique][1].split()[0]) > 0


@pytest.mark.parametrize("prefix", ["", "smoke_"])
def test_every_table_is_made_and_goes_between_markers(tmp_path, prefix):
    tables = comparison_tables(make_outputs(tmp_path, prefix), prefix)
    text = "".join(f"<!-- table: {name} -->\nold\n<!-- end of table -->\n" for name in tables)
    new = report.replace_tables(text, tables)
    assert "old" not in new and new.count("| --- |") >= len(tables) and report.replace_tables(new, tables) == new
    assert set(report_comparison.COMPARISON_TABLES) == set(tables)


def test_what_is_missing_is_one_sentence(tmp_path):
    for name, table in comparison_tables(tmp_path).items():
        with pytest.raises(SettingsError, match=r"is missing|has no run folders") as caught:
            table()
        assert "\n" not in str(caught.value), name
    folder = make_seed(tmp_path)
    (folder / SEED[0][0] / "memory.csv").unlink()
    with pytest.raises(SettingsError, match=r"fp32-baseline-batch-125/memory\.csv is missing"):
        memory_table(tmp_path)
    (folder / SEED[0][0] / "run.json").unlink()
    with pytest.raises(SettingsError, match=r"fp32-baseline-batch-125/run\.json is missing"):
        time_table(tmp_path)
    (folder / "comparison.json").write_text("{")
    with pytest.raises(SettingsError, match="is damaged"):
        read_cases(tmp_path, "seed")
    write_json(folder / "comparison.json", {"cases": []})
    with pytest.raises(SettingsError, match="has no cases"):
        read_cases(tmp_path, "seed")


def test_main_prints_what_it_can_and_names_the_rest(tmp_path, monkeypatch, capsys):
    make_quality(tmp_path, "smoke_quality")
    words = ["report_comparison.py", "--prefix", "smoke_", "--output_folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SettingsError, match=r"comparison memory: .*smoke_seed.*comparison adoption"):
        report_comparison.main()
    assert "comparison quality\n\n| configuration" in capsys.readouterr().out
    make_outputs(tmp_path, "smoke_")
    assert report_comparison.main() == 0


def test_compiled_code_without_a_gpu_has_no_memory(tmp_path):
    path = make_seed(tmp_path) / "everything-batch-125"
    (path / "memory.csv").unlink()
    info = json.loads((path / "run.json").read_text())
    info["results"] |= {"tracked_steps": 0, "peak_allocated_gib": None, "peak_reserved_gib": None, "peak_phase": None}
    write_json(path / "run.json", info)
    assert cells(memory_table(tmp_path))[path.name] == ["125", *DASHES[:7]]
    assert cells(peer_table(tmp_path))[path.name] == ["125", "467,836", "0.86", "-", "-"]
