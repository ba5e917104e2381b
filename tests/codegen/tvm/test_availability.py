"""TVM that is missing or broken is one line, and everything else works."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from attnopt.codegen.tvm import availability
from attnopt.codegen.tvm.availability import missing, say_once, version
from attnopt.codegen.tvm.lowerings.tvm_decode import TvmDecode
from attnopt.codegen.tvm.lowerings.tvm_prefill import TvmPrefill

WITHOUT = """
import sys
sys.modules["tvm"] = None
sys.path.insert(0, sys.argv[1])
import torch, attnopt
from attnopt.codegen.tvm.availability import missing
from softcapped_window import Window
print(missing())
(site,) = attnopt.optimize(Window().eval(), (torch.randn(2, 40, 32),), target="cpu", select="always").report.sites
print({choice.why for choice in site.choices if choice.kernel == "tvm-prefill"})
try:
    attnopt.kernels(Window().eval(), sys.argv[2], target="cpu", example_inputs=(torch.randn(2, 40, 32),))
except attnopt.errors.UnsupportedFormat as error:
    print(error)
"""


@pytest.fixture(autouse=True)
def asked_anew():
    missing.cache_clear()
    yield
    missing.cache_clear()


def test_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing() == "TVM is not installed, so its kernels are left out"


def test_broken(monkeypatch):
    def broken():
        raise OSError("libtvm_runtime.so: wrong ELF class\nand more")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(availability, "load_runtime", broken)
    assert missing() == "TVM cannot be loaded, so its kernels are left out: libtvm_runtime.so: wrong ELF class"


def test_everything_else_works_without_it(tmp_path):
    command = [sys.executable, "-c", WITHOUT, Path(__file__).parents[2], tmp_path / "made"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == [
        "TVM is not installed, so its kernels are left out",
        "{'TVM is not installed, so its kernels are left out'}",
        "TVM is not installed, so its kernels are left out. Install it: pip install apache-tvm.",
    ]
    assert list(tmp_path.iterdir()) == []


def test_one_line(caplog):
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "attnopt"):
        say_once("torch's kernels take over: for a reason")
        say_once("torch's kernels take over: for a reason")
    assert caplog.messages == ["torch's kernels take over: for a reason"]


@pytest.mark.skipif(missing() is not None, reason="TVM is not installed")
def test_version():
    assert version()[0].isdigit()


def test_lowerings_are_on_the_torch_host():
    assert {x.host for x in (TvmDecode(), TvmPrefill())} == {"torch"}
