"""What reads a cache in any order or in pieces: where queries stand, what a mask reads, what is more than a softmax."""

from __future__ import annotations

import pytest

from attnopt.ir.at_end import AT_END, at_end, beyond_softmax, reads_positions
from attnopt.ir.spec import AttentionSpec, parse

LAST = "offset(size(k) - size(q))"


def test_the_clause_is_what_a_spec_says():
    assert parse(f"softmax {LAST}").offset == AT_END
    assert at_end(AttentionSpec(offset=AT_END))


@pytest.mark.parametrize(("line", "found"), [(LAST, True), ("", False), ("offset(3)", False), ("offset(size(k))", False)])
def test_queries_at_the_end(line, found):
    assert at_end(parse(f"softmax {line}")) is found


@pytest.mark.parametrize(
    ("line", "found"),
    [("", False), (f"{LAST} causal", False), ("causal", True), (f"{LAST} causal & window(4)", True), ("offset(2) causal", True)],
)
def test_a_mask_that_the_newest_query_does_not_feel_reads_no_positions(line, found):
    assert reads_positions(parse(f"softmax {line}")) is found


@pytest.mark.parametrize(
    ("line", "slots", "found"),
    [
        ("softmax scale(0.5)", (), ""),
        ("softmax scale(0.5) softcap(30.0)", (), "softcap(30.0)"),
        ("softmax add(k * 0.5)", (), "add(k * 0.5)"),
        (f"softmax {LAST}", (), "offset"),
        (f"softmax {LAST}", ("offset",), ""),
        ("sigmoid scale(0.5)", (), "sigmoid"),
    ],
)
def test_what_is_more_than_a_softmax_of_scaled_products(line, slots, found):
    assert beyond_softmax(parse(line), slots) == found
