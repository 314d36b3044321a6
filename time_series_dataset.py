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

import gzip
import hashlib
import io
import urllib.request
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from run_folder import check_writable
from utils import SettingsError, parse_settings, run_script, setting

ADDRESS = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{name}.csv"
SHA256 = {
    "ETTh1": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "ETTh2": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
    "ETTm1": "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
    "ETTm2": "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",
}
DATASETS = ("sample", *SHA256, "traffic")
TRAFFIC_SHAPE = (17544, 862)  # rows and channels of the file that the published results are for
SPLITS = ("ratio", "ett_hourly", "ett_quarter_hourly")
MONTH = {"ett_hourly": 30 * 24, "ett_quarter_hourly": 30 * 24 * 4}  # rows
GATHER_BYTES = 64 * 2**20  # of windows that are gathered by one kernel
TRAFFIC_SOURCE = "it is the 862-sensor file of the Autoformer and PatchTST projects, made from https://pems.dot.ca.gov"


@dataclass
class Series:
    """A table as it was read.

    Attributes:
        values: (rows, channels) fp64, all finite.
        columns: the channels' names.
        dates: (rows,) datetime64, rising.
        interval: between two rows.
        source: what it is, for run.json: name, description, sha256 of the (unpacked) file, generated.
    """

    values: np.ndarray
    columns: list[str]
    dates: np.ndarray
    interval: np.timedelta64
    source: dict[str, Any]

    @property
    def rows_per_day(self) -> int | None:
        """Rows of a day; None where they do not divide it."""
        day = np.timedelta64(1, "D")
        return int(day // self.interval) if day % self.interval == np.timedelta64(0) else None


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """The file's content, unpacked if it is gzip.

    Raises:
        SettingsError: it cannot be read or unpacked.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise SettingsError(f"--data_path {path} cannot be read: {reason}") from None


def read_csv(content: bytes, name: str, date_column: str = "date", allow_gaps: bool = False) -> Series:
    """Check a CSV and take its dates and channels.

    Args:
        content: of the file, with a header line.
        name: of the file, for messages.
        date_column: its name; every other column is a channel of numbers.
        allow_gaps: take rows that are not equally far apart (a calendar of months or of working days).

    Raises:
        SettingsError: one sentence with the place of what is wrong; rows are counted from 1 after the header.
    """

    def wrong(what: str) -> SettingsError:
        return SettingsError(f"{name}: {what}")

    options = {"encoding": "utf-8-sig", "index_col": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # a row longer than the header
            header = pandas.read_csv(io.BytesIO(content), header=None, nrows=1, dtype=str, **options)
            table = pandas.read_csv(io.BytesIO(content), low_memory=False, **options)
    except pandas.errors.EmptyDataError:
        raise wrong("the file is empty") from None
    except UnicodeDecodeError:
        raise wrong("the file is no text in UTF-8; --data_path takes a CSV, plain or gzip") from None
    except (pandas.errors.ParserError, pandas.errors.ParserWarning, ValueError) as error:
        raise wrong(f"the file is no CSV of equal rows: {' '.join(str(error).split())}") from None
    names = [str(value) for value in header.iloc[0]]
    double = sorted({value for value in names if names.count(value) > 1})
    if double:
        raise wrong(f"the header names {', '.join(double)} more than once")
    if date_column not in names:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise wrong(f"there is no column {date_column} (the header has {shown}); name it with --date_column")
    channels = [value for value in names if value != date_column]
    if not channels:
        raise wrong(f"there is no channel beside the column {date_column}")
    if len(table) < 3:
        raise wrong(f"there are only {len(table)} rows")
    columns = []
    for channel in channels:
        numbers = table[channel]
        if not pandas.api.types.is_numeric_dtype(numbers) or pandas.api.types.is_bool_dtype(numbers):
            converted = pandas.to_numeric(numbers.astype("string"), errors="coerce")
            bad = np.flatnonzero(converted.isna() & numbers.notna())
            if len(bad):
                text = str(numbers.iloc[bad[0]])
                raise wrong(f"row {bad[0] + 1}, column {channel}: '{text[:40]}' is not a number")
            numbers = converted
        numbers = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            more = f" (and {len(bad) - 1:,} more)" if len(bad) > 1 else ""
            raise wrong(f"row {bad[0] + 1}, column {channel} is empty or not finite{more}; fill the gaps first")
        columns.append(numbers)
    dates, interval = read_dates(table[date_column], date_column, allow_gaps, wrong)
    return Series(np.stack(columns, axis=1), channels, dates, interval, {})


def read_dates(column: Any, date_column: str, allow_gaps: bool, wrong: Any) -> tuple[np.ndarray, np.timedelta64]:
    """The dates of a column and the interval between two rows (the most frequent one with `allow_gaps`)."""
    if pandas.api.types.is_numeric_dtype(column):
        raise wrong(f"column {date_column} holds numbers, not dates such as 2016-07-01 00:00:00")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a format that pandas cannot guess: the dates are missing then
        dates = pandas.to_datetime(column, errors="coerce", utc=True)
    bad = np.flatnonzero(dates.isna())
    if len(bad):
        raise wrong(f"row {bad[0] + 1}, column {date_column}: '{column.iloc[bad[0]]}' is not a date like that of row 1")
    dates = dates.dt.tz_localize(None).to_numpy(dtype="datetime64[s]")
    steps = np.diff(dates)
    bad = np.flatnonzero(steps <= np.timedelta64(0))
    if len(bad):
        row = bad[0] + 1
        raise wrong(f"row {row + 1} ({dates[row]}) does not come after row {row} ({dates[row - 1]}); sort by date")
    values, counts = np.unique(steps, return_counts=True)
    interval = values[counts.argmax()]
    bad = np.flatnonzero(steps != interval)
    if len(bad) and not allow_gaps:
        row = bad[0] + 1
        raise wrong(
            f"row {row + 1} ({dates[row]}) comes {steps[row - 1]} after the row before, most come after {interval}; "
            "fill the gap, or use --allow_gaps true"
        )
    return dates, interval


def sample_series(rows: int = 4000, channels: int = 5, seed: int = 0) -> Series:
    """The project's generator: hourly rows with daily and weekly seasons, a trend, noise with memory, coupled channels.

    Every channel is a mix of two hidden drivers, each a daily wave with a second harmonic whose size follows the day of
    the week, plus a slow trend of its own and an autoregressive noise. The same arguments give the same numbers.
    """
    generator = np.random.default_rng(seed)
    hours = np.arange(rows)
    drivers = []
    for _ in range(2):
        phases = generator.uniform(0, 2 * np.pi, 3)
        daily = np.sin(2 * np.pi * hours / 24 + phases[0]) + 0.4 * np.sin(4 * np.pi * hours / 24 + phases[1])
        weekly = 1 + 0.5 * np.sin(2 * np.pi * hours / 168 + phases[2])
        drivers.append(daily * weekly)
    columns = []
    for _ in range(channels):
        shares, slope = generator.uniform(0.2, 1.0, 2), generator.normal(0, 0.5)
        noise = np.zeros(rows)
        shocks = generator.normal(0, 0.15, rows)
        for row in range(1, rows):
            noise[row] = 0.8 * noise[row - 1] + shocks[row]
        scale, level = generator.uniform(1, 10), generator.uniform(-5, 20)
        columns.append(level + scale * (shares @ np.stack(drivers) + slope * hours / rows + noise))
    dates = np.datetime64("2024-01-01T00:00:00") + hours.astype("timedelta64[h]")
    description = (
        f"generated sample: {rows:,} hourly rows of {channels} channels (daily and weekly seasons, trend, noise)"
    )
    source = {"name": "sample", "description": description, "sha256": None, "generated": True, "seed": seed}
    names = [f"channel_{number}" for number in range(1, channels + 1)]
    return Series(np.stack(columns, axis=1), names, dates.astype("datetime64[s]"), np.timedelta64(3600, "s"), source)


def download(name: str, cache_folder: Path) -> Path:
    """Fetch an ETT file from its public address into the cache, unless it is there; its checksum decides.

    Raises:
        SettingsError: no connection, or a file that is not the published one.
    """
    path = cache_folder / f"{name}.csv"
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[name]:
        return path
    check_writable(cache_folder, "--cache_folder")
    address = ADDRESS.format(name=name)
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise SettingsError(
            f"--download true: {address} cannot be fetched ({reason}); fetch it yourself and name it with --data_path"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise SettingsError(f"--download true: {address} is not the published file (sha256 {found}); nothing was kept")
    cache_folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(content)
    temporary.replace(path)
    return path


def load_series(
    dataset: str | None = None,
    data_path: str | None = None,
    *,
    fetch: bool = False,
    date_column: str = "date",
    allow_gaps: bool = False,
    cache_folder: str = ".cache/series",
) -> Series:
    """The series that the settings mean.

    Args:
        dataset: one of DATASETS; None is the sample, or any CSV if data_path is given.
        data_path: a CSV, plain or gzip; with a dataset's name it must be that dataset's published file.
        fetch: take an ETT file from its public address if no path is given.
        date_column, allow_gaps: as in `read_csv`.
        cache_folder: where fetched files are kept.

    Raises:
        SettingsError: settings that contradict each other, or a file that is missing, another one or damaged.
    """
    if dataset is not None and dataset not in DATASETS:
        raise SettingsError(f"--dataset {dataset} is unknown; choose one of {', '.join(DATASETS)}, or give --data_path")
    if dataset in (None, "sample") and data_path is None:
        for flag, given in (("download", fetch), ("allow_gaps", allow_gaps), ("date_column", date_column != "date")):
            if given:
                raise SettingsError(f"--{flag} has no effect on the generated sample; leave it out")
        return sample_series()
    if dataset == "sample":
        raise SettingsError("--dataset sample is generated and takes no --data_path; leave one of them out")
    if data_path is not None and fetch:
        raise SettingsError("--data_path and --download true exclude each other; give one of them")
    if data_path is None and dataset == "traffic":
        raise SettingsError(
            f"--dataset traffic has no public address to fetch it from: {TRAFFIC_SOURCE}; give --data_path"
        )
    if data_path is None and not fetch:
        raise SettingsError(
            f"--dataset {dataset}: give the file with --data_path, or fetch it with --download true "
            f"({ADDRESS.format(name=dataset)}, CC BY-ND 4.0)"
        )
    path = Path(data_path) if data_path is not None else download(dataset, Path(cache_folder))
    content = read_bytes(path)
    found = hashlib.sha256(content).hexdigest()
    if dataset in SHA256 and found != SHA256[dataset]:
        raise SettingsError(
            f"--dataset {dataset}: {path} is not the published file (sha256 {found[:12]}..., not "
            f"{SHA256[dataset][:12]}...); leave --dataset out to read it as a series of your own"
        )
    series = read_csv(content, str(path), date_column, allow_gaps)
    if dataset == "traffic" and series.values.shape != TRAFFIC_SHAPE:
        rows, channels = series.values.shape
        raise SettingsError(
            f"--dataset traffic: {path} has {rows:,} rows of {channels} channels, not {TRAFFIC_SHAPE[0]:,} of "
            f"{TRAFFIC_SHAPE[1]}: {TRAFFIC_SOURCE}; leave --dataset out to read it as a series of your own"
        )
    rows, channels = series.values.shape
    description = f"{dataset or path.name}: {rows:,} rows of {channels} channels, {series.interval} apart"
    series.source = {"name": dataset or path.name, "description": description, "sha256": found, "generated": False}
    return series


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
