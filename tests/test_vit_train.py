"""vit_train.py: what a run leaves, what every flag does, tokens and DeCAtt in training, errors, stopping."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import signal
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vit_fit
import vit_train
from image_augmentation import normalise
from image_dataset import load_images, split_images
from mixed_resolution import uniform_tokens
from run_folder import RunFolder, StopRequest
from sample_images import sample_images
from utils import parse_settings, run_script
from vit import ViT, ViTConfig
from vit_evaluation import spread
from vit_fit import Training, parameter_groups, rate_at
from vit_plan import make_plan
from vit_train import SECTIONS, Settings

CPU = torch.device("cpu")
SHAPE = {"num_layers": 2, "embedding_dim": 16, "num_heads": 2, "mlp_dim": 16}
BASE = SHAPE | {
    "patch_size": 4, "batch_size": 36, "epochs": 2, "validation_share": 0.1, "device": "cpu", "figures": "false",
    "tracked_steps": 1, "log_every": 1,
}  # fmt: skip
MIXED = {"tokens": "mixed", "num_tokens": 25, "patch_size": None}  # of 32 x 32 pixels, in patches of 8 to 2
STEP_KEYS = [
    "seed", "step", "epoch", "images", "loss", "accuracy", "decorrelation", "step_ms", "augment_ms", "tokenise_ms",
    "images_per_s", "mfu", "peak_gib",
]  # fmt: skip
EPOCH_KEYS = {
    "seed", "epoch", "train_loss", "train_accuracy", "decorrelation", "step", "validation_accuracy", "validation_loss",
    "learning_rate", "augment_s", "tokenise_s", "step_s", "wall_s",
}  # fmt: skip


@dataclasses.dataclass
class Run:
    status: int
    stdout: str
    stderr: str
    folder: Path  # of outputs/vit

    @property
    def path(self) -> Path:
        return next(path.parent for path in sorted(self.folder.glob("*/run.json")))

    @property
    def info(self) -> dict:
        return json.loads((self.path / "run.json").read_text())

    @property
    def last(self) -> dict:
        return json.loads(self.stdout.splitlines()[-1])

    def lines(self, file: str = "steps.jsonl") -> list[dict]:
        return [json.loads(line) for line in (self.path / file).read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        assert self.status == 0, self.stderr + self.stdout
        return [row["loss"] for row in self.lines()]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """An .npz of 240 train and 60 test images of 16 x 16, ten classes."""
    images, path = sample_images(240, 60, image_size=16), tmp_path_factory.mktemp("pictures") / "pictures.npz"
    arrays = {name: getattr(images, name) for name in ("train_images", "train_labels", "test_images", "test_labels")}
    np.savez(path, class_names=np.array(images.class_names), **arrays)
    return path


def words_of(pictures: Path | None, **flags) -> list[str]:
    given = BASE | ({"data_path": pictures} if pictures else {}) | flags
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def run(folder: Path, pictures: Path | None, **flags) -> Run:
    """`python vit_train.py ...` without a new process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["vit_train.py", *words_of(pictures, **({"output_folder": folder} | flags))]
    with (
        patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        run_script(vit_train.main)
    return Run(caught.value.code, out.getvalue(), err.getvalue(), folder / "vit")


def plan_of(pictures: Path, **flags):
    settings = parse_settings(Settings, words_of(pictures, **flags), sections=SECTIONS)
    return make_plan(settings, load_images(None, str(pictures)))


def training_of(folder: Path, pictures: Path, **flags) -> Training:
    """A training that has not begun."""
    settings = parse_settings(Settings, words_of(pictures, **flags), sections=SECTIONS)
    images = load_images(None, str(pictures))
    plan = make_plan(settings, images)
    data = split_images(images, device=CPU, validation_share=settings.validation_share)
    run = RunFolder.create(str(folder), "vit", "bare", unique=True)
    return Training(settings, plan, data, run, plan.seeds[0], StopRequest())


@pytest.fixture(scope="module")
def plain(tmp_path_factory, pictures) -> Run:
    """Two epochs of six steps, everything by default."""
    done = run(tmp_path_factory.mktemp("plain"), pictures, tracked_steps=3)
    assert done.status == 0, done.stderr
    return done


# --- What a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_docstring_says(plain):
    assert {path.name for path in plain.path.iterdir()} == {
        "run.json", "steps.jsonl", "epochs.jsonl", "memory.csv", "model_summary.txt", "checkpoint",
    }  # fmt: skip
    info, results = plain.info, plain.info["results"]
    assert plain.path.name == "local-images-small-fp32-sdpa-grid-16" and info["status"] == "ok" and info["seeds"] == [0]
    assert info["model"]["num_tokens"] == 16 and info["model"]["patch_values"] == 48 and info["batch_size"] == 36
    assert info["parameters"] == results["parameters"] and info["precision"] == "fp32"
    assert info["tokens"] == {"kind": "uniform", "image_size": 16, "patch_size": 4, "scorer": None, "tree": None}
    assert info["recipe"]["augmentation"]["operations"] == 2 and info["recipe"]["epochs"] == 2
    assert (
        info["dataset"]["splits"] == {"train": 220, "validation": 20, "test": 60} and info["dataset"]["classes"] == 10
    )
    assert "attention" in info["attention_kernel"] and info["decatt_weight"] == 0
    assert results["seed_count"] == 1 and results["test_accuracy_spread"] == 0 and len(results["seeds"]) == 1
    seed = results["seeds"][0]
    assert (seed["seed"], seed["epochs"], seed["steps"], seed["test_images"]) == (0, 2, 12, 60)
    assert plain.last["run"] == str(plain.path) and plain.last["test_accuracy"] == results["test_accuracy"]
    assert plain.last["status"] == "ok" and plain.last["parameters"] == info["parameters"]


def test_steps_and_epochs(plain):
    steps, epochs = plain.lines(), plain.lines("epochs.jsonl")
    assert list(steps[0]) == STEP_KEYS and set(epochs[0]) == EPOCH_KEYS
    assert [(row["step"], row["epoch"], row["images"]) for row in steps] == [
        (n, 1 + (n > 6), 36 * n) for n in range(1, 13)
    ]
    assert all(row["decorrelation"] is None for row in (*steps, *epochs))
    for row in epochs:
        own = [step for step in steps if step["epoch"] == row["epoch"]]
        assert row["train_loss"] == pytest.approx(np.mean([step["loss"] for step in own]))
        assert row["train_accuracy"] == pytest.approx(np.mean([step["accuracy"] for step in own]))
        for part in ("augment", "tokenise", "step"):
            assert row[f"{part}_s"] == pytest.approx(sum(step[f"{part}_ms"] for step in own) / 1000, abs=1e-5)
        parts = row["augment_s"] + row["tokenise_s"] + row["step_s"]
        assert parts <= row["wall_s"] + 1e-4 and parts > 0.8 * row["wall_s"]  # one clock without gaps
    results = plain.info["results"]["seeds"][0]
    best = max(epochs, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))
    assert results["best_epoch"] == best["epoch"] and results["validation_accuracy"] == best["validation_accuracy"]
    second = [step["step_ms"] for step in steps if step["epoch"] == 2]
    assert results["timed_steps"] == 6 and results["step_ms_median"] == pytest.approx(np.median(second), abs=1e-3)
    assert results["images_per_s"] == pytest.approx(36_000 / np.median(second), rel=1e-3)


