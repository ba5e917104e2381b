"""Expressions written as nodes of both hosts hold what `evaluate` says they mean."""

from __future__ import annotations

import pytest
import torch
from lowering_cases import BIAS, SEEN, TABLE, Case, inputs, opened

from attnopt.codegen.materialize import Materializer, writable
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.grammar import parse_expr

CASE = Case("softmax")
MASKS = [
    "causal", "window(4) & lookahead(3)", "global(3) | global_query(2)", "chunk(4)", "near_blocks(3, 1)", "power_blocks(2)",
    "dilated(3)", "diagonal", "neighborhood(3, 1, 1, 12, 1)", "causal_neighborhood(3, 1, 1, 12, 1)", "true", "k != q",
    "causal_random_blocks(1, 1, 3, 7)",
    "~(k <= q) | q == 0", "(k - q) // 3 == -1", "(k - q) % 4 == 3", "(k - q) % -4 == -1", "min(k, 3) + max(q, 2) == 5",
    "abs(k - q) < 3", "h % 2 == 0 & k <= q", "b == 1 | k == 0", "k * 0.5 < q", "where(h < 2, causal, window(2))",
    f"{SEEN} & causal", f"{BIAS} > 0", f"int({SEEN}) + k > 4", f"{BIAS} // 0.5 == -1", "(k <= q) + (k <= 3) == 2",
    f"where({SEEN}, k, q <= 3) > 2",
]  # fmt: skip
BIASES = [
    "k", "3", "-(k - q) * 0.5", "float(k) / 3.0", "(k + 1) / (q + 1)", "exp(-abs(k - q))", "log(k + 1)", "sqrt(k)", "tanh(k - q)",
    "sin(k) + cos(float(q))", "sigmoid(k - q)", "floor(k * 0.3) + floor(k)", "pow(2.0, -h)", "pow(2, -h) * (k - q)", "pow(k, 2)",
    "where(k <= q, 0.0, -1e9)", f"{BIAS} * 2.0 + {TABLE}", f"where({SEEN}, {TABLE}, -5.0)", "int(k * 0.7)", "k // 2 * 1.0",
    "min(0.5, k)", f"max({BIAS}, 0.0)", "float(k - q) // 3.0", "float(k - q) % 3.0", f"{BIAS} % 0.5", "(k <= q) * 2.0",
]  # fmt: skip


@pytest.mark.parametrize("host", ["torch", "onnx"])
@pytest.mark.parametrize("text", MASKS + BIASES)
def test_written_as_it_is_meant(text, host):
    expr, given = parse_expr(text), inputs(CASE)
    trial, site = opened(CASE, host)
    assert writable(expr, site) is None
    node = site.output.value.producer
    assert node is not None
    builder = trial.builder(node)
    value = Materializer(site, builder, "float32").write(expr)
    assert text not in MASKS or value.dtype == "bool"
    number = builder.emit("cast", value, shape=value.shape or (), dtype="float32")
    whole = tuple(site.size(axis) for axis in "bhqk")
    trial.replace(site.output.value, builder.emit("expand", number, shape=whole, dtype="float32"))
    trial.finish()
    wanted = evaluate(expr, Grid(CASE.batch, *(CASE.heads[0], *CASE.lengths)), given)
    (got,) = trial.runner()(given)
    torch.testing.assert_close(got, wanted.float().expand_as(got), atol=1e-5, rtol=1e-5)


def test_equal_parts_are_written_once():
    trial, site = opened(CASE, "torch")
    node = site.output.value.producer
    assert node is not None
    before = len(trial.module.graph.nodes)
    Materializer(site, trial.builder(node), "float32").write(parse_expr("causal & (k <= q | (k <= q & k == 0))"))
    made = [
        n.name.rpartition("_")[0] or n.name for n in list(trial.module.graph.nodes)[-1 - len(trial.module.graph.nodes) + before :]
    ]
    assert made.count("le") == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("causal & k < size(k)", "size(k) has no node in this graph"),
        ("load(absent, b, 0, 0, k) > 0", "'absent' is not an operand of this site"),
        ("last(4)", "size(k) has no node in this graph"),
    ],
)
def test_refusals(text, reason):
    refused = writable(parse_expr(text), opened(CASE, "torch")[1])
    assert refused is not None
    assert refused.reason == reason
