"""Fold the gain (and bias) of a norm into the linear layers that read it.

    y = (n * g + c) W' + b        ->        y = n (W diag(g))' + (b + W c)          n the row, normalised; g, c [in]; W [out, in]

A multiplication over all rows less, and an addition where there is one. Nothing but the layers may read the norm. Where norm and gain are
one operation the gain costs nothing of its own, and stays.

Source: the fold that "On the Expressivity Role of LayerNorm in Transformers' Attention" ends in, known from SmoothQuant.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.block import Norm
from attnopt.ir.graph import Node, Value
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.constant_values import fixed
from attnopt.passes.edits.layers.ends import LayerEnds, ends_of
from attnopt.passes.edits.layers.linear_layers import matrix, read_by_all
from attnopt.passes.edits.layers.writer import as_wide, set_bias, set_matrix


@dataclass(frozen=True)
class FoldNormGain:
    """Fold the gain (and bias) of a norm into the linear layers that read it."""

    name: str = "fold-norm-gain"
    exact: bool = True
    per: Per = "linear"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        if group.norm is None:
            return Refusal("the layers read no norm, or several", group.name)
        bare = without_gain(group.norm)
        if isinstance(bare, Refusal):
            return bare
        if not read_by_all(group.norm.output, group.linears, group.host.graph):
            return Refusal("something beside these layers reads the norm", group.norm.output.producer)
        if (unfit := next((r for n in group.linears if (r := refuses(n)) is not None), None)) is not None:
            return unfit
        nodes = f"the linear layer{'s' * (len(group.linears) > 1)} after it"
        return [
            Candidate(
                self.name,
                True,
                f"the gain of a norm folded into {nodes}",
                "On the Expressivity Role of LayerNorm",
                nodes=group.linears,
                kind="folded",
                changes=("weights",),
            )
        ]

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        norm = group.norm
        bare = Refusal("it reads no norm") if norm is None else without_gain(norm)
        if isinstance(bare, Refusal) or norm is None:
            raise RuntimeError(f"the gain of '{group.name}' cannot be folded: {bare}")
        gain, offset = norm.gain(), norm.offset()
        for node in group.linears:
            layer = ends_of(node)
            assert isinstance(layer, LayerEnds) and gain is not None
            w = as_wide(matrix(node))
            if offset is None:
                set_matrix(group.host, layer, w * as_wide(gain))
            else:
                held = 0.0 if layer.bias is None or layer.bias.load is None else as_wide(layer.bias.load().reshape(-1))
                set_bias(group.host, layer, held + w @ as_wide(offset), w * as_wide(gain))
        group.host.replace(norm.output, bare)
        return group


def without_gain(norm: Norm) -> Value | Refusal:
    """The row as it is before gain and bias."""
    if norm.weight is None or norm.weight.load is None:
        return Refusal("the norm has no gain that is constant", norm.output.producer)
    value = norm.output
    for op, constant in (("add", norm.bias), ("mul", norm.weight)):
        if constant is None:
            continue
        node = value.producer
        if node is None or node.op != op:
            return Refusal("the norm is one operation, whose gain costs nothing of its own", node)
        made = [v for v in node.inputs[:2] if v is not None and not fixed(v)]
        if len(made) != 1 or (made[0].shape, made[0].dtype) != (value.shape, value.dtype):
            return Refusal("the norm is not multiplied by its gain alone", node)
        value = made[0]
    return (
        value if value.handle is not None else Refusal("the row before the gain is no value of the model", norm.output.producer)
    )


def refuses(node: Node) -> Refusal | None:
    """Why a layer takes no factors: they would make a copy of a weight that others read."""
    weight = node.inputs[1]
    if weight is not None and len(weight.users) > 1:
        return Refusal("another operation reads the weight of a layer after the norm, which would be stored twice", node)
    found = ends_of(node)
    return found if isinstance(found, Refusal) else None
