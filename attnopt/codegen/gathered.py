"""Queries that choose blocks each for itself, gathered by the block of keys that they chose, as the source computes them.

    softmax scale(s) causal block_topk(512, 3)
        ->   own block     softmax scale(s) causal & chunk(512)       all queries
             block j       softmax scale(s)                           those queries behind it that chose it, packed
             merged by their log-sum-exps (ir/partial says how)

Work is that of the pairs that were chosen, where a list of tiles visits what any of 64 neighbours chose. Query heads that share keys
are gathered together.

Source: "MoBA: Mixture of Block Attention for Long-Context LLMs".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.expr import Const, Term, conjunction
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.selectors.pooling import for_heads
from attnopt.selectors.select import select

Summed = tuple[Tensor, Tensor]  # an output and its log-sum-exp
POINTWISE = ("scale", "softcap", "mod")


@dataclass(frozen=True)
class Parts:
    """What a family computes with the log-sum-exp.

    plain: (spec, q [B, H, Q, D], k [B, G, K, D], v) -> [B, H, Q, E] and [B, H, Q]. packed: (spec, q [rows, 1, D], k [keys, 1, D], v,
    starts of sequences among the rows, and among the keys) -> [rows, 1, E] and [1, rows].
    """

    plain: Callable[[AttentionSpec, Tensor, Tensor, Tensor], Summed]
    packed: Callable[[AttentionSpec, Tensor, Tensor, Tensor, Tensor, Tensor], Summed]


def refuses(spec: AttentionSpec) -> Refusal | None:
    """None where parts of the keys can be computed apart, from queries that no longer stand where they stood."""
    clause = spec.selection
    if clause is None or clause.name != "block_topk" or clause.count("rows") > 1:
        return Refusal("queries do not choose blocks each for itself", spec)
    if spec.mask != Term("causal"):
        return Refusal(f"the mask is '{spec.mask}': behind its own block a query must see all", spec)
    if not 1 <= clause.count("recent") <= clause.count(1) - clause.count("first"):
        return Refusal(f"{clause} does not say that a query sees its own block", clause)
    if spec.normalizer.name != "softmax" or (odd := [slot for slot in spec.special if slot != "selection"]):
        return Refusal(f"it is no plain softmax: {odd[0] if spec.normalizer.name == 'softmax' else spec.normalizer}", spec)
    if any(c.name not in POINTWISE or (c.name == "scale" and not isinstance(c.expr(0), Const)) for c in spec.score):
        return Refusal("a score reads positions, which gathered queries do not have", spec)
    return None


def own(spec: AttentionSpec) -> AttentionSpec:
    """What all queries see of their own blocks."""
    assert spec.selection is not None
    return spec.with_(mask=conjunction(Term("causal"), Term("chunk", (spec.selection.count(0),))), selection=None, heads=None)


def behind(spec: AttentionSpec) -> AttentionSpec:
    """What gathered queries see of one block."""
    return spec.with_(mask=None, selection=None, heads=None)


def run_gathered(parts: Parts, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output [B, H, Q, E] for q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E]. Ask `refuses` first."""
    assert spec.selection is not None
    block, (batch, heads, length, width) = spec.selection.count(0), q.shape
    groups = max(k.shape[1], v.shape[1])
    k, v = for_heads(k, groups), for_heads(v, groups)
    output, lse = parts.plain(own(spec), q, k, v)
    each = select(spec, q, k, {}).each
    assert each is not None
    blocks = torch.arange(each.shape[-1], device=q.device)
    each = each & (blocks < torch.arange(length, device=q.device)[:, None] // block)
    # [B, G, blocks, heads of the group, Q]: sequences in the order of their keys
    chosen = each.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3)
    b, g, _, h, row = chosen.nonzero(as_tuple=True)
    rows = ((b * groups + g) * (heads // groups) + h) * length + row
    if not len(rows):
        return output
    q_starts = from_zero(chosen.sum((3, 4)).flatten())
    k_starts = torch.arange(batch * groups, device=q.device)[:, None] * k.shape[2] + blocks * block
    k_starts = torch.cat([k_starts.flatten(), k_starts.new_tensor([batch * groups * k.shape[2]])]).int()
    gathered = q.reshape(-1, 1, width).index_select(0, rows)
    found, sums = parts.packed(behind(spec), gathered, k.reshape(-1, 1, width), v.reshape(-1, 1, v.shape[3]), q_starts, k_starts)
    made = added(output.reshape(-1, v.shape[3]), lse.reshape(-1), found[:, 0], sums[0], rows)
    return made.view(output.shape)


def from_zero(counts: Tensor) -> Tensor:
    """int32 [n + 1]: where each of so many begins, and the end."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def added(output: Tensor, lse: Tensor, found: Tensor, sums: Tensor, rows: Tensor) -> Tensor:
    """`merged` of ir/partial where only some rows have more parts, any number: output [R, E], lse [R]; found [P, E] is of rows [P]."""
    whole = lse.scatter_reduce(0, rows, sums, "amax")
    weight, share = (lse - whole).exp(), (sums - whole[rows]).exp()
    total = weight.index_add(0, rows, share)
    mixed = (output * weight[:, None]).index_add_(0, rows, found * share[:, None])
    return (mixed / total[:, None]).to(output.dtype)
