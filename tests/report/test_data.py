"""The record of an optimisation as JSON: all of the table, and a near miss without the graph that it lies in."""

from __future__ import annotations

import json

import pytest

from attnopt.ir.graph import Graph, Source, Value
from attnopt.ir.site import Refusal
from attnopt.report.data import Choice, Difference, Report, RewriteReport, SiteReport


def near_miss() -> Refusal:
    """At a node of a graph, whose values and users hold each other."""
    graph, x, y = Graph(), Value("x", (2,)), Value("y", (2,))
    node = graph.add("softmax", (x,), (y,), name="router", source=Source("layer.0", "model.py:7 in forward"), axis=-1)
    graph.add("relu", (y,), (Value("z", (2,)),))
    return Refusal("no product with values follows", node)


def report(**changes) -> Report:
    """Two sites, one replaced."""
    given = {
        "target": "cpu",
        "runtime": "torch",
        "select": "measure",
        "budget": 0.01,
        "sites": (
            SiteReport(
                "layer.0", "softmax causal", "softmax causal", {"b": "batch", "q": "length"}, "sdpa", "measured 2.00x",
                ("fuse-attention",), 0.004, 0.002,
                (Choice("sdpa", True, "2.00x the original", 0.002), Choice("flex", False, "no compiler")),
            ),
            SiteReport("layer.1", "sigmoid", "sigmoid", {"b": "batch", "q": "length"}, "original", "not softmax"),
        ),
        "refusals": (near_miss(),),
        "rewrites": (RewriteReport("dynamic-int8", "all (4) in int8", True, "within", "mean KL", 0.001, 0.01, 0.01, 0.005),),
        "difference": Difference(2e-6, 1e-6, 1e-4),
        "seconds_before": 0.010,
        "seconds_after": 0.005,
        "notes": ("one note",),
        "seconds_spent": {"recognise": 0.5},
    }  # fmt: skip
    return Report(**given | changes)


def test_json():
    record = json.loads(json.dumps(report().to_json()))
    assert record["refusals"] == [
        {
            "reason": "no product with values follows", "node": "router", "module": "layer.0", "line": "model.py:7 in forward",
            "reached": "", "remedy": "",
        }
    ]  # fmt: skip
    assert (record["fused"], record["speedup"], record["notes"], record["budget"]) == (1, 2.0, ["one note"], 0.01)
    assert record["sites"][0] == {
        "name": "layer.0", "before": "softmax causal", "after": "softmax causal", "shape": {"b": "batch", "q": "length"},
        "kernel": "sdpa", "why": "measured 2.00x", "steps": ["fuse-attention"], "seconds_before": 0.004, "seconds_after": 0.002,
        "choices": [
            {"kernel": "sdpa", "taken": True, "why": "2.00x the original", "seconds": 0.002},
            {"kernel": "flex", "taken": False, "why": "no compiler", "seconds": None},
        ],
    }  # fmt: skip
    assert record["sites"][1]["kernel"] == "original"
    assert record["rewrites"][0]["loss"] == 0.001
    assert record["difference"] == {"max_abs": 2e-6, "max_rel": 1e-6, "tolerance": 1e-4, "exact": True}
    assert record["seconds_spent"] == {"recognise": 0.5}


@pytest.mark.parametrize(("before", "after", "speedup"), [(0.01, 0.005, 2.0), (None, None, None), (0.01, None, None)])
def test_speedup(before, after, speedup):
    assert report(seconds_before=before, seconds_after=after).speedup == speedup
