"""One query against a cache whose tokens were rounded a block at a time: the sets of the blocks and the tokens that wait, together.

    softmax scale(s) cache(k=int4, v=int4, k_axis=channel, block=100, recent=size(k) - (size(k) - 1) // 100 * 100, v_balance=root, …)
        ->   salient tokens of full blocks, in 4 bits    o1, l1 = softmax scale(s) cache(k=int4, v=int4, k_axis=channel, block=50, …)
             their other tokens, in 2 bits               o2, l2 = softmax scale(s) cache(k=int2, v=int2, k_axis=channel, block=50, …)
             the tokens of no full block, exact          o3, l3 = softmax scale(s)
        o = sum_i exp(l_i) o_i / sum_i exp(l_i)          and of the last 100 tokens the weight that each was given

The sets come as `edits.caches.blocks` keeps them: bits and tokens of a set are what the sizes of its tensors say. One token came since the
blocks were written. The weights are what such a cache learns from which tokens are salient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.codegen.cache_pieces import Decode, sees_all
from attnopt.ir.expr import Const
from attnopt.ir.kv_cache import Cache, waiting_tokens
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.token_blocks import of_one_set

KEPT = ("k_axis", "block", "scales", "v_balance", "k", "v", "recent")  # what the clause of such a cache says


@dataclass(frozen=True)
class BlockPieces:
    """plain: the spec without its cache. block: tokens rounded together. scale: of the products. scales: the type of scales."""

    plain: AttentionSpec
    block: int
    scale: float
    scales: str

    def line(self, bits: int, tokens: int) -> str:
        """The spec of one set."""
        return written(self.plain, bits, tokens, self.scales)


@functools.lru_cache(maxsize=256)
def written(plain: AttentionSpec, bits: int, tokens: int, scales: str) -> str:
    return str(plain.with_(cache=of_one_set(bits, tokens, scales)))


@functools.lru_cache(maxsize=256)
def blocks_of(spec: AttentionSpec) -> BlockPieces | Refusal:
    """How a cache in blocks is read, or why it is not."""
    clause = spec.cache
    if clause is None:
        return Refusal("there is no cache", spec)
    if (refused := sees_all(spec)) is not None:
        return refused
    said, block = dict(clause.options), clause.count("block")
    if not block or clause.word("k_axis") != "channel" or clause.word("v_balance") != "root" or said.keys() - set(KEPT):
        return Refusal("tokens are not rounded a block at a time, keys by channel and values balanced", clause)
    if clause.expr("recent") != waiting_tokens(block):
        return Refusal("which tokens wait for a full block is not what recent= says", clause)
    plain, scale = AttentionSpec(spec.normalizer, score=spec.score), 1.0
    for part in spec.score:
        factor = part.expr(0)
        assert isinstance(factor, Const)
        scale *= float(factor.value)
    return BlockPieces(plain, block, scale, clause.word("scales"))


def attend_blocks(run: Decode, pieces: BlockPieces, q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """[B, H, 1, E + block]: the output of the newest query q [B, H, 1, D], then the weights that it gave the last `block` tokens.

    k: tokens [B, G, T, 0], of each set codes, scales and zeros, then the last `block` tokens; v the same, with the balance before them.
    Weights of places that no token has reached are 0. run: the kernel of a piece.
    """
    length, recent, last = k[0].shape[2], k[-1], v[-1]
    full = (length - 1) // pieces.block
    waiting = length - full * pieces.block
    o, lse = run(str(pieces.plain), q, Cache(*(x[:, :, x.shape[2] - waiting :] for x in (recent, last))))
    o = o.float()
    for at in range(1, len(k) - 1, 3) if full else ():
        (keys, k_scales, k_zeros), (values, v_scales, v_zeros) = (x[at : at + 3] for x in (k, v))
        line = pieces.line(8 * keys.shape[3] // q.shape[3], keys.shape[2] // full)
        more, sums = run(line, q, Cache(keys, values, k_scales, k_zeros, v_scales, v_zeros, v_balance=v[-2]))
        o = torch.lerp(o, more.float(), torch.sigmoid(sums - lse)[..., None])
        lse = torch.logaddexp(lse, sums)
    batch, heads = recent.shape[:2]
    rows = q.float().reshape(batch, heads, -1, q.shape[3])
    weights = torch.exp(rows @ recent.float().mT * pieces.scale - lse.reshape(batch, heads, -1, 1))
    if length < pieces.block:
        weights[..., : pieces.block - length] = 0.0
    return torch.cat([o, weights.reshape(batch, q.shape[1], 1, -1)], 3).to(q.dtype)
