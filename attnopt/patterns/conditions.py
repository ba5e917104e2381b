"""From raw loads of mask and bias tensors to the spec's expressions: lift, read masks, find the offset, name, rename.

add(load(bias0, b, 0, row, k))  over  where(k <= row + past & x0[b, k], 0, min)
    ->    offset(size(k) - size(q)) causal & padding      reading the operand `padding` [B, K]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from attnopt.ir.clause import EXPRESSIONS, Clause
from attnopt.ir.dims import Dim
from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Size, conjuncts, substitute, walk
from attnopt.ir.graph import Node, Value
from attnopt.ir.layout import Axis, Group, Layout, Operand
from attnopt.ir.linear import Linear, at_most, length
from attnopt.ir.naming import Naming, renamed
from attnopt.ir.simplify import Simplifier
from attnopt.patterns.lifting import Lifter
from attnopt.patterns.masking import Parts, read_bias, settle

Axes = Mapping[str, Group]
LENGTHS = ("q", "k")


@dataclass(frozen=True)
class Conditions:
    """What the scores go through, in the words of the spec; `operands` are what the expressions load."""

    score: tuple[Clause, ...]
    mask: Expr | None
    sink: Clause | None
    value_scale: Clause | None
    empty_row: str
    offset: Expr | None
    operands: Mapping[str, Operand]
    zeroed: bool = False  # empty rows are zero because of what follows the softmax, not by the mask tensors alone


@dataclass(frozen=True)
class Reading:
    """One reading of the raw terms of a site: `raw` are the tensors that they load, with their layouts."""

    lifter: Lifter
    axes: Axes
    raw: Mapping[str, tuple[Value, Layout]]
    dtype: str

    def read(
        self,
        terms: Sequence[Clause],
        masks: Sequence[Expr],
        empty_row: str,
        sink: Expr | None = None,
        factors: Sequence[tuple[Expr, bool]] = (),
    ) -> Conditions:
        """`factors` on the weights: tensors, or conditions (True) to keep a weight."""
        parts = Parts()
        for term in terms:
            if term.name == "add":
                read_bias(self.lifted(term.expr(0)), self.dtype, self.lifter.simplifier, parts)
            else:
                parts.terms.append(self.lifted_clause(term))
        fill = float("-inf") if empty_row == "zero" else -1e4
        parts.fills += [(self.lifted(mask), fill, None) for mask in masks]
        score, mask, empty = settle(parts, self.lifter.simplifier)
        if sink is not None:
            score = [*score, Clause("sink", (self.lifted(sink),))]
        factor: Expr | None = None
        zeroed = False
        for read, condition in factors:
            part = self.lifted(read)
            if condition and part == Const(True):
                continue
            if condition and part == mask:  # hidden keys weigh nothing already, so only empty rows change: they become zero
                zeroed, empty = True, "zero"
                continue
            part = self.lifter.build("float32", part) if condition else part
            factor = part if factor is None else self.lifter.build("mul", factor, part)
        if factor is not None and factor != Const(1.0):
            score = [*score, Clause("value_scale", (factor,))]
        return replace(self.worded(score, mask, empty), zeroed=zeroed)

    # Lifting.

    def lifted(self, expr: Expr) -> Expr:
        """Every raw load replaced by what the tensor holds there."""
        if isinstance(expr, Load) and expr.operand in self.raw:
            value, layout = self.raw[expr.operand]
            return self.lifter.lift(value, tuple(self.index_of(group) for group in layout))
        if isinstance(expr, Apply):
            return self.lifter.build(expr.op, *(self.lifted(a) for a in expr.args))
        return expr

    def lifted_clause(self, clause: Clause) -> Clause:
        args = tuple(self.lifted(a) if isinstance(a, EXPRESSIONS) else a for a in clause.args)
        return Clause(clause.name, args, clause.options)

    def index_of(self, group: Group) -> Expr:
        """Where a dimension that holds these axes is read: the axes of one role in mixed radix."""
        flat: Expr = Const(0)
        for axis in group:
            flat = self.lifter.build("add", self.lifter.build("mul", flat, self.extent(axis)), self.coordinate(axis))
        return flat

    def extent(self, axis: Axis) -> Expr:
        """The size of an axis; one that is no sum of lengths is a length of its own."""
        return self.lifter.size(axis.size) or Size(re.sub(r"\W", "_", f"n_{axis.size}"))

    def coordinate(self, axis: Axis) -> Expr:
        """One axis in terms of b, h, row or k."""
        for name, index in (("b", "b"), ("gr", "h"), ("q", "row"), ("k", "k")):
            group = tuple(a for part in name for a in self.axes[part])
            if axis not in group:
                continue
            if len([a for a in group if a.size != 1]) <= 1:
                return Index(index)
            place = group.index(axis)
            result: Expr = Index(index)
            for inner in group[place + 1 :]:
                result = self.lifter.build("floordiv", result, self.extent(inner))
            outermost = all(a.size == 1 for a in group[:place])
            return result if outermost else self.lifter.build("mod", result, self.extent(axis))
        return Const(0) if axis.size == 1 else Index(axis.name)

    # Wording.

    def worded(self, score: Sequence[Clause], mask: Expr | None, empty: str) -> Conditions:
        """In absolute positions and the lengths of queries and keys, with named terms."""
        offset = self.offset(mask)
        lengths = self.lengths()
        position: Expr = Index("q")
        simplifier = self.worded_simplifier(offset)
        if offset is not None:
            position = simplifier.build("sub", Index("q"), offset.expr())

        def word(expr: Expr) -> Expr:
            return self.squeezed(simplifier.again(substitute(in_positions(expr, position), dict(lengths))))

        naming = Naming(simplifier, straight=offset is None)
        if mask is not None:
            mask = naming.mask(word(mask))
        worded = [Clause(c.name, tuple(naming.bias(word(a)) if isinstance(a, EXPRESSIONS) else a for a in c.args), c.options)
                  for c in score]  # fmt: skip
        names = self.named(worded, mask, naming.renamed)
        final = tuple(
            Clause(c.name, tuple(renamed(a, names) if isinstance(a, EXPRESSIONS) else a for a in c.args), c.options)
            for c in worded
        )
        mask = None if mask is None or mask == Const(True) else renamed(mask, names)
        loads = [e for x in (*(a for c in worded for a in c.args if isinstance(a, EXPRESSIONS)), mask) if x is not None
                 for e in walk(x) if isinstance(e, Load)]  # fmt: skip
        operands = {new: self.operand(old, new, loads) for old, new in names.items()}
        said = None if offset is None else simplifier.again(substitute(offset.expr(), dict(lengths)))
        sink, scale = (next((c for c in final if c.name == name), None) for name in ("sink", "value_scale"))
        score = tuple(c for c in final if c is not sink and c is not scale)
        return Conditions(score, mask, sink, scale, empty if mask is not None else "mean", said, operands)

    def worded_simplifier(self, offset: Linear | None) -> Simplifier:
        """Bounds of q, k, b and h in the lengths that a spec knows."""
        limits = {"k": Linear(((Size("k"), 1),), -1), **{n: x for n, x in self.lifter.simplifier.limits.items() if n in "bh"}}
        limits["row"] = Linear(((Size("q"), 1),), -1)
        if offset is None:
            limits["q"] = limits["row"]
        return Simplifier(self.lifter.dtypes, limits)

    def offset(self, mask: Expr | None) -> Linear | None:
        """What is added to the row of a query to give its position: the lengths beside k - row in a condition of the mask."""
        keys, queries = (length(self.size(name)) for name in ("k", "q"))
        for part in conjuncts(mask):
            for condition in walk(part):
                if not isinstance(condition, Apply) or condition.op not in ("le", "lt", "ge", "gt"):
                    continue
                a, b = (self.lifter.simplifier.sum(x) for x in condition.args)
                if a is None or b is None:
                    continue
                bound = at_most(condition.op, a, b)
                sign = bound.coefficients.get(Index("k"), 0)
                rest = [(atom, c) for atom, c in bound.terms if not isinstance(atom, Index)]
                if abs(sign) != 1 or bound.coefficients.get(Index("row"), 0) != -sign:
                    continue
                if rest and all(isinstance(atom, Size) for atom, _ in rest):
                    return Linear(tuple((atom, -c * sign) for atom, c in rest))
                apart = None if keys is None or queries is None else (keys - queries).number
                if apart and not rest and sign == 1 and bound.constant == -apart:  # k <= row + (K - Q), both lengths fixed
                    return Linear(constant=apart)
        return None

    def lengths(self) -> dict[str, Expr]:
        """Symbols of the graph as lengths of queries and keys, where these tell them."""
        known: dict[str, Expr] = {}
        sums = {name: length(self.size(name)) for name in LENGTHS}
        for name in LENGTHS:
            total = sums[name]
            if total is None or total.number is not None:
                continue
            new = [(atom, c) for atom, c in total.terms if isinstance(atom, Size) and atom.name not in known]
            if len(new) == 1 and new[0][1] == 1 and len(new) + len(known) >= len(total.terms):
                symbol = new[0][0]
                rest = total - Linear(((symbol, 1),))
                value = Linear(((Size(name), 1),)) - rest
                assert isinstance(symbol, Size)
                known[symbol.name] = substitute(value.expr(), dict(known))
        return known

    def size(self, name: str) -> Dim:
        found = self.axes[name]
        return found[0].size if len(found) == 1 else self.lifter.sizes[{"q": "row"}.get(name, name)]

    # Operands.

    def squeezed(self, expr: Expr) -> Expr:
        """Conditions [B, 1, 1, K] on the keys of a batch are read as [B, K], slopes [H, 1, 1] as [H]."""
        if isinstance(expr, Load):
            value = self.lifter.operands[expr.operand]
            kept = [i for i, index in enumerate(expr.indices) if index != Const(0)]
            flat = tuple(expr.indices[i] for i in kept)
            alone = value.shape is not None and all(d == 1 for i, d in enumerate(value.shape) if i not in kept)
            named = flat == (Index("h"),) or (flat == (Index("b"), Index("k")) and value.dtype == "bool")
            if named and alone and len(kept) < len(expr.indices) and value.shape is not None:
                return self.lifter.load(self.reshaped(value, tuple(value.shape[i] for i in kept)), flat)
        if isinstance(expr, Apply):
            return Apply(expr.op, tuple(self.squeezed(a) for a in expr.args))
        return expr

    def reshaped(self, value: Value, shape: tuple[Dim, ...]) -> Value:
        name = f"{value.name}:rows"
        for known in self.lifter.operands.values():
            if known.name == name:
                return known
        made = Value(name, shape, value.dtype)
        if value.load is not None:
            made.load = lambda: value.load().reshape(shape)  # type: ignore[misc, arg-type]
        made.producer = Node("reshape", (value,), (made,), name=value.producer.name if value.producer else value.name)
        return made

    def named(self, score: Sequence[Clause], mask: Expr | None, given: Mapping[str, str]) -> dict[str, str]:
        """Final names of the operands: those of named terms, else after what they are read for."""
        names: dict[str, str] = dict(given)
        counts: dict[str, int] = {}
        kinds = {"scale": "scale", "sink": "sink", "value_scale": "factor"}
        sources = [(kinds.get(c.name, "bias"), a) for c in score for a in c.args if isinstance(a, EXPRESSIONS)]
        for kind, expr in [*sources, *([("mask", mask)] if mask is not None else [])]:
            for part in walk(expr):
                if isinstance(part, Load) and part.operand not in names and part.operand not in names.values():
                    names[part.operand] = f"{kind}{counts.get(kind, 0)}"
                    counts[kind] = counts.get(kind, 0) + 1
        return names

    def operand(self, old: str, new: str, loads: Sequence[Load]) -> Operand:
        """The tensor with the axes that its dimensions hold, as far as plain indices tell."""
        value = self.lifter.operands[old]
        indices = next((x.indices for x in loads if x.operand in (old, new)), ())
        roles = {"b": self.axes["b"], "h": (*self.axes["g"], *self.axes["r"]), "row": self.axes["q"], "q": self.axes["q"],
                 "k": self.axes["k"]}  # fmt: skip
        layout: list[Group] = []
        for i, dim in enumerate(value.shape or ()):
            index = indices[i] if i < len(indices) else None
            if isinstance(index, Index):
                layout.append(roles[index.name])
            else:
                layout.append(() if index == Const(0) and dim == 1 else (Axis(f"{new}.{i}", dim),))
        return Operand(value, tuple(layout))


def in_positions(expr: Expr, position: Expr) -> Expr:
    """`row` becomes a position, except where a tensor is read at the row itself."""
    if isinstance(expr, Load):
        return Load(expr.operand, tuple(i if i == Index("row") else in_positions(i, position) for i in expr.indices))
    if isinstance(expr, Apply):
        return Apply(expr.op, tuple(in_positions(a, position) for a in expr.args))
    return position if expr == Index("row") else expr
