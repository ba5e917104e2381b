"""Find the rule behind a stored tensor, and prove it by comparing every element.

    tril(ones(1024, 1024))           ->   k <= q                     a stored causal buffer
    slopes[:, None, None] * (j - i)  ->   load(slopes, h) * (k - q)  a stored ALiBi table
    0 within a region, -100 across   ->   where(load(region, q) == load(region, k), 0.0, -100.0)
    index table of a 7 x 7 window    ->   (q // 7 - k // 7) * 13 + q % 7 - k % 7 + 84

A rule is used only where it gives exactly the stored tensor; anything else stays a load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnopt.ir.expr import Const, Expr, apply
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.patterns.lifting.lifter import Indices, Lifter

LARGEST = 1 << 26  # elements that are compared


def lift_constant(lifter: Lifter, value: Value, at: Indices) -> Expr | None:
    """The element of a stored tensor as an expression, or None."""
    assert value.load is not None
    stored = value.load()
    if stored.numel() > LARGEST or stored.numel() == 0 or (stored.is_floating_point() and stored.dtype != torch.float32):
        return None
    # Dimensions along which nothing changes are read at 0.
    varying = [i for i in range(stored.ndim) if stored.shape[i] > 1 and not constant_along(stored, i)]
    small = stored
    for i in range(stored.ndim):
        if i not in varying:
            small = small.narrow(i, 0, 1)
    small = small.reshape([stored.shape[i] for i in varying])
    return structured(lifter, value, small, tuple(at[i] for i in varying))


def constant_along(stored: Tensor, axis: int) -> bool:
    return torch.equal(stored.narrow(axis, 1, stored.shape[axis] - 1), stored.narrow(axis, 0, 1).expand_as(
        stored.narrow(axis, 1, stored.shape[axis] - 1)
    ))  # fmt: skip


def structured(lifter: Lifter, value: Value, x: Tensor, at: Indices) -> Expr | None:
    if x.ndim == 0:
        return Const(x.item())
    if x.ndim == 1 and not x.is_floating_point() and x.dtype != torch.bool:
        return counted(lifter, x, at[0])
    if x.ndim >= 2 and (x.dtype == torch.bool or two_valued(x) is not None):
        return split_in_two(lifter, value, x, at)
    if x.ndim == 2 and not x.is_floating_point():
        return separable(lifter, x, at)
    if x.ndim == 3 and x.is_floating_point():
        return sloped(lifter, value, x, at)
    return None


def two_valued(x: Tensor) -> tuple[float, float] | None:
    low, high = x.min(), x.max()
    return (low.item(), high.item()) if low != high and bool(((x == low) | (x == high)).all()) else None


def split_in_two(lifter: Lifter, value: Value, x: Tensor, at: Indices) -> Expr | None:
    """A tensor of two values is a condition that tells them apart."""
    if x.dtype == torch.bool:
        return condition(lifter, value, x, at)
    values = two_valued(x)
    assert values is not None
    found = condition(lifter, value, x == values[1], at)
    return None if found is None else lifter.build("where", found, Const(values[1]), Const(values[0]))


def condition(lifter: Lifter, value: Value, x: Tensor, at: Indices) -> Expr | None:
    return (band(lifter, x, at) if x.ndim == 2 else None) or regions(lifter, value, x, at)


def band(lifter: Lifter, x: Tensor, at: Indices) -> Expr | None:
    """low <= j - i <= high."""
    rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None]
    distance = columns - rows
    inside = distance[x]
    if inside.numel() == 0:
        return None
    low, high = int(inside.min()), int(inside.max())
    if not torch.equal(x, (distance >= low) & (distance <= high)):
        return None
    apart = lifter.build("sub", at[1], at[0])
    result: Expr = Const(True)
    if high < int(distance.max()):
        result = lifter.build("and", result, lifter.build("le", apart, Const(high)))
    if low > int(distance.min()):
        result = lifter.build("and", result, lifter.build("ge", apart, Const(low)))
    return result


def regions(lifter: Lifter, value: Value, x: Tensor, at: Indices) -> Expr | None:
    """True where query and key bear the same label: an equivalence over the last two dimensions."""
    if x.shape[-1] != x.shape[-2] or x.ndim > 3:
        return None
    labels = x.to(torch.uint8).argmax(-1).to(torch.int64)  # the first key that a query sees
    same = labels[..., :, None] == labels[..., None, :]
    if not bool(x.diagonal(dim1=-2, dim2=-1).all()) or not torch.equal(x, same):
        return None
    labelled = derived(lifter, value, "regions", labels)
    return lifter.build("eq", lifter.load(labelled, (*at[:-2], at[-2])), lifter.load(labelled, (*at[:-2], at[-1])))


def derived(lifter: Lifter, value: Value, what: str, data: Tensor) -> Value:
    """A smaller tensor made of a stored one, as a value of its own; made once."""
    name = f"{value.name}:{what}"
    for known in lifter.operands.values():
        if known.name == name:
            return known
    dtype = str(data.dtype).removeprefix("torch.")
    return Value(name, tuple(data.shape), dtype, load=lambda: data)


def counted(lifter: Lifter, x: Tensor, at: Expr) -> Expr | None:
    """a * i + c, or a * (i // w) + b * (i % w) + c for a width w that divides the length."""
    steps = x.shape[0]
    i = torch.arange(steps)
    first = int(x[0])
    slope = int(x[1]) - first
    if torch.equal(x, slope * i + first):
        return lifter.build("add", lifter.build("mul", at, Const(slope)), Const(first))
    wrap = next((n for n in range(1, steps) if int(x[n]) - int(x[n - 1]) != slope), steps)
    if steps % wrap or wrap == steps:
        return None
    over = int(x[wrap]) - first
    if not torch.equal(x, over * (i // wrap) + slope * (i % wrap) + first):
        return None
    rows = lifter.build("mul", lifter.build("floordiv", at, Const(wrap)), Const(over))
    columns = lifter.build("mul", lifter.build("mod", at, Const(wrap)), Const(slope))
    return lifter.build("add", lifter.build("add", rows, columns), Const(first))


def separable(lifter: Lifter, x: Tensor, at: Indices) -> Expr | None:
    """x[i, j] = a[i] + b[j] with both of them counted."""
    a, b = x[:, 0], x[0, :] - x[0, 0]
    if not torch.equal(x, a[:, None] + b[None]):
        return None
    left, right = counted(lifter, a, at[0]), counted(lifter, b, at[1])
    return None if left is None or right is None else lifter.build("add", left, right)


def sloped(lifter: Lifter, value: Value, x: Tensor, at: Indices) -> Expr | None:
    """x[h, i, j] = s[h] * (j - i), or its negative distance -|j - i|."""
    rows, columns = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[2])[None]
    for absolute in (False, True):
        apart = (columns - rows).abs() if absolute else columns - rows
        slopes = x[:, 0, 1] if x.shape[2] > 1 else x[:, 1, 0] * (1 if absolute else -1)
        if torch.equal(x, slopes[:, None, None] * apart.float()):
            held = lifter.load(derived(lifter, value, "slopes", slopes.contiguous()), at[:1])
            distance = lifter.build("sub", at[2], at[1])
            if absolute:
                distance = lifter.build("abs", distance)
            return apply("mul", held, lifter.build("float32", distance))
    return None
