"""Printed expressions mean in Triton what `evaluate` says, at every index."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.emitted import load
from attnopt.codegen.triton.expressions import FUNCTIONS, Printer, called
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.grammar import parse_expr

SOURCE = """\
import torch
import triton
import triton.language as tl

{functions}
@triton.jit
def tabulate(p_out, p_table, s_table_0, s_table_1, offset, q_len, kv_len):
    row = tl.arange(0, 16)[:, None]
    k = tl.arange(0, 16)[None, :]
    m_k = k < kv_len
    q = row + offset
    b = tl.program_id(0)
    h = tl.program_id(1)
    value = tl.broadcast_to(tl.cast({text}, tl.float32), [16, 16])
    tl.store(p_out + (b * 4 + h) * 256 + row * 16 + k, value)
"""


@pytest.mark.parametrize("offset", [0, -5])
@pytest.mark.parametrize(
    "text",
    [
        "causal", "window(4) & lookahead(3)", "global(3) | global_query(2)", "chunk(4)", "near_blocks(3, 1)", "power_blocks(2)",
        "dilated(3)", "diagonal", "neighborhood(3, 1, 1, 16, 1)", "~(k <= q) | q == 0", "(k - q) // 3 == -1", "(k - q) % 4 == 3",
        "min(k, 3) + max(q, 2) == 5", "min(k, q) == 1", "abs(k - q) < 3", "k * 0.5 < q", "where(h < 2, causal, window(2))",
        "k < inf", "int(float(k) * 0.7) == 2", "pow(2.0, -h) > 0.3", "k != q & b == 1", "-(k - q) > 1", "(k + 1) / (h + 1) > 0.5",
        "(k <= q) + (k <= 3) == 2", "(k <= q) * 2 > 1", "floor(k * 0.3) == 1", "sqrt(k) > 2", "last(5)", "k < size(k) - size(q) + 3",
        "(q - k) // -3", "(q - k) % -3", "k - (q - b)", "2 * (k - (q + 1)) - 3", "tanh(0.1 * (k - q))", "sin(k) + cos(float(q))",
        "exp(-0.1 * k) * log(k + 1.0)", "sigmoid(0.3 * (q - k))", "where(k < q, 1, 0.5)", "load(table, row % 3, k)",
        "where(load(table, 0, k) > 0.0, causal, ~causal)", "load(table, 1, min(k, 4)) * (k - q)", "where(causal, true, k % 2 == 0)",
        "float(causal) - 0.5", "abs(q // 4 - k // 4) <= 1", "causal_random_blocks(2, 1, 2, 46000)",
    ],
)  # fmt: skip
def test_printed_expressions_mean_the_same(text, offset):
    expr, table = parse_expr(text), torch.randn(3, 16)
    grid = Grid(2, 4, 16, 16, offset)
    printer = Printer({"table": "float32"}, from_zero=offset == 0)
    assert printer.refusal(expr) is None
    written = printer.text(expr)
    functions = "\n\n".join(FUNCTIONS[name] for name in called(written))
    out = torch.full((2, 4, 16, 16), torch.nan)
    module = load(SOURCE.format(functions=functions, text=written))
    module.tabulate[(2, 4)](out, table, table.stride(0), table.stride(1), offset, 16, 16)
    right = evaluate(expr, grid, {"table": table}).float().expand(2, 4, 16, 16)
    torch.testing.assert_close(out, right, atol=2e-6, rtol=2e-6)
