"""Every test starts from the same seeds, offline, with as many threads as its worker's share of the cores."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random

import numpy as np
import pytest
import torch

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
