"""cuda_graphs.py: rates that live on the device, refusals; on a GPU replays that equal the launched steps."""

import json
import sys

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import cuda_graphs
from cuda_graphs import Problem, RecordedStep, Settings, make_recordable, unsupported_reason
from optimizers import make_optimizer
from utils import SettingsError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = {"num_layers": 2, "width": 16}


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_scheduler_fills_the_rate_that_the_recorded_kernels_read():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer("adamw", [parameter], learning_rate=0.1, weight_decay=0.0, device=CPU)
    optimizer.param_groups[0]["foreach"] = False
    make_recordable(optimizer)
    rate = optimizer.param_groups[0]["lr"]
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    assert torch.is_tensor(rate) and optimizer.param_groups[0]["capturable"]
    for step in range(1, 4):
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.1 / (1 + step))


def test_what_cannot_be_recorded_says_what_to_change():
    assert "NVIDIA GPU" in unsupported_reason(CPU)
    assert "--precision bf16" in unsupported_reason(GPU, "fp16")
    assert unsupported_reason(GPU, "bf16") is unsupported_reason(GPU, "fp32") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["cuda_graphs.py", "--output_folder", str(tmp_path)])
    with pytest.raises(SettingsError, match="needs an NVIDIA GPU"):
        cuda_graphs.main()
    assert not list(tmp_path.glob("techniques/*/run.json"))


@pytest.mark.gpu
def test_gpu_replays_equal_launched_steps_bit_for_bit():
    settings = Settings(**TINY)
    launched, recorded = (Problem(settings, 8, kind, GPU).results(6) for kind in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(launched, recorded, strict=True))
    assert len(set(recorded[0].tolist())) == 6  # each step saw its own input


@pytest.mark.gpu
def test_gpu_random_numbers_go_on_and_results_are_the_callers_own():
    step = RecordedStep(lambda x: torch.nn.functional.dropout(x, 0.5))
    outputs = [step(torch.ones(1000, device=GPU)) for _ in range(4)]
    assert len({tuple(output.tolist()) for output in outputs}) == 4
    assert all(400 < output.count_nonzero() < 600 for output in outputs)


@pytest.mark.gpu
def test_gpu_inputs_of_another_shape_are_refused():
    step = RecordedStep(lambda x, y: x + 1 if y is None else x + y)
    one = torch.ones(3, device=GPU)
    assert step(one, None).tolist() == step(one, None).tolist() == [2, 2, 2]
    for inputs, words in (((one[:2], None), "float32"), ((one.long(), None), "int64"), ((one, one), "None")):
        with pytest.raises(ValueError, match=words):
            step(*inputs)


@pytest.mark.gpu
def test_gpu_main(monkeypatch, tmp_path):
    words = [f"--{name}={value}" for name, value in (TINY | {"rows": "8,16", "rounds": 2, "repeats": 2}).items()]
    monkeypatch.setattr(sys, "argv", ["cuda_graphs.py", *words, "--output_folder", str(tmp_path)])
    assert cuda_graphs.main() == 0
    (path,) = tmp_path.glob("techniques/*/run.json")
    rows = json.loads(path.read_text())["results"]["rows"]
    assert [row["exactness"] for row in rows] == [None, "bitwise"] * 2
    assert rows[0]["peak_gib"] > 0 and rows[1]["peak_gib"] is None and "reserved" in rows[1]["note"]
