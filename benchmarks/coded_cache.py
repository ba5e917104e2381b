"""A step of generation on a cache in codes beside one on a cache of float32: by the kernel that reads codes, and by reading them back.

    code-lm, 256 to 4,096 tokens in the cache     float32 | int8, int4, akvq-vl, zip-cache: read back by torch | read by the kernel

All are live models of one plan, which differ in their cache; steps are taken in turn, each makes the cache a token longer. Bytes are those
that the cache holds for each token behind the last step, empty places counted.

    OMP_NUM_THREADS=1 python benchmarks/coded_cache.py [--models code-lm llama] [--forms akvq-vl zip-cache] [--lengths 256 1024 4096]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
from generation.subjects import NAMES, subject

import attnopt
from attnopt.cost.machine import clock
from attnopt.hosts.eviction.coded import bytes_per_token
from attnopt.hosts.module.copying import shared_copy
from attnopt.ir.token_blocks import TokenBlocks
from attnopt.passes.edits.caches.state import clause
from attnopt.passes.kvcache.akvq_vl import AkvqVl
from attnopt.plan.live.codes import held_by
from attnopt.plan.timing.timing import in_turn

PLAIN = "float32"
FORMS = {
    "int8": "int8",
    "int4": "cache(k=int4, v=int4, group=32, scales=fp16)",
    "akvq-vl": str(clause(dict.fromkeys("kv", AkvqVl().kept(of_text=False)))),
    "zip-cache": TokenBlocks(100, 50).words_of_a_spec,
}


@dataclass(frozen=True)
class Row:
    """seconds: of a step (medians); ratio: times the step on float32, in turn with it; bytes of a token. By contender."""

    model: str
    length: int
    seconds: dict[str, float]
    ratio: dict[str, float]
    bytes: dict[str, float]


def columns_of(forms: Sequence[str]) -> tuple[str, ...]:
    return (PLAIN, *(f"{form}, {way}" for form in forms for way in ("read back", "kernel")))


def contenders(name: str, small: bool, forms: Sequence[str]) -> dict[str, Any]:
    """Live models that share their weights and their kernels for numbers."""
    made = {PLAIN: attnopt.optimize(subject(name, small=small), select="model" if small else "measure")}
    for form in forms:
        words = FORMS[form]
        back, kernel = shared_copy(made[PLAIN]), shared_copy(made[PLAIN])
        back.choose_codes = None
        back.cache_codes = kernel.cache_codes = words
        made |= {f"{form}, read back": back, f"{form}, kernel": kernel}
        print(*(n for n in kernel.report.notes if n.startswith("live, decode on codes")), flush=True)
        for each in held_by(kernel).values():
            assert each.on_codes is not None
            assert each.on_codes.run is not None, each.on_codes.why
    return made


@torch.no_grad()
def measured(name: str, models: dict[str, Any], length: int, seconds: float) -> Row:
    ids = torch.randint(3, 4096, (1, length), generator=torch.Generator().manual_seed(length))
    pasts = {each: model(ids, use_cache=True, logits_to_keep=1).past_key_values for each, model in models.items()}

    def step(each: str) -> None:
        models[each](ids[:, -1:], past_key_values=pasts[each], use_cache=True)

    times = in_turn({each: lambda each=each: step(each) for each in models}, seconds=seconds, clock=clock())  # type: ignore[misc]
    return Row(
        name, length, {each: t.median for each, t in times.items()}, {each: t.ratio(times[PLAIN]) for each, t in times.items()},
        {each: bytes_per_token(past) for each, past in pasts.items()},
    )  # fmt: skip


def table(rows: list[Row], forms: Sequence[str]) -> str:
    lines = []
    ways = columns_of(forms)
    for row in rows:
        cells = [f"{row.seconds[c] * 1e3:.2f} ({row.ratio[c]:.2f})" for c in ways]
        kept = " / ".join(f"{row.bytes[c]:.0f}" for c in (PLAIN, *(f"{form}, kernel" for form in forms)))
        lines.append([row.model, f"{row.length:,}", *cells, kept])
    columns = ("model", "tokens", *(f"{c}, ms" for c in ways), f"bytes a token, {PLAIN} / {' / '.join(forms)}")
    return harness.markdown(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["code-lm"])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small layers, a short prompt; nothing is written")
    parser.add_argument("--anyway", action="store_true", help="also on a loaded machine")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    busy = harness.busy_share() if given.anyway or given.quick else harness.require_quiet()
    rows = []
    for name in given.models:
        models = contenders(name, given.quick, given.forms)
        for length in [48] if given.quick else given.lengths:
            rows.append(measured(name, models, length, 0.05 if given.quick else 1.0))
            print(table(rows[-1:], given.forms), flush=True)
    notes = [
        f"{harness.machine()['processor']}, {given.threads} threads; other processes used {busy:.2f} cores",
        "medians of steps in turn; in brackets times the step on float32. On one thread the clock counts this process alone",
    ]
    print(table(rows, given.forms), *notes, sep="\n")
    if not given.quick:
        path = harness.save("coded_cache", rows, notes, {"threads": given.threads})
        asked = f"OMP_NUM_THREADS={given.threads} python benchmarks/coded_cache.py --models {' '.join(given.models)}"
        asked += "" if given.forms == list(FORMS) else f" --forms {' '.join(given.forms)}"
        head = f"# A step on a cache in codes\n\n`{asked}`\n\n"
        path.with_suffix(".md").write_text(head + table(rows, given.forms) + "\n" + "\n".join(f"- {n}" for n in notes) + "\n")


if __name__ == "__main__":
    main()
