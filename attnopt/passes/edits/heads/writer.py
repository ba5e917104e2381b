"""Write a block anew with other heads: its projections, what follows them up to the attention, the attention, the output projection.

    x -> q, k, v [B, L, H, D] -> attention -> o        ->        x -> q', k', v' [B, L, H', D'] -> attention' -> o'

Weights are the old ones through the maps of `HeadChanges`, computed in float64. What stands around the block stays: its norm, its residual,
masks and positions. A cache that comes and goes as [B, H, length, D] becomes one of the new heads, and past rows that a caller gives in
the old form are taken in (`Host.adapt`). Blocks that hold the same weights hold the same new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnopt.ir.block import Block, CacheUpdate, HeadNorm, Projection, Rotary, Scale
from attnopt.ir.graph import Node, Value
from attnopt.ir.layout import Operand
from attnopt.ir.site import Builder, Refusal, Site
from attnopt.passes.candidate import Group
from attnopt.passes.edits.caches.nodes import Nodes
from attnopt.passes.edits.heads.changes import HeadChanges, layer_of, past_of, slot_of
from attnopt.passes.edits.heads.head_map import HeadMap
from attnopt.passes.edits.heads.site import changed, heads_of, layout_of, regrouped
from attnopt.passes.norm_nodes import normalized
from attnopt.passes.rotary_nodes import turned, waves


def write(group: Group, changes: HeadChanges) -> Group:
    """Edits the host of the group in place; give it a copy, and finish it. Raises RuntimeError where a block cannot be changed."""
    writer = Writer(group, changes)
    for site, block in zip(group.sites, group.blocks, strict=True):
        writer.block(site, block)
    if writer.presents:
        group.host.split_outputs({old: [(word, new)] for old, (word, new) in writer.presents.items()})
    return group


@dataclass
class Writer:
    """weights: constants that were written, by side, for all blocks of the group. presents: caches that go out in another form."""

    group: Group
    changes: HeadChanges
    weights: dict[tuple[str, bool], list[Value]] = field(default_factory=dict)
    presents: dict[Value, tuple[str, Value]] = field(default_factory=dict)

    def block(self, site: Site, block: Block) -> None:
        host, changes = self.group.host, self.changes
        node = anchor(site)
        assert block.o is not None and self.group.attend is not None
        builder = host.builder(node)
        sides = [s for s in "qkv" if changes.side(s) is not None or block.packed]
        rows = self.rows(builder, block, sides)
        made = changed(site, changes)
        parts = {s: self.stream(builder, site, block, s, rows[s], node) for s in sides}
        old, new = heads_of(site), heads_of(made)

        def read(name: str) -> Operand:
            value = parts.get(name)
            return regrouped(getattr(site, name), old, new) if value is None else Operand(value, layout_of(made, name))

        made = replace(made, q=read("q"), k=read("k"), v=read("v"))
        heads = (*made.axes["g"], *made.axes["r"])
        lead = (block.o.input.shape or ())[:-1]
        rows_of = (made.axes["b"], made.axes["q"]) if len(lead) == 2 else ((*made.axes["b"], *made.axes["q"]),)
        layout = (*rows_of, (*heads, *made.axes["e"]))
        out = self.group.attend(replace(made, output=Operand(site.output.value, layout)), builder)
        end, with_bias = ending(block.o)
        host.replace(end, self.output(block.o, out, end, with_bias))

    # Projections.

    def rows(self, builder: Builder, block: Block, sides: Sequence[str]) -> dict[str, Value]:
        """What each side's layer makes of its input [.., H' * D']; one layer for all where they were one."""
        found: dict[str, Value] = {}
        if block.packed and len(sides) == 3:
            layers = [block.part(s, Projection) for s in sides]
            whole = self.product(builder, sides[0], layers[0], [self.new_rows(block, s) for s in sides])  # type: ignore[arg-type]
            n, start = Nodes(builder), 0
            for s in sides:
                size = self.width(block, s)
                found[s] = n.cut(whole, len(whole.shape or ()) - 1, start, start + size, size)
                start += size
            return found
        for s in sides:
            layer = block.part(s, Projection)
            assert layer is not None
            found[s] = self.product(builder, s, layer, [self.new_rows(block, s)])
        return found

    def new_rows(self, block: Block, side: str) -> tuple[Tensor, Tensor | None]:
        """(weight [H' * D', in], bias [H' * D']) of a side; for o [H' * E', out] and the whole bias."""
        layer, change = layer_of(block, side), self.changes.side(side)
        assert layer is not None
        rows, bias = layer.rows(), layer.bias_rows()
        if change is not None:
            rows = change.rows(rows)
            bias = bias if bias is None or layer.reads else change.bias(bias)
        return rows.flatten(0, 1), None if bias is None else bias.flatten()

    def width(self, block: Block, side: str) -> int:
        layer, change = block.part(side, Projection), self.changes.side(side)
        assert layer is not None
        return layer.channels.numel() if change is None else change.heads * change.width

    def product(self, builder: Builder, side: str, layer: Projection, parts: Sequence[tuple[Tensor, Tensor | None]]) -> Value:
        """A linear layer of the input that `layer` reads, in the form in which its host writes one."""
        x, dtype = layer.input, layer.weight.dtype
        linear = layer.node.op == "linear" and len(x.shape or ()) > 2
        if (side, linear) not in self.weights:
            weight = torch.cat([w for w, _ in parts])
            biases = [b for _, b in parts]
            held = [builder.constant((weight if linear else weight.mT.contiguous()).to(getattr(torch, dtype)), dtype)]
            if any(b is not None for b in biases):
                full = [torch.zeros(len(w), dtype=torch.float64) if b is None else b.double() for w, b in parts]
                held.append(builder.constant(torch.cat(full).to(getattr(torch, dtype)), dtype))
            self.weights[side, linear] = held
        return applied(builder, x, self.weights[side, linear], linear)

    def output(self, layer: Projection, x: Value, end: Value, with_bias: bool) -> Value:
        """The output projection on x [.., H' * E'], in the form of `end`."""
        builder, dtype = self.group.host.builder(layer.node), layer.weight.dtype
        linear = layer.node.op == "linear" and len(x.shape or ()) > 2
        if ("o", linear) not in self.weights:
            rows = layer.rows() if self.changes.o is None else self.changes.o.rows(layer.rows())
            weight = rows.flatten(0, 1)  # [H' * E', out]
            held = [builder.constant((weight.mT.contiguous() if linear else weight).to(getattr(torch, dtype)), dtype)]
            if with_bias and layer.bias is not None:
                held.append(layer.bias)
            self.weights["o", linear] = held
        return Nodes(builder).reshaped(applied(builder, x, self.weights["o", linear], linear), *(end.shape or ()))

    # From a projection to the attention.

    def stream(self, builder: Builder, site: Site, block: Block, side: str, made: Value, before: Node) -> Value:
        """[B, H', length, D'] as the attention reads it."""
        n, layer, change = Nodes(builder), block.part(side, Projection), self.changes.side(side)
        assert layer is not None
        heads, width = (change.heads, change.width) if change is not None else tuple(layer.channels.shape)
        lead = (layer.input.shape or ())[:-1]
        update = block.part(side, CacheUpdate)
        rows = site.size("q" if side == "q" else "k") if update is None else (update.new.shape or ())[update.axis]
        length = lead[1] if len(lead) == 2 else rows
        x = n.permuted(n.reshaped(made, site.size("b"), length, heads, width), 0, 2, 1, 3)
        late = side == "k" and self.changes.up is not None
        for step in block.streams[side][1:]:
            if isinstance(step, Scale):
                x = n.mul(x, step.factor)
            elif isinstance(step, HeadNorm):
                x = normalized(builder, step, x)
            elif isinstance(step, Rotary) and not late:
                cos, sin = waves(builder, self.group.host.graph, step, before, length if step.positions is None else None)
                x = turned(builder, step, x, cos, sin)
            elif isinstance(step, CacheUpdate):
                x = self.cached(builder, site, block, side, x, late)
        if late:
            x = self.lifted(builder, block, x, before)
        if self.changes.reads and side in "kv":
            index = builder.constant(torch.tensor(self.changes.reads), "int64")
            shape = ((x.shape or ())[0], len(self.changes.reads), *(x.shape or ())[2:])
            x = builder.emit("gather", x, index, shape=shape, dtype=x.dtype, axis=1)
        return x

    def cached(self, builder: Builder, site: Site, block: Block, side: str, new: Value, late: bool) -> Value:
        slot = slot_of(self.group, site, block, side)
        if slot is None or isinstance(slot, Refusal):
            raise RuntimeError(f"the cache of '{site.name}' cannot change: {slot}")
        n, shape = Nodes(builder), slot.past.shape or ()
        change = self.changes.side(side) or HeadMap.identity(slot.heads, slot.width)
        word = f"{change.heads}_{change.width}"
        made = past_of(change, block.part(side, Rotary), late)
        (past,) = self.group.host.split_input(
            slot.past, [(word, (shape[0], change.heads, shape[2], change.width), slot.past.dtype)], made
        )
        present = n.joined([past, n.cast(new, slot.past.dtype)], 2, (slot.present.shape or ())[2])
        self.presents[slot.present] = (word, present)
        return present

    def lifted(self, builder: Builder, block: Block, held: Value, before: Node) -> Value:
        """Keys [B, G, T, D] from what is kept of them [B, G, T, r]: times `up` of each head, then turned."""
        n, up = Nodes(builder), self.changes.up
        assert up is not None
        basis = builder.constant(up.mT[None].contiguous(), held.dtype)  # [1, G, r, D]
        x = n.matmul(held, basis)
        turn = block.part("k", Rotary)
        if turn is None:
            return x
        length = (x.shape or ())[2] if block.cache_k is not None or turn.positions is None else None
        cos, sin = waves(builder, self.group.host.graph, turn, before, length)
        return turned(builder, turn, x, cos, sin)


