"""Keep the weights of linear layers in few bits, each rounding error made up for by the inputs that follow (GPTQ).

    y = x W'   ->   y = x V'          V on the grid of `round-weights`, the least  E |x (W - V)'|²  that one sweep over the inputs finds

Needs the second moment of what a layer reads, from calibration; it is that of the original model, where the authors' is that of the model
whose earlier layers are rounded already. The codes are found when a candidate is first applied.

Source: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.graph import Node
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.layers.linear_layers import matrix
from attnopt.passes.tied_tables import with_lookups
from attnopt.passes.weight_rounding import Wish, candidate, formats, formats_of, kept_codes, nodes_of
from attnopt.rounding import gptq


@dataclass(frozen=True)
class Gptq:
    """Keep the weights of linear layers in few bits, each rounding error made up for by the inputs that follow (GPTQ)."""

    name: str = "gptq"
    exact: bool = False
    per: Per = "linear"
    smallest: int = 64
    wishes: tuple[Wish, ...] = (Wish(4, 32), Wish(4, 128))
    method: gptq.Gptq = gptq.Gptq()

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        if evidence is None:
            return Refusal("GPTQ needs calibration data", group.name)
        made: dict[str, Candidate] = {}
        refusal = Refusal("no format is wished for", group.name)
        for wish in self.wishes:
            kept = formats(group, wish, self.smallest)
            if isinstance(kept, Refusal):
                refusal = kept
                continue
            why = next((r for n in kept if (r := self.refusal(n, evidence)) is not None), None)
            if why is not None:
                refusal = why
                continue
            said = "each error made up for by the inputs that follow"
            found = candidate(self.name, "GPTQ", said, kept, needs="calibration", host=group.host)
            made.setdefault(found.kind, found)
        return list(made.values()) or refusal

    def refusal(self, node: Node, evidence: Evidence) -> Refusal | None:
        if not evidence.sees(node):
            return Refusal("calibration did not see what the layer reads", node)
        return self.method.refusal(*matrix(node).shape)

    def arrays(self, candidate: Candidate, group: Group, evidence: Evidence) -> dict[str, Mapping[str, Tensor]] | Refusal:
        made: dict[str, Mapping[str, Tensor]] = {}
        for node, format in formats_of(candidate, group.host).items():
            moment = evidence.second_moment(node)
            if moment is None:
                return Refusal("calibration did not see what the layer reads", node)
            made[node.name] = self.method.rounded(matrix(node), moment, format).arrays()
        return made

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Changes the host of the group in place; give it a copy. Raises PlanError for a candidate without its arrays."""
        codes = kept_codes(candidate, nodes_of(candidate, group.host))
        group.host.store_rounded(with_lookups(codes, candidate, group.host))
        return group
