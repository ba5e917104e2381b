"""Kernels as a table: figures of those that were made, reasons of those that were not."""

from __future__ import annotations

from attnopt.codegen.site_kernels import SiteKernel
from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.tiles import Tile
from attnopt.codegen.tvm.files import Emitted
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse
from attnopt.report.kernels import kernel_rows, kernel_table
from attnopt.report.table import as_text

MADE = (
    SiteKernel("attention_0", parse("softmax causal"), ("a", "b"),
               Compiled("sm_90", Tile(128, 64, 8, 3), "", "", b"", 192, 0, 131072)),
    SiteKernel("attention_1", parse("sigmoid"), ("c",), Refusal("the normaliser is sigmoid, not softmax")),
)  # fmt: skip


def test_table():
    assert as_text(kernel_table(MADE)).splitlines() == [
        "kernel       sites  spec            queries x keys, warps, stages                 registers  shared KiB",
        "attention_0  2      softmax causal  128 x 64, 8, 3                                192        128       ",
        "attention_1  1      sigmoid         none: the normaliser is sigmoid, not softmax",
    ]
    assert as_text(kernel_table(())) == "no attention found"


def test_a_cpu_has_columns_of_its_own():
    result = Emitted("haswell", {"block_q": 24, "block_k": 64}, "libattention_0.so", 59392, ("attention_0.py",))
    made = (SiteKernel("attention_0", parse("softmax causal"), ("a",), result), MADE[1])
    assert as_text(kernel_table(made)).splitlines() == [
        "kernel       sites  spec            compiled for                                  tile                    library, KiB         ",
        "attention_0  1      softmax causal  haswell                                       block_q 24, block_k 64  libattention_0.so, 58",
        "attention_1  1      sigmoid         none: the normaliser is sigmoid, not softmax",
    ]
    assert kernel_rows(made)[0]["library_bytes"] == 59392


def test_rows():
    first, second = kernel_rows(MADE)
    assert (first["tile"], first["registers"], first["sites"]) == ([128, 64, 8, 3], 192, ["a", "b"])
    assert second["refused"] == "the normaliser is sigmoid, not softmax"
