"""Rules that follow the content of shape vectors beside the ordinary translation.

Shape(x)  holds  the dimensions of x;      Gather, Concat, Unsqueeze, Mul, … of such vectors hold what they compute
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attnopt.hosts.onnx.lengths import ARITHMETIC, Vector, elementwise, equal
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.dims import product

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def shape(t: Translation, x: Inputs) -> Vector | None:
    if x[0] is None or x[0].shape is None:
        return None
    rank = len(x[0].shape)
    return x[0].shape[slice(t.attr("start", 0), t.attr("end", rank))]


def size(t: Translation, x: Inputs) -> Vector | None:
    return None if x[0] is None or x[0].shape is None else (product(x[0].shape),)


def first(t: Translation, x: Inputs) -> Vector | None:
    """Cast, Unsqueeze, Squeeze, Identity: the elements stay. More than one dimension is not followed."""
    return t.vector(x[0])


def gather(t: Translation, x: Inputs) -> Vector | None:
    held, chosen = t.vector(x[0]), t.held(x[1])
    return None if held is None or chosen is None or any(i >= len(held) for i in chosen) else tuple(held[i] for i in chosen)


def slice_(t: Translation, x: Inputs) -> Vector | None:
    held, start, stop = t.vector(x[0]), t.held(x[1]), t.held(x[2])
    step = t.held(x[4]) if len(x) > 4 and x[4] is not None else [1]
    return None if held is None or not start or not stop or not step else held[start[0] : stop[0] : step[0]]


def concat(t: Translation, x: Inputs) -> Vector | None:
    parts = [t.vector(v) for v in x]
    return None if any(p is None for p in parts) else tuple(d for p in parts for d in p)  # type: ignore[union-attr]


def arithmetic(name: str) -> object:
    def follow(t: Translation, x: Inputs) -> Vector | None:
        a, b = t.vector(x[0]), t.vector(x[1])
        return None if a is None or b is None else elementwise(ARITHMETIC[name], a, b)

    return follow


def equality(t: Translation, x: Inputs) -> Vector | None:
    a, b = t.vector(x[0]), t.vector(x[1])
    if a is None or b is None:
        return None
    answers = elementwise(lambda p, q: -1 if equal(p, q) is None else equal(p, q), a, b)  # type: ignore[arg-type, return-value]
    return None if answers is None or -1 in answers else answers


def where(t: Translation, x: Inputs) -> Vector | None:
    condition, a, b = (t.vector(v) for v in x)
    if condition is None or a is None or b is None:
        return None
    length = max(len(condition), len(a), len(b))
    if any(len(v) not in (1, length) for v in (condition, a, b)):
        return None
    condition, a, b = (v * length if len(v) == 1 else v for v in (condition, a, b))
    return tuple(p if c == 1 else q for c, p, q in zip(condition, a, b, strict=True))


def filled(t: Translation, x: Inputs) -> Vector | None:
    length, value = t.vector(x[0]), t.attr("value")
    number = value.numpy().reshape(-1)[0].item() if value is not None else 0
    short = length is not None and len(length) == 1 and isinstance(length[0], int) and length[0] <= 16
    return (int(number),) * length[0] if short and isinstance(number, int) else None  # type: ignore[index, operator]


def reduced(t: Translation, x: Inputs) -> Vector | None:
    held = t.vector(x[0])
    return None if held is None else (product(held),)


FOLLOWED = {
    "Shape": shape, "Size": size, "Gather": gather, "Slice": slice_, "Concat": concat, "Equal": equality, "Where": where,
    "ConstantOfShape": filled, "ReduceProd": reduced,
    **dict.fromkeys(("Cast", "Unsqueeze", "Squeeze", "Reshape", "Expand"), first),
    **{name: arithmetic(name) for name in ARITHMETIC},
}  # fmt: skip
INTEGERS = ("int64", "int32", "bool")


def following(name: str, rule: Rule | None) -> Rule:
    """The rule of an operator, then the content of what it made where that is small and integer."""

    def both(t: Translation, x: Inputs) -> bool:
        held = FOLLOWED[name](t, x)  # type: ignore[operator]
        if held is not None and name in ("Shape", "Size"):  # reads no data, so it is no user of its input
            t.outside().sizes = held
            return True
        if rule is None or not rule(t, x):
            t.opaque(x)
        made = t.values[t.node.outputs[0]]
        integer = made.dtype in INTEGERS and made.shape is not None and len(made.shape) <= 1
        if held is not None and integer and made.sizes is None and (not made.shape or made.shape == (len(held),)):
            made.sizes = held
        return True

    return both


def over(*rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules of the operators that may compute sizes, each with its content followed."""
    known = {name: rule for table in rules for name, rule in table.items()}
    return {name: following(name, known.get(name)) for name in FOLLOWED}
