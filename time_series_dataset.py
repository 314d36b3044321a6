"""Time series for forecasting: read and check a CSV, split and standardise it, and cut windows out of it on the device.

    python time_series_dataset.py                                      the built-in sample: splits, windows, baselines
    python time_series_dataset.py --dataset ETTh1 --download true      fetch the published file, checksum compared
    python time_series_dataset.py --data_path mine.csv --context_length 96 --horizon 24

A series is a table: a date column and channels of numbers, a row every so many minutes. It is split by time into
train, validation and test; every channel is standardised with the mean and the standard deviation (ddof 0) of the train
rows alone, and errors are those of the standardised channels. A window is context_length rows that a model sees and
`horizon` rows that it forecasts; validation and test begin context_length rows early, so that their first forecast is
their first row, and every window of a split counts, the last batch however small.

The whole series lies on the device (ETTm1: 2 MB) and windows are gathered by their numbers, so that fetching a batch is
one kernel. Cutting them one by one in worker processes, as most projects do, is here as `WindowLoader`, to be measured.

Sources: Zhou et al. 2021, Informer, arXiv 2012.07436 (ETT and its split of 12, 4 and 4 months of 30 days); Wu et al.
2021, Autoformer, arXiv 2106.13008 (Traffic, 70, 10 and 20 %); the names of the files are theirs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from time_series_files import DATASETS, Series, load_series
from utils import SettingsError, parse_settings, run_script, setting

SPLITS = ("ratio", "ett_hourly", "ett_quarter_hourly")
MONTH = {"ett_hourly": 30 * 24, "ett_quarter_hourly": 30 * 24 * 4}  # rows
GATHER_BYTES = 64 * 2**20  # of windows that are gathered by one kernel


# --------------------------------------------------------------------------------------------------------------------
# Splits, standardisation, windows
# --------------------------------------------------------------------------------------------------------------------


def default_split(name: str) -> str:
    """How the published results of a dataset split it."""
    return "ett_hourly" if name.startswith("ETTh") else "ett_quarter_hourly" if name.startswith("ETTm") else "ratio"


def split_borders(split: str, rows: int, context_length: int) -> dict[str, tuple[int, int]]:
    """First row and row after the last of train, validation and test; the latter two hold the context before them.

    Args:
        split: ratio (70, 10 and 20 % of the rows), ett_hourly or ett_quarter_hourly (12, 4 and 4 months of 30 days;
            the rows after them are not used).
        rows: of the series.
        context_length: rows that a model sees.

    Raises:
        SettingsError: an unknown split, or fewer rows than the months of ETT.
    """
    if split not in SPLITS:
        raise SettingsError(f"--split {split} is unknown; choose one of {', '.join(SPLITS)}")
    if split == "ratio":
        first, last = int(0.7 * rows), rows
        second = rows - int(0.2 * rows)
    else:
        first, second, last = (months * MONTH[split] for months in (12, 16, 20))
        if rows < last:
            raise SettingsError(
                f"--split {split} needs {last:,} rows (20 months of 30 days) and the series has {rows:,}"
            )
    return {
        "train": (0, first),
        "validation": (max(0, first - context_length), second),
        "test": (max(0, second - context_length), last),
    }


@dataclass
class Windows:
    """One split, standardised, on the device.

    Attributes:
        name: train, validation or test.
        values: (rows, channels) fp32 on the device.
        context_length, horizon: rows that a model sees, and that it forecasts.
        first_row: of `values` in the series.
    """

    name: str
    values: torch.Tensor
    context_length: int
    horizon: int
    first_row: int

    def __post_init__(self) -> None:
        self.view = self.values.unfold(0, self.context_length + self.horizon, 1)  # (windows, channels, rows), no copy

    def __len__(self) -> int:
        return len(self.view)

    def batch(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows by number: inputs (batch, context_length, channels) and targets (batch, horizon, channels)."""
        cut = self.view[numbers]  # (batch, channels, context_length + horizon)
        inputs, targets = cut.split([self.context_length, self.horizon], dim=2)
        return inputs.transpose(1, 2), targets.transpose(1, 2)

    def batches(self, order: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The whole batches of an epoch, as `batch` gives them; several are gathered at once (GATHER_BYTES at most)."""
        window_bytes = (self.context_length + self.horizon) * self.values.shape[1] * 4
        together = max(1, GATHER_BYTES // (window_bytes * batch_size)) * batch_size
        for numbers in order[: len(order) // batch_size * batch_size].split(together):
            inputs, targets = self.batch(numbers)
            yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        """(windows,) the numbers in the order of an epoch, on the device: a function of seed and epoch."""
        generator = np.random.default_rng([seed, epoch])
        return torch.from_numpy(generator.permutation(len(self))).to(self.values.device)


@dataclass
class SeriesData:
    """A series split and standardised: `splits` by name, and what run.json says about it."""

    series: Series
    splits: dict[str, Windows]
    mean: np.ndarray  # (channels,) of the train rows
    std: np.ndarray  # (channels,) of the train rows, 1 for a channel that never changes there
    description: dict[str, Any]


def split_series(
    series: Series, *, context_length: int, horizon: int, device: torch.device, split: str | None = None
) -> SeriesData:
    """Split a series, standardise it with its train rows and lay it on the device.

    Raises:
        SettingsError: a split too short for one window.
    """
    if min(context_length, horizon) < 1:
        raise SettingsError("--context_length and --horizon must be at least 1")
    split = split or default_split(series.source["name"])
    borders = split_borders(split, len(series.values), context_length)
    for name, (begin, end) in borders.items():
        if end - begin < context_length + horizon:
            raise SettingsError(
                f"the {name} split has {end - begin:,} rows, and a window needs context_length + horizon = "
                f"{context_length:,} + {horizon:,}; lower --context_length or --horizon, or use a longer series"
            )
    begin, end = borders["train"]
    mean, std = series.values[begin:end].mean(0), series.values[begin:end].std(0)
    constant = std <= 1e-12 * np.maximum(1, np.abs(mean))
    std = np.where(constant, 1.0, std)
    values = torch.from_numpy(((series.values - mean) / std).astype(np.float32)).to(device)
    splits = {
        name: Windows(name, values[begin:end], context_length, horizon, begin) for name, (begin, end) in borders.items()
    }
    description = series.source | {
        "rows": len(series.values),
        "channels": len(series.columns),
        "columns": series.columns[:32],
        "constant_in_train": [name for name, same in zip(series.columns, constant, strict=True) if same],
        "first_date": str(series.dates[0]),
        "interval_s": int(series.interval / np.timedelta64(1, "s")),
        "split": split,
        "borders": {name: list(ends) for name, ends in borders.items()},
        "windows": {name: len(windows) for name, windows in splits.items()},
    }
    return SeriesData(series, splits, mean, std, description)


# --------------------------------------------------------------------------------------------------------------------
# Worker processes, to be measured
# --------------------------------------------------------------------------------------------------------------------


class WindowDataset(Dataset):
    """Windows cut one by one out of host memory: (inputs (context_length, channels), targets (horizon, channels))."""

    def __init__(self, windows: Windows):
        self.values, self.context_length = windows.values.cpu(), windows.context_length
        self.length, self.rows = len(windows), windows.context_length + windows.horizon

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.values[number : number + self.rows]
        return window[: self.context_length], window[self.context_length :]


class GivenOrder(Sampler):
    """The numbers of `order`, which may be another tensor in every epoch."""

    def __init__(self) -> None:
        self.order = torch.zeros(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())

    def __len__(self) -> int:
        return len(self.order)


class WindowLoader:
    """PyTorch's DataLoader over a split, as forecasting projects use it: the same batches as `Windows.batch` gives.

    Args:
        windows: the split.
        batch_size: windows in a batch; the last, smaller batch is left out.
        num_workers: processes that cut windows; 0: the training process cuts them itself.
    """

    def __init__(self, windows: Windows, batch_size: int, num_workers: int):
        self.device, self.sampler = windows.values.device, GivenOrder()
        self.loader = DataLoader(
            WindowDataset(windows),
            batch_size=batch_size,
            sampler=self.sampler,
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=num_workers > 0,
            drop_last=True,
            generator=torch.Generator().manual_seed(0),  # or it would draw its seeds from the model's dropout
        )

    def batches(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch in this order of windows, on the device of the split."""
        self.sampler.order = order
        for inputs, targets in self.loader:
            yield inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)


