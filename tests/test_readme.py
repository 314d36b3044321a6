"""The README's commands, flags, links and list of files exist (its tables: test_report.py)."""

import dataclasses
import json
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attention_benchmark
import case_runner
import compare_techniques
import fp8_benchmark
import fp8_results
import llm_train
import patchtst_benchmark
import patchtst_plan
import patchtst_train
import report_comparison
import report_fp8
import report_parallel
import report_vit
import time_series_dataset
import vit_benchmark
import vit_experiments
import vit_plan
import vit_results
import vit_train
from run_results import read_run
from sample_images import sample_images
from utils import parse_settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_checkpointing_changed_no_loss():
    """The README says bit for bit."""
    plain, checkpointed = (
        [
            json.loads(line)["loss"]
            for line in (ROOT / "outputs" / "llm" / name / "steps.jsonl").read_text().splitlines()
        ]
        for name in ("gpt2-fp32-eager-batch-125", "gpt2-fp32-eager-gradient-checkpointing-batch-125")
    )
    assert len(plain) == 326 and plain == checkpointed


def seed_results(name: str) -> dict:
    """What outputs/seed says about a case at batch 125."""
    return json.loads((ROOT / "outputs" / "seed" / f"{name}-batch-125" / "run.json").read_text())["results"]


def test_what_the_readme_says_about_the_comparison():
    """Sentences beside the generated tables."""
    names = ("everything-fast", "everything-small", "hf-gpt2-compiled", "flash-compile-checkpointing-chunked-loss")
    fast, small, peer, plain = map(seed_results, names)
    for case, sentence in (
        (fast, "`everything-fast` trains {tokens_per_s:,.0f} tokens/s in {peak_allocated_gib:.1f} GiB"),
        (peer, "GPT-2 of transformers makes {tokens_per_s:,.0f} in {peak_allocated_gib:.1f};"),
        (seed_results("flash-compile"), "this lab makes {tokens_per_s:,.0f} in {peak_allocated_gib:.1f}."),
        (small, "`everything-small` trains {tokens_per_s:,.0f} in {peak_allocated_gib:.1f} GiB"),
        (plain, "the plain GELU it is {tokens_per_s:,.0f} in {peak_allocated_gib:.1f}."),
        (seed_results("everything-small-fused-gelu"), "{peak_allocated_gib:.1f} GiB for the same time (`everything"),
    ):
        assert sentence.format(**case) in README
    rate, longest = (
        seed_results("flash-attention-adamw")["tokens_per_s"],
        json.loads((ROOT / "outputs" / "max_batch" / "flash-80-gib" / "run.json").read_text())["results"][
            "tokens_per_s"
        ],
    )
    assert f"{rate:,.0f} with 125, and {longest:,.0f} with 445" in README
    assert f"bring little speed:** {100 * (longest / rate - 1):.0f} % in that example" in README
    assert fast["tokens_per_s"] >= 1.2 * peer["tokens_per_s"]
    assert fast["peak_allocated_gib"] <= peer["peak_allocated_gib"]
    assert small["tokens_per_s"] >= 450_000 and small["peak_allocated_gib"] <= 5
    cases = report_comparison.read_cases(ROOT / "outputs", "max_batch")
    trained = [case for case in cases if case.ok]
    assert f"{len(trained)} of the {len(cases)} answers trained" in README
    largest = next(case.batch for case in trained if case.name == "everything-45-gib")
    assert largest >= 2000 and f"`everything` trains {largest:,} sequences at once" in README


def patchtst_results(experiment: str, case: str) -> dict:
    """What outputs/patchtst says about a case."""
    folder = {"pruning": "pruning-ETTh1"} | {
        name: f"{name}-ETTm1" for name in ("patch_size", "batch_size", "num_workers")
    }
    path = ROOT / "outputs" / "patchtst" / folder.get(experiment, experiment) / case / "run.json"
    return json.loads(path.read_text())["results"]


def test_what_the_readme_says_about_decatt_alone():
    rows = json.loads((ROOT / "outputs" / "techniques" / "decatt" / "run.json").read_text())["results"]["rows"]
    rows = {row["variant"]: row for row in rows}
    ms = {name: row["ms"] for name, row in rows.items()}
    words = (
        "no more time than the textbook form where it is compiled ({:.2f} against {:.2f} ms, {:.2f} without a term) "
    )
    words += "and more where it is not ({:.2f} against {:.2f} ms)"
    names = ("with the term, compiled", "with the textbook term, compiled", "attention, compiled")
    assert words.format(*(ms[name] for name in (*names, "with the term", "with the textbook term"))) in README
    saved = rows["with the textbook term"]["peak_gib"] - rows["with the term"]["peak_gib"]
    assert f"needs {saved:.3f} GiB less" in README


def test_what_the_readme_says_about_cutting_tokens_alone():
    rows = json.loads((ROOT / "outputs" / "techniques" / "mixed_resolution" / "run.json").read_text())["results"][
        "rows"
    ]
    ms = {row["variant"]: row["ms"] for row in rows}
    names = [f"{size} px {kind}, compiled" for kind in ("pixel_blur", "trained", "uniform") for size in (64, 128)]
    words = (
        "takes {:.2f} and {:.2f} ms by pixel blur, {:.2f} and {:.2f} ms by a trained network, and {:.2f} and {:.2f} ms"
    )
    assert f"{words} into a regular grid".format(*(ms[name] for name in names)) in README
    study = ROOT / "outputs" / "vit"
    trainings = [of_vit(*path.parent.relative_to(study).parts) for path in study.glob("*/*mixed*/run.json")]
    cuts = [own["tokenise_ms_median"] for own in trainings if own["tokenise_ms_median"] > 0.1]
    cuts.remove(max(cuts))  # of the trained network
    assert f"recorded in a training, pixel blur takes {min(cuts):.2f} to {max(cuts):.2f} ms" in README


def of_vit(*names: str) -> dict:
    """What outputs/vit says about a run."""
    return json.loads((ROOT / "outputs" / "vit").joinpath(*names, "run.json").read_text())["results"]


