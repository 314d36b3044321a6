"""The studies of vit_train.py: many trainings, each case in a fresh process with all its seeds, and what they say.

    python vit_train.py --experiment ablation --dataset cifar10 --data_path cifar10.npz
    python vit_train.py --experiment ablation --dataset cifar100 --download true
    python vit_train.py --experiment tokens --dataset cifar10 --data_path cifar10.npz
    python vit_train.py --experiment decatt --dataset cifar10 --data_path cifar10.npz

ablation: flash attention, DeCAtt and mixed-resolution tokens in all eight combinations, at the same width, token count,
recipe and precision, so that "none of them" is the control that the course project lacked. Beside them its baseline,
which is twice as wide, and a regular grid with the positions that mixed tokens need (waves of the patches' centres), so
that tokens and positions are told apart.
tokens: fewer tokens, where mixed resolution can save compute: 34, 37 and 49 of them by each scorer against regular
grids of 36, 49 and 64. A grid's image is scaled so that its patches have as many numbers (4 x 4 pixels of CIFAR's).
decatt: weights 1, 10 and 100 of the term, and the first three layers only.

A case is a run folder outputs/vit/<study>-<data set>/<case>; other flags than those of the study are handed on to every
case. A case that ended with the same flags is not run again, so the same command goes on after Ctrl-C.
"""

from pathlib import Path
from typing import Any

import torch

import case_runner
from case_runner import Case, given_flags, split_list
from image_set import ImageSet
from run_folder import describe_environment
from utils import SettingsError
from vit_plan import make_recipe

SEEDS = "0,1,2"
EPOCHS = {"ablation": 50, "tokens": 30, "decatt": 50}  # 50 as in the course project
DECATT_WEIGHT = 10
PLACE = ("output_folder", "experiment", "run_name", "config", "figures", "gpus", "only", "cache_folder")
LAPTOP = {"model_size": "tiny"}  # without a GPU; the shape of the study would take days
MIXED_COUNTS = (34, 37, 49)
GRIDS = (6, 7, 8)  # patches a side


