"""The figures of vit_train.py: drawn from made-up run folders, with the values, crosses and labels they must show."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import figure_parts
import plot_vit
import plot_vit_studies
import vit_results
from plot_vit import plot_run, plot_study
from run_results import read_experiment
from utils import SettingsError

PNG = b"\x89PNG"
ABLATION = ("large", "small", "decatt", "mixed", "flash", "mixed+flash", "decatt+flash", "decatt+mixed")
ABLATION += ("decatt+mixed+flash", "centres")


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch):
    monkeypatch.setattr(figure_parts, "DPI", 30)


def correlation(layers: int, heads: int, level: float) -> dict:
    matrix = np.full((heads, heads), level)
    np.fill_diagonal(matrix, 1.0)
    squares = [level**2 * (1 + layer / layers) for layer in range(layers)]
    return {"images": 100, "squares": squares, "magnitudes": [level] * layers, "matrices": [matrix.tolist()] * layers}


def write_run(folder: Path, *, accuracies=(0.78, 0.8), status="ok", weight=0.0, scorer=None, tokens=64, heads=3,
              layers=2, epochs=3, data="cifar10", augmentation=None, seconds=1.0, **more) -> None:  # fmt: skip
    """A run folder as vit_train.py leaves it; with another status than ok without results."""
    folder.mkdir(parents=True)
    own = correlation(layers, heads, 0.02 if weight else 0.2)
    known = heads > 1
    seeds = [
        {"seed": seed, "epochs": epochs, "best_epoch": max(1, epochs - seed), "validation_accuracy": accuracy + 0.01}
        | {"test_accuracy": accuracy, "test_loss": 1 - accuracy, "training_minutes": seconds * (1 + 0.1 * seed)}
        | {"images_per_s": 1000.0 / seconds, "step_ms_median": 10.0 * seconds, "flops_per_image": 5e8}
        | {"head_correlation_at_start": correlation(layers, heads, 0.1) if known else None}
        | {"head_correlation": own if known else None}
        for seed, accuracy in enumerate(accuracies)
    ]
    results = {"seed_count": len(seeds), "test_accuracy": float(np.mean(accuracies)), "peak_allocated_gib": 1.5}
    results |= {"training_minutes": 1.05 * seconds, "images_per_s": 1000 / seconds, "step_ms_median": 10 * seconds}
    results |= {"tokenise_ms_median": 2.5, "head_correlation_squares": float(np.mean(own["squares"])), "seeds": seeds}
    info = {
        "status": status,
        "run_name": folder.name,
        "device_name": "a GPU",
        "precision": "bf16",
        "batch_size": 512,
        "dataset": {"name": data},
        "decatt_weight": weight,
        "model": {"num_tokens": tokens, "pool": "class", "embedding_dim": 64 * heads, "num_heads": heads}
        | {"decorrelated_layers": layers if weight else 0},
        "tokens": {"kind": "mixed" if scorer else "uniform", "scorer": scorer},
        "recipe": {"augmentation": augmentation or {}},
        "results": results if status == "ok" else None,
    }
    (folder / "run.json").write_text(json.dumps(info | more))
    rows = [
        {"seed": seed, "epoch": epoch, "train_loss": 2 / epoch, "train_accuracy": accuracy - 0.3 / epoch}
        | {"validation_accuracy": accuracy - 0.2 / epoch + 0.1, "validation_loss": 1.5 / epoch}
        | {"decorrelation": 0.01 / epoch if weight else None}
        for seed, accuracy in enumerate(accuracies)
        for epoch in range(1, epochs + 1)
    ]
    if status == "ok":
        (folder / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = "start_allocated_gib,peak_allocated_gib,end_allocated_gib,start_reserved_gib,peak_reserved_gib"
        memory = "2,forward_pass,0.1,1.0,0.9,2.0,2.0\n2,training_step,0.1,1.5,0.1,2.0,2.0\n"
        (folder / "memory.csv").write_text(f"step,phase,{columns}\n{memory}")


def write_study(folder: Path, study: str, cases: dict[str, dict]) -> Path:
    for name, options in cases.items():
        write_run(folder / name, **options)
    rows = [
        {"name": name, "words": f"words of {name}", "status": options.get("status", "ok")}
        for name, options in cases.items()
    ]
    (folder / "experiment.json").write_text(json.dumps({"experiment": study, "cases": rows}))
    return folder


def write_mosaics(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 16, 16), dtype=np.uint8)
    sizes = np.array([[8, 8, 8, 4, 4, 4, 4]] * 2)
    corners = np.array([[[8, 0], [0, 8], [8, 8], [0, 0], [4, 0], [0, 4], [4, 4]]] * 2)
    centres = (corners + sizes[..., None] / 2) / 4
    names = np.array(["cat", "dog"])
    np.savez(folder / "mosaics.npz", images=images, mosaics=images, sizes=sizes, centres=centres, classes=names,
             min_patch=4)  # fmt: skip


def ablation(**other: dict) -> dict[str, dict]:
    """Two seeds a case, DeCAtt where the name says so."""
    return {name: {"weight": 10.0 if "decatt" in name else 0.0} | other.get(name, {}) for name in ABLATION}


def texts(figure) -> str:
    """Every word of a figure."""
    found = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return "\n".join(found)


def crosses(ax) -> list:
    return [line for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata())]


# ---------------------------------------------------------------------------------------------------- one run


def test_a_run_gets_every_figure_that_its_files_allow(tmp_path):
    write_run(tmp_path / "plain", heads=1)
    assert [path.name for path in plot_run(tmp_path / "plain")] == ["accuracy_curves.png", "memory_per_phase.png"]
    write_run(tmp_path / "mixed", scorer="pixel_blur")
    write_mosaics(tmp_path / "mixed")
    paths = plot_run(tmp_path / "mixed")
    assert [path.name for path in paths][2:] == ["head_correlation.png", "mosaics.png"]
    assert all(path.read_bytes()[:4] == PNG for path in paths)


def test_accuracy_curves_show_seeds_best_epochs_and_test(tmp_path):
    write_run(tmp_path / "run", augmentation={"mixup_alpha": 0.8})
    figure = plot_vit.accuracy_figure(tmp_path / "run")
    left, right = figure.axes
    labels = left.get_legend_handles_labels()[1]
    assert "training (mixed images: of the larger part)" in labels and "best epoch: 3, 2" in labels
    assert "test, best weights: 79.00 % (mean of 2 seeds)" in labels
    assert right.get_legend_handles_labels()[1][-1] == "test, best weights: 0.210 (mean of 2 seeds)"
    best = [line.get_xydata().tolist()[0] for line in left.lines if line.get_marker() == "v"]
    assert best == [[3, pytest.approx(100 * (0.78 - 0.2 / 3 + 0.1))], [2, pytest.approx(100 * (0.8 - 0.1 + 0.1))]]
    assert "a GPU | bf16 | batch 512 | data: cifar10 | n = 2 seeds" in texts(figure)
    assert left.get_ylabel() == "accuracy (%)" and right.get_ylabel() == "cross-entropy (nats)"


def test_one_validation_is_a_point_and_no_best_epoch(tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "epochs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = max(row["epoch"] for row in rows)
    for row in rows:
        if row["epoch"] < last:
            row |= {"validation_accuracy": None, "validation_loss": None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    for row in info["results"]["seeds"]:
        row["best_epoch"] = last
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    for ax in plot_vit.accuracy_figure(tmp_path / "run").axes:
        labels = ax.get_legend_handles_labels()[1]
        assert f"validation, epoch {last}" in labels and "validation" not in labels
        assert len([line for line in ax.lines if line.get_marker() == "v"]) == len(info["results"]["seeds"])
    (tmp_path / "run" / "run.json").write_text(json.dumps(info | {"status": "running", "results": None}))
    labels = plot_vit.accuracy_figure(tmp_path / "run").axes[0].get_legend_handles_labels()[1]
    assert "validation" in labels  # a run that goes on keeps its line


def test_a_run_that_failed_before_its_first_epoch_is_a_cross(tmp_path):
    write_run(tmp_path / "run", status="oom")
    (ax,) = plot_vit.accuracy_figure(tmp_path / "run").axes
    assert len(crosses(ax)) == 1 and "the run's status is oom" in ax.texts[0].get_text()
    assert len(plot_run(tmp_path / "run")) == 2


def test_correlation_shows_every_layer_twice_and_the_random_heads(tmp_path):
    write_run(tmp_path / "run", weight=10.0, layers=3)
    figure = plot_vit.correlation_figure(plot_vit.read_run(tmp_path / "run"))
    maps = [ax for ax in figure.axes if ax.images]
    drawn = [ax.images[0].get_array() for ax in maps]
    assert all(np.isnan(np.diag(values.filled(np.nan))).all() for values in drawn)
    highest = max(values.max() for values in drawn)  # of pairs
    assert len(maps) == 6 and len({ax.images[0].get_clim() for ax in maps}) == 1
    assert highest <= maps[0].images[0].get_clim()[1] < highest + 0.05 + 1e-9
    assert maps[0].images[0].get_array()[0].tolist() == [None, 0.1, 0.1]
    assert maps[5].images[0].get_array()[0].tolist() == [None, 0.02, 0.02]
    words = texts(figure)
    assert "DeCAtt, weight 10" in words and "after training (mean over layers 0.020)" in words
    assert f"random heads: {(2 / np.pi / (65 * 64)) ** 0.5:.3f}" in words


def test_mosaics_have_the_borders_of_all_tokens(tmp_path):
    write_run(tmp_path / "run", scorer="pixel_blur", tokens=7)
    write_mosaics(tmp_path / "run")
    figure = plot_vit.mosaic_figure(tmp_path / "run")
    below = figure.axes[2]
    boxes = [(*patch.get_xy(), patch.get_width()) for patch in below.patches]
    assert len(boxes) == 7 and (8, 0, 8) in boxes and (4, 4, 4) in boxes
    assert figure.axes[1].get_title() == "dog"
    assert "7 tokens of 4, 8 pixels in images of 16 x 16, scorer pixel_blur" in texts(figure)
    (tmp_path / "run" / "mosaics.npz").write_bytes(b"no archive")
    with pytest.raises(SettingsError, match="damaged: it does not hold images, mosaics, sizes") as caught:
        plot_vit.mosaic_figure(tmp_path / "run")
    assert "pickle" not in str(caught.value)
    np.savez(tmp_path / "run" / "mosaics.npz", images=np.zeros(3))
    with pytest.raises(SettingsError, match="damaged: it does not hold"):
        plot_vit.mosaic_figure(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------ studies


def test_ablation_shows_seeds_control_course_and_failures(tmp_path):
    options = ablation(**{"mixed": {"status": "oom"}, "flash": {"accuracies": (0.7, 0.72)}})
    folder = write_study(tmp_path / "ablation-cifar10", "ablation", options)
    names = ["accuracy.png", "curves.png", "time.png", "head_correlation.png"]
    paths = plot_study(folder)
    assert [path.name for path in paths] == names and all(path.read_bytes()[:4] == PNG for path in paths)
    _, cases = read_experiment(folder)
    figure = plot_vit_studies.ablation_accuracy(cases)
    theirs, ax = figure.axes
    assert [tick.get_text().split("\n")[0] for tick in theirs.get_yticklabels()] == list(ABLATION)
    dots = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "o"]
    assert len(dots) == 9 and [[70, 4], [72, 4]] in dots
    assert [line.get_ydata()[0] for line in crosses(ax)] == [3] and crosses(ax)[0].get_xdata()[0] > 1  # beside the axes
    assert sorted(line.get_xdata()[0] for line in theirs.lines if line.get_marker() == "D") == sorted(
        course[0] for course in vit_results.COURSE["cifar10"].values()
    )
    chance = 100 * 2.262 * 0.02**0.5 / 10  # Student's t with 9 degrees of freedom; every case's deviation is sqrt(2) %
    words = texts(figure)
    for expected in ("71.00 %", "oom", "75.18\n(35 of 50 epochs)", f"small +/- {chance:.2f}", "n = 2 seeds a case"):
        assert expected in words
    band = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (band.x0, band.x1) == (pytest.approx(79 - chance, abs=2e-3), pytest.approx(79 + chance, abs=2e-3))


def test_curves_of_a_long_training_begin_late(tmp_path):
    folder = write_study(tmp_path / "ablation-x", "ablation", ablation())
    cases = read_experiment(folder)[1]
    for case in cases:
        case.epochs[:] = [row | {"epoch": epoch} for epoch in range(1, 51) for row in case.epochs if row["epoch"] == 1]
    figure = plot_vit_studies.curves_figure(cases)
    assert all(line.get_xdata()[0] == 20 and line.get_xdata()[-1] == 50 for line in figure.axes[0].lines)
    assert "from epoch 20 on" in texts(figure)


def test_cost_is_shown_against_the_control(tmp_path):
    folder = write_study(
        tmp_path / "ablation-x", "ablation", ablation(large={"seconds": 2.0}, decatt={"status": "error"})
    )
    figure = plot_vit_studies.cost_figure(read_experiment(folder)[1])
    minutes, rate, peak = figure.axes
    assert [len(crosses(ax)) for ax in figure.axes] == [1, 1, 1]
    assert "2.1 (x 2.00)" in texts(figure).replace("2.100", "2.1") and "500.0 (x 0.50)" in texts(figure)
    assert "minutes" in minutes.get_xlabel() and "images/s" in rate.get_xlabel() and "GiB" in peak.get_xlabel()


def test_curves_and_correlation_of_a_study(tmp_path):
    folder = write_study(tmp_path / "ablation-x", "ablation", ablation(flash={"status": "unsupported"}))
    cases = read_experiment(folder)[1]
    left, right = plot_vit_studies.curves_figure(cases).axes
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    assert list(lines["small"]) == pytest.approx([100 * (0.79 + 0.1 - 0.2 / epoch) for epoch in (1, 2, 3)])
    assert "flash: unsupported" in lines and len(lines) == 10 and "loss" in right.get_ylabel()
    left, right = plot_vit_studies.study_correlation(cases).axes
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    assert list(lines["small"]) == pytest.approx([0.04, 0.06]) and list(lines["decatt"]) == pytest.approx([4e-4, 6e-4])
    assert lines[f"random heads, 1 / (tokens x head dim) = {1 / 65 / 64:.1e}"][0] == pytest.approx(1 / 65 / 64)
    assert {line.get_label() for line in right.lines if len(line.get_xdata()) == 3} == {
        n for n in ABLATION if "dec" in n
    }
    assert left.get_yscale() == right.get_yscale() == "log"


def token_cases() -> dict[str, dict]:
    found = {
        f"grid-{count}": {"tokens": count, "accuracies": (0.01 * count, 0.02 + 0.01 * count)} for count in (36, 49)
    }
    found["mixed-34"] = {"tokens": 34, "scorer": "pixel_blur"}
    found["mixed-49-random"] = {"status": "oom", "tokens": 49, "scorer": "random"}
    return found | {"mixed-49-trained": {"tokens": 49, "scorer": "trained"}}


def test_tokens_stand_by_number_and_scorer(tmp_path):
    folder = write_study(tmp_path / "tokens-cifar10", "tokens", token_cases())
    assert [path.name for path in plot_study(folder)] == ["accuracy.png", "time.png"]
    cases = read_experiment(folder)[1]
    (ax,) = plot_vit_studies.tokens_accuracy(cases).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines["regular grid"] == [[36, pytest.approx(37)], [49, pytest.approx(50)]]
    assert [x for x, _ in lines["mixed, split by pixel blur"]] == [34]  # beside others only where there are others
    assert [x for x, _ in lines["mixed, split by a trained network"]] == [49 + 2 * 0.35]
    assert len(crosses(ax)) == 1 and "mixed-49-random: oom" in texts(ax.figure)
    (ax,) = plot_vit_studies.tokens_time(cases).axes
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_height()) for bar in ax.patches]
    assert (0, 0, 10) in bars and (0, 10, 2.5) in bars and len(bars) == 8 and len(crosses(ax)) == 1
    assert "34 tokens\nmixed-34" in texts(ax.figure) and "ms" in ax.get_ylabel()


def test_weights_stand_beside_the_control_of_the_ablation(tmp_path):
    options = {f"weight-{weight}": {"weight": float(weight)} for weight in (1, 10)}
    options |= {"weight-100": {"status": "error"}, "weight-10-first-3": {"weight": 10.0}}
    folder = write_study(tmp_path / "decatt-cifar10", "decatt", options)
    assert vit_results.sibling_control(folder) is None
    assert [path.name for path in plot_study(folder)] == ["weights.png", "head_correlation.png"]
    write_study(tmp_path / "ablation-cifar10", "ablation", ablation(flash={"accuracies": (0.6, 0.62)}))
    control = vit_results.sibling_control(folder)
    assert control.name == "flash"
    figure = plot_vit_studies.weights_figure(read_experiment(folder)[1], control)
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.lines}
    assert lines["every layer"].get_xydata().tolist() == [[1, pytest.approx(79)], [10, pytest.approx(79)]]
    assert lines["without DeCAtt (ablation, flash): mean and range"].get_ydata()[0] == pytest.approx(61)
    assert len(crosses(left)) == 1 and "weight-100: error" in texts(figure) and "first 2 layers" in lines
    assert left.get_xscale() == right.get_xscale() == "log"


def test_a_study_in_which_nothing_ran_is_drawn(tmp_path):
    studies = {"ablation": ABLATION, "tokens": ("grid-36", "mixed-34"), "decatt": ("weight-1", "weight-10-first-3")}
    for study, names in studies.items():
        folder = write_study(tmp_path / f"{study}-x", study, {name: {"status": "error"} for name in names})
        for name in names:
            (folder / name / "run.json").unlink()
        assert all(path.read_bytes()[:4] == PNG for path in plot_study(folder))


def test_cases_that_were_refused_before_they_began_are_drawn(tmp_path):
    """Their run.json says little more than why."""
    studies = {"ablation": ABLATION, "tokens": ("grid-36", "mixed-34"), "decatt": ("weight-1", "weight-10-first-3")}
    for study, names in studies.items():
        folder = write_study(tmp_path / f"{study}-x", study, {name: {"status": "unsupported"} for name in names})
        for name in names:
            info = json.loads((folder / name / "run.json").read_text())
            kept = {key: info[key] for key in ("status", "run_name", "device_name")}
            (folder / name / "run.json").write_text(json.dumps(kept | {"error": "one head"}))
        assert all(path.read_bytes()[:4] == PNG for path in plot_study(folder))


# ------------------------------------------------------------------------------------------- command line


def test_main_decides_by_experiment_json(tmp_path, monkeypatch, capsys):
    folder = write_study(tmp_path / "tokens-x", "tokens", {"grid-36": {"tokens": 36}})
    monkeypatch.setattr(sys, "argv", ["plot_vit.py", str(folder), str(folder / "grid-36")])
    assert plot_vit.main() == 0
    out = capsys.readouterr().out
    assert str(folder / "time.png") in out and str(folder / "grid-36" / "accuracy_curves.png") in out
    monkeypatch.setattr(sys, "argv", ["plot_vit.py"])
    assert plot_vit.main() == 2 and "python plot_vit.py" in capsys.readouterr().out


def test_what_is_no_training_or_lacks_epochs_is_refused(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    path, info = tmp_path / "run" / "epochs.jsonl", json.loads((tmp_path / "run" / "run.json").read_text())
    path.write_text(path.read_text().splitlines()[0] + "\n{")
    monkeypatch.setattr(sys, "argv", ["plot_vit.py", str(tmp_path / "run")])
    with pytest.raises(SettingsError, match="damaged: it has 1 lines, not one for each epoch"):
        plot_vit.main()
    for results in ({"rows": []}, {}):
        (tmp_path / "run" / "run.json").write_text(json.dumps(info | {"results": results}))
        with pytest.raises(SettingsError, match="holds no training of vit_train"):
            plot_vit.main()
    assert not list((tmp_path / "run").glob("*.png"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no run.json"),
        ("{", "damaged"),
        ('{"cases": 3}', "damaged: it has no experiment with cases"),
        ('{"experiment": "ablation", "cases": [{}]}', "damaged: a case has no 'name'"),
        ('{"experiment": "horizon", "cases": []}', "no study of vit_train"),
    ],
)
def test_errors_are_one_sentence(tmp_path, monkeypatch, content, words):
    if content is not None:
        (tmp_path / "experiment.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["plot_vit.py", str(tmp_path)])
    with pytest.raises(SettingsError, match=words):
        plot_vit.main()
    if content is None:
        with pytest.raises(SettingsError, match=r"no experiment\.json"):
            plot_study(tmp_path)
