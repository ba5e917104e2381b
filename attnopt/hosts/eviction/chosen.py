"""A cache policy that belongs to a model: with its share and storage, as data in a folder, and as a session around `generate`.

ChosenPolicy(Snapkv(), keep=0.25, store="int8").to_json()   ->   {"policy": "snapkv", "fields": {"window": 32, …}, "keep": 0.25, …}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import UnreadableModel
from attnopt.hosts.eviction.patches import active
from attnopt.hosts.eviction.session import Session
from attnopt.hosts.eviction.stored import storage
from attnopt.ir.clause import Clause
from attnopt.ir.eviction import Policy, Room


@dataclass(frozen=True)
class ChosenPolicy:
    """keep: the share of tokens that each head keeps. store: how, see `stored.storage`."""

    policy: Policy
    keep: float
    store: str | None = None

    @property
    def clause(self) -> Clause | None:
        """Of the cache that it leaves; None where that is in no codes."""
        return storage(self.store)

    def session(self, every: int | None = 0) -> AbstractContextManager[Session]:
        """A context in which models use it. every: see `Room`."""
        return active(Session(self.policy, Room(keep=self.keep, every=every), self.clause))

    def to_json(self) -> dict[str, Any]:
        """Plain data; tensors by layer, such as those of q-filters, as lists."""
        given = {f.name: getattr(self.policy, f.name) for f in fields(self.policy) if f.name != "name"}  # type: ignore[arg-type]
        return {
            "policy": self.policy.name,
            "fields": {name: plain(value) for name, value in given.items()},
            "keep": self.keep,
            "store": self.store,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], known: Mapping[str, Callable[..., Policy]]) -> ChosenPolicy:
        """known: policies by name. Raises UnreadableModel for one that this attnopt does not have, or that has other fields there."""
        try:
            given = {name: by_layer(value) for name, value in record["fields"].items()}
            return cls(known[record["policy"]](**given), float(record["keep"]), record["store"])
        except (KeyError, TypeError, ValueError) as failure:
            raise UnreadableModel(
                f"its cache policy cannot be read: {failure}",
                next_move="Install the attnopt that made it, or choose a policy again with policies=.",
            ) from failure

    def __str__(self) -> str:
        return f"{self.policy.name} keep {self.keep:g}" + ("" if self.store is None else f" in {self.store}")


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(layer): x.tolist() if isinstance(x, Tensor) else x for layer, x in value.items()}
    return value


def by_layer(value: Any) -> Any:
    """Tensors again, where lists stand by layer."""
    return {int(layer): torch.tensor(x) for layer, x in value.items()} if isinstance(value, Mapping) else value
