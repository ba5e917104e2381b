"""How a block of tokens becomes codes when the last of them has come: keys by channel, values by token, salient tokens in more bits.

    k, v [B, H, G, D], rank [B, H, G]  ->  in the order of rank: the first `salient` tokens of the block in `high` bits, the rest in `low`
        keys     scale and zero point of each channel over the tokens of each set                         2 sets x 2 D numbers a block
        values   v / c, c = sqrt(max over the block |v|) of each channel; scale and zero of each token    2 G + D numbers a block

That is what `cache(k_axis=channel, block=G, k_bits=…, v_bits=…, v_balance=root)` of a spec means of one block. The tokens of a block
stand in the order of their rank, which attention that sees all of them does not notice.

Source: "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification" (channel-separable tokenwise values).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Index, Load
from attnopt.ir.kv_cache import waiting_tokens
from attnopt.ir.packing import PER_BYTE, pack, uneven
from attnopt.ir.signatures import BITS
from attnopt.ir.site import Refusal
from attnopt.ir.spec import as_spec
from attnopt.ir.storage import safe

KEPT = ("k", "v", "k_axis", "block", "k_bits", "v_bits", "recent", "scales", "v_balance")  # what the clause of such a cache says


@dataclass(frozen=True)
class TokenBlocks:
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

    def refusal(self, width: int) -> str:
        counts = [PER_BYTE[f"int{bits}"] for _, bits, _ in self.sets]
        odd = next((count for count in counts if width % count), None)
        return "" if odd is None else f"rows of {width} channels {uneven(width, odd)}"

    def bytes_per_token(self, side: str, heads: int, width: int) -> float:
        """Of tokens in full blocks; a block of exact tokens stands beside them."""
        scale = 4 if self.scales == "fp32" else 2
        codes = sum(tokens * width * bits / 8 for _, bits, tokens in self.sets)
        rest = 2 * scale * len(self.sets) * width if side == "k" else 2 * scale * self.block + 4 * width
        return heads * (codes + rest) / self.block

    def rounded(self, side: str, x: Tensor, rank: Tensor) -> list[Tensor]:
        """One block [B, H, G, D] with the rank [B, H, G] of each token: codes of the sets, scales, zeros, balance of values."""
        x = x if x.dtype.itemsize == 8 else x.float()
        x = x.take_along_dim(rank.argsort(-1)[..., None], 2)
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


@functools.lru_cache(maxsize=256)
def of_one_set(bits: int, tokens: int, scales: str) -> Clause:
    """The cache that the tokens of one set are, so many of each block."""
    kept = (("k", f"int{bits}"), ("v", f"int{bits}"), ("k_axis", "channel"), ("block", tokens), ("scales", scales))
    return Clause("cache", (), (*kept, ("v_balance", "root")))


@functools.lru_cache(maxsize=64)
def token_blocks(clause: Clause) -> TokenBlocks | Refusal:
    """What `words_of_a_spec` said, of clauses where all tokens or half of them are salient; why the clause is another."""
    said, block = dict(clause.options), clause.count("block")
    if not block or said.keys() - set(KEPT) or clause.expr("recent") != waiting_tokens(block):
        return Refusal("tokens are not rounded a block at a time, each full block but the last token's own", clause)
    loaded = [said.get(f"{side}_bits") for side in "kv"]
    if loaded == [None, None]:
        found = TokenBlocks(block, block, BITS[clause.word("k")], scales=clause.word("scales"))
    elif loaded == [Load(f"{side}_bits", (Index("b"), Index("h"), Index("k"))) for side in "kv"] and block % 2 == 0:
        found = TokenBlocks(block, block // 2, scales=clause.word("scales"))
    else:
        return Refusal("the salient tokens of a block are half of it or all", clause)
    if as_spec(f"softmax {found.words_of_a_spec}").cache != clause or f"int{found.high}" not in PER_BYTE:
        return Refusal(
            "the salient tokens of a block have 4 bits and others 2, keys by channel, values by token and balanced", clause
        )
    return found
