"""vit_benchmark.py: the peer is SimpleViT, ours computes the same, every question leaves its folder, mistakes show."""

import json
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend

import simple_vit_peer
import vit_benchmark
import vit_measure
from simple_vit_peer import SimpleViT, our_peer
from technique_bench import relative_error
from utils import SettingsError
from vit_benchmark import Settings, make_images
from vit_measure import Gate, Trial

CPU = torch.device("cpu")
SHAPE = {"num_layers": 2, "embedding_dim": 16, "num_heads": 2, "mlp_dim": 24}
ROW = {"variant", "status", "ms", "ms_of_rounds", "images_per_s", "peak_gib", "exactness", "compiled", "batch_size"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def batch():
    return make_images(Settings(batch_size=3), CPU)


def run(monkeypatch, folder, *more):
    """(exit status, question -> results) of the script at a tiny size."""
    monkeypatch.setattr(vit_benchmark, "PEER_SIZES", {"tiny": SHAPE})
    monkeypatch.setitem(vit_benchmark.MODEL_SIZES, "tiny", SHAPE)
    words = ["--batch_size", "2", "--rounds", "2", "--repeats", "1", "--output_folder", str(folder)]
    monkeypatch.setattr(sys, "argv", ["vit_benchmark.py", *words, *more])
    status = vit_benchmark.main()
    paths = {path.parent.name: path for path in (folder / "vit").glob("*/run.json")}
    return status, {name: json.loads(path.read_text())["results"] for name, path in paths.items()}


def test_the_peer_is_the_published_architecture(batch):
    """Written out once more with plain operations on one image, from the weights by name."""
    torch.manual_seed(0)
    model = SimpleViT(**SHAPE).double()
    w, image = dict(model.named_parameters()), batch[0][1].double()

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    rows = []
    for i in range(8):
        for j in range(8):
            patch = image[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].permute(1, 2, 0).flatten()
            omega = 10000 ** (-torch.arange(4) / 3)
            place = torch.cat([(j * omega).sin(), (j * omega).cos(), (i * omega).sin(), (i * omega).cos()])
            token = norm(patch, "patch_norm") @ w["embedding.weight"].T + w["embedding.bias"]
            rows.append(norm(token, "embedding_norm") + place)
    x = torch.stack(rows)
    for n in range(2):
        q, k, v = (norm(x, f"blocks.{n}.attention_norm") @ w[f"blocks.{n}.attention.qkv.weight"].T).split(16, 1)
        heads = [(q[:, s] @ k[:, s].T / 8**0.5).softmax(1) @ v[:, s] for s in (slice(0, 8), slice(8, 16))]
        x = x + torch.cat(heads, 1) @ w[f"blocks.{n}.attention.output.weight"].T
        inner = norm(x, f"blocks.{n}.mlp_norm") @ w[f"blocks.{n}.expand.weight"].T + w[f"blocks.{n}.expand.bias"]
        inner = torch.nn.functional.gelu(inner)
        x = x + inner @ w[f"blocks.{n}.contract.weight"].T + w[f"blocks.{n}.contract.bias"]
    expected = norm(x, "final_norm").mean(0) @ w["head.weight"].T + w["head.bias"]
    assert relative_error([model(batch[0].double())[1]], [expected]) < 1e-6


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_ours_computes_what_the_peer_does(batch, backend):
    gate = Gate(lambda: SimpleViT(**SHAPE), "fp32", CPU, batch)
    assert len(gate.names) == 6 + 10 * 2 + 4  # every parameter of the peer
    ours = Trial(our_peer(SHAPE, backend).double(), "fp32", CPU, (batch[0].double(), batch[1]))
    exactness, error = gate.check(ours)
    assert exactness == "within rounding" and error < 1e-6  # positions and the logits are made in fp32
    ours = Trial(our_peer(SHAPE, backend), "fp32", CPU, batch)
    assert gate.check(ours)[0] == "within rounding"
    assert gate.check(Trial(SimpleViT(**SHAPE, kernel="sdpa"), "fp32", CPU, batch))[0] == "within rounding"


def test_the_peers_kernel_is_the_one_that_is_named(monkeypatch, batch):
    """Whatever SDPA_KERNELS has for a name is what PyTorch is told to run, and nothing else."""
    monkeypatch.setitem(simple_vit_peer.SDPA_KERNELS, "sdpa_efficient", SDPBackend.MATH)
    monkeypatch.setitem(simple_vit_peer.SDPA_KERNELS, "sdpa_flash", SDPBackend.FLASH_ATTENTION)
    kernels = {}
    for name in ("sdpa_efficient", "sdpa_flash"):
        model = SimpleViT(**SHAPE, kernel=name)
        with torch.profiler.profile() as profile:
            model(batch[0])
        kernels[name] = {event.key for event in profile.key_averages() if "scaled_dot_product" in event.key}
    assert any("math" in name for name in kernels["sdpa_efficient"])
    assert any("flash" in name for name in kernels["sdpa_flash"]) and kernels["sdpa_efficient"] != kernels["sdpa_flash"]


def test_the_shape_of_the_anchor():
    with torch.device("meta"):
        ours, peer = (
            our_peer(vit_benchmark.PEER_SIZES["anchor"], "eager"),
            SimpleViT(**vit_benchmark.PEER_SIZES["anchor"]),
        )
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, peer)]
    assert round(counts[1] / 1e6, 1) == 7.1 and counts[0] - counts[1] == 6 * 4 * 384  # biases of attention


