"""From the output of an attention down to the addition that ends the block.

attention -> permute -> reshape -> linear -> (norm) -> + x            + mlp(norm(x)) in parallel blocks
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnopt.ir.block import Norm, Projection, Residual
from attnopt.ir.graph import Node, Value
from attnopt.ir.layout import LayoutMismatch, Operand, size_of
from attnopt.ir.site import Refusal, Site
from attnopt.patterns.block.norms import PARTS, norm_after, sides
from attnopt.patterns.block.projection import Layer, by_head, is_bias, keeps_channels, product, root
from attnopt.patterns.block.terms import NotRead, Walk, whole

MOST_ADDITIONS = 3
MOST_NODES = 16


@dataclass
class OutputWalk:
    """Downward from a site's output, to its projection and on to the residual addition."""

    walk: Walk

    def projection(self, site: Site) -> tuple[Projection, Value] | Refusal:
        """The output projection, and the value that it makes (with its bias)."""
        try:
            return self.found(site.output, site)
        except NotRead as failure:
            return Refusal(f"output projection not found: {failure.reason}", failure.at)

    def found(self, operand: Operand, site: Site) -> tuple[Projection, Value]:
        heads, width = (*site.axes["g"], *site.axes["r"]), site.axes["e"]
        if not all(isinstance(axis.size, int) for axis in (*heads, *width)):
            raise NotRead("the number of heads or their width is not a number")
        count = int(size_of(heads))  # type: ignore[arg-type]
        term = whole(operand.value, operand.layout, (*heads, *width), count, int(size_of(width)))  # type: ignore[arg-type]
        for _ in range(MOST_NODES):
            node = only_user(term.value)
            if node.op in ("linear", "matmul") and node.inputs[0] is term.value:
                layer = product(node)
                if layer is None:
                    raise NotRead("the output is multiplied by another activation", node)
                numbers = self.walk.coordinate(term, len(term.layout) - 1)
                if numbers is None:
                    raise NotRead("heads are not channels of the layer that follows", node)
                layer, made = with_bias(layer, node.output)
                channels = by_head(numbers, count)
                return Projection(layer.weight, layer.bias, layer.transposed, node, layer.input, channels, reads=True), made
            if node.op == "cast":
                term = replace(term, value=node.output)
                continue
            if node.op not in ("permute", "reshape"):
                raise NotRead(f"'{node.attrs.get('operator', node.op)}' stands between the attention and a linear layer", node)
            try:
                term = replace(term, value=node.output, layout=self.walk.space.after(node, term.layout))
            except LayoutMismatch as mismatch:
                raise NotRead(str(mismatch), node) from None
        raise NotRead("no linear layer follows", term.node)


def only_user(value: Value) -> Node:
    if len(value.users) != 1:
        raise NotRead("nothing reads the output" if not value.users else "several nodes read the output", value.producer)
    return value.users[0]


def with_bias(layer: Layer, made: Value) -> tuple[Layer, Value]:
    """The addition of a constant vector that follows, as the bias of the layer."""
    while layer.bias is None and len(made.users) == 1:
        node = made.users[0]
        if node.op == "add":
            bias = next((other for main, other in sides(node) if main is made and other.is_constant), None)
            return (replace(layer, bias=bias), node.output) if bias is not None and is_bias(bias, node.output) else (layer, made)
        if node.op != "reshape" or not keeps_channels(node):
            break
        made = node.output
    return layer, made


def residual(made: Value, norm: Norm | None, hidden: Value) -> Residual | Refusal:
    """The addition of the block's own input: what its norm reads, or what its projections read."""
    inputs = {hidden} | ({root(norm.input)} if norm is not None else set())
    value, additions, o_norm, scaled = made, 0, None, False
    for _ in range(MOST_NODES):
        users = value.users
        node = users[0] if len(users) == 1 else None
        if node is not None and node.op == "add":
            other = next((o for main, o in sides(node) if main is value), None)
            if other is not None and root(other) in inputs:
                pre = norm is not None and root(other) is root(norm.input)
                ends = not pre and all(user.op in PARTS and user.op != "add" for user in node.output.users)
                after = norm_after(node.output) if ends else None
                return Residual(other, node, o_norm, after, additions > 0, scaled)
            additions += 1
            if other is not None and not other.is_constant and additions < MOST_ADDITIONS:
                value = node.output
                continue
        if node is not None and (node.op == "cast" or (node.op == "reshape" and keeps_channels(node))):
            value = node.output
            continue
        if node is not None and node.op == "mul" and any(m is value and o.is_constant for m, o in sides(node)):
            value, scaled = node.output, True
            continue
        if o_norm is None and not additions and (o_norm := norm_after(value)) is not None:
            value = o_norm.output
            continue
        break
    return Refusal("residual not found: the input of the block is not added to the output of its projection", value.producer)
