"""Move orthogonal matrices through a model: the outputs stay, and large values are spread over all channels before they are rounded.

    norm(x) * g -> W             ->   norm(x) -> (W diag(g) Q)              readers of the residual stream, gains folded into them
    x + W                        ->   x + (Q' W)        table -> table Q    its writers
    attention(v) -> o            ->   attention(v R) -> R' o                one R for each key/value head, within a head's channels

A norm by root mean square asks only how long a row is, and Q changes no length. Everything is computed in float64 from the weights as
they are and a seed, so that it need not be kept.
Sources: "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"; "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs".
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.ir.block import Block, CacheUpdate, Projection
from attnopt.ir.graph import Node, Value
from attnopt.ir.residual_stream import ResidualStream
from attnopt.ir.site import Host, Refusal, Site
from attnopt.passes.candidate import Group
from attnopt.passes.edits.layers.linear_layers import matrix
from attnopt.rounding.hadamard import in_blocks, rotation


@dataclass
class Rotated:
    """What the model holds afterwards, in float64.

    matrices [out, in] of linear layers. rows: biases, tables and gains of norms, by the node and the value that it reads.
    inputs: T [in, in] of layers whose input x becomes x T. mixed: blocks of layers whose input is mixed at run time, after T.
    stream: whether the residual stream was rotated. refusals: what was not.
    """

    matrices: dict[Node, Tensor] = field(default_factory=dict)
    rows: dict[tuple[Node, Value], Tensor] = field(default_factory=dict)
    inputs: dict[Node, Tensor] = field(default_factory=dict)
    mixed: dict[Node, int] = field(default_factory=dict)
    stream: bool = False
    refusals: list[Refusal] = field(default_factory=list)

    def matrix(self, node: Node) -> Tensor:
        """The weight of a layer as it is by now, [out, in]; to be changed in place."""
        if node not in self.matrices:
            self.matrices[node] = matrix(node).to(torch.float64, copy=True)
        return self.matrices[node]

    def row(self, node: Node, value: Value) -> Tensor:
        if (node, value) not in self.rows:
            assert value.load is not None
            self.rows[node, value] = value.load().to(torch.float64, copy=True)
        return self.rows[node, value]

    def moment(self, node: Node, seen: Tensor) -> Tensor:
        """The second moment of what a layer reads afterwards, from that of what it read before."""
        turned, block = self.inputs.get(node), self.mixed.get(node)
        made = seen if turned is None else turned.T @ seen.double() @ turned
        return made if block is None else in_blocks(in_blocks(made.double(), block).T, block)

    def mix(self, node: Node, block: int) -> None:
        """Let a layer read its input in a Hadamard basis, which `mixed_inputs` computes."""
        self.matrices[node] = in_blocks(self.matrix(node), block)
        self.mixed[node] = block

    def write(self, host: Host, but: frozenset[str] = frozenset()) -> None:
        """Store all of it in a host with these nodes, but for the matrices of some layers, which are stored otherwise."""
        for (node, value), data in self.rows.items():
            host.set_input(node, value, data.to(dtype_of(value)))
        for node, data in self.matrices.items():
            weight = node.inputs[1]
            if node.name not in but and weight is not None:
                held = data if node.op == "linear" else data.T
                host.set_input(node, weight, held.to(dtype_of(weight)).contiguous())

    def in_copy(self, host: Host, copy: Host) -> Rotated:
        """The same of the nodes of a copy, which stand in its graph where those of the host stand."""
        twins = dict(zip(host.graph.nodes, copy.graph.nodes, strict=True))

        def twin(node: Node, value: Value) -> tuple[Node, Value]:
            at = next(i for i, read in enumerate(node.inputs) if read is value)
            held = twins[node].inputs[at]
            assert held is not None
            return twins[node], held

        rows = {twin(node, value): data for (node, value), data in self.rows.items()}
        return Rotated({twins[n]: data for n, data in self.matrices.items()}, rows, stream=self.stream)


def dtype_of(value: Value) -> torch.dtype:
    return getattr(torch, value.dtype)  # type: ignore[no-any-return]


def rotated(group: Group, seed: int = 0, heads: bool = True) -> Rotated:
    """The whole model, group.stream and all: what can be rotated is, the rest is in `refusals`."""
    made = Rotated()
    refused = group.stream.refuses_rotation() if isinstance(group.stream, ResidualStream) else group.stream
    if isinstance(group.stream, ResidualStream) and refused is None:
        turn_stream(made, group.stream, rotation(group.stream.width, seed))
    elif refused is not None:
        made.refusals.append(refused)
    for site, block in zip(group.sites, group.blocks, strict=True) if heads else ():
        refusal = head_refusal(site, block)
        if refusal is None:
            assert block.v is not None and block.o is not None
            turn_heads(made, block.v, block.o, rotation(block.v.channels.shape[1], seed))
        else:
            made.refusals.append(refusal)
    return made


def turns(group: Group, heads: bool = True) -> tuple[bool, bool]:
    """Whether the residual stream of a model can be rotated, and whether values of any attention can; nothing is computed."""
    values = heads and any(head_refusal(s, b) is None for s, b in zip(group.sites, group.blocks, strict=True))
    return isinstance(group.stream, ResidualStream) and group.stream.refuses_rotation() is None, values


def turn_stream(made: Rotated, stream: ResidualStream, q: Tensor) -> None:
    made.stream = True
    for reader in stream.readers:
        norm = reader.norm
        gain = norm.gain()
        g = torch.ones(stream.width, dtype=torch.float64) if gain is None else gain.double()
        if reader.gain is not None and norm.weight is not None and norm.weight.load is not None:
            made.rows[reader.gain, norm.weight] = torch.full_like(norm.weight.load().double(), 1.0 - norm.shift)
        back = torch.where(g.abs() > 1e-8 * g.abs().max(), 1.0 / g, torch.zeros_like(g))
        for node in reader.layers:
            made.matrices[node] = made.matrix(node) * g @ q
            made.inputs[node] = back[:, None] * q
    for writer in stream.writers:
        made.matrices[writer.node] = q.T @ made.matrix(writer.node)
        if writer.bias is not None:
            made.rows[writer.bias] = made.row(*writer.bias) @ q
    for table in stream.tables:
        made.rows[table.node, table.value] = made.row(table.node, table.value) @ q


def head_refusal(site: Site, block: Block, cached: bool = False) -> Refusal | None:
    """Why no matrix can be moved through the values of an attention; None where one can.

    cached: whether a cache of values may stand between, which holds them as the matrix makes them.
    """
    v, o = block.v, block.o
    between = [s for s in block.streams.get("v", ()) if not (cached and isinstance(s, CacheUpdate))]
    if v is None or o is None or len(between) != 1:
        return Refusal("something stands between the layer that makes values and the attention", site.name)
    if v.down is not None or o.down is not None or site.spec.gate is not None or site.weights_used is not None:
        return Refusal("values are made of latents, or the output is gated", site.name)
    if block.residual is not None and block.residual.o_norm is not None:
        return Refusal("the output of the attention is normalised", site.name)
    if o.packed or o.for_all_heads or v.for_all_heads or len(o.channels) % len(v.channels) or v.shared or o.shared:
        return Refusal("the layers of values and output share channels or weights", site.name)
    return None


def turn_heads(made: Rotated, v: Projection, o: Projection, r: Tensor) -> None:
    """v [heads, D] times r for each head, the columns of o for the query heads that read it times r too."""
    turn_outputs(made, v, r)
    width = len(o.channels.flatten())
    weight, turned = made.matrix(o.node), torch.zeros(width, width, dtype=torch.float64)
    for channels in o.channels:
        weight[:, channels] = weight[:, channels] @ r
        turned[channels[:, None], channels[None]] = r
    before = made.inputs.get(o.node)
    made.inputs[o.node] = turned if before is None else before @ turned


def turn_outputs(made: Rotated, layer: Projection, r: Tensor) -> None:
    """What a layer makes [heads, D] times r for each head."""
    weight = made.matrix(layer.node)
    for channels in layer.channels:
        weight[channels] = r.T @ weight[channels]
        if layer.bias is not None:
            held = made.row(bias_reader(layer), layer.bias)
            held.view(-1)[channels] = held.reshape(-1)[channels] @ r


def bias_reader(layer: Projection) -> Node:
    """The node that adds the bias: the layer's own, or the addition after it."""
    assert layer.bias is not None
    return next((n for n in layer.bias.users if n is layer.node), layer.bias.users[0])
