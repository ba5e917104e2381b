"""Kernels compiled for this machine and for others: what they compute, in which form, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small_kernel import SOURCE

from attnopt.codegen.tvm import compile as compiling
from attnopt.codegen.tvm.compile import Compiled, assembly, compile_source, loaded
from attnopt.codegen.tvm.cpu import host, named
from attnopt.ir.reference import reference
from attnopt.ir.site import Refusal

pytest.importorskip("tvm", reason="TVM is not installed")


@pytest.fixture(scope="module")
def made():
    return compile_source(SOURCE, host())


def check(kernel):
    q, k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 9, 2, 16).transpose(1, 2), torch.randn(2, 2, 9, 32)[..., ::2]
    o = torch.full((2, 4, 7, 16), torch.nan)
    kernel(q, k, v.contiguous(), o)
    torch.testing.assert_close(o, reference("softmax scale(0.25)", q, k, v))
    with pytest.raises(ValueError):
        kernel(q, k, v, o)  # channels that are not side by side


def test_a_library_runs(made):
    assert (made.cpu, made.form, made.source) == (host().name, "so", SOURCE)
    check(loaded(made))


def test_without_a_linker(monkeypatch):
    monkeypatch.setattr("tvm.support.cc.create_shared", no_linker)
    made = compile_source(SOURCE, host())
    assert isinstance(made, Compiled)
    assert made.form == "ll"
    assert made.library.startswith(b"; ModuleID")
    check(loaded(made))


def no_linker(*args, **kwargs):
    raise RuntimeError("cc is not found")


def test_other_machines():
    made = compile_source(SOURCE, named("apple-m1"))
    assert isinstance(made, Compiled)
    assert made.form == "o"
    assert made.library[:4] == b"\xcf\xfa\xed\xfe"  # Mach-O, 64 bits
    with pytest.raises(ValueError, match="object code for apple-m1"):
        loaded(made)
    assert "fmadd" in assembly(SOURCE, named("apple-m1")) or "fmla" in assembly(SOURCE, named("apple-m1"))


def test_what_tvm_refuses():
    broken = compile_source(SOURCE.replace("T.exp(", "T.no_such_function("), host())
    assert isinstance(broken, Refusal)
    assert broken.reason.startswith("TVM cannot compile it: ")


def test_without_tvm(monkeypatch):
    monkeypatch.setattr(compiling, "missing", lambda: "TVM is not installed, so its kernels are left out")
    assert compile_source(SOURCE, host()) == Refusal("TVM is not installed, so its kernels are left out")


def test_a_library_loads_without_the_compiler(made, tmp_path):
    """A second process imports neither `tvm` nor its compiler: a kernel that is compiled is ready in a moment."""
    (tmp_path / "kernel.so").write_bytes(made.library)
    code = "import sys, torch\nfrom attnopt.codegen.tvm.compile import Compiled, loaded\n"
    code += f"made = Compiled('', '', 'so', open({str(tmp_path / 'kernel.so')!r}, 'rb').read())\n"
    code += "x, o = torch.ones(1, 1, 2, 16), torch.empty(1, 1, 2, 16)\nloaded(made)(x, x, x, o)\n"
    code += "print(o.sum().item(), 'tvm' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.stdout.split() == ["32.0", "False"], told.stderr


def test_a_broken_library_is_an_error(made):
    with pytest.raises((OSError, RuntimeError)):
        loaded(replace(made, library=made.library[:100]))
