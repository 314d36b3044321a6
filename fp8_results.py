"""The results.csv of fp8_benchmark.py: its columns, its rows read from all runs, and the width from which FP8 pays."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from precision import FP8_RECIPES
from run_results import read_object
from utils import SettingsError

QUESTIONS = ("products", "layers", "blocks")
SHAPES = (("square", 1, 1), ("expand", 1, 4), ("contract", 4, 1))  # name, inputs and outputs in widths
SHAPE_WORDS = {
    "square": "d to d", "expand": "d to 4 d", "contract": "4 d to d",
    "gpt2": "block of GPT-2", "llama": "block of Llama",
}  # fmt: skip
FACTS = ("device_name", "question", "name", "width", "tokens")  # of rows that are compared
COLUMNS = (
    "question", "name", "width", "tokens", "inputs", "outputs", "variant", "status", "ms", "ms_p20", "ms_p80", "n",
    "tflops", "bf16_ms", "speedup", "clear", "clock_mhz", "kept_gib", "peak_gib", "error",
)  # fmt: skip


def break_even(rows: Iterable[dict[str, Any]], question: str) -> list[dict[str, Any]]:
    """For each shape or family of models, number of tokens and recipe: from which width on FP8 was faster.

    Faster is a row whose `clear` is "yes": each round took less time than each of bf16's. `slower_at` is the largest
    width at which it was not, `faster_from` the next one measured; null where there is none. Rows without a comparison
    (out of memory, throttled, no bf16) count for neither and stand in `not_measured`.
    """
    groups: dict[tuple, list[tuple[int, str | None]]] = {}
    for row in rows:
        if row["question"] == question and row["variant"] in FP8_RECIPES:
            group = groups.setdefault((family(row), row["tokens"], row["variant"]), [])
            group.append((row["width"], row["clear"] or None))
    answers = []
    for (name, tokens, recipe), points in groups.items():
        points.sort(key=lambda point: point[0])
        lost = [width for width, clear in points if clear == "no"]
        won = [width for width, clear in points if clear == "yes" and (not lost or width > lost[-1])]
        answers.append(
            {
                "question": question,
                "name": name,
                "tokens": tokens,
                "recipe": recipe,
                "slower_at": lost[-1] if lost else None,
                "faster_from": won[0] if won else None,
                "not_measured": [width for width, clear in points if clear is None],
            }
        )
    return answers


def family(row: dict[str, Any]) -> str:
    """The shape of a layer ("square"), or the family of models whose block it is ("llama")."""
    return row["name"].split("-")[0]


def in_words(answer: dict[str, Any]) -> str:
    """An answer of break_even: "2,048 (not yet at 1,024)", "not up to 4,096"."""
    lost, won = answer["slower_at"], answer["faster_from"]
    if won is not None:
        words = f"{won:,}" + (f" (not yet at {lost:,})" if lost else ", the smallest")
    else:
        words = "-" if lost is None else f"not up to {lost:,}"
    missing = ", ".join(f"{width:,}" for width in answer["not_measured"])
    return words + (f"; not measured: {missing}" if missing else "")


def read_rows(outputs: Path, question: str | None = None) -> list[dict[str, str]]:
    """Rows of the benchmark, of one question or of all, with their GPU (`device_name`).

    All runs count, finished or not. What is compared is of one run: a GPU's rows of one name, width and number of
    tokens are the newest run's that has more than one of them (or any, if no run has more).

    Raises:
        SettingsError: a file is damaged.
    """
    runs = [read_object(path) | {"folder": path.parent} for path in (outputs / "fp8").glob("*/run.json")]
    groups: dict[tuple, list[dict[str, str]]] = {}
    for run in sorted(runs, key=lambda run: str(run.get("started_at"))):
        path, own = run["folder"] / "results.csv", {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):  # a kill can cut off the last line
            if not {"bf16_ms", "clear", "clock_mhz"} <= row.keys():
                raise SettingsError(f"{path} is of an older fp8_benchmark.py; measure again, or move its folder away")
            try:
                for key in ("width", "tokens", "n"):
                    int(row[key])
                for key in ("inputs", "outputs"):
                    int(row[key] or 0)
                for key in ("ms", "speedup", "clock_mhz", "kept_gib", "peak_gib"):
                    float(row[key] or 0)
                row["variant"], row["status"], row["clear"]
            except (KeyError, TypeError, ValueError) as error:
                raise SettingsError(f"{path} holds a row that fp8_benchmark.py did not write: {error}") from None
            row["device_name"] = str(run.get("device_name"))
            own.setdefault(tuple(row[key] for key in FACTS), []).append(row)
        for key, found in own.items():
            if len(found) > 1 or len(groups.get(key, [])) < 2:
                groups[key] = found
    rows = [row for group in groups.values() for row in group]
    found = [row for row in rows if question in (None, row["question"])]
    orders = (QUESTIONS, [name for name, *_ in SHAPES], ("bf16", *FP8_RECIPES))

    def place(row: dict[str, str]) -> tuple:
        words = [
            order.index(word) if word in order else -1
            for order, word in zip(orders, (row["question"], row["name"], row["variant"]), strict=True)
        ]
        numbers = float(row["tokens"]), float(row["width"])
        return words[0], row["device_name"], words[1], *numbers, row["name"], words[2]

    return sorted(found, key=place)
