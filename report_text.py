"""How the tables of the README show numbers, words and files, and how the files behind them are read."""

import csv
import json
import re
from pathlib import Path
from typing import Any

from utils import SettingsError

ROOT = Path(__file__).parent


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """Words that Markdown shows as they are."""
    return re.sub(r"([_*|])", r"\\\1", text)


def shown(value: float | str | None, digits: int = 3, style: str = "") -> str:
    """Significant digits, never 1e+03; a status as it is; "-" for what was not measured. style "+" shows the sign."""
    if value is None or isinstance(value, str):
        return value or "-"
    large = abs(value) >= 10 ** (digits - 1)
    return format(value, f"{style},.0f") if large else format(value, f"{style}#.{digits}g").rstrip(".")


def signed(value: float | None) -> str:
    """An effect: its sign and three decimals, one from 10 on, none from 1000 on."""
    if value is None:
        return "-"
    decimals = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
    return format(value, f"+,.{decimals}f")


def not_run(what: str, command: str) -> str:
    """What stands in a table's place while there are no results."""
    return f"Not run yet: {what} (`{command}`)."


def percent(value: float | None, decimals: int = 1, sign: str = "") -> str:
    """A share as "12.3 %", with sign "+" as "+12.3 %"; "-" for what was not measured."""
    return "-" if value is None else f"{100 * value:{sign}.{decimals}f} %"


def place(path: Path) -> str:
    """The path as a reader of the repository knows it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SettingsError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{place(path)} is missing, so its table cannot be made") from None
    except ValueError as error:
        raise SettingsError(f"{place(path)} is damaged: {error}") from None


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as text.

    Raises:
        SettingsError: the file is missing.
    """
    if not path.is_file():
        raise SettingsError(f"{place(path)} is missing, so its table cannot be made")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
