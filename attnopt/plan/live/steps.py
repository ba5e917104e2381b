"""Whether a step of generation is faster on a cache that is kept otherwise, which a plan for time asks before it takes one.

    a live model, caches of 4,096 random tokens as they come and as cache(k=int8, v=int8)   ->   a step takes 0.80 of its time, taken

Caches are filled as they are, without a prompt: what a step takes does not hang on the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from attnopt.cost.workload import Workload
from attnopt.hosts.eviction.block_layer import BlockLayer
from attnopt.hosts.eviction.live_forms import live_form
from attnopt.hosts.module.layer_attention import LayerAttention
from attnopt.hosts.module.layers import NoAttention
from attnopt.hosts.module.widths import kept_heads, kept_keys
from attnopt.ir.clause import Clause
from attnopt.plan.live.codes import CodesChooser, held_by
from attnopt.plan.live.generating import BLOCK, STEPS, Used, in_blocks
from attnopt.plan.live.layers import FASTER
from attnopt.plan.timing.timing import Timing, counted

LONG = 1024  # tokens of a cache from which on codes may save time: on shorter ones rounding a token takes more than reading all

UNTIMED = "not every layer is known, so that no step could be timed"


def long_decode(workload: Workload | None) -> tuple[int, int]:
    """Sequences and tokens of the longest cache among the steps of a workload; no tokens where it is not LONG."""
    steps = [] if workload is None else [load for load in workload.loads if load.past >= LONG]
    longest = max(steps, key=lambda load: load.past, default=None)
    return (1, 0) if longest is None else (longest.batch, longest.past)


def timed_on(
    model: Any, chooser: CodesChooser, batch: int, length: int, pages: Clause | None = None
) -> Callable[[str], tuple[bool, str]]:
    """For the words of a clause: whether a plan for time takes it, and what was measured. pages: what the cache has without codes."""

    def timed(words: str) -> tuple[bool, str]:
        clause = live_form(words)
        assert clause is not None
        replace(chooser, length=length)(model, clause)
        layers = {**chooser.idle, **held_by(model)}
        times = step_times(
            layers, {"plain": Used(model, pages=pages, live=True), "kept": Used(model, codes=clause)}, batch, length
        )
        if times is None:
            return False, UNTIMED
        ratio = times["kept"].ratio(times["plain"])
        return ratio <= FASTER, f"a step takes {ratio:.2f} of its time on {length} tokens"

    return timed


@torch.no_grad()
def step_times(
    layers: Mapping[str, LayerAttention], used: Mapping[str, Used], batch: int, length: int, most: int = STEPS // BLOCK
) -> dict[str, Timing] | None:
    """Of a step of each, in turn, on caches of so many tokens; None where a layer is not known. layers: of the model, by path. most:
    rounds."""
    pasts = {name: filled(one, layers, batch, length) for name, one in used.items()}
    if any(cache is None for cache in pasts.values()):
        return None
    device = next(next(iter(used.values())).model.parameters()).device
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
    calls = {name: lambda name=name: used[name].step(ids, pasts[name]) for name in used}
    return in_blocks(calls, seconds=0.5, most=most, clock=counted())  # type: ignore[arg-type]


def filled(used: Used, layers: Mapping[str, LayerAttention], batch: int, length: int) -> Cache | None:
    """A cache of so many tokens; None where a layer is not known."""
    model, cache = used.model, used.empty()
    cache = DynamicCache(config=model.config) if cache is None else cache
    random = torch.Generator().manual_seed(length)
    parameter, written = next(model.parameters()), set()

    def rows(heads: int, width: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, width, generator=random).to(parameter.device, parameter.dtype)

    for path, held in sorted(layers.items(), key=lambda item: model.get_submodule(item[0]).layer_idx):
        module, call = model.get_submodule(path), held.call
        index = module.layer_idx
        held_by_layer = cache.layers[index] if index < len(cache.layers) else None
        take = held_by_layer.take if isinstance(held_by_layer, BlockLayer) else partial(cache.update, layer_idx=index)
        heads = kept_heads(module, call.key_heads), kept_heads(module, call.value_heads)
        take(rows(heads[0], kept_keys(module, call.width)), rows(heads[1], call.value_width))
        written.add(index)
    for module in model.modules():
        if isinstance(module, NoAttention) and module.layer_idx is not None:
            cache.update(rows(1, 1), rows(1, 1), module.layer_idx)
            written.add(module.layer_idx)
    return cache if written == set(range(model.config.get_text_config().num_hidden_layers)) else None
