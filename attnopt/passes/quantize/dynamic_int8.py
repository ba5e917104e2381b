"""Keep the weights of linear layers as int8 and quantise their inputs on the fly, smoothed where that helps.

    y = x W' + b   ->   y = (q(x / s) q(W s)') * s_x * s_w + b       s_w per output channel, s_x per call, weights symmetric

The runtime's own dynamic quantiser does it. A group is the layers that read one value (q, k and v; gate and up), or hold one weight.
With evidence a second candidate divides the input by powers of two first (`attnopt.passes.smoothing`). Where that input is a norm
that nobody else reads, 1 / s is folded into the norm; where it is the output of an attention, into the layer that makes its values; where
it is a product, into the layer that makes a factor (`attnopt.passes.value_scaling`); elsewhere it is one multiplication in front.
A table that is tied to a layer is looked up in the layer's codes (`attnopt.passes.tied_tables`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.block import Norm
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.layers.linear_layers import matrix, outputs, read_by_all, source, suits
from attnopt.passes.smoothing import best_smoothing, factors
from attnopt.passes.tied_tables import tied
from attnopt.passes.value_scaling import bias_is_known, bias_of, rows_of, scale_values, scaled_by_factor, scaled_by_values
from attnopt.rounding.rounded_weight import not_finite


@dataclass(frozen=True)
class DynamicInt8:
    """Keep the weights of linear layers as int8 and quantise their inputs on the fly, smoothed where that helps."""

    name: str = "dynamic-int8"
    exact: bool = False
    per: Per = "linear"
    smallest: int = 64  # a layer with fewer inputs or outputs gains nothing

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        layers = tuple(n for n in group.linears if self.suits(n))
        if not layers:
            return Refusal(f"no linear layer with constant weights of at least {self.smallest} x {self.smallest}", group.name)
        if (wrong := next((r for n in layers if (r := not_finite(matrix(n), n.name)) is not None), None)) is not None:
            return wrong
        names = "the linear layer" if len(layers) == 1 else f"the {len(layers)} linear layers"
        found, tie = tied(layers)
        tables = tuple(found)
        plain = self.candidate(layers, f"{names} in int8{tie}", "int8", {}, tables=tables)
        fold = group.norm is not None and folds(group.norm, layers, group.host.graph)
        made, values = (None, ()) if fold or evidence is None or len(group.linears) > 1 else layer_before(group)
        smooth = None if evidence is None else smoothing(layers, evidence, made)
        if smooth is None:
            return [plain]
        where = "folded into the norm" if fold else f"folded into {values[0].name}" if values else "one multiplication in front"
        said = f"{names} in int8, inputs smoothed (alpha {smooth.alpha:g}, {where}){tie}"
        options: dict[str, Any] = {"exponents": list(smooth.exponents), "fold": fold}
        if values and made is not None:
            options["values"] = {values[0].name: rows_of(smooth.exponents, made, outputs(values[0]))}
        return [plain, self.candidate(layers, said, "int8 smoothed", options, values, tables)]

    def candidate(
        self,
        layers: tuple[Node, ...],
        description: str,
        kind: str,
        options: dict[str, Any],
        scales: tuple[Node, ...] = (),
        tables: tuple[Node, ...] = (),
    ) -> Candidate:
        return Candidate(
            self.name,
            False,
            description,
            "SmoothQuant" if options else "dynamic quantisation",
            (*layers, *tables),
            options,
            kind,
            changes=("weights",),
            storage={n.name: "int8" for n in (*layers, *tables)},
            scales=scales,
            needs="calibration" if options else "nothing",
        )

    def layers(self, graph: Graph) -> tuple[Node, ...]:
        """The layers that may be int8, in graph order."""
        return tuple(n for n in graph.of("linear", "matmul") if self.suits(n))

    def suits(self, node: Node) -> bool:
        return suits(node, self.smallest)

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Changes the host of the group in place; give it a copy."""
        wanted = {n.name for n in candidate.nodes}
        nodes = [n for n in group.host.graph.of("linear", "matmul") if n.name in wanted]
        tables = [n for n in group.host.graph.of("gather") if n.name in wanted]
        if "exponents" not in candidate.options:
            group.host.quantize_linears([*nodes, *tables])
            return group
        s = factors(candidate.options["exponents"])
        inputs: dict[str, Value] = {}
        if candidate.options["fold"]:
            assert group.norm is not None
            fold(group, s)
        elif "values" in candidate.options:
            for name, exponents in candidate.options["values"].items():
                layer = next(n for n in group.host.graph.of("linear", "matmul") if n.name == name)
                scale_values(group.host, layer, exponents, bias_of(layer))
        else:
            inputs = divided(group, nodes, s)
        group.host.quantize_linears([*nodes, *tables], {n.name: s for n in nodes}, inputs)
        return group


def layer_before(group: Group) -> tuple[Tensor | None, tuple[Node, ...]]:
    """The layer that takes the factors, and which of its channels becomes which input of the group's; nothing where there is none.

    Of an attention in front the layer of its values, of a product in front that of a factor.
    """
    (layer,), found = group.linears, group.behind()
    if found is None:
        factor = scaled_by_factor(layer, group.host.graph)
        return (None, ()) if isinstance(factor, Refusal) else (torch.arange(outputs(factor)), (factor,))
    site, block = found
    made = scaled_by_values(site, block, group.host.graph)
    if isinstance(made, Refusal) or block.v is None or not bias_is_known(block.v):
        return None, ()
    return made, (block.v.node,)


def smoothing(layers: Sequence[Node], evidence: Evidence, tied: Tensor | None = None) -> Any:
    """The best smoothing of layers that read one value; None where that is not so, or calibration did not see it."""
    seen = evidence.linear(layers[0])
    weights = [matrix(n) for n in layers]
    if seen is None or any(len(w[0]) != len(seen.input.max_abs) for w in weights) or len({source(n) for n in layers}) != 1:
        return None
    return best_smoothing(weights, seen.input.max_abs, seen.input.mean_square, tied)


def folds(norm: Norm, layers: Sequence[Node], graph: Graph) -> bool:
    """Whether the norm can be scaled per channel: it has a weight of its own, and only these layers read its result."""
    weight = norm.weight
    own = [v for v in (weight, norm.bias) if v is not None]
    if weight is None or any(v.handle is None or v.load is None or len(v.users) != 1 for v in own):
        return False
    return read_by_all(norm.output, layers, graph)


def fold(group: Group, s: Tensor) -> None:
    """norm(x) * weight + bias   ->   norm(x) * (weight / s) + bias / s"""
    norm = group.norm
    assert norm is not None and norm.weight is not None
    gain, offset = norm.gain(), norm.offset()
    assert gain is not None
    changed = [(norm.weight, gain / s - norm.shift)] + ([(norm.bias, offset / s)] if norm.bias and offset is not None else [])
    for value, data in changed:
        group.host.set_constant(value, data.reshape(value.load().shape))  # type: ignore[misc]


def divided(group: Group, nodes: Sequence[Node], s: Tensor) -> dict[str, Value]:
    """x / s in front of the layers, by name; layers that read the same value share it."""
    made: dict[Value, Value] = {}
    for node in nodes:
        x = node.inputs[0]
        assert x is not None
        if x not in made:
            builder = group.host.builder(node)
            made[x] = builder.emit("mul", x, builder.constant(1.0 / s, x.dtype), shape=x.shape or (), dtype=x.dtype)
    return {n.name: made[n.inputs[0]] for n in nodes if n.inputs[0] is not None}
