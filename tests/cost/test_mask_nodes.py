"""What masks take to make, node by node."""

from __future__ import annotations

import pytest
from toy_target import SHAPE

from attnopt.cost.mask_nodes import additive, mask_bytes
from attnopt.cost.problem import Problem
from attnopt.ir.spec import parse

PAIRS = 256 * 256


def made(line, **options):
    return additive(Problem(parse(line), {**SHAPE, "b": 3}, **options), "family")


def test_nothing_to_make():
    assert made("softmax") == made("softmax add(3.0)") == []
    assert made("softmax causal", held_mask=True) == []


def test_causal_is_a_comparison_and_a_choice():
    compared, chosen = made("softmax causal")
    assert compared.bytes == PAIRS * 1  # positions are broadcast, a truth is written
    assert chosen.bytes == PAIRS * (1 + 4)
    assert {compared.family, chosen.family} == {"family"}


def test_what_depends_on_the_batch_is_made_for_each():
    *_, both, chosen = made("softmax causal & padding")
    assert both.bytes == 3 * PAIRS * 1  # causal is broadcast over the batch, and read from the cache
    assert chosen.bytes == 3 * PAIRS * 5
    (chosen,) = made("softmax padding")
    assert chosen.bytes == 3 * 256 * 5


def test_a_window_takes_a_difference_of_whole_numbers():
    difference, compared, chosen = made("softmax window(8)")
    assert [p.bytes / PAIRS for p in (difference, compared, chosen)] == [8, 8 + 1, 1 + 4]


@pytest.mark.parametrize(
    ("line", "elements"),
    [("softmax", 0), ("softmax causal", PAIRS), ("softmax padding", 3 * 256), ("softmax add(load(bias, 0, h, row, k))", 2 * PAIRS),
     ("softmax add(load(bias, 0, h, row, k)) causal & padding", 3 * 2 * PAIRS)],
)  # fmt: skip
def test_bytes_of_the_mask_as_it_is_read(line, elements):
    assert mask_bytes(Problem(parse(line), {**SHAPE, "b": 3})) == 4 * elements