def test_memory_is_tracked_by_phase(plain):
    with (plain.path / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["phase"] for row in rows} == {
        "training_step",
        "forward_pass",
        "loss",
        "backward_pass",
        "optimizer_step",
    }
    assert {int(row["step"]) for row in rows} == {2, 3, 4}
    results = plain.info["results"]
    peaks = [float(row["peak_allocated_gib"]) for row in rows if row["phase"] == "training_step"]
    assert results["tracked_steps"] == 3 and results["peak_allocated_gib"] == max(peaks) > 0
    assert results["peak_phase"] in {row["phase"] for row in rows} - {"training_step"}


def test_the_checkpoint_reproduces_the_reported_accuracy(plain, pictures):
    """From the saved weights, one image at a time."""
    model = ViT(ViTConfig(**plain.info["model"])).eval()
    model.load_state_dict(load_file(plain.path / "checkpoint" / "best-seed-0.safetensors"))
    data = split_images(load_images(None, str(pictures)), device=CPU, validation_share=0.1)
    results = plain.info["results"]["seeds"][0]
    for name in ("validation", "test"):
        split, right, loss = data.splits[name], 0, 0.0
        for image, label in zip(split.images, split.labels, strict=True):
            with torch.no_grad():
                logits = model(uniform_tokens(normalise(image[None], data.mean, data.deviation), 4).patches)
            right += int(logits.argmax() == label)
            loss += torch.nn.functional.cross_entropy(logits, label[None]).item()
        assert results[f"{name}_accuracy"] == right / len(split)
        assert results[f"{name}_loss"] == pytest.approx(loss / len(split), rel=1e-4)


def test_head_correlation_is_reported_at_start_and_end(plain):
    seed, results = plain.info["results"]["seeds"][0], plain.info["results"]
    for name in ("head_correlation_at_start", "head_correlation"):
        row = seed[name]
        assert row["images"] == 20 and len(row["squares"]) == len(row["magnitudes"]) == 2
        assert np.array(row["matrices"]).shape == (2, 2, 2) and np.allclose(
            np.array(row["matrices"])[:, [0, 1], [0, 1]], 1
        )
        assert all(
            0 < square <= magnitude <= 1 for square, magnitude in zip(row["squares"], row["magnitudes"], strict=True)
        )
        assert results[f"{name}_squares"] == pytest.approx(np.mean(row["squares"]))
    assert 0 <= seed["test_accuracy_without_a_redundant_head"] <= 1
    assert 0 <= seed["test_accuracy_without_a_random_head"] <= 1


def test_the_model_learns(tmp_path, pictures):
    """What it is trained on: 220 images are too few for others."""
    recipe = {"learning_rate": 0.01, "augment_operations": 0, "label_smoothing": 0, "crop_padding": 0}
    rows = run(tmp_path, pictures, epochs=20, embedding_dim=32, **recipe).lines("epochs.jsonl")
    assert rows[-1]["train_loss"] < 0.6 * rows[0]["train_loss"] and rows[-1]["train_accuracy"] > 0.5


