"""MatMul, Gemm, Einsum  ->  matmul and linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.hosts.onnx.lengths import broadcast
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.dims import Dim, product
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def matmul(t: Translation, x: Inputs) -> bool:
    left, right = x
    if left is None or right is None or left.shape is None or right.shape is None or min(len(left.shape), len(right.shape)) < 2:
        return False
    lead = broadcast([left.shape[:-2], right.shape[:-2]], t.found_equal) if len(left.shape) + len(right.shape) > 4 else ()
    return t.result("matmul", left, right, shape=(*lead, left.shape[-2], right.shape[-1]))


def gemm(t: Translation, x: Inputs) -> bool:
    """alpha * A B + beta * C. With B transposed it is a linear layer whose weight is stored [out, in]."""
    left, right, shift = (*x, None)[:3]
    if left is None or right is None or left.shape is None or right.shape is None or t.attr("transA", 0):
        return False
    alpha, beta, across = t.attr("alpha", 1.0), t.attr("beta", 1.0), t.attr("transB", 0)
    columns = right.shape[0 if across else 1]
    shape = (left.shape[0], columns)
    plain = alpha == 1.0 and (shift is None or beta == 1.0)
    if plain and across and (shift is None or shift.shape == (columns,)):
        return t.result("linear", left, right, shift, shape=shape)
    b = t.emit("permute", right, shape=(right.shape[1], right.shape[0]), perm=(1, 0)) if across else right
    if plain and shift is None:
        return t.result("matmul", left, b, shape=shape)
    made = t.emit("matmul", left, b, shape=shape)
    if alpha != 1.0:
        if shift is None:
            return t.result("mul", made, t.number(alpha, left.dtype), shape=shape)
        made = t.emit("mul", made, t.number(alpha, left.dtype), shape=shape)
    if shift is not None and beta != 1.0:
        shift = t.emit("mul", shift, t.number(beta, left.dtype), shape=shift.shape or ())
    return t.result("add", made, shift, shape=shape)


def einsum(t: Translation, x: Inputs) -> bool:
    """Two operands without repeated or summed-out labels: permute, merge, matmul, split, permute."""
    equation = str(t.attr("equation")).replace(" ", "")
    if len(x) != 2 or "->" not in equation or "." in equation:
        return False
    left, right = x
    inputs, out = equation.split("->")
    first, second = inputs.split(",")
    if left is None or right is None or left.shape is None or right.shape is None:
        return False
    if any(len(set(labels)) != len(labels) for labels in (first, second, out)):
        return False
    size: dict[str, Dim] = {**dict(zip(second, right.shape, strict=True)), **dict(zip(first, left.shape, strict=True))}
    batch = [c for c in out if c in first and c in second]
    rows = [c for c in first if c in out and c not in second]
    columns = [c for c in second if c in out and c not in first]
    summed = [c for c in first if c in second and c not in out]
    if {*first, *second} != {*batch, *rows, *columns, *summed} or not summed:
        return False
    for label in (*batch, *summed):
        one, other = left.shape[first.index(label)], right.shape[second.index(label)]
        if one != other:
            broadcast([(one,), (other,)], t.found_equal)  # equal where the model runs, if both are symbols
            if isinstance(one, int) or isinstance(other, int):
                return False

    def arranged(value: Value, labels: str, groups: list[list[str]]) -> Value:
        order = [*batch, *(c for group in groups for c in group)]
        perm = tuple(labels.index(c) for c in order)
        if perm != tuple(range(len(perm))):
            value = t.emit("permute", value, shape=tuple(size[c] for c in order), perm=perm)
        shape = (*(size[c] for c in batch), *(product(size[c] for c in group) for group in groups))
        return value if value.shape == shape else t.emit("reshape", value, shape=shape)

    a, b = arranged(left, first, [rows, summed]), arranged(right, second, [summed, columns])
    made = [*batch, *rows, *columns]
    flat = (*(size[c] for c in batch), product(size[c] for c in rows), product(size[c] for c in columns))
    apart = tuple(size[c] for c in made)
    perm = tuple(made.index(c) for c in out)
    straight = perm == tuple(range(len(perm)))
    if straight and flat == apart:
        return t.result("matmul", a, b, shape=flat)
    whole = t.emit("matmul", a, b, shape=flat)
    if straight:
        return t.result("reshape", whole, shape=apart)
    split = whole if flat == apart else t.emit("reshape", whole, shape=apart)
    return t.result("permute", split, shape=tuple(size[c] for c in out), perm=perm)


RULES: dict[str, Rule] = {"MatMul": matmul, "Gemm": gemm, "Einsum": einsum}
