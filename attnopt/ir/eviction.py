"""Which tokens a cache keeps: what a policy is shown, what it answers, and how many tokens stay.

    Seen(k [B, G, L, D], places [B, G, L], last queries, …)   ->   policy.scores [B, G, L]   ->   chosen [B, G, C], in the order they came

A policy scores, larger is kept; a `Room` says how many tokens of each head stay; protected tokens (the first, the newest) stay whatever
their score, and count among them. A token keeps its *place*, its index in the padded sequence as it came: keys are cached turned to
their positions, so nothing is turned again, and a new query stands behind all tokens that were seen, not behind those that were kept.
Equal scores keep the earlier token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from attnopt.ir.spec import AttentionSpec

FAR = torch.iinfo(torch.int32).max  # the place of what holds no token


@dataclass(frozen=True, eq=False)
class Seen:
    """One layer's cache at the moment of evicting.

    k [B, G, L, D], v [B, G, L, E] as they are read; places int32 [B, G, L], FAR where a head holds no token, and increasing else;
    start int64 [B]: the place of the first token behind left padding; end: how many places were seen, padding included.
    q [B, H, W, D]: the last queries, turned to their positions, q_places int64 [W]; plain: the same before turning, where a policy asks
    for it, and future: the mean turn [B|1, 1, D, D] of the next positions (`future(n)`; None: no position turns queries).
    spec: heads, scale and soft cap of the layer. decoding: not the first time, right behind the prompt.
    """

    spec: AttentionSpec
    layer: int
    k: Tensor
    v: Tensor
    places: Tensor
    start: Tensor
    end: int
    q: Tensor | None = None
    q_places: Tensor | None = None
    plain: Tensor | None = None
    future: Callable[[int], Tensor] | None = None
    decoding: bool = False

    @property
    def held(self) -> Tensor:
        """Where there is a token, bool [B, G, L]."""
        return (self.places != FAR) & (self.places >= self.start[:, None, None])

    @property
    def lengths(self) -> Tensor:
        """Tokens that each sequence has had, padding not counted, [B]."""
        return self.end - self.start

    @property
    def repeats(self) -> int:
        """Query heads that share a key head."""
        assert self.q is not None
        return self.q.shape[1] // self.k.shape[1]

    def first(self, count: int) -> Tensor:
        """The first `count` tokens of each sequence, bool [B, G, L]."""
        return self.held & (self.places < self.start[:, None, None] + count)

    def newest(self, count: int) -> Tensor:
        """The last `count` tokens, bool [B, G, L]."""
        return self.held & (self.places >= self.end - count)

    def by_group(self, x: Tensor) -> Tensor:
        """Mean over the query heads that share keys, [B, H, L] -> [B, G, L]."""
        return x.unflatten(1, (self.k.shape[1], -1)).mean(2)

    def weights(self) -> Tensor:
        """What each of the last queries pays to every cached token, float32 [B, H, W, L]; nothing to later ones; padding pays nothing."""
        assert self.q is not None and self.q_places is not None
        k, places, held = (x.repeat_interleave(self.repeats, 1) for x in (self.k, self.places, self.held))
        scores = (self.q.float() @ k.float().mT) * (1.0 if self.spec.scale is None else self.spec.scale)
        cap = next((float(c.number(0)) for c in self.spec.score if c.name == "softcap"), None)
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        seen = held[:, :, None] & (places[:, :, None] <= self.q_places[:, None])
        paid = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)
        return paid * (self.q_places >= self.start[:, None])[:, None, :, None]


class Policy(Protocol):
    """Scores cached tokens. Frozen; what it remembers between calls is in `Seen`.

    queries: how many of the last queries it reads while decoding, 0 for none. plain: whether it reads them before they are turned.
    every: tokens between two evictions while decoding; None keeps all that come after the prompt. adaptive: heads of a layer share
    their room by score, each with at least `floor` of an equal share.
    """

    @property
    def name(self) -> str: ...
    @property
    def queries(self) -> int: ...
    @property
    def plain(self) -> bool: ...
    @property
    def every(self) -> int | None: ...
    @property
    def adaptive(self) -> bool: ...
    @property
    def floor(self) -> float: ...

    def protected(self, decoding: bool) -> tuple[int, int]:
        """How many of the first and of the newest tokens stay whatever their score."""
        ...

    def unfit(self, spec: AttentionSpec, layer: int) -> str:
        """Why the cache of this layer is left whole; empty where it is not."""
        ...

    def clause(self, count: int) -> str:
        """The words of a spec that mean the same, where a head keeps `count` tokens."""
        ...

    def scores(self, seen: Seen) -> Tensor:
        """[B, G, L]; larger is kept. What stands at places without a token does not matter."""
        ...


@dataclass(frozen=True)
class Room:
    """How many tokens stay: a share of what a sequence has had (`keep`), or a number (`capacity`).

    layers, heads: another share by layer, and by layer for each key head. sinks, recent: protected tokens in place of the policy's own.
    every: tokens between two evictions while decoding; 0 is the policy's own and evicts behind every piece of a prompt (more than one
    query at once), None evicts behind the first only.
    """

    keep: float | None = None
    capacity: int | None = None
    layers: Mapping[int, float] = field(default_factory=dict)
    heads: Mapping[int, Sequence[float]] = field(default_factory=dict)
    sinks: int | None = None
    recent: int | None = None
    every: int | None = 0

    def tokens(self, seen: Seen) -> Tensor:
        """How many tokens each head of each sequence keeps, int64 [B, G]."""
        heads, layer = seen.k.shape[1], seen.layer
        if layer in self.heads:
            shares = [float(share) for share in self.heads[layer]]
        elif layer in self.layers or self.capacity is None:
            shares = [float(self.layers.get(layer, 1.0 if self.keep is None else self.keep))] * heads
        else:
            return torch.full((len(seen.start), heads), self.capacity).to(seen.start)
        rows = [[math.ceil(share * length - 1e-9) for share in shares] for length in seen.lengths.tolist()]
        return torch.tensor(rows, dtype=torch.int64, device=seen.start.device).clamp(min=1)

    def protected(self, policy: Policy, decoding: bool) -> tuple[int, int]:
        sinks, recent = policy.protected(decoding)
        return (sinks if self.sinks is None else self.sinks), (recent if self.recent is None else self.recent)

    def interval(self, policy: Policy) -> int | None:
        return policy.every if self.every == 0 else self.every


def choose(policy: Policy, room: Room, seen: Seen) -> tuple[Tensor, Tensor]:
    """What stays: indices into L in the order of places [B, G, C], and which of them count, bool [B, G, C].

    Where heads or sequences keep different numbers, C is the largest of them.
    """
    sinks, recent = room.protected(policy, seen.decoding)
    scores = policy.scores(seen).double().nan_to_num(-torch.inf, neginf=-torch.inf)
    kept = seen.first(sinks) | seen.newest(recent)
    scores = scores.masked_fill(kept, torch.inf).masked_fill(~seen.held, -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    # A token that is there comes before a place without one, whose score is as low as that of a token may be.
    order = order.gather(-1, (~seen.held).gather(-1, order).to(torch.int8).argsort(dim=-1, stable=True))
    wanted = room.tokens(seen)
    if policy.adaptive and seen.layer not in room.heads:
        wanted = shared_room(scores, order, wanted, policy.floor)
    wanted = torch.maximum(wanted, kept.sum(-1)).minimum(seen.held.sum(-1))
    found = order[..., : int(wanted.max())]
    counts = torch.arange(found.shape[-1], device=found.device) < wanted[..., None]
    by_place = seen.places.gather(-1, found).masked_fill(~counts, FAR).argsort(dim=-1, stable=True)
    return found.gather(-1, by_place), counts.gather(-1, by_place)


def shared_room(scores: Tensor, order: Tensor, wanted: Tensor, floor: float) -> Tensor:
    """The room of a layer given to its heads by score: each keeps at least `floor` of its own, the best of all heads the rest.

    scores [B, G, L], order: their descending order, wanted [B, G] -> [B, G] with the same sum, where there are so many tokens.
    """
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    least = (floor * wanted.double()).ceil().long()
    lifted = scores.masked_fill(rank < least[..., None], torch.inf).flatten(1)
    ranks = torch.empty_like(lifted, dtype=torch.int64)
    ranks.scatter_(
        -1,
        lifted.argsort(dim=-1, descending=True, stable=True),
        torch.arange(lifted.shape[-1], device=order.device).expand_as(lifted),
    )
    return (ranks < wanted.sum(-1, keepdim=True)).view_as(scores).sum(-1)
