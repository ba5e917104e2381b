"""`attnopt.cache`: generate with a cache that forgets, by name or by hand.

with attnopt.cache("snapkv", keep=0.25) as held:
    model.generate(**inputs, max_new_tokens=64)
print(held)                      # tokens, bytes and spec of each layer; why a layer kept all
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attnopt.errors import BudgetError, InputMismatch
from attnopt.ir.eviction import Policy, Room
from attnopt.ir.spec import as_spec
from attnopt.passes.kvcache.eviction import QFilters, policy_named
from attnopt.passes.kvcache.eviction.q_filters import filters_of

SPEC = as_spec("softmax causal")

if TYPE_CHECKING:
    from torch import Tensor

    from attnopt.hosts.eviction.chosen import ChosenPolicy
    from attnopt.hosts.eviction.session import Session
    from attnopt.plan.cache_choice import CacheChoice


def cache(
    policy: str | Policy | CacheChoice | ChosenPolicy,
    keep: float | None = None,
    *,
    capacity: int | None = None,
    layers: Mapping[int, float] | None = None,
    heads: Mapping[int, Sequence[float]] | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    every: int | None = 0,
    store: str | None = None,
    **fields: Any,
) -> AbstractContextManager[Session]:
    """Transformers models that run inside keep what a policy chooses of their caches: of the prompt behind it, and later what came.

    policy: sinks-window, key-norm, snapkv, expected-attention, q-filters, one made by hand, or, alone, what `choose_cache` chose
    or the `cache_policy` of a live model.
    keep: the share of tokens that each head keeps, protected ones among them; capacity: their number instead. layers: another share by
    layer; heads: by layer, one for each key head. sinks, recent: protected first and newest tokens, in place of the policy's own.
    every: tokens between two evictions while decoding; 0 is the policy's own way, which also compresses behind every further piece of a
    prompt; None leaves all that comes behind the first. store: how tokens are kept, "int8" or a cache clause. Other keywords are fields
    of the policy (window=16).

    Works with any attention that goes through transformers' AttentionInterface (eager, sdpa, attnopt), with batches padded on the left,
    and with beams. Positions go on as if nothing had left. Layers with a sliding window keep their own cache, and the report says so.
    Raises BudgetError for shares that mean nothing, UnknownPolicy, and inside the block AttnoptError for caches that cannot forget.
    """
    try:
        from attnopt.hosts.eviction.chosen import ChosenPolicy
        from attnopt.hosts.eviction.patches import active
        from attnopt.hosts.eviction.session import Session
        from attnopt.hosts.eviction.stored import storage
        from attnopt.plan.cache_choice import CacheChoice
    except ImportError as error:
        raise InputMismatch("a cache policy needs transformers", next_move="pip install transformers") from error
    room = Room(keep, capacity, dict(layers or {}), dict(heads or {}), sinks, recent, every)
    if isinstance(policy, (CacheChoice, ChosenPolicy)):
        if room != Room(every=every) or store is not None or fields:
            raise BudgetError("what was chosen has its own room", next_move="Give the choice alone, or a policy and its room.")
        return policy.session(every)
    made = policy_named(policy)
    try:
        made = replace(made, **fields) if fields else made  # type: ignore[type-var]
    except TypeError as error:
        known = ", ".join(vars(made))
        raise InputMismatch(f"{made.name} has no such field: {error}", next_move=f"Its fields: {known}.") from error
    check(room)
    made.unfit(SPEC, 0)  # what a policy lacks altogether is said before any model runs
    return active(Session(made, room, storage(store)))


def query_filters(model: Any, batches: Iterable[Any], samples: int = 3000, seed: int = 0) -> QFilters:
    """The policy q-filters of a transformers model, with directions of its queries on these batches.

    batches: token ids [B, L] or named inputs; the source takes 20 sequences of 2,048 tokens. samples: queries of each head, drawn.
    """
    from attnopt.hosts.eviction.queries import queries

    rows, key_heads = queries(model, batches, samples, seed)
    made = {index: filters_of(q, key_heads[index]) for index, q in rows.items()}
    return QFilters({i: f for i, (f, _) in made.items()}, {i: e for i, (_, e) in made.items()})


def choose_cache(
    model: Any,
    sequences: Tensor,
    budget: float,
    policies: Sequence[str | Policy] = ("sinks-window", "key-norm", "snapkv", "expected-attention"),
    **options: Any,
) -> CacheChoice:
    """The policy whose cache takes the fewest bytes while what follows a prompt loses at most `budget` (mean KL in nats).

    sequences: token ids [N, L] of at least four texts: half of them choose, on the others the one-sided 95 % bound is within the budget.
    The result prints as a table, and `attnopt.cache(choice)` applies it. options: keeps=, stores=, prompt=, see `plan.cache_choice`.
    """
    from attnopt.plan.cache_choice import choose_policy

    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise BudgetError(f"budget {budget!r} allows no token to leave", where="budget", next_move="Give one above 0, in nats.")
    return choose_policy(model, sequences, budget, [policy_named(p) for p in policies], **options)


def check(room: Room) -> None:
    shares = [*room.layers.values(), *(share for row in room.heads.values() for share in row)]
    shares += [] if room.keep is None else [room.keep]
    if wrong := [x for x in shares if isinstance(x, bool) or not isinstance(x, (int, float)) or not 0 < x <= 1]:
        raise BudgetError(f"{wrong[0]!r} is no share of the tokens", where="keep", next_move="Give one above 0 and up to 1.")
    if room.keep is None and room.capacity is None and not shares:
        raise BudgetError("nothing says how many tokens stay", next_move="Give keep=0.25 or capacity=1024.")
    if room.keep is not None and room.capacity is not None:
        raise BudgetError("both a share and a number of tokens are given", next_move="Give keep= or capacity=, not both.")
    for name in ("capacity", "sinks", "recent", "every"):
        given, least = getattr(room, name), 1 if name == "capacity" else 0
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < least):
            raise BudgetError(f"{name}={given!r} is no number of tokens", where=name, next_move=f"Give at least {least}.")
