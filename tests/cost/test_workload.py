"""Workloads: what a line spells, what a model can do, and what is said where it cannot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from attnopt.cost.workload import EXAMPLE, Load, parse_workload
from attnopt.errors import WorkloadError
from attnopt.ir.dims import symbol


def site(**sizes):
    """As much of a site as a workload reads."""
    held = {"b": symbol("batch"), "h": 8, "g": 2, "q": symbol("length"), "k": symbol("length"), "d": 64, "e": 64, **sizes}
    return SimpleNamespace(name="layer", size=held.__getitem__, shape=held)


def test_a_line():
    prompt, token = parse_workload("prefill:4096@0.3 decode:32768x8@0.9").loads
    assert prompt == Load("prefill", 1, 4096, 0, pytest.approx(0.25))
    assert token == Load("decode", 8, 1, 32768, pytest.approx(0.75))
    assert (prompt.keys, token.keys) == (4096, 32769)
    assert (str(prompt), str(token)) == ("prefill:4096", "decode:32768x8")
    assert parse_workload(["prefill:7", "decode:9"]) == parse_workload("prefill:7 decode:9")


def test_a_range_stands_for_lengths_between_its_ends():
    loads = parse_workload("prefill:512-8192x2 decode:1@1").loads
    assert [x.query for x in loads[:-1]] == [512, 1024, 2048, 4096, 8192]
    assert [x.weight for x in loads] == pytest.approx([0.1] * 5 + [0.5])
    assert all(x.batch == 2 for x in loads[:-1])
    assert [x.query for x in parse_workload("prefill:1-2").loads] == [1, 2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "no shapes are given"),
        ("prefill", "'prefill' is no shape"),
        ("prefill:12k", "'prefill:12k' is no shape"),
        ("prefill:128 train:4", "'train' is neither of prefill and decode (in 'train:4')"),
        ("prefill:0", "a length of 0 holds no token"),
        ("prefill:9-3", "the range ends at 3, before it begins"),
        ("prefill:9x0", "a batch of 0 holds no sequence"),
        ("prefill:9@0", "a weight of 0 says nothing"),
    ],
)
def test_what_is_no_workload(line, said):
    with pytest.raises(WorkloadError) as raised:
        parse_workload(line)
    assert said in str(raised.value)
    assert str(raised.value).endswith(EXAMPLE)
    parse_workload(EXAMPLE.split("'")[1])
    parse_workload(EXAMPLE.split("'")[3])


def sizes(line, *sites):
    return [bound.sizes for bound in parse_workload(line).bind(sites)]


def test_lengths_become_sizes_of_the_model():
    assert sizes("prefill:100x3", site()) == [{"batch": 3, "length": 100}]
    cached = site(q=symbol("new"), k=symbol("past + new"))
    assert sizes("prefill:100 decode:50x2", cached) == [
        {"batch": 1, "new": 100, "past": 0},
        {"batch": 2, "new": 1, "past": 50},
    ]
    one = site(q=1, k=symbol("past + 1"))
    (bound,) = parse_workload("decode:50x2").bind([one])
    assert bound.shape(one) == {"b": 2, "h": 8, "g": 2, "q": 1, "k": 51, "d": 64, "e": 64}
    assert sizes("decode:50", site(q=1, k=symbol("s7")), one) == [{"batch": 1, "s7": 51, "past": 50}]
    assert sizes("decode:50", site(q=1, k=2048)) == [{"batch": 1}]  # a cache of fixed size


@pytest.mark.parametrize(
    ("line", "held", "said"),
    [
        ("decode:50", site(), "the model cannot do 'decode:50': it has no past: queries and keys are one length, length (layer)"),
        ("prefill:50", site(q=1, k=symbol("past + 1")), "its new tokens are 1 and cannot be 50"),
        ("prefill:50x2", site(b=1), "its sequences are 1 and cannot be 2"),
        ("decode:5000", site(q=1, k=2048), "it holds at most 2048 keys, and 5001 are asked for"),
    ],
)
def test_what_the_model_cannot_do(line, held, said):
    with pytest.raises(WorkloadError, match=r"Ask for|export") as raised:
        parse_workload(line).bind([held])
    assert said in str(raised.value)


def test_a_size_that_no_length_decides():
    strange = site(d=symbol("width"))
    (bound,) = parse_workload("prefill:5").bind([strange])
    with pytest.raises(WorkloadError, match="the size 'width' of the model is decided by no length of 'prefill:5'"):
        bound.shape(strange)
