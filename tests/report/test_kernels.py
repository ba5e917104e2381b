"""Kernels as a table: figures of those that were made, reasons of those that were not."""

from __future__ import annotations

from attnopt.codegen.site_kernels import SiteKernel
from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.tiles import Tile
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


def test_rows():
    first, second = kernel_rows(MADE)
    assert (first["tile"], first["registers"], first["sites"]) == ([128, 64, 8, 3], 192, ["a", "b"])
    assert second["refused"] == "the normaliser is sigmoid, not softmax"
