"""One rule per canonical operation: the element of its output from elements of its inputs, or None where it says nothing.

permute(x)[i, j] = x[j, i]       expand(x)[i, j] = x[0, j]       add(x, y)[i, j] = x[i, j] + y[0, j]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attnopt.ir.dims import Shape
from attnopt.ir.expr import Const, Expr, Index, Load
from attnopt.ir.graph import Node, Value
from attnopt.patterns.lifting.reshaping import regrouped

if TYPE_CHECKING:
    from attnopt.patterns.lifting.lifter import Indices, Lifter

Rule = Callable[["Lifter", Node, "Indices"], Expr | None]
FLOATS = ("float32", "float64")
SAME = ("and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge", "abs", "neg", "floor")
NAMES = {"maximum": "max", "minimum": "min"}
ARITHMETIC = ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "floordiv", "mod")
REAL = ("exp", "log", "sqrt", "tanh", "sigmoid", "sin", "cos")
ANYWHERE = "i"  # an index of which nothing is known but that it is no less than zero
COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")


def source(node: Node) -> Value | None:
    return node.inputs[0]


def permute(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    x = source(node)
    moved: list[Expr] = list(at)
    for to, start in enumerate(node.attrs["perm"]):
        moved[start] = at[to]
    return None if x is None else lifter.lift(x, tuple(moved))


def reshape(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    x = source(node)
    if x is None or x.shape is None or node.output.shape is None:
        return None
    where = regrouped(lifter.simplifier, at, node.output.shape, x.shape)
    return None if where is None else lifter.lift(x, where)


def expand(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    x = source(node)
    return None if x is None or x.shape is None else lifter.lift(x, aligned(x.shape, node.output.shape or (), at))


def aligned(shape: Shape, out: Shape, at: Indices) -> Indices:
    """Indices of an input that is broadcast to `out`: its own dimensions of size one are read at 0."""
    lead = len(out) - len(shape)
    return tuple(Const(0) if dim == 1 and out[lead + i] != 1 else at[lead + i] for i, dim in enumerate(shape))


def slice_(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    x, axis, start, step = source(node), node.attrs["axis"], node.attrs["start"], node.attrs["step"]
    if x is None or x.shape is None or start is None or not isinstance(step, int) or step < 1:
        return None
    first = lifter.size(start)
    if isinstance(start, int) and start < 0:
        whole = lifter.size(x.shape[axis])
        first = None if whole is None else lifter.build("add", whole, Const(start))
    if first is None:
        return None
    moved = lifter.build("add", lifter.build("mul", at[axis], Const(step)), first)
    return lifter.lift(x, (*at[:axis], moved, *at[axis + 1 :]))


def concat(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    """Piece by piece; each is read inside of its own bounds, also where another is meant."""
    axis = node.attrs["axis"]
    if (one := continued(lifter, node, at, axis)) is not None:
        return one
    pieces: list[Expr] = []
    ends: list[Expr] = []
    start: Expr = Const(0)
    for i, x in enumerate(node.inputs):
        size = None if x is None or x.shape is None else lifter.size(x.shape[axis])
        if x is None or size is None:
            return None
        inside = lifter.build("sub", at[axis], start)
        if i:
            inside = lifter.build("max", inside, Const(0))
        if i < len(node.inputs) - 1:
            inside = lifter.build("min", inside, lifter.build("sub", size, Const(1)))
        pieces.append(lifter.lift(x, (*at[:axis], inside, *at[axis + 1 :])))
        start = lifter.build("add", start, size)
        ends.append(start)
    result = pieces[-1]
    for piece, end in zip(pieces[-2::-1], ends[-2::-1], strict=True):
        result = lifter.build("where", lifter.build("lt", at[axis], end), piece, result)
    return result


def continued(lifter: Lifter, node: Node, at: Indices, axis: int) -> Expr | None:
    """Where one row stands before a count that goes on from it (-1, then 0, 1, 2, …), the count alone: torch.diff begins like this."""
    first, rest = node.inputs[0], node.inputs[-1]
    if len(node.inputs) != 2 or first is None or rest is None or first.shape is None or first.shape[axis] != 1:
        return None
    where = lifter.build("sub", at[axis], Const(1))
    places: list[tuple[Value, Expr]] = [(first, Const(0)), (rest, Const(0)), (rest, where)]
    sums = [lifter.simplifier.sum(lifter.lift(x, (*at[:axis], i, *at[axis + 1 :]))) for x, i in places]
    place = lifter.simplifier.sum(where)
    if place is None or sums[0] is None or sums[1] is None or sums[2] is None:
        return None
    goes_on = (sums[1] - sums[0]).number == 1 and (sums[2] - sums[1] - place).number == 0
    return sums[2].expr() if goes_on else None


def cumsum(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    """Of what is the same number all along: whole numbers only, which no order of adding rounds."""
    x, axis = source(node), node.attrs["axis"]
    if x is None or x.shape is None or "int" not in node.output.dtype:
        return None
    each = lifter.lift(x, (*at[:axis], Index(ANYWHERE), *at[axis + 1 :]))
    return lifter.build("mul", lifter.build("add", at[axis], Const(1)), each) if isinstance(each, Const) else None


def gather(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    return indexed(lifter, node, at, (node.attrs["axis"],))


def index(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    return indexed(lifter, node, at, node.attrs["axes"])


def indexed(lifter: Lifter, node: Node, at: Indices, axes: tuple[int, ...]) -> Expr | None:
    """Dimensions `axes` are read at what the index tensors hold, whose own dimensions stand in their place."""
    x, *chosen = node.inputs
    if x is None or x.shape is None or any(c is None or c.shape is None for c in chosen):
        return None
    shapes = [c.shape for c in chosen if c is not None and c.shape is not None]
    first, width = axes[0], max(map(len, shapes))
    out = (node.output.shape or ())[first : first + width]
    inner = at[first : first + width]
    read = []
    for value, shape, axis in zip(chosen, shapes, axes, strict=True):
        assert value is not None
        where = lifter.lift(value, aligned(shape, out, inner))
        if not node.attrs.get("unsigned") and not lifter.simplifier.at_least_zero(where):  # negative ones count from the end
            size = lifter.size(x.shape[axis])
            if size is None or isinstance(where, Load):
                return None
            where = lifter.build("where", lifter.build("lt", where, Const(0)), lifter.build("add", where, size), where)
        read.append(where)
    return lifter.lift(x, (*at[:first], *read, *at[first + width :]))


def iota(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    start, step = node.attrs.get("start", 0), node.attrs.get("step", 1)
    if isinstance(start, float) or isinstance(step, float):
        return None
    first, each = lifter.size(start), lifter.size(step)
    if first is None or each is None:
        return None
    counted = lifter.build("add", lifter.build("mul", at[0], each), first)
    return lifter.build("float32", counted) if "float" in node.output.dtype else counted


def full(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    value = node.attrs["value"]
    if node.output.dtype == "bool":
        return Const(bool(value))
    return Const(float(value) if "float" in node.output.dtype else int(value)) if value is not None else None


def triangle(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    x = source(node)
    if x is None:
        return None
    edge = lifter.build("sub", lifter.build("sub", at[-1], at[-2]), Const(node.attrs["diagonal"]))
    inside = lifter.build("ge" if node.attrs["upper"] else "le", edge, Const(0))
    outside = Const(False) if x.dtype == "bool" else Const(0.0) if "float" in x.dtype else Const(0)
    return lifter.build("where", inside, lifter.lift(x, at), outside)


def cast(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    x = source(node)
    if x is None:
        return None
    inner, to = lifter.lift(x, at), node.output.dtype
    kind = lifter.simplifier.kind(inner)
    if to == "bool":
        return inner if kind == "bool" else None if isinstance(inner, Load) else lifter.build("ne", inner, Const(0))
    if "int" in to:
        return lifter.build("int", inner)
    if to in FLOATS or kind == "bool":
        return inner if kind == "float" and to == x.dtype else lifter.build("float32" if to != "float64" else "float", inner)
    return None


def elementwise(op: str) -> Rule:
    def rule(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
        out, shape = node.output.dtype, node.output.shape or ()
        if any(i is None or i.shape is None for i in node.inputs):
            return None
        if op in (*ARITHMETIC, *REAL) and "float" in out and out not in FLOATS:
            return None  # rounded to half precision at every step
        args = [lifter.lift(i, aligned(i.shape or (), shape, at)) for i in node.inputs if i is not None]
        real = out in FLOATS or (op in COMPARE and any("float" in i.dtype for i in node.inputs if i is not None))
        if real and op not in ("and", "or", "not"):
            args = [a if lifter.simplifier.kind(a) == "float" else lifter.build("float32", a) for a in args]
        elif op in ("add", "sub", "mul", "neg", "minimum", "maximum"):
            args = [lifter.build("int", a) if lifter.simplifier.kind(a) == "bool" else a for a in args]
        return lifter.build(NAMES.get(op, op), *args)

    return rule


def where(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    shape, out = node.output.shape or (), node.output.dtype
    if any(i is None or i.shape is None for i in node.inputs):
        return None
    condition, a, b = (lifter.lift(i, aligned(i.shape or (), shape, at)) for i in node.inputs if i is not None)
    if "float" in out:
        a, b = (x if lifter.simplifier.kind(x) == "float" else lifter.build("float32", x) for x in (a, b))
    return lifter.build("where", condition, a, b)


def xor(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    return elementwise("ne")(lifter, node, at)


def relu(lifter: Lifter, node: Node, at: Indices) -> Expr | None:
    x = source(node)
    return None if x is None or x.dtype not in FLOATS else lifter.build("max", lifter.lift(x, at), Const(0.0))


RULES: dict[str, Rule] = {
    "permute": permute,
    "reshape": reshape,
    "expand": expand,
    "slice": slice_,
    "concat": concat,
    "cumsum": cumsum,
    "gather": gather,
    "index": index,
    "iota": iota,
    "full": full,
    "triangle": triangle,
    "cast": cast,
    "where": where,
    "xor": xor,
    "relu": relu,
    **{op: elementwise(op) for op in (*SAME, *ARITHMETIC, *REAL)},
}
