"""Remove the attention sublayer of one block, wherever the measured loss allows it.

    y = x + o_proj(attention(norm(x)))   ->   y = x            norm, projections and the slots of the cache go with it

Nothing is ranked here: each block is an offer of its own, what the model loses without it is measured on calibration data, and the
planner takes those that cost least for what they save. It is the alternative to `gate-norm`, whose ranking needs no data. Blocks that
hold the same weights (ALBERT) go together. With tuning, the layer that writes next into the residual stream is fitted to make up for
what is gone (`removal_fit`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from attnopt.ir.site import Refusal
from attnopt.ir.sublayer import Sublayer, sublayer
from attnopt.passes.candidate import FITTED, Candidate, Evidence, Group, Per
from attnopt.passes.edits.layers.removal import emptied, refuses_removal, remove
from attnopt.passes.edits.layers.removal_fit import fitted, next_writer, put


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
        plain = Candidate(
            self.name, False, what, "measured loss of each layer", options={"sites": names}, kind="removed",
            changes=("structure",), removes=removes, cached=emptied(gone),
        )  # fmt: skip
        writer = next_writer(gone[0])
        if isinstance(writer, Refusal) or len(gone) > 1 or evidence is None or not evidence.sees(writer.layer):
            return [plain]
        what, kind = f"{what}, '{writer.layer.name}' fitted", plain.kind + FITTED
        options = {"sites": names, "fitted": True}
        return [plain, replace(plain, description=what, kind=kind, nodes=(writer.layer,), options=options, needs="tuning")]

    def tune(self, candidate: Candidate, group: Group, evidence: Evidence) -> Candidate | Refusal:
        """As it is: it is fitted when it is first applied."""
        return candidate

    def arrays(self, candidate: Candidate, group: Group, evidence: Evidence) -> Mapping[str, Mapping[str, Tensor]] | Refusal:
        """The fitted weight [out, in] of the layer that writes next."""
        gone = sublayer(group.host.graph, group.sites[0], group.blocks[0])
        found = gone if isinstance(gone, Refusal) else fitted(group, [gone], evidence)
        return found if isinstance(found, Refusal) else {node.name: {"weight": weight} for node, weight in found.items()}

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it.

        Raises RuntimeError where it is the last that may stay, PlanError where it was fitted and the numbers are not there.
        """
        if candidate.options.get("fitted"):
            put(candidate, group)
        remove(group, set(candidate.options["sites"]))
        return group
