"""Two facts about every value of a graph, each computed in one pass: does data reach it, and does a product of data?

Attention multiplies data by data. A weight, a position table or an arange multiplied by data is a projection or a bias.
"""

from __future__ import annotations

from attnopt.ir.graph import LAYOUT, Graph, Value

# A score may pass through these and is still a score.
SCORE_OPS = {*LAYOUT, "cast", "add", "sub", "mul", "div", "where", "neg", "tanh", "maximum", "minimum"}


class Activations:
    """`value in data`: it depends on a float computed from the inputs. `is_score`: a product of two such reaches it."""

    def __init__(self, graph: Graph) -> None:
        self.data: set[Value] = {v for v in graph.inputs}
        self.scores: set[Value] = set()
        for node in graph.nodes:
            inputs = [i for i in node.inputs if i is not None]
            if any(i in self.data for i in inputs):
                self.data.update(node.outputs)
            if node.op == "matmul" and all(i in self.data for i in inputs):
                self.scores.add(node.output)
            elif node.op in SCORE_OPS and any(i in self.scores for i in inputs):
                self.scores.update(node.outputs)

    def is_score(self, value: Value) -> bool:
        return value in self.scores
