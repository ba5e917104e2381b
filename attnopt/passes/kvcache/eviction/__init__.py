"""Cache policies: which tokens of a cache stay. To add one: a file here, a line below, a test beside the others.

They are no passes over graphs. One traced step neither shows what its later steps lose nor holds the state between them, so they are
applied where the steps are: in a live model (`attnopt.cache`), and proposed there, priced and measured (`plan.cache_choice`).
Each says in the words of a spec what it means (`keep(n, by=…)`), and the reference of that is what tests compare it with.
"""

from __future__ import annotations

from attnopt.errors import UnknownPolicy
from attnopt.ir.eviction import Policy
from attnopt.passes.kvcache.eviction.expected_attention import ExpectedAttention
from attnopt.passes.kvcache.eviction.key_norm import KeyNorm
from attnopt.passes.kvcache.eviction.q_filters import QFilters
from attnopt.passes.kvcache.eviction.sinks_window import SinksWindow
from attnopt.passes.kvcache.eviction.snapkv import Snapkv

POLICIES: tuple[type[Policy], ...] = (SinksWindow, KeyNorm, Snapkv, ExpectedAttention, QFilters)
BY_NAME: dict[str, type[Policy]] = {kind().name: kind for kind in POLICIES}


def policy_named(given: str | Policy) -> Policy:
    """The policy of a name with its source's parameters; one made by hand as it is. Raises UnknownPolicy."""
    if not isinstance(given, str):
        return given
    if given not in BY_NAME:
        raise UnknownPolicy(given, BY_NAME)
    return BY_NAME[given]()


__all__ = ["BY_NAME", "POLICIES", "ExpectedAttention", "KeyNorm", "QFilters", "SinksWindow", "Snapkv", "policy_named"]
