"""Attention over some of the keys: parts become the whole, and a part says what it leaves out, by their log-sum-exps alone.

    o = sum_p exp(lse_p - lse) o_p       lse = log sum_p exp(lse_p)            parts over keys that no other part has
    m = 1 - exp(lse_kept - lse_whole)    |o_kept - o_whole| <= 2 m max |v|

A part in which a query sees no key has a log-sum-exp of minus infinity, and counts for nothing; where all have, the output is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(output [B, H, Q, E], log-sum-exp [B, H, Q]) of each part -> those of all keys together."""
    lses = torch.stack([lse for _, lse in parts])
    whole = lses.logsumexp(0)
    shares = torch.where(lses == -torch.inf, torch.zeros_like(lses), (lses - whole).exp())  # an empty row: -inf - -inf is NaN
    found = [
        torch.where(share > 0, share, 0.0)[..., None] * torch.where(share[..., None] > 0, output, torch.zeros_like(output))
        for share, (output, _) in zip(shares.to(parts[0][0].dtype), parts, strict=True)
    ]
    return torch.stack(found).sum(0), whole


def dropped_mass(kept: Tensor, whole: Tensor) -> Tensor:
    """The softmax weight [B, H, Q] on keys that a part leaves out, from its log-sum-exp and that of all keys."""
    some = torch.where(whole == -torch.inf, torch.zeros_like(whole), whole)
    return torch.where(whole == -torch.inf, torch.zeros_like(whole), 1 - (kept - some).exp()).clamp(0, 1)


def output_bound(mass: Tensor, v: Tensor) -> Tensor:
    """How far an output can be from the whole one, [B, H, Q]: 2 m max|v|, the longest row of v [B, G, K, E] of any head."""
    return 2 * mass * v.norm(dim=-1).amax(-1).amax(-1)[:, None, None]
