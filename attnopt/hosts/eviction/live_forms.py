"""The forms in which a live cache keeps its tokens: each token in codes by itself, or all but the first and newest ones in codes.

"int8", cache(k=int8, v=int4, group=32)                     ->   Stored, a side at a time
cache(k=int2, v=int2, recent=128, k_basis=hadamard, …)      ->   Ends
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from attnopt.hosts.eviction.ends import Ends
from attnopt.hosts.eviction.stored import Stored, storage
from attnopt.ir.clause import Clause
from attnopt.ir.exact_ends import ExactEnds, exact_ends
from attnopt.ir.spec import as_spec


@lru_cache(maxsize=64)
def live_form(words: str | None) -> Clause | None:
    """The clause of a live cache. Raises InputMismatch for what is no form of one."""
    clause = as_spec(f"softmax {words}").cache if words and "(" in words else None
    if clause is not None and keeps_ends(clause):
        return clause
    return storage(words)


@lru_cache(maxsize=64)
def keeps_ends(clause: Clause) -> bool:
    return isinstance(exact_ends(clause), ExactEnds)


def empty_side(clause: Clause, side: str, starts: Tensor | None = None) -> Stored | Ends:
    """starts: the places of the first tokens of sequences that are padded on their left, [B]."""
    return Ends.empty(clause, side, starts) if keeps_ends(clause) else Stored(clause, side)


def starts_of(mask: Tensor | None) -> Tensor | None:
    """The place of the first token of each sequence [B], from a mask [B, L]; None where all begin at 0, or another mask says it."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask[:, 0].all()):
        return None
    return mask.bool().int().argmax(1)
