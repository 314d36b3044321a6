"""The experiments of patchtst_train.py: many runs, each in a fresh process, and what they say together.

    python patchtst_train.py --patch_size_exp --dataset ETTm1 --data_path ETTm1.csv
    python patchtst_train.py --batch_size_exp --num_workers_exp --dataset ETTm1 --data_path ETTm1.csv
    python patchtst_train.py --horizon_exp --dataset ETTh1 --data_path ETTh1.csv --use_compile true --parallel_runs 4
    python patchtst_train.py --pruning_exp --dataset ETTh1 --data_path ETTh1.csv

patch_size, batch_size, num_workers: an epoch's data time, compute time and total for textbook and fused attention, one
thing changed at a time, both in the same precision (bf16 on a GPU, where flash kernels have no fp32), everything else
as in the course project's configuration (transformers variant: context 512, patches of 12, width 128, 16 heads). The
first epoch warms up, and nothing else runs beside: where a step is a few milliseconds long, a process that only loads
its packages on the same host already shows.
horizon: the published comparison, test MSE and MAE at horizons 96, 192, 336 and 720 with three seeds: PatchTST/42, and
with --context_length 512 PatchTST/64.
pruning: the whole model, static and dynamic pruning, masked and cut, and models of the pruned size from scratch.

A case is a run folder outputs/patchtst/<experiment>-<data set>/<case>; other flags than those of the experiment are
handed on to every case. A case that ended with the same flags is not run again, so the same command goes on after
Ctrl-C; one that ended with other flags is run anew.
"""

from pathlib import Path
from typing import Any

import torch

import case_runner
from case_runner import Case, given_flags, split_list
from run_folder import describe_environment
from utils import SettingsError, read_seeds

PATCH_LENGTHS = (12, 24, 48, 96, 192)
BATCH_SIZES = (32, 64, 128, 256, 512)
WORKERS = ("device", 0, 2, 4, 8, 16)
HORIZONS = (96, 192, 336, 720)
SEEDS = "0,1,2"
PLACE = (  # settings that say where and how to run, not what
    "output_folder",
    "experiment",
    "run_name",
    "config",
    "figures",
    "gpus",
    "only",
    "parallel_runs",
    "cache_folder",
)
TIMED_EPOCHS = 9  # beside one that warms up
FEW_TIMED_EPOCHS = 3  # where an epoch has many steps, with worker processes and without a GPU
LAPTOP = {"embedding_dim": 16, "num_heads": 4, "ffn_dim": 32}  # without a GPU; the shape of the study would take hours

