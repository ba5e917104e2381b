"""Scale the channels of what a layer reads exactly, in a linear layer that they come from.

    o = W_o concat_h(P_h V_g(h))      V_g -> V_g diag(1 / s_g),  W_o -> W_o diag(s)      s [key heads, width], shared by a group's queries

    y = W_down (act(g) * u)           u -> u / s,  W_down -> W_down diag(s)                  s [channels], u of a linear layer

Weights sum values channel by channel, so a factor of a channel passes through any mask, normaliser and padding. Query heads that share a
value head share its factors. s is powers of two: not a bit of the product changes, and rows of a layer that is rounded later have the same
codes, with other steps.

Source: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", which folds into norms only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.ir.block import Block, Projection
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.site import Host, Refusal, Site
from attnopt.passes.edits.layers.linear_layers import keeps_channels, source
from attnopt.passes.rotation import head_refusal

FAR = 32  # nodes between the layer and the attention, beyond which nothing is known of what stands there


def scaled_by_values(site: Site, block: Block, graph: Graph) -> Tensor | Refusal:
    """For each channel that the output projection reads, the output channel of the value layer that makes it, int64 [in]."""
    refusal = head_refusal(site, block)
    if refusal is not None:
        return refusal
    v, o = block.v, block.o
    assert v is not None and o is not None
    if v.node.op not in ("linear", "matmul") or (v.packed and not block.packed):
        return Refusal("the layer of values makes channels that are read elsewhere", site.name)
    if (read := read_elsewhere(site, block, v, o, graph)) is not None:
        return read
    repeats = len(o.channels) // len(v.channels)
    made = torch.empty(o.channels.numel(), dtype=torch.int64)
    made[o.channels.flatten()] = v.channels.repeat_interleave(repeats, 0).flatten()
    return made


def scaled_by_factor(layer: Node, graph: Graph) -> Node | Refusal:
    """The linear layer that makes one factor of the product that a layer reads, and makes it for that alone; channels are the same."""
    product = None if (read := source(layer)) is None else read.producer
    if product is None or product.op != "mul":
        return Refusal("what the layer reads is no product", layer)
    way = chain(layer.inputs[0], product)
    for factor in product.inputs:
        found = made_by_linear(factor)
        if found and way and all(n.output not in graph.outputs and len(n.output.users) == 1 for n in (*way, *found)):
            return found[0]
    return Refusal("no factor of the product is made by a linear layer for it alone", layer)


def made_by_linear(value: Value | None) -> list[Node]:
    """The linear layer behind a value, its bias, and what keeps its channels; nothing where something else stands there."""
    found: list[Node] = []
    while value is not None and value.producer is not None:
        node = value.producer
        found.append(node)
        if node.op in ("linear", "matmul"):
            weight = node.inputs[1]
            biased = [n for n in found if n.op == "add"]
            known = bias_of(node)
            fits = weight is not None and weight.is_constant and len(weight.shape or ()) == 2
            return found[::-1] if fits and biased == [n for n in (known or ())[:1] if n is not node] else []
        made = [i for i in node.inputs if i is not None and not i.is_constant]
        if (len(made) != 1 and not keeps_channels(node)) or (node.op != "add" and not keeps_channels(node)):
            return []
        value = made[0]
    return []


def read_elsewhere(site: Site, block: Block, v: Projection, o: Projection, graph: Graph) -> Refusal | None:
    """Why the values are not for this attention alone: all that is made of them ends in the output projection."""
    before, after = chain(site.v.value, v.node), chain(o.node.inputs[0], site.output.value.producer)
    if before is None or after is None:
        return Refusal("the way from the layer of values to the output projection is not known", site.name)
    own = {*site.nodes, *before, *after}
    others = above(site.q.value, v.node) | above(site.k.value, v.node) if block.packed else set()
    queue, seen = [v.node.output], set[Value]()
    while queue:
        value = queue.pop()
        readers = [user for user in value.users if user is not o.node and (user in own or user not in others)]
        if value in graph.outputs or any(user not in own for user in readers):
            return Refusal("values are read elsewhere", site.name)
        seen.add(value)
        queue += [made for user in readers for made in user.outputs if made not in seen]
    return None


def chain(value: Value | None, start: Node | None) -> list[Node] | None:
    """The nodes from `start` to the one that makes a value, along the one input that is computed; None where that is no chain."""
    found: list[Node] = []
    while value is not None and value.producer is not None and len(found) < FAR:
        node = value.producer
        found.append(node)
        if node is start:
            return found[::-1]
        made = [i for i in node.inputs if i is not None and not i.is_constant]
        if not made:
            return None
        value = made[0]
    return None


def above(value: Value, start: Node) -> set[Node]:
    """All nodes between a layer and a value."""
    found: set[Node] = set()
    queue = [value]
    while queue:
        node = queue.pop().producer
        if node is not None and node not in found and node is not start:
            found.add(node)
            queue += [i for i in node.inputs if i is not None]
    return found


def scale_values(host: Host, layer: Node, exponents: Sequence[int], bias: tuple[Node, Value] | None) -> None:
    """Divide the output channels of a layer, its bias too, by powers of two."""
    weight = layer.inputs[1]
    assert weight is not None and weight.load is not None
    held = weight.load()
    back = torch.ldexp(torch.ones(len(exponents), dtype=held.dtype), -torch.tensor(exponents))
    host.set_input(layer, weight, held * (back[:, None] if layer.op == "linear" else back))
    if bias is not None:
        reader, value = bias
        assert value.load is not None
        host.set_input(reader, value, value.load() * back.to(value.load().dtype))


def bias_of(layer: Node) -> tuple[Node, Value] | None:
    """The bias of a layer, and the node that reads it: the layer itself, or the addition after it."""
    if len(layer.inputs) > 2 and layer.inputs[2] is not None:
        return layer, layer.inputs[2]
    after = layer.output.users
    if len(after) == 1 and after[0].op == "add":
        held = [i for i in after[0].inputs if i is not None and i.is_constant and i.load is not None]
        return (after[0], held[0]) if held else None
    return None


def bias_is_known(v: Projection) -> bool:
    """Whether the bias that the block has is the one that is found behind the layer. Others may hold it too: they keep theirs."""
    found = bias_of(v.node)
    return found is None if v.bias is None else found is not None and found[1] is v.bias


def rows_of(exponents: Sequence[int], made: Tensor, rows: int) -> list[int]:
    """The exponent of each output channel of the value layer, from those of the channels that it becomes; 0 for others."""
    found = [0] * rows
    for i, row in enumerate(made.tolist()):
        found[row] = exponents[i]
    return found
