"""GPU tests are skipped where there is no GPU; nothing here needs a network."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def one_thread():
    """Tensors this small are slower with more threads, far slower where other work runs beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def series(tmp_path_factory) -> Path:
    """A CSV of 400 hourly rows and two channels with a daily wave."""
    path = tmp_path_factory.mktemp("series") / "waves.csv"
    hours = np.arange(400)
    dates = np.datetime64("2024-01-01T00:00:00") + hours * np.timedelta64(3600, "s")
    noise = np.random.default_rng(0).normal(0, 0.3, (400, 2))
    waves = np.sin(2 * np.pi * hours / 24)[:, None] * [1, 3] + noise + [0, 10]
    lines = [f"{str(d).replace('T', ' ')},{a:.4f},{b:.4f}" for d, (a, b) in zip(dates, waves, strict=True)]
    path.write_text("date,left,right\n" + "\n".join(lines) + "\n")
    return path
