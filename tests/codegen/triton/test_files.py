"""Kernels written out: every file is there, and the source runs where attnopt cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.files import write
from attnopt.codegen.triton.prefill import Form
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse

LINE = "softmax heads(4, 2) scale(0.125) add(alibi) causal & window(20) & padding"
FORM = Form(64, 64, "float16", (("slopes", "float32"), ("padding", "bool")))
ALONE = "import runpy, sys; sys.modules['attnopt'] = None; runpy.run_path('window_example.py', run_name='__main__')"


def test_files_of_a_kernel_run_without_attnopt(tmp_path):
    made = write(parse(LINE), FORM, "sm_90", tmp_path, "window")
    assert isinstance(made, Compiled)
    assert {f.name for f in tmp_path.iterdir()} == {
        "window.py", "window_example.py", "window.ptx", "window.cubin", "window.json",
    }  # fmt: skip
    told = json.loads((tmp_path / "window.json").read_text())
    assert (told["spec"], told["architecture"], told["spilled_bytes"]) == (LINE, "sm_90", 0)
    assert told["tensor_core_instructions"] == ["wgmma.mma_async"]
    assert (tmp_path / "window.cubin").read_bytes()[:4] == b"\x7fELF"
    assert ".target sm_90a" in (tmp_path / "window.ptx").read_text()
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "nan" not in run.stdout
    assert run.stdout.startswith("tensor([[[[")


@pytest.mark.parametrize(("line", "reason"), [("sigmoid", "the normaliser is sigmoid, not softmax")])
def test_what_is_refused_writes_nothing(tmp_path, line, reason):
    said = write(parse(line), Form(64, 64), "gfx942", tmp_path, "kernel")
    assert isinstance(said, Refusal)
    assert said.reason == reason
    assert list(tmp_path.iterdir()) == []


def test_binaries_for_amd(tmp_path):
    assert isinstance(write(parse("softmax scale(0.125) causal"), Form(64, 64), "gfx942", tmp_path, "causal"), Compiled)
    assert {f.suffix for f in tmp_path.iterdir()} == {".py", ".amdgcn", ".hsaco", ".json"}