# The pruning study: name, flags, words. "{k}" is 5 of 16 heads, the course project's number, "{half}" half of them.
DYNAMIC = "--prune dynamic --prune_rounds {rounds} --prune_heads_per_layer"  # all train on for as many rounds
PRUNING_CASES = (
    ("whole", "", "all heads"),
    ("static-conservative-1", "--prune static_conservative --prune_heads_per_layer 1", "the first head never there"),
    ("static-random-{k}", "--prune static_random --prune_heads_per_layer {k}", "{k} heads drawn by seed never there"),
    ("dynamic-{k}", f"{DYNAMIC} {{k}}", "{k} heads by gradient importance, cut"),
    ("dynamic-{k}-masked", f"{DYNAMIC} {{k}} --prune_mode masked", "the same, masked"),
    ("dynamic-{k}-weight-norm", f"{DYNAMIC} {{k}} --prune_importance weight_norm", "{k} heads by weight norm, cut"),
    ("dynamic-{half}", f"{DYNAMIC} {{half}}", "half of the heads by gradient importance"),
    ("dynamic-0", f"{DYNAMIC} 0", "control: the same further training, nothing removed"),
    ("static-random-{half}", "--prune static_random --prune_heads_per_layer {half}", "half of them never there"),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------------------------------------


def attention_flags(settings: Any, gpu: bool) -> dict[str, dict[str, str]]:
    """Flags of the two or three kernels that a sweep compares, in one precision."""
    precision = settings.precision or ("bf16" if gpu else "fp32")
    kinds = ("vanilla", "flash", "auto") if gpu else ("vanilla", "flash")
    return {kind: {"attn_type": kind, "precision": precision} for kind in kinds}


def make_cases(name: str, settings: Any, gpu: bool, common: dict[str, str]) -> list[Case]:
    """Every case of an experiment in order; `common` are the flags given by hand."""
    cases: list[Case] = []

    def add(case: str, words: str, *flags: dict[str, Any]) -> None:
        merged = common.copy()
        for part in flags:
            merged |= {key: str(value) for key, value in part.items()}
        cases.append(Case(case, words, merged, "patchtst_train.py"))

    if name in ("patch_size", "batch_size", "num_workers"):
        varied = {"patch_size": "patch_length", "batch_size": "batch_size", "num_workers": "num_workers"}[name]
        for flag in (varied, "attn_type", "attention_backend", "prune", "seeds", "max_steps"):
            if getattr(settings, flag) != type(settings).__dataclass_fields__[flag].default:
                raise SettingsError(f"--{flag} is what --{name}_exp sets itself; leave it out")
        base = {"model_variant": "transformers", "batch_size": 512, "epochs": 1 + TIMED_EPOCHS, "evaluate_on": "none"}
        base |= {"schedule": "constant", "log_every": 50} | ({} if gpu else LAPTOP | {"epochs": 1 + FEW_TIMED_EPOCHS})
        base |= {key: value for key, value in common.items() if key in base}
        values = {"patch_size": PATCH_LENGTHS, "batch_size": BATCH_SIZES, "num_workers": WORKERS}[name]
        label = {"patch_size": "patch", "batch_size": "batch", "num_workers": "workers"}[name]
        for value in values:
            own = {} if value == "device" else {varied: value}
            if name == "num_workers" or (name == "batch_size" and value < 256):
                own["epochs"] = base["epochs"] if "epochs" in common else 1 + FEW_TIMED_EPOCHS
            for kind, flags in attention_flags(settings, gpu).items():
                if kind == "auto" and name == "num_workers":
                    continue
                place = "windows on the device" if value == "device" else f"{label} {value}"
                add(f"{label}-{value}-{kind}", f"{place}, {kind} attention", base | flags | own)
    elif name == "horizon":
        horizons = HORIZONS if settings.horizon is None else (settings.horizon,)
        seeds = read_seeds(settings.seeds or SEEDS)
        for horizon in horizons:
            for seed in seeds:
                flags = {"horizon": horizon, "seeds": seed, "log_every": 50}
                add(f"horizon-{horizon}-seed-{seed}", f"horizon {horizon}, seed {seed}", flags)
    else:
        base = {} if settings.num_heads is not None else {"model_variant": "transformers"} | ({} if gpu else LAPTOP)
        heads = int(settings.num_heads or base.get("num_heads", 16))
        few, half = max(1, heads * 5 // 16), heads // 2
        seeds = read_seeds(settings.seeds or SEEDS)
        for case, flags, words in PRUNING_CASES:
            case, flags, words = (text.format(k=few, half=half, rounds=min(5, few)) for text in (case, flags, words))
            for seed in seeds:
                own = base | case_runner.read_flags(flags) | {"seeds": seed, "log_every": 50}
                add(f"{case}-seed-{seed}", words, own)
    return cases


def folder_of(name: str, settings: Any) -> Path:
    """Where an experiment's cases lie: by data set, and by context where it is given."""
    data = settings.dataset or ("sample" if settings.data_path is None else Path(settings.data_path).name.split(".")[0])
    context = "" if settings.context_length is None else f"-context-{settings.context_length}"
    return Path(settings.output_folder) / settings.experiment / f"{name}-{data}{context}"


# --------------------------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------------------------


def result_line(case: Case, info: dict[str, Any]) -> str:
    """Name, status, times, memory and errors of a case; of one that failed its reason."""
    results = info.get("results") or {}
    line = f"{case.name:<32} {info.get('status', 'missing'):<12}"
    if info.get("status") != "ok":
        return f"{line}{info.get('error') or ''}".rstrip()
    shown = (("epoch_data_s", ".3f", "s data"), ("epoch_compute_s", ".3f", "s compute"))
    shown += (("step_ms_median", ".2f", "ms"), ("peak_allocated_gib", ".3f", "GiB"))
    shown += (("validation_mse", ".4f", "val"), ("test_mse", ".4f", "test MSE"))
    cells = [(results[key], style, unit) for key, style, unit in shown if results.get(key) is not None]
    return line + "  ".join(f"{format(value, style):>8} {unit}" for value, style, unit in cells)


def run(settings: Any, chosen: list[str]) -> int:
    """Run what is left of the experiments, draw their figures and print one JSON object; returns the exit status."""
    names = [name.removesuffix("_exp") for name in chosen]
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu")
    if settings.parallel_runs < 1:
        raise SettingsError(f"--parallel_runs must be at least 1, not {settings.parallel_runs}")
    gpus = split_list(settings.gpus)
    for flag, count in (("parallel_runs", settings.parallel_runs), ("gpus", len(gpus))):
        if count > 1 and not set(names) <= {"horizon", "pruning"}:
            raise SettingsError(f"--{flag} above 1 would spoil the times that the sweeps measure; leave it out")
    if gpus and not gpu:
        raise SettingsError("--gpus needs NVIDIA GPUs, and there is none here; leave it out")
    leave_out = (*PLACE, *chosen)
    common = given_flags(settings, leave_out)
    environment = describe_environment(torch.device("cpu"))
    if gpu:
        environment = case_runner.gpu_environment(gpus[0] if gpus else None, "--device cuda")
    plans = []
    for name in names:
        common_here = {
            key: value for key, value in common.items() if key not in ("seeds", "horizon") or name != "horizon"
        }
        common_here = {key: value for key, value in common_here.items() if key != "seeds" or name != "pruning"}
        cases = make_cases(name, settings, gpu, common_here)
        plans.append((name, folder_of(name, settings), cases))
    return case_runner.run_studies(
        plans,
        environment,
        only=settings.only,
        gpus=gpus,
        parallel_runs=settings.parallel_runs,
        on_gpu=gpu,
        place={"cache_folder": settings.cache_folder},
        result_line=result_line,
        draw=draw if settings.figures else None,
    )


def draw(folder: Path) -> list[Path]:
    """The figures of a finished experiment."""
    import plot_patchtst  # matplotlib takes seconds to load

    return plot_patchtst.plot_experiment(folder)
