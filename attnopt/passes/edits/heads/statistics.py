"""Second moments of the heads of a block on calibration data: what bases, groups and weights of heads are found from.

    keys [H, H, D, D] = E k_i' k_j,  k = x W' + b    ->    W_i M W_j' + W_i m b_j' + b_i m' W_j' + b_i b_j'      M = E x' x, m = E x

Likewise values; queries [Hq, D, D] of each head with itself. All before rotation. Where there is a cache, the rows that the attention
reads are counted instead, past ones included, those of keys turned back. Without data inputs count as white: moments of the weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.analysis.operands import held, tapped
from attnopt.ir.block import Block, Projection, Rotary
from attnopt.ir.block_reference import turned
from attnopt.ir.site import NotIsolated, Refusal
from attnopt.passes.candidate import Evidence, Group


@dataclass(frozen=True, eq=False)
class HeadMoments:
    """Means over tokens, float64; of the group's blocks together."""

    queries: Tensor
    keys: Tensor
    values: Tensor

    @property
    def of_keys(self) -> Tensor:
        """[H, D, D] of each head with itself."""
        return self.keys.diagonal(dim1=0, dim2=1).permute(2, 0, 1)

    @property
    def of_values(self) -> Tensor:
        return self.values.diagonal(dim1=0, dim2=1).permute(2, 0, 1)


def moments(group: Group, evidence: Evidence) -> HeadMoments | Refusal:
    """What calibration saw of the heads; a refusal where what they are made from cannot be tapped."""
    found = []
    for at, block in enumerate(group.blocks):
        cached = block.cache_k is not None or block.cache_v is not None
        one = of_rows(group, at, evidence) if cached else of_inputs(block, evidence)
        if one is None:
            return Refusal("what its projections read cannot be tapped", group.sites[at].name)
        found.append(one)
    q, k, v = (torch.stack([one[i] for one in found]).mean(0) for i in range(3))
    return HeadMoments(q, k, v)


def of_weights(group: Group) -> HeadMoments:
    """As if inputs were white."""
    layers = [layer_of(group.blocks[0], s) for s in "qkv"]
    q, k, v = (crossed(layer, torch.eye(layer.rows().shape[-1], dtype=torch.float64), None) for layer in layers)
    return HeadMoments(own(q), k, v)


def layer_of(block: Block, side: str) -> Projection:
    layer = block.part(side, Projection)
    assert layer is not None
    return layer


def own(cross: Tensor) -> Tensor:
    return cross.diagonal(dim1=0, dim2=1).permute(2, 0, 1)


def of_inputs(block: Block, evidence: Evidence) -> list[Tensor] | None:
    made = []
    for side in "qkv":
        layer = layer_of(block, side)
        moment, channels = evidence.second_moment(layer.node), evidence.linear(layer.node)
        if moment is None or channels is None:
            return None
        made.append(crossed(layer, moment.double(), channels.input.mean.double()))
    return [own(made[0]), *made[1:]]


def crossed(layer: Projection, moment: Tensor, mean: Tensor | None) -> Tensor:
    """[H, H, D, D] of what a layer makes."""
    rows, bias = layer.rows().double(), layer.bias_rows()
    heads, width = rows.shape[:2]
    flat = rows.flatten(0, 1)
    whole = flat @ moment @ flat.mT
    if bias is not None and mean is not None:
        b, linear = bias.double().flatten(), flat @ mean
        whole = whole + torch.outer(linear, b) + torch.outer(b, linear) + torch.outer(b, b)
    return whole.reshape(heads, width, heads, width).permute(0, 2, 1, 3)


def of_rows(group: Group, at: int, evidence: Evidence) -> list[Tensor] | None:
    total: list[Tensor] | None = None
    count = 0
    try:
        for rows in cached_rows(group, at, evidence):
            made = [torch.einsum("hla,hlb->hab", rows[0], rows[0]), *(torch.einsum("ila,jlb->ijab", x, x) for x in rows[1:])]
            total = made if total is None else [a + b for a, b in zip(total, made, strict=True)]
            count += rows[1].shape[1]
    except NotIsolated:
        return None
    return None if total is None else [x / count for x in total]


def cached_rows(group: Group, at: int, evidence: Evidence) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v) [H, tokens, D] of each sequence before rotation."""
    site, block = group.sites[at], group.blocks[at]
    reads, turn = tapped(site), block.part("k", Rotary)
    for inputs, data in evidence.hold(reads):
        on = held(site, dict(zip(reads, data, strict=True)), group.host.graph.sizes(inputs))
        q, k, v = (x.float() for x in (on.q, on.k, on.v))
        if turn is not None:
            past = k.shape[2] - q.shape[2]
            q, k = (turned_back(turn, x, start) for x, start in ((q, past), (k, 0)))
        for i in range(len(k)):
            yield q[i].double(), k[i].double(), v[i].double()


def turned_back(turn: Rotary, x: Tensor, start: int) -> Tensor:
    """Rows [B, H, L, D] as they were before they were turned by their place."""
    positions = -torch.arange(start, start + x.shape[2])[None]
    return (turned(turn, x.transpose(1, 2), positions) / turn.scaling**2).transpose(1, 2)
