"""vit_experiments.py: one change a case, flags handed on, real studies in fresh processes on tiny data, CIFAR-100."""

import contextlib
import io
import json
import sys
import tarfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

import case_runner
import vit_train
from sample_images import sample_images
from utils import SettingsError, parse_settings, run_script
from vit_experiments import DECATT_WEIGHT, EPOCHS, check_data, folder_of, make_cases, result_line
from vit_plan import make_plan
from vit_train import SECTIONS, STUDIES, Settings

TINY = {
    "num_layers": 1, "embedding_dim": 16, "num_heads": 2, "mlp_dim": 16, "batch_size": 50, "epochs": 1,
    "device": "cpu", "figures": "false",
}  # fmt: skip


def call(**flags) -> tuple[int, str, str]:
    """`python vit_train.py ...` without a new process; those of the cases are new."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["vit_train.py", *(f"--{name}={value}" for name, value in flags.items())]
    with (
        patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        run_script(vit_train.main)
    return caught.value.code, out.getvalue(), err.getvalue()


def flags_of(name: str, gpu: bool = True, **common: str) -> dict[str, dict[str, str]]:
    return {case.name: case.flags for case in make_cases(name, Settings(), gpu, common)}


def changes(flags: dict[str, str], control: dict[str, str]) -> set[str]:
    return {name for name in flags | control if flags.get(name) != control.get(name)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """An .npz of 120 train and 20 test images of 32 x 32."""
    images, path = sample_images(120, 20), tmp_path_factory.mktemp("pictures") / "pictures.npz"
    arrays = {name: getattr(images, name) for name in ("train_images", "train_labels", "test_images", "test_labels")}
    np.savez(path, class_names=np.array(images.class_names), **arrays)
    return path


@pytest.fixture(scope="module")
def cifar100(tmp_path_factory) -> Path:
    """CIFAR-100's binary version with three train images a class and one test image a class."""
    folder = tmp_path_factory.mktemp("cifar100")
    labels = np.concatenate([np.arange(300) % 100, np.arange(100)])
    pixels = np.random.default_rng(0).integers(0, 256, (400, 3072))
    records = np.concatenate([(labels // 5)[:, None], labels[:, None], pixels], 1).astype(np.uint8)
    path = folder / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (("train.bin", records[:300].tobytes()), ("test.bin", records[300:].tobytes())):
            member = tarfile.TarInfo(f"cifar-100-binary/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def one_thread(monkeypatch):
    """In the processes of the cases: models this small are slower with more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# --- Cases ------------------------------------------------------------------------------------------------------------


ON_CPU = ("--device=cpu", "--use_cuda_graphs=false")  # to plan a GPU's cases here


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("name", STUDIES)
def test_every_case_has_flags_that_the_script_takes_and_a_name_of_its_own(name, gpu, tmp_path, monkeypatch):
    """Read by the script's own parser, and planned for a CPU, on images as CIFAR's and as the sample's."""
    monkeypatch.setattr("vit_plan.set_precision", lambda *arguments: None)
    cases = make_cases(name, Settings(), gpu, {"data_path": "mine.npz"})
    assert len({case.name for case in cases}) == len(cases) > 3 and all(case.words for case in cases)
    images = sample_images(20, 10)
    for case in cases:
        words = case_runner.command(case, tmp_path / name, {"cache_folder": "x"})[2:]
        settings = parse_settings(Settings, words, sections=SECTIONS)
        assert settings.data_path == "mine.npz" and settings.run_name == case.name and settings.figures is False
        assert settings.cache_folder == "x" and settings.experiment == name
        assert settings.use_compile == settings.use_cuda_graphs == (True if gpu else None)
        settings.device, settings.use_cuda_graphs = "cpu", None
        plan = make_plan(settings, images)
        assert plan.seeds == [0, 1, 2]


@pytest.mark.parametrize("gpu", [True, False])
def test_the_ablation_changes_one_thing_at_a_time(gpu):
    flags = flags_of("ablation", gpu)
    names = {"small", "decatt", "mixed", "flash", "mixed+flash", "decatt+flash", "decatt+mixed", "decatt+mixed+flash"}
    assert set(flags) == names | {"large", "centres"}
    control = flags["small"]
    shape = {"model_size"} if gpu else {"embedding_dim", "num_heads"}
    single = {"decatt": {"decatt_weight"}, "mixed": {"tokens"}, "centres": {"positions"}, "large": shape}
    single["flash"] = {"use_flash_attention", "attention_backend"}  # textbook attention against a fused kernel
    for name, expected in single.items():
        assert changes(flags[name], control) == expected, name
    for name in names - {"small"}:
        parts = set().union(*(single[part] for part in name.split("+")))
        assert changes(flags[name], control) == parts, name
        for part in name.split("+"):
            assert all(flags[name].get(flag) == flags[part].get(flag) for flag in single[part])
    assert control["attention_backend"] == "eager" and flags["flash"]["use_flash_attention"] == "true"
    assert flags["decatt"]["decatt_weight"] == str(DECATT_WEIGHT) and flags["mixed"]["tokens"] == "mixed"
    assert (
        len({(one.get("epochs"), one["seeds"], one.get("precision"), one.get("use_compile")) for one in flags.values()})
        == 1
    )
    assert control.get("epochs") == (str(EPOCHS["ablation"]) if gpu else None) and control["seeds"] == "0,1,2"
    assert control.get("model_size") == (None if gpu else "tiny") and control.get("use_compile") == (
        "true" if gpu else None
    )


def test_the_ablation_has_one_token_count_and_its_sizes():
    """Planned on images of 32 x 32: 64 patches of 48 numbers everywhere, only `large` is larger."""
    images, found = sample_images(20, 10), {}
    for case in make_cases("ablation", Settings(), True, {}):
        words = [f"--{name}={value}" for name, value in case.flags.items()]
        settings = parse_settings(Settings, [*words, *ON_CPU, "--model_size=small"], sections=SECTIONS)
        found[case.name] = make_plan(settings, images)
    assert {(p.model.num_tokens, p.model.patch_values, p.precision, p.batch_size) for p in found.values()} == {
        (64, 48, "fp32", 100)
    }
    assert found["mixed"].image_size == 64 and found["small"].image_size == 32
    assert found["centres"].model.positions == found["mixed"].model.positions == "centres"
    assert found["decatt"].model.decorrelated_layers == 12 and found["decatt"].decatt_weight == DECATT_WEIGHT


def test_the_study_of_tokens():
    flags = flags_of("tokens")
    images = sample_images(20, 10)
    counts = {}
    for name, own in flags.items():
        words = [f"--{flag}={value}" for flag, value in own.items()]
        plan = make_plan(parse_settings(Settings, [*words, *ON_CPU], sections=SECTIONS), images)
        counts[name] = (plan.model.num_tokens, plan.scorer)
        assert plan.model.patch_values == 48 and plan.model.positions == "centres"
    assert counts == {
        "grid-36": (36, None), "grid-49": (49, None), "grid-64": (64, None), "mixed-34": (34, "pixel_blur"),
        "mixed-37": (37, "pixel_blur"), "mixed-49": (49, "pixel_blur"), "mixed-49-random": (49, "random"),
        "mixed-49-trained": (49, "trained"),
    }  # fmt: skip
    assert changes(flags["mixed-49-random"], flags["mixed-49"]) == {"scorer"}
    assert changes(flags["grid-36"], flags["grid-64"]) == {"image_size"}
    assert changes(flags["mixed-34"], flags["mixed-49"]) == {"num_tokens"}


@pytest.mark.parametrize("side", [32, 64, 96])
def test_tokens_have_as_many_numbers_whatever_the_images_size(side):
    images, values = sample_images(20, 10, image_size=side), set()
    for case in make_cases("tokens", Settings(), True, {}, side):
        words = [f"--{flag}={value}" for flag, value in case.flags.items()]
        values.add(make_plan(parse_settings(Settings, [*words, *ON_CPU], sections=SECTIONS), images).model.patch_values)
    assert values == {3 * (side // 8) ** 2}
    with pytest.raises(SettingsError, match="--source_size"):
        make_cases("tokens", Settings(), True, {}, 28)


def test_results_of_other_images_are_not_taken_over(tmp_path):
    """Told apart by the checksum: two files may have the same name."""
    images = sample_images(20, 10)
    images.source["sha256"] = "a"
    (case, *_) = cases = make_cases("decatt", Settings(), True, {})
    (tmp_path / case.name).mkdir()
    for checksum in ("a", None, "b"):
        info = {"settings": {}, "status": "ok", "dataset": {"sha256": checksum}}
        (tmp_path / case.name / "run.json").write_text(json.dumps(info))
        if checksum == "b":
            with pytest.raises(SettingsError, match="other images"):
                check_data(tmp_path, cases, images)
        else:
            check_data(tmp_path, cases, images)


def test_the_study_of_decatt():
    flags = flags_of("decatt")
    assert [own["decatt_weight"] for own in flags.values()] == ["1", "10", "100", "10"]
    assert changes(flags["weight-1"], flags["weight-100"]) == {"decatt_weight"}
    assert changes(flags["weight-10-first-3"], flags["weight-10"]) == {"decatt_layers"}


@pytest.mark.parametrize("name", STUDIES)
def test_flags_given_by_hand_are_handed_on_to_every_case(name):
    settings = Settings(epochs=3, seeds="5", cutout=8, device="cpu", output_folder="x", only="small", flip=False)
    common = case_runner.given_flags(settings, ("output_folder", "only"))
    assert common == {"epochs": "3", "seeds": "5", "cutout": "8", "device": "cpu", "flip": "false"}
    for case in make_cases(name, settings, True, common):
        assert common.items() <= case.flags.items()  # and they win over those of the study


def test_a_shape_given_by_hand_leaves_no_larger_case():
    for flag in ("model_size", "embedding_dim", "num_heads"):
        assert "large" not in flags_of("ablation", **{flag: "x"})
    assert "large" in flags_of("ablation", num_layers="2")


def test_folders_are_named_after_the_data():
    def name(**settings):
        return str(folder_of("ablation", Settings(**settings)))

    assert name() == "outputs/vit/ablation-sample"
    assert name(dataset="cifar100", output_folder="x") == "x/vit/ablation-cifar100"
    assert name(data_path="a/pictures.of.mine.npz") == "outputs/vit/ablation-pictures"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"experiment": "ablation", "decatt_weight": 3}, "--decatt_weight is what --experiment ablation sets itself"),
        ({"experiment": "ablation", "tokens": "mixed"}, "--tokens is what --experiment ablation sets itself"),
        ({"experiment": "ablation", "use_flash_attention": "true"}, "--use_flash_attention is what"),
        ({"experiment": "ablation", "attention_backend": "sdpa"}, "--attention_backend is what"),
        ({"experiment": "ablation", "scorer": "random"}, "--scorer is what --experiment ablation sets itself"),
        ({"experiment": "tokens", "num_tokens": 49}, "--num_tokens is what --experiment tokens sets itself"),
        ({"experiment": "tokens", "image_size": 64}, "--image_size is what --experiment tokens sets itself"),
        ({"experiment": "decatt", "decatt_layers": 2}, "--decatt_layers is what --experiment decatt sets itself"),
        ({"experiment": "decatt", "attention_backend": "eager"}, "--attention_backend is what --experiment decatt"),
        ({"experiment": "decatt", "run_name": "x"}, "--run_name has no effect with --experiment decatt"),
        ({"experiment": "decatt", "only": "x"}, "--only: no case is named x"),
        ({"experiment": "decatt", "data_path": "missing.npz"}, "--data_path missing.npz cannot be read"),
        ({"experiment": "ablation", "augment_operations": 9}, "--augment_operations must"),
        ({"experiment": "decatt", "gpus": "0"}, "--gpus needs NVIDIA GPUs, and there is none here"),
    ],
)
def test_wrong_settings(tmp_path, flags, sentence):
    status, _, err = call(**(TINY | {"output_folder": tmp_path} | flags))
    assert status == 2 and sentence in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_result_lines():
    (case, *_) = make_cases("decatt", Settings(), True, {})
    results = {"parameters": 1234, "validation_accuracy": 0.5, "test_accuracy": 0.25, "test_accuracy_spread": 0.01}
    line = result_line(case, {"status": "ok", "results": results | {"images_per_s": None}})
    assert line.split() == [
        "weight-1", "ok", "1,234", "parameters", "0.5000", "validation", "0.2500", "test", "0.0100", "spread",
    ]  # fmt: skip
    assert result_line(case, {"status": "oom", "error": "full"}).endswith("full")
    assert "missing" in result_line(case, {})


# --- Running ----------------------------------------------------------------------------------------------------------


def info_of(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "run.json").read_text())


@pytest.mark.usefixtures("one_thread")
def test_cases_run_in_fresh_processes_and_only_once(tmp_path, cifar100):
    """CIFAR-100's archive as the university hands it out, through the ablation's control and all three techniques."""
    flags = TINY | {"dataset": "cifar100", "data_path": cifar100, "output_folder": tmp_path, "seeds": "0"}
    flags |= {"cache_folder": tmp_path / "cache", "validation_share": 0.34, "experiment": "ablation"}
    only = "small,decatt+mixed+flash"
    status, out, err = call(**flags, only=only)
    assert status == 0, err + out
    folder = tmp_path / "vit" / "ablation-cifar100"
    assert "9 cases, 2 to run" in out  # no `large`: the shape is given
    content = json.loads((folder / "experiment.json").read_text())
    assert {case["name"] for case in content["cases"] if case["status"] == "ok"} == set(only.split(","))
    assert content["experiment"] == "ablation" and content["finished"] is False
    assert json.loads(out.splitlines()[-1])["status"] == "ok"
    small, everything = (info_of(folder, name) for name in only.split(","))
    for info in (small, everything):
        assert (
            info["dataset"]["name"] == "cifar100" and info["dataset"]["classes"] == info["model"]["num_classes"] == 100
        )
        assert info["dataset"]["splits"] == {"train": 200, "validation": 100, "test": 100}
        assert info["results"]["seeds"][0]["test_images"] == 100 and info["results"]["test_accuracy"] <= 0.1
        assert info["model"]["embedding_dim"] == 16 and info["settings"]["cache_folder"] == str(tmp_path / "cache")
    assert small["attention_kernel"].startswith("eager") and small["decatt_weight"] == 0
    assert everything["tokens"]["kind"] == "mixed" and everything["decatt_weight"] == DECATT_WEIGHT
    assert "flash" in everything["attention_kernel"] and (folder / "decatt+mixed+flash" / "mosaics.npz").exists()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]
    before = (folder / "small" / "run.json").read_text()
    status, out, _ = call(**flags, only=only)
    assert status == 0 and "9 cases, 0 to run" in out and (folder / "small" / "run.json").read_text() == before
    (folder / "small" / "run.json").write_text(before.replace('"status": "ok"', '"status": "interrupted"'))
    for seeds, expected in (("0", ["small"]), ("0,1", only.split(","))):  # what was left, and what other flags change
        with patch.object(case_runner, "run_cases") as runner:
            call(**(flags | {"seeds": seeds}), only=only)
        assert [case.name for case in runner.call_args.args[0]] == expected


@pytest.mark.gpu
def test_gpu_cases_are_compiled_in_bf16(tmp_path, pictures):
    flags = TINY | {"data_path": pictures, "output_folder": tmp_path, "seeds": "0", "device": "cuda", "epochs": 2}
    status, out, err = call(**flags, experiment="ablation", only="small,flash")
    assert status == 0, err + out
    for name in ("small", "flash"):
        info = info_of(tmp_path / "vit" / "ablation-pictures", name)
        assert info["precision"] == "bf16" and info["settings"]["use_compile"] and info["status"] == "ok"
        assert torch.cuda.get_device_name() in info["device_name"]
