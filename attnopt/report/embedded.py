"""Records inside of a model's file: the report and the plan, as text that takes a twentieth of their JSON.

    {"target": "cpu", …}   <->   "lzma {Wp48S^xk9…"          a report of 300 kB, much of it the same words, is 5 % of a small model's file

A file that was written with plain JSON is read as well.
"""

from __future__ import annotations

import base64
import json
import lzma
from typing import Any

PREFIX = "lzma "


def embedded(record: Any) -> str:
    """A record of plain data as text for a file's metadata."""
    return PREFIX + base64.b85encode(lzma.compress(json.dumps(record).encode())).decode()


def extracted(text: str) -> Any:
    """The record that `embedded` made a text of."""
    if text.startswith(PREFIX):
        text = lzma.decompress(base64.b85decode(text.removeprefix(PREFIX))).decode()
    return json.loads(text)
