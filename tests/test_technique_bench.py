"""The tool that measures a technique alone: known bytes and times, statuses, rows and files."""

import json
import time
from dataclasses import dataclass

import pytest
import torch

import technique_bench
from technique_bench import Cost, Study, compare, find_break_even, measure, relative_error, time_difference
from utils import GIB, SettingsError

CPU = torch.device("cpu")


@dataclass
class Settings:
    output_folder: str


def test_known_bytes_and_time():
    held = torch.nn.Linear(1024, 1024, bias=False)

    def step() -> None:
        block = torch.zeros(2**20, dtype=torch.uint8)
        time.sleep(0.01)
        del block

    cost = measure(step, CPU, roots=(held,), repeats=3, warm_up=1)
    assert cost.status == "ok" and cost.n == 3
    assert cost.start_gib * GIB == pytest.approx(4 * 2**20, rel=0.01)
    assert (cost.peak_gib - cost.start_gib) * GIB == pytest.approx(2**20, rel=0.01)
    assert 10 <= cost.ms_p20 <= cost.ms <= cost.ms_p80


def test_out_of_memory_is_a_status_and_a_bug_is_not():
    def full() -> None:
        raise torch.OutOfMemoryError("full")

    def broken() -> None:
        raise RuntimeError("broken")

    assert measure(full, CPU) == Cost("oom")
    with pytest.raises(RuntimeError, match="broken"):
        measure(broken, CPU)


def test_compiled_steps_have_no_memory_on_a_cpu():
    cost = measure(lambda: None, CPU, repeats=2, compiled=True)
    assert (cost.status, cost.peak_gib) == ("ok", None) and cost.ms >= 0


@pytest.mark.parametrize("threshold", [1, 16, 17, 40, 64, 100])
def test_break_even_by_bisection(threshold):
    low, high = find_break_even(lambda size: size >= threshold, [16, 32, 64], 4)
    if threshold <= 16:
        assert (low, high) == (None, 16)
    elif threshold > 64:
        assert (low, high) == (64, None)
    else:
        assert low < threshold <= high and high - low <= 4


def test_study_keeps_what_it_prints(tmp_path, capsys):
    study = Study("trial", Settings(str(tmp_path)), CPU)
    study.add("plain", Cost("ok", 1.0, 3.0, 10.0, 9.0, 11.0, 5))
    study.add("lean", Cost("ok", 1.0, 2.0, 12.5, 12.0, 13.0, 5), baseline="plain", exactness="bitwise", error=0.0)
    study.add("large", Cost("oom"), baseline="plain", note="too large")
    study.add("compiled", Cost("ok", None, None, 5.0, 5.0, 5.0, 5), baseline="plain")
    study.ask("lean pays", "tokens", lambda size: size >= 20, [8, 16, 32], 8)
    path = study.save(extra=1)
    info = json.loads((path / "run.json").read_text())
    rows = {row["variant"]: row for row in info["results"]["rows"]}
    assert (rows["lean"]["saved_gib"], rows["lean"]["extra_time"]) == (1.0, 0.25)
    assert (rows["large"]["status"], rows["large"]["saved_gib"]) == ("oom", None)
    assert (rows["compiled"]["saved_gib"], rows["compiled"]["extra_time"]) == (None, -0.5)
    assert info["results"]["break_even"][0] | {"tried": 0} == {
        "question": "lean pays", "unit": "tokens", "low": 16, "high": 24, "tried": 0,
    }  # fmt: skip
    assert info["results"]["extra"] == 1 and info["status"] == "ok" and "torch_version" in info
    output = capsys.readouterr().out
    assert "lean pays: from 24 tokens on (not yet at 16)" in output and "too large" in output
    assert json.loads(output.splitlines()[-1])["run"] == str(path)
    assert study.save().name == "trial-2"


def test_unknown_exactness_and_unwritable_folder(tmp_path):
    study = Study("trial", Settings(str(tmp_path)), CPU)
    with pytest.raises(ValueError, match="exactness nearly"):
        study.add("plain", Cost("ok", 1.0, 3.0, 10.0), exactness="nearly")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SettingsError, match="--output_folder"):
        Study("trial", Settings(str(file)), CPU)


def test_relative_error_is_the_largest():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    assert relative_error([a, b], [a, b]) == 0
    assert relative_error([a + torch.tensor([0.5, 0.0]), b], [a, b]) == pytest.approx(0.1)
    assert relative_error([torch.ones(2)], [torch.zeros(2)]) == pytest.approx(2**0.5)
    for bad in (float("nan"), float("inf")):
        broken = torch.tensor([bad, 1.0])
        assert relative_error([b, broken], [b, a]) == relative_error([a], [broken]) == float("inf")
        assert relative_error([broken], [broken]) == float("inf")


def test_main(capsys):
    assert technique_bench.main() == 0
    assert "64.00 MiB seen, 64 expected" in capsys.readouterr().out


def test_compare():
    exact = [torch.tensor([1.0, 2.0])]
    plain = [torch.tensor([1.0, 2.1])]  # error 0.1 / sqrt(5)
    assert compare(plain, plain, exact) == ("bitwise", pytest.approx(0.1 / 5**0.5))
    assert compare([torch.tensor([1.0, 2.19])], plain, exact)[0] == "within rounding"
    assert compare([torch.tensor([1.0, 2.21])], plain, exact)[0] == "changed"
    assert compare([torch.tensor([1.0, float("nan")])], plain, exact) == ("changed", float("inf"))


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ((0.9, 0.99), "clearly faster"),
        ((1.3, 1.21), "clearly slower"),
        ((0.9, 1.01), "no clear difference in time"),
        ((1.3, 1.19), "no clear difference in time"),
    ],
)
def test_a_difference_in_time_is_one_in_every_round(times, words):
    base = [Cost("ok", ms=ms) for ms in (1.2, 1.0)]
    assert time_difference([Cost("ok", ms=ms) for ms in times], base) == words
    assert time_difference([Cost("ok", ms=times[0]), Cost("oom")], base) == "not compared"
    assert time_difference([Cost("ok", ms=times[0])], base[:1]) == "no clear difference in time"  # one round, no noise