def make_cases(name: str, settings: Any, gpu: bool, common: dict[str, str], side: int = 32) -> list[Case]:
    """Every case of a study in order; `common` are the flags given by hand, `side` that of the data's images."""
    cases: list[Case] = []
    base: dict[str, Any] = (
        {"epochs": EPOCHS[name], "use_compile": "true", "use_cuda_graphs": "true", "seeds": SEEDS, "log_every": 50}
        if gpu
        else LAPTOP
    )
    base = {"seeds": SEEDS} | base
    kernels, trees = ("use_flash_attention", "attention_backend"), ("min_patch", "max_patch", "scorer", "scorer_epochs")
    techniques = (*kernels, *trees, "decatt_weight", "decatt_layers", "tokens", "num_tokens")
    varied = {  # what a case sets, and what some cases would refuse
        "ablation": (*techniques, "positions", "patch_size"),
        "tokens": (*kernels, *trees, "tokens", "num_tokens", "image_size", "patch_size", "positions"),
        "decatt": (*kernels, "decatt_weight", "decatt_layers"),
    }[name]
    for flag in varied:
        if getattr(settings, flag) != type(settings).__dataclass_fields__[flag].default:
            raise SettingsError(f"--{flag} is what --experiment {name} sets itself; leave it out")

    def add(case: str, words: str, **flags: Any) -> None:
        merged = {key: str(value) for key, value in (base | flags).items()} | common
        cases.append(Case(case, words, merged, "vit_train.py"))

    eager, flash = {"attention_backend": "eager"}, {"use_flash_attention": "true"}
    if name == "ablation":
        decatt, mixed = {"decatt_weight": DECATT_WEIGHT}, {"tokens": "mixed"}
        large = {"model_size": "large"} if gpu else {"embedding_dim": 128, "num_heads": 4}
        if not {"model_size", "embedding_dim", "num_heads"} & set(common):
            add("large", "baseline of the course project: twice as wide", **(eager | large))
        add("small", "control: none of the three", **eager)
        add("decatt", "DeCAtt", **eager, **decatt)
        add("mixed", "mixed-resolution tokens", **eager, **mixed)
        add("flash", "flash attention", **flash)
        add("mixed+flash", "mixed-resolution tokens, flash attention", **flash, **mixed)
        add("decatt+flash", "DeCAtt, flash attention", **flash, **decatt)
        add("decatt+mixed", "DeCAtt, mixed-resolution tokens", **eager, **decatt, **mixed)
        add("decatt+mixed+flash", "all three", **flash, **decatt, **mixed)
        add("centres", "control of mixed: a regular grid with its positions", **eager, positions="centres")
    elif name == "tokens":
        if side % 8:
            raise SettingsError(f"--experiment tokens needs images whose side 8 divides, not {side}; set --source_size")
        for count in GRIDS:
            grid = {"image_size": count * side // 8, "patch_size": side // 8, "positions": "centres"}
            add(f"grid-{count**2}", f"regular grid of {count**2}", **flash, **grid)
        for count in MIXED_COUNTS:
            add(f"mixed-{count}", f"{count} mixed, pixel blur", **flash, tokens="mixed", num_tokens=count)
        for scorer, words in (("random", "at random"), ("trained", "by a trained network")):
            flags = {"tokens": "mixed", "num_tokens": 49, "scorer": scorer}
            add(f"mixed-49-{scorer}", f"49 mixed, split {words}", **flash, **flags)
    else:
        for weight in (1, 10, 100):
            add(f"weight-{weight}", f"weight {weight}, every layer", **flash, decatt_weight=weight)
        add("weight-10-first-3", "weight 10, first three layers", **flash, decatt_weight=10, decatt_layers=3)
    return cases


def folder_of(name: str, settings: Any) -> Path:
    """Where a study's cases lie: by data set."""
    data = settings.dataset or ("sample" if settings.data_path is None else Path(settings.data_path).name.split(".")[0])
    return Path(settings.output_folder) / "vit" / f"{name}-{data}"


def result_line(case: Case, info: dict[str, Any]) -> str:
    """Name, status, accuracies, time and memory of a case; of one that failed its reason."""
    results = info.get("results") or {}
    line = f"{case.name:<20} {info.get('status', 'missing'):<12}"
    if info.get("status") != "ok":
        return f"{line}{info.get('error') or ''}".rstrip()
    shown = (("parameters", ",", "parameters"), ("validation_accuracy", ".4f", "validation"))
    shown += (("test_accuracy", ".4f", "test"), ("test_accuracy_spread", ".4f", "spread"))
    shown += (("training_minutes", ".2f", "min"), ("images_per_s", ",.0f", "images/s"))
    shown += (("peak_allocated_gib", ".3f", "GiB"), ("head_correlation_squares", ".4f", "C^2"))
    cells = [(results[key], style, unit) for key, style, unit in shown if results.get(key) is not None]
    return line + "  ".join(f"{format(value, style)} {unit}" for value, style, unit in cells)


def check_data(folder: Path, cases: list[Case], images: ImageSet) -> None:
    """Raise if finished cases were trained on other data than what is given now."""
    for case in cases:
        info = case_runner.read_info(folder / case.name) or {}
        before, now = ((source or {}).get("sha256") for source in (info.get("dataset"), images.source))
        if before is not None and now is not None and before != now:
            raise SettingsError(f"{folder} holds results of other images; choose another --output_folder")


def run(settings: Any, name: str, images: ImageSet) -> int:
    """Run what is left of a study, draw its figures and print one JSON object; returns the exit status.

    Args:
        images: what the settings name, as every case will load it.
    """
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu")
    if settings.run_name is not None:
        raise SettingsError(f"--run_name has no effect with --experiment {name}, whose cases are runs; leave it out")
    make_recipe(settings, images)  # what is wrong in every case is said once, before the first process
    gpus = split_list(settings.gpus)
    if gpus and not gpu:
        raise SettingsError("--gpus needs NVIDIA GPUs, and there is none here; leave it out")
    common = given_flags(settings, PLACE)
    environment = describe_environment(torch.device("cpu"))
    if gpu:
        environment = case_runner.gpu_environment(gpus[0] if gpus else None, "--device cuda")
    folder, cases = folder_of(name, settings), make_cases(name, settings, gpu, common, images.image_size)
    check_data(folder, cases, images)
    plans = [(name, folder, cases)]
    return case_runner.run_studies(
        plans,
        environment,
        only=settings.only,
        gpus=gpus,
        on_gpu=gpu,
        place={"cache_folder": settings.cache_folder},
        result_line=result_line,
        draw=draw if settings.figures else None,
    )


def draw(folder: Path) -> list[Path]:
    """The figures of a finished study."""
    import plot_vit  # matplotlib takes seconds to load

    return plot_vit.plot_study(folder)