def test_what_the_readme_says_about_the_vit_ablation():
    """Sentences beside the generated table."""
    study = ROOT / "outputs" / "vit" / "ablation-cifar10"
    found = {path.parent.name: of_vit(study.name, path.parent.name) for path in study.glob("*/run.json")}
    small, large, flash = found["small"], found["large"], found["flash"]
    decatt, both, mixed = found["decatt"], found["decatt+flash"], found["mixed"]
    points = {name: 100 * (own["test_accuracy"] - small["test_accuracy"]) for name, own in found.items()}
    farthest = max(abs(points[name]) for name in found if name not in ("large", "small"))
    words = (
        "It reaches {:.2f} %, and every combination lies within {:.2f} points of it, where the noise of seeds alone "
    )
    words += "makes two cases of three seeds differ by up to {:.2f} points"
    noise = vit_results.seed_noise(list(found.values()))
    chance = vit_results.seen_by_chance(noise, 3, 3)
    assert all(own["seed_count"] == 3 for own in found.values()) and len(found) == 10
    assert words.format(100 * small["test_accuracy"], farthest, 100 * chance) in README
    assert max(farthest, points["large"]) < 100 * chance
    power = 0.860 * chance / vit_results.student(noise[1])  # 80 % of Student's t lies below 0.860 (20 degrees)
    assert noise[1] == 20
    assert f"A true difference of {100 * (chance + power):.1f} points would exceed that four times in five" in README
    minutes = [sum(vit_results.steady_minutes(own)) for own in (large, small)]
    peaks = [own["peak_allocated_gib"] for own in (large, small, flash, decatt)]
    words = "the wide model is {:.2f} points above the control, less than noise makes, and takes "
    words += "{:.2f} times the time and {:.2f} times the memory"
    assert words.format(points["large"], minutes[0] / minutes[1], peaks[0] / peaks[1]) in README
    course = {name: row[:2] for name, row in vit_results.COURSE["cifar10"].items()}
    assert f"saw DeCAtt {course['decatt'][0] - course['large'][0]:.2f} points above its baseline" in README
    assert f"({course['large'][1]} against {course['flash'][1]} s an epoch)" in README
    words = f"{flash['images_per_s'] / small['images_per_s']:.2f} times the images/s of textbook attention at equal "
    assert f"{words}precision, and a peak of {peaks[2]:.2f} instead of {peaks[1]:.2f} GiB" in README
    squares = [own["head_correlation_squares"] for own in (small, decatt)]
    words = (
        "C^2 falls from {:.1e} to {:.1e} (random outputs have {:.1e}; on training images it ends at {:.1e}), for {} "
    )
    words += "to {} % of the images/s and {:.3f} GiB with textbook attention, no memory with flash"
    path = study / "decatt" / "epochs.jsonl"
    ends = [row["decorrelation"] for row in map(json.loads, path.read_text().splitlines()) if row["epoch"] == 50]
    pairs = [(decatt, small), (both, flash), (found["decatt+mixed"], mixed)]
    pairs += [(found["decatt+mixed+flash"], found["mixed+flash"])]
    lost = [round(100 * (1 - own["images_per_s"] / other["images_per_s"])) for own, other in pairs]
    more = (1 / (65 * 64), statistics.fmean(ends), min(lost), max(lost), peaks[3] - peaks[1])
    assert words.format(*squares, *more) in README
    assert both["peak_allocated_gib"] - peaks[2] < 0.001
    assert f"with a mean |C| of {small['head_correlation_magnitudes']:.3f}" in README
    heads = ("test_accuracy", "test_accuracy_without_a_redundant_head", "test_accuracy_without_a_random_head")
    rows = [
        [100 * row[key] for key in heads]
        for path in (ROOT / "outputs" / "vit").rglob("run.json")
        if path.parent.name != "peer"
        for row in json.loads(path.read_text())["results"]["seeds"]
    ]
    less = [redundant - drawn for _, redundant, drawn in rows]
    lost = [statistics.fmean(row[0] - row[place] for row in rows) for place in (1, 2)]
    words = (
        "costs {:.1f} points if it is the most correlated one and {:.1f} if it is drawn at random: {:.2f} points less, "
    )
    words += "with a standard error of {:.2f}, over all {} trainings of this section"
    error = statistics.stdev(less) / len(less) ** 0.5
    assert words.format(*lost, statistics.fmean(less), error, len(rows)) in README
    eight = {name: own for name, own in found.items() if name not in ("large", "centres")}
    (test, half), (validation, width) = (
        [100 * value for value in report_vit.effect(eight, "mixed", key)]
        for key in ("test_accuracy", "validation_accuracy")
    )
    words = (
        "On validation they are {:.2f} points ahead (+/- {:.2f}), with a higher training loss; test does not confirm"
    )
    assert f"{words} it ({{:+.2f}}, +/- {{:.2f}})".format(validation, width, test, half) in README
    assert validation > width and test < half
    losses = {
        name: statistics.fmean(
            row["train_loss"]
            for row in map(json.loads, (study / name / "epochs.jsonl").read_text().splitlines())
            if row["epoch"] == 50
        )
        for name in (*eight, "centres")
    }
    ahead = [100 * (own["validation_accuracy"] - small["validation_accuracy"]) for own in (found["centres"], mixed)]
    made = 100 * vit_results.seen_by_chance(vit_results.seed_noise(list(found.values()), "validation_accuracy"), 3, 3)
    words = (
        "(loss {:.3f}; learned positions {:.3f}, `mixed` {:.3f}) and is {:.2f} points ahead of learned positions on "
    )
    words += "validation where `mixed` is {:.2f} (seeds alone make {:.2f})"
    assert words.format(*(losses[name] for name in ("centres", "small", "mixed")), *ahead, made) in README
    apart = points["mixed"] - points["centres"]
    assert f"on test `mixed` and `centres` are {apart:.2f} points apart" in README and max(ahead) < made
    assert min(losses, key=losses.get) == "centres"
    with_tokens = {name for name in losses if "mixed" in name}
    assert min(losses[name] for name in with_tokens) > max(losses[name] for name in losses if name not in with_tokens)
    assert f"The first step of `mixed` took {mixed['seeds'][0]['first_step_ms'] / 1000:.0f} s" in README
    assert (
        f"that of `decatt+mixed`, alone, took {found['decatt+mixed']['seeds'][0]['first_step_ms'] / 1000:.0f} s"
        in README
    )
    pairs = [("decatt+mixed", "decatt"), ("decatt+mixed+flash", "decatt+flash"), ("mixed+flash", "flash")]
    longer = [course[tokens][1] / course[without][1] for tokens, without in pairs]
    assert (round(min(longer)), round(max(longer))) == (4, 8) and "took four to eight times as long" in README
    words = "cutting takes {:.2f} ms ({:.2f} with today's code) beside a step of {:.1f} ms"
    cuts = [own["tokenise_ms_median"] for own in (mixed, found["decatt+mixed"])]
    assert words.format(*cuts, mixed["step_ms_median"]) in README


