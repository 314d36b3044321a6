"""Time series as files: the built-in sample, the published ones with their checksums, and any CSV, read and checked.

time_series_dataset.py splits them and cuts windows out of them.
"""

import gzip
import hashlib
import io
import urllib.request
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from run_folder import check_writable
from utils import SettingsError

ADDRESS = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{name}.csv"
SHA256 = {
    "ETTh1": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "ETTh2": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
    "ETTm1": "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
    "ETTm2": "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",
}
DATASETS = ("sample", *SHA256, "traffic")
TRAFFIC_SHAPE = (17544, 862)  # rows and channels of the file that the published results are for
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