def test_seeds(tmp_path, pictures, plain):
    """The same seed is the same run, another is not; several are one folder with each of them and the spread."""
    again = run(tmp_path / "again", pictures, tracked_steps=3)
    both = run(tmp_path / "both", pictures, seeds="1,0")
    assert again.losses == plain.losses
    one, zero = ([row["loss"] for row in both.lines() if row["seed"] == seed] for seed in (1, 0))
    assert zero == plain.losses and one != zero
    results = both.info["results"]
    assert both.info["seeds"] == [1, 0] and [row["seed"] for row in results["seeds"]] == [1, 0]
    accuracies = [row["test_accuracy"] for row in results["seeds"]]
    assert results["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert results["test_accuracy_spread"] == pytest.approx(max(accuracies) - min(accuracies))
    assert accuracies[1] == plain.info["results"]["test_accuracy"]
    names = {path.name for path in (both.path / "checkpoint").iterdir()}
    assert names == {"best-seed-0.safetensors", "best-seed-1.safetensors"}


def test_a_seed_does_not_depend_on_its_place(tmp_path, pictures):
    """With random numbers in the model too: the first seed is looked at before it trains, the others are not."""
    noise = {"dropout": 0.2, "drop_path": 0.2, "epochs": 1}
    alone = run(tmp_path / "alone", pictures, seeds="1", **noise)
    second = run(tmp_path / "second", pictures, seeds="0,1", **noise)
    assert [row["loss"] for row in second.lines() if row["seed"] == 1] == alone.losses


def test_training_sees_training_images_only(tmp_path, pictures, monkeypatch):
    seen, original = [], vit_fit.augment

    def noted(images, *rest, **options):
        seen.extend(image.numpy().tobytes() for image in images)
        return original(images, *rest, **options)

    monkeypatch.setattr(vit_fit, "augment", noted)
    assert run(tmp_path, pictures).status == 0
    data = split_images(load_images(None, str(pictures)), device=CPU, validation_share=0.1)
    splits = {name: {image.numpy().tobytes() for image in split.images} for name, split in data.splits.items()}
    assert len(seen) == 2 * 6 * 36 and set(seen) <= splits["train"]
    assert not splits["train"] & splits["validation"] and not set(seen) & (splits["validation"] | splits["test"])
    for epoch in (seen[: 6 * 36], seen[6 * 36 :]):
        assert len(set(epoch)) == len(epoch)  # each at most once an epoch
    assert seen[: 6 * 36] != seen[6 * 36 :]


def test_test_is_evaluated_once_with_the_weights_of_the_best_epoch(tmp_path, pictures, monkeypatch):
    """Validation answers are made up: the third epoch is the best, the second ties it with a higher loss."""
    answers, seen = iter([(0.1, 1.0), (0.4, 1.2), (0.4, 1.1), (0.4, 1.3), (0.2, 0.1)]), []

    def evaluate(self, name, model=None):
        if model is not None:  # with a head cut out
            return {"accuracy": 0.3, "loss": 1.0}
        seen.append((name, self.model.head[3].weight.detach().clone()))
        accuracy, loss = next(answers) if name == "validation" else (0.7, 2.0)
        return {"accuracy": accuracy, "loss": loss}

    monkeypatch.setattr(Training, "evaluate", evaluate)
    done = run(tmp_path, pictures, epochs=5)
    results = done.info["results"]["seeds"][0]
    assert [name for name, _ in seen] == ["validation"] * 5 + ["test"]
    assert (results["best_epoch"], results["validation_accuracy"], results["validation_loss"]) == (3, 0.4, 1.1)
    assert results["test_accuracy"] == 0.7 and results["test_accuracy_without_a_random_head"] == 0.3
    saved = load_file(done.path / "checkpoint" / "best-seed-0.safetensors")["head.3.weight"]
    assert torch.equal(saved, seen[2][1]) and torch.equal(saved, seen[5][1]) and not torch.equal(saved, seen[4][1])


# --- The recipe -------------------------------------------------------------------------------------------------------


def test_what_decays():
    model = ViT(ViTConfig(num_layers=1, embedding_dim=16, num_heads=2, mlp_dim=16, patch_norm=True))
    decayed, others = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "embedding.weight", "blocks.0.attention.qkv.weight", "blocks.0.attention.output.weight",
        "blocks.0.expand.weight", "blocks.0.contract.weight", "head.0.weight", "head.3.weight",
    }  # fmt: skip
    rest = {names[id(p)] for p in others["params"]}
    assert {"positions", "class_token", "final_norm.weight", "patch_norm.weight", "head.3.bias"} <= rest
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_rates():
    rise = {"warm_up_steps": 4, "all_steps": 12}
    assert [rate_at(step, **rise, cosine=True) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate_at(8, **rise, cosine=True) == pytest.approx(0.5) and rate_at(12, **rise, cosine=True) == 0
    assert rate_at(11, **rise, cosine=True) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert [rate_at(step, **rise, cosine=False) for step in (0, 3, 4, 11)] == [0.25, 1, 1, 1]
    assert rate_at(0, warm_up_steps=0, all_steps=10, cosine=True) == 1
    for warm_up in (0.095, 0.5, 2.5, 3.99):  # part of a step
        assert max(rate_at(step, warm_up_steps=warm_up, all_steps=9, cosine=True) for step in range(9)) == 1


def test_images_of_any_size_have_a_default_patch():
    """28 pixels: patches of 4; cut to a quadtree from 64."""
    images = sample_images(20, 10, image_size=28)
    plan = make_plan(Settings(device="cpu"), images)
    assert (plan.patch_size, plan.model.num_tokens) == (4, 49)
    mixed = make_plan(Settings(device="cpu", tokens="mixed"), images)
    assert (mixed.image_size, mixed.tree.min_patch, mixed.tree.max_patch) == (64, 4, 16)


@pytest.mark.parametrize("count", [1, 5, 8, 400])
def test_shown_images_are_far_apart(count):
    places = spread(count, 8).tolist()
    assert (
        len(set(places)) == len(places) == min(count, 8) and places[-1] == count - 1 and (count == 1 or not places[0])
    )


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_schedule_in_a_run(tmp_path, pictures, schedule):
    done = run(tmp_path, pictures, epochs=4, warm_up_epochs=2, schedule=schedule, learning_rate=0.01)
    rates = [row["learning_rate"] for row in done.lines("epochs.jsonl")]
    last = 0.01 if schedule == "constant" else 0.005
    assert rates == pytest.approx([0.01 / 12, 0.01 * 7 / 12, 0.01, last])


def test_recipes(pictures):
    """The sample's, another set's, and what is filled in."""
    sample = make_plan(Settings(device="cpu"), sample_images(20, 10))
    assert (sample.model_size, sample.batch_size, sample.epochs, sample.learning_rate) == ("tiny", 100, 22, 2e-3)
    assert (sample.warm_up_epochs, sample.augmentation.operations, sample.augmentation.crop_padding) == (2, 0, 2)
    other = make_plan(Settings(device="cpu"), load_images(None, str(pictures)))
    assert (other.model_size, other.batch_size, other.epochs, other.learning_rate) == ("small", 512, 100, 2e-3)
    assert (sample.optimizer, other.optimizer, other.augmentation.magnitude) == ("adamw", "muon", 9)
    assert (other.warm_up_epochs, other.augmentation.operations, other.augmentation.label_smoothing) == (5, 2, 0.1)
    assert other.model.num_tokens == 64 and other.patch_size == 2 and other.seeds == [0]
    assert plan_of(pictures, epochs=3).warm_up_epochs == pytest.approx(0.3)
    assert plan_of(pictures, schedule="constant").warm_up_epochs == 0
    assert plan_of(pictures, schedule="constant", warm_up_epochs=1).warm_up_epochs == 1


def test_gradient_clip(tmp_path, pictures):
    norms = {}
    for clip in (0, 0.01):
        training = training_of(tmp_path, pictures, gradient_clip=clip)
        step, found = training.optimizer.step, []

        def noted(*arguments, step=step, found=found, training=training, **options):
            found.append(torch.stack([p.grad.norm() for p in training.model.parameters()]).norm().item())
            return step(*arguments, **options)

        training.optimizer.step = noted
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the scheduler sees that step is another one
            training.train_epoch()
        norms[clip] = found
    assert len(norms[0]) == 6 and min(norms[0]) > 0.02 and norms[0.01] == pytest.approx([0.01] * 6, rel=1e-3)


def test_averaged_weights_are_evaluated(tmp_path, pictures, plain):
    training = training_of(tmp_path, pictures, average_decay=0.5)
    expected, original = training.model.head[3].weight.detach().clone(), training.update_average

    def update():
        original()
        decay = min(0.5, (1 + training.step) / (10 + training.step))
        expected.mul_(decay).add_(training.model.head[3].weight.detach(), alpha=1 - decay)

    training.update_average = update
    training.train_epoch()
    assert torch.allclose(training.average.head[3].weight, expected, atol=1e-6)
    assert not torch.allclose(training.model.head[3].weight, expected, atol=1e-5)
    assert training.evaluated is training.average
    done = run(tmp_path / "run", pictures, average_decay=0.9)
    assert done.losses == plain.losses  # the training itself is untouched
    averaged, own = (
        load_file(folder.path / "checkpoint" / "best-seed-0.safetensors")["head.3.weight"] for folder in (done, plain)
    )
    assert not torch.allclose(averaged, own, atol=1e-5)
    rows = zip(done.lines("epochs.jsonl"), plain.lines("epochs.jsonl"), strict=True)
    assert any(a["validation_loss"] != b["validation_loss"] for a, b in rows)


# --- Every flag does something ----------------------------------------------------------------------------------------

PLANNED: dict[str, dict] = {
    "flip": {"flip": "false"}, "crop_padding": {"crop_padding": 1}, "rotation_degrees": {"rotation_degrees": 10},
    "augment_operations": {"augment_operations": 1}, "augment_magnitude": {"augment_magnitude": 3},
    "cutout": {"cutout": 4}, "mixup_alpha": {"mixup_alpha": 0.2}, "cutmix_alpha": {"cutmix_alpha": 1},
    "label_smoothing": {"label_smoothing": 0},
    "model_size": {"model_size": "tiny"}, "num_layers": {"num_layers": 3}, "embedding_dim": {"embedding_dim": 32},
    "num_heads": {"num_heads": 4}, "mlp_dim": {"mlp_dim": 8}, "pool": {"pool": "mean"},
    "positions": {"positions": "centres"},
    "head": {"head": "linear"}, "final_norm": {"final_norm": "false"}, "initialisation": {"initialisation": "pytorch"},
    "dropout": {"dropout": 0.1}, "attention_dropout": {"attention_dropout": 0.1}, "drop_path": {"drop_path": 0.1},
    "use_flash_attention": {"use_flash_attention": "true"}, "attention_backend": {"attention_backend": "eager"},
    "decatt_weight": {"decatt_weight": 1}, "decatt_layers": {"decatt_weight": 1, "decatt_layers": 1}, "tokens": MIXED,
    "image_size": {"image_size": 32}, "patch_size": {"patch_size": 2}, "num_tokens": MIXED | {"num_tokens": 28},
    "min_patch": MIXED | {"min_patch": 4}, "max_patch": MIXED | {"max_patch": 16},
    "scorer": MIXED | {"scorer": "random"}, "precision": {"precision": "bf16"},
    "gradient_checkpointing": {"gradient_checkpointing": "block"},
    "checkpoint_every": {"gradient_checkpointing": "every_k", "checkpoint_every": 3},
    "batch_size": {"batch_size": 20}, "epochs": {"epochs": 3}, "learning_rate": {"learning_rate": 0.01},
    "warm_up_epochs": {"warm_up_epochs": 1}, "seeds": {"seeds": "1"},
}  # fmt: skip
WITHOUT = {"tokens": {}} | {name: MIXED for name in ("num_tokens", "min_patch", "max_patch", "scorer")}
WITHOUT |= {"decatt_layers": {"decatt_weight": 1}, "checkpoint_every": {"gradient_checkpointing": "every_k"}}
TRAINED = {  # read by the training itself
    "schedule": {"schedule": "constant", "warm_up_epochs": 0.2}, "weight_decay": {"weight_decay": 30},
    "gradient_clip": {"gradient_clip": 0.001}, "max_steps": {"max_steps": 7}, "log_every": {"log_every": 5},
    "validation_share": {"validation_share": 0.2}, "evaluate_every": {"evaluate_every": 2},
    "average_decay": {"average_decay": 0.5}, "optimizer": {"optimizer": "adamw"}, "tracked_steps": {"tracked_steps": 2},
}  # fmt: skip
ELSEWHERE = {  # tested with files, on a GPU, with studies, or by a test of their own above and below
    "dataset", "data_path", "download", "source_size", "cache_folder", "scorer_epochs", "use_compile", "compile_scope",
    "use_cuda_graphs", "figures", "device", "output_folder", "experiment", "run_name", "config", "gpus", "only",
}  # fmt: skip


def test_no_flag_is_forgotten():
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert set(PLANNED) | set(TRAINED) | ELSEWHERE == fields and not set(PLANNED) & set(TRAINED)


@pytest.mark.parametrize("name", PLANNED)
def test_a_flag_changes_the_plan(pictures, name):
    flags, base = PLANNED[name], WITHOUT.get(name, {})
    assert plan_of(pictures, **flags) != plan_of(pictures, **base)
    assert plan_of(pictures, **base) == plan_of(pictures, **base)


@pytest.mark.parametrize("name", TRAINED)
def test_a_flag_changes_the_run(tmp_path, pictures, plain, name):
    done = run(tmp_path, pictures, **TRAINED[name])
    assert done.status == 0, done.stderr
    if name in ("evaluate_every", "average_decay"):
        found = [[row.get("validation_loss") for row in one.lines("epochs.jsonl")] for one in (done, plain)]
        assert found[0] != found[1] and done.losses == plain.losses
        assert name != "evaluate_every" or (found[0][0] is None and found[0][1] == found[1][1])
    elif name == "tracked_steps":
        assert done.info["results"]["tracked_steps"] == 2 and done.losses == plain.losses
    elif name == "log_every":
        assert [row["step"] for row in done.lines()] == [1, 5, 10]
    elif name == "max_steps":
        results = done.info["results"]["seeds"][0]
        assert done.losses == plain.losses[:7] and (results["steps"], results["epochs"]) == (7, 2)
        assert "validation_accuracy" in done.lines("epochs.jsonl")[-1]
    else:
        assert done.losses != plain.losses


@pytest.mark.parametrize(
    "name", ["flip", "augment_magnitude", "mixup_alpha", "cutmix_alpha", "label_smoothing", "dropout"]
)
def test_a_planned_flag_changes_the_losses(tmp_path, pictures, plain, name):
    losses = run(tmp_path, pictures, **PLANNED[name], max_steps=3).losses
    assert losses != plain.losses[:3]


def test_kernels(pictures):
    assert plan_of(pictures).model.attention_backend == "sdpa"
    flash = plan_of(pictures, use_flash_attention="true")  # fp32: PyTorch's kernel for a CPU takes it
    assert flash.model.attention_backend == "sdpa_flash" and "flash" in flash.notes[0]
    assert plan_of(pictures, attention_backend="eager").notes == []


def test_checkpointing_and_kernels_train_alike(tmp_path, pictures, plain):
    losses = run(tmp_path / "block", pictures, gradient_checkpointing="block", max_steps=4).losses
    assert losses == plain.losses[:4]
    for backend in ({"attention_backend": "eager"}, {"use_flash_attention": "true"}):
        name = next(iter(backend))
        losses = run(tmp_path / name, pictures, **backend, max_steps=4).losses
        assert losses == pytest.approx(plain.losses[:4], rel=1e-3)


def test_a_yaml_file_with_sections(tmp_path, pictures):
    path = tmp_path / "config.yaml"
    path.write_text(
        "data:\n  validation_share: 0.25\nmodel:\n  num_heads: 4\ntechniques:\n  decatt_weight: 3\n"
        "training:\n  seeds: 2\nrun_name: from-a-file\n"
    )
    done = run(tmp_path, pictures, config=path, validation_share=None, num_heads=None, max_steps=2)
    assert done.status == 0, done.stderr
    info = done.info
    assert info["run_name"] == "from-a-file" and info["model"]["num_heads"] == 4 and info["decatt_weight"] == 3
    assert info["seeds"] == [2] and info["dataset"]["validation_share"] == 0.25
    settings = parse_settings(Settings, ["--config", str(path), "--num_heads", "8"], sections=SECTIONS)
    assert settings.num_heads == 8
    path.write_text("techniques:\n  decat_weight: 3\n")
    done = run(tmp_path / "wrong", pictures, config=path)
    assert done.status == 2 and "unknown settings: decat_weight" in done.stderr


# --- Mixed-resolution tokens and DeCAtt -------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["pixel_blur", "random", "trained"])
def test_mixed_tokens_train_with_each_scorer(tmp_path, pictures, scorer):
    flags = MIXED | {"scorer": scorer, "epochs": 1} | ({"scorer_epochs": 1} if scorer == "trained" else {})
    first, again = (run(tmp_path / name, pictures, **flags) for name in "ab")
    assert first.losses == again.losses and len(first.losses) == 6
    info = first.info
    assert info["tokens"]["scorer"] == scorer and info["tokens"]["tree"]["num_tokens"] == 25
    assert info["model"]["positions"] == "centres" and info["model"]["patch_values"] == 12
    assert first.path.name == f"local-images-small-fp32-sdpa-mixed-25-{scorer}"
    assert (info["results"]["seeds"][0]["scorer_training_s"] is not None) == (scorer == "trained")
    assert info["results"]["test_accuracy"] == again.info["results"]["test_accuracy"]
    with np.load(first.path / "mosaics.npz") as content, np.load(again.path / "mosaics.npz") as other:
        assert content["images"].shape == content["mosaics"].shape == (8, 3, 32, 32)
        assert content["images"].dtype == np.uint8 and content["sizes"].shape == (8, 25)
        assert content["centres"].shape == (8, 25, 2) and content["min_patch"] == 2 and content["classes"].shape == (8,)
        assert (content["sizes"] ** 2).sum(1).tolist() == [32 * 32] * 8  # they cover the image
        assert set(content["sizes"].flatten().tolist()) <= {2, 4, 8}
        assert all(np.array_equal(content[name], other[name]) for name in content.files)
        difference = np.abs(content["images"].astype(int) - content["mosaics"].astype(int)).mean()
        assert 0 < difference < 60


def test_scorers_choose_other_tokens(tmp_path, pictures):
    flags = MIXED | {"max_steps": 2}
    losses = [run(tmp_path / s, pictures, scorer=s, **flags).losses for s in ("pixel_blur", "random", "trained")]
    assert len({tuple(values) for values in losses}) == 3
    random = [run(tmp_path / f"seed-{s}", pictures, scorer="random", seeds=s, **flags).losses for s in (0, 1)]
    assert random[0] == losses[1] != random[1]


def test_epochs_of_the_scorer_count(tmp_path, pictures):
    flags = MIXED | {"scorer": "trained", "max_steps": 1, "run_name": "x"}
    times = []
    for epochs in (1, 4):
        with patch.object(vit_fit, "train_scorer", wraps=vit_fit.train_scorer) as trained:
            assert run(tmp_path / str(epochs), pictures, scorer_epochs=epochs, **flags).status == 0
        times.append(trained.call_args.kwargs["epochs"])
        assert len(trained.call_args.args[0]) == 220  # the training split alone
    assert times == [1, 4]


def test_decatt_decorrelates(tmp_path, pictures):
    """The same start; with a large weight the term falls, and further than without."""
    flags = {"epochs": 6, "schedule": "constant", "learning_rate": 0.003}
    plain, decatt = (
        run(tmp_path / "plain", pictures, **flags),
        run(tmp_path / "d", pictures, decatt_weight=300, **flags),
    )
    steps, results = decatt.lines(), decatt.info["results"]
    assert decatt.status == 0 and all(0 < row["decorrelation"] < 1 for row in steps)
    assert steps[-1]["decorrelation"] < 0.5 * steps[0]["decorrelation"]
    epochs = decatt.lines("epochs.jsonl")
    assert epochs[0]["decorrelation"] == pytest.approx(np.mean([row["decorrelation"] for row in steps[:6]]))
    before = [one.info["results"]["head_correlation_at_start_squares"] for one in (plain, decatt)]
    assert before[0] == before[1]
    assert results["head_correlation_squares"] < 0.5 * plain.info["results"]["head_correlation_squares"]
    assert steps[0]["loss"] == plain.losses[0] and decatt.path.name.endswith("-decatt-300")
    assert decatt.info["model"]["decorrelated_layers"] == 2


def test_decatt_of_the_first_layers_and_with_mixed_tokens(tmp_path, pictures):
    done = run(tmp_path / "a", pictures, decatt_weight=5, decatt_layers=1, max_steps=2)
    assert done.info["model"]["decorrelated_layers"] == 1
    other = run(tmp_path / "b", pictures, decatt_weight=5, max_steps=2)
    assert done.lines()[0]["decorrelation"] != other.lines()[0]["decorrelation"]
    both = run(tmp_path / "c", pictures, decatt_weight=5, gradient_checkpointing="block", max_steps=2, **MIXED)
    assert both.status == 0 and both.path.name.endswith("block-mixed-25-pixel_blur-decatt-5")


def test_one_head_has_no_correlation(tmp_path, pictures):
    done = run(tmp_path, pictures, num_heads=1, max_steps=2)
    results = done.info["results"]
    assert done.status == 0 and results["head_correlation_squares"] is None
    assert results["test_accuracy_without_a_random_head"] is None


# --- Wrong settings ---------------------------------------------------------------------------------------------------

WRONG = [
    ({"dataset": "mnist"}, "invalid choice: 'mnist'"),
    ({"data_path": "nowhere.npz"}, "nowhere.npz cannot be read"),
    ({"source_size": 32}, "--source_size is for image folders"),
    ({"download": "true"}, "--data_path and --download true exclude each other"),
    ({"num_tokens": 25}, "--num_tokens has no effect without --tokens mixed"),
    ({"min_patch": 2}, "--min_patch has no effect without --tokens mixed"),
    ({"max_patch": 8}, "--max_patch has no effect without --tokens mixed"),
    ({"scorer": "random"}, "--scorer has no effect without --tokens mixed"),
    ({"scorer_epochs": 2}, "--scorer_epochs has no effect without --tokens mixed"),
    (MIXED | {"scorer_epochs": 2}, "--scorer_epochs has no effect without --scorer trained"),
    (MIXED | {"patch_size": 4}, "--patch_size belongs to --tokens uniform"),
    (MIXED | {"positions": "learned"}, "--positions learned needs a regular grid"),
    (MIXED | {"num_tokens": 26}, "--num_tokens 26 has no tree"),
    (MIXED | {"min_patch": 3}, "--max_patch 12"),
    (
        MIXED | {"scorer": "trained", "image_size": 16, "num_tokens": 64},
        "--scorer trained has a feature every 4 pixels",
    ),
    ({"image_size": 18}, "--patch_size 4 does not divide images of 18 pixels; take 1, 2, 3, 6, 9"),
    ({"image_size": 4}, "--image_size must be from 8 to 512"),
    ({"patch_size": 0}, "--patch_size must be at least 1"),
    ({"decatt_layers": 1}, "--decatt_layers has no effect without --decatt_weight"),
    ({"decatt_weight": 0}, "--decatt_weight must be above 0 and finite, not 0"),
    ({"decatt_weight": "nan"}, "--decatt_weight must be above 0 and finite, not nan"),
    ({"decatt_weight": 1, "decatt_layers": 0}, "--decatt_layers must be at least 1"),
    ({"decatt_weight": 1, "decatt_layers": 3}, "--decatt_layers must be from 1 to the 2 layers"),
    ({"decatt_weight": 1, "num_heads": 1}, "--decatt_weight needs at least two heads"),
    ({"use_flash_attention": "true", "attention_backend": "sdpa"}, "exclude each other; give one of them"),
    ({"attention_backend": "flash_attn"}, "--attention_backend flash_attn cannot run here"),
    ({"use_cuda_graphs": "true", "device": "cpu"}, "CUDA graphs need an NVIDIA GPU; leave --use_cuda_graphs out"),
    ({"compile_scope": "block"}, "--compile_scope has no effect without --use_compile true"),
    ({"compile_scope": "block", "use_compile": "true", "gradient_checkpointing": "block"}, "--compile_scope model"),
    ({"use_compile": "true", "attention_backend": "flex"}, "which --use_compile true cannot follow"),
    ({"gradient_checkpointing": "offload"}, "offload needs a GPU"),
    ({"gradient_checkpointing": "selective", "attention_backend": "eager"}, "keeps the output of a fused attention"),
    ({"checkpoint_every": 3}, "--checkpoint_every has no effect without --gradient_checkpointing every_k"),
    ({"gradient_checkpointing": "every_k", "checkpoint_every": 1}, "--checkpoint_every must be at least 2"),
    ({"warm_up_epochs": 2}, "--warm_up_epochs 2 must be fewer than --epochs 2"),
    ({"warm_up_epochs": -1}, "--warm_up_epochs must be at least 0"),
    ({"batch_size": 221}, "--batch_size asks for 221 images, but the training split has only 220; lower it"),
    ({"batch_size": 0}, "--batch_size must be above 0"),
    ({"learning_rate": "nan"}, "--learning_rate must be above 0 and finite"),
    ({"max_steps": 0}, "--max_steps must be at least 1"),
    ({"evaluate_every": 0}, "--evaluate_every must be above 0"),
    ({"tracked_steps": 0}, "--tracked_steps must be above 0"),
    ({"gradient_clip": -1}, "--gradient_clip must be at least 0"),
    ({"average_decay": 1.0}, "--average_decay must be at least 0 and below 1"),
    ({"validation_share": 0.9}, "--validation_share must be more than 0 and at most 0.5"),
    (
        {"augment_operations": 0, "augment_magnitude": 5},
        "--augment_magnitude has no effect without --augment_operations",
    ),
    ({"augment_operations": 9}, "--augment_operations must be 0 to 4"),
    ({"cutout": 17}, "--cutout must be 0 to 16"),
    ({"crop_padding": 16}, "--crop_padding must be 0 to 15"),
    ({"label_smoothing": 1.0}, "--label_smoothing must be at least 0 and below 1"),
    ({"num_heads": 3}, "--embedding_dim 16 is not divisible by --num_heads 3"),
    ({"dropout": 1.0}, "--dropout must be at least 0 and below 1"),
    ({"seeds": "a"}, "--seeds a must be different whole numbers"),
    ({"seeds": "1,1"}, "--seeds 1,1 must be different whole numbers"),
    ({"seeds": "-1"}, "--seeds -1 must be different whole numbers"),
    ({"run_name": "a/b"}, "--run_name must be one folder name"),
    ({"run_name": ".."}, "--run_name must be one folder name"),
    ({"experiment": "a/b"}, "--experiment must be one folder name"),
    ({"gpus": "0"}, "--gpus has no effect without --experiment ablation|tokens|decatt"),
    ({"only": "small"}, "--only has no effect without --experiment ablation|tokens|decatt"),
    ({"device": "cuda"}, "PyTorch finds no NVIDIA GPU here"),
    ({"config": "nowhere.yaml"}, "--config nowhere.yaml cannot be read: No such file"),
]


@pytest.mark.parametrize(("flags", "words"), WRONG, ids=lambda value: str(value)[:60])
def test_wrong_settings_cost_one_sentence_and_leave_nothing(tmp_path, pictures, flags, words):
    if flags.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(tmp_path, pictures, **flags)
    assert done.status == 2 and words in done.stderr, done.stderr + done.stdout
    assert "usage" in done.stderr or done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_written_to(tmp_path, pictures):
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "file", pictures)
    assert done.status == 2 and "--output_folder" in done.stderr and "is not writable" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_name_that_is_taken(tmp_path, pictures):
    assert run(tmp_path, pictures, run_name="x", max_steps=1).status == 0
    again = run(tmp_path, pictures, run_name="x", max_steps=1)
    assert again.status == 2 and "already exists" in again.stderr
    for _ in range(2):
        assert run(tmp_path / "own", pictures, max_steps=1).status == 0
    assert len(list((tmp_path / "own" / "vit").iterdir())) == 2  # without a name: -2, -3, ...


