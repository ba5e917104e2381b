"""What ONNX says of sizes: dim_params as canonical dimensions, and what small integer tensors that compute shapes hold.

    Shape(x) -> Gather(0) -> Unsqueeze -> Concat([.., -1, 12, 64])    holds    (batch, -1, 12, 64)

Exporters spell every reshape with such vectors. Following them gives the symbolic shape of the result without running anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from attnopt.ir.dims import Dim, Shape, divide, parts, product, symbol

Vector = tuple[Dim, ...]
FACTOR = re.compile(r"[A-Za-z_][\w.]*|\d+")


def read_dim(text: str) -> Dim:
    """ "batch" and "4*batch" as products, anything else as one opaque symbol."""
    factors = [f.strip() for f in text.split("*")]
    if not all(FACTOR.fullmatch(f) for f in factors):
        return symbol(text.replace("*", "·"))
    return product(int(f) if f.isdigit() else symbol(f) for f in factors)


def add(a: Dim, b: Dim, sign: int = 1) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a + sign * b
    if b == 0:
        return a
    if a == 0 and sign > 0:
        return b
    if sign < 0 and a == b:
        return 0
    if not isinstance(a, int) and not isinstance(b, int) and a.names == b.names:
        coefficient = a.coefficient + sign * b.coefficient
        return product([coefficient, *(symbol(n) for n in a.names)])
    return symbol(f"{a} {'+' if sign > 0 else '-'} {b}".replace("*", "·"))


def quotient(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int) and b:
        return a // b
    exact = divide(a, b)
    return exact if exact is not None else symbol(f"{a} / {b}".replace("*", "·"))


ARITHMETIC: dict[str, Callable[[Dim, Dim], Dim]] = {
    "Add": add,
    "Sub": lambda a, b: add(a, b, -1),
    "Mul": lambda a, b: product([a, b]),
    "Div": quotient,
}


def elementwise(op: Callable[[Dim, Dim], Dim], a: Vector, b: Vector) -> Vector | None:
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        return None
    length = max(len(a), len(b))
    a, b = (x * length if len(x) == 1 else x for x in (a, b))
    return tuple(op(x, y) for x, y in zip(a, b, strict=True))


def equal(a: Dim, b: Dim) -> Dim | None:
    """1 or 0 where it is certain; a symbol is a size, so it is never negative."""
    if a == b:
        return 1
    if isinstance(a, int) and isinstance(b, int):
        return 0
    number = a if isinstance(a, int) else b
    return 0 if isinstance(number, int) and number < 0 else None


def reshaped(source: Shape | None, target: Vector, *, allow_zero: bool = False) -> Shape | None:
    """The shape after Reshape: 0 copies a dimension of the source, -1 takes what is left."""
    sizes: list[Dim] = []
    for i, dim in enumerate(target):
        if dim == 0 and not allow_zero:
            if source is None or i >= len(source):
                return None
            dim = source[i]
        sizes.append(dim)
    if -1 not in sizes:
        return tuple(sizes)
    if source is None:
        return None
    known = product(d for d in sizes if d != -1)
    left = divide(product(source), known)
    if left is None:
        return None
    return tuple(left if d == -1 else d for d in sizes)


def broadcast(shapes: Sequence[Shape], equal_names: dict[str, str] | None = None) -> Shape:
    """The common shape. Two different symbols must be equal where the model runs: the pair is noted in `equal_names`."""
    rank = max(len(s) for s in shapes)
    result: list[Dim] = [1] * rank
    for shape in shapes:
        for i, dim in enumerate((1,) * (rank - len(shape)) + tuple(shape)):
            have = result[i]
            if have == 1 or have == dim:
                result[i] = dim
            elif isinstance(dim, int):
                result[i] = have if dim == 1 else dim
            elif not isinstance(have, int) and equal_names is not None:
                (a, first), (b, second) = parts(have), parts(dim)
                if a == b == 1 and len(first) == len(second) == 1:
                    equal_names[second[0]] = first[0]
    return tuple(result)
