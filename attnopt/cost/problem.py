"""One attention at one shape, with the numbers that every kernel's price is made of.

Problem(parse("softmax causal"), {b, h, g, q, k, d, e}, "float16").pairs(64, 64)   ->   pairs in blocks of 64 x 64 that causal leaves
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from attnopt.ir.cost import WIDTHS, offset_of, per_score, selected_keys, selected_share, stored
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.visits import visited_pairs

CONVERT = 2.0  # operations that bring a stored number back: widen it, multiply it by its scale
PEAKS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8", "int8": "int8", "int4": "int8", "int3": "int8",
         "int2": "int8", "int1": "int8"}  # fmt: skip
NARROW = ("int8", "int4", "int3", "int2", "int1", "fp8")


@dataclass(frozen=True)
class Problem:
    """`shape` gives b, h, g (query, key heads), q, k (lengths), d, e (key, value width), as for `ir.cost.cost`."""

    spec: AttentionSpec
    shape: Mapping[str, int]
    dtype: str = "float32"
    heads_first: bool = True  # q, k and v arrive as [B, H, L, D], not as [B, L, H, D]
    held_mask: bool = False  # the graph holds mask and biases as a tensor already

    def __getitem__(self, axis: str) -> int:
        return self.shape[axis]

    @cached_property
    def width(self) -> float:
        """Bytes of a number."""
        return WIDTHS.get(self.dtype, 32) / 8

    @cached_property
    def heads(self) -> int:
        """Query heads of the whole batch."""
        return self["b"] * self["h"]

    @cached_property
    def offset(self) -> int:
        return offset_of(self.spec, self["q"], self["k"])

    @cached_property
    def per_score(self) -> float:
        """Operations on each score. An integer is widened and multiplied by its scale; a narrow weight is rounded."""
        held = self.spec.precision
        narrow = () if held is None else (CONVERT * (held.word("k") in NARROW), float(held.word("p") in NARROW))
        return per_score(self.spec) + sum(narrow)

    def pairs(self, rows: int = 1, keys: int = 1, mask: Expr | None = None) -> float:
        """Pairs of one head that are computed in blocks of rows x keys under the mask (the spec's own), at most those selected."""
        q, k = self["q"], self["k"]
        seen = visited_pairs(self.spec.mask if mask is None else mask, q, k, self.offset, min(rows, q or 1), min(keys, k or 1))
        seen *= selected_share(self.spec)
        kept = selected_keys(self.spec, k)
        return seen if kept is None else min(seen, float(q * kept))

    @property
    def all_pairs(self) -> float:
        return float(self["q"] * self["k"])

    @cached_property
    def row_bytes(self) -> float:
        """Bytes of the keys and values of one position of one head, as they are stored."""
        held = self.spec.cache or self.spec.precision
        return self["d"] * stored(held, "k", self.width) + self["e"] * stored(held, "v", self.width)

    @property
    def keys_bytes(self) -> float:
        """Keys and values of the whole batch, once for each key head."""
        return self["b"] * self["g"] * self["k"] * self.row_bytes

    @property
    def queries_bytes(self) -> float:
        """Queries and outputs of the whole batch."""
        return self.heads * self["q"] * (self["d"] * stored(self.spec.precision, "q", self.width) + self["e"] * self.width)

    @cached_property
    def conversions(self) -> float:
        """Operations per key position and head that bring keys and values of a cache back to numbers."""
        held = self.spec.cache
        if held is None:
            return 0.0
        return CONVERT * sum(self[axis] for axis, side in (("d", "k"), ("e", "v")) if held.word(side) in NARROW)

    @cached_property
    def product_type(self) -> str:
        """The type whose peak bounds the first product: that of `precision` where both sides of q k' are rounded to it."""
        held = self.spec.precision
        if held is None or held.word("q") == "fp32" or held.word("q") != held.word("k"):
            return self.dtype
        return PEAKS[held.word("q")]

    @cached_property
    def value_type(self) -> str:
        """The same of the second product, where both of its sides are rounded to one type."""
        held = self.spec.precision
        if held is None or held.word("v") == "fp32" or held.word("p") != held.word("v"):
            return self.dtype
        return PEAKS[held.word("v")]
