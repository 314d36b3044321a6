"""GPU tests are skipped where there is no GPU; nothing here needs a network."""

import os

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