def test_what_the_readme_says_about_fewer_tokens_and_long_runs():
    names = ("grid-36", "grid-49", "grid-64", "mixed-34", "mixed-37", "mixed-49", "mixed-49-random", "mixed-49-trained")
    found = {name: of_vit("tokens-cifar10", name) for name in names}
    few, same, many, fewest, more, mixed, drawn, trained = found.values()
    work, time = (
        few["seeds"][0]["flops_per_image"] / many["seeds"][0]["flops_per_image"],
        few["step_ms_median"] / many["step_ms_median"],
    )
    assert f"(36 instead of 64: {100 * work:.0f} % of the operations, {100 * time:.0f} % of the step's time)" in README
    pairs = ((same, mixed), (few, fewest), (few, more), (mixed, drawn), (mixed, trained))
    below = [100 * (better["test_accuracy"] - own["test_accuracy"]) for better, own in pairs]
    chance = 100 * vit_results.seen_by_chance(vit_results.seed_noise(list(found.values())), 3, 3)
    longer = [own["tokenise_ms_median"] - grid["tokenise_ms_median"] for grid, own in pairs[:3]]
    words = "49 mixed tokens are {:.2f} points below a grid of 49, less than the {:.2f} that the noise of seeds makes "
    words += "here, but 34 and even 37 are {:.2f} and {:.2f} points below a grid of 36; on validation 49 and 37 are "
    words += "level with those grids ({:+.2f} and {:+.2f} points). Cutting them takes {:.2f} to {:.2f} ms longer"
    level = [100 * (own["validation_accuracy"] - grid["validation_accuracy"]) for grid, own in (pairs[0], pairs[2])]
    assert words.format(below[0], chance, *below[1:3], *level, min(longer), max(longer)) in README
    assert below[0] < chance < min(below[1:]) and all(own["seed_count"] == 3 for own in found.values())
    words = "lose far more, {:.2f} points (random) and {:.2f} (a trained network) at 49 tokens"
    assert words.format(*below[3:]) in README
    smallest, whole = [], []
    for name in ("mixed-49-random", "mixed-49-trained", "mixed-49"):
        with np.load(ROOT / "outputs" / "vit" / "tokens-cifar10" / name / "mosaics.npz") as arrays:
            smallest.append(100 * (arrays["sizes"] == 4).mean())
            whole.append(100 * (arrays["sizes"] == 16).sum() / (8 * 16))
            assert arrays["images"].shape == (8, 3, 64, 64) and arrays["sizes"].shape == (8, 49)
    words = (
        "Over eight test images {:.0f} and {:.0f} % of their tokens are patches of 4 of 64 pixels, {:.0f} % of pixel"
    )
    assert words.format(*smallest) in README
    words = "{:.0f} and {:.0f} % of the sixteen largest areas stay whole, {:.0f} % with pixel blur"
    assert words.format(*whole) in README
    better = 100 * (trained["test_accuracy"] - drawn["test_accuracy"])
    assert f"than chance does, and is {better:.2f} points better" in README and smallest[1] > smallest[0]
    parts = []
    for own in (trained, mixed, fewest, more, drawn):
        times = [own[f"{part}_ms_median"] for part in ("tokenise", "step", "augment")]
        parts.append(100 * times[0] / sum(times))
    words = "costs more than a tenth of the time of a step with everything, {:.1f} % (pixel blur {:.1f} %)"
    assert words.format(*parts[:2]) in README and parts[0] > 10 > max(parts[1:])
    steps = [[row["step_ms_median"] for row in own["seeds"]] for own in found.values()]
    apart = 100 * max(max(times) / min(times) - 1 for times in steps)
    assert f"The steps of one case differ by up to {apart:.1f} % between seeds" in README


