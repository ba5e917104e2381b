"""matmul, bmm, addmm, baddbmm, linear, einsum  ->  matmul and linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.hosts.einsum import written_out
from attnopt.hosts.fx.rules.layout import Arguments, Rule
from attnopt.ir.dims import Dim, product
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.fx.translate import Translation


def matmul(t: Translation, a: Arguments) -> bool:
    left, right = t.value(a["self"]), t.value(a.get("other", a.get("mat2")))
    if left is None or right is None or min(len(left.shape or ()), len(right.shape or ())) < 2:
        return False
    return t.result("matmul", left, right)


def linear(t: Translation, a: Arguments) -> bool:
    return t.result("linear", t.value(a["input"]), t.value(a["weight"]), t.value(a["bias"]))


def scaled(t: Translation, value: Value, factor: float) -> Value:
    return value if factor == 1 else t.emit("mul", value, t.value(float(factor)), shape=value.shape or ())


def product_plus(first: str, second: str) -> Rule:
    """beta * x + alpha * (a @ b); with beta = 0 the x is not read at all."""

    def rule(t: Translation, a: Arguments) -> bool:
        shift, left, right = t.value(a["self"]), t.value(a[first]), t.value(a[second])
        if left is None or right is None or shift is None:
            return False
        alpha, beta = a.get("alpha", 1), a.get("beta", 1)
        if beta == 0 and alpha == 1:
            return t.result("matmul", left, right)
        made = t.emit("matmul", left, right, shape=t.shape)
        if beta == 0:
            return t.result("mul", made, t.value(float(alpha)))
        return t.result("add", scaled(t, made, alpha), scaled(t, shift, beta))

    return rule


def einsum(t: Translation, a: Arguments) -> bool:
    """Two operands without repeated or summed-out labels: permute, merge, matmul, split, permute."""
    operands = a["tensors"]
    if len(operands) != 2:
        return False
    left, right = t.value(operands[0]), t.value(operands[1])
    if left is None or right is None or left.shape is None or right.shape is None:
        return False
    found = written_out(str(a["equation"]), [len(left.shape), len(right.shape)])
    if found is None:
        return False
    (first, second), out = found
    size: dict[str, Dim] = {**dict(zip(first, left.shape, strict=True)), **dict(zip(second, right.shape, strict=True))}
    batch = [x for x in out if x in first and x in second]
    rows = [x for x in first if x in out and x not in second]
    columns = [x for x in second if x in out and x not in first]
    summed = [x for x in first if x in second and x not in out]
    if {*first, *second} != {*batch, *rows, *columns, *summed} or not summed:
        return False
    if any(left.shape[first.index(x)] != right.shape[second.index(x)] for x in (*batch, *summed)):
        return False  # a broadcast label

    def arranged(value: Value, labels: list[str], groups: list[list[str]]) -> Value:
        order = [*batch, *(x for group in groups for x in group)]
        perm = tuple(labels.index(x) for x in order)
        if perm != tuple(range(len(perm))):
            value = t.emit("permute", value, shape=tuple(size[x] for x in order), perm=perm)
        shape = (*(size[x] for x in batch), *(product(size[x] for x in group) for group in groups))
        return value if value.shape == shape else t.emit("reshape", value, shape=shape)

    x, y = arranged(left, first, [rows, summed]), arranged(right, second, [summed, columns])
    made = [*batch, *rows, *columns]
    flat = (*(size[b] for b in batch), product(size[r] for r in rows), product(size[c] for c in columns))
    apart = tuple(size[x] for x in made)
    perm = tuple(made.index(x) for x in out)
    straight = perm == tuple(range(len(perm)))
    if straight and flat == apart:
        return t.result("matmul", x, y)
    whole = t.emit("matmul", x, y, shape=flat)
    if straight:
        return t.result("reshape", whole)
    split = whole if flat == apart else t.emit("reshape", whole, shape=apart)
    return t.result("permute", split, perm=perm)


RULES: dict[str, Rule] = {
    "aten.matmul": matmul,
    "aten.bmm": matmul,
    "aten.mm": matmul,
    "aten.linear": linear,
    "aten.addmm": product_plus("mat1", "mat2"),
    "aten.baddbmm": product_plus("batch1", "batch2"),
    "aten.einsum": einsum,
}
