"""Keys of a live cache that carry the bounds of their pages to the attention that chooses by them.

k, v = cache.update(…)      k.bounds: of its pages       k.stored.read(): the keys themselves       anything else: as a tensor of keys
"""

from __future__ import annotations

from attnopt.hosts.eviction.bounds import Bounds
from attnopt.hosts.eviction.stored import Stored
from attnopt.hosts.eviction.unread import Unread


class InPages(Unread):
    """Keys as they are, with the bounds of their pages."""

    bounds: Bounds

    @classmethod
    def of(cls, stored: Stored, bounds: Bounds) -> InPages:
        made = cls(stored, stored.read().shape[3])
        made.bounds = bounds  # type: ignore[attr-defined]
        return made  # type: ignore[return-value]
