"""Keys of a live cache that carry the bounds of their pages to the attention that chooses by them.

    k, v = cache.update(…)      k.counted(): the bounds      k.stored.read(): the keys

Anything else that is done with them is done with a tensor of keys.
"""

from __future__ import annotations

from collections.abc import Callable

from attnopt.hosts.eviction.bounds import Bounds
from attnopt.hosts.eviction.stored import Stored
from attnopt.hosts.eviction.unread import Unread


class InPages(Unread):
    """Keys as they are, with the bounds of their pages, which are brought up to date when they are asked for."""

    size: int
    counted: Callable[[], Bounds]

    @classmethod
    def of(cls, stored: Stored, size: int, counted: Callable[[], Bounds]) -> InPages:
        made = cls(stored, stored.read().shape[3])
        made.size, made.counted = size, counted  # type: ignore[attr-defined]
        return made  # type: ignore[return-value]
