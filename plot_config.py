"""Draw the comparison that one YAML file describes: which runs, under which labels, and which figures.

    python plot.py --config plot_configs/flash_attention.yaml       paths in the file begin where the command is run

    title: Flash attention          # of every figure
    output_folder: outputs/plots/flash_attention
    figures: [tokens_per_s, peak_memory, mfu, training_time, loss_against_steps, loss_against_tokens,
              loss_against_minutes]
    baseline: bf16                  # optional, a label: bars say "1.24x", loss curves show the difference to it
    warm_up_steps: 10               # optional: tokens/s, MFU and step time are medians of the steps after these;
                                    # left out, they are those of the steps that the run itself timed
    smoothing_steps: 10             # optional: a loss curve is the running mean of so many steps
    runs:
      - {label: bf16, folders: [outputs/a-seed-0, outputs/a-seed-1]}        # several folders are seeds
      - {label: fp8, folder: outputs/b, colour: "#D55E00"}                  # the colour is optional

Warm-up, smoothing and n are printed in the figures. A run that ended with `oom`, `error` or `unsupported` is a cross
with its status. A wrong key, label or folder is one sentence. plot_config_bars.py and plot_config_losses.py draw.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure

from figure_parts import LINE_COLOURS, save
from plot_config_bars import Comparison, Group, memory_figure, mfu_figure, speed_figure, time_figure
from plot_config_losses import loss_figure
from run_results import read_run
from utils import SettingsError

FIGURES: dict[str, Callable[[Comparison], Figure]] = {
    "tokens_per_s": speed_figure,
    "peak_memory": memory_figure,
    "mfu": mfu_figure,
    "training_time": time_figure,
    "loss_against_steps": lambda comparison: loss_figure(comparison, "steps"),
    "loss_against_tokens": lambda comparison: loss_figure(comparison, "tokens"),
    "loss_against_minutes": lambda comparison: loss_figure(comparison, "minutes"),
}
SPEED_FIGURES = ("tokens_per_s", "mfu", "training_time", "loss_against_minutes")  # not for emulated fp8

REQUIRED = {"title": str, "output_folder": str, "figures": list, "runs": list}
OPTIONAL = {"baseline": str, "warm_up_steps": int, "smoothing_steps": int}
RUN_KEYS = {"label": str, "folder": str, "folders": list, "colour": str}
WORDS = {str: "text", int: "a whole number", list: "a list"}


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: the second would silently replace the first, and drop a run."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [str(key) for key, count in Counter(map(str, keys)).items() if count > 1]
        if twice:
            raise SettingsError(f"{twice[0]} is given twice in the mapping that ends in line {node.end_mark.line}")
        return super().construct_mapping(node, deep)


def read_config(path: Path) -> Comparison:
    """Read and check the YAML file; no run folder is opened.

    Raises:
        SettingsError: the file is missing or malformed, or has a wrong key, value, label or figure; one sentence.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=StrictLoader)  # a SafeLoader
        return checked(content, Path(path))
    except OSError as error:
        raise SettingsError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    except SettingsError as error:
        raise SettingsError(f"--config {path}: {error}") from None


def checked(content: Any, path: Path) -> Comparison:
    """The file's content as a comparison. Raises SettingsError without the file's name."""
    check_mapping(content, REQUIRED | OPTIONAL, "the file")
    for key in REQUIRED:
        if not content.get(key):
            raise SettingsError(f"{key} is missing or empty")
    wrong = [str(name) for name in content["figures"] if name not in list(FIGURES)]  # a list has no hash
    if wrong:
        raise SettingsError(f"figures has unknown names: {', '.join(wrong)}; known are {', '.join(FIGURES)}")
    for key, least in (("warm_up_steps", 0), ("smoothing_steps", 1)):
        if content.get(key, least) < least:
            raise SettingsError(f"{key} must be at least {least}, not {content[key]}")
    groups = [checked_group(entry, place) for place, entry in enumerate(content["runs"])]
    for what, values in (
        ("figures", content["figures"]),
        ("label", [group.label for group in groups]),
        ("folder", [folder for group in groups for folder in group.folders]),
    ):
        twice = [str(value) for value, count in Counter(values).items() if count > 1]
        if twice:
            raise SettingsError(f"{what} {twice[0]} is named twice; every one has its place once")
    labels = [group.label for group in groups]
    baseline = content.get("baseline")
    if baseline is not None and baseline not in labels:
        raise SettingsError(f"baseline {baseline} is no label of runs; the labels are {', '.join(labels)}")
    return Comparison(
        path=path,
        title=content["title"],
        output_folder=Path(content["output_folder"]),
        figures=content["figures"],
        groups=groups,
        baseline=baseline,
        warm_up_steps=content.get("warm_up_steps"),
        smoothing_steps=content.get("smoothing_steps", 1),
    )


