"""A cache whose tokens are rounded a block at a time, as state of the graph of one decoding step.

    present = concat(past, new), attention(q, present, …)
        ->   recent = the last G tokens, exact; blocks = codes of all full blocks of the past
             attention(q, blocks, then the tokens of the block that is not full from `recent`)
             saliency = what each recent token was given so far;  where the step fills a block, its tokens join the blocks

G is the tokens of a block. The step that reads the last token of a block still sees all of it exactly. Every step computes the codes of
the last G tokens and drops them where no block is full: a graph of standard operators has no other way to sometimes do so.
Tokens of a block stand in the order of their saliency, so the attention must see all tokens alike: one new token a step, no mask but
`causal`, no term of positions. What the tokens were given is the weights of this attention, summed over query heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from attnopt.ir.at_end import beyond_softmax, reads_positions
from attnopt.ir.dims import Dim, product, symbol
from attnopt.ir.expr import Const
from attnopt.ir.graph import Value
from attnopt.ir.site import RECEIVED, Builder, Refusal, Site, arrange
from attnopt.passes.candidate import Group
from attnopt.passes.edits.caches.blocks import Blocks
from attnopt.passes.edits.caches.nodes import Nodes
from attnopt.passes.edits.caches.slots import Slot

UNLIKE = (
    "position",
    "selection",
    "weighting",
    "value_scale",
)  # what a spec may say that sees tokens otherwise than by their products


@dataclass(frozen=True, eq=False)
class Pair:
    """Keys and values of one attention, as `blocks` keeps them."""

    k: Slot
    v: Slot
    blocks: Blocks

    @property
    def site(self) -> Site:
        return self.k.site


def unfit(site: Site, k: Slot, v: Slot, blocks: Blocks) -> Refusal | None:
    """Why this attention cannot read its tokens in any order, or its rows cannot be packed."""
    spec = site.spec
    if (k.new.shape or ())[2:3] != (1,):
        return Refusal("blocks fill one token at a time, and this graph takes any number of new tokens", site.name)
    if reads_positions(spec):
        return Refusal(
            f"tokens in the order of their saliency need an attention that sees all of them, not {spec.mask}", site.name
        )
    if odd := beyond_softmax(spec, [slot for slot in spec.special if slot not in UNLIKE]):
        return Refusal(f"saliency is of a softmax of scaled products, and this attention has {odd}", site.name)
    reason = blocks.refusal(k.width) or blocks.refusal(v.width)
    return Refusal(reason, site.name) if reason else None


def scale_of(site: Site) -> float:
    found = 1.0
    for clause in site.spec.score:
        expr = clause.expr(0)
        assert isinstance(expr, Const)
        found *= float(expr.value)
    return found


def keep_blocks(group: Group, pairs: Sequence[Pair]) -> Group:
    """Edits the host of the group in place; give it a copy, and finish it."""
    host = group.host
    outputs: dict[Value, list[tuple[str, Value]]] = {}
    replaced: dict[Value, Value] = {}
    made: dict[str, Site] = {}
    for pair in pairs:
        blocks, past, recent, wholes = pair.blocks, {}, {}, {}
        for slot in (pair.k, pair.v):
            side = slot.side
            parts = blocks.parts(side, slot.past.shape or (), slot.past.dtype)
            taken = host.split_input(slot.past, parts, lambda x, side=side, blocks=blocks: blocks.packed(side, x))  # type: ignore[misc]
            past[side] = dict(zip(blocks.words(side), taken, strict=True))
            assert slot.present.producer is not None
            recent[side], wholes[side] = read(host.builder(slot.present.producer), slot, blocks, past[side])
        end = pair.site.output.value.producer
        assert end is not None
        given = received(host.builder(end), pair, wholes["k"], pair.k.present.shape[2])  # type: ignore[index]
        going = state(host.builder(end), pair, past, recent, given)
        made[pair.site.name] = in_blocks(pair, past, recent, given)
        for slot in (pair.k, pair.v):
            outputs[slot.present] = [(word, going[slot.side][word]) for word in blocks.words(slot.side)]
            replaced[slot.present] = wholes[slot.side]
    host.split_outputs(outputs)
    for old, new in replaced.items():
        host.replace(old, new)
    return replace(group, sites=tuple(made.get(site.name, site) for site in group.sites))


def in_blocks(
    pair: Pair, past: Mapping[str, Mapping[str, Value]], recent: Mapping[str, Mapping[str, Value]], given: Value
) -> Site:
    """The site on its blocks, for a kernel that reads them: all but saliency, and what the last tokens were given, which it says too."""
    codes: dict[str, Value] = {RECEIVED: given}
    for side, held in past.items():
        words = [word for word in pair.blocks.words(side) if word not in ("tokens", "saliency")]
        codes |= {f"{side}_{word}": recent[side].get(word, held[word]) for word in words}
    tokens = {side: recent[side]["tokens"] for side in past}
    return pair.site.on_codes(pair.blocks.clause_of_kernels, tokens, codes)


def read(builder: Builder, slot: Slot, blocks: Blocks, past: Mapping[str, Value]) -> tuple[dict[str, Value], Value]:
    """The tokens counted and the last G of them; and what the attention reads, [B, H, T, D]: full blocks of the past, then the rest."""
    n, length, size = Nodes(builder), slot.present.shape[2], blocks.block  # type: ignore[index]
    new = n.cast(slot.new, slot.past.dtype)
    tokens = n.joined([past["tokens"], n.cast(n.cut(new, 3, 0, 0, 0), "uint8")], 2, length)
    recent = n.cut(n.joined([past["recent"], new], 2, size + 1), 2, 1, None, size)
    filled = blocks.count(slot.past.shape[2])  # type: ignore[index]
    held = blocks.read(n, slot.side, past, filled)
    both = n.joined([*held, n.cast(recent, "float32")], 2, symbol(f"{product((filled, size))} + {size}"))
    place, total = n.places(length), n.size(length)
    full = n.mul(n.binary("floordiv", n.sub(total, 1), size), size)  # tokens in full blocks
    since = n.add(n.sub(place, n.sub(total, size)), full)
    whole = n.cast(n.taken(both, n.where(n.binary("lt", place, full), place, since), 2), slot.present.dtype)
    return {"tokens": tokens, "recent": recent}, whole


def state(
    builder: Builder, pair: Pair, past: Mapping[str, Mapping[str, Value]], kept: Mapping[str, Mapping[str, Value]], given: Value
) -> dict[str, dict[str, Value]]:
    """What goes out of both sides, by word. given: what the last tokens received."""
    n, blocks, length = Nodes(builder), pair.blocks, pair.k.present.shape[2]  # type: ignore[index]
    saliency = n.add(moved(n, past["k"]["saliency"]), given)
    order, found = by_rank(n, saliency), filled_blocks(n, blocks, length)
    made: dict[str, dict[str, Value]] = {"k": {**kept["k"], "saliency": saliency}, "v": dict(kept["v"])}
    for side, state_of in made.items():
        rows = n.matmul(order, n.cast(kept[side]["recent"], "float32"))
        words = [word for word in blocks.words(side) if word not in state_of]
        for word, new in zip(words, blocks.write(n, side, rows), strict=True):
            state_of[word] = joined(n, past[side][word], new, found)
    return made


def moved(n: Nodes, saliency: Value) -> Value:
    """[B, H, G, 1] a place on, for the token that came; it was given nothing yet."""
    size = (saliency.shape or ())[2]
    assert isinstance(size, int)
    return n.joined([n.cut(saliency, 2, 1, None, size - 1), n.mul(n.cut(saliency, 2, 0, 1, 1), 0.0)], 2, size)


def received(builder: Builder, pair: Pair, keys: Value, length: Dim) -> Value:
    """What the new token's queries gave each of the last G tokens, [B, H, G, 1]; 0 for places that no token has reached."""
    n, site, size = Nodes(builder), pair.site, pair.blocks.block
    axes = site.axes
    q = n.cast(arrange(builder, site.q, [axes["b"], axes["g"], (*axes["r"], *axes["q"]), axes["d"]]), "float32")
    scores = n.mul(n.matmul(q, n.permuted(n.cast(keys, "float32"), 0, 1, 3, 2)), scale_of(site))
    weights = builder.emit("softmax", scores, shape=scores.shape or (), dtype="float32", axis=3)
    total = n.reduced("sum", weights, 2)  # [B, H, 1, T]
    place = n.add(n.sub(n.builder.constant(torch.arange(size), "int64"), size), n.size(length))
    last = n.taken(total, n.binary("maximum", place, 0), 3)
    there = n.cast(n.binary("ge", place, 0), "float32")
    return n.permuted(n.mul(last, n.reshaped(there, 1, 1, 1, size)), 0, 1, 3, 2)


