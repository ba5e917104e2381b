"""What benchmarks of one step of generation share: contenders that differ in their cache take steps in turn, on caches of several
lengths.

{"float32": step, "int8, kernel": step}   ->   Row: seconds of each, times the first, bytes of a token   ->   results/<name>.json, .md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness

from attnopt.cost.machine import clock
from attnopt.hosts.eviction.coded import bytes_per_token
from attnopt.plan.live.generating import BLOCK, in_blocks


@dataclass(frozen=True)
class Row:
    """seconds: of a step (medians); ratio: times the first contender's, in turn with it; bytes of a token. By contender."""

    model: str
    length: int
    seconds: dict[str, float]
    ratio: dict[str, float]
    bytes: dict[str, float]


def timed(name: str, length: int, steps: Mapping[str, Callable[[], Any]], pasts: Mapping[str, Any], seconds: float) -> Row:
    """pasts: the cache of each, which its steps make longer; bytes are those behind the last one, empty places counted."""
    times = in_blocks(steps, seconds=seconds, clock=clock())
    first = times[next(iter(steps))]
    return Row(
        name, length, {each: t.median for each, t in times.items()}, {each: t.ratio(first) for each, t in times.items()},
        {each: bytes_per_token(past) for each, past in pasts.items()},
    )  # fmt: skip


@torch.no_grad()
def behind_a_prompt(name: str, models: Mapping[str, Any], length: int, seconds: float) -> Row:
    """Of models that each read a random prompt of so many tokens first."""
    ids = torch.randint(3, 4096, (1, length), generator=torch.Generator().manual_seed(length))
    pasts = {each: model(ids, use_cache=True, logits_to_keep=1).past_key_values for each, model in models.items()}

    def step(each: str) -> None:
        models[each](ids[:, -1:], past_key_values=pasts[each], use_cache=True)

    return timed(name, length, {each: lambda each=each: step(each) for each in models}, pasts, seconds)  # type: ignore[misc]


def table(rows: Sequence[Row], kept: Mapping[str, str]) -> str:
    """kept: the contenders whose bytes are told, and how they are called there."""
    ways = tuple(rows[0].seconds)
    lines = []
    for row in rows:
        cells = [f"{row.seconds[c] * 1e3:.2f} ({row.ratio[c]:.2f})" for c in ways]
        lines.append([row.model, f"{row.length:,}", *cells, " / ".join(f"{row.bytes[c]:.0f}" for c in kept)])
    columns = ("model", "tokens", *(f"{c}, ms" for c in ways), f"bytes a token, {' / '.join(kept.values())}")
    return harness.markdown(columns, lines)


def arguments(doc: str | None, names: Sequence[str], default: str, lengths: Sequence[int]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=names, default=[default])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(lengths))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small layers, a short cache; nothing is written")
    parser.add_argument("--anyway", action="store_true", help="also on a loaded machine")
    return parser


def run(
    given: argparse.Namespace,
    name: str,
    title: str,
    kept: Mapping[str, str],
    rows_of: Callable[[str], Callable[[int, float], Row]],
    *,
    quick: int = 48,
    more: Sequence[str] = (),
    asked: str = "",
) -> None:
    """rows_of(model)(length, seconds): a row. quick: the length of a trial. more: notes. asked: further options of the command."""
    torch.set_num_threads(given.threads)
    busy = harness.busy_share() if given.anyway or given.quick else harness.require_quiet()
    rows: list[Row] = []
    for model in given.models:
        measured = rows_of(model)
        for length in [quick] if given.quick else given.lengths:
            rows.append(measured(length, 0.05 if given.quick else 1.0))
            print(table(rows[-1:], kept), flush=True)
    notes = [
        f"{harness.machine()['processor']}, {given.threads} threads; other processes used {busy:.2f} cores",
        f"medians of steps, {BLOCK} in turn; in brackets times the step of the first. On one thread the clock counts this process alone",
        *more,
    ]
    print(table(rows, kept), *notes, sep="\n")
    if not given.quick:
        path = harness.save(name, rows, notes, {"threads": given.threads})
        command = f"OMP_NUM_THREADS={given.threads} python benchmarks/{name}.py --models {' '.join(given.models)}{asked}"
        lines = "\n".join(f"- {n}" for n in notes)
        path.with_suffix(".md").write_text(f"# {title}\n\n`{command}`\n\n{table(rows, kept)}\n{lines}\n")
