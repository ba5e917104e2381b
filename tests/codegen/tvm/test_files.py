"""Kernels written out: every file is there, and the launcher runs where neither attnopt nor TVM's compiler can be imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.cpu import host, named
from attnopt.codegen.tvm.files import Emitted, write, write_decode
from attnopt.ir.kv_cache import attend_cache, pack_cache
from attnopt.ir.reference import reference
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse

pytestmark = pytest.mark.skipif(missing() is not None, reason="TVM is not installed")
LINE = "softmax heads(4, 2) scale(0.125) load(padding, b, k)"
FORM = Form(64, 64, "float32", (("padding", "bool"),))
CACHED = "softmax scale(0.25) cache(k=int8, v=int8)"
ALONE = """
import runpy, sys
sys.modules["attnopt"] = None
{more}
assert "tvm" not in sys.modules
"""
SAVED = """
import numpy, torch
from {name} import attention
given = torch.load("given.pt")
numpy.save("numpy.npy", attention(*(x.numpy() for x in given)))
torch.save(attention(*given), "torch.pt")
"""


def alone(folder, more):
    run = subprocess.run([sys.executable, "-c", ALONE.format(more=more)], cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_files_of_a_kernel_run_without_attnopt(tmp_path):
    made = write(parse(LINE), FORM, host(), tmp_path, "padded")
    assert isinstance(made, Emitted)
    wanted = {"padded.py", "padded_tir.py", "padded_example.py", "libpadded.so", "padded.json", "padded.cu"}
    assert {f.name for f in tmp_path.iterdir()} == wanted == set(made.files)
    told = json.loads((tmp_path / "padded.json").read_text())
    assert (told["spec"], told["cpu"], told["form"]["operands"]) == (LINE, host().name, {"padding": "bool"})
    assert "from tvm.script import tirx as T" in (tmp_path / "padded_tir.py").read_text()
    assert "attnopt" not in (tmp_path / "padded_tir.py").read_text() + (tmp_path / "padded.py").read_text()
    q, k, v = torch.randn(2, 4, 9, 64), torch.randn(2, 11, 2, 64).transpose(1, 2), torch.randn(2, 2, 64, 11).mT
    padding = torch.rand(2, 11) < 0.7
    torch.save((q, k, v, padding), tmp_path / "given.pt")
    assert alone(tmp_path, "runpy.run_path('padded_example.py', run_name='__main__')").startswith("tensor([[[[")
    alone(tmp_path, SAVED.format(name="padded"))
    right = reference(LINE, q, k, v, padding=padding)
    torch.testing.assert_close(torch.load(tmp_path / "torch.pt"), right, atol=1e-5, rtol=1e-5)
    import numpy

    torch.testing.assert_close(torch.from_numpy(numpy.load(tmp_path / "numpy.npy")), right, atol=1e-5, rtol=1e-5)


@pytest.mark.exhaustive
def test_decoding(tmp_path):
    made = write_decode(parse(CACHED), DecodeForm(16, 16, "float32"), host(), tmp_path, "cached")
    assert isinstance(made, Emitted)
    assert {f.name for f in tmp_path.iterdir()} == {
        "cached.py",
        "cached_tir.py",
        "cached_example.py",
        "libcached.so",
        "cached.json",
    }
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    cache = pack_cache(CACHED, k, v)
    torch.save((q, *(x for x in vars(cache).values() if x is not None)), tmp_path / "given.pt")
    assert alone(tmp_path, "runpy.run_path('cached_example.py', run_name='__main__')").startswith("tensor([[[[")
    alone(tmp_path, SAVED.format(name="cached"))
    torch.testing.assert_close(torch.load(tmp_path / "torch.pt"), attend_cache(CACHED, q, cache).output, atol=1e-5, rtol=1e-5)


def test_operands_that_no_expression_reads(tmp_path):
    line = "softmax norm(rms, k_gain=gain) scale(0.25) blocks(64, 48, operand=list)"
    made = write(parse(line), Form(16, 16, "float32", (("gain", "float32"), ("list", "bool"))), host(), tmp_path, "listed")
    assert isinstance(made, Emitted) and "listed.cu" not in made.files
    assert alone(tmp_path, "runpy.run_path('listed_example.py', run_name='__main__')").startswith("tensor([[[[")


def test_another_system_gets_object_code(tmp_path):
    made = write(parse("softmax scale(0.125)"), Form(16, 16, "float32"), named("apple-m1"), tmp_path, "plain")
    assert isinstance(made, Emitted)
    assert made.library == "libplain.o"
    assert "cc -shared -o libplain.so libplain.o" in (tmp_path / "plain.py").read_text()


def test_what_is_refused_writes_nothing(tmp_path):
    said = write(parse("sigmoid"), FORM, host(), tmp_path, "kernel")
    assert isinstance(said, Refusal)
    assert said.reason == "the normaliser is sigmoid, not softmax"
    assert list(tmp_path.iterdir()) == []
