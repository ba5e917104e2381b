"""Second moments of the heads of a block on calibration data: what bases, groups and weights of heads are found from.

    keys [H, H, D, D]      sum over tokens of  k_i' k_j       likewise values; queries [Hq, D, D] of each with itself

From what the projections read where there is no cache; from what the attention reads where there is one, past rows included, those of
keys turned back. Rows of padding do not count. Without data the inputs count as white: moments of the weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.analysis.operands import held, tapped
from attnopt.analysis.padding import Padding
from attnopt.ir.block import Projection, Rotary
from attnopt.ir.block_reference import projected, turned
from attnopt.ir.site import NotIsolated
from attnopt.passes.candidate import Evidence, Group


@dataclass(frozen=True, eq=False)
class HeadMoments:
    """Sums over tokens, float64. tokens: how many; 0 where these are moments of the weights alone."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    tokens: int

    @property
    def of_keys(self) -> Tensor:
        """[H, D, D] of each head with itself."""
        return self.keys.diagonal(dim1=0, dim2=1).permute(2, 0, 1)

    @property
    def of_values(self) -> Tensor:
        return self.values.diagonal(dim1=0, dim2=1).permute(2, 0, 1)


def moments(group: Group, evidence: Evidence | None) -> HeadMoments:
    """Of the queries, keys and values before rotation, all blocks of the group together."""
    total: list[Tensor] | None = None
    tokens = 0
    for rows in head_rows(group, evidence):
        q, k, v = rows
        made = [torch.einsum("hla,hlb->hab", q, q), crossed(k), crossed(v)]
        total = made if total is None else [a + b for a, b in zip(total, made, strict=True)]
        tokens += k.shape[1]
    if total is None:
        total = list(of_weights(group))
    return HeadMoments(total[0], total[1], total[2], tokens)


def crossed(x: Tensor) -> Tensor:
    """x [H, L, D] -> [H, H, D, D]."""
    return torch.einsum("ila,jlb->ijab", x, x)


def of_weights(group: Group) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (group.blocks[0].projections(s)[0].rows().double() for s in "qkv")
    return torch.einsum("hai,hbi->hab", q, q), *(torch.einsum("iax,jbx->ijab", w, w) for w in (k, v))  # type: ignore[return-value]


def head_rows(group: Group, evidence: Evidence | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v) [H, tokens, D] of each sequence before rotation, float64; nothing where nothing can be tapped."""
    for at in range(len(group.sites)) if evidence is not None else ():
        try:
            yield from rows_of(group, at, evidence)  # type: ignore[arg-type]
        except NotIsolated:
            return


def rows_of(group: Group, at: int, evidence: Evidence) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    _site, block = group.sites[at], group.blocks[at]
    if block.cache_k is not None or block.cache_v is not None:
        yield from cached_rows(group, at, evidence)
        return
    layers = [block.part(s, Projection) for s in "qkv"]
    reads = list(dict.fromkeys(layer.input for layer in layers if layer is not None))
    padding = Padding.of(group.host.graph)
    for inputs, data in evidence.hold(reads):
        seen = dict(zip(reads, data, strict=True))
        made = [projected(layer, seen[layer.input].float()) for layer in layers if layer is not None]
        real = padding.leading(layers[1].input.shape, seen[layers[1].input], inputs)  # type: ignore[union-attr]
        made = [x if x.ndim == 4 else x[None] for x in made]  # [B, L, H, D]
        for i in range(len(made[1])):
            keep = None if real is None else real.reshape(*made[1].shape[:2])[i]
            yield tuple(kept(x[i], keep).transpose(0, 1).double() for x in made)  # type: ignore[misc]


def kept(x: Tensor, real: Tensor | None) -> Tensor:
    return x if real is None or len(real) != len(x) else x[real]


def cached_rows(group: Group, at: int, evidence: Evidence) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    site, block = group.sites[at], group.blocks[at]
    reads, turn = tapped(site), block.part("k", Rotary)
    for inputs, data in evidence.hold(reads):
        on = held(site, dict(zip(reads, data, strict=True)), group.host.graph.sizes(inputs))
        q, k, v = (x.float() for x in (on.q, on.k, on.v))
        if turn is not None:
            past = k.shape[2] - q.shape[2]
            q, k = (back(turn, x, start) for x, start in ((q, past), (k, 0)))
        for i in range(len(k)):
            yield q[i].double(), k[i].double(), v[i].double()


def back(turn: Rotary, x: Tensor, start: int) -> Tensor:
    """Rows [B, H, L, D] as they were before they were turned by their place."""
    positions = -torch.arange(start, start + x.shape[2])[None]
    return (turned(turn, x.transpose(1, 2), positions) / turn.scaling**2).transpose(1, 2)