def anchor(site: Site) -> Node:
    """The node before which to write: the last of the attention that tells the same module, so that the new one has its name."""
    own = [n for n in site.nodes if n.source.module == site.source.module and any(v.handle is not None for v in n.outputs)]
    node = own[-1] if own and site.source.module else site.output.value.producer
    assert node is not None
    return node


def ending(layer: Projection) -> tuple[Value, bool]:
    """The first value of the host that holds what the layer gives, and whether the layer's bias is in it. Raises RuntimeError."""
    end, with_bias = layer.node.output, len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None
    while end.handle is None:
        user = end.users[0] if len(end.users) == 1 else None
        if user is None or user.op not in ("add", "reshape"):
            raise RuntimeError(f"'{layer.node.name}' has no value of its own in the model")
        with_bias, end = with_bias or user.op == "add", user.output
    return end, with_bias


def applied(builder: Builder, x: Value, held: Sequence[Value], linear: bool) -> Value:
    weight = held[0].shape or ()
    shape = (*(x.shape or ())[:-1], weight[0 if linear else 1])
    if linear:
        return builder.emit("linear", x, *held, shape=shape, dtype=x.dtype)
    made = builder.emit("matmul", x, held[0], shape=shape, dtype=x.dtype)
    return made if len(held) == 1 else builder.emit("add", made, held[1], shape=shape, dtype=x.dtype)