def test_what_the_readme_says_about_the_long_runs_and_the_peer():
    runs = {path.parent.name: path.parent for path in (ROOT / "outputs" / "vit").glob("best*/run.json")}
    long = {name: of_vit(name) for name in runs}
    own, other = long.pop("best-f"), ("best-a", "best-b", "best-c")
    accuracy, minutes = own["test_accuracy"], own["training_minutes"]
    longer = long.pop("best-g")
    assert set(long) == set(other) and own["seed_count"] == 1 and own["parameters"] == 4197994
    assert accuracy >= 0.93 and minutes <= 6  # the goal
    words = "`best-f` reaches {:.2f} % after {:.2f} minutes of training, {:.2f} of them its first step"
    assert words.format(100 * accuracy, minutes, own["seeds"][0]["first_step_ms"] / 60000) in README
    words = "{:.2f} %, but {:.2f} minutes, {:.2f} of them its first step, are {:.0f} s more than the six"
    first, late = longer["seeds"][0]["first_step_ms"] / 60000, 60 * (longer["training_minutes"] - 6)
    assert words.format(100 * longer["test_accuracy"], longer["training_minutes"], first, late) in README
    assert f"a step of {longer['step_ms_median']:.2f} ms against {own['step_ms_median']:.2f}, and" in README
    last = json.loads((runs["best-b"] / "epochs.jsonl").read_text().splitlines()[-1])
    assert f"({100 * last['train_accuracy']:.1f} % accuracy on them)" in README
    error = 100 * (accuracy * (1 - accuracy) / own["seeds"][0]["test_images"]) ** 0.5
    assert f"{own['seeds'][0]['test_images']:,} test images have a standard error of {error:.2f} points" in README
    assert min(long, key=lambda name: long[name]["test_accuracy"]) == "best-b"
    assert max(long, key=lambda name: long[name]["validation_accuracy"]) == "best-c"
    assert f"gains nothing after epoch {long['best-c']['seeds'][0]['best_epoch']}" in README
    info = json.loads((runs["best-f"] / "run.json").read_text())
    (command,) = [line for line in README.splitlines() if "--run_name best-f" in line]
    words = command.split("vit_train.py")[1].split()
    assert parse_settings(vit_train.Settings, words, sections=vit_train.SECTIONS) == dataclasses.replace(
        vit_train.Settings(**info["settings"]), log_every=10, figures=True, cache_folder=".cache/images"
    )

    peer = json.loads((ROOT / "outputs" / "vit" / "peer" / "run.json").read_text())["results"]["rows"]
    rows = {row["variant"]: row for row in peer}
    ours = {row["backend"]: row for row in peer if row["recorded"] and row["model"] == "this lab"}
    textbook, fused = (rows[f"SimpleViT, {name}, compiled, recorded"] for name in ("textbook", "sdpa"))
    best = ours["short"]
    words = (
        "takes {:.2f} times as long as the package's, which has textbook attention, and {:.2f} times as long as that "
    )
    words += "with PyTorch's choice of a fused kernel: {:.2f} times the images/s of the faster of the two"
    ratios = (best["ms"] / textbook["ms"], best["ms"] / fused["ms"], best["images_per_s"] / fused["images_per_s"])
    assert words.format(*ratios) in README
    assert fused["ms"] < textbook["ms"] and fused["ms"] / best["ms"] >= 1.2  # the goal
    forced = rows["SimpleViT, sdpa_efficient, compiled, recorded"]
    same = ((ours["eager"], textbook), (ours["sdpa_cudnn"], fused), (ours["sdpa_efficient"], forced))
    assert "cudnn" in fused["kernel"] and forced["ms"] < fused["ms"]
    gain = forced["ms"] / best["ms"]
    assert f"forced upon the peer, ours is {gain:.2f} times as fast ({gain:.3f})" in README
    by_kernel = ours["sdpa_efficient"]["ms"] - best["ms"]
    assert 0.5 < by_kernel / (forced["ms"] - best["ms"]) < 0.55 and "a little more than half of the time" in README
    words = "Kernel for kernel they are {:.2f} times (textbook), {:.2f} times (cuDNN's) and {:.2f} times "
    words += "(memory-efficient)"
    assert words.format(*(own["images_per_s"] / theirs["images_per_s"] for own, theirs in same)) in README
    words = "the memory, which is {:.2f}, {:.2f} and {:.2f} times kernel for kernel"
    assert words.format(*(own["peak_gib"] / theirs["peak_gib"] for own, theirs in same)) in README
    launched = [row for row in peer if row["compiled"] and not row["recorded"]]
    base = next(row for row in launched if row["variant"] == "SimpleViT, textbook, compiled")
    own = [row for row in launched if row["model"] == "this lab"]
    slower = [row["ms"] / base["ms"] for row in own]
    plain, theirs = rows["this lab, short"], rows["SimpleViT, sdpa"]
    fastest = next(row for row in launched if row["variant"] == "SimpleViT, sdpa_efficient, compiled")
    assert fastest["ms"] == min(row["ms"] for row in launched)
    best_slower = [row["ms"] / fastest["ms"] for row in own]
    words = (
        "compiled {:.2f} to {:.2f} times the package's time and {:.2f} to {:.2f} times that of its fastest variant, "
    )
    words += "uncompiled {:.2f} times that of the peer with `sdpa`, all in overlapping ranges"
    ratios = (min(slower), max(slower), min(best_slower), max(best_slower), plain["ms"] / theirs["ms"])
    assert words.format(*ratios) in README
    for row, other in [*((row, other) for row in own for other in (base, fastest)), (plain, theirs)]:
        assert min(row["ms_of_rounds"]) < max(other["ms_of_rounds"])
    launched = {row["backend"]: row["ms"] for row in own}
    words = "recorded, `short` is {:.2f} times as fast, launched the two are not told apart ({:.2f} and {:.2f} ms"
    faster = ours["sdpa_efficient"]["ms"] / best["ms"]
    assert words.format(faster, launched["sdpa_efficient"], launched["short"]) in README


@pytest.mark.parametrize("study", ["ablation", "tokens", "decatt"])
def test_the_studies_commands_do_not_run_committed_cases_again(study):
    settings = parse_settings(vit_train.Settings, ["--dataset", "cifar10", "--data_path", "cifar10.npz"])
    folder = ROOT / vit_experiments.folder_of(study, settings)
    given = case_runner.given_flags(settings, vit_experiments.PLACE)
    cases = vit_experiments.make_cases(study, settings, True, given)
    there = [case for case in cases if (folder / case.name).exists()]
    assert all(case_runner.status_of(case, folder) == ("ok", "") for case in there)


