"""Write an index expression as graph nodes: the printer of the expression language for both hosts.

    causal & load(mask0, b, 0, row, k)   ->   iota, iota, le, and       a bool tensor [B|1, 1, Q, K]

Indices become aranges shaped for broadcasting, loads become the arranged operand, operators the canonical ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from attnopt.ir.dims import Dim, Shape
from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Size, Term, expand_term
from attnopt.ir.graph import Value
from attnopt.ir.layout import Group
from attnopt.ir.site import Builder, Refusal, Site, arrange

LOGICAL = {"and", "or", "not", "lt", "le", "gt", "ge", "eq", "ne"}
CANONICAL = {"min": "minimum", "max": "maximum"}
REAL = {"div", "pow", "exp", "log", "tanh", "sqrt", "sin", "cos", "sigmoid"}  # real numbers, also of whole ones


def writable(expr: Expr | None, site: Site) -> Refusal | None:
    """None where `Materializer` can write the expression at this site."""
    if expr is None or isinstance(expr, Const) or (isinstance(expr, Index) and expr.name != "q"):
        return None
    if isinstance(expr, Term):
        return writable(expand_term(expr), site)
    if isinstance(expr, Index) and expr.name == "q" and site.spec.offset is not None:
        return Refusal("the position of the first query has no node in this graph", expr)
    if isinstance(expr, Size):
        known = expr.name in ("q", "k") and isinstance(site.size(expr.name), int)
        return None if known else Refusal(f"size({expr.name}) has no node in this graph", expr)
    if isinstance(expr, Load):
        if site.tensor_form is not None and expr.operand in site.tensor_form.operands and expr.operand not in site.operands:
            return None
        if expr.operand not in site.operands:
            return Refusal(f"'{expr.operand}' is not an operand of this site", expr)
        plain = all(isinstance(i, (Index, Const)) for i in expr.indices)
        return None if plain else Refusal(f"'{expr.operand}' is read at computed places", expr)
    if isinstance(expr, Index):
        return None
    return next((r for a in expr.args if (r := writable(a, site))), None)


@dataclass
class Materializer:
    """Writes expressions of one site; equal sub-expressions are written once."""

    site: Site
    builder: Builder
    dtype: str
    written: dict[Expr, Value] = field(default_factory=dict)

    def write(self, expr: Expr) -> Value:
        """A value broadcastable to [B, H, Q, K]; bool for masks, the site's dtype for loads of data, int64 for indices."""
        if expr not in self.written:
            self.written[expr] = self._write(expr)
        return self.written[expr]

    def _write(self, expr: Expr) -> Value:
        if isinstance(expr, Term):
            return self.write(expand_term(expr))
        if isinstance(expr, Index):
            return self.index(expr.name)
        if isinstance(expr, Const):
            kind = "bool" if isinstance(expr.value, bool) else "int64" if isinstance(expr.value, int) else self.dtype
            return self.builder.constant(expr.value, kind)
        if isinstance(expr, Size):
            size = self.site.size(expr.name)
            assert isinstance(size, int)
            return self.builder.constant(size, "int64")
        if isinstance(expr, Load):
            return self.operand(expr.operand)
        assert isinstance(expr, Apply)
        if expr.op in ("int", "float", "float32"):
            inner = self.write(expr.args[0])
            to = {"int": "int64", "float": self.dtype, "float32": "float32"}[expr.op]
            return self.builder.emit("cast", inner, shape=shape_of(inner), dtype=to)
        inputs = self.typed(expr.op, [self.write(a) for a in expr.args])
        if expr.op == "floor" and inputs[0].dtype == "int64":
            return inputs[0]
        shape = broadcast(*(shape_of(i) for i in inputs))
        dtype = "bool" if expr.op in LOGICAL else inputs[-1].dtype
        return self.builder.emit(CANONICAL.get(expr.op, expr.op), *inputs, shape=shape, dtype=dtype)

    def typed(self, op: str, inputs: list[Value]) -> list[Value]:
        """The inputs in types that meet: truth values count as 0 and 1, indices take the dtype of data."""
        if op in ("and", "or", "not"):
            return [as_dtype(v, "bool", self.builder) for v in inputs]
        if op == "where":
            branches = inputs[1:] if inputs[1].dtype == inputs[2].dtype else self.typed("add", inputs[1:])
            return [as_dtype(inputs[0], "bool", self.builder), *branches]
        numbers = [as_dtype(v, "int64", self.builder) if v.dtype == "bool" else v for v in inputs]
        data = {v.dtype for v in numbers} - {"int64"}
        wanted = self.dtype if len(data) > 1 or (not data and op in REAL) else next(iter(data), "int64")
        return [as_dtype(v, wanted, self.builder) for v in numbers]

    def index(self, name: str) -> Value:
        axis = {"b": "b", "h": "h", "row": "q", "q": "q", "k": "k"}[name]
        size = self.site.size(axis)
        flat = self.builder.emit("iota", shape=(size,), dtype="int64", start=0, step=1)
        position = {"b": 0, "h": 1, "q": 2, "k": 3}[axis]
        return self.builder.emit("reshape", flat, shape=tuple(size if i == position else 1 for i in range(4)), dtype="int64")

    def operand(self, name: str) -> Value:
        form = self.site.tensor_form
        held = form is not None and form.says(self.site.spec) and name in form.operands
        found = form.operands[name] if held and form is not None else self.site.operands[name]
        # A dimension that holds some axes of its group only is repeated along the others; the rest broadcasts as it is.
        groups = [group if found.axes & set(group) else () for group in self.groups()]
        return arrange(self.builder, found, groups, broadcast=True)

    def groups(self) -> list[Group]:
        axes = self.site.axes
        return [axes["b"], (*axes["g"], *axes["r"]), axes["q"], axes["k"]]


def as_dtype(value: Value, dtype: str, builder: Builder) -> Value:
    return value if value.dtype == dtype else builder.emit("cast", value, shape=shape_of(value), dtype=dtype)


def shape_of(value: Value) -> Shape:
    return value.shape if value.shape is not None else ()


def broadcast(*shapes: Shape) -> Shape:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(s)) + s for s in shapes]

    def joined(dims: tuple[Dim, ...]) -> Dim:
        return next((d for d in dims if d != 1), 1)

    return tuple(joined(dims) for dims in zip(*padded, strict=True))