def by_rank(n: Nodes, saliency: Value) -> Value:
    """The permutation [B, H, G, G] that brings the tokens of a full block into the order of their normalised saliency.

    A token that came i tokens after the first of its block could be seen by G - i queries of the block.
    """
    size = (saliency.shape or ())[2]
    assert isinstance(size, int)
    place = torch.arange(size)
    share = n.div(saliency, n.builder.constant((size - place).float()[None, None, :, None], "float32"))
    others = n.permuted(share, 0, 1, 3, 2)  # [B, H, 1, G]
    earlier = n.builder.constant(place < place[:, None], "bool")
    ahead = n.binary("or", n.binary("lt", share, others), n.binary("and", n.binary("eq", share, others), earlier))
    rank = n.permuted(n.reduced("sum", n.cast(ahead, "float32")), 0, 1, 3, 2)  # [B, H, 1, G]
    return n.cast(n.binary("eq", n.builder.constant(place.float()[:, None], "float32"), rank), "float32")


def filled_blocks(n: Nodes, blocks: Blocks, length: Dim) -> Value:
    """0, 1, 2, …, as many as T tokens fill blocks: int64 [T // G]. Every G-th of T + 1 places, but for the first."""
    more = n.joined([n.places(length), n.builder.constant(torch.tensor([0]), "int64")], 0, symbol(f"{length} + 1"))
    filled = blocks.count(length)
    every = n.cut(
        more, 0, 0, None, symbol(f"{filled} + 1"), blocks.block
    )  # 0, G, 2 G, …; the last may be the place that was added
    every = n.cut(every, 0, 0, -1, filled)
    return n.binary("floordiv", every, blocks.block)


def joined(n: Nodes, old: Value, new: Value, found: Value) -> Value:
    """Rows of the past blocks and those of the last G tokens, of which the full blocks stay."""
    rows = (new.shape or ())[2]
    assert isinstance(rows, int)
    (filled,) = found.shape or ()
    index = n.add(n.reshaped(n.mul(found, rows), filled, 1), n.builder.constant(torch.arange(rows)[None], "int64"))
    both = n.joined([old, new], 2, symbol(f"{(old.shape or ())[2]} + {rows}"))
    return n.taken(both, n.reshaped(index, product((filled, rows))), 2)
