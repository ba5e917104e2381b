"""How a block of tokens becomes codes when the last of them has come: keys by channel, values by token, salient tokens in more bits.

    k, v [B, H, G, D], rank [B, H, G]  ->  in the order of rank: the first `salient` tokens of the block in `high` bits, the rest in `low`
        keys     scale and zero point of each channel over the tokens of each set                         2 sets x 2 D numbers a block
        values   v / c, c = sqrt(max over the block |v|) of each channel; scale and zero of each token    2 G + D numbers a block

The state of one side is, for each set, codes, scales and zeros of all full blocks, then the balance of values, the last G tokens as they
are, and the saliency of those. `tokens` [B, H, P, 0] holds nothing and says how many tokens there are.

That is what `cache(k_axis=channel, block=G, k_bits=…, v_bits=…, v_balance=root)` of a spec means of one block. The tokens of a block
stand in the order of their rank, which attention that sees all of them does not notice.

Source: "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification" (channel-separable tokenwise values).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.dims import Dim, Shape, product, symbol
from attnopt.ir.graph import Value
from attnopt.ir.kv_cache import waiting_tokens
from attnopt.ir.packing import PER_BYTE, pack, uneven
from attnopt.ir.storage import safe
from attnopt.passes.edits.caches.nodes import Nodes, whole
from attnopt.passes.edits.caches.rows import SCALES, quantised


@dataclass(frozen=True)
class Blocks:
    """block: tokens rounded together. salient: how many of them keep `high` bits. scales: the type of scales and zero points."""

    block: int = 128
    salient: int = 64
    high: int = 4
    low: int = 2
    scales: str = "fp16"

    @property
    def sets(self) -> list[tuple[str, int, int]]:
        """(word, bits, tokens) of each set that has tokens."""
        both = (("high", self.high, self.salient), ("low", self.low, self.block - self.salient))
        return [one for one in both if one[2]]

    @property
    def words_of_a_spec(self) -> str:
        """The cache of a site as a clause. Where data decides the bits of tokens it also says which have as many on average."""
        mean = (self.salient * self.high + (self.block - self.salient) * self.low) / self.block
        options = [f"{side}=int{-(-mean // 1):.0f}" for side in "kv"]
        options += ["k_axis=channel", f"block={self.block}"]
        if len(self.sets) > 1:
            options += [f"{side}_bits=load({side}_bits, b, h, k)" for side in "kv"]
        recent = f"size(k) - (size(k) - 1) // {self.block} * {self.block}"
        return f"cache({', '.join([*options, f'recent={recent}', f'scales={self.scales}', 'v_balance=root'])})"

    @property
    def clause_of_kernels(self) -> Clause:
        """The cache as a kernel is told of it, which sees from its tensors how many tokens have how many bits."""
        kept = (("k", f"int{self.high}"), ("v", f"int{self.high}"), ("k_axis", "channel"), ("block", self.block))
        recent = waiting_tokens(self.block)
        return Clause("cache", (), (*kept, ("recent", recent), ("scales", self.scales), ("v_balance", "root")))

    def plain(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("block", "salient", "high", "low", "scales")}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Blocks:
        return cls(**plain)

    def refusal(self, width: int) -> str:
        counts = [PER_BYTE[f"int{bits}"] for _, bits, _ in self.sets]
        odd = next((count for count in counts if width % count), None)
        return "" if odd is None else f"rows of {width} channels {uneven(width, odd)}"

    def count(self, length: Dim) -> Dim:
        """How many blocks so many tokens fill."""
        if isinstance(length, int):
            return length // self.block
        return symbol(f"({length}//{self.block})" if str(length).isidentifier() else f"(({length})//{self.block})")

    def parts(self, side: str, shape: Shape, dtype: str) -> list[tuple[str, Shape, str]]:
        """(word, shape, dtype) of the state that stands for keys or values [B, H, P, D]."""
        batch, heads, length, width = shape
        assert isinstance(width, int)
        filled, kind = self.count(length), SCALES[self.scales]
        found: list[tuple[str, Shape, str]] = [("tokens", (batch, heads, length, 0), "uint8")]
        for word, bits, tokens in self.sets:
            rows, columns = (filled, width) if side == "k" else (product((filled, tokens)), 1)
            found.append((word, (batch, heads, product((filled, tokens)), width * bits // 8), "uint8"))
            found += [(f"{word}_{what}", (batch, heads, rows, columns), kind) for what in ("scales", "zeros")]
        if side == "v":
            return [
                *found,
                ("balance", (batch, heads, filled, width), "float32"),
                ("recent", (batch, heads, self.block, width), dtype),
            ]
        return [
            *found,
            ("recent", (batch, heads, self.block, width), dtype),
            ("saliency", (batch, heads, self.block, 1), "float32"),
        ]

    def words(self, side: str) -> list[str]:
        return [word for word, _, _ in self.parts(side, (1, 1, self.block, 8), "float32")]

    def bytes_per_token(self, side: str, heads: int, width: int) -> float:
        """Of tokens in full blocks; a block of exact tokens stands beside them."""
        scale = 4 if self.scales == "fp32" else 2
        codes = sum(tokens * width * bits / 8 for _, bits, tokens in self.sets)
        rest = 2 * scale * len(self.sets) * width if side == "k" else 2 * scale * self.block + 4 * width
        return heads * (codes + rest) / self.block

    # On tensors.

    def rounded(self, side: str, x: Tensor, rank: Tensor) -> list[Tensor]:
        """One block [B, H, G, D] with the rank [B, H, G] of each token: codes of the sets, scales, zeros, balance of values."""
        x = x.float().take_along_dim(rank.argsort(-1)[..., None], 2)
        balance = None
        if side == "v":
            balance = safe(x.abs().amax(2, keepdim=True).sqrt())
            x = x / balance
        axis, found, at = "channel" if side == "k" else "token", [], 0
        for _, bits, tokens in self.sets:
            made = pack(x[:, :, at : at + tokens], self.clause(bits, axis), "k")
            assert made.scales is not None and made.zeros is not None
            found += [made.codes, made.scales, made.zeros]
            at += tokens
        return found + ([] if balance is None else [balance])

    def clause(self, bits: int, axis: str) -> Clause:
        return Clause("cache", (), (("k", f"int{bits}"), ("k_axis", axis), ("scales", self.scales)))

    def packed(self, side: str, x: Tensor, ranks: Tensor | None = None) -> list[Tensor]:
        """The state that an exact past [B, H, P, D] is. ranks: of each token within its block [B, H, blocks * G]; where no attention
        was seen they are the order of the tokens, and the saliency of those that wait is 0."""
        size, length = self.block, x.shape[2]
        filled = length // size
        order = torch.arange(size).expand(*x.shape[:2], -1)
        blocks = [
            self.rounded(
                side, x[:, :, i * size : (i + 1) * size], order if ranks is None else ranks[:, :, i * size : (i + 1) * size]
            )
            for i in range(filled)
        ]
        empty = self.rounded(side, torch.zeros_like(x[:, :, :1]).expand(-1, -1, size, -1), order)
        made = [torch.cat(parts, 2) for parts in zip(*blocks, strict=True)] if blocks else [part[:, :, :0] for part in empty]
        made.append(torch.nn.functional.pad(x[:, :, -size:], (0, 0, max(0, size - length), 0)))
        made.insert(0, x[..., :0].to(torch.uint8))
        return made + ([torch.zeros(*x.shape[:2], size, 1)] if side == "k" else [])

    # As nodes.

    def write(self, n: Nodes, side: str, x: Value) -> list[Value]:
        """`rounded` of a block [B, H, G, D] in float32 whose tokens stand in the order of their rank."""
        balance = None
        if side == "v":
            balance = n.unary("sqrt", n.reduced("max", n.unary("abs", x), 2))
            balance = n.where(n.binary("eq", balance, 0.0), 1.0, balance)
            x = n.div(x, balance)
        found, at = [], 0
        for _, bits, tokens in self.sets:
            codes, step, zero = quantised(
                n, n.cut(x, 2, at, at + tokens, tokens), bits, self.scales, axis=2 if side == "k" else 3
            )
            found += [n.bytes_of(codes, bits), *(n.cast(part, SCALES[self.scales]) for part in (step, zero))]
            at += tokens
        return found + ([] if balance is None else [balance])

    def read(self, n: Nodes, side: str, parts: Mapping[str, Value], filled: Dim) -> list[Value]:
        """The tokens of all full blocks in float32, [B, H, blocks * tokens, D] of each set."""
        found = []
        for word, bits, tokens in self.sets:
            scales, zeros = (n.cast(parts[f"{word}_{what}"], "float32") for what in ("scales", "zeros"))
            batch, heads = (scales.shape or ())[:2]
            x = n.codes_of(parts[word], bits)
            width = whole(x)
            if side == "k":
                scales, zeros = (n.reshaped(part, batch, heads, filled, 1, width) for part in (scales, zeros))
                x = n.mul(n.add(n.reshaped(x, batch, heads, filled, tokens, width), zeros), scales)
            else:
                balance = n.reshaped(parts["balance"], batch, heads, filled, 1, width)
                x = n.mul(n.reshaped(n.mul(n.add(x, zeros), scales), batch, heads, filled, tokens, width), balance)
            found.append(n.reshaped(x, batch, heads, product((filled, tokens)), width))
        return found
