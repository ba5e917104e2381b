"""Attention whose scores are a band: column j of the softmax is the key q + j - w, made and unmade in chunks.

    chunks of q and k (as_strided, unfold) -> products -> pad, view, copies: diagonals -> softmax -> pad, view: chunks -> v
        ->    softmax(q k' under window(w + 1) & lookahead(w + 1)) v

No product over all queries and keys stands in such a graph. What stands there is followed element by element (tracing), in exact
index arithmetic that holds for every number of chunks (affine), until every score is proved to be that of one query and one key,
every garbage score to be hidden, and every weight to meet the value of its own key (band).
"""

from __future__ import annotations

from attnopt.patterns.banded.banded_attention import BandedAttention

__all__ = ["BandedAttention"]
