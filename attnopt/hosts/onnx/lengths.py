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
SUMMAND = re.compile(rf"(\s*\+\s*|\s+-\s+|\s*)((?:{FACTOR.pattern})(?:\s*[*·]\s*(?:{FACTOR.pattern}))*)")
Summands = dict[tuple[str, ...], int]


def read_dim(text: str) -> Dim:
    """ "batch" and "4*batch" as products, sums in one order, anything else as one opaque symbol."""
    found = read_sum(text)
    return symbol(text.replace("*", "·")) if found is None else total(found)


def read_sum(text: str) -> Summands | None:
    """2*past + new - 1 as products with their counts; None for text that is no such sum."""
    found: Summands = {}
    at, text = 0, text.strip()
    while at < len(text):
        match = SUMMAND.match(text, at)
        if match is None or (at > 0 and not match[1].strip()):
            return None
        factors = [int(f) if f.isdigit() else symbol(f) for f in FACTOR.findall(match[2])]
        coefficient, names = parts(product(factors))
        found[names] = found.get(names, 0) + (-coefficient if "-" in match[1] else coefficient)
        at = match.end()
    return found or None


def summands(dim: Dim) -> Summands:
    """A size as a sum of products of names."""
    coefficient, names = parts(dim)
    inner = read_sum(names[0]) if len(names) == 1 else None
    return {names: coefficient} if inner is None else {key: count * coefficient for key, count in inner.items()}


def total(sums: Summands) -> Dim:
    """The sum as one size: a number, a product, or a symbol named by its text, names before numbers and added before taken off."""
    kept = sorted(((names, count) for names, count in sums.items() if count), key=lambda s: (s[1] < 0, not s[0], s[0]))
    if len(kept) < 2:
        return product([kept[0][1], *map(symbol, kept[0][0])]) if kept else 0
    text = ""
    for names, count in kept:
        size = str(product([abs(count), *map(symbol, names)]))
        text += f" {'-' if count < 0 else '+'} {size}" if text else f"{'0 - ' * (count < 0)}{size}"
    return symbol(text.replace("*", "·"))


def add(a: Dim, b: Dim, sign: int = 1) -> Dim:
    """a + b, or a - b with sign=-1; equal sums are equal sizes however they came about."""
    sums = summands(a)
    for names, count in summands(b).items():
        sums[names] = sums.get(names, 0) + sign * count
    return total(sums)


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
    """The common shape. Two different symbols must be equal where the model runs: that is noted in `equal_names`."""
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
                    unify(first[0], second[0], equal_names)
    return tuple(result)


def unify(first: str, second: str, equal_names: dict[str, str]) -> None:
    """Note that two symbols are one size. The first name stands for both, but that of a sum before any other."""
    first, second = (root(name, equal_names) for name in (first, second))
    if first != second and FACTOR.fullmatch(second) is None:
        first, second = second, first
    if first != second and FACTOR.fullmatch(second) is not None:
        equal_names[second] = first


def root(name: str, equal_names: dict[str, str]) -> str:
    while name in equal_names:
        name = equal_names[name]
    return name
