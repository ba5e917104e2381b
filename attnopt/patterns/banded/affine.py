"""Indices of many elements at once: sums of axes and lengths with one constant for each element.

    query 3*c + x of chunk c, for the rows x = 0, 1, 2     ->     3*c + [0, 1, 2]

Chunks are counted by an axis that stays a symbol, rows and columns inside of a chunk are written out, so that what is proved for
these indices holds for every number of chunks. Axes and lengths have bounds; a comparison that they do not decide says where the
range of chunks must be cut for it to be decided (`Undecided`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from attnopt.ir.dims import Dim, terms_of
from attnopt.ir.layout import Axis

Atom = Axis | str  # an axis of the attention, or a length of the graph by name
Numbers = npt.NDArray[np.int64]
CHUNK = Axis("chunk", 0)  # counts the chunks; its bounds are those of the region that is looked at


class Unreadable(Exception):
    """Internal: an index is no such sum here."""


class Undecided(Exception):
    """Internal: a comparison holds for a part of the chunks only; `at` is the first chunk of the second part."""

    def __init__(self, at: Affine) -> None:
        super().__init__(str(at))
        self.at = at


class OtherPeriod(Exception):
    """Internal: rows must be written out for chunks of another length, a multiple of `length`."""

    def __init__(self, length: int) -> None:
        super().__init__(f"chunks of {length}")
        self.length = length


@dataclass(frozen=True, eq=False)
class Affine:
    """sum of coefficient * atom, plus the constant of each element; no coefficient is zero."""

    terms: Mapping[Atom, int]
    constant: Numbers

    def __add__(self, other: Affine) -> Affine:
        sums = dict(self.terms)
        for atom, c in other.terms.items():
            sums[atom] = sums.get(atom, 0) + c
        return Affine({atom: c for atom, c in sums.items() if c}, self.constant + other.constant)

    def __mul__(self, factor: int) -> Affine:
        return Affine({atom: c * factor for atom, c in self.terms.items() if factor}, self.constant * factor)

    def __sub__(self, other: Affine) -> Affine:
        return self + other * -1

    def __str__(self) -> str:
        held = [f"{c}*{atom}" for atom, c in self.terms.items()]
        return " + ".join([*held, np.array2string(self.constant, threshold=6)])

    def take(self, which: Numbers | npt.NDArray[np.bool_]) -> Affine:
        return Affine(self.terms, self.constant if self.constant.size == 1 else self.constant[which])

    def at(self, atom: Atom, value: Affine) -> Affine:
        """With another sum in place of one atom."""
        c = self.terms.get(atom, 0)
        return Affine({a: k for a, k in self.terms.items() if a != atom}, self.constant) + value * c if c else self

    def equals(self, other: Affine) -> bool:
        apart = self - other
        return not apart.terms and not apart.constant.any()

    @property
    def numbers(self) -> Numbers | None:
        """The indices themselves, where nothing is left open."""
        return None if self.terms else self.constant


def number(value: int) -> Affine:
    return Affine({}, np.array([value], dtype=np.int64))


def atom(which: Atom, factor: int = 1) -> Affine:
    return Affine({which: factor}, np.zeros(1, dtype=np.int64))


def size(dim: Dim) -> Affine:
    """A size of the graph. Raises Unreadable where it is no sum of lengths."""
    terms = terms_of(dim)
    if terms is None or any(len(names) > 1 for names in terms):
        raise Unreadable(f"the size {dim} is no sum of lengths")
    return Affine({names[0]: c for names, c in terms.items() if names}, np.array([terms.get((), 0)], dtype=np.int64))


@dataclass(frozen=True)
class Region:
    """The chunks from `first` to `last`; every other axis runs over its size.

    Lengths are not negative. Those in `positive` are one or more: without them there are no queries, and nothing to prove.
    """

    first: Affine
    last: Affine
    positive: frozenset[Atom] = frozenset()

    def cut(self, at: Affine) -> tuple[Region, Region]:
        return replace(self, last=at - number(1)), replace(self, first=at)

    def fixed(self, index: Affine) -> Affine:
        """The index with the chunk in it replaced, where the region is one chunk."""
        return index.at(CHUNK, self.first) if self.first.equals(self.last) else index

    def bounds(self, axis: Axis) -> tuple[Affine, Affine]:
        return (self.first, self.last) if axis == CHUNK else (number(0), size(axis.size) - number(1))

    def extreme(self, index: Affine, *, largest: bool) -> Affine:
        """The index at the end of every axis where it is largest (or smallest): only lengths are left in it."""
        for axis, c in list(index.terms.items()):
            if isinstance(axis, Axis):
                index = index.at(axis, self.bounds(axis)[(c > 0) == largest])
        return index

    def negative(self, index: Affine) -> npt.NDArray[np.bool_]:
        """Element by element: is the index below zero? Raises Undecided where that holds for some chunks only."""
        index = self.fixed(index)
        surely = self.below_zero(self.extreme(index, largest=True))
        never = self.below_zero(self.extreme(index, largest=False) * -1 - number(1))
        open_ = ~(surely | never)
        if open_.any():
            raise self.undecided(index.take(open_))
        return surely

    def below_zero(self, index: Affine) -> npt.NDArray[np.bool_]:
        """Whether a sum of lengths is below zero for all of them."""
        if any(c > 0 for c in index.terms.values()):
            return np.zeros(index.constant.shape, dtype=np.bool_)
        return index.constant + sum(c for a, c in index.terms.items() if a in self.positive) < 0

    def undecided(self, index: Affine) -> Exception:
        c = index.terms.get(CHUNK, 0)
        rest = {a: k for a, k in index.terms.items() if a != CHUNK}
        if not c or any(isinstance(a, Axis) or k % c for a, k in rest.items()):
            return Unreadable(f"{index} is below zero for some lengths only")
        # c * chunk + rest + constant < 0: the first chunk for which it no longer is (or, with c < 0, for which it is).
        first = int(index.constant[0])
        at = -(first // c) if c > 0 else first // -c + 1
        return Undecided(Affine({a: -k // c for a, k in rest.items()}, np.array([at], dtype=np.int64)))

    def split(self, index: Affine, by: int) -> tuple[Affine, Affine]:
        """(index // by, index % by). Raises OtherPeriod where the chunk does not step by whole multiples."""
        index = self.fixed(index)
        whole = {a: c // by for a, c in index.terms.items() if c % by == 0}
        rest = Affine({a: c for a, c in index.terms.items() if c % by}, index.constant % by)
        if rest.terms and CHUNK in rest.terms:
            raise OtherPeriod(by)
        low, high = (self.extreme(rest, largest=largest) for largest in (False, True))
        inside = self.below_zero(high - number(by)) & self.below_zero(low * -1 - number(1))
        if rest.terms and not inside.all():
            raise Unreadable(f"{index} is not cut into parts of {by}")
        return Affine(whole, index.constant // by), rest