def test_what_the_readme_says_about_patchtst():
    """Sentences beside the generated tables, and the goals they report."""
    peer = json.loads((ROOT / "outputs" / "patchtst" / "peer" / "run.json").read_text())["results"]["rows"]
    rows = {row["variant"]: row for row in peer}
    best, theirs = rows["this lab, short, compiled"], rows["transformers, eager, compiled"]
    textbook = rows["this lab, eager, compiled"]
    default = rows["transformers, sdpa, compiled"]
    ratios = {(key, like["variant"]): best[key] / like[key] for key in ("ms", "peak_gib") for like in (theirs, default)}
    words = "takes {:.2f} times as long as the library's with textbook attention, which is the faster of its two, and "
    words += "{:.2f} times as long as with `sdpa`, its default; in memory it is {:.2f} and {:.2f} times"
    assert words.format(*ratios.values()) in README and theirs["ms"] < default["ms"]
    assert f"With the same textbook attention it is {textbook['ms'] / theirs['ms']:.2f} times" in README
    assert best["ms"] <= 0.75 * theirs["ms"] and best["exactness"] == "within rounding"
    measured = json.loads((ROOT / "outputs" / "patchtst" / "peer" / "run.json").read_text())["results"]["rounds"]
    slowest = max(next(row["ms"] for row in measured if row["variant"] == best["variant"]))
    assert f"its slowest compiled round is {slowest / theirs['ms']:.2f} times the library's" in README
    at_42 = [rows[f"this lab, {name}, compiled"]["ms"] / textbook["ms"] for name in ("flash_attn", "sdpa_efficient")]
    words = (
        "flash-attn takes {:.2f} times as long as it, the memory-efficient kernel {:.2f} times, `short` {:.2f} times"
    )
    assert words.format(*at_42, best["ms"] / textbook["ms"]) in README

    errors = {
        horizon: [patchtst_results("horizon-ETTh1", f"horizon-{horizon}-seed-{seed}")["test_mse"] for seed in (0, 1, 2)]
        for horizon in (96, 192, 336, 720)
    }
    mean = {horizon: sum(values) / 3 for horizon, values in errors.items()}
    assert mean[192] <= 0.414 and mean[720] <= 0.449
    assert f"horizon 96 is {mean[96] - 0.375:.4f} above it" in README
    assert f"horizon 336 misses it by {mean[336] - 0.431:.4f}, five times the spread" in README
    assert (mean[336] - 0.431) / (max(errors[336]) - min(errors[336])) == pytest.approx(5, abs=0.5)
    goals = {
        "ETTh1": {96: 0.375, 192: 0.414, 336: 0.431, 720: 0.449},
        "ETTm1": {96: 0.293, 192: 0.333, 336: 0.369, 720: 0.420},
    }

    def seeds_of(experiment: str, horizon: int) -> list[dict[str, Any]]:
        return [patchtst_results(experiment, f"horizon-{horizon}-seed-{seed}") for seed in (0, 1, 2)]

    small = {96: 0.290, 192: 0.332, 336: 0.366, 720: 0.420}  # PatchTST/42 on ETTm1
    large = {96: 0.370, 192: 0.413, 336: 0.422, 720: 0.447}  # PatchTST/64 on ETTh1
    above, spreads, counterpart = {}, {}, {}
    for horizon, goal in goals["ETTh1"].items():
        published = [results["test_in_whole_batches"]["mse"] for results in seeds_of("horizon-ETTh1", horizon)]
        assert sum(published) / 3 <= goal
        own = [results["test_mse"] for results in seeds_of("horizon-ETTm1", horizon)]
        assert sum(own) / 3 <= goals["ETTm1"][horizon]
        long = [results["test_mse"] for results in seeds_of("horizon-ETTh1-context-512", horizon)]
        whole = [results["test_in_whole_batches"]["mse"] for results in seeds_of("horizon-ETTh1-context-512", horizon)]
        above[horizon] = sum(whole) / 3 - large[horizon], sum(long) / 3 - large[horizon]
        spreads["ETTh1", 512, horizon] = max(long) - min(long)
        spreads["ETTm1", 336, horizon] = max(own) - min(own)
        counterpart[horizon] = sum(own) / 3 - small[horizon]
    words = (
        "by {:.4f} to {:.4f} on the published windows and by up to {:.4f} over all of them; the seeds differ by up to"
    )
    whole, long = zip(*above.values(), strict=True)
    words = words.format(min(whole), max(whole), max(long))
    assert f"{words} {max(spreads['ETTh1', 512, horizon] for horizon in small):.4f}" in README
    assert min(whole) > 0 and min(long) > 0
    assert counterpart[96] < 0 and counterpart[720] < 0
    words = "192 is {:.4f} above and 336 is {:.4f} above, both less than the seeds differ"
    assert words.format(counterpart[192], counterpart[336]) in README
    assert all(counterpart[horizon] < spreads["ETTm1", 336, horizon] for horizon in (192, 336))
    first = patchtst_results("horizon-ETTh1", "horizon-96-seed-0")
    assert first["baselines"]["repeat last row"]["mse"] == pytest.approx(1.2944, abs=1e-4)
    assert first["baselines"]["repeat last day"]["mse"] == pytest.approx(0.5122, abs=1e-4)
    assert first["test_windows"] == 2785 == 97 + 2688

    answers = json.loads((ROOT / "outputs" / "patchtst" / "break_even" / "run.json").read_text())["results"]
    found = {answer["question"].split()[2]: answer for answer in answers["break_even"]}
    assert (found["flash_attn"]["low"], found["sdpa_efficient"]["high"], found["short"]["high"]) == (48, 24, 4)

    def total(experiment: str, case: str) -> float:
        return patchtst_results(experiment, case)["epoch_total_s"]

    assert round(100 * (total("patch_size", "patch-12-flash") / total("patch_size", "patch-12-vanilla") - 1)) == 3
    waiting = [("batch_size", f"batch-{batch}") for batch in (32, 64, 128)]
    waiting += [("patch_size", f"patch-{patch}") for patch in (24, 48, 96, 192)]
    medians = [
        patchtst_results(name, f"{case}-{kind}")["step_ms_median"]
        for name, case in waiting
        for kind in ("vanilla", "auto")
    ]
    assert round(min(medians)) == 8 and round(max(medians)) == 14
    shares = {
        (experiment, path.parent.name): json.loads(path.read_text())["results"]
        for experiment in ("patch_size", "batch_size")
        for path in (ROOT / "outputs" / "patchtst" / f"{experiment}-ETTm1").glob("*/run.json")
    }
    shares = {case: results["epoch_data_s"] / results["epoch_total_s"] for case, results in shares.items()}
    usual = [shares["batch_size", f"batch-512-{kind}"] for kind in ("vanilla", "flash", "auto")]
    usual += [shares["patch_size", f"patch-12-{kind}"] for kind in ("vanilla", "flash", "auto")]
    assert f"{100 * min(usual):.1f} to {100 * max(usual):.1f} % of an epoch at batch 512" in README
    assert f"at most {100 * max(shares.values()):.1f} % in any row" in README and max(shares.values()) < 0.01
    workers = {}
    for count in ("device", 0, 2, 4, 8, 16):
        for kind in ("vanilla", "flash"):
            results = patchtst_results("num_workers", f"workers-{count}-{kind}")
            workers[count, kind] = round(100 * results["epoch_data_s"] / results["epoch_total_s"], 1)
    by_workers = [share for (count, _), share in workers.items() if count != "device"]
    assert (min(by_workers), max(by_workers)) == (1.3, 4.3)
    assert {workers["device", kind] for kind in ("vanilla", "flash")} == {0.1}

    steps = json.loads((ROOT / "outputs" / "patchtst" / "pruned_step" / "run.json").read_text())["results"]["rows"]
    extra = {row["variant"]: row["extra_time"] for row in steps if row["extra_time"] is not None}
    cut = [f"{-100 * extra[f'{count} of 16 heads cut{end}']:.1f}" for count in (8, 5) for end in ("", ", compiled")]
    assert "half of the heads out makes the whole step {} % faster, compiled {} %".format(*cut[:2]) in README
    assert "the course project's number, {} and {} %".format(*cut[2:]) in README
    masked = [f"{100 * value:.1f}" for name, value in extra.items() if "masked" in name]
    assert f"makes a step {min(masked)} to {max(masked)} % longer at the same memory" in README

    block = json.loads((ROOT / "outputs" / "techniques" / "head_pruning" / "run.json").read_text())["results"]
    rows = {row["variant"]: row for row in block["rows"]}
    half, masked = rows["8 of 16 structural"], rows["8 of 16 masked"]
    assert f"takes {-100 * half['extra_time']:.1f} % less time and {half['saved_gib']:.3f} GiB less memory" in README
    assert f"half of its heads, {100 * masked['extra_time']:.1f} % more time with them masked" in README
    assert (block["break_even"][0]["low"], block["break_even"][0]["high"]) == (None, 64)
    for row in (half, rows["5 of 16 structural"]):
        assert row["saved_gib"] == pytest.approx(row["formula_saved_gib"], rel=0.02)
        assert row["note"] == "clearly faster"

    def pruned(case: str) -> float:
        return sum(patchtst_results("pruning", f"{case}-seed-{seed}")["test_mse"] for seed in (0, 1, 2)) / 3

    assert f"never there give {pruned('static-random-8'):.4f} against {pruned('whole'):.4f}" in README
    cases = {
        case: [patchtst_results("pruning", f"{case}-seed-{seed}") for seed in (0, 1, 2)]
        for case in ("dynamic-0", "dynamic-5", "dynamic-5-weight-norm", "dynamic-8")
    }
    seeds = {case: [results["test_mse"] for results in group] for case, group in cases.items()}
    words = "the control that only trains on ({:.4f}, {:.4f}, {:.4f}), 5 heads less give {:+.4f}, {:+.4f} and {:+.4f}, "
    words += "8 heads less {:+.4f}, {:.4f} and {:+.4f}"
    pairs = [zip(seeds[case], seeds["dynamic-0"], strict=True) for case in ("dynamic-5", "dynamic-8")]
    less = [own - control for pair in pairs for own, control in pair]
    assert words.format(*seeds["dynamic-0"], *less).replace("-0.0000", "0.0000") in README
    removed = {case: [results["pruning"]["after"] for results in group] for case, group in cases.items()}
    right_after = {case: [part["test_mse"] for part in parts] for case, parts in removed.items() if case != "dynamic-0"}
    means = [sum(values) / 3 for values in right_after.values()]
    each = [value for values in right_after.values() for value in values]
    words = "test error is {:.4f} to {:.4f} in the mean ({:.4f} to {:.4f} among seeds)"
    assert words.format(min(means), max(means), min(each), max(each)) in README
    changes = [
        {key: after[key] - results["pruning"]["before"][key] for key in ("validation_mse", "test_mse")}
        for after, results in zip(removed["dynamic-5"], cases["dynamic-5"], strict=True)
    ]
    worse = sorted(change["test_mse"] for change in changes if change["validation_mse"] < 0)
    assert "two of three seeds while their test error rises by {:.3f} and {:.3f}".format(*worse) in README
    ends = [pruned(case) for case in ("dynamic-5", "dynamic-5-masked", "dynamic-5-weight-norm", "dynamic-8")]
    assert f"back to {min(ends):.4f} to {max(ends):.4f}" in README


