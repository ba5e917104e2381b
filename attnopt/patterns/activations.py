"""Two facts about every value of a graph, each computed in one pass: does data reach it, and does a product of data?

Attention multiplies data by data. A weight, a position table or an arange multiplied by data is a projection or a bias.
"""

from __future__ import annotations

from attnopt.ir.graph import LAYOUT, Graph, Value
from attnopt.patterns.rounding import multiplies, rounds
from attnopt.patterns.talking_heads import mixes_heads

# A score may pass through these and is still a score.
SCORE_OPS = {*LAYOUT, "cast", "add", "sub", "mul", "div", "where", "neg", "tanh", "maximum", "minimum"}


class Activations:
    """`value in data`: it depends on the inputs. `strength`: how surely scores are what it holds.

    Learned queries (latents, object queries) are computed from constants alone; they are operands, but a product with them
    is the main score of an attention only where no product of two values of the inputs is added to it.
    """

    def __init__(self, graph: Graph) -> None:
        self.data: set[Value] = set(graph.inputs)
        self.computed: set[Value] = set()
        self.scores: dict[Value, int] = {}
        for node in graph.nodes:
            inputs = [i for i in node.inputs if i is not None]
            if any(i in self.data for i in inputs):
                self.data.update(node.outputs)
            elif node.op in ("linear", "matmul", "layer_norm", "rms_norm") or any(i in self.computed for i in inputs):
                self.computed.update(node.outputs)
            if node.op == "matmul" and len(inputs) == 2 and not mixes_heads(node) and all(map(self.is_operand, inputs)):
                self.scores[node.output] = 2 if all(i in self.data for i in inputs) else 1
            elif multiplies(node):
                self.scores[node.output] = 2
            elif mixes_heads(node):
                self.scores[node.output] = max(map(self.strength, inputs))
            elif node.op == "concat":
                self.scores[node.output] = min(map(self.strength, inputs), default=0)
            elif (node.op in SCORE_OPS or rounds(node)) and (known := max((self.scores.get(i, 0) for i in inputs), default=0)):
                self.scores.update(dict.fromkeys(node.outputs, known))

    def is_operand(self, value: Value) -> bool:
        """Whether it can be a query, key or value: it comes from the inputs, or from a layer applied to learned constants."""
        return value in self.data or value in self.computed

    def strength(self, value: Value) -> int:
        """2: a product of two values of the inputs reaches it; 1: a product with learned ones; 0: none."""
        return self.scores.get(value, 0)
