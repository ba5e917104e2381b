"""Every test starts from the same seeds, offline, with as many threads as its worker's share of the cores.

Where each of many cases takes seconds, a few of them run (`sampled`), and all with --every-case.
"""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random
from collections import defaultdict

import numpy as np
import pytest
import torch

gc.set_threshold(20_000, 20, 20)  # traced graphs are many small objects: the collector took a tenth of the time
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_addoption(parser):
    parser.addoption("--every-case", action="store_true", help="also the exhaustive tests, and all cases of the sampled ones")


def pytest_collection_modifyitems(config, items):
    """Without --every-case: no exhaustive test, and of a test that is sampled(n), n of its cases, from the first to the last."""
    if config.getoption("--every-case"):
        return
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.split("[")[0]].append(item)
    left = set()
    for mine in cases.values():
        marked = mine[0].get_closest_marker("sampled")
        count = 0 if mine[0].get_closest_marker("exhaustive") else marked.args[0] if marked else len(mine)
        left.update(mine if count >= len(mine) else spread(mine, count))
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = [item for item in items if item in left]


def spread(cases, count):
    """As many of them, equally far apart: the first, …, the last."""
    return [cases[round(i * (len(cases) - 1) / max(1, count - 1))] for i in range(count)]


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
