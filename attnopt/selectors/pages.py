"""pages(size, n): the n pages of a cache that may hold the largest scores, from the smallest and largest channel of each page.

    bound(page) = sum_c max(q_c low_c, q_c high_c) = relu(q) . high - relu(-q) . low   >=   q . k for every k of the page

The two products read 2 / size of what the keys are. The state is explicit: an operand that goes in, and comes out with the page that a
new key fell into. Query heads that share keys choose for themselves, as in the source, or together by the mean or the largest of their
bounds (group=mean, group=max), so that a page is read once for all of them. recent=r: the last r pages are among the n.

Source: "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.selections import top
from attnopt.selectors.pooling import for_heads, highest, lowest


@dataclass(frozen=True, eq=False)
class PageState:
    """low, high [B, G, P, D]: of each channel over the keys of a page so far; length: how many keys there are."""

    low: Tensor
    high: Tensor
    length: int


def state_of(k: Tensor, size: int) -> PageState:
    """The state of keys k [B, G, K, D] in pages of `size`."""
    return PageState(lowest(k, size), highest(k, size), k.shape[2])


def extended(state: PageState, k: Tensor, size: int) -> PageState:
    """The state after more keys k [B, G, N, D]; reads no key that is there already."""
    low, high, length = state.low, state.high, state.length
    room = -length % size
    first, rest = k[:, :, :room], k[:, :, room:]
    if first.shape[2]:
        last_low = torch.minimum(low[:, :, -1:], first.amin(2, keepdim=True))
        last_high = torch.maximum(high[:, :, -1:], first.amax(2, keepdim=True))
        low, high = torch.cat([low[:, :, :-1], last_low], 2), torch.cat([high[:, :, :-1], last_high], 2)
    if rest.shape[2]:
        low, high = torch.cat([low, lowest(rest, size)], 2), torch.cat([high, highest(rest, size)], 2)
    return PageState(low, high, length + k.shape[2])


def bounds(q: Tensor, state: PageState) -> Tensor:
    """The largest that a score may be on each page, before scaling: q [B, H, Q, D] -> [B, H, Q, P]."""
    low, high = (for_heads(x, q.shape[1]).transpose(-1, -2) for x in (state.low, state.high))
    return q.clamp(min=0) @ high - (-q).clamp(min=0) @ low


def seen(clause: Clause, q: Tensor, k: Tensor, first: int = 0) -> Tensor:
    """The keys that each query of a prompt sees, as if it were the newest: q [B, H, Q, D] from position `first` on -> bool [B, H, Q, K].

    Pages that are full before a query have no later key; its own is among the `recent` ones, of which there must be one.
    """
    size, recent, groups = clause.count(0), clause.count("recent"), k.shape[1]
    found = bounds(q, state_of(k, size))
    if clause.word("group") != "none":
        apart = found.unflatten(1, (groups, -1))
        together = apart.amax(2) if clause.word("group") == "max" else apart.mean(2)
        found = together.repeat_interleave(q.shape[1] // groups, 1)
    at = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    own, pages = at // size, torch.arange(found.shape[-1], device=q.device)
    found = found.masked_fill((pages <= own) & (pages > own - recent), torch.inf).masked_fill(pages > own, -torch.inf)
    shown = top(found, clause.count(1)).repeat_interleave(size, -1)[..., : k.shape[2]]
    return shown & (torch.arange(k.shape[2], device=q.device) <= at)


def choose(clause: Clause, q: Tensor, state: PageState) -> Tensor:
    """Which pages the newest query sees: q [B, H, 1, D] -> bool [B, H, P], or [B, G, P] where the heads of a group choose together."""
    found = bounds(q, state)[:, :, 0]
    groups = state.low.shape[1]
    if clause.word("group") != "none":
        apart = found.unflatten(1, (groups, -1))
        found = apart.amax(2) if clause.word("group") == "max" else apart.mean(2)
    recent = clause.count("recent")
    if recent:
        found = found.index_fill(-1, torch.arange(max(0, found.shape[-1] - recent), found.shape[-1], device=q.device), torch.inf)
    return top(found, clause.count(1))
