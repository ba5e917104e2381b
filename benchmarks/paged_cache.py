"""A step of generation that reads the pages of the cache that it chooses, beside one that reads all, in live models.

    llama, 4,096 and 16,384 tokens in the cache     as transformers keeps it | in rooms, read whole | pages: 1,024 or 256 tokens read

All are live models of one plan, which differ in their cache; steps are taken in turn, each makes the cache a token longer. Caches are
filled with random numbers: what a step takes does not hang on them. Read whole in the rooms that pages stand in, a cache does not move
when a token comes, and nothing is lost: what choosing gains is beside that. What it loses is in results/sparsify.md.

    OMP_NUM_THREADS=1 python benchmarks/paged_cache.py [--models code-lm llama] [--lengths 1024 4096 16384] [--quick] [--anyway]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from generation.steps import Row, arguments, run, timed
from generation.subjects import NAMES, subject

import attnopt
from attnopt.hosts.eviction.paged import page_choice
from attnopt.hosts.module.copying import shared_copy
from attnopt.plan.live.codes import held_by
from attnopt.plan.live.generating import Used
from attnopt.plan.live.steps import filled

PLAIN, ROOMS = "transformers' cache", "in rooms, read whole"
CHOICES = {
    "1,024 tokens, each head": "pages(16, 64, recent=1)",
    "1,024 tokens, together": "pages(16, 64, recent=1, group=max)",
    "256 tokens, together": "pages(16, 16, recent=1, group=max)",
}
COLUMNS = (PLAIN, ROOMS, *CHOICES)


def contenders(name: str, small: bool) -> dict[str, Used]:
    """Live models that share their weights and their kernels for a cache that is read whole."""
    base: Any = attnopt.optimize(subject(name, small=small), select="model" if small else "measure")
    plain = shared_copy(base)
    plain.__class__ = type(base).__mro__[2]  # the class of transformers, which gives no cache a room
    made = {PLAIN: Used(plain), ROOMS: Used(base, pages=page_choice(CHOICES["256 tokens, together"]))}
    for each, words in CHOICES.items():
        model = shared_copy(base)
        model.choose_pages = replace(base.choose_pages, dense=0) if small else base.choose_pages  # small: of two layers
        model.cache_pages = words
        assert any(held.on_pages and held.on_pages.run for held in held_by(model).values())
        made[each] = Used(model, pages=page_choice(words))
    return made


@torch.no_grad()
def measured(name: str, used: dict[str, Used], length: int, seconds: float) -> Row:
    layers = {**used[PLAIN].model.choose_pages.idle, **held_by(used[PLAIN].model)}
    pasts = {each: filled(one, layers, 1, length) for each, one in used.items()}
    ids = torch.ones(1, 1, dtype=torch.long)
    return timed(name, length, {each: lambda each=each: used[each].step(ids, pasts[each]) for each in used}, pasts, seconds)  # type: ignore[misc]


def main() -> None:
    given = arguments(__doc__, NAMES, "llama", (1024, 4096, 16384)).parse_args()
    kept = {PLAIN: "transformers'", ROOMS: "in rooms", list(CHOICES)[-1]: "with bounds"}

    def rows_of(name: str) -> Callable[[int, float], Row]:
        used = contenders(name, given.quick)
        return lambda length, seconds: measured(name, used, length, seconds)

    more = [
        "the first two layers read all, as in the source; together: heads that share keys choose by the largest of their bounds"
    ]
    run(given, "paged_cache", "A step on a cache in pages", kept, rows_of, quick=1100, more=more)


if __name__ == "__main__":
    main()
