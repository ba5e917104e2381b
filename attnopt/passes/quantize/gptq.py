"""Keep the weights of linear layers in few bits, each rounding error made up for by the inputs that follow (GPTQ).

    y = x W'   ->   y = x V'          V on the grid of `round-weights`, the least  E |x (W - V)'|²  that one sweep over the inputs finds

Needs the second moment of what a layer reads, from calibration; it is that of the original model, where the authors' is that of the model
whose earlier layers are rounded already. The codes found travel with the candidate, not in a plan's file.

Source: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.linear_layers import matrix
from attnopt.passes.weight_rounding import Wish, candidate, formats, kept_codes, nodes_of
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
            arrays = {}
            for node, format in kept.items():
                weight, moment = matrix(node), evidence.second_moment(node)
                why = self.method.refusal(*weight.shape)
                if moment is None or why is not None:
                    refusal = why or Refusal("calibration did not see what the layer reads", node)
                    break
                arrays[node.name] = self.method.rounded(weight, moment, format).arrays()
            else:
                found = candidate(
                    self.name,
                    "GPTQ",
                    "each error made up for by the inputs that follow",
                    kept,
                    needs="calibration",
                    arrays=arrays,
                )
                made.setdefault(found.kind, found)
        return list(made.values()) or refusal

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Changes the host of the group in place; give it a copy. Raises PlanError where the candidate came from a file."""
        group.host.store_rounded(kept_codes(candidate, nodes_of(candidate, group.host)))
        return group