def test_every_link_to_a_file_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)]+(?:\([^)]*\)[^)]*)?)\)", README):
        assert (ROOT / target).exists(), target


def commands() -> list[str]:
    text = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL) + re.findall(r"`([^`\n]+)`", README))
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if re.search(r"\w+\.py( |$)", line)]


@pytest.mark.parametrize("command", commands())
def test_every_command_names_a_script_and_flags_that_exist(command):
    words = shlex.split(command.replace("\\|", "|"))
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[place]).exists()
    if words[place] == "attention_benchmark.py" and words[:place] != []:
        settings = parse_settings(attention_benchmark.Settings, words[place + 1 :])
        for name in settings.sweep.split(","):
            axes = attention_benchmark.sweep_axes(name, settings, torch.device("cpu"))
            attention_benchmark.check_lists(name, axes, "fp32")
    if words[place] == "patchtst_train.py" and words[:place] != []:
        settings = parse_settings(patchtst_train.Settings, words[place + 1 :], sections=patchtst_train.SECTIONS)
        patchtst_plan.make_plan(settings)
    if words[place] == "vit_train.py" and words[:place] != []:
        settings = parse_settings(vit_train.Settings, words[place + 1 :], sections=vit_train.SECTIONS)
        if settings.experiment not in vit_train.STUDIES:
            gpu_only = {"use_cuda_graphs": None, "attention_backend": None}
            vit_plan.make_plan(dataclasses.replace(settings, **gpu_only), sample_images(20, 10))
    if words[place] == "llm_train.py" and words[:place] != []:
        settings = parse_settings(llm_train.Settings, words[place + 1 :])
        emulated = settings.precision == "fp8"  # there is no GPU here
        gpu_only = {"use_flash_attention": False, "fp8_emulation": emulated}
        gpu_only |= {"attention_backend": None} if settings.attention_backend == "sdpa_cudnn" else {}
        llm_train.make_plan(dataclasses.replace(settings, **gpu_only))


def test_every_flag_in_the_readme_exists():
    scripts = (llm_train, attention_benchmark, compare_techniques, report_comparison, patchtst_train)
    scripts += (patchtst_benchmark, time_series_dataset, vit_train, vit_benchmark, fp8_benchmark)
    known = {field.name for script in scripts for field in dataclasses.fields(script.Settings)} | {
        "extra",
        "help",
        "picture",
        *("build", "exclusive", "mem"),  # of docker and sbatch
        *("nproc_per_node", "max_restarts"),  # of torchrun
    }
    assert set(re.findall(r"--(\w+)", README)) <= known


def test_the_floors_list_every_script():
    listed = set(re.findall(r"`(\w+\.py)`", README[README.index("## The house") :]))
    assert listed == {path.name for path in ROOT.glob("*.py")}


def fp8_runs() -> dict[str, dict]:
    infos = {path.parent.name: json.loads(path.read_text()) for path in ROOT.glob("outputs/fp8/llama*/run.json")}
    infos |= {path.parent.name: json.loads(path.read_text()) for path in ROOT.glob("outputs/fp8/gpt2*/run.json")}
    return {name: info["results"] for name, info in infos.items() if info["status"] == "ok"}


WIDE = "llama-1b-wide-{}-warm-up-seed-{}"
NARROW = "llama-1b-{}-warm-up-seed-0"