def check_mapping(content: Any, kinds: dict[str, type], what: str) -> None:
    """Raise SettingsError unless `content` is a mapping with no other keys than `kinds` and values of their types."""
    if not isinstance(content, dict):
        raise SettingsError(f"{what} is not a mapping of keys to values; its keys are {', '.join(kinds)}")
    unknown = [str(key) for key in content if key not in kinds]
    if unknown:
        raise SettingsError(f"{what} has unknown keys: {', '.join(unknown)}; known are {', '.join(kinds)}")
    for key, value in content.items():
        if not isinstance(value, kinds[key]) or isinstance(value, bool):  # to Python, true is the whole number 1
            raise SettingsError(f"{key} of {what} must be {WORDS[kinds[key]]}, not {value!r}")


def checked_group(entry: Any, place: int) -> Group:
    """One entry of runs; `place` counts from 0 and chooses the colour where none is given."""
    what = f"entry {place + 1} of runs"
    check_mapping(entry, RUN_KEYS, what)
    if not entry.get("label"):
        raise SettingsError(f"{what} has no label")
    if ("folder" in entry) == ("folders" in entry):
        raise SettingsError(f"{what} ({entry['label']}) needs either folder or, for several seeds, folders")
    folders = entry.get("folders", [entry.get("folder")])
    if not folders or not all(isinstance(folder, str) and folder for folder in folders):
        raise SettingsError(f"{what} ({entry['label']}) has a folder that is not the path of a run folder")
    colour = entry.get("colour", LINE_COLOURS[place % len(LINE_COLOURS)])
    if not is_color_like(colour):
        raise SettingsError(f"colour {colour} of {what} ({entry['label']}) is no colour; write one like '#0072B2'")
    return Group(entry["label"], colour, [Path(folder) for folder in folders])


def read_runs(comparison: Comparison) -> None:
    """Read every run folder of the comparison. Raises SettingsError: one is missing or damaged, or has no speed."""
    timed = [name for name in comparison.figures if name in SPEED_FIGURES]
    for group in comparison.groups:
        where = f"--config {comparison.path}, label {group.label}"
        try:
            group.runs = [read_run(folder) for folder in group.folders]
        except SettingsError as error:
            raise SettingsError(f"{where}: {error}") from None
        for run in group.runs:
            if timed and (run.info.get("fp8") or {}).get("emulated"):
                raise SettingsError(
                    f"{where}: {run.folder} is emulated fp8, which has no speed to show; take it out of runs, or "
                    f"{', '.join(timed)} out of figures"
                )


def plot_config(path: Path, output_folder: Path | None = None) -> list[Path]:
    """Write the figures that the YAML file asks for, each as <name>.png, and return their paths.

    Args:
        path: the YAML file.
        output_folder: takes the place of the file's own.

    Raises:
        SettingsError: the file or a run folder is wrong; nothing is written then.
    """
    comparison = read_config(path)
    read_runs(comparison)
    figures = {name: FIGURES[name](comparison) for name in comparison.figures}
    folder = output_folder or comparison.output_folder
    return [save(figure, folder / f"{name}.png") for name, figure in figures.items()]
