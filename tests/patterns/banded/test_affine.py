"""Index sums over chunks: what is decided for every number of chunks, and where a range of them must be cut."""

from __future__ import annotations

import numpy as np
import pytest

from attnopt.ir.dims import symbol
from attnopt.ir.layout import Axis
from attnopt.patterns.banded.affine import CHUNK, Affine, OtherPeriod, Region, Undecided, Unreadable, atom, number, size

CHUNKS = size(symbol("n"))
WHOLE = Region(number(0), CHUNKS - number(1), frozenset({"n"}))
HEAD = Axis("h", 4)
ROWS = Affine({CHUNK: 3}, np.arange(3))


def test_a_length_bounds_the_chunks():
    assert not WHOLE.negative(ROWS).any()
    assert WHOLE.negative(ROWS - CHUNKS * 3).all()


def test_a_border_inside_is_where_the_chunks_are_cut():
    with pytest.raises(Undecided) as border:
        WHOLE.negative(ROWS - number(3))
    first, rest = WHOLE.cut(border.value.at)
    assert first.negative(ROWS - number(3)).all() and not rest.negative(ROWS - number(3)).any()


def test_a_border_before_the_end():
    last = ROWS - (CHUNKS * 3 - number(3))
    with pytest.raises(Undecided) as border:
        WHOLE.negative(last)
    inner, end = WHOLE.cut(border.value.at)
    assert inner.negative(last).all() and not end.negative(last).any()
    assert end.fixed(last).numbers.tolist() == [0, 1, 2]


def test_a_length_that_may_be_nothing_decides_nothing():
    with pytest.raises(Unreadable):
        WHOLE.negative(size(symbol("past")) * -1)


def test_rows_are_taken_out_of_a_chunk():
    outer, inner = WHOLE.split(ROWS, 3)
    assert outer.equals(atom(CHUNK) + Affine({}, np.zeros(3, dtype=np.int64))) and inner.numbers.tolist() == [0, 1, 2]
    with pytest.raises(OtherPeriod) as other:
        WHOLE.split(ROWS, 4)
    assert other.value.length == 4


def test_heads_are_taken_out_of_a_batch():
    batch = Axis("b", symbol("batch"))
    outer, inner = WHOLE.split(atom(batch) * 4 + atom(HEAD), 4)
    assert outer.equals(atom(batch)) and inner.equals(atom(HEAD))
    with pytest.raises(Unreadable):
        WHOLE.split(atom(batch) * 4 + atom(HEAD) - number(1), 4)
