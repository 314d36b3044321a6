"""time_series_dataset.py: borders and window counts of the published splits, errors of bad files, equal batches."""

import gzip
import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import time_series_dataset
import time_series_files
from time_series_dataset import Errors, WindowLoader, baseline_errors, split_borders, split_series
from time_series_files import Series, download, load_series, read_csv, sample_series
from utils import SettingsError

CPU = torch.device("cpu")


def series_of(rows: int, channels: int = 2, name: str = "mine") -> Series:
    """Row r of channel c holds r + 1000 c."""
    values = np.arange(rows)[:, None] + 1000.0 * np.arange(channels)
    dates = np.datetime64("2020-01-01T00:00:00") + np.arange(rows) * np.timedelta64(3600, "s")
    source = {"name": name, "description": name, "sha256": None, "generated": False}
    return Series(values, [f"c{number}" for number in range(channels)], dates, np.timedelta64(3600, "s"), source)


def csv_of(rows: int, minutes: int = 60, channels: int = 7) -> bytes:
    dates = np.datetime64("2016-07-01T00:00:00") + np.arange(rows) * np.timedelta64(minutes, "m")
    names = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"][:channels]
    lines = [",".join(["date", *names])]
    for row, date in enumerate(dates):
        numbers = [f"{np.sin(row / 24 + c):.4f}" for c in range(channels)]
        lines.append(",".join([str(date).replace("T", " "), *numbers]))
    return "\n".join(lines).encode() + b"\n"


# --- Splits and windows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("minutes", "rows", "split", "context_length", "horizon", "windows"),
    [
        (60, 17420, "ett_hourly", 336, 96, (8209, 2785, 2785)),
        (60, 17420, "ett_hourly", 512, 96, (8033, 2785, 2785)),
        (60, 17420, "ett_hourly", 336, 720, (7585, 2161, 2161)),
        (15, 69680, "ett_quarter_hourly", 336, 96, (34129, 11425, 11425)),
        (15, 69680, "ett_quarter_hourly", 512, 96, (33953, 11425, 11425)),
    ],
)
def test_window_counts_of_the_published_splits(minutes, rows, split, context_length, horizon, windows):
    """On a file of ETT's shape, read as any other CSV."""
    series = read_csv(csv_of(rows, minutes, channels=1), "ett.csv")
    series.source = {"name": "ett.csv", "description": "", "sha256": None, "generated": False}
    data = split_series(series, context_length=context_length, horizon=horizon, device=CPU, split=split)
    assert tuple(len(data.splits[name]) for name in ("train", "validation", "test")) == windows
    assert data.description["windows"] == dict(zip(("train", "validation", "test"), windows, strict=True))


def test_borders():
    assert split_borders("ett_hourly", 17420, 336) == {
        "train": (0, 8640),
        "validation": (8304, 11520),
        "test": (11184, 14400),
    }
    assert split_borders("ett_quarter_hourly", 69680, 336)["test"] == (45744, 57600)
    # Traffic: 12,280, 1,756 and 3,508 rows
    assert split_borders("ratio", 17544, 336) == {
        "train": (0, 12280),
        "validation": (11944, 14036),
        "test": (13700, 17544),
    }
    for dataset, split in (("ETTh2", "ett_hourly"), ("ETTm1", "ett_quarter_hourly"), ("traffic", "ratio")):
        assert time_series_dataset.default_split(dataset) == split


def test_windows_hold_the_right_rows():
    data = split_series(series_of(200), context_length=10, horizon=4, device=CPU)
    windows = data.splits["test"]
    begin, end = data.description["borders"]["test"]
    assert (begin, end) == (150, 200) and len(windows) == 50 - 14 + 1
    inputs, targets = windows.batch(torch.tensor([0, 36]))
    assert inputs.shape == (2, 10, 2) and targets.shape == (2, 4, 2)
    back = inputs * torch.tensor(data.std) + torch.tensor(data.mean)
    assert torch.allclose(back[0, :, 0], torch.arange(150.0, 160.0).double())
    assert torch.allclose(back[1, :, 1], 1000 + torch.arange(186.0, 196.0).double())
    last = targets[1, :, 1].double() * data.std[1] + data.mean[1]
    assert torch.allclose(last, 1000 + torch.arange(196.0, 200.0).double())  # the last row of the series is forecast


