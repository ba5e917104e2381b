"""GatherND, GatherElements  ->  index.

GatherND(x, concat(b, k))                  ->   index(x, b, k)
GatherElements(x [R, C], j [R, N], axis=1) ->   index(x, iota(R)[:, None], j)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.hosts.onnx.rules.access import gather_rows
from attnopt.hosts.onnx.rules.heads import part
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.dims import Shape
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def gather_nd(t: Translation, x: Inputs) -> bool:
    """The last dimension of the indices counts the axes that are read; those of the batch come first."""
    value, indices = x
    if value is None or indices is None or value.shape is None or not indices.shape:
        return False
    count, batch = indices.shape[-1], int(t.attr("batch_dims", 0))
    if not isinstance(count, int) or not 0 < count + batch <= len(value.shape):
        return False
    lead = indices.shape[:-1]
    chosen = [*(along(t, lead, axis) for axis in range(batch)), *columns(t, indices, count)]
    shape = (*lead, *value.shape[len(chosen) :])
    if len(chosen) == 1:
        return t.result("gather", value, chosen[0], shape=shape, axis=0)
    return t.result("index", value, *chosen, shape=shape, axes=tuple(range(len(chosen))))


def columns(t: Translation, indices: Value, count: int) -> list[Value]:
    """The indices of each axis [...]: what was concatenated, where it was, else slices."""
    shape = indices.shape or ()
    node, last = indices.producer, len(shape) - 1
    if count == 1:
        parts = [indices]
    elif node is not None and node.op == "concat" and node.attrs["axis"] == last and len(node.inputs) == count:
        parts = [i for i in node.inputs if i is not None and i.shape is not None and i.shape[-1] == 1]
    else:
        parts = []
    if len(parts) != count:
        parts = [part(t, indices, last, i, i + 1) for i in range(count)]
    return [t.emit("reshape", p, shape=shape[:-1]) for p in parts]


def along(t: Translation, shape: Shape, axis: int) -> Value:
    """0, 1, 2, … along one axis of a shape."""
    line = t.emit("iota", shape=(shape[axis],), dtype="int64", start=0, step=1)
    return t.emit("reshape", line, shape=tuple(d if i == axis else 1 for i, d in enumerate(shape)))


def gather_elements(t: Translation, x: Inputs) -> bool:
    value, indices = x
    if value is None or indices is None or value.shape is None or indices.shape is None or not value.shape:
        return False
    if gather_rows(t, x):
        return True
    axis = int(t.attr("axis", 0)) % len(value.shape)
    chosen = [indices if i == axis else along(t, indices.shape, i) for i in range(len(value.shape))]
    if len(chosen) == 1:
        return t.result("gather", value, indices, shape=indices.shape, axis=0)
    return t.result("index", value, *chosen, shape=indices.shape, axes=tuple(range(len(chosen))))


RULES: dict[str, Rule] = {"GatherND": gather_nd, "GatherElements": gather_elements}
