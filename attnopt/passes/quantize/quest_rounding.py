"""Mix the inputs of linear layers by a Hadamard matrix and round the mixed weights to a grid fitted to a Gaussian (QuEST).

    y = x W'   ->   y = (x H) V'          V = the nearest levels to W H, in blocks of 128 inputs; one step for each row

What H has mixed is close to a Gaussian, whose best grid is known: step = 2 s rms(w) / (2^bits - 1), levels in the middle of their bins,
nothing to search and no data. x H is computed when the model runs, once for layers that read one value. This is QuEST's forward pass on
a trained model; its training, and the rounding of inputs to few bits, are not here (onnxruntime's operator rounds them to 8).

Source: "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.layers.linear_layers import matrix
from attnopt.passes.edits.layers.mixed_inputs import mixed_inputs
from attnopt.passes.weight_rounding import Wish, candidate, formats, nodes_of
from attnopt.rounding.grids import Gridding
from attnopt.rounding.hadamard import BLOCK, LEAST_BLOCK, block_width, in_blocks
from attnopt.rounding.weight_format import WeightFormat


@dataclass(frozen=True)
class QuestRounding:
    """Mix the inputs of linear layers by a Hadamard matrix and round the mixed weights to a grid fitted to a Gaussian (QuEST)."""

    name: str = "quest-rounding"
    exact: bool = False
    per: Per = "linear"
    smallest: int = 64
    wishes: tuple[Wish, ...] = (Wish(4, 0),)
    block: int = BLOCK
    gridding: Gridding = Gridding("gaussian")

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        made: dict[str, Candidate] = {}
        refusal = Refusal("no format is wished for", group.name)
        for wish in self.wishes:
            kept = formats(group, wish, self.smallest)
            if isinstance(kept, Refusal):
                refusal = kept
                continue
            widths = {matrix(n).shape[1] for n in kept}
            block = block_width(next(iter(widths)), self.block) if len(widths) == 1 else None
            if block is None:
                refusal = self.refusal(sorted(widths), group.name)
                continue
            said = f"inputs mixed by Hadamard blocks of {block}, levels fitted to a Gaussian"
            found = candidate(self.name, "QuEST", said, kept, options={"block": block})
            made.setdefault(found.kind, found)
        return list(made.values()) or refusal

    def refusal(self, widths: Sequence[int], name: str) -> Refusal:
        """Why rows of these widths are not mixed together, with the block that is nearest."""
        rows = ", ".join(map(str, widths))
        if len(widths) > 1:
            near = min(width & -width for width in widths)
            return Refusal(f"the layers have rows of {rows} inputs, which are mixed apart; blocks of {near} divide all", name)
        near, most = widths[0] & -widths[0], f" to {self.block}" if self.block < BLOCK else ""
        said = f"no power of two from {LEAST_BLOCK}{most} divides rows of {rows} inputs; {near} does"
        return Refusal(said + ", and spreads too little" * (near < LEAST_BLOCK), name)

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Changes the host of the group in place; give it a copy."""
        nodes, block = nodes_of(candidate, group.host), candidate.options["block"]
        made = {}
        for node in nodes:
            format = WeightFormat.read(candidate.options["formats"][node.name])
            assert format is not None
            made[node.name] = self.gridding.rounded(in_blocks(matrix(node).double(), block), format)
        group.host.store_rounded(made, mixed_inputs(group.host, nodes, block))
        return group
