"""Second moments of what linear layers read, tokens counted by the attention they receive, layer by layer of a model.

    at once            in the model as it was                                  one run of the data for all layers
    layer after layer  in the model whose layers before are rounded by now     one run of the data for each layer

The second is what GPTQ's authors do: what a layer reads then holds the errors of those before, and its own rounding makes up for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.graph import Node
from attnopt.ir.site import Host
from attnopt.passes.candidate import Evidence, Group
from attnopt.passes.edits.layers.attention_layers import Layer
from attnopt.passes.rotation import Rotated, dtype_of
from attnopt.rounding.hadamard import in_blocks
from attnopt.rounding.rounded_weight import RoundedWeight


def moments_at_once(layers: Sequence[Layer], turned: Rotated, evidence: Evidence, least: float) -> Iterator[dict[str, Tensor]]:
    """For each layer the moments of what its linear nodes read once they are rotated, by node name."""
    for (_, nodes), seen in zip(layers, evidence.concentrated_moments(layers, least), strict=True):
        yield {n.name: turned.moment(n, seen[n.name]) for n in nodes if n.name in seen}


@dataclass(frozen=True)
class LayerAfterLayer:
    """turned: the model as it is rotated by folding alone. mixed: blocks of the layers that read their input in a Hadamard basis."""

    group: Group
    turned: Rotated
    mixed: Mapping[Node, int]
    evidence: Evidence
    least: float

    def moments(self, layers: Sequence[Layer], made: Mapping[Node, RoundedWeight]) -> Iterator[dict[str, Tensor]]:
        """As `moments_at_once`; made: the layers that are rounded by now, which the caller adds to before it asks for the next."""
        trial, done = self.group.host.copy(), 0
        self.turned.in_copy(self.group.host, trial).write(trial)
        trial.finish()
        for site, nodes in layers:
            if rounded := list(made.items())[done:]:
                for node, weight in rounded:
                    self.put(trial, node, weight)
                trial.finish()
                done += len(rounded)
            twins = {n.name: n for n in trial.graph.of("linear", "matmul")}
            own = [(site, [twins[n.name] for n in nodes])]
            (seen,) = self.evidence.on(trial).concentrated_moments(own, self.least)
            yield {n.name: self.as_read(n, seen[n.name]) for n in nodes if n.name in seen}

    def put(self, trial: Host, node: Node, weight: RoundedWeight) -> None:
        """What a rounded layer multiplies by, in the basis of the trial, whose inputs are not mixed."""
        block, twin = self.mixed.get(node), next(n for n in trial.graph.of("linear", "matmul") if n.name == node.name)
        matrix, held = weight.matrix(), twin.inputs[1]
        assert held is not None
        matrix = matrix if block is None else in_blocks(matrix, block)
        trial.set_input(twin, held, (matrix if twin.op == "linear" else matrix.T).to(dtype_of(held)).contiguous())

    def as_read(self, node: Node, seen: Tensor) -> Tensor:
        block = self.mixed.get(node)
        return seen if block is None else in_blocks(in_blocks(seen.double(), block).T, block)
