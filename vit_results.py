"""What vit_train.py's studies say, for figures and tables: seeds, their noise, and what the course project had.

    from vit_results import seed_noise, seen_by_chance

A difference of two cases counts only beyond the noise of all cases of a study together (`seen_by_chance`): three seeds
of one case know their own spread too badly.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_results import Case, read_experiment

CONTROL = "small"  # the case of the ablation with none of the three techniques
# What the course project measured: accuracy of its best epoch on the test set (%), seconds of an epoch, epochs that
# ran; one seed, fp32 on a V100. A case that is missing here it did not train.
COURSE: dict[str, dict[str, tuple[float, float, int]]] = {
    "cifar10": {
        "large": (78.39, 37.1, 50),
        "decatt": (80.31, 31.2, 50),
        "flash": (79.19, 23.8, 50),
        "mixed+flash": (75.18, 182.3, 35),
        "decatt+flash": (79.62, 24.6, 50),
        "decatt+mixed": (76.70, 131.8, 50),
        "decatt+mixed+flash": (75.55, 138.2, 46),
    },
    "cifar100": {
        "large": (45.72, 37.3, 50),
        "decatt": (51.33, 31.6, 50),
        "flash": (50.50, 24.0, 50),
        "decatt+flash": (49.98, 24.3, 50),
    },
}


def seeds_of(results: dict[str, Any], key: str) -> list[float]:
    """What every seed measured, without those that did not."""
    return [row[key] for row in results.get("seeds") or [] if row.get(key) is not None]


def student(freedom: int) -> float:
    """Student's t of which 95 % lie between -t and t, by degrees of freedom (2: 3 % too small, from 6 on 0.1 %).

    Source: Abramowitz and Stegun 1964, Handbook of Mathematical Functions, 26.7.5.
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def seed_noise(cases: Sequence[dict[str, Any]], key: str = "test_accuracy") -> tuple[float, int]:
    """Deviation of a seed from the mean of its case, over all cases together; and its degrees of freedom."""
    groups = [values for results in cases if len(values := seeds_of(results, key)) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in groups)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def seen_by_chance(noise: tuple[float, int], mine: int, theirs: int) -> float:
    """Largest difference of means of so many seeds that noise alone makes in 95 of 100 comparisons."""
    deviation, freedom = noise
    return student(freedom) * deviation * math.sqrt(1 / mine + 1 / theirs) if freedom else math.nan


def steady_minutes(results: dict[str, Any]) -> list[float]:
    """Minutes of training of each seed without its first step, in which the first seed compiles."""
    rows = results.get("seeds") or []
    return [row["training_minutes"] - (row.get("first_step_ms") or 0) / 60000 for row in rows]


def random_heads(info: dict[str, Any]) -> float | None:
    """Expected C^2 of two heads with random outputs: 1 / (tokens x head_dim)."""
    model = info.get("model")
    if not model:
        return None
    tokens = model["num_tokens"] + (model["pool"] == "class")
    return 1 / (tokens * model["embedding_dim"] // model["num_heads"])


def sibling_control(folder: Path) -> Case | None:
    """The case of the ablation on the same data that differs from this study's by DeCAtt alone; None without one."""
    path = folder.parent / f"ablation-{folder.name.partition('-')[2]}"
    if not (path / "experiment.json").is_file():
        return None

    def flags(case: Case) -> dict[str, str]:
        given = (case.info.get("case") or {}).get("flags") or {}
        given = {name: value for name, value in given.items() if not name.startswith("decatt_")}
        return given | ({"data_path": Path(given["data_path"]).name} if "data_path" in given else {})

    wanted = next((flags(case) for case in read_experiment(folder)[1] if case.ok), None)
    cases = {case.name: case for case in read_experiment(path)[1] if case.ok}
    return next((cases[name] for name in ("flash", CONTROL) if name in cases and flags(cases[name]) == wanted), None)
