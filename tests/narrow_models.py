"""Live models whose heads are narrower than their class makes them, in bases of no meaning."""

from __future__ import annotations

from functools import lru_cache

import torch
from live_models import host_of

from attnopt.passes.edits.heads.writer import write
from attnopt.passes.factorize.eigen_attention import eigen
from attnopt.plan.live.converting import attach, changed, read_back
from attnopt.plan.options.groups import Grouping


def bases(heads: int, width: int, seed: int) -> torch.Tensor:
    made = torch.randn(heads, width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(made).Q


@lru_cache
def narrowed(family: str, keys: int, values: int):
    """(the graph, the live model) with heads of these widths in both layers, in bases of no meaning."""
    host = host_of(family)
    made = host.copy()
    for at, group in enumerate(Grouping(made).of("block")):
        (block,) = group.blocks
        heads, width = block.k.channels.shape
        write(group, eigen(block, bases(heads, width, at), bases(heads, width, at + 7), keys, values))
    made.finish()
    changes = read_back(host, made)
    assert isinstance(changes, list), str(changes)
    fast = changed(host.model, changes)
    attach(fast, {}, windows=False)
    return made, fast
