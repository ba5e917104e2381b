"""A live cache whose tokens are rounded a block at a time, and the attention that it learns from which of them are salient.

    BlockState(TokenBlocks(100, 50)).attend(q [B, H, n, D], k [B, G, n, D], v, scale) -> o [B, H, n, E]

Tokens wait exactly until their block is full; while they do, what each is given by the queries of its block is summed over query heads.
The query of the last token of a block still sees all of it exactly; then its salient tokens are rounded to more bits than the others, and
stay so. Several tokens at once are what they are one after the other: each block is read by the queries behind it as codes, and by its own
as it is. So a prompt means the same in one piece or in many, and each of its positions what it means where it is generated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnopt.hosts.eviction.stored import Stored, joined
from attnopt.ir.packing import Packed, unpack
from attnopt.ir.token_blocks import TokenBlocks, of_one_set

# q [B, H, 1, D], the sets of keys, of values -> their output [B, H, 1, E] and log-sum-exp [B, H, 1] of each set
Run = Callable[[Tensor, list[Packed], list[Packed]], list[tuple[Tensor, Tensor]]]


@dataclass(eq=False)
class BlockState:
    """k_sets, v_sets: tokens of full blocks in codes, a set for each number of bits; none before a block is full.

    balance: what the channels of values were divided by, [B, G, blocks, D]. k, v: tokens that wait, as they are. saliency [B, G, waiting]:
    what those were given.
    """

    form: TokenBlocks
    k_sets: list[Packed] = field(default_factory=list)
    v_sets: list[Packed] = field(default_factory=list)
    balance: Tensor | None = None
    k: Stored = field(default_factory=lambda: Stored(None, "k"))
    v: Stored = field(default_factory=lambda: Stored(None, "v"))
    saliency: Tensor | None = None
    length: int = 0

    @property
    def waiting(self) -> int:
        return self.k.length

    @property
    def blocks(self) -> int:
        """How many are full."""
        return (self.length - self.waiting) // self.form.block

    @property
    def values(self) -> list[Packed]:
        """The sets of values with their balance."""
        return [replace(x, balance=self.balance) for x in self.v_sets]

    def take(self, k: Tensor, v: Tensor) -> None:
        """Tokens [B, G, n, D] that nothing was seen to attend to: of their blocks the first are salient."""
        at, block = 0, self.form.block
        while at < k.shape[2]:
            count = min(block - self.waiting, k.shape[2] - at)
            self.wait(k[:, :, at : at + count], v[:, :, at : at + count])
            at += count
            if self.waiting == block:
                self.fill()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, run: Run | None = None) -> Tensor:
        """The output of these tokens' queries. run: the kernel of one query on tokens in codes; without, they are read back."""
        block, at, found = self.form.block, 0, []
        numbers: tuple[Tensor, Tensor] | None = None
        while at < q.shape[2]:
            count = min(block - self.waiting, q.shape[2] - at)
            rows = q[:, :, at : at + count]
            self.wait(k[:, :, at : at + count], v[:, :, at : at + count])
            if run is not None and count == q.shape[2] == 1:
                found.append(self.by_pieces(rows, scale, run))
            else:
                numbers = self.numbers(q.dtype) if numbers is None else numbers
                found.append(self.by_numbers(rows, scale, *numbers))
            at += count
            if self.waiting == block:
                self.fill()
                if numbers is not None and at < q.shape[2]:
                    news = self.numbers(q.dtype, since=self.blocks - 1)
                    numbers = torch.cat([numbers[0], news[0]], 2), torch.cat([numbers[1], news[1]], 2)
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def wait(self, k: Tensor, v: Tensor) -> None:
        spare = self.form.block - self.waiting - k.shape[2]
        self.k, self.v = self.k.grown(k, spare), self.v.grown(v, spare)
        if self.saliency is None:
            kind = torch.float64 if k.dtype == torch.float64 else torch.float32
            self.saliency = torch.zeros(*k.shape[:2], 0, dtype=kind, device=k.device)
        self.saliency = torch.nn.functional.pad(self.saliency, (0, k.shape[2]))
        self.length += k.shape[2]

    def by_numbers(self, q: Tensor, scale: float, k: Tensor, v: Tensor) -> Tensor:
        """Of the newest tokens' queries, on full blocks as k and v [B, G, F, D] and all that wait."""
        assert self.saliency is not None
        batch, heads, count, width = q.shape
        k, v = torch.cat([k, self.k.read()], 2), torch.cat([v, self.v.read()], 2)
        groups, length = k.shape[1], k.shape[2]
        rows = q.reshape(batch, groups, heads // groups * count, width)
        scores = (rows @ k.mT * scale).to(self.saliency.dtype).unflatten(2, (-1, count))  # [B, G, R, n, F + waiting]
        if count > 1:
            hidden = torch.ones(count, length, dtype=torch.bool, device=q.device).triu(length - count + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1)
        self.given(weights.sum((2, 3))[..., length - self.waiting :])
        return (weights.flatten(2, 3).to(v.dtype) @ v).reshape(batch, heads, count, -1)

    def by_pieces(self, q: Tensor, scale: float, run: Run) -> Tensor:
        """Of one query: a kernel reads what is in codes, and the outputs are put together."""
        batch, heads, _, width = q.shape
        keys, values = self.k.read().float(), self.v.read().float()
        groups = keys.shape[1]
        scores = q.float().reshape(batch, groups, -1, width) @ keys.mT * scale  # [B, G, R, waiting]
        total = scores.logsumexp(-1, keepdim=True)
        pieces = [
            (o.float().reshape(batch, groups, heads // groups, -1), lse.reshape(batch, groups, -1, 1))
            for o, lse in (run(q, self.k_sets, self.values) if self.k_sets else ())
        ]
        for _, lse in pieces:
            total = torch.logaddexp(total, lse)
        weights = torch.exp(scores - total)
        made = weights @ values
        for o, lse in pieces:
            made = torch.addcmul(made, o, torch.exp(lse - total))
        self.given(weights.sum(2))
        return made.reshape(batch, heads, 1, -1).to(q.dtype)

    def given(self, weights: Tensor) -> None:
        """[B, G, waiting], of the queries that came."""
        assert self.saliency is not None
        self.saliency = self.saliency + weights

    def fill(self) -> None:
        """The tokens that wait are a block: they join the sets, the salient ones in more bits."""
        assert self.saliency is not None
        block = self.form.block
        could_see = torch.arange(block, 0, -1, device=self.saliency.device)  # queries of the block
        rank = (self.saliency / could_see).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        for side, sets, waiting in (("k", self.k_sets, self.k), ("v", self.v_sets, self.v)):
            parts = self.form.rounded(side, waiting.read(), rank)
            if side == "v":
                balance = parts.pop()
                self.balance = balance if self.balance is None else torch.cat([self.balance, balance], 2)
            news = [Packed(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
            sets[:] = [joined(old, new) for old, new in zip(sets, news, strict=True)] if sets else news
        self.k, self.v, self.saliency = self.k.cut(0), self.v.cut(0), self.saliency[..., :0]

    def numbers(self, dtype: torch.dtype, since: int = 0) -> tuple[Tensor, Tensor]:
        """k and v [B, G, F, D] of the tokens of full blocks, from one of them on: set by set, in each block by block."""
        made = []
        for side, sets, waiting in (("k", self.k_sets, self.k), ("v", self.values, self.v)):
            read = []
            for x, (_, bits, tokens) in zip(sets, self.form.sets, strict=False):
                part = self.part(side, x, tokens, since) if since else x
                read.append(unpack(part, of_one_set(bits, tokens, self.form.scales), side, dtype))
            made.append(torch.cat(read, 2) if read else waiting.read()[:, :, :0])
        return made[0], made[1]

    def part(self, side: str, x: Packed, tokens: int, since: int) -> Packed:
        """A set from a block on: keys have scales for each block, values for each token."""
        first = since if side == "k" else since * tokens
        scales, zeros = (None if y is None else y[:, :, first:] for y in (x.scales, x.zeros))
        return Packed(x.codes[:, :, since * tokens :], scales, zeros, None if x.balance is None else x.balance[:, :, since:])

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """The same change of sequences to all that is held."""
        self.k, self.v = self.k.mapped(change), self.v.mapped(change)
        self.saliency, self.balance = (None if x is None else change(x) for x in (self.saliency, self.balance))
        for sets in (self.k_sets, self.v_sets):
            sets[:] = [mapped(x, change) for x in sets]

    @property
    def bytes(self) -> int:
        """Of all that is held, empty places too."""
        sets = [x for each in (*self.k_sets, *self.v_sets) for x in (each.codes, each.scales, each.zeros)]
        return self.k.bytes + self.v.bytes + sum(x.nbytes for x in (*sets, self.balance, self.saliency) if x is not None)


def mapped(x: Packed, change: Callable[[Tensor], Tensor]) -> Packed:
    return Packed(change(x.codes), *(None if part is None else change(part) for part in (x.scales, x.zeros)))
