"""The tiles of a table in the order in which they are tried for a spec: ranked by the cost model, corrected by measurement.

    softmax causal                128 x 128, 128 x 64, 64 x 64        the table's own order
    softmax causal & window(32)    64 x 32,  64 x 64, …               large tiles would compute mostly what the mask hides

The table is a judgement of how well each tile keeps the machine busy: a place further down counts as JUDGED slower, unless a GPU of
this architecture has measured that (`measured_tiles.toml`, which `benchmarks/gpu_attention.py --tiles` writes). To that the cost model
adds what depends on the spec. Architectures of which no target is known keep the order of the table.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from attnopt.codegen.triton.tiles import Tile
from attnopt.cost.target import Target, all_targets
from attnopt.cost.tile import estimate_tile
from attnopt.ir.spec import AttentionSpec

JUDGED = 0.1  # how much slower a place further down the table is taken to be
MEASURED = "measured_tiles.toml"
# What kernels are ranked for, as their lengths are not known when they are compiled: enough work to fill a GPU.
SHAPES: dict[str, dict[str, int]] = {
    "prefill": {"b": 8, "h": 32, "g": 8, "q": 4096, "k": 4096},
    "decode": {"b": 16, "h": 32, "g": 8, "q": 1, "k": 32768},
}


@dataclass(frozen=True)
class Question:
    """Of which kernels tiles are ranked: `family` is "prefill" or "decode", the widths are those of keys and values."""

    family: str
    spec: AttentionSpec
    width: int
    value_width: int
    dtype: str
    architecture: str

    @property
    def shape(self) -> dict[str, int]:
        """b, h, g, q, k, d, e that stand for all shapes."""
        shape = SHAPES[self.family] | {"d": self.width, "e": self.value_width}
        said = self.spec.head_counts
        return shape if said is None else shape | {"h": said[0], "g": said[1]}

    @property
    def measured_as(self) -> str:
        """The table of measurements that this kernel belongs to."""
        widest = next(w for w in (64, 128, 256, 512) if max(self.width, self.value_width) <= w)
        return f"{self.architecture} {self.family} {widest} {self.dtype}"


def ranked(tiles: Sequence[Tile], question: Question) -> tuple[Tile, ...]:
    """The tiles, fastest first as far as is known; equal ones in the order given."""
    target = target_of(question.architecture)
    if target is None or len(tiles) < 2:
        return tuple(tiles)
    factors = corrections().get(question.measured_as, {})
    spent = {
        tile: predicted(tile, question, target) * factors.get(written(tile), 1.0 + JUDGED * place)
        for place, tile in enumerate(tiles)
    }
    return tuple(sorted(tiles, key=spent.__getitem__))


def predicted(tile: Tile, question: Question, target: Target) -> float:
    """Seconds at the shape that stands for all."""
    rows, keys = tile.block_q, tile.block_k
    return estimate_tile(question.spec, question.shape, question.dtype, rows=rows, keys=keys, target=target).seconds


@cache
def target_of(architecture: str) -> Target | None:
    """A target with this architecture: those that share it differ by less than tiles do."""
    return next((t for t in all_targets() if t.arch == architecture), None)


@cache
def corrections() -> Mapping[str, Mapping[str, float]]:
    """By architecture, family, width and dtype: what each tile took over what was predicted, the best as 1."""
    text = (resources.files("attnopt.codegen.triton") / MEASURED).read_text(encoding="utf-8")
    data: dict[str, dict[str, Any]] = tomllib.loads(text)
    return {name: {tile: float(factor) for tile, factor in factors.items()} for name, factors in data.items()}


def written(tile: Tile) -> str:
    """128 x 64, 8 warps, 3 stages, persistent"""
    flags = [name for name in ("persistent", "descriptors", "specialised") if getattr(tile, name)]
    return ", ".join([f"{tile.block_q} x {tile.block_k}", f"{tile.num_warps} warps", f"{tile.num_stages} stages", *flags])
