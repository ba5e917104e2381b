"""A language model that decodes text token by token with its cache in few bits, computed for all positions of a text at once.

    with streaming(model, method): logits = model(tokens)   ->   what every step of decoding would have computed

Each query sees tokens as the cache holds them at its step: the newest exact, those before as the cache clause of a spec rounds them.
For methods that round a block of tokens when it is full (`Blocks`), rows are computed a block at a time, because which tokens are
salient hangs on the attention of the steps before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import transformers
from torch import Tensor, nn

from attnopt.ir.clause import Clause
from attnopt.ir.evaluate import Grid
from attnopt.ir.packing import row_bytes
from attnopt.ir.rows import Call
from attnopt.ir.spec import parse
from attnopt.ir.storage import round_cache

EXACT = 16  # bits of a token that is kept as it is


def rounded(clause: Clause, k: Tensor, v: Tensor, **operands: Tensor) -> tuple[Tensor, Tensor]:
    """k and v [B, G, K, D] as the clause rounds them, none exact for being new."""
    spec = parse("softmax").with_(cache=clause)
    call = Call(spec, Grid(k.shape[0], k.shape[1], 1, k.shape[2]), operands, k.dtype)
    return round_cache(call, k, clause, "k"), round_cache(call, v, clause, "v")


class Method(Protocol):
    """How a cache holds tokens: attention of every query on what there is at its step."""

    def attended(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [B, H, L, D], k and v [B, G, L, D], causal -> [B, H, L, D]."""
        ...

    def bits(self, length: int, width: int) -> float:
        """Bits per number of a cache of so many tokens with heads of this width; scales and zero points count, exact tokens as 16."""
        ...


@dataclass(frozen=True)
class ByToken:
    """Each token is rounded by itself when it comes, or read exactly while it is new (`recent`) or one of the `first`.

    clauses: of each layer, or one for all. operands: by layer, what the clause loads.
    """

    clauses: tuple[Clause, ...]
    first: int = 0
    recent: int = 0
    operands: tuple[dict[str, Tensor], ...] = ()
    wide: tuple[int, ...] = ()  # layers without exact first tokens

    def clause(self, layer: int) -> Clause:
        return self.clauses[layer % len(self.clauses)]

    def attended(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        there = self.operands[layer] if self.operands else {}
        k_held, v_held = rounded(self.clause(layer), k, v, **there)
        repeats = q.shape[1] // k.shape[1]
        k, v, k_held, v_held = (x.repeat_interleave(repeats, 1) for x in (k, v, k_held, v_held))
        place = torch.arange(k.shape[2])
        distance = place[:, None] - place
        if not self.recent and not self.first:
            return (q @ k_held.mT * scale).masked_fill(distance < 0, -torch.inf).softmax(-1) @ v_held
        exact = (distance < self.recent) | (place < (0 if layer in self.wide else self.first))
        scores = torch.where(exact, q @ k.mT, q @ k_held.mT) * scale
        p = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        return (p * exact) @ v + (p * ~exact) @ v_held

    def bits(self, length: int, width: int) -> float:
        found = []
        for layer in range(max(1, len(self.clauses))):
            clause = self.clause(layer)
            kept = min(length, self.recent + (0 if layer in self.wide else self.first))
            per_side = [(length - kept) / length * stored_bits(clause, side, width) + kept / length * EXACT for side in "kv"]
            found.append(sum(per_side) / 2)
        return sum(found) / len(found)


def stored_bits(clause: Clause, side: str, width: int) -> float:
    """Bits per number of a token that is rounded, scales and zero points of its groups of channels among them."""
    return row_bytes(clause, side, width, 4.0) * 8 / width


@dataclass(frozen=True)
class Blocks:
    """`block` tokens are rounded together when the last of them has been read: keys by channel, values by token.

    salient: the share of the tokens of a block that keep `high` bits, by normalised attention, per key head; the others have `low`.
    probes: share of the steps of a block whose attention is looked at, half the last ones, half at random. balance: channels of
    values are balanced first. normalised: saliency by share of the queries that could see a token.
    """

    block: int = 100
    low: int = 2
    high: int = 4
    salient: float = 0.5
    probes: float = 1.0
    balance: bool = True
    normalised: bool = True
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), compare=False)

    def clause(self) -> Clause:
        line = f"k_axis=channel, k_bits=load(bits, b, h, k), v_bits=load(bits, b, h, k), v_balance={'root' if self.balance else 'none'}"
        made = parse(f"softmax cache({line}, scales=fp16)").cache
        assert made is not None
        return made

    def attended(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        repeats, length = q.shape[1] // k.shape[1], k.shape[2]
        k_held, v_held, output = k.clone(), v.clone(), torch.empty_like(q)
        for first in range(0, length, self.block):
            rows = slice(first, min(first + self.block, length))
            seen = slice(0, rows.stop)
            keys, values = (x[:, :, seen].repeat_interleave(repeats, 1) for x in (k_held, v_held))
            place = torch.arange(rows.stop)
            hidden = place[rows, None] < place
            p = (q[:, :, rows] @ keys.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
            output[:, :, rows] = p @ values
            if rows.stop - first == self.block:
                bits = self.bits_of(p[..., rows].unflatten(1, (-1, repeats)).sum(2))
                part = rounded(self.clause(), k[:, :, rows], v[:, :, rows], bits=bits)
                k_held[:, :, rows], v_held[:, :, rows] = part
        return output

    def bits_of(self, p: Tensor) -> Tensor:
        """Bits of each token [B, G, block], from what the steps of the block gave it [B, G, steps, block]."""
        count = p.shape[-1]
        chosen = torch.ones(count, dtype=torch.bool)
        if self.probes < 1:
            half = max(1, round(self.probes * count / 2))
            chosen = torch.zeros(count, dtype=torch.bool)
            chosen[-half:] = True
            chosen[torch.randperm(count, generator=self.random)[:half]] = True
        p = p[:, :, chosen]
        could_see = (chosen.nonzero() >= torch.arange(count)).sum(0).clamp(min=1)
        saliency = p.sum(2) / (could_see if self.normalised else 1)
        most = round(self.salient * count)
        bits = torch.full_like(saliency, float(self.low))
        return bits.scatter(-1, saliency.topk(most).indices, float(self.high)) if most else bits

    def bits(self, length: int, width: int) -> float:
        """With half a block of exact tokens, as there are on average."""
        kept = min(length, self.block / 2)
        codes = self.low + self.salient * (self.high - self.low)
        sets = 2 if 0 < self.salient < 1 else 1
        keys = codes + sets * 32 / self.block
        values = codes + 32 / width + (32 / self.block if self.balance else 0)
        return (length - kept) / length * (keys + values) / 2 + kept / length * EXACT


@contextlib.contextmanager
def streaming(model: nn.Module, method: Method | None) -> Iterator[None]:
    """The model with its attention on such a cache; None: as it is."""
    if method is None:
        yield
        return

    def forward(module, query, key, value, attention_mask, scaling, **options):
        output = method.attended(module.layer_idx, query, key, value, scaling)
        return output.transpose(1, 2), None

    held = model.config._attn_implementation
    transformers.AttentionInterface.register("cache_stream", forward)
    model.config._attn_implementation = "cache_stream"
    try:
        yield
    finally:
        model.config._attn_implementation = held
