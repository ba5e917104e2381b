"""A cache in blocks of tokens (`ir.token_blocks`) as state of a graph: what it comes and goes as, and the nodes that write and read it.

    past k, v [B, H, P, D]   ->   tokens, codes, scales and zeros of each set, balance, recent, saliency

The state of one side is, for each set, codes, scales and zeros of all full blocks, then the balance of values, the last G tokens as they
are, and the saliency of those. `tokens` [B, H, P, 0] holds nothing and says how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.dims import Dim, Shape, product, symbol
from attnopt.ir.graph import Value
from attnopt.ir.token_blocks import TokenBlocks
from attnopt.passes.edits.caches.nodes import Nodes, whole
from attnopt.passes.edits.caches.rows import SCALES, quantised


@dataclass(frozen=True)
class Blocks(TokenBlocks):
    """As state of a graph."""

    def plain(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("block", "salient", "high", "low", "scales")}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Blocks:
        return cls(**plain)

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

    # On tensors.

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
