"""How rows of a cache become codes: each token of each head with a scale and a zero point for every group of its channels.

    x [B, H, L, D]   ->   codes [B, H, L, D * bits / 8], scales [B, H, L, D / group], zeros likewise

    y = (x - shift) / spread, in a Hadamard basis where asked for
    scale = (max - min) / (2^bits - 1)      zero = round(min / scale)      code = round(y / scale) - zero

That is what the `cache` clause of a spec means by bits, group, clip, scales, basis, shift and spread, on tensors (`packed`) and as nodes
(`write`, `read`). The bytes are those of `ir.packing`.

Sources: "WKVQuant" (static shift and spread of channels), "AKVQ-VL" (groups of channels, clip, Hadamard basis).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.dims import Shape
from attnopt.ir.graph import Value
from attnopt.ir.packing import PER_BYTE, pack, uneven
from attnopt.ir.site import Builder
from attnopt.ir.storage import hadamard
from attnopt.passes.edits.caches.nodes import Nodes, whole

SCALES = {"fp32": "float32", "fp16": "float16"}
LARGEST = {"fp16": 65504.0}
MIDDLE = 128.0  # of int8


@dataclass(frozen=True)
class Rows:
    """bits: 8, 4, 2 or 1. group: channels that share a scale, 0 for all. clip: the share of the range that levels cover.

    turned: rounded in a Hadamard basis. folded: rows come and are read in that basis already (`caches.basis`). balance: shift and spread
    of each channel of each head, [2, H * D], or None.
    """

    bits: int = 8
    group: int = 0
    scales: str = "fp32"
    clip: float = 1.0
    turned: bool = False
    folded: bool = False
    balance: Tensor | None = None

    @property
    def storage(self) -> str:
        return f"int{self.bits}"

    @property
    def words(self) -> tuple[str, str, str]:
        return (self.storage, "scales", "zeros")

    @property
    def clause(self) -> Clause:
        """The rounding alone, of keys, without the change of channels before it."""
        return Clause("cache", (), (("k", self.storage), ("group", self.group), ("clip", self.clip), ("scales", self.scales)))

    def plain(self) -> dict[str, Any]:
        """As numbers and words, but for the balance."""
        return {name: getattr(self, name) for name in ("bits", "group", "scales", "clip", "turned", "folded")}

    @classmethod
    def of(cls, plain: Mapping[str, Any], balance: Sequence[Sequence[float]] | None = None) -> Rows:
        return cls(**plain, balance=None if balance is None else torch.tensor(balance, dtype=torch.float32))

    def refusal(self, width: int) -> str:
        """Why rows of this width cannot be kept like this, with the nearest that can; empty where they can."""
        if self.storage in PER_BYTE and width % PER_BYTE[self.storage]:
            return f"rows of {width} channels {uneven(width, PER_BYTE[self.storage])}"
        if self.group and self.group < width and width % self.group:
            fits = [d for d in range(1, width + 1) if width % d == 0]
            nearest = sorted({max(d for d in fits if d < self.group), min(d for d in fits if d > self.group)})
            return f"groups of {self.group} channels do not divide rows of {width}; the nearest that do are {nearest}"
        if self.turned and width & (width - 1):
            return f"a Hadamard basis needs rows of a power of two, and these have {width} channels"
        return ""

    def groups(self, width: int) -> int:
        return 1 if not 0 < self.group < width else width // self.group

    def widths(self, width: int) -> tuple[int, int, int]:
        """Numbers in a row of codes, of scales and of zeros."""
        return (width * self.bits // 8, self.groups(width), self.groups(width))

    def bytes_per_row(self, width: int) -> int:
        codes, scales, zeros = self.widths(width)
        return codes + (scales + zeros) * (4 if self.scales == "fp32" else 2)

    def parts(self, lead: Shape, width: int) -> list[tuple[str, Shape, str]]:
        """(word, shape, dtype) of codes, scales and zeros of rows with these leading dimensions."""
        kinds = ("int8" if self.bits == 8 else "uint8", SCALES[self.scales], SCALES[self.scales])
        return [(w, (*lead, n), kind) for w, n, kind in zip(self.words, self.widths(width), kinds, strict=True)]

    def constants(self, width: int) -> list[Tensor]:
        """shift and spread, [1, H, 1, D]."""
        assert self.balance is not None
        return [x.reshape(1, -1, 1, width) for x in self.balance]

    def exact(self, x: Tensor) -> Tensor:
        """Rows that are kept exactly, in the basis that they are read in."""
        return (x.double() @ hadamard(x.shape[-1])).to(x.dtype) if self.folded else x

    def packed(self, x: Tensor) -> list[Tensor]:
        """What `write` computes of rows as they were before anything was folded. Raises ValueError where a number is not finite."""
        y = x.float()
        if self.balance is not None:
            shift, spread = self.constants(y.shape[-1])
            y = (y - shift) / spread
        if self.turned:
            y = y @ hadamard(y.shape[-1]).to(y)
        made = pack(y, self.clause, "k")
        assert made.scales is not None and made.zeros is not None
        return [made.codes, made.scales, made.zeros]

    def write(self, builder: Builder, x: Value) -> list[Value]:
        n, lead, width = Nodes(builder), (x.shape or ())[:-1], whole(x)
        x = n.cast(x, "float32")
        if self.balance is not None:
            shift, spread = (builder.constant(c, "float32") for c in self.constants(width))
            x = n.div(n.sub(x, shift), spread)
        if self.turned and not self.folded:
            x = n.product(x, hadamard(width))
        count = self.groups(width)
        if count > 1:
            x = n.reshaped(x, *lead, count, width // count)
        codes, step, zero = quantised(n, x, self.bits, self.scales, clip=self.clip)
        if count > 1:
            codes, step, zero = n.reshaped(codes, *lead, width), n.reshaped(step, *lead, count), n.reshaped(zero, *lead, count)
        scales = [n.cast(part, SCALES[self.scales]) for part in (step, zero)]
        return [n.cast(n.sub(codes, MIDDLE), "int8") if self.bits == 8 else n.bytes_of(codes, self.bits), *scales]

    def read(self, builder: Builder, parts: Sequence[Value], dtype: str, *, turned_back: bool = True) -> Value:
        """What codes, scales and zeros stand for. turned_back=False: as they are in the Hadamard basis, where there is one."""
        n = Nodes(builder)
        codes, scales, zeros = parts
        lead, width = (codes.shape or ())[:-1], whole(codes) * 8 // self.bits
        x = n.cast(codes, "float32") if self.bits == 8 else n.codes_of(codes, self.bits)
        step, zero = n.cast(scales, "float32"), n.cast(zeros, "float32")
        zero = n.add(zero, MIDDLE) if self.bits == 8 else zero
        count = self.groups(width)
        if count > 1:
            x, step, zero = (
                n.reshaped(x, *lead, count, width // count),
                n.reshaped(step, *lead, count, 1),
                n.reshaped(zero, *lead, count, 1),
            )
        x = n.mul(n.add(x, zero), step)
        if count > 1:
            x = n.reshaped(x, *lead, width)
        if self.turned and not self.folded and turned_back:
            x = n.product(x, hadamard(width).mT)
        if self.balance is not None:
            shift, spread = (builder.constant(c, "float32") for c in self.constants(width))
            x = n.add(n.mul(x, spread), shift)
        return n.cast(x, dtype)


def quantised(n: Nodes, x: Value, bits: int, scales: str, *, axis: int = -1, clip: float = 1.0) -> tuple[Value, Value, Value]:
    """Codes of x in float32, and the scale and zero point that the numbers along one axis share."""
    most = 2.0**bits - 1
    low, high = n.reduced("min", x, axis), n.reduced("max", x, axis)
    if clip != 1.0:
        low, high = n.mul(low, clip), n.mul(high, clip)
    step = held(n, n.where(n.binary("eq", high, low), n.unary("abs", low), n.div(n.sub(high, low), most)), scales)
    step = n.where(n.binary("eq", step, 0.0), 1.0, step)
    zero = held(n, n.unary("round", n.div(low, step)), scales)
    return n.clamp(n.sub(n.unary("round", n.div(x, step)), zero), 0.0, most), step, zero


def held(n: Nodes, x: Value, scales: str) -> Value:
    """A scale or zero point as it is kept."""
    if scales == "fp32":
        return x
    return n.cast(n.cast(n.clamp(x, -LARGEST[scales], LARGEST[scales]), SCALES[scales]), "float32")
