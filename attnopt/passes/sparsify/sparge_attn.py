"""Compute only those tiles of scores that pooled queries and keys say hold the weight.

    softmax scale(s) causal   ->   softmax scale(s) causal pooled_blocks(128, 64, share=0.5, similarity=-0.1, first=1)

Per row of tiles: mean query . mean key, a softmax over tiles, the best share of them or the fewest that hold a mass. Blocks whose rows
are unlike one another are kept whole, and so is the first block of keys, where sinks are. The source tunes thresholds for each head;
here each attention gets one of some settings, and the planner decides by measured loss. The second filter, inside of the kernel, is
written skip=… in a spec, and is not among the settings.

What is chosen for a query depends on the other queries of its tile, so on up to 127 later ones; no later key is ever given weight.

Source: "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference".
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.sparsity import applied, proposed


@dataclass(frozen=True)
class SpargeAttn:
    """Compute only those tiles of scores that pooled queries and keys say hold the weight.

    settings: what stands beside the tile in the clause: the share of tiles or the mass that is kept, and how alike rows must be.
    """

    tile: tuple[int, int] = (128, 64)
    settings: tuple[str, ...] = ("share=0.5, similarity=-0.1", "share=0.25, similarity=-0.1", "mass=0.98, similarity=0.6")
    name: str = "sparge-attn"
    exact: bool = False
    per: Per = "site"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        return proposed(self.name, "SpargeAttn", self.lines, group, evidence)

    def lines(self, site: Site) -> dict[str, str] | Refusal:
        if len(site.spec.score) != sum(c.name == "scale" for c in site.spec.score) or site.spec.scale is None:
            return Refusal(f"pooled rows say nothing of '{site.spec.score[-1]}'", site.name)
        return {setting: f"pooled_blocks({self.tile[0]}, {self.tile[1]}, {setting}, first=1)" for setting in self.settings}

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with the selection in the spec of its site."""
        return applied(candidate, group)
