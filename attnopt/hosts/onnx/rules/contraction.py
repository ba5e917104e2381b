"""MatMul, Gemm, Einsum  ->  matmul and linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.hosts.einsum import written_out
from attnopt.hosts.onnx.lengths import broadcast
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.dims import Dim, product
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def matmul(t: Translation, x: Inputs) -> bool:
    """A product; with a stored matrix that stands transposed, as of a head that is tied to the embedding, a linear layer."""
    left, right = x
    if left is None or right is None or left.shape is None or right.shape is None or min(len(left.shape), len(right.shape)) < 2:
        return False
    if (weight := t.weights.get(right)) is not None:
        return t.result("linear", left, weight, shape=(*left.shape[:-1], right.shape[-1]))
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
    """One or two operands without repeated labels: permute, sum what is alone, merge, matmul (or mul), split, permute."""
    if any(v is None or v.shape is None for v in x) or len(x) not in (1, 2):
        return False
    found = written_out(str(t.attr("equation")), [len(v.shape or ()) for v in x if v is not None])
    if found is None:
        return False
    sides, out = found
    size: dict[str, Dim] = {}
    for labels, value in zip(sides[::-1], x[::-1], strict=True):
        assert value is not None and value.shape is not None
        size.update(zip(labels, value.shape, strict=True))
    alone = [[c for c in labels if c not in out and all(c not in o for o in sides if o is not labels)] for labels in sides]
    operands = [summed_over(t, v, labels, gone) for v, labels, gone in zip(x, sides, alone, strict=True)]  # type: ignore[arg-type]
    sides = [[c for c in labels if c not in gone] for labels, gone in zip(sides, alone, strict=True)]
    if len(operands) == 1:
        return arranged_last(t, operands[0], sides[0], out, size)
    return product_of(t, operands, sides, out, size)


def summed_over(t: Translation, value: Value, labels: list[str], gone: list[str]) -> Value:
    if not gone:
        return value
    shape = tuple(d for c, d in zip(labels, value.shape or (), strict=True) if c not in gone)
    return t.emit("reduce_sum", value, shape=shape, axes=tuple(labels.index(c) for c in gone), keepdims=False)


def arranged_last(t: Translation, value: Value, labels: list[str], out: list[str], size: dict[str, Dim]) -> bool:
    perm = tuple(labels.index(c) for c in out)
    if perm == tuple(range(len(perm))):
        return t.same(value)
    return t.result("permute", value, shape=tuple(size[c] for c in out), perm=perm)


def product_of(t: Translation, x: list[Value], sides: list[list[str]], out: list[str], size: dict[str, Dim]) -> bool:
    (left, right), (first, second) = x, sides
    assert left.shape is not None and right.shape is not None
    batch = [c for c in out if c in first and c in second]
    rows = [c for c in first if c in out and c not in second]
    columns = [c for c in second if c in out and c not in first]
    summed = [c for c in first if c in second and c not in out]
    for label in (*batch, *summed):
        one, other = left.shape[first.index(label)], right.shape[second.index(label)]
        if one != other:
            broadcast([(one,), (other,)], t.found_equal)  # equal where the model runs, if both are symbols
            if isinstance(one, int) or isinstance(other, int):
                return False

    def arranged(value: Value, labels: list[str], groups: list[list[str]]) -> Value:
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
    op = "matmul" if summed else "mul"  # nothing summed: columns of one and rows of one, spread over each other
    if straight and flat == apart:
        return t.result(op, a, b, shape=flat)
    whole = t.emit(op, a, b, shape=flat)
    if straight:
        return t.result("reshape", whole, shape=apart)
    split = whole if flat == apart else t.emit("reshape", whole, shape=apart)
    return t.result("permute", split, shape=tuple(size[c] for c in out), perm=perm)


RULES: dict[str, Rule] = {"MatMul": matmul, "Gemm": gemm, "Einsum": einsum}
