"""What generation asks of a model that was traced on a prompt, and how long the live model takes for it.

    decode:1024x8   ->   a prompt of one token for each of 8 sequences          first token 21 ms, then 4.8 ms each

A live model's rewrites change weights and layers, and a step that reads one token goes through the same ones as a prompt of one token.
What its attention reads of the cache is missing there. It is the same before and after, but where heads or layers go: their gain is
understated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from attnopt.cost.workload import Load, Workload, parse_workload
from attnopt.hosts.eviction.chosen import ChosenPolicy
from attnopt.hosts.eviction.coded import bytes_per_token, fresh, in_codes
from attnopt.hosts.eviction.in_rooms import in_rooms
from attnopt.hosts.eviction.paged import Choosing, in_pages
from attnopt.hosts.module.model import choosing
from attnopt.ir.by_layer import CacheForm
from attnopt.ir.clause import Clause
from attnopt.plan.timing.timing import Timing, in_turn

TOKENS = 128  # that are generated behind a prompt, where nobody says how many
STEPS = 50  # that are timed, at most
BLOCK = 5  # steps of one model before the next one's turn: a step behind another model's finds the processor full of that
SECONDS = 0.5  # of timing, for each model and phase


def usual(length: int) -> Workload:
    """A prompt of so many tokens, and as many calls for one more token as TOKENS."""
    return parse_workload(f"prefill:{length} decode:{length}@{TOKENS}")


def on_prompts(workload: Workload) -> Workload:
    """The same with a prompt of one token in place of each decoding step; it prints as before."""
    loads = tuple(Load("prefill", load.batch, 1, 0, load.weight) if load.past else load for load in workload.loads)
    return replace(workload, loads=loads, text=str(workload))


@dataclass(frozen=True)
class Used:
    """A model as it is used: with its cache policy, its cache in codes, or the choice of pages that its layers have a kernel for.

    live: whether it is one, whose long caches have rooms without any of these."""

    model: Any
    policy: ChosenPolicy | None = None
    codes: CacheForm | None = None
    pages: Clause | None = None
    live: bool = False

    def read(self, ids: Tensor) -> Any:
        """The cache behind a prompt."""
        with self.session():
            return self.model(ids, past_key_values=self.empty(), use_cache=True).past_key_values

    def step(self, ids: Tensor, past: Any) -> None:
        self.form(past, True)  # as a live model does for each call
        with self.session():
            self.model(ids, past_key_values=past, use_cache=True)

    def session(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.policy is None else self.policy.session()

    @cached_property
    def choosing(self) -> dict[int, Choosing]:
        return choosing(self.model)

    def form(self, cache: Any, hands: bool) -> None:
        """Makes a cache one as it is asked for; under a policy, or without a form, it is left as it is."""
        if self.policy is not None:
            return
        if self.codes is not None:
            in_codes(cache, self.codes, hands_codes=hands)
        elif self.pages is not None:
            in_pages(cache, self.choosing, hands_pages=hands)
        elif self.live:
            in_rooms(cache)

    def empty(self) -> Any:
        """None where the model makes its own."""
        if self.codes is not None:
            return fresh(self.model, self.codes)
        if self.pages is None:
            return None
        cache = DynamicCache(config=self.model.config)
        self.form(cache, False)
        return cache


@dataclass(frozen=True)
class Pace:
    """Seconds to the first token behind a prompt, and for each further one; bytes of cache that each token of the prompt takes."""

    first: float
    step: float
    cache: float = 0.0

    def __str__(self) -> str:
        said = f"{1e3 * self.first:.3g} ms to the first token, then {1 / self.step:.3g} tokens a second"
        return f"{said}, {self.cache:.0f} bytes of cache a token" if self.cache else said


@torch.no_grad()
def paces(models: Mapping[str, Used], ids: Tensor, seconds: float = SECONDS) -> dict[str, Pace]:
    """Of each model, in turn, on a prompt [1, L].

    A step is timed on a cache that holds the prompt, and makes it a token longer, as generation does: by about a hundred in all. Where the
    model has no positions for these, the cache holds the first part of the prompt.
    """
    pasts: dict[str, Any] = {}

    def read(name: str) -> None:
        pasts[name] = models[name].read(ids)

    def step(name: str) -> None:
        models[name].step(ids[:, -1:], pasts[name])

    first = in_turn({name: lambda name=name: read(name) for name in models}, seconds=seconds)  # type: ignore[misc]
    held = {name: bytes_per_token(past) for name, past in pasts.items()}
    kept, most, block = room_to_step(min(positions_of(used.model) for used in models.values()), ids.shape[1])
    if kept < ids.shape[1]:
        pasts = {name: used.read(ids[:, :kept]) for name, used in models.items()}
    steps = in_blocks({name: lambda name=name: step(name) for name in models}, seconds, most, block)  # type: ignore[misc]
    return {name: Pace(first[name].median, steps[name].median, held[name]) for name in models}


def positions_of(model: Any) -> int:
    """How many a model was made for; those that are learned end there."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def room_to_step(positions: int, length: int) -> tuple[int, int, int]:
    """Of a prompt so many tokens, how many rounds of timing have their positions behind it, and how many steps a round has.

    Before the rounds that count there may be as many for warming up, and one.
    """
    kept = min(length, max(positions // 2, positions - 2 * STEPS - BLOCK))
    left = positions - kept
    block = BLOCK if left >= 7 * BLOCK else 1  # three rounds, three to warm up and one
    return kept, max(1, min(STEPS // block, (left // block - 1) // 2)), block


def in_blocks(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    most: int = STEPS // BLOCK,
    block: int = BLOCK,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times of one call of each, which are made `block` at a time, in turn."""

    def several(call: Callable[[], object]) -> None:
        for _ in range(block):
            call()

    times = in_turn(
        {n: partial(several, call) for n, call in calls.items()}, seconds=seconds, least=min(5, most), most=most, clock=clock
    )
    return {name: Timing(tuple(x / block for x in found.runs)) for name, found in times.items()}


def spoken(measured: Mapping[str, Pace], foretold: Mapping[str, Pace], length: int) -> list[str]:
    """Lines of a report: what was measured, and beside it what the cost model predicts of the same."""
    said = []
    for word, found in (("measured", measured), ("predicted", foretold)):
        if found:
            said.append(f"{word} on a prompt of {length}: " + "; ".join(f"{name}, {pace}" for name, pace in found.items()))
    return said
