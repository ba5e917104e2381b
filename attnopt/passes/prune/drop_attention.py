"""Remove the attention sublayer of one block, wherever the measured loss allows it.

    y = x + o_proj(attention(norm(x)))   ->   y = x            norm, projections and the slots of the cache go with it

Nothing is ranked here: each block is an offer of its own, what the model loses without it is measured on calibration data, and the
planner takes those that cost least for what they save. It is the alternative to `gate-norm`, whose ranking needs no data. Blocks that
hold the same weights (ALBERT) go together.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.site import Refusal
from attnopt.ir.sublayer import Sublayer, sublayer
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.removal import emptied, refuses_removal, remove


@dataclass(frozen=True)
class DropAttention:
    """Remove the attention sublayer of one block, wherever the measured loss allows it."""

    name: str = "drop-attention"
    exact: bool = False
    per: Per = "block"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        found = [sublayer(group.host.graph, s, b) for s, b in zip(group.sites, group.blocks, strict=True)]
        gone = [s for s in found if isinstance(s, Sublayer)]
        if len(gone) < len(found):
            return next(s for s in found if isinstance(s, Refusal))
        if (refusal := refuses_removal(group.host, gone)) is not None:
            return refusal
        removes = tuple(node for s in gone for node in s.removed)
        names = [s.site.name for s in gone]
        what = f"without the attention of {names[0]}" + (f" and {len(names) - 1} that share its weights" if names[1:] else "")
        return [
            Candidate(
                self.name, False, what, "measured loss of each layer", options={"sites": names}, kind="removed",
                changes=("structure",), removes=removes, cached=emptied(gone),
            )
        ]  # fmt: skip

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it. Raises RuntimeError where it is the last that may stay."""
        remove(group, set(candidate.options["sites"]))
        return group
