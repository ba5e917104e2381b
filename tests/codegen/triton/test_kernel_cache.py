"""Triton's kernels on disk: one process compiles for all, and what a kernel depends on makes another entry."""

from __future__ import annotations

import subprocess
import sys

import pytest

from attnopt.codegen.kernel_cache import digest
from attnopt.codegen.triton import kernel_cache
from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.kernel_cache import compiled, members, question, restored
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.spec import parse

SMALL = Compiled("sm_80", Tile(64, 32, 4, 2), "def attention():\n    …\n", ".version 8.0\n", bytes(range(256)), 168, 0, 98304)
SPEC, FORM = parse("softmax scale(0.25) causal"), Form(16, 16)
SECOND = """
import sys, triton
from attnopt.codegen.triton import kernel_cache
from attnopt.codegen.triton.triton_attention import kernel
triton.compile = triton.compiler.compile = None  # whoever calls them fails
from attnopt.codegen.triton.prefill import Form
from attnopt.ir.spec import parse
made = kernel_cache.compiled(parse("softmax scale(0.25) causal"), Form(16, 16), "sm_80")
print(made.registers, made.source.count("tl.dot"), kernel(parse("softmax scale(0.25) causal"), Form(16, 16), "sm_80").NUM_WARPS)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def test_the_second_process_does_not_compile(folder):
    made = compiled(SPEC, FORM, "sm_80")
    assert isinstance(made, Compiled)
    assert len(list(folder.iterdir())) == 1
    assert compiled(SPEC, FORM, "sm_80") == made
    told = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.split() == [str(made.registers), str(made.source.count("tl.dot")), str(made.tile.num_warps)]


def test_what_is_written_reads_back():
    assert restored(members(SMALL)) == SMALL


def test_everything_that_matters_makes_another_key(monkeypatch):
    def key(line="softmax", tile=SMALL.tile):
        return digest(question("prefill", parse(line), FORM, "sm_80", [tile]))

    first = key()
    assert key("softmax causal") != first
    assert key(tile=Tile(64, 32, 4, 3)) != first
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    assert key() == first
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert key() != first
    monkeypatch.undo()
    monkeypatch.setattr(kernel_cache, "version", lambda: "3.6.0")
    assert key() != first
