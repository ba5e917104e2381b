"""Which policy a model's cache is given: proposed, measured on one half of the data, held to the budget on the other.

    candidates (policy, share kept, storage)   ->   bytes behind the prompt, KL of what follows   ->   the least bytes within the budget

A traced step neither shows what its later steps lose nor holds a cache between them, so these candidates are not weighed with the rewrites
of a graph: they are applied to the live model, prompt and continuation, as it will be used. They are `Candidate`s all the same. Shares
are tried from the largest down, and a policy whose bound is over the budget is not asked to keep less. Data: sequences of token ids; the
first part of each is the prompt that is compressed, on the rest the loss is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.errors import BudgetError
from attnopt.hosts.eviction.chosen import ChosenPolicy
from attnopt.hosts.eviction.patches import active
from attnopt.hosts.eviction.session import Session
from attnopt.hosts.eviction.stored import storage
from attnopt.ir.eviction import Policy, Room
from attnopt.passes.candidate import Candidate
from attnopt.plan.judge.quality import Loss, kl

KEEPS = (0.5, 0.25, 0.125)
METRIC = "mean KL"


@dataclass(frozen=True)
class Weighed:
    """A candidate with what it takes and loses. share: bytes behind the prompt, of those of the full cache, which takes whole_bytes
    a token. held: the loss on data that did not choose it; None where it was not asked for."""

    policy: Policy
    keep: float
    store: str | None
    share: float
    loss: Loss
    held: Loss | None = None
    whole_bytes: float = 0.0

    @property
    def chosen(self) -> ChosenPolicy:
        return ChosenPolicy(self.policy, self.keep, self.store)

    @property
    def candidate(self) -> Candidate:
        """In the words of the planner."""
        stored = "" if self.store is None else f" in {self.store}"
        return Candidate(
            self.policy.name,
            False,
            f"{self.keep:g} of the tokens of each head{stored}: {self.share:.3f} of the cache's bytes",
            self.policy.name,
            options={"keep": self.keep, "store": self.store},
            kind=f"{self.policy.name} keep {self.keep:g}{stored}",
            changes=("cache",),
            needs="calibration",
        )


@dataclass(frozen=True)
class CacheChoice:
    """taken: the candidate of fewest bytes that held its budget; None where none did, and the cache stays whole."""

    budget: float
    weighed: tuple[Weighed, ...]
    taken: Weighed | None = field(default=None)

    def session(self, every: int | None = 0) -> AbstractContextManager[Session]:
        """A context in which models use what was taken. Raises BudgetError where nothing was."""
        if self.taken is None:
            raise BudgetError(
                f"no policy holds a budget of {self.budget:g}", next_move="Generate without one, or give a larger budget."
            )
        return self.taken.chosen.session(every)

    def __str__(self) -> str:
        lines = [f"cache policies, budget {self.budget:g} in {METRIC}:"]
        for one in self.weighed:
            mark = "*" if self.taken is not None and one.candidate.kind == self.taken.candidate.kind else " "
            held = "" if one.held is None else f", on other data at most {one.held.upper:.3g}"
            lines.append(f" {mark} {one.candidate.kind}: {one.share:.3f} of the bytes, {one.loss}{held}")
        return "\n".join(lines)


def choose_policy(
    model: nn.Module,
    sequences: Tensor,
    budget: float,
    policies: Sequence[Policy],
    *,
    keeps: Sequence[float] = KEEPS,
    stores: Sequence[str | None] = (None, "int8"),
    prompt: float = 0.75,
    batch: int = 4,
    seed: int = 0,
) -> CacheChoice:
    """sequences: token ids [N, L], N independent samples, at least four. prompt: the share of L that is compressed.

    Raises BudgetError where there are too few to choose on one half and to hold the budget on the other.
    """
    if sequences.ndim != 2 or len(sequences) < 4:
        raise BudgetError(
            f"{len(sequences)} sequences do not tell what a policy loses",
            where="sequences",
            next_move="Give token ids [N, L] of at least four texts: half of them choose, the others hold the budget.",
        )
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
    halves = sequences[order[::2]], sequences[order[1::2]]
    return choose_by(model, halves, budget, policies, keeps=keeps, stores=stores, prompt=prompt, batch=batch, seed=seed)


def choose_by(
    model: nn.Module,
    halves: tuple[Tensor, Tensor],
    budget: float,
    policies: Sequence[Policy],
    *,
    original: nn.Module | None = None,
    keeps: Sequence[float] = KEEPS,
    stores: Sequence[str | None] = (None, "int8"),
    prompt: float = 0.75,
    batch: int = 4,
    seed: int = 0,
) -> CacheChoice:
    """halves: token ids [N, L] to choose by, and to hold the budget on. original: another model than this one with its full cache, whose
    logits losses are measured against: they are then of both, the policy and what makes the models differ."""
    choosing, holding = halves
    cut = min(choosing.shape[1] - 1, max(1, round(prompt * choosing.shape[1])))
    left = [(policy, store) for policy in policies for store in stores]
    weighed: list[Weighed] = []
    for keep in sorted(keeps, reverse=True):
        found = list(measured(model, choosing, cut, [(p, keep, s) for p, s in left], batch, seed, original))
        weighed += found
        left = [(one.policy, one.store) for one in found if one.loss.upper <= budget]
    fits = sorted((one for one in weighed if one.loss.upper <= budget), key=lambda one: (one.share, one.loss.mean))
    for one in fits:
        (again,) = measured(model, holding, cut, [(one.policy, one.keep, one.store)], batch, seed, original)
        checked = replace(one, held=again.loss)
        weighed[weighed.index(one)] = checked
        if again.loss.upper <= budget:
            return CacheChoice(budget, tuple(weighed), checked)
    return CacheChoice(budget, tuple(weighed))


@torch.no_grad()
def measured(
    model: nn.Module,
    sequences: Tensor,
    cut: int,
    chosen: Sequence[tuple[Policy, float, str | None]],
    batch: int,
    seed: int,
    original: nn.Module | None = None,
) -> Iterator[Weighed]:
    """Each candidate behind the same prompts; the full cache's logits, of the original, are computed once a batch."""
    losses: list[list[float]] = [[] for _ in chosen]
    shares: list[list[float]] = [[] for _ in chosen]
    token = 0.0
    for part in sequences.split(batch) if chosen else ():
        part = part.to(next(model.parameters()).device)
        whole = continued(model if original is None else original, part, cut)
        for i, (policy, keep, store) in enumerate(chosen):
            with active(Session(policy, Room(keep=keep, every=None), storage(store))) as session:
                past = model(part[:, :cut]).past_key_values
                shares[i].append(session.bytes / max(1, session.whole_bytes))
                token = session.whole_bytes / (len(part) * cut)
                made = continued(model, part, cut, past)
            losses[i] += [kl(before, after) for before, after in zip(whole, made, strict=True)]
    for (policy, keep, store), values, share in zip(chosen, losses, shares, strict=True):
        yield Weighed(policy, keep, store, sum(share) / len(share), Loss.of(METRIC, values, seed), whole_bytes=token)


def continued(model: nn.Module, part: Tensor, cut: int, past: Any = None) -> Tensor:
    """Logits of what follows the prompt [B, L - cut, classes]."""
    past = model(part[:, :cut]).past_key_values if past is None else past
    return model(part[:, cut:], past_key_values=past).logits
