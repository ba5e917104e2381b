"""One query against a cache that holds some tokens in codes and others exactly: each piece by itself, then put together.

    softmax scale(s) cache(k=int2, v=int2, k_bits=where(k < 15, 16, 2), v_bits=…, recent=128, k_basis=hadamard, v_basis=hadamard)
        ->   the first 15 tokens and the last 128 as they are    o', l' = softmax scale(s)                        of q
             those between, in codes                             o", l" = softmax scale(s) cache(k=int2, v=int2)  of q H;  o" H'
        o = (exp(l') o' + exp(l") o") / (exp(l') + exp(l"))

l is the log-sum-exp of a piece. What a Hadamard basis H turns is the query and the output of a piece, not the tokens of the cache.
A cache kept so comes in the order of `edits.caches.state`: codes, scales and zeros of all tokens, then the first ones and the last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.at_end import beyond_softmax, reads_positions
from attnopt.ir.clause import Clause
from attnopt.ir.exact_ends import exact_ends
from attnopt.ir.kv_cache import Cache
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.storage import hadamard

Decode = Callable[[str, Tensor, Cache], tuple[Tensor, Tensor]]  # a spec line, q, a cache -> o, log-sum-exp


@dataclass(frozen=True)
class Pieces:
    """coded, exact: the spec lines of both pieces. first, recent: exact tokens at either end. turned: the sides in a Hadamard basis."""

    coded: str
    exact: str
    first: int
    recent: int
    turned: tuple[str, ...]


def sees_all(spec: AttentionSpec) -> Refusal | None:
    """None where the newest query sees all keys alike, wherever they stand: pieces of them can be attended to by themselves."""
    if reads_positions(spec):
        return Refusal(f"the mask '{spec.mask}' reads positions, which a piece of a cache does not have", spec)
    if odd := beyond_softmax(spec, ("cache", "offset")):
        return Refusal(f"pieces are put together as a softmax of scaled products, and this has {odd}", spec)
    return None


@functools.lru_cache(maxsize=256)
def pieces_of(spec: AttentionSpec) -> Pieces | Refusal:
    """How a cache with exact tokens is read, or why it is not read in pieces."""
    clause = spec.cache
    if clause is None:
        return Refusal("there is no cache", spec)
    if (refused := sees_all(spec)) is not None:
        return refused
    ends = exact_ends(clause)
    if isinstance(ends, Refusal):
        return ends
    coded = Clause("cache", (), tuple((name, value) for name, value in ends.rows.options if name != "clip"))  # to read codes
    plain = AttentionSpec(spec.normalizer, score=spec.score)
    return Pieces(str(plain.with_(cache=coded)), str(plain), ends.first, ends.recent, ends.turned)


def attend_pieces(run: Decode, pieces: Pieces, q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """o [B, H, 1, E] of the newest query q [B, H, 1, D]. run: the kernel of a piece."""
    length = k[0].shape[2]
    first, recent = min(pieces.first, length), min(pieces.recent, max(0, length - pieces.first))
    exact, coded = None, None
    if first + recent:
        exact = Cache(*(exact_tokens(x[3:], pieces, first, recent) for x in (k, v)))
    if first + recent < length:
        (keys, *of_keys), (values, *of_values) = ([part[:, :, first : length - recent] for part in x[:3]] for x in (k, v))
        coded = Cache(keys, values, *of_keys, *of_values)
    return attend_both(run, pieces, q, exact, coded)


def attend_both(run: Decode, pieces: Pieces, q: Tensor, exact: Cache | None, coded: Cache | None) -> Tensor:
    """o [B, H, 1, E] of a query that sees the tokens of both pieces, of which one may have none."""
    found = []
    if exact is not None:
        found.append(run(pieces.exact, q, exact))
    if coded is not None:
        turned = q if "k" not in pieces.turned else (q.float() @ basis(q.shape[3])).to(q.dtype)
        o, lse = run(pieces.coded, turned, coded)
        found.append((o if "v" not in pieces.turned else (o.float() @ basis(o.shape[3]).mT).to(o.dtype), lse))
    return found[0][0] if len(found) == 1 else joined(*found)


def exact_tokens(held: Sequence[Tensor], pieces: Pieces, first: int, recent: int) -> Tensor:
    """[B, G, first + recent, D] of what is held of the first tokens and of the last, whose places no token may have reached."""
    parts = [held[0][:, :, :first]] if pieces.first else []
    if pieces.recent:
        parts.append(held[-1][:, :, held[-1].shape[2] - recent :])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def joined(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    share = torch.sigmoid(other[1] - one[1])[..., None]
    return torch.lerp(one[0].float(), other[0].float(), share).to(one[0].dtype)


@functools.lru_cache(maxsize=16)
def basis(width: int) -> Tensor:
    return hadamard(width).float()
