"""A cache policy for a live model, under the budget that its rewrites are under too.

    rewrites found in half of the budget   ->   (policy, share, storage) on the rewritten model, against the original   ->   one kept

The loss is the joint one: of what follows a compressed prompt, policy and rewrites together, in KL of the next token. The halves of the
data are those of the rewrites: what chose them chooses the policy, and on the other half the 95 % bound stays within the whole budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt.analysis.calibration import LEAST, Calibration
from attnopt.errors import AttnoptError
from attnopt.hosts.eviction.chosen import ChosenPolicy
from attnopt.hosts.eviction.queries import queries
from attnopt.ir.eviction import Policy
from attnopt.ir.site import Refusal
from attnopt.passes.kvcache.eviction import QFilters
from attnopt.passes.kvcache.eviction.q_filters import filters_of
from attnopt.plan.cache_choice import CacheChoice, Weighed, choose_by, continued
from attnopt.plan.judge.budget import NATURAL, Budget
from attnopt.plan.judge.quality import kl

SHORTEST = 128  # tokens of a text that says something of what a policy loses
PROMPT = 0.75  # of a text is compressed, what follows is judged
STORES: dict[str, tuple[str | None, ...]] = {"time": (None,), "memory": (None, "int8")}  # codes are read anew for every step


def half_of(budget: Budget) -> Budget:
    """What the rewrites of the graph may lose where a policy is to find room beside them."""
    return replace(budget, limit=budget.allowed / 2) if judged(budget) else budget


def judged(budget: Budget) -> bool:
    """Whether it is in the measure that policies are judged in."""
    return budget.metric in (NATURAL, "kl") and not budget.exact


def proposed(
    model: Any, original: Any, data: Calibration, budget: Budget, policies: Sequence[Policy], *, minimise: str, seed: int
) -> tuple[ChosenPolicy | None, list[str]]:
    """The policy that a model is given, or None, and what the report says of it. model: with its rewrites."""
    if not judged(budget):
        return None, [f"no cache policy: its loss is a KL of the next token, and the budget is in {budget.metric}"]
    halves = sequences(*data.split(seed))
    if isinstance(halves, Refusal):
        return None, [f"no cache policy: {halves.reason}"]
    try:
        ready = [with_filters(policy, model, halves[0], seed) for policy in policies]
        choice = choose_by(
            model, halves, budget.allowed, ready, original=original, stores=STORES[minimise], prompt=PROMPT, seed=seed
        )
    except AttnoptError as failure:
        return None, [f"no cache policy: {failure}"]
    taken = choice.taken
    return (None if taken is None else taken.chosen), lines(choice, whole_cache_loss(model, original, halves[1]), halves)


def sequences(choosing: Calibration, holding: Calibration) -> tuple[Tensor, Tensor] | Refusal:
    """Token ids [N, L] of both halves, without padding, cut to the one length that keeps the most tokens of the smaller half."""
    rows = [
        [
            row
            for batch in half.batches
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            if mask.all()
        ]
        for half in (choosing, holding)
    ]
    counted = {
        length: min(sum(len(row) >= length for row in half) for half in rows)
        for length in {len(row) for half in rows for row in half if len(row) >= SHORTEST}
    }
    enough = {length: count for length, count in counted.items() if count >= LEAST}
    if not enough:
        return Refusal(
            f"texts of at least {SHORTEST} tokens tell what one loses, and a half of the data has {max(counted.values(), default=0)} "
            f"of {LEAST} that are needed; give longer calibration texts"
        )
    length = max(enough, key=lambda n: (n * enough[n], n))
    choose, hold = (torch.stack([row[:length] for row in half if len(row) >= length]) for half in rows)
    return choose, hold


def with_filters(policy: Policy, model: Any, rows: Tensor, seed: int) -> Policy:
    """q-filters without filters is given those of the model's queries on the texts that choose."""
    if not isinstance(policy, QFilters) or policy.filters:
        return policy
    found, key_heads = queries(model, rows.to(next(model.parameters()).device).split(4), 3000, seed)
    made = {index: filters_of(q, key_heads[index]) for index, q in found.items()}
    return replace(policy, filters={i: f for i, (f, _) in made.items()}, energy={i: e for i, (_, e) in made.items()})


@torch.no_grad()
def whole_cache_loss(model: Any, original: Any, rows: Tensor) -> float:
    """What the rewrites alone lose there."""
    cut, device = round(PROMPT * rows.shape[1]), next(model.parameters()).device
    parts = [part.to(device) for part in rows.split(4)]
    lost = [kl(a, b) for x in parts for a, b in zip(continued(original, x, cut), continued(model, x, cut), strict=True)]
    return sum(lost) / len(lost)


def lines(choice: CacheChoice, alone: float, halves: tuple[Tensor, Tensor]) -> list[str]:
    """What was taken, on what it was judged, and why each other policy was not."""
    length, taken = halves[0].shape[1], choice.taken
    cut = round(PROMPT * length)
    judge = f"prompts of {cut} tokens, {length - cut} read on, {len(halves[1])} texts held back; longer prompts were not judged"
    if taken is None:
        said = [
            f"no cache policy holds the budget of {choice.budget:g}: with the whole cache the rewrites lose {alone:.3g} ({judge})"
        ]
    else:
        assert taken.held is not None
        said = [
            f"cache policy {taken.chosen}: {taken.share:.3f} of the bytes, {taken.share * taken.whole_bytes:.0f} of "
            f"{taken.whole_bytes:.0f} a token; with the rewrites {taken.held}, without it {alone:.3g} ({judge})"
        ]
    for name in dict.fromkeys(one.policy.name for one in choice.weighed):
        said += [f"{why_not(one, choice)}" for one in closest([w for w in choice.weighed if w.policy.name == name], choice)]
    return said


def closest(weighed: Sequence[Weighed], choice: CacheChoice) -> list[Weighed]:
    """Of one policy's candidates, the one that says most of why it went no further: the first over the budget, else the smallest."""
    left = [one for one in weighed if one is not choice.taken]
    over = [one for one in left if one.loss.upper > choice.budget]
    within = [one for one in left if one.loss.upper <= choice.budget]
    if any(one is choice.taken for one in weighed):
        return over[:1]
    return [min(within, key=lambda one: one.share)] if within else over[:1]


def why_not(one: Weighed, choice: CacheChoice) -> str:
    if one.loss.upper > choice.budget:
        return f"cache policy {one.chosen}: loses at most {one.loss.upper:.3g}, over the budget"
    if one.held is not None and one.held.upper > choice.budget:
        return f"cache policy {one.chosen}: loses at most {one.held.upper:.3g} on the texts held back, over the budget"
    return f"cache policy {one.chosen}: {one.share:.3f} of the bytes, no less than what was taken"