def test_standardised_with_the_train_rows_only():
    series = series_of(200)
    series.values[150:] *= 50  # test rows must not be looked at
    data = split_series(series, context_length=10, horizon=4, device=CPU)
    train = np.arange(140)
    assert data.mean == pytest.approx([train.mean(), 1000 + train.mean()])
    assert data.std == pytest.approx([train.std(), train.std()])  # ddof 0
    values = data.splits["train"].values.double()
    assert values.mean(0).abs().max() < 1e-6 and (values.std(0, unbiased=False) - 1).abs().max() < 1e-6


def test_a_channel_that_never_changes_is_not_divided_by_zero():
    series = series_of(200)
    series.values[:, 1] = 7.0
    data = split_series(series, context_length=10, horizon=4, device=CPU)
    assert data.std[1] == 1 and data.description["constant_in_train"] == ["c1"]
    assert torch.equal(data.splits["test"].values[:, 1], torch.zeros(60 - 10))


@pytest.mark.parametrize("gather_bytes", [1, 5000, 2**24])
def test_batches_are_the_windows_in_the_epochs_order(monkeypatch, gather_bytes):
    """Whatever is gathered together, a batch is the same; the rest of an epoch is left out; epochs differ."""
    monkeypatch.setattr(time_series_dataset, "GATHER_BYTES", gather_bytes)
    windows = split_series(series_of(200), context_length=10, horizon=4, device=CPU).splits["train"]
    order = windows.order(seed=3, epoch=0)
    assert sorted(order.tolist()) == list(range(len(windows)))
    assert order.tolist() != windows.order(3, 1).tolist() and order.tolist() != windows.order(4, 0).tolist()
    batches = list(windows.batches(order, 25))
    assert len(batches) == len(windows) // 25
    for number, (inputs, targets) in enumerate(batches):
        own = windows.batch(order[25 * number : 25 * number + 25])
        assert torch.equal(inputs, own[0]) and torch.equal(targets, own[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_cut_the_same_batches(num_workers):
    windows = split_series(series_of(120), context_length=10, horizon=4, device=CPU).splits["train"]
    loader = WindowLoader(windows, 16, num_workers)
    for epoch in (0, 1):
        order = windows.order(0, epoch)
        pairs = list(zip(loader.batches(order), windows.batches(order, 16), strict=True))
        assert len(pairs) == len(windows) // 16
        for (inputs, targets), (own_inputs, own_targets) in pairs:
            assert torch.equal(inputs, own_inputs) and torch.equal(targets, own_targets)


# --- Errors without a model -------------------------------------------------------------------------------------------


def test_baselines_by_hand():
    """A sawtooth of three rows a day that rises by 3 a day: every forecast without a model is known."""
    series = series_of(120, 1)
    series.values[:, 0] = np.tile([0.0, 1.0, 5.0], 40) + 3 * np.repeat(np.arange(40), 3)
    data = split_series(series, context_length=6, horizon=4, device=CPU)
    windows, std = data.splits["test"], data.std[0]
    found = baseline_errors(windows, rows_per_day=3)
    assert set(found) == {"repeat last row", "mean of the context", "repeat last day"}
    # Of four rows the first three are the day before plus 3, the fourth is two days after the one that is repeated.
    assert found["repeat last day"]["mse"] == pytest.approx((3 * 9 + 36) / 4 / std**2, rel=1e-4)
    assert found["repeat last day"]["mae"] == pytest.approx((3 * 3 + 6) / 4 / std, rel=1e-4)
    rows = series.values[windows.first_row :, 0]
    squares = [(rows[i + 6 : i + 10] - rows[i + 5]) ** 2 for i in range(len(windows))]
    assert found["repeat last row"]["mse"] == pytest.approx(np.mean(squares) / std**2, rel=1e-4)
    means = [abs(rows[i + 6 : i + 10] - rows[i : i + 6].mean()) for i in range(len(windows))]
    assert found["mean of the context"]["mae"] == pytest.approx(np.mean(means) / std, rel=1e-4)


def test_no_daily_forecast_without_a_day_in_the_context():
    windows = split_series(series_of(200), context_length=10, horizon=4, device=CPU).splits["test"]
    assert "repeat last day" not in baseline_errors(windows, rows_per_day=24)
    assert "repeat last day" not in baseline_errors(windows, rows_per_day=None)


def test_errors_do_not_depend_on_batches():
    generator = torch.Generator().manual_seed(0)
    forecast, targets = torch.randn(2, 50, 4, 3, generator=generator)
    whole, parts = Errors(CPU), Errors(CPU)
    whole.add(forecast, targets)
    for part in torch.arange(50).split(7):
        parts.add(forecast[part], targets[part])
    assert whole.result()["mse"] == pytest.approx((forecast - targets).square().mean().item(), rel=1e-6)
    assert parts.result() == pytest.approx(whole.result(), rel=1e-12)


# --- Reading ----------------------------------------------------------------------------------------------------------

GOOD = "date,a,b\n2020-01-01 00:00:00,1,2\n2020-01-01 01:00:00,3,4\n2020-01-01 02:00:00,5,6\n2020-01-01 03:00:00,7,8\n"


def test_a_good_csv():
    series = read_csv(GOOD.encode(), "good.csv")
    assert series.columns == ["a", "b"] and series.interval == np.timedelta64(3600, "s")
    assert series.values.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]] and series.rows_per_day == 24
    assert str(series.dates[3]) == "2020-01-01T03:00:00"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "x.csv: the file is empty"),
        ("date,a\n", "only 0 rows"),
        ("time,a\n1,2\n2,3\n3,4\n", "there is no column date (the header has time, a); name it with --date_column"),
        ("date\n2020-01-01\n2020-01-02\n2020-01-03\n", "no channel beside the column date"),
        (GOOD.replace("b\n", "a\n"), "names a more than once"),
        (GOOD.replace("5,6", "five,6"), "row 3, column a: 'five' is not a number"),
        (GOOD.replace("5,6", "5,"), "row 3, column b is empty or not finite; fill the gaps first"),
        (GOOD.replace("1,2", "nan,2").replace("3,4", ",4"), "row 1, column a is empty or not finite (and 1 more)"),
        (GOOD.replace("5,6", "5,inf"), "row 3, column b is empty or not finite"),
        (GOOD.replace("5,6", "5,true").replace(",2\n", ",false\n"), "row 1, column b: 'false' is not a number"),
        (GOOD.replace("5,6", "5,6,7"), "no CSV of equal rows"),
        (GOOD.replace("01 02:00", "01 01:00"), "row 3 (2020-01-01T01:00:00) does not come after row 2"),
        (GOOD.replace("01 02:00", "01 00:30"), "does not come after row 2"),
        (GOOD.replace("01 03:00", "02 03:00"), "row 4 (2020-01-02T03:00:00) comes"),
        (GOOD.replace("2020-01-01 02", "yesterday 02"), "row 3, column date: 'yesterday 02:00:00' is not a date"),
        ("date,a\n1,2\n2,3\n3,4\n", "column date holds numbers, not dates"),
    ],
)
def test_a_bad_csv_costs_one_sentence(text, words):
    with pytest.raises(SettingsError) as caught:
        read_csv(text.encode(), "x.csv")
    message = str(caught.value)
    assert words in message and message.startswith("x.csv: ") and "\n" not in message


