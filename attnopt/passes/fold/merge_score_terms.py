"""Compute what is added to the scores once where it is made of constants, and add what is added one after the other as one.

    scores + permute(table[index]) + shift        ->        scores + stored [H, N, N]

Terms of a score add up: exp of their sum is the product of their potentials, so that biases that follow each other are one. A table of
relative positions that is looked up, laid out and added at each call is stored as it is added. Two terms become one only where that is no
larger than they are together: [H, 1, N] and [1, N, N] stay apart. A term that the lengths of the inputs tell is made anew for each.

Source: "Attention: Marginal Probability is All You Need?".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.graph import Node, Value
from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.constant_values import fixed, held


@dataclass(frozen=True)
class MergeScoreTerms:
    """Compute what is added to the scores once where it is made of constants, and consecutive terms as one.

    most: numbers of a term that is stored.
    """

    most: int = 1 << 20
    name: str = "merge-score-terms"
    exact: bool = True
    per: Per = "block"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        found = [self.terms(site) for site in group.sites]
        if not any(made for made, _ in found):
            return next(
                (why for _, why in found if why is not None), Refusal("no term of a score is made of constants", group.name)
            )
        count = sum(len(added) for made, _ in found for _, added, _ in made)
        return [
            Candidate(
                self.name,
                True,
                f"{count} term{'s' * (count > 1)} of scores stored as added",
                "Attention: Marginal Probability is All You Need?",
                kind="stored",
                changes=("structure",),
            )
        ]

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        instead: dict[Value, Value] = {}
        for site in group.sites:
            for scores, added, data in self.terms(site)[0]:
                last = added[-1]
                builder = group.host.builder(last)
                stored = builder.constant(data, last.output.dtype)
                made = builder.emit(
                    "add", instead.get(scores, scores), stored, shape=last.output.shape or (), dtype=last.output.dtype
                )
                group.host.replace(last.output, made)
                instead[last.output] = made
        return group

    def terms(self, site: Site) -> tuple[list[tuple[Value, list[Node], Tensor]], Refusal | None]:
        """(scores, the additions that follow each other, what they add) where that saves an operation; or why one does not."""
        made: list[tuple[Value, list[Node], Tensor]] = []
        why: Refusal | None = None
        own = set(site.nodes)
        for first in site.nodes:
            if first.op != "add" or side(first) is None or follows(first, own):
                continue
            added = [first]
            while (after := follower(added[-1], own)) is not None:
                added.append(after)
            for run in [added] if isinstance(self.sum(added), Tensor) else [[node] for node in added]:
                data = self.sum(run)
                if isinstance(data, Refusal):
                    why = data
                elif len(run) > 1 or not side(run[0])[1].is_constant:  # type: ignore[index]
                    made.append((side(run[0])[0], run, data))  # type: ignore[index]
        return made, why

    def sum(self, added: list[Node]) -> Tensor | Refusal:
        total: Tensor | None = None
        sizes = 0
        for node in added:
            term = held(side(node)[1])  # type: ignore[index]
            if isinstance(term, Refusal):
                return term
            sizes += term.numel()
            total = term if total is None else total + term
        assert total is not None
        if total.numel() > self.most or (len(added) > 1 and total.numel() > sizes):
            return Refusal(f"stored as added, a term would hold {total.numel():,} numbers for {sizes:,}", added[0])
        return total.contiguous() if total.is_floating_point() else total.to(torch.get_default_dtype())


def side(node: Node) -> tuple[Value, Value] | None:
    """(scores, term) of an addition of something that is made of constants; None for any other."""
    left, right = node.inputs[:2]
    if left is None or right is None or fixed(left) == fixed(right):
        return None
    scores, term = (right, left) if fixed(left) else (left, right)
    known = all(isinstance(d, int) for d in term.shape or (None,))
    return (scores, term) if known and scores.shape == node.output.shape and term.scalar() is None else None


def follows(node: Node, own: set[Node]) -> bool:
    """Whether an addition adds to what another one gives, which nothing else reads."""
    scores = side(node)[0].producer  # type: ignore[index]
    return scores is not None and scores in own and scores.op == "add" and follower(scores, own) is node


def follower(node: Node, own: set[Node]) -> Node | None:
    users = node.output.users
    after = users[0] if len(users) == 1 else None
    fits = after is not None and after in own and after.op == "add" and side(node) is not None and side(after) is not None
    return after if fits and side(after)[0] is node.output else None  # type: ignore[index, arg-type]
