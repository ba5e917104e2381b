"""Queries that are the last of a sequence, and attention that sees their keys alike, in whatever order or pieces these are read.

offset(size(k) - size(q))        what a step of decoding, and a prompt behind a cache, have in their specs
"""

from __future__ import annotations

from collections.abc import Collection

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Const, Size, Term, apply
from attnopt.ir.spec import AttentionSpec

NEWEST = apply("sub", Size("k"), Size("q"))  # where the first query stands
AT_END = Clause("offset", (NEWEST,))


def at_end(spec: AttentionSpec) -> bool:
    """Whether a spec says so of its queries."""
    return spec.offset is not None and spec.offset.expr(0) == NEWEST


def reads_positions(spec: AttentionSpec) -> bool:
    """Whether the mask hides keys from the newest query by where they stand."""
    return spec.mask is not None and not (spec.mask == Term("causal") and at_end(spec))


def beyond_softmax(spec: AttentionSpec, slots: Collection[str] = ()) -> str:
    """What of a spec is more than a softmax of scaled products, "" where nothing is. slots: those that may say something too."""
    odd = next((str(c) for c in spec.score if c.name != "scale" or not isinstance(c.expr(0), Const)), "")
    odd = odd or next((slot for slot in spec.special if slot not in slots), "")
    return odd or (str(spec.normalizer) if spec.normalizer.name != "softmax" or spec.plus else "")