# --- Ends that are not good -------------------------------------------------------------------------------------------


def test_ctrl_c_ends_after_the_step_and_is_noted(tmp_path, pictures, monkeypatch):
    original = Training.training_step

    def interrupted(self, tokens, targets):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, tokens, targets)

    monkeypatch.setattr(Training, "training_step", interrupted)
    done = run(tmp_path, pictures)
    assert done.status == 130 and done.info["status"] == "interrupted" and len(done.lines()) == 3
    assert done.last == {"run": str(done.path), "status": "interrupted"}


def not_json(text: str):
    raise AssertionError(f"{text} is no JSON")


@pytest.mark.parametrize("decatt", [None, 1.0])
def test_a_loss_that_is_not_finite_is_an_error_in_run_json(tmp_path, pictures, decatt):
    done = run(tmp_path, pictures, learning_rate=1e30, schedule="constant", gradient_clip=0, decatt_weight=decatt)
    info = done.info
    assert done.status == 1 and info["status"] == "error" and "\n" not in info["error"]
    assert info["error"].startswith("the loss is not finite in epoch 1; lower --learning_rate")
    assert done.last["status"] == "error" and info["error"] in done.stdout and "Traceback" not in done.stderr
    for line in (done.path / "steps.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=not_json)
    assert done.lines()[-1]["loss"] is None


def test_out_of_memory_is_a_status(tmp_path, pictures, monkeypatch):
    def fail(self, tokens, targets):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Training, "training_step", fail)
    done = run(tmp_path, pictures)
    assert done.status == 1 and done.info["status"] == "oom" and done.last["status"] == "oom"
    assert "out of memory with batch size 36" in done.stdout and "lower --batch_size" in done.stdout


