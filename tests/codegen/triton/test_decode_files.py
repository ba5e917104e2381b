"""Decode kernels written out: every file is there, and the source runs where attnopt cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.triton.decode_files import write
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse

LINE = (
    "softmax heads(4, 2) offset(size(k) - size(q)) scale(0.125) add(alibi) causal & padding"
    " cache(k=int8, v=int4, layout=paged, page=16)"
)
FORM = DecodeForm(64, 64, "float16", (("slopes", "float32"), ("padding", "bool")), lengths=True)
ALONE = "import runpy, sys; sys.modules['attnopt'] = None; runpy.run_path('step_example.py', run_name='__main__')"


def test_files_of_a_kernel_run_without_attnopt(tmp_path):
    made = write(parse(LINE), FORM, "sm_90", tmp_path, "step")
    assert isinstance(made, Compiled)
    assert {f.name for f in tmp_path.iterdir()} == {
        "step.py", "step_example.py", "step.json", "step.ptx", "step.cubin", "step_merge.ptx", "step_merge.cubin",
    }  # fmt: skip
    told = json.loads((tmp_path / "step.json").read_text())
    assert (told["spec"], told["architecture"], told["spilled_bytes"], told["merge"]["spilled_bytes"]) == (
        str(parse(LINE)),
        "sm_90",
        0,
        0,
    )
    assert told["form"]["lengths"] is True
    assert (tmp_path / "step_merge.cubin").read_bytes()[:4] == b"\x7fELF"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "nan" not in run.stdout
    assert run.stdout.startswith("tensor([[[[")


def test_what_is_refused_writes_nothing(tmp_path):
    said = write(parse("softmax cache(layout=ring)"), FORM, "sm_90", tmp_path, "step")
    assert isinstance(said, Refusal)
    assert list(tmp_path.iterdir()) == []
