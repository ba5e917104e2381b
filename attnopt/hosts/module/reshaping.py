"""An attention with other heads, read from its block and written into the modules of its layer.

q_proj [H D, in], o_proj [out, H D], num_key_value_groups 3     ->     q_proj [H' D, in], o_proj [out, H' D], num_key_value_groups 2
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from attnopt.hosts.module.changes import Change
from attnopt.ir.block import Block, Projection
from attnopt.ir.site import Refusal, Site

SIDES = ("q", "k", "v", "o")


def reshaped(path: str, old: tuple[Site, Block], new: tuple[Site, Block], model: nn.Module) -> list[Change] | Refusal:
    """The changes of one layer. path: of its attention module. Refusals where its projections are not modules of their own."""
    changes: list[Change] = []
    for side in SIDES:
        was, now = layer(old[1], side), layer(new[1], side)
        if was is None or now is None or was.down is not None or now.down is not None:
            return Refusal(f"the {side} projection of a layer with other heads was not read", path)
        if was.packed or was.channels.numel() != was.size[0 if was.reads else 1]:
            return Refusal(f"the {side} projection is part of a layer that holds more than it", path)
        owner = str(was.weight.handle.target).rpartition(".")[0] if was.weight.handle is not None else ""
        module = model.get_submodule(owner) if owner.startswith(path) else None
        if not isinstance(module, nn.Linear):
            return Refusal(f"the {side} projection is no linear layer of the attention module", path)
        rows = now.rows()  # [H', D, in], of o [H', D, out]
        matrix = rows.flatten(0, 1)
        changes.append(Change("constant", f"{owner}.weight", tensors={"": (matrix.mT if now.reads else matrix).contiguous()}))
        bias = now.bias_rows()
        if bias is not None and module.bias is not None:
            changes.append(Change("constant", f"{owner}.bias", tensors={"": bias.flatten().contiguous()}))
    h, g = (int(new[0].size(axis)) for axis in "hg")  # type: ignore[arg-type]
    if h % g:
        return Refusal(f"{h} query heads cannot share {g} key heads evenly, as a live layer lets them", path)
    counts = {"num_key_value_groups": h // g, "num_heads": h, "num_attention_heads": h, "num_key_value_heads": g}
    return [*changes, Change("heads", path, counts)]


def layer(block: Block, side: str) -> Projection | None:
    return block.o if side == "o" else block.part(side, Projection)


def paths_of(sites: Sequence[Site]) -> dict[str, str]:
    """The path of the attention module of each site, by its name."""
    return {s.name: s.source.module for s in sites}