def test_what_the_readme_says_about_fp8():
    results = fp8_runs()
    shares = [results[name]["mfu"] for name in (
        WIDE.format("bf16", 0), "llama-1b-bf16-seed-0", "llama-1b-bf16-seed-1", NARROW.format("bf16"),
    )]  # fmt: skip
    words = (
        "reaches {:.1f} % (`llama-1b-wide`, H100) of the peak; `llama-1b` {:.1f} and {:.1f} % on the H100 and {:.1f} %"
    )
    assert words.format(*(100 * share for share in shares)) in README and min(shares) >= 0.5
    rates = {name: own["tokens_per_s"] for name, own in results.items()}
    other = rates[WIDE.format("bf16", "0-repeat")] / rates[WIDE.format("bf16", 0)]
    assert f"`llama-1b-wide`, differs by {100 * (other - 1):.1f} % in speed" in README
    gain = rates[NARROW.format("fp8-tensorwise")] / rates[NARROW.format("bf16")]
    wides = [rates[WIDE.format("fp8-tensorwise", s)] / rates[WIDE.format("bf16", s)] for s in (1, 0)]
    assert "they are {:.2f} (H200s) and {:.2f} to {:.2f} times (H100).".format(gain, *wides) in README
    cold = [rates["llama-1b-fp8-tensorwise-seed-0"] / rates[f"llama-1b-bf16-seed-{seed}"] for seed in (1, 0)]
    assert "`llama-1b` is {:.2f} to {:.2f} times as fast on the H100".format(*cold) in README
    runs = {run.name: run for run in report_fp8.runs_of(ROOT / "outputs")}
    shares = [
        report_fp8.fp8_share(runs[name])
        for name in (NARROW.format("fp8-tensorwise"), WIDE.format("fp8-tensorwise", 0), "gpt2-fp8-tensorwise")
    ]
    words = "with it, {:.1f} % of the FLOPs of `llama-1b` and {:.1f} % of `llama-1b-wide`"
    assert words.format(*(100 * share for share in shares)) in README
    assert "would be {:.2f} and {:.2f} times as fast".format(*(1 / (1 - share / 2) for share in shares)) in README
    assert f"`gpt2` has {100 * shares[2]:.1f} % of its FLOPs in FP8" in README
    rowwise = rates[WIDE.format("fp8-rowwise", 0)] / rates[WIDE.format("bf16", "0-repeat")]
    assert f"brings `llama-1b-wide` {rowwise:.2f} on H200s" in README
    gpt2 = [rates[f"gpt2-fp8-tensorwise{which}"] / rates["gpt2-bf16"] for which in ("", "-large")]
    assert f"is {gpt2[0]:.2f} times as fast" in README and f"makes it {gpt2[1]:.2f}." in README

    def peaks(*names: str) -> list[float]:
        return [results[name]["peak_allocated_gib"] for name in names]

    words = "{:.1f} instead of {:.1f} GiB for `llama-1b`, {:.1f} instead of {:.1f} for `llama-1b-wide`, "
    words += "{:.1f} instead of {:.1f} for `gpt2`, and not at all with `rowwise` ({:.1f})"
    names = [NARROW.format("fp8-tensorwise"), NARROW.format("bf16")]
    names += [WIDE.format("fp8-tensorwise", 0), WIDE.format("bf16", 0)]
    names += ["gpt2-fp8-tensorwise", "gpt2-bf16", WIDE.format("fp8-rowwise", 0)]
    assert words.format(*peaks(*names)) in README


def test_what_the_readme_says_about_fp8s_loss():
    runs = {run.name: run for run in report_fp8.runs_of(ROOT / "outputs")}

    def found(one: str, other: str) -> tuple[float, float, list[float]]:
        signed = report_fp8.distances(runs[one], runs[other])
        return statistics.fmean(map(abs, signed)), max(map(abs, signed)), signed

    seeds = found(WIDE.format("bf16", 0), WIDE.format("bf16", 1))
    again = found(WIDE.format("bf16", "0-repeat"), WIDE.format("bf16", 0))
    fp8 = [found(WIDE.format("fp8-tensorwise", seed), WIDE.format("bf16", seed)) for seed in (0, 1)]
    words = "lies {:.3f} from itself when it is run again, FP8 {:.3f} and {:.3f} from bf16, another seed {:.3f}."
    assert words.format(again[0], fp8[0][0], fp8[1][0], seeds[0]) in README
    late = [statistics.fmean(map(abs, signed[2:])) for *_, signed in (*fp8, again)]
    assert f"as near to bf16 as bf16 to itself ({late[0]:.3f} and {late[2]:.3f})" in README
    assert f"which was not run again, {late[1]:.3f}." in README
    assert again[0] < min(fp8[0][0], fp8[1][0]) and max(fp8[0][0], fp8[1][0]) < seeds[0]
    assert f"FP8 ({fp8[0][1]:.3f} and {fp8[1][1]:.3f}) and the seeds ({seeds[1]:.3f}) part within" in README
    assert all([*map(abs, signed)].index(largest) < 2 for _, largest, signed in (*fp8, seeds))
    last = [signed[-1] for *_, signed in (*fp8, seeds)]
    assert "level ({:.3f} and {:.3f} against {:.3f})".format(*map(abs, last)) in README and last[0] * last[1] < 0

    one, other = (runs[NARROW.format(kind)] for kind in ("fp8-tensorwise", "bf16"))
    losses = [row["loss"] for row in one.steps]
    assert f"rises from {losses[96]:.1f} to {losses[103]:.1f} within seven updates" in README
    assert max(row["loss"] for row in other.steps[96:104]) < 7.2
    *_, signed = found(one.name, other.name)
    assert max(signed[:4]) < 0 and f"after 300 updates it is still {signed[-1]:.2f} above" in README
    cold = [found(f"llama-1b-{kind}-seed-{seed}", "llama-1b-bf16-seed-0")[0] for kind, seed in (
        ("fp8-tensorwise", 0), ("fp8-tensorwise-head", 0), ("bf16", 1),
    )]  # fmt: skip
    words = "({:.3f}, and {:.3f} with the head in FP8) while two seeds of bf16 lay {:.3f} apart"
    assert words.format(*cold) in README

    base = runs[WIDE.format("bf16", "0-repeat")]
    mean, _, signed = found(WIDE.format("fp8-rowwise", 0), base.name)
    assert f"is below bf16 by {mean:.2f} on the mean" in README and f"by {-signed[-1]:.2f} at the end" in README
    assert max(signed) < 0 and 2 < mean / seeds[0] < 2.2
    late = {name: max(row["loss"] for row in runs[name].steps[20:50]) for name in (base.name, one.name)}
    assert f"goes up to {late[base.name]:.1f} again" in README
    assert max(row["loss"] for row in runs[WIDE.format("fp8-rowwise", 0)].steps[20:50]) < 8.3


