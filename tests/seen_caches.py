"""One layer's cache as policies see it, with random rows."""

from __future__ import annotations

from typing import Any

import torch

from attnopt.ir.eviction import Room, Seen, choose
from attnopt.ir.spec import as_spec

SPEC = as_spec("softmax heads(4, 2) scale(0.5) causal")


def seen(length: int = 12, batch: int = 1, start: tuple[int, ...] | None = None, **changed: Any) -> Seen:
    """4 query heads on 2 key heads, 8 channels; the whole prompt was seen, and all of it is held."""
    random = torch.Generator().manual_seed(length)

    def rows(heads: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, 8, generator=random)

    places = torch.arange(length, dtype=torch.int32)
    q = rows(4)
    given = {
        "spec": SPEC, "layer": 2, "k": rows(2), "v": rows(2), "places": places.expand(batch, 2, length),
        "start": torch.tensor(start or (0,) * batch), "end": length, "q": q, "q_places": places.long(), "plain": q,
    }  # fmt: skip
    return Seen(**{**given, **changed})


def places_kept(policy: Any, room: Room, made: Seen) -> list[list[list[int]]]:
    """By sequence and key head, the places that stay."""
    index, counts = choose(policy, room, made)
    places = made.places.gather(2, index)
    return [
        [row[there].tolist() for row, there in zip(rows, theres, strict=True)]
        for rows, theres in zip(places, counts, strict=True)
    ]
