"""The mask of a plan in a live layer: joined with the mask that transformers made, or cut out of the keys before one query.

    prompt, padded      mask of transformers [B, 1, Q, K]  &  causal & (window(64) | global(4))
    one query           k [B, G, T, D]   ->   the first 4 keys and the last 64      no mask is left to read

A query stands where it stands in the sequence with its cache, padding counted, as in a traced graph: without a mask the last query stands
at the last key; with one, each where the last key is that it sees, itself. So caches of a fixed size read alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.band import band
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Apply, Expr, Index, Term, conjuncts, substitute


@dataclass(frozen=True)
class Placed(Grid):
    """A grid whose queries stand at `places` [B|1, 1, Q, 1]."""

    places: Tensor | None = None

    def index(self, name: str) -> Tensor:
        return self.places if name == "q" and self.places is not None else super().index(name)


def joined(mask: Expr, seen: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """What is seen by both: bool [B|1, H|1, Q, K], or numbers to add where `seen` (bool or numbers, [B, 1, Q, K]) holds numbers.

    Without `seen` the queries are the last of the sequence.
    """
    queries, keys = query.shape[2], key.shape[2]
    if seen is not None:
        seen = seen[..., :keys]
        shown = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        places = (shown * torch.arange(keys, device=query.device)).amax(-1, keepdim=True)
    else:
        places = torch.arange(keys - queries, keys, device=query.device).view(1, 1, -1, 1)
    own = evaluate(mask, Placed(query.shape[0], query.shape[1], queries, keys, device=query.device, places=places))
    if seen is None:
        return own
    return own & seen if seen.dtype == torch.bool else torch.where(own, seen, torch.finfo(seen.dtype).min)


def without_terms(mask: Expr) -> Expr:
    """The mask in comparisons of indices alone, so that reading it in a call parses nothing."""
    return substitute(mask, {"q": Index("q"), "k": Index("k")})


@dataclass(frozen=True)
class Reach:
    """The keys that the last query of a sequence sees: the `first` ones and the `last` ones, its own among them."""

    first: int
    last: int

    def cut(self, rows: Tensor) -> Tensor:
        """[B, G, T, D] -> [B, G, first + last, D]; all of them where there are no more."""
        length = rows.shape[2]
        if length <= self.first + self.last:
            return rows
        last = rows[:, :, length - self.last :]
        return torch.cat([rows[:, :, : self.first], last], 2) if self.first else last


def reach_of(mask: Expr) -> Reach | None:
    """What the mask says for one query behind all others, where that is window(w) or window(w) | global(s), and the same for all heads."""
    (part, *others) = [p for p in conjuncts(mask) if p != Term("causal")] or [Term("causal")]
    sides = part.args if isinstance(part, Apply) and part.op == "or" else (part,)
    if others or not all(isinstance(side, Term) and side.name in ("window", "global") for side in sides):
        return None
    if sorted(side.name for side in sides if isinstance(side, Term)) not in (["window"], ["global", "window"]):
        return None
    found = band(mask)
    return None if found is None else Reach(found.first, found.behind + 1)