def test_a_bug_is_noted_and_not_hidden(tmp_path, pictures, monkeypatch):
    def fail(self, tokens, targets):
        raise ZeroDivisionError("a bug\nin two lines")

    monkeypatch.setattr(Training, "training_step", fail)
    argv = ["vit_train.py", *words_of(pictures, output_folder=tmp_path)]
    with patch.object(sys, "argv", argv), pytest.raises(ZeroDivisionError):
        vit_train.main()
    (path,) = tmp_path.glob("vit/*/run.json")
    info = json.loads(path.read_text())
    assert (info["status"], info["error"]) == ("error", "a bug")


# --- On a GPU ---------------------------------------------------------------------------------------------------------


def gpu_flags(**more) -> dict:
    shape = {"num_layers": 3, "embedding_dim": 64, "num_heads": 2, "mlp_dim": 128, "batch_size": 64}
    return shape | {"device": "cuda", "epochs": 10, "max_steps": 30, "precision": "bf16"} | more


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"decatt_weight": 10},
        MIXED,
        MIXED | {"scorer": "random"},
        MIXED | {"decatt_weight": 10, "scorer": "trained"},
    ],
    ids=str,
)
def test_gpu_compiled_trains_like_eager(tmp_path, pictures, flags):
    losses = {}
    for compiled in ("false", "true"):
        done = run(tmp_path / compiled, pictures, **gpu_flags(use_compile=compiled, **flags))
        losses[compiled] = done.losses
        assert done.info["precision"] == "bf16" and done.info["results"]["peak_allocated_gib"] > 0
    assert len(losses["true"]) == 30 and losses["true"] == pytest.approx(losses["false"], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("scope", [None, "model", "block"])
@pytest.mark.parametrize(
    "flags", [{"drop_path": 0.2}, MIXED | {"decatt_weight": 10}, {"average_decay": 0.9, "optimizer": "muon"}], ids=str
)
def test_gpu_recorded_steps_are_the_launched_ones(tmp_path, pictures, flags, scope):
    """Over more than one epoch and the schedule, so that each step has its own learning rate.

    Uncompiled bit for bit, with textbook attention: some fused backward passes add in no fixed order.
    """
    compiled = {"attention_backend": "eager"} if scope is None else {"use_compile": "true", "compile_scope": scope}
    more = gpu_flags(**compiled, batch_size=32, epochs=4, warm_up_epochs=1, **flags)
    launched = run(tmp_path / "launched", pictures, **more)
    recorded = run(tmp_path / "recorded", pictures, **more, use_cuda_graphs="true")
    assert recorded.status == 0, recorded.stderr
    assert recorded.losses == pytest.approx(launched.losses, rel=1e-6 if scope is None else 1e-3)
    for key in ("validation_accuracy", "peak_allocated_gib"):
        assert recorded.info["results"][key] == pytest.approx(launched.info["results"][key], abs=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_gpu_flash_trains_like_textbook_attention(tmp_path, pictures, compiled):
    more = {"decatt_weight": 10, "use_compile": compiled}
    flash = run(tmp_path / "flash", pictures, **gpu_flags(use_flash_attention="true", **more))
    eager = run(tmp_path / "eager", pictures, **gpu_flags(attention_backend="eager", **more))
    assert flash.losses == pytest.approx(eager.losses, rel=0.02)
    assert "flash" in flash.info["attention_kernel"] and "eager" in eager.info["attention_kernel"]


@pytest.mark.gpu
def test_gpu_fp32_has_no_flash(tmp_path, pictures):
    done = run(tmp_path, pictures, **gpu_flags(use_flash_attention="true", precision="fp32"))
    assert done.status == 2 and "bf16 and fp16 only" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "tf32", "fp32"])
def test_gpu_precisions(tmp_path, pictures, precision):
    exact = run(tmp_path / "fp32", pictures, **gpu_flags(precision="fp32", attention_backend="eager"))
    done = run(tmp_path / "other", pictures, **gpu_flags(precision=precision))
    assert done.losses == pytest.approx(exact.losses, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["block", "every_k", "selective", "offload"])
def test_gpu_checkpointing_trains_alike_with_less_memory(tmp_path, pictures, method):
    shape = {"num_layers": 6, "patch_size": 1, "decatt_weight": 10, "max_steps": 5}
    plain = run(tmp_path / "none", pictures, **gpu_flags(**shape))
    done = run(tmp_path / method, pictures, **gpu_flags(**shape, gradient_checkpointing=method))
    assert done.losses == pytest.approx(plain.losses, rel=0.01)
    assert done.info["results"]["peak_allocated_gib"] < plain.info["results"]["peak_allocated_gib"]
