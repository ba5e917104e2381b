"""Tables for a terminal: golden on a small report, equal layers joined, brackets taken literally."""

from __future__ import annotations

import pytest
from report.test_data import report

from attnopt.ir.site import Refusal
from attnopt.report.data import Difference
from attnopt.report.table import as_text, grouped, ranges, refusal_table, summary

GOLDEN = """\
site     spec            kernel    before  after  why
layer.0  softmax causal  sdpa      4 ms    2 ms   measured 2.00x
layer.1  sigmoid         original                 not softmax
dynamic-int8: kept, all (4) in int8: within
2 attentions found, 1 replaced; model 10 ms -> 5 ms (2.00x); largest difference 2e-06 absolute, 1e-06 relative (allowed 0.0001)
one note"""


def test_a_report():
    assert "\n".join(line.rstrip() for line in str(report()).splitlines()) == GOLDEN


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sites": ()}, "no attention found, nothing replaced; model 10 ms -> 5 ms"),
        ({"sites": report().sites[:1], "seconds_after": None, "difference": None}, "1 attention found, 1 replaced"),
        ({"difference": Difference(0.5, 0.25, 1e-4, exact=False), "seconds_before": None},
         "2 attentions found, 1 replaced; largest difference 0.5 absolute, 0.25 relative"),
    ],
)  # fmt: skip
def test_the_last_line(changes, said):
    assert summary(report(**changes)).startswith(said)
    assert ("allowed" in summary(report(**changes))) == ("sites" in changes and "difference" not in changes)


def test_layers_are_joined_by_what_differs():
    rows = [(f"h.{i}.attn", ("a",)) for i in (0, 1, 2, 5)] + [("h.3.attn", ("b",)), ("cross", ("a",)), ("cross:2", ("a",))]
    assert grouped(rows) == [("h.{0-2,5}.attn", ("a",)), ("h.3.attn", ("b",)), ("cross", ("a",)), ("cross:2", ("a",))]
    assert ranges(["3", "1", "2", "7", "9", "10"]) == "1-3,7,9-10"


def test_what_stands_in_brackets_is_no_markup():
    shown = as_text(refusal_table([Refusal("the shape is [bold]2 x 3[/bold]", "node[0]")]))
    assert "the shape is [bold]2 x 3[/bold]" in shown
    assert "node[0]" in shown
    assert as_text(refusal_table([])) == "no near misses"