# --------------------------------------------------------------------------------------------------------------------
# Errors, and what a forecast without a model reaches
# --------------------------------------------------------------------------------------------------------------------


class Errors:
    """Sums of squared and absolute errors over windows, in fp64 on the device, so that batches do not matter."""

    def __init__(self, device: torch.device):
        self.squared = torch.zeros((), dtype=torch.float64, device=device)
        self.absolute = torch.zeros_like(self.squared)
        self.count = 0

    def add(self, forecast: torch.Tensor, targets: torch.Tensor) -> None:
        """forecast and targets (batch, horizon, channels)"""
        difference = forecast.float() - targets
        self.squared += difference.square().sum(dtype=torch.float64)
        self.absolute += difference.abs().sum(dtype=torch.float64)
        self.count += difference.numel()

    def result(self) -> dict[str, float]:
        """Mean squared and mean absolute error of the standardised channels."""
        return {"mse": self.squared.item() / self.count, "mae": self.absolute.item() / self.count}


def baseline_errors(windows: Windows, rows_per_day: int | None) -> dict[str, dict[str, float]]:
    """MSE and MAE of forecasts that need no model: the last row, the mean of the context, the last day again.

    Args:
        windows: the split.
        rows_per_day: for the last of them; left out where it is None or longer than the context.
    """
    device, horizon = windows.values.device, windows.horizon
    names = ["repeat last row", "mean of the context"]
    if rows_per_day is not None and rows_per_day <= windows.context_length:
        names.append("repeat last day")
    errors = {name: Errors(device) for name in names}
    for numbers in torch.arange(len(windows), device=device).split(1024):
        inputs, targets = windows.batch(numbers)
        errors["repeat last row"].add(inputs[:, -1:].expand_as(targets), targets)
        errors["mean of the context"].add(inputs.mean(1, keepdim=True).expand_as(targets), targets)
        if "repeat last day" in errors:
            days = -(-horizon // rows_per_day)
            errors["repeat last day"].add(inputs[:, -rows_per_day:].repeat(1, days, 1)[:, :horizon], targets)
    return {name: found.result() for name, found in errors.items()}


@dataclass
class Settings:
    """Settings of `python time_series_dataset.py`."""

    dataset: str | None = setting(None, "a published series, or the generated sample (the default)", DATASETS)
    data_path: str | None = setting(None, "a CSV with a date column and channels of numbers, plain or .gz")
    download: bool = setting(False, "fetch an ETT file from its public address")
    date_column: str = setting("date", "name of the column with the dates")
    allow_gaps: bool = setting(False, "take rows that are not equally far apart")
    split: str | None = setting(None, "borders of train, validation and test (default: by dataset)", SPLITS)
    context_length: int = setting(336, "rows that a model sees")
    horizon: int = setting(96, "rows that it forecasts")
    cache_folder: str = setting(".cache/series", "where fetched files are kept")


def main() -> int:
    """Describe a series: its splits, windows and the errors of forecasts without a model."""
    settings = parse_settings(Settings)
    series = load_series(
        settings.dataset,
        settings.data_path,
        fetch=settings.download,
        date_column=settings.date_column,
        allow_gaps=settings.allow_gaps,
        cache_folder=settings.cache_folder,
    )
    data = split_series(
        series,
        context_length=settings.context_length,
        horizon=settings.horizon,
        device=torch.device("cpu"),
        split=settings.split,
    )
    print(f"{data.description['description']}; {series.dates[0]} to {series.dates[-1]}")
    print(f"{'split':<12}{'rows':>18}{'windows':>10}")
    for name, (begin, end) in data.description["borders"].items():
        print(f"{name:<12}{f'{begin:,} - {end:,}':>18}{len(data.splits[name]):>10,}")
    print(f"\n{'forecast of test without a model':<34}{'MSE':>9}{'MAE':>9}")
    for name, errors in baseline_errors(data.splits["test"], series.rows_per_day).items():
        print(f"{name:<34}{errors['mse']:>9.4f}{errors['mae']:>9.4f}")
    return 0


if __name__ == "__main__":
    run_script(main)
