"""What passes that change the heads of a block share: each says what heads become, written, found again and fitted it is here.

    changes(options, group, evidence)  ->  HeadChanges        from what stands in a plan, and the calibration data where it needs them

A candidate holds its maps as arrays. Read from a plan's file it has none, and they are found again from its options (`Computes`). Beside
each candidate stands its twin with the output projection fitted to calibration data (`output_fit`), which needs tuning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from attnopt.errors import PlanError
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import FITTED, Candidate, Evidence, Group
from attnopt.passes.edits.heads.changes import HeadChanges
from attnopt.passes.edits.heads.output_fit import fitted
from attnopt.passes.edits.heads.writer import write


class HeadPass:
    """One method's `changes`; the rest follows from it."""

    def changes(self, options: Mapping[str, Any], group: Group, evidence: Evidence | None) -> HeadChanges | Refusal:
        """What the heads of a group become. evidence: None where there are no data."""
        raise NotImplementedError

    def fit(self, options: Mapping[str, Any], group: Group, evidence: Evidence) -> HeadChanges | Refusal:
        """The same with the output projection fitted."""
        found = self.changes(options, group, evidence)
        return found if isinstance(found, Refusal) else fitted(group, found, evidence)

    def tune(self, candidate: Candidate, group: Group, evidence: Evidence) -> Candidate | Refusal:
        """As it is: it is fitted when it is first applied."""
        return candidate

    def arrays(self, candidate: Candidate, group: Group, evidence: Evidence) -> Mapping[str, Mapping[str, Tensor]] | Refusal:
        """The maps, by the node that has the weights."""
        find = self.fit if candidate.options.get("fitted") else self.changes
        found = find(candidate.options, group, evidence)
        if isinstance(found, Refusal):
            return found
        held = found.arrays(group.blocks[0])
        return {node.name: held.get(node.name, {}) for node in candidate.nodes}

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it. Raises PlanError where its maps cannot be known."""
        if candidate.arrays:
            return write(group, HeadChanges.of(candidate, group.blocks[0]))
        why = Refusal("its output projection was fitted on calibration data")
        found = why if candidate.options.get("fitted") else self.changes(candidate.options, group, None)
        if isinstance(found, Refusal):
            raise PlanError(
                f"the plan does not hold the numbers that '{candidate.pass_name}' found: {found.reason}",
                next_move="Give the calibration data that the plan was found with, or use the model that was written with it.",
            )
        return write(group, found)


def with_fitted(candidates: Iterable[Candidate], group: Group, evidence: Evidence | None) -> list[Candidate]:
    """Each candidate, then its twin whose output projection is fitted, where there is evidence of what that reads."""
    made = list(candidates)
    layers = [b.o.node for b in group.blocks if b.o is not None]
    if evidence is None or not all(evidence.sees(node) for node in layers):
        return made
    return [each for c in made for each in (c, twin(c))]


def twin(candidate: Candidate) -> Candidate:
    return replace(
        candidate,
        kind=candidate.kind + FITTED,
        description=f"{candidate.description}, the output fitted",
        options={**candidate.options, "fitted": True},
        needs="tuning",
        arrays={},
    )
