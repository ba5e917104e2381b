"""Where the weights of one attention lie, added up over batches from its q, k and what its spec says of them.

    weights [B, H, rows, K]  ->  shares of each query  ->  mass [H, position bucket, distance bucket], entropy, peak

The weights are those of the reference, a block of query rows at a time, so that no matrix of all queries by all keys is ever held.
A query counts where it is no padding and sees a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.analysis.calibration import Batch
from attnopt.analysis.operands import Held, held, tapped
from attnopt.analysis.padding import Padding
from attnopt.analysis.running import RunningChannels, nested, restore
from attnopt.analysis.statistics import BUCKETS, AttentionStatistics, bucket, joined, parts
from attnopt.ir.graph import Graph, Value
from attnopt.ir.row_blocks import Block, attended
from attnopt.ir.site import Site

SCORES = 2**21  # scores of one block: with all that is made of them, about 100 MB in float32
CELLS = 2 * BUCKETS * BUCKETS


@dataclass
class AttentionMeasure:
    """The running statistics of one site: sums over queries, and the channels of its rows of q, k and v."""

    key: str
    site: Site
    graph: Graph
    padding: Padding
    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, RunningChannels] = field(default_factory=dict)

    @property
    def reads(self) -> tuple[Value, ...]:
        return tapped(self.site)

    @property
    def size(self) -> int:
        heads = self.site.size("h")
        return 8 * CELLS * (heads if isinstance(heads, int) else 64)

    def add(self, data: Mapping[Value, Tensor], inputs: Batch) -> None:
        site = held(self.site, data, self.graph.sizes(inputs))
        real_q, real_k = (
            self.padding.rows(self.site.size(n), len(x), x.shape[2], inputs) for n, x in (("q", site.q), ("k", site.k))
        )
        self.begin(site)
        for name, x, real in (("q", site.q, real_q), ("k", site.k, real_k), ("v", site.v, real_k)):
            by_row = x.transpose(1, 2).flatten(2)  # [B, L, H * D]
            self.rows[name].add(by_row.flatten(0, 1) if real is None else by_row[real])
        whole = torch.ones(len(site.q), site.q.shape[2], dtype=torch.bool) if real_q is None else real_q
        q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (site.q, site.k, site.v))
        for block in attended(self.site.spec, q, k, v, site.operands, sizes=site.sizes, elements=SCORES):
            self.add_block(block, whole[:, block.first : block.first + block.weights.shape[2]])

    def begin(self, site: Held) -> None:
        if self.sums:
            return
        heads = site.q.shape[1]
        self.rows = {name: RunningChannels(x.shape[1] * x.shape[3]) for name, x in (("q", site.q), ("k", site.k), ("v", site.v))}
        zeros = torch.zeros(heads, dtype=torch.float64)
        self.sums = {
            "rows": torch.zeros((), dtype=torch.int64),
            "mass": torch.zeros(heads, CELLS, dtype=torch.float64),
            **{name: zeros.clone() for name in ("entropy", "peak", "total")},
        }

    def add_block(self, block: Block, real: Tensor) -> None:
        """real [B, rows]."""
        counts = block.visible.any(-1).all(1) & real
        weights = block.weights.transpose(0, 1)[:, counts].to(torch.float64)  # [H, n, K]
        if not weights.shape[1]:
            return
        magnitude = weights.abs()
        share = magnitude / magnitude.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        row = torch.arange(counts.shape[1]).expand_as(counts)[counts]
        cells = cell(block.positions.flatten(), share.shape[-1])[row]  # [n, K]
        held = self.sums
        held["rows"] += share.shape[1]
        held["total"] += weights.sum((-2, -1))
        held["peak"] += share.amax(-1).sum(-1)
        held["entropy"] += torch.special.entr(share).sum((-2, -1))
        for head, mine in enumerate(share):
            held["mass"][head] += torch.bincount(cells.flatten(), mine.flatten(), minlength=CELLS)

    def state(self) -> dict[str, Tensor]:
        return {**self.sums, **nested(self.rows)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.sums = {name: x for name, x in state.items() if "." not in name}
        self.rows = {name: RunningChannels(len(state[f"{name}.mean"])) for name in "qkv"}
        restore(self.rows, state)

    def result(self) -> dict[str, Tensor]:
        count = max(int(self.sums["rows"]), 1)
        mean = {name: self.sums[name] / count for name in ("mass", "entropy", "peak", "total")}
        mean["mass"] = mean["mass"].reshape(-1, BUCKETS, 2 * BUCKETS)
        channels = {name: x for part in "qkv" for name, x in parts(self.rows[part].value(), f"{part}.").items()}
        return {"rows": self.sums["rows"], **mean, **channels}

    def value(self, result: Mapping[str, Tensor]) -> AttentionStatistics:
        return joined(AttentionStatistics, result, site=self.site.name)


def cell(positions: Tensor, keys: int) -> Tensor:
    """The cell of `mass` of every pair of a query at these positions [n] and a key: [n, keys]."""
    key = torch.arange(keys)
    distance = positions[:, None] - key
    along = torch.where(distance >= 0, bucket(distance.clamp(min=0)), BUCKETS + bucket((-distance).clamp(min=0)))
    return bucket(key) * (2 * BUCKETS) + along
