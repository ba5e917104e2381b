"""A step of generation that reads the pages of the cache that it chooses, beside one that reads all, in live models.

    llama, 4,096 and 16,384 tokens in the cache     as transformers keeps it | in rooms, read whole | pages: 1,024 or 256 tokens read

All are live models of one plan, which differ in their cache; steps are taken in turn, each makes the cache a token longer. Caches are
filled with random numbers: what a step takes does not hang on them. Read whole in the rooms that pages stand in, a cache does not move
when a token comes, and nothing is lost: what choosing gains is beside that. What it loses is in results/sparsify.md.

    OMP_NUM_THREADS=1 python benchmarks/paged_cache.py [--models code-lm llama] [--lengths 1024 4096 16384] [--quick] [--anyway]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import harness
import torch
from generation.subjects import NAMES, subject

import attnopt
from attnopt.cost.machine import clock
from attnopt.hosts.eviction.coded import bytes_per_token
from attnopt.hosts.eviction.paged import page_choice
from attnopt.hosts.module.copying import shared_copy
from attnopt.plan.live.codes import held_by
from attnopt.plan.live.generating import Used
from attnopt.plan.live.steps import filled
from attnopt.plan.timing.timing import in_turn

PLAIN, ROOMS = "transformers' cache", "in rooms, read whole"
CHOICES = {
    "1,024 tokens, each head": "pages(16, 64, recent=1)",
    "1,024 tokens, together": "pages(16, 64, recent=1, group=max)",
    "256 tokens, together": "pages(16, 16, recent=1, group=max)",
}
COLUMNS = (PLAIN, ROOMS, *CHOICES)


@dataclass(frozen=True)
class Row:
    """seconds: of a step (medians); ratio: times the step on transformers' cache, in turn with it; bytes of a token. By contender."""

    model: str
    length: int
    seconds: dict[str, float]
    ratio: dict[str, float]
    bytes: dict[str, float]


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

    def step(each: str) -> None:
        used[each].step(ids, pasts[each])

    times = in_turn({each: lambda each=each: step(each) for each in used}, seconds=seconds, clock=clock())  # type: ignore[misc]
    return Row(
        name, length, {each: t.median for each, t in times.items()}, {each: t.ratio(times[PLAIN]) for each, t in times.items()},
        {each: bytes_per_token(past) for each, past in pasts.items() if past is not None},
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        cells = [f"{row.seconds[c] * 1e3:.2f} ({row.ratio[c]:.2f})" for c in COLUMNS]
        kept = " / ".join(f"{row.bytes[c]:.0f}" for c in (PLAIN, ROOMS, COLUMNS[-1]))
        lines.append([row.model, f"{row.length:,}", *cells, kept])
    columns = ("model", "tokens", *(f"{c}, ms" for c in COLUMNS), "bytes a token, transformers' / in rooms / with bounds")
    return harness.markdown(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["llama"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small layers, a short cache; nothing is written")
    parser.add_argument("--anyway", action="store_true", help="also on a loaded machine")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    busy = harness.busy_share() if given.anyway or given.quick else harness.require_quiet()
    rows = []
    for name in given.models:
        used = contenders(name, given.quick)
        for length in [1100] if given.quick else given.lengths:
            rows.append(measured(name, used, length, 0.05 if given.quick else 1.5))
            print(table(rows[-1:]), flush=True)
    notes = [
        f"{harness.machine()['processor']}, {given.threads} threads; other processes used {busy:.2f} cores",
        "medians of steps in turn; in brackets times the step on transformers' cache. On one thread the clock counts this process alone",
        "the first two layers read all, as in the source; together: heads that share keys choose by the largest of their bounds",
        "bytes behind the last step, places that are empty counted",
    ]
    print(table(rows), *notes, sep="\n")
    if not given.quick:
        path = harness.save("paged_cache", rows, notes, {"threads": given.threads})
        asked = f"OMP_NUM_THREADS={given.threads} python benchmarks/paged_cache.py --models {' '.join(given.models)}"
        head = f"# A step on a cache in pages\n\n`{asked}`\n\n"
        path.with_suffix(".md").write_text(head + table(rows) + "\n" + "\n".join(f"- {n}" for n in notes) + "\n")


if __name__ == "__main__":
    main()
