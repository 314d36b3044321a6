"""muon.py: updates of orthogonal matrices, those of torch.optim.Muon, and AdamW for the rest."""

import copy
import json
import sys

import pytest
import torch

import muon
from cuda_graphs import RecordedStep, make_recordable
from muon import Muon, Settings, orthogonalise
from technique_bench import relative_error
from utils import SettingsError

OPTIONS = {"learning_rate": 0.01, "weight_decay": 0.1}


def make(device="cpu"):
    """A matrix, a tall one, another of the first shape, and a bias, with gradients."""
    torch.manual_seed(0)
    shapes = ((12, 20), (30, 8), (12, 20), (7,))
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    set_gradients(parameters)
    return parameters


def set_gradients(parameters, scale=1.0):
    for place, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(place)
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def make_muon(parameters):
    return Muon(parameters[:3], [{"params": parameters[3:], "weight_decay": 0.0}], **OPTIONS)


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 12, 20), (1, 20, 12)])
def test_singular_values_become_about_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    found = orthogonalise(matrices, torch.float64)
    assert found.shape == shape
    for matrix, result in zip(matrices, found, strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ result @ vh.T  # the same singular vectors, other values
        values = inner.diagonal()
        assert relative_error([inner], [values.diag()]) < 1e-10
        large = s > s.max() / 50
        assert ((values > 0.6) & (values < 1.3))[large].all() and large.sum() > len(s) / 2


def test_matrices_do_not_meet():
    """Iterated together or alone, tall or wide: the same."""
    torch.manual_seed(0)
    matrices = torch.randn(4, 6, 10, dtype=torch.float64)
    together = orthogonalise(matrices, torch.float64)
    for matrix, result in zip(matrices, together, strict=True):
        assert torch.allclose(orthogonalise(matrix[None], torch.float64)[0], result)
        assert torch.allclose(orthogonalise(matrix.T[None], torch.float64)[0].T, result)


def test_some_steps_are_those_of_pytorch():
    """Both iterate in bf16, whose rounding is the difference."""
    ours, theirs = make(), make()
    optimizers = [
        make_muon(ours),
        torch.optim.Muon(theirs[:3], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[3:], lr=0.01, weight_decay=0.0),
    ]
    before = [parameter.detach().clone() for parameter in ours]
    for step in range(4):
        for parameters in (ours, theirs):
            set_gradients(parameters, 1 + step)
        for optimizer in optimizers:
            optimizer.step()
    changes = [[p.detach() - b for p, b in zip(ps, before, strict=True)] for ps in (ours, theirs)]
    assert relative_error(*changes) < 0.02
    assert torch.equal(ours[3], theirs[3])
    assert relative_error(changes[0], [torch.zeros_like(c) for c in changes[0]]) > 0


def test_matrices_may_be_iterated_one_by_one(monkeypatch):
    together, alone = make(), make()
    make_muon(together).step()
    monkeypatch.setattr(muon, "TOGETHER", 1)
    make_muon(alone).step()
    assert relative_error(together, alone) < 1e-3


def test_an_update_is_as_large_as_the_learning_rate_says():
    matrix = torch.nn.Parameter(torch.zeros(48, 64))
    matrix.grad = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    Muon([matrix], [], learning_rate=0.01, weight_decay=0.0).step()
    assert matrix.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.25)


def test_states_and_groups_are_one_optimizers():
    parameters = make()
    optimizer = make_muon(parameters)
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 1]
    assert set(optimizer.state[parameters[0]]) == {"momentum"} and "exp_avg" in optimizer.state[parameters[3]]
    assert torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5).get_last_lr() == [0.005, 0.005]
    optimizer.zero_grad(set_to_none=True)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()  # without gradients
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_it_goes_on_from_a_state_dict():
    whole, resumed = make(), make()
    first, second = make_muon(whole), make_muon(resumed)
    first.step()
    second.step()
    state = copy.deepcopy(second.state_dict())
    again = make_muon(resumed)
    again.load_state_dict(state)
    for optimizer, parameters in ((first, whole), (again, resumed)):
        set_gradients(parameters, 0.5)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_other_parameters_are_refused():
    with pytest.raises(ValueError, match="others"):
        Muon([torch.nn.Parameter(torch.zeros(3))], [], **OPTIONS)


def run_main(monkeypatch, folder, *words):
    monkeypatch.setattr(sys, "argv", ["muon.py", *words, "--output_folder", str(folder)])
    return muon.main()


def test_main_measures_what_the_formula_says(monkeypatch, tmp_path):
    assert run_main(monkeypatch, tmp_path, "--num_layers", "2", "--repeats", "2") == 0
    (path,) = tmp_path.glob("techniques/muon/run.json")
    results = json.loads(path.read_text())["results"]
    rows = {row["variant"]: row for row in results["rows"]}
    assert rows["muon"]["exactness"] in ("bitwise", "within rounding") and rows["muon"]["error"] < 0.2
    saved = rows["adamw"]["start_gib"] - rows["muon"]["start_gib"]  # what lies there between the steps
    if not torch.cuda.is_available():
        assert saved == pytest.approx(4 * results["parameters"] / 2**30, abs=2e-4)
    assert results["break_even"][0]["tried"]


def test_wrong_settings(monkeypatch, tmp_path):
    with pytest.raises(SettingsError, match="--num_layers"):
        run_main(monkeypatch, tmp_path, "--num_layers", "0")
    with pytest.raises(SettingsError, match="--learning_rate"):
        run_main(monkeypatch, tmp_path, "--learning_rate", "-1")
    assert Settings().num_layers == 24


@pytest.mark.gpu
def test_gpu_recorded_steps_are_the_launched_ones():
    results = []
    for recorded in (False, True):
        parameters = make("cuda")
        optimizer = make_muon(parameters)
        make_recordable(optimizer)

        def train(gradient, parameters=parameters, optimizer=optimizer):
            for parameter in parameters:
                parameter.grad = gradient[: parameter.numel()].view(parameter.shape).clone()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return parameters[0].detach().sum()

        step = RecordedStep(train) if recorded else train
        for place in range(4):
            step(torch.randn(300, generator=torch.Generator().manual_seed(place)).cuda())
            for group in optimizer.param_groups:
                group["lr"].fill_(0.01 / (1 + place))
        results.append([parameter.detach().clone() for parameter in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
