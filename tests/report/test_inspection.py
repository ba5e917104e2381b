"""What `inspect` returns: sites with shape and cost, near misses with node and line."""

from __future__ import annotations

import json

from spelling import B, L, Recorder

from attnopt.ir.graph import Source
from attnopt.ir.site import Refusal
from attnopt.patterns import recognise
from attnopt.report.inspection import InspectedSite, Inspection


def inspection() -> Inspection:
    """Two equal layers of grouped attention, one of them with its cost, and a near miss."""
    r = Recorder()
    x = r.input("x", B, L, 32)
    for layer in range(2):
        q = r.permute(r.reshape(r.linear(x, 32), B, L, 4, 8), 0, 2, 1, 3)
        k, v = (r.permute(r.reshape(r.linear(x, 16), B, L, 2, 8), 0, 2, 1, 3) for _ in range(2))
        k, v = (r.reshape(r.expand(r.reshape(t, B, 2, 1, L, 8), B, 2, 2, L, 8), B, 4, L, 8) for t in (k, v))
        weights = r.softmax(r.binary("mul", r.matmul(q, r.permute(k, 0, 1, 3, 2)), 0.25))
        object.__setattr__(weights.producer, "source", Source(f"layer.{layer}.attention", f"model.py:{layer + 7} in forward"))
        x = r.reshape(r.permute(r.matmul(weights, v), 0, 2, 1, 3), B, L, 32)
    r.output(r.softmax(r.linear(x, 8)))
    found = recognise(r.graph)
    costs = {"flops": 2e9, "bytes": 5e6}
    return Inspection(tuple(InspectedSite(site, **costs) for site in found.sites), found.refusals)


SPEC = "softmax heads(4, 2) width(8) scale(0.25)"


def test_a_site():
    site = inspection().sites[1]
    assert (site.name, site.spec, site.steps, site.source) == ("layer.1.attention", SPEC, (), "layer.1.attention")
    assert site.line == "model.py:8 in forward"
    assert site.shape == "[batch, 4/2, length x length, 8]"


def test_json():
    record = json.loads(json.dumps(inspection().to_json()))
    assert list(record) == ["sites", "refusals"]
    assert record["sites"][0].pop("block")["text"] == ""  # nothing was looked for around these sites
    assert record["sites"][0] == {
        "name": "layer.0.attention",
        "spec": SPEC,
        "steps": [],
        "source": "layer.0.attention",
        "line": "model.py:7 in forward",
        "shape": {"b": "batch", "h": "4", "g": "2", "q": "length", "k": "length", "d": "8", "e": "8"},
        "flops": 2e9,
        "bytes": 5e6,
    }
    (refusal,) = record["refusals"]
    assert set(refusal) == {"reason", "node", "module", "line", "reached", "remedy"}
    assert refusal["node"].startswith("softmax")


def test_the_table_joins_layers_that_are_alike():
    lines = [line.split() for line in str(inspection()).splitlines()]
    assert lines == [
        ["2", "attentions", "found"],
        ["site", "spec", "[b,", "heads,", "q", "x", "k,", "d]", "GFLOP", "MB"],
        ["layer.{0-1}.attention", *SPEC.split(), "[batch,", "4/2,", "length", "x", "length,", "8]", "2", "5"],
        ["1", "near", "miss;", "`attnopt", "inspect", "--explain`", "says", "why"],
    ]


def test_nothing_found():
    assert str(Inspection(())) == "no attention found"
    assert "1 near miss" in str(Inspection((), (Refusal("no", "there"),)))
