"""Cosine and sine tables: which wave, of which frequency, at which positions, for every channel.

cos(cat([p * f, p * f])) * scale   ->   Wave("cos", angle f[c], scale)        table[positions], rows [sin | cos] of p * f   ->   …
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from attnopt.ir.graph import Node, Value
from attnopt.ir.layout import LayoutMismatch, Operand
from attnopt.patterns.block.terms import NotRead, Numbers, Term, Walk, constant
from attnopt.patterns.operands import broadcast_layout

EXACT = 1e-6  # what a table in float32 may differ from the wave of its frequency, beside the rounding of the angle itself


@dataclass(frozen=True, eq=False)
class Angle:
    """position * frequency[channel]. Positions with their layout; None where rows of a constant table count from zero.

    rows: the cosines that the frequency was read from, where it was a table.
    """

    frequency: Numbers
    positions: Operand | None
    rows: Numbers | None = None

    def is_of(self, frequency: Numbers, mask: Numbers) -> bool:
        """Whether this is, for the cosines of these channels, the angle of that frequency."""
        if self.rows is not None:
            return is_table(self.rows[:, mask], frequency[mask], cosine=True)
        return np.array_equal(self.frequency[mask], frequency[mask])


@dataclass(frozen=True, eq=False)
class Wave:
    """factor * cos or sin of an angle, for the channels of the mask."""

    name: str
    mask: Numbers
    factor: float
    angle: Angle


@dataclass
class Angles:
    """Reads the factors of a rotation."""

    walk: Walk

    def waves(self, factor: Term) -> list[Wave]:
        return [self.wave(term) for term in self.walk.expand(factor, stop=is_wave)]

    def wave(self, term: Term) -> Wave:
        node = term.node
        if node is not None and is_wave(term):
            assert node.inputs[0] is not None
            inner = self.walk.expand(replace(term, value=node.inputs[0], coefficient=1.0), stop=lambda _: False)
            frequency, sources = np.zeros(len(term.mask)), []
            for part in inner:
                angle = self.angle(part)
                frequency[part.mask] = angle.frequency[part.mask] * part.coefficient
                sources.append(angle.positions)
            if any((s and s.value) is not (sources[0] and sources[0].value) for s in sources):
                raise NotRead("angles are of different positions", node)
            return Wave(node.op, term.mask, term.coefficient, Angle(frequency, sources[0]))
        if node is not None and node.op == "gather" and node.attrs["axis"] == 0 and node.inputs[1] is not None:
            return self.table_wave(term, node.inputs[0], node)
        if constant(term.value) is not None:
            return self.table_wave(term, term.value, None)
        raise NotRead(f"'{name(term)}' is no table of cosines or sines", node or term.value)

    # Angles.

    def angle(self, term: Term) -> Angle:
        """position * frequency: a product with a constant vector, or the outer product of both."""
        node = term.node
        if node is None or node.op not in ("mul", "matmul"):
            raise NotRead(f"the angle is '{name(term)}', not positions times frequencies", node or term.value)
        left, right = node.inputs[:2]
        if left is None or right is None or left.shape is None or right.shape is None:
            raise NotRead("the shapes of the angle are unknown", node)
        try:
            if node.op == "mul":
                placed = [replace(term, value=v, layout=broadcast_layout(v, term.layout)) for v in (left, right)]
            else:
                if left.shape[-1] != 1:
                    raise NotRead("the angle is a product that sums", node)
                *lead, rows, columns = term.layout
                around = [broadcast_layout(Value("", v.shape[:-2]), tuple(lead)) for v in (left, right)]  # type: ignore[index]
                placed = [
                    replace(term, value=left, layout=(*around[0], rows, ())),
                    replace(term, value=right, layout=(*around[1], (), columns)),
                ]
        except LayoutMismatch as mismatch:
            raise NotRead(str(mismatch), node) from None
        for vector, other in (placed, placed[::-1]):
            numbers = self.numbers(vector)
            if numbers is not None:
                return Angle(numbers, self.positions(other))
        raise NotRead("the frequencies are not constant", node)

    def numbers(self, term: Term) -> Numbers | None:
        """What a constant holds for every channel."""
        found = np.zeros(len(term.mask))
        for part in self.walk.expand(term, stop=lambda _: False):
            if part.value.load is None:
                return None
            read, dims = self.walk.channel(part)
            if any(size != 1 for dim, size in enumerate(part.value.shape or ()) if dim not in dims):
                return None
            values = part.value.load().to(torch.float64).reshape(-1).numpy()
            found[part.mask] = values[read[part.mask]] * part.coefficient
        return found

    def positions(self, term: Term) -> Operand:
        """Where the positions come from, before casts and layout operations."""
        parts = self.walk.expand(replace(term, coefficient=1.0), stop=lambda _: False)
        if len(parts) != 1 or parts[0].coefficient != 1.0 or self.walk.channel(parts[0])[0].any():
            raise NotRead("positions differ between channels", term.node)
        return Operand(parts[0].value, self.walk.space.resolve(parts[0].layout))

    # Tables.

    def table_wave(self, term: Term, table: Value | None, node: Node | None) -> Wave:
        """A constant table [positions, channels] of one wave, or of sines and cosines side by side; every row is checked."""
        data = None if table is None else constant(table)
        if table is None or data is None or table.shape is None:
            raise NotRead("the table of cosines and sines is computed", node or term.value)
        column = self.walk.coordinate(term, len(term.layout) - 1)
        if column is None or any(size != 1 for size in table.shape[:-2]) or len(table.shape) < 2:
            raise NotRead("the table is not of positions by channels", node or term.value)
        rows = data.to(torch.float64).reshape(table.shape[-2:]).numpy()[:, column[term.mask]]  # type: ignore[arg-type]
        cosine = bool(len(rows)) and bool(np.allclose(rows[0], rows[0, 0]) and rows[0, 0] != 0)
        factor = float(rows[0, 0]) if cosine else 1.0
        frequency = frequencies(rows / factor, cosine)
        if len(rows) < 2 or not is_table(rows / factor, frequency, cosine):
            raise NotRead("the table is no cosine or sine of positions times frequencies", node or term.value)
        found, held = np.zeros(len(term.mask)), np.zeros((len(rows), len(term.mask)))
        found[term.mask], held[:, term.mask] = frequency, rows / factor
        positions = None
        if node is not None:
            assert node.inputs[1] is not None and node.inputs[1].shape is not None
            lead = term.layout[: len(node.inputs[1].shape)]
            positions = self.positions(replace(term, value=node.inputs[1], layout=lead))
        return Wave("cos" if cosine else "sin", term.mask, term.coefficient * factor, Angle(found, positions, held))


def frequencies(rows: Numbers, cosine: bool) -> Numbers:
    """Frequencies from the farthest row at which the angle is still below a quarter turn: near a crest a wave tells little."""
    inverse = np.arccos if cosine else np.arcsin
    row = 1
    found: Numbers = inverse(np.clip(rows[min(1, len(rows) - 1)], -1.0, 1.0))
    while row * 2 < len(rows):
        row *= 2
        found = np.where(found * row < 1.5, inverse(np.clip(rows[row], -1.0, 1.0)) / row, found)
    return found


def is_table(rows: Numbers, frequency: Numbers, cosine: bool) -> bool:
    """Whether every row is the wave of its number times the frequency, but for the rounding of float32."""
    angle = np.arange(len(rows))[:, None] * frequency
    return bool((np.abs(rows - (np.cos(angle) if cosine else np.sin(angle))) <= EXACT + 4e-7 * angle).all())


def is_wave(term: Term) -> bool:
    return term.node is not None and term.node.op in ("cos", "sin")


def name(term: Term) -> str:
    node = term.node
    return term.value.name if node is None else str(node.attrs.get("operator", node.op))