def test_what_is_compared_and_named_is_what_is_timed(batch, monkeypatch):
    """A compiled model is compared as it is called, so that a mistake of the compiler would not pass."""
    gate = Gate(lambda: SimpleViT(**SHAPE), "fp32", CPU, batch)
    trial = Trial(our_peer(SHAPE, "eager"), "fp32", CPU, batch)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: lambda inputs: 1.001 * model(inputs))
    trial.start(compiled=True)
    assert trial.kernel() == "matmul, softmax, matmul (compiled)"
    assert gate.check(trial)[0] == "changed"


def test_every_question_leaves_its_folder(monkeypatch, tmp_path):
    status, results = run(monkeypatch, tmp_path, "--token_counts", "34,49", "--backends", "eager,sdpa,sdpa_cudnn")
    assert status == 0 and set(results) == set(vit_benchmark.QUESTIONS.values())
    for answer in results.values():
        assert all(set(row) >= ROW for row in answer["rows"])
        timed = [row for row in answer["rows"] if row["status"] == "ok"]
        assert all(len(row["ms_of_rounds"]) == 2 and row["ms"] in row["ms_of_rounds"] for row in timed)
        assert all(row["images_per_s"] == pytest.approx(2000 / row["ms"], rel=1e-3) for row in timed)
        assert all(row["peak_gib"] > 0 for row in timed)
    rows = {row["variant"]: row for row in results["peer"]["rows"]}
    assert list(rows)[:3] == ["SimpleViT, textbook", "SimpleViT, sdpa", "SimpleViT, sdpa_efficient"]
    assert rows["SimpleViT, sdpa_efficient"]["status"] == "unsupported"
    assert rows["this lab, eager"]["exactness"] == rows["this lab, sdpa"]["exactness"] == "within rounding"
    assert rows["this lab, eager"]["kernel"] == "matmul, softmax, matmul (eager)"
    assert "flash_attention_for_cpu" in rows["this lab, sdpa"]["kernel"]
    assert rows["this lab, sdpa_cudnn"]["status"] == "unsupported"
    assert rows["this lab, sdpa_cudnn"]["note"].startswith("unsupported: sdpa_cudnn needs an NVIDIA GPU")
    rows = results["kernels"]["rows"]
    assert [(row["tokens"], row["pool"]) for row in rows] == [(65, "class")] * 3 + [(64, "mean")] * 2
    assert {row["backend"] for row in rows if row["tokens"] == 64} == {"eager", "sdpa"}
    rows = results["decatt_step"]["rows"]
    assert [row["decorrelated_layers"] for row in rows] == [0, 1, 2] * 2
    for row in rows:
        base = next(r for r in rows if r["backend"] == row["backend"])
        assert row["extra_ms"] == pytest.approx(row["ms"] - base["ms"], abs=1e-3)
        assert len(row["extra_ms_of_rounds"]) == 2
    steps = [row for row in results["tokens"]["rows"] if row["kind"] == "step"]
    assert [row["patches"] for row in steps] == [49, 34] and steps[0]["baseline"] is None
    cuts = [row for row in results["tokens"]["rows"] if row["kind"] == "tokeniser"]
    assert [(row["patches"], row["scorer"]) for row in cuts] == [
        (count, scorer) for count in (34, 49) for scorer in ("pixel_blur", "random", "trained")
    ]
    for row in cuts:
        assert row["part_of_step"] == pytest.approx(row["ms"] / (row["ms"] + row["step_ms"]), abs=1e-3)
        assert row["within_goal"] == (row["part_of_step"] <= 0.1)


def test_a_wrong_copy_of_the_weights_is_changed_and_gets_no_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vit_measure, "in_our_order", lambda name, values: values)
    status, results = run(monkeypatch, tmp_path, "--questions", "peer", "--backends", "eager")
    row = {row["variant"]: row for row in results["peer"]["rows"]}["this lab, eager"]
    assert status == 1 and row["exactness"] == "changed" and row["status"] == "not timed"
    assert row["ms"] is None and row["ms_of_rounds"] == [] and row["images_per_s"] is None
    assert "error beyond rounding: this lab, eager" in capsys.readouterr().out


def test_a_variant_that_fails_is_a_row_and_the_others_are_measured(monkeypatch, tmp_path):
    original = vit_benchmark.our_peer

    def broken(shape, backend):
        model = original(shape, backend)
        if backend == "sdpa":
            model.forward = lambda images: (_ for _ in ()).throw(RuntimeError("no kernel"))
        return model

    monkeypatch.setattr(vit_benchmark, "our_peer", broken)
    status, results = run(monkeypatch, tmp_path, "--questions", "peer", "--backends", "eager,sdpa")
    rows = {row["variant"]: row for row in results["peer"]["rows"]}
    assert status == 1 and rows["this lab, eager"]["ms"] > 0
    assert (rows["this lab, sdpa"]["status"], rows["this lab, sdpa"]["note"]) == ("failed", "no kernel")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--questions", "speed"], "--questions speed must be different ones of peer, kernels"),
        (["--questions", "peer,peer"], "--questions peer,peer must be different"),
        (["--backends", "fast"], "--backends fast must be different ones of eager"),
        (["--batch_size", "0"], "--batch_size must be at least 1, not 0"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--token_counts", "64,34"], "must be rising numbers"),
        (["--token_counts", "many"], "must be rising numbers"),
        (["--token_counts", "36,5000"], "must be rising numbers up to 1024"),
        (["--token_counts", "5,36"], "has no number of mixed tokens, which the tokeniser is timed with; add one such"),
    ],
)
def test_wrong_settings_are_one_sentence(monkeypatch, tmp_path, more, words):
    with pytest.raises(SettingsError, match=words):
        run(monkeypatch, tmp_path, *more)
    assert not list(tmp_path.iterdir())
