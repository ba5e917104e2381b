"""TVM's kernels on disk: what is written reads back, and what a kernel depends on makes another entry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnopt.codegen.kernel_cache import folder
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm import kernel_cache
from attnopt.codegen.tvm.compile import Compiled
from attnopt.codegen.tvm.cpu import named
from attnopt.codegen.tvm.kernel_cache import compiled, members, restored
from attnopt.codegen.tvm.tiles import Tile
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse

MADE = Compiled("haswell", "def attention(): …\n", "so", bytes(range(256)))
ASKED = ("prefill", parse("softmax causal"), Form(16, 16), Tile(16, 64, 4, 4), named("haswell"))


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path))


def test_what_is_written_reads_back():
    assert restored(members(MADE)) == MADE


def test_compiled_once_for_each_question(monkeypatch):
    sources = []
    monkeypatch.setattr(
        kernel_cache, "compile_source", lambda source, cpu: sources.append(source) or replace(MADE, source=source)
    )
    for at, asked in enumerate((
        ASKED, ASKED, ("decode", *ASKED[1:]), (*ASKED[:1], parse("softmax"), *ASKED[2:]), (*ASKED[:2], Form(16, 32), *ASKED[3:]),
        (*ASKED[:3], Tile(8, 64, 4, 4), ASKED[4]), (*ASKED[:4], named("znver2")),
    )):  # fmt: skip
        made = compiled(*asked, lambda at=at: f"source {at}")
        assert made.source == f"source {0 if at == 1 else at}"
    assert sources == [f"source {at}" for at in (0, 2, 3, 4, 5, 6)]
    assert len(list(folder().iterdir())) == 6
    monkeypatch.setattr(kernel_cache, "version", lambda: "0.1")
    assert compiled(*ASKED, lambda: "again").source == "again"


def test_refusals_are_not_kept(monkeypatch):
    monkeypatch.setattr(kernel_cache, "compile_source", lambda source, cpu: Refusal("no"))
    assert compiled(*ASKED, lambda: "source") == Refusal("no")
    assert list(folder().iterdir()) == []
