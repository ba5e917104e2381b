"""Transpose, Reshape, Squeeze, Expand, …  ->  permute, reshape, expand; Identity and inference-time Dropout disappear."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from attnopt.hosts.onnx.lengths import reshaped
from attnopt.ir.dims import product
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation

Inputs = list[Value | None]
Rule = Callable[["Translation", Inputs], bool]


def identity(t: Translation, x: Inputs) -> bool:
    return t.same(x[0])


def dropout(t: Translation, x: Inputs) -> bool:
    """Off unless training_mode says otherwise; a mask output that is read keeps the node."""
    training = t.held(x[2]) if len(x) > 2 and x[2] is not None else [False]
    read = len(t.node.outputs) > 1 and (t.node.outputs[1].uses() or t.node.outputs[1].is_graph_output())
    return training == [False] and not read and t.same(x[0])


def transpose(t: Translation, x: Inputs) -> bool:
    shape = x[0].shape if x[0] is not None else None
    if shape is None:
        return False
    perm = tuple(t.attr("perm") or reversed(range(len(shape))))
    if perm == tuple(range(len(shape))):
        return t.same(x[0])
    turned = tuple(shape[i] for i in perm)
    if x[0] is not None and x[0].load is not None and perm == (1, 0) and only_multiplied_by(t.node):
        t.weights[t.outside(turned)] = x[0]
        return True
    return t.result("permute", x[0], shape=turned, perm=perm)


def only_multiplied_by(node: ir.Node) -> bool:
    """Whether all that reads a node's result are products with it on the right, in the same graph."""
    held = node.outputs[0]
    uses = list(held.uses())
    return not held.is_graph_output() and all(n.op_type == "MatMul" and at == 1 and n.graph is node.graph for n, at in uses)


def reshape(t: Translation, x: Inputs) -> bool:
    target = t.vector(x[1])
    shape = (
        reshaped(x[0].shape, target, allow_zero=bool(t.attr("allowzero", 0))) if target is not None and x[0] is not None else None
    )
    if shape is None:
        declared = t.declared(t.node.outputs[0])
        return declared is not None and t.result("reshape", x[0], shape=declared)
    return t.result("reshape", x[0], shape=shape)


def axes_argument(t: Translation, x: Inputs) -> list[int] | None:
    return t.held(x[1]) if len(x) > 1 and x[1] is not None else t.attr("axes")


def unsqueeze(t: Translation, x: Inputs) -> bool:
    axes = axes_argument(t, x)
    if x[0] is None or x[0].shape is None or axes is None:
        return False
    rank = len(x[0].shape) + len(axes)
    new = {a % rank for a in axes}
    rest = iter(x[0].shape)
    return t.result("reshape", x[0], shape=tuple(1 if i in new else next(rest) for i in range(rank)))


def squeeze(t: Translation, x: Inputs) -> bool:
    axes = axes_argument(t, x)
    if x[0] is None or x[0].shape is None:
        return False
    rank = len(x[0].shape)
    gone = {a % rank for a in axes} if axes is not None else {i for i, d in enumerate(x[0].shape) if d == 1}
    return t.result("reshape", x[0], shape=tuple(d for i, d in enumerate(x[0].shape) if i not in gone))


def flatten(t: Translation, x: Inputs) -> bool:
    if x[0] is None or x[0].shape is None:
        return False
    axis = t.attr("axis", 1) % (len(x[0].shape) + 1)
    return t.result("reshape", x[0], shape=(product(x[0].shape[:axis]), product(x[0].shape[axis:])))


def expand(t: Translation, x: Inputs) -> bool:
    target = t.vector(x[1])
    if x[0] is None or x[0].shape is None or target is None:
        declared = t.declared(t.node.outputs[0])
        return declared is not None and t.result("expand", x[0], shape=declared)
    source = (1,) * (len(target) - len(x[0].shape)) + x[0].shape
    wide = (1,) * (len(source) - len(target)) + target
    shape = tuple(s if d == 1 or d == s else d for s, d in zip(source, wide, strict=True))
    return t.same(x[0]) if shape == x[0].shape else t.result("expand", x[0], shape=shape)


def tile(t: Translation, x: Inputs) -> bool:
    """The whole tensor repeated: index i of the result reads i mod size."""
    times = t.vector(x[1])
    if x[0] is None or x[0].shape is None or times is None or len(times) != len(x[0].shape):
        return False
    shape = tuple(product([r, s]) for r, s in zip(times, x[0].shape, strict=True))
    if all(r == 1 for r in times):
        return t.same(x[0])
    if all(r == 1 or s == 1 for r, s in zip(times, x[0].shape, strict=True)):
        return t.result("expand", x[0], shape=shape)
    apart = t.emit("reshape", x[0], shape=tuple(d for s in x[0].shape for d in (1, s)))
    wide = t.emit("expand", apart, shape=tuple(d for r, s in zip(times, x[0].shape, strict=True) for d in (r, s)))
    return t.result("reshape", wide, shape=shape)


RULES: dict[str, Rule] = {
    "Identity": identity,
    "Dropout": dropout,
    "Transpose": transpose,
    "Reshape": reshape,
    "Unsqueeze": unsqueeze,
    "Squeeze": squeeze,
    "Flatten": flatten,
    "Expand": expand,
    "Tile": tile,
}
