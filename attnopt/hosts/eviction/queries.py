"""The queries of a live model on data, by layer, turned to their positions: what directions of queries are made from.

queries(model, batches, 3000) -> {layer: [H, n, D]}

Where a layer keeps narrower keys than its class makes them, queries have the channels of those keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.errors import InputMismatch
from attnopt.hosts.eviction.patches import watched
from attnopt.hosts.module.widths import cut_queries


class Watch:
    """Takes the queries of every attention that goes through transformers' interface, where there is no padding."""

    def __init__(self) -> None:
        self.counted: Tensor | None = None
        self.found: dict[int, list[Tensor]] = {}
        self.key_heads: dict[int, int] = {}

    def attend(self, function: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, *rest: Any, **given: Any) -> Any:
        index = getattr(module, "layer_idx", None)
        if index is not None and self.counted is not None and self.counted.shape == (q.shape[0], q.shape[2]):
            rows = cut_queries(module, q.detach()).transpose(1, 2)[self.counted]
            self.found.setdefault(int(index), []).append(rows.float().cpu())
            self.key_heads[int(index)] = k.shape[1]
        return function(module, q, k, *rest, **given)


@torch.no_grad()
def queries(model: nn.Module, batches: Iterable[Any], samples: int, seed: int = 0) -> tuple[dict[int, Tensor], dict[int, int]]:
    """By layer: at most `samples` queries of each head, drawn at random, [H, n, D]; and how many key heads they read.

    batches: token ids [B, L] or [L], or named inputs with input_ids and perhaps attention_mask. Raises InputMismatch where none are seen.
    """
    watch, random = Watch(), torch.Generator().manual_seed(seed)
    with watched(watch):
        for batch in batches:
            named: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {"input_ids": torch.atleast_2d(batch)}
            mask = named.get("attention_mask")
            watch.counted = torch.ones_like(named["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
            model(**named, use_cache=False)
    if not watch.found:
        raise InputMismatch(
            "no queries were seen: no batch, or no attention goes through transformers' AttentionInterface",
            next_move="Give batches of token ids [B, L].",
        )
    made = {}
    for index, parts in watch.found.items():
        rows = torch.cat(parts)  # [n, H, D]
        drawn = torch.randperm(len(rows), generator=random)[:samples]
        made[index] = rows[drawn].transpose(0, 1).contiguous()
    return made, watch.key_heads
