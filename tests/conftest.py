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


@pytest.fixture(autouse=True, scope="session")
def exports(tmp_path_factory):
    """One folder of ONNX exports for all processes of the session: see onnx_exports. Another for compiled kernels."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "onnx_exports"
    folder.mkdir(exist_ok=True)
    os.environ["ATTNOPT_TEST_EXPORTS"] = str(folder)
    os.environ["ATTNOPT_CACHE"] = str(folder.with_name("kernels"))


@pytest.fixture(autouse=True)
def not_calibrated(monkeypatch, tmp_path_factory):
    """What was measured of the machine that tests run on says nothing here."""
    monkeypatch.setenv("ATTNOPT_CONFIG", str(tmp_path_factory.getbasetemp() / "no_config"))


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
