"""Indices before a reshape from those after it, by mixed radix.

out [b, h * D + d]  of  in [B, H, D]      (b, x)   ->   (b, x // D, x % D)
out [b * H + h, q]  of  in [B, H, Q]      (y, q)   ->   (y // H, y % H, q), and (b * H + h) // H is b again
"""

from __future__ import annotations

from attnopt.ir.dims import Dim, Shape, divide, product
from attnopt.ir.expr import Const, Expr
from attnopt.ir.linear import length
from attnopt.ir.simplify import Simplifier

Block = tuple[list[int], list[int]]


def regrouped(simplifier: Simplifier, at: tuple[Expr, ...], out: Shape, source: Shape) -> tuple[Expr, ...] | None:
    """Indices into `source` for indices `at` into `out`; None where sizes do not tell how they regroup."""
    blocks = matched(out, source)
    if blocks is None:
        return None
    result: list[Expr] = [Const(0)] * len(source)
    for outs, ins in blocks:
        if len(outs) == len(ins) == 1:
            result[ins[0]] = at[outs[0]]
            continue
        flat = flattened(simplifier, [at[i] for i in outs], [out[i] for i in outs])
        if flat is None:
            return None
        for i, axis in enumerate(ins):
            stride = as_expr(product(source[j] for j in ins[i + 1 :]))
            size = as_expr(source[axis])
            if stride is None or size is None:
                return None
            part = simplifier.build("floordiv", flat, stride)
            result[axis] = part if i == 0 else simplifier.build("mod", part, size)
    return tuple(result)


def flattened(simplifier: Simplifier, at: list[Expr], sizes: list[Dim]) -> Expr | None:
    flat: Expr = Const(0)
    for index, size in zip(at, sizes, strict=True):
        step = as_expr(size)
        if step is None:
            return None
        flat = simplifier.build("add", simplifier.build("mul", flat, step), index)
    return flat


def as_expr(dim: Dim) -> Expr | None:
    found = length(dim)
    return None if found is None else found.expr()


def matched(out: Shape, source: Shape) -> list[Block] | None:
    """The shortest runs of dimensions, other than 1, that hold equally many elements."""
    outs = [i for i, d in enumerate(out) if d != 1]
    ins = [i for i, d in enumerate(source) if d != 1]
    blocks: list[Block] = []
    while outs or ins:
        if not outs or not ins:
            return None
        left, right = [outs.pop(0)], [ins.pop(0)]
        a, b = out[left[0]], source[right[0]]
        while a != b:
            if divide(a, b) is not None and ins:
                right.append(ins.pop(0))
                b = product([b, source[right[-1]]])
            elif outs and (divide(b, a) is not None or not ins):
                left.append(outs.pop(0))
                a = product([a, out[left[-1]]])
            elif ins:
                right.append(ins.pop(0))
                b = product([b, source[right[-1]]])
            else:
                return None
        blocks.append((left, right))
    return blocks
