"""Keep the weights of linear layers as int8 and quantise their inputs on the fly.

    y = x W' + b   ->   y = (q(x) q(W)') * s_x * s_w + b       s_w per output channel, s_x per call, weights symmetric

The runtime's own dynamic quantiser does it. Candidates run from all linear layers to ever fewer: the layers that read the
embedding or write the model's output lose most and are left out first.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.graph import Graph, Node
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Group


@dataclass(frozen=True)
class DynamicInt8:
    """Keep the weights of linear layers as int8 and quantise their inputs on the fly."""

    name: str = "dynamic-int8"
    exact: bool = False
    smallest: int = 64  # a layer with fewer inputs or outputs gains nothing

    def propose(self, group: Group) -> list[Candidate] | Refusal:
        layers = self.layers(group.host.graph)
        if not layers:
            return Refusal(f"no linear layer with constant weights of at least {self.smallest} x {self.smallest}")
        subsets = {"all linear layers": layers, "all linear layers but the last": layers[:-1]}
        half = layers[len(layers) // 4 : -max(1, len(layers) // 4)]
        subsets["the middle half of the linear layers"] = half
        return [
            Candidate(self.name, False, f"{what} ({len(nodes)}) in int8", "dynamic quantisation", nodes)
            for what, nodes in subsets.items()
            if nodes
        ]

    def layers(self, graph: Graph) -> tuple[Node, ...]:
        """The layers that may be int8, in graph order."""
        return tuple(n for n in graph.of("linear", "matmul") if self.suits(n))

    def suits(self, node: Node) -> bool:
        if node.op == "matmul" and len(node.inputs) != 2:
            return False
        data, weight = node.inputs[:2]
        if data is None or weight is None or data.is_constant or not weight.is_constant or weight.shape is None:
            return False
        return (
            len(weight.shape) == 2
            and weight.dtype == "float32"
            and all(isinstance(d, int) and d >= self.smallest for d in weight.shape)
        )

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Changes the host of the group in place; give it a copy."""
        by_name = {n.name: n for n in group.host.graph.of("linear", "matmul")}
        group.host.quantize_linears([by_name[n.name] for n in candidate.nodes])
        return group
