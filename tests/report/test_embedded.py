"""Records in a file's metadata: the same after, much smaller where words repeat, and plain JSON is read too."""

from __future__ import annotations

import json

from attnopt.report.embedded import embedded, extracted


def test_there_and_back():
    record = {
        "sites": [{"name": f"layers.{i}", "spec": "softmax causal & window(64)", "loss": 0.1 * i} for i in range(500)],
        "ü": None,
    }
    text = embedded(record)
    assert extracted(text) == record
    assert len(text) < 0.2 * len(json.dumps(record)) and text.isascii()


def test_plain_json_of_earlier_files():
    assert extracted(json.dumps({"a": [1, 2]})) == {"a": [1, 2]}
