"""Keep the weights of linear layers in few bits, each rounded to the nearest level.

    y = x W' + b   ->   y = x ((codes - zeros) * steps)' + b          a step for every `group` inputs of a row

Levels lie where the squared error of their group is least (`rounding.grids`). On onnxruntime the layer is its own MatMulNBits, which also
rounds its inputs to 8 bits; on torch the weights are made whole for each call, which saves memory and costs time.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.layers.linear_layers import matrix
from attnopt.passes.tied_tables import with_lookups
from attnopt.passes.weight_rounding import Wish, candidate, formats, nodes_of
from attnopt.rounding.grids import Gridding
from attnopt.rounding.weight_format import WeightFormat


@dataclass(frozen=True)
class RoundWeights:
    """Keep the weights of linear layers in few bits, each rounded to the nearest level."""

    name: str = "round-weights"
    exact: bool = False
    per: Per = "linear"
    smallest: int = 64  # a layer with fewer inputs or outputs gains nothing
    wishes: tuple[Wish, ...] = (Wish(8, 128), Wish(4, 32), Wish(4, 128))
    gridding: Gridding = Gridding("squares")

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        made: dict[str, Candidate] = {}
        refusal = Refusal("no format is wished for", group.name)
        for wish in self.wishes:
            kept = formats(group, wish, self.smallest)
            if isinstance(kept, Refusal):
                refusal = kept
                continue
            found = candidate(self.name, "rounding to nearest", "rounded to the nearest", kept, host=group.host)
            made.setdefault(found.kind, found)
        return list(made.values()) or refusal

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Changes the host of the group in place; give it a copy."""
        made = {}
        for node in nodes_of(candidate, group.host):
            format = WeightFormat.read(candidate.options["formats"][node.name])
            assert format is not None
            made[node.name] = self.gridding.rounded(matrix(node), format)
        group.host.store_rounded(with_lookups(made, candidate, group.host))
        return group
