"""The forms in which a live cache keeps its tokens: each token in codes by itself, all but the first and newest ones, blocks of tokens.

"int8", cache(k=int8, v=int4, group=32)                     ->   Stored, a side at a time
cache(k=int2, v=int2, recent=128, k_basis=hadamard, …)      ->   Ends
cache(k=int4, v=int4, k_axis=channel, block=100, …)         ->   BlockState, both sides together
cache(…); layers 0 1: cache(…)                              ->   of each layer its own, where none of them is in blocks
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.hosts.eviction.ends import Ends
from attnopt.hosts.eviction.stored import Stored, storage
from attnopt.ir.by_layer import ByLayer, CacheForm, clauses_of, parts_of
from attnopt.ir.clause import Clause
from attnopt.ir.exact_ends import ExactEnds, exact_ends
from attnopt.ir.site import Refusal
from attnopt.ir.spec import as_spec
from attnopt.ir.token_blocks import TokenBlocks, token_blocks

EXACT = {"recent", "k_bits", "v_bits", "k_basis", "v_basis"}  # options of a cache that has more than codes


@lru_cache(maxsize=64)
def live_form(words: str | None) -> CacheForm | None:
    """The clause of a live cache, or those of its layers. Raises InputMismatch for what is no form of one."""
    if words is None or ";" not in words:
        return one_form(words)
    try:
        usual, others = parts_of(words)
    except ValueError as error:
        raise InputMismatch(str(error), where=words, next_move='Write "cache(…); layers 0 1: cache(…)".') from None
    clauses = [one_form(each) for each in (usual, *others.values())]
    if any(clause is None or keeps_blocks(clause) for clause in clauses):
        raise InputMismatch(
            "layers in blocks of tokens stand beside no others", where=words, next_move="Give one clause for all."
        )
    whole, *rest = clauses
    return ByLayer(whole, tuple(zip(others, rest, strict=True)))  # type: ignore[arg-type]


def one_form(words: str | None) -> Clause | None:
    clause = as_spec(f"softmax {words}").cache if words and "(" in words else None
    if clause is not None and (keeps_ends(clause) or keeps_blocks(clause)):
        return clause
    blocks = None if clause is None or not clause.count("block") else token_blocks(clause)
    if isinstance(blocks, Refusal):
        near = TokenBlocks(100, 50).words_of_a_spec
        raise InputMismatch(
            blocks.reason, where=str(clause), next_move=f'Write "{near}", with any even number for 100, or "int4".'
        )
    ends = None if clause is None or not EXACT & dict(clause.options).keys() else exact_ends(clause)
    if isinstance(ends, Refusal):
        raise InputMismatch(f"no live cache is kept like this: {ends.reason}", where=str(clause), next_move='Write "int4".')
    return storage(words)


@lru_cache(maxsize=64)
def keeps_ends(form: CacheForm) -> bool:
    """Whether some layer keeps its first or newest tokens exactly."""
    return any(isinstance(exact_ends(clause), ExactEnds) for clause in clauses_of(form))


@lru_cache(maxsize=64)
def keeps_blocks(form: CacheForm) -> bool:
    return any(isinstance(token_blocks(clause), TokenBlocks) for clause in clauses_of(form))


def empty_side(clause: Clause, side: str, starts: Tensor | None = None) -> Stored | Ends:
    """starts: the places of the first tokens of sequences that are padded on their left, [B]."""
    return Ends.empty(clause, side, starts) if keeps_ends(clause) else Stored(clause, side)


def starts_of(mask: Tensor | None) -> Tensor | None:
    """The place of the first token of each sequence [B], from a mask [B, L]; None where all begin at 0, or another mask says it."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask[:, 0].all()):
        return None
    return mask.bool().int().argmax(1)
