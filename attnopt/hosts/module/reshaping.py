"""An attention with other heads, read from its block and written into the modules of its layer.

    q_proj [H D, in], o_proj [out, H D], num_key_value_groups 3     ->     q_proj [H' D, in], o_proj [out, H' D], num_key_value_groups 2
    v_proj [G D, in], o_proj [out, H D], cache [B, G, T, D]         ->     v_proj [G E, in], o_proj [out, H E], cache [B, G, T, E]

Heads of another number go where each projection is a layer of its own. One layer that makes queries, keys and values has as many of each,
and its attention must cut them apart by head (GPT-NeoX), or by a size that it keeps (GPT-2): others cut by the sizes of their class.
Narrower heads go there too (`widths` says how). Where a rotation stands between, keys are narrow in the cache alone, as the graph lifts
and turns them (`lifting`); where a norm of each head does, they are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnopt.hosts.module.changes import Change
from attnopt.hosts.module.lifting import UP
from attnopt.hosts.module.widths import takes_cache
from attnopt.ir.block import Block, HeadNorm, Lift, Projection, Rotary
from attnopt.ir.site import Refusal, Site

SIDES = ("q", "k", "v", "o")
LINEAR = ("Linear", "Conv1D")
SPLIT = "split_size"  # of an attention: the channels of queries, of keys and of values in the one layer that makes them


@dataclass(frozen=True, eq=False)
class Side:
    """A projection as it was and as it is now."""

    name: str
    was: Projection
    now: Projection

    @property
    def changed(self) -> bool:
        return self.was.weight.handle is None or str(self.was.weight.handle.target) != str(
            getattr(self.now.weight.handle, "target", "")
        )


def reshaped(path: str, old: tuple[Site, Block], new: tuple[Site, Block], model: nn.Module) -> list[Change] | Refusal:
    """The changes of one layer. path: of its attention module. Refusals where its projections are not modules of their own."""
    owners: dict[str, list[Side]] = {}
    for name in SIDES:
        was, now = layer(old[1], name), layer(new[1], name)
        if was is None or now is None or was.down is not None or now.down is not None:
            return Refusal(f"the {name} projection of a layer with other heads was not read", path)
        owner = str(was.weight.handle.target).rpartition(".")[0] if was.weight.handle is not None else ""
        owners.setdefault(owner, []).append(Side(name, was, now))
    changes: list[Change] = []
    split = getattr(model.get_submodule(path), SPLIT, None) if path else None
    for owner, sides in owners.items():
        module = model.get_submodule(owner) if owner.startswith(path) else None
        if type(module).__name__ not in LINEAR:
            return Refusal(f"the {sides[0].name} projection is no linear layer of the attention module", path)
        found = projected(owner, sides, module, path, split) if any(side.changed for side in sides) else []  # type: ignore[arg-type]
        if isinstance(found, Refusal):
            return found
        changes += found
    for found in (counted(path, old[0], new[0], split), widened(path, old, new, model)):
        if isinstance(found, Refusal):
            return found
        changes += found
    return changes


def projected(owner: str, sides: Sequence[Side], module: nn.Module, path: str, split: int | None) -> list[Change] | Refusal:
    """One layer of the attention, which makes these sides or reads its output. split: see `places`."""
    first = sides[0]
    if sum(s.was.channels.numel() for s in sides) != first.was.size[0 if first.was.reads else 1]:
        return Refusal(f"the {first.name} projection is part of a layer that holds more than it", path)
    plain = isinstance(module, nn.Linear)
    rows = torch.cat([s.now.rows().flatten(0, 1) for s in sides])  # [n, in], of o [n, out]
    if first.was.reads:
        bias = first.now.bias_rows()
        return stored(owner, rows.mT.contiguous(), bias, None, plain)
    source = placed(sides, split)
    if source is None:
        return Refusal(f"a layer that makes {', '.join(s.name for s in sides)} cuts them apart by the sizes of its class", path)
    biases = [s.now.bias_rows() for s in sides]
    bias = None if biases[0] is None else torch.cat([b.flatten() for b in biases if b is not None])
    if bool((source < len(rows)).all()):
        rows, bias, source = rows[source], None if bias is None else bias[source], None
    return stored(owner, rows.contiguous(), bias, source, plain)


def placed(sides: Sequence[Side], split: int | None = None) -> Tensor | None:
    """Which row of all sides, one below the other, each channel of the layer gives; their number where it gives zero.

    None where heads of another number have no place, see `places`.
    """
    found = places(sides, split)
    if found is None:
        return None
    whole = sum(at.numel() for at in found)
    made, start = torch.full((whole,), sum(s.now.channels.numel() for s in sides)), 0
    for side, at in zip(sides, found, strict=True):
        heads, width = side.now.channels.shape
        made[at[:, :width]] = start + torch.arange(heads * width).view(heads, width)
        start += heads * width
    return made


def places(sides: Sequence[Side], split: int | None) -> list[Tensor] | None:
    """The channel of the layer where its attention looks for each channel of each head, [H', D] of each side.

    split: how many channels of a side the attention cuts off at once, by a number that it keeps. None where heads of another number
    would have to stand in a layer that is cut by the sizes of a class.
    """
    was, counts = [s.was.channels for s in sides], [len(s.now.channels) for s in sides]
    if counts == [len(at) for at in was]:
        return was
    (heads, *others), (n, width), several = counts, was[0].shape, len(sides)
    if any(count != heads for count in others) or any(at.shape != (n, width) for at in was):
        return None
    rank = [sorted(int(at[0, 0]) for at in was).index(int(at[0, 0])) for at in was]

    def behind(count: int, at: int) -> Tensor:
        """One side behind the other."""
        return at * count * width + torch.arange(count * width).view(count, width)

    def by_head(count: int, at: int) -> Tensor:
        """All sides of a head, then those of the next."""
        return (torch.arange(count) * several * width)[:, None] + at * width + torch.arange(width)

    kinds = [*([behind] if several == 1 or split == n * width else []), by_head]
    fits = (made for made in kinds if several == 1 or all(torch.equal(made(n, r), at) for r, at in zip(rank, was, strict=True)))
    kind = next(fits, None)
    return None if kind is None else [kind(heads, r) for r in rank]


def stored(owner: str, weight: Tensor, bias: Tensor | None, source: Tensor | None, plain: bool) -> list[Change]:
    """plain: the module is a torch Linear, which holds a weight of any size."""
    if source is None and plain:
        held = {"weight": weight, "bias": bias}
        return [Change("constant", f"{owner}.{name}", tensors={"": x}) for name, x in held.items() if x is not None]
    tensors = {"weight": weight, "bias": bias, "source": source}
    return [Change("narrow", owner, tensors={name: x for name, x in tensors.items() if x is not None})]


def counted(path: str, old: Site, new: Site, split: int | None = None) -> list[Change] | Refusal:
    """Numbers of heads, where they change, and the size that a layer of several sides is cut by."""
    if all(old.size(axis) == new.size(axis) for axis in "hg"):
        return []
    h, g, was, width = (int(s.size(axis)) for s, axis in ((new, "h"), (new, "g"), (old, "h"), (old, "d")))  # type: ignore[arg-type]
    if h % g:
        return Refusal(f"{h} query heads cannot share {g} key heads evenly, as a live layer lets them", path)
    counts = {"num_key_value_groups": h // g, "num_heads": h, "num_attention_heads": h, "num_key_value_heads": g}
    return [Change("heads", path, {**counts, **({SPLIT: h * width} if split == was * width else {})})]


def widened(path: str, old: tuple[Site, Block], new: tuple[Site, Block], model: nn.Module) -> list[Change] | Refusal:
    """Widths of heads, where they change."""
    (d, e), (keys, values) = ((int(s.size("d")), int(s.size("e"))) for s in (old[0], new[0]))  # type: ignore[arg-type]
    lift = new[1].part("k", Lift)
    if (d, e) == (keys, values) and lift is None:
        return []
    if (refusal := takes_cache(model, path)) is not None:
        return refusal
    if keys > d or values > e or d != e:
        return Refusal(
            f"heads of {d} and {e} channels cannot have {keys} and {values}: a live layer keeps narrower heads only", path
        )
    narrower = "qk" * (keys < d) + "k" * (lift is not None) + "v" * (values < e)
    steps = [step for side in narrower for step in old[1].streams.get(side, ())]
    if any(isinstance(step, HeadNorm) or (isinstance(step, Rotary) and lift is None) for step in steps):
        return Refusal(
            "a norm or a rotation of heads as wide as the class makes them stands between, and it is the layer's own", path
        )
    if lift is None:
        return [Change("widths", path, {"keys": keys, "values": values, "whole": d})]
    if (turn := old[1].part("k", Rotary)) is None:
        return Refusal("keys are lifted, and nothing turns them", path)
    up = lift.up()
    how = {"dims": turn.dims, "first": turn.first, "interleaved": turn.interleaved, "inv_freq": turn.inv_freq.tolist()}
    options = {"keys": up.shape[1], "values": values, "whole": d, "turn": {**how, "scaling": turn.scaling}}
    return [Change("widths", path, options, tensors={UP: up.contiguous()})]


def layer(block: Block, side: str) -> Projection | None:
    return block.o if side == "o" else block.part(side, Projection)