def test_no_text_at_all():
    with pytest.raises(SettingsError, match=r"no text in UTF-8"):
        read_csv(b"date,a\n\xff\xfe\x00\x80,1\n", "x.csv")


def test_gaps_can_be_allowed():
    text = GOOD.replace("01 03:00", "02 03:00")
    series = read_csv(text.encode(), "x.csv", allow_gaps=True)
    assert len(series.values) == 4 and series.interval == np.timedelta64(3600, "s")


def test_another_date_column_and_a_byte_order_mark():
    series = read_csv(("\ufeff" + GOOD.replace("date", "when")).encode(), "x.csv", date_column="when")
    assert series.columns == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset": "ETTh9"}, "--dataset ETTh9 is unknown"),
        ({"dataset": "ETTh1"}, "give the file with --data_path, or fetch it with --download true"),
        ({"dataset": "traffic"}, "has no public address to fetch it from"),
        ({"dataset": "sample", "data_path": "x.csv"}, "takes no --data_path"),
        ({"dataset": "ETTh1", "data_path": "x.csv", "fetch": True}, "exclude each other"),
        ({"fetch": True}, "--download has no effect on the generated sample"),
        ({"allow_gaps": True}, "--allow_gaps has no effect"),
        ({"date_column": "when"}, "--date_column has no effect"),
        ({"data_path": "missing.csv"}, "--data_path missing.csv cannot be read: No such file"),
    ],
)
def test_settings_that_make_no_sense(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as caught:
        load_series(**options)
    assert words in str(caught.value)


def test_a_file_is_not_passed_off_as_a_dataset(tmp_path, monkeypatch):
    path = tmp_path / "ETTh1.csv.gz"
    content = csv_of(14500)
    path.write_bytes(gzip.compress(content))
    with pytest.raises(SettingsError, match="is not the published file"):
        load_series("ETTh1", str(path))
    with pytest.raises(SettingsError, match=r"14,500 rows of 7 channels, not 17,544 of 862"):
        load_series("traffic", str(path))
    monkeypatch.setitem(time_series_files.SHA256, "ETTh1", hashlib.sha256(content).hexdigest())
    series = load_series("ETTh1", str(path))
    assert series.source["name"] == "ETTh1" and series.source["sha256"] == hashlib.sha256(content).hexdigest()
    assert split_series(series, context_length=336, horizon=96, device=CPU).description["split"] == "ett_hourly"
    own = load_series(None, str(path))
    assert own.source["name"] == "ETTh1.csv.gz" and not own.source["generated"]
    path.write_bytes(b"\x1f\x8b broken")
    with pytest.raises(SettingsError, match="cannot be read"):
        load_series(None, str(path))


def test_a_file_of_traffics_shape_is_read_as_traffic(tmp_path):
    rows, channels = time_series_files.TRAFFIC_SHAPE
    dates = np.datetime64("2016-07-01T02:00:00") + np.arange(rows) * np.timedelta64(60, "m")
    header = ",".join(["date", *map(str, range(channels))])
    numbers = ",".join(["0.5"] * (channels - 1))
    lines = (f"{str(date).replace('T', ' ')},{row % 24},{numbers}" for row, date in enumerate(dates))
    path = tmp_path / "traffic.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    data = split_series(load_series("traffic", str(path)), context_length=336, horizon=96, device=CPU)
    assert data.description["borders"] == {
        "train": [0, 12280],
        "validation": [11944, 14036],
        "test": [13700, 17544],
    }
    assert data.splits["test"].values.shape == (3844, 862) and len(data.splits["test"]) == 3844 - 432 + 1


class Answer(io.BytesIO):
    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.close()


def test_download_compares_the_checksum(tmp_path, monkeypatch):
    content, asked = b"date,a\n", []
    monkeypatch.setitem(time_series_files.SHA256, "ETTm2", hashlib.sha256(content).hexdigest())

    def fetch(answer: bytes):
        def urlopen(address, timeout):
            asked.append(address)
            return Answer(answer)

        return urlopen

    monkeypatch.setattr("urllib.request.urlopen", fetch(b"something else"))
    with pytest.raises(SettingsError, match=r"is not the published file .*nothing was kept"):
        download("ETTm2", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("urllib.request.urlopen", fetch(content))
    assert download("ETTm2", tmp_path / "cache").read_bytes() == content
    assert asked[0].endswith("/ETT-small/ETTm2.csv") and len(asked) == 2
    download("ETTm2", tmp_path / "cache")  # is there already
    assert len(asked) == 2

    def offline(address, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(SettingsError, match=r"cannot be fetched \(no route to host\).*--data_path"):
        download("ETTm1", tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_length": 2000, "horizon": 96}, "the train split has 1,400 rows"),
        ({"context_length": 24, "horizon": 500}, "the validation split has"),
        ({"context_length": 0, "horizon": 5}, "must be at least 1"),
        ({"context_length": 24, "horizon": 24, "split": "ett_hourly"}, "needs 14,400 rows"),
        ({"context_length": 24, "horizon": 24, "split": "thirds"}, "--split thirds is unknown"),
    ],
)
def test_a_series_too_short(options, words):
    with pytest.raises(SettingsError) as caught:
        split_series(series_of(2000), device=CPU, **options)
    assert words in str(caught.value)


def test_the_sample_is_the_same_every_time_and_says_what_it_is():
    first, again = sample_series(), sample_series()
    assert np.array_equal(first.values, again.values) and not np.array_equal(first.values, sample_series(seed=1).values)
    assert first.source["generated"] and "generated" in first.source["description"]
    # A daily season: a day ago tells more than half a day ago.
    centred = first.values - first.values.mean(0)
    day, half = ((centred[lag:] * centred[:-lag]).mean(0) / centred.var(0) for lag in (24, 12))
    assert (day > 0.3).all() and (day > half).all()


def test_main_describes_a_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.csv"
    path.write_bytes(csv_of(600, channels=2))
    words = ["--data_path", str(path), "--context_length", "48", "--horizon", "12"]
    monkeypatch.setattr(sys, "argv", ["time_series_dataset.py", *words])
    assert time_series_dataset.main() == 0
    out = capsys.readouterr().out
    assert "mine.csv: 600 rows of 2 channels" in out and "repeat last day" in out and Path(path).exists()