def test_what_the_readme_says_about_the_width_at_which_fp8_pays():
    rows = fp8_results.read_rows(ROOT / "outputs")
    assert {(row["device_name"], row["status"]) for row in rows} == {("NVIDIA H200", "ok")}
    assert {row["n"] for row in rows} == {str(3 * fp8_benchmark.Settings().repeats)} == {"30"}
    clocks = [int(row["clock_mhz"]) for row in rows]
    assert f"between {min(clocks):,} and {max(clocks):,} MHz" in README
    # 132 cores of 4,096 bf16 operations in a cycle: 989.4 TFLOP/s at 1,830 MHz
    faster = [
        row for row in rows if row["variant"] == "bf16" and float(row["tflops"]) > 0.54067 * int(row["clock_mhz"])
    ]
    assert [row["question"] for row in faster] == ["layers"] * 2
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        own = groups.setdefault((row["question"], row["name"], row["width"]), [])
        own.append(float(row["ms"] if row["variant"] == "bf16" else row["bf16_ms"]))
    spread = {
        question: [100 * (max(own) / min(own) - 1) for key, own in groups.items() if key[0] == question]
        for question in fp8_results.QUESTIONS
    }
    worst, middle = ([pick(values) for values in spread.values()] for pick in (max, statistics.median))
    words = "up to {:.0f} % between the rounds of different recipes ({:.0f} % in the middle), that of layers by "
    words += "{:.0f} % ({:.0f} %), of blocks by {:.0f} % ({:.0f} %)"
    assert words.format(*(number for pair in zip(worst, middle, strict=True) for number in pair)) in README
    found = {(row["question"], int(row["inputs"] or 0), int(row["outputs"] or 0), row["variant"]): row for row in rows}

    def of(inputs: int, outputs: int) -> tuple[list[float], float, float]:
        """Times of products and layer, bf16's of the same rounds; what the products gain; what the casts take of it."""
        pair = [found[question, inputs, outputs, "tensorwise"] for question in ("products", "layers")]
        times = [float(row[key]) for row in pair for key in ("bf16_ms", "ms")]
        saved = times[0] - times[1]
        return times, saved, saved - (times[2] - times[3])

    times, saved, casts = of(768, 3072)
    words = "take {:.2f} ms in bf16 and {:.2f} in FP8. But the layer as a whole takes {:.2f} and {:.2f}"
    assert words.format(*times) in README
    assert f"{casts:.2f} ms by subtraction" in README and casts > saved
    _, saved, casts = of(4096, 16384)
    assert f"the products gain {saved:.1f} ms and the casts take {casts:.1f} of them" in README
    _, saved, casts = of(16384, 4096)
    assert f"from 16,384 to 4,096 they take {casts:.1f} of {saved:.1f}" in README
    tensorwise = [row for row in rows if row["question"] == "products" and row["variant"] == "tensorwise"]
    assert {row["clear"] for row in tensorwise} == {"yes"}
    rule = [float(found["layers", *shape, "tensorwise"]["speedup"]) for shape in ((768, 3072), (3072, 768))]
    assert rule[0] < rule[1] < 1
    blocks = {(row["name"], row["variant"]): row for row in rows if row["question"] == "blocks"}
    kept = {key: float(row["kept_gib"]) for key, row in blocks.items()}
    words = "leaves {:.3f} instead of {:.3f} GiB for its backward pass, but {:.3f} in the recipe"
    assert words.format(*(kept["gpt2", name] for name in ("tensorwise", "bf16", "rowwise_with_gw_hp"))) in README

    def gain(name: str, variant: str = "tensorwise") -> float:
        return 100 * (float(blocks[name, variant]["speedup"]) - 1)

    assert (
        f"{gain('llama-1b'):.0f} % at 2,048 in the median" in README and f"{gain('llama-8b'):.0f} % at 4,096" in README
    )
    assert [blocks[name, "tensorwise"]["clear"] for name in ("llama-1b", "llama-8b")] == ["no", "yes"]
    assert f"is level at 2,048 and has {gain('llama-8b', 'rowwise'):.0f} % at 4,096" in README
    assert max(abs(gain("gpt2-xl")), abs(gain("llama-1b", "rowwise"))) < 1.5 and gain("gpt2-large") < 0
    half = [gain(name, "rowwise_with_gw_hp") for name in ("llama-1b", "llama-8b")]
    assert "`rowwise_with_gw_hp` has {:.0f} and {:.0f} %, both clearly".format(*half) in README
    assert {blocks[name, "rowwise_with_gw_hp"]["clear"] for name in ("llama-1b", "llama-8b")} == {"yes"}
    assert all(gain(name) < 0 for name in ("gpt2", "gpt2-medium", "gpt2-large"))


def test_what_the_readme_says_about_several_gpus():
    names = ("one-gpu", "ddp-2", "fsdp-2", "ddp-4", "fsdp-4")
    runs = {name: read_run(ROOT / f"outputs/parallel/wide-{name}") for name in names}
    rates = {name: run.info["results"]["tokens_per_s"] for name, run in runs.items()}
    times = {name: rate / rates["one-gpu"] for name, rate in rates.items()}
    words = "DDP trains {:.2f} times as many tokens a second as one, FSDP {:.2f} times** ({:.1f} % less than DDP)"
    less = 100 * (1 - rates["fsdp-2"] / rates["ddp-2"])
    assert words.format(times["ddp-2"], times["fsdp-2"], less) in README
    assert f"On four it is {times['ddp-4']:.2f} and {times['fsdp-4']:.2f} times**" in README

    def losses(name: str) -> list[float]:
        return [row["loss"] for row in read_run(ROOT / "outputs/parallel" / name).steps]

    def held(name: str) -> float:
        return max(row["start_allocated_gib"] for row in runs[name].memory if row["phase"] == "forward_pass")

    first = [abs(a - b) for a, b in zip(losses("wide-ddp-2"), losses("wide-fsdp-2"), strict=True)]
    assert max(first[:7]) < 0.001 < max(first[:8]) and max(first) > 1
    formula = report_parallel.formula_gib(runs["ddp-2"]) - report_parallel.formula_gib(runs["fsdp-2"])
    words = f"holds {held('ddp-2') - held('fsdp-2'):.1f} GiB less**, where the formula says {formula:.1f}"
    assert words in README
    assert f"FSDP holds {held('fsdp-4'):.2f} GiB a GPU instead of DDP's {held('ddp-4'):.1f}" in README
    inside, outside = losses("in-backward"), losses("resumed")
    assert len(inside) == 8 and max(abs(a - b) for a, b in zip(inside, outside, strict=False)) < 0.0001
    (resumed,) = json.loads((ROOT / "outputs/parallel/resumed/run.json").read_text())["resumed"]
    assert resumed["step"] == 12 and len(outside) == 18
