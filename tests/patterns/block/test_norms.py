"""Norms in every spelling, what they are computed from, and rows that are nearly a norm."""

from __future__ import annotations

import pytest
import torch
from canonical import compute
from spelling import B, L, Recorder

from attnopt.ir.block_reference import normed
from attnopt.patterns.block.norms import norm_after, norm_at, peeled

C = 8


def spelled(r: Recorder, x, kind: str):
    """x normalised over its last axis, in one spelling."""
    square = r.binary("pow", x, 2.0)
    if kind == "rms":
        return r.binary("mul", x, r.unary("rsqrt", r.binary("add", r.reduce("reduce_mean", square, -1), 1e-6)))
    if kind == "rms_of_onnx":
        root = r.unary("sqrt", r.binary("add", r.reduce("reduce_mean", square, -1), 1e-6))
        return r.binary("mul", x, r.unary("reciprocal", root))
    if kind == "rms_in_double":
        wide = r.unary("cast", x, "float64")
        mean = r.reduce("reduce_mean", r.binary("mul", wide, wide, "float64"), -1)
        return r.unary("cast", r.binary("div", wide, r.unary("sqrt", r.binary("add", mean, 1e-6))), "float32")
    if kind == "rms_by_power":
        return r.binary("mul", x, r.binary("pow", r.binary("add", r.reduce("reduce_mean", square, -1), 1e-6), -0.5))
    if kind == "layer":
        less = r.binary("sub", x, r.reduce("reduce_mean", x, -1))
        root = r.unary("sqrt", r.binary("add", r.reduce("reduce_mean", r.binary("pow", less, 2.0), -1), 1e-6))
        return r.binary("div", less, root)
    if kind == "layer_of_cohere":  # x - mean(x) written twice
        less, again = (r.binary("sub", x, mean) for mean in [r.reduce("reduce_mean", x, -1)] for _ in range(2))
        mean = r.reduce("reduce_mean", r.binary("pow", less, 2.0), -1)
        return r.binary("mul", again, r.unary("rsqrt", r.binary("add", mean, 1e-6)))
    if kind == "l2":
        return r.binary("mul", x, r.unary("rsqrt", r.binary("add", r.reduce("reduce_sum", square, -1), 1e-6)))
    length = r.unary("sqrt", r.reduce("reduce_sum", square, -1))
    return r.binary("div", x, r.expand(r.binary("maximum", length, 1e-6), *x.shape))


def values(r: Recorder, x: torch.Tensor) -> dict:
    """Every value of the graph, computed node by node."""
    known = {r.graph.inputs[0]: x}
    for node in r.graph.nodes:
        read = [known[i] if i in known else i.load() for i in node.inputs]
        known[node.output] = compute(node, read, {"batch": x.shape[0], "length": x.shape[1]})
    return known


KINDS = ("rms", "rms_of_onnx", "rms_in_double", "rms_by_power", "layer", "layer_of_cohere", "l2", "l2_with_floor")


GAINS = [(kind, gain) for kind in KINDS for gain in ("none", "weight", "one_plus")]


@pytest.mark.parametrize(("kind", "gain"), [*GAINS, ("layer", "weight_and_bias"), ("layer_of_cohere", "weight_and_bias")])
def test_a_norm_is_what_it_computes(kind, gain):
    r = Recorder()
    x = r.input("x", B, L, C)
    made = spelled(r, x, kind)
    weight, bias = torch.randn(C), torch.randn(C)
    if gain == "one_plus":
        made = r.binary("mul", made, r.binary("add", r.constant(weight), 1.0))
    elif gain != "none":
        made = r.binary("mul", r.constant(weight), made)
    if gain == "weight_and_bias":
        made = r.binary("add", made, r.constant(bias))
    norm = norm_at(made)
    assert norm is not None and norm.kind == kind.partition("_")[0]
    assert (norm.weight is None, norm.shift) == (gain == "none", 1.0 if gain == "one_plus" else 0.0)
    held = torch.randn(2, 3, C)
    torch.testing.assert_close(normed(norm, held), values(r, held)[made].float())
    found = norm_after(x)
    assert found is not None and peeled(found.output) is peeled(made)
    assert found.eps == 1e-6


@pytest.mark.parametrize("wrong", ["other_row", "cube", "other_axis", "batch_gain"])
def test_near_norms_are_none(wrong):
    r = Recorder()
    x, y = r.input("x", B, L, C), r.input("y", B, L, C)
    of = y if wrong == "other_row" else x
    square = r.binary("pow", of, 3.0 if wrong == "cube" else 2.0)
    mean = r.reduce("reduce_mean", square, 1 if wrong == "other_axis" else -1)
    made = r.binary("mul", x, r.unary("rsqrt", r.binary("add", mean, 1e-6)))
    if wrong == "batch_gain":
        made = r.binary("mul", made, r.constant(torch.randn(5, 1, 1)))
    assert norm_at(made) is None
