"""A step of generation whose keys are narrow in the cache and lifted when they are read, beside one on whole keys.

    code-lm, 256 to 4,096 tokens in the cache     whole keys | a half of their channels | a quarter

All are live models of one plan; bases are random, because what a step takes does not hang on the numbers. Steps are taken in turn, each
makes the cache a token longer.

    OMP_NUM_THREADS=1 python benchmarks/lifted_keys.py [--models code-lm llama] [--lengths 256 1024 4096] [--quick] [--anyway]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import harness
import torch
from generation.subjects import NAMES, subject

import attnopt
from attnopt.cost.machine import clock
from attnopt.hosts.eviction.coded import bytes_per_token
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.widths import narrow
from attnopt.plan.timing.timing import in_turn

WHOLE = "whole"
SHARES = {"a half": 2, "a quarter": 4}
COLUMNS = (WHOLE, *SHARES)


@dataclass(frozen=True)
class Row:
    """seconds: of a step (medians); ratio: times the step on whole keys, in turn with it; bytes of a token. By contender."""

    model: str
    length: int
    seconds: dict[str, float]
    ratio: dict[str, float]
    bytes: dict[str, float]


def contenders(name: str, small: bool) -> dict[str, Any]:
    """Live models of the Llama family that share their weights."""
    made = {WHOLE: attnopt.optimize(subject(name, small=small), select="model" if small else "measure")}
    config = made[WHOLE].config
    heads, width = config.num_key_value_heads, config.head_dim
    turn = {"dims": width, "first": 0, "interleaved": False, "inv_freq": made[WHOLE].model.rotary_emb.inv_freq.tolist()}
    for share, part in SHARES.items():
        made[share] = shared_copy(made[WHOLE])
        for layer in made[share].model.layers:
            up = torch.linalg.qr(torch.randn(heads, width, width)).Q[..., : width // part].mT.contiguous()
            narrow(layer.self_attn, width // part, width, width, {**turn, "scaling": 1.0}, up)
    return made


@torch.no_grad()
def measured(name: str, models: dict[str, Any], length: int, seconds: float) -> Row:
    ids = torch.randint(3, 4096, (1, length), generator=torch.Generator().manual_seed(length))
    pasts = {each: model(ids, use_cache=True, logits_to_keep=1).past_key_values for each, model in models.items()}

    def step(each: str) -> None:
        models[each](ids[:, -1:], past_key_values=pasts[each], use_cache=True)

    times = in_turn({each: lambda each=each: step(each) for each in models}, seconds=seconds, clock=clock())  # type: ignore[misc]
    return Row(
        name, length, {each: t.median for each, t in times.items()}, {each: t.ratio(times[WHOLE]) for each, t in times.items()},
        {each: bytes_per_token(past) for each, past in pasts.items()},
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        cells = [f"{row.seconds[c] * 1e3:.2f} ({row.ratio[c]:.2f})" for c in COLUMNS]
        lines.append([row.model, f"{row.length:,}", *cells, " / ".join(f"{row.bytes[c]:.0f}" for c in COLUMNS)])
    columns = ("model", "tokens", *(f"{c}, ms" for c in COLUMNS), f"bytes a token, {' / '.join(COLUMNS)}")
    return harness.markdown(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[n for n in NAMES if n in ("code-lm", "llama")], default=["code-lm"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small layers, a short prompt; nothing is written")
    parser.add_argument("--anyway", action="store_true", help="also on a loaded machine")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    busy = harness.busy_share() if given.anyway or given.quick else harness.require_quiet()
    rows = []
    for name in given.models:
        models = contenders(name, given.quick)
        for length in [48] if given.quick else given.lengths:
            rows.append(measured(name, models, length, 0.05 if given.quick else 1.0))
            print(table(rows[-1:]), flush=True)
    notes = [
        f"{harness.machine()['processor']}, {given.threads} threads; other processes used {busy:.2f} cores",
        "medians of steps in turn; in brackets times the step on whole keys. On one thread the clock counts this process alone",
    ]
    print(table(rows), *notes, sep="\n")
    if not given.quick:
        path = harness.save("lifted_keys", rows, notes, {"threads": given.threads})
        asked = f"OMP_NUM_THREADS={given.threads} python benchmarks/lifted_keys.py --models {' '.join(given.models)}"
        head = f"# A step on keys that are lifted when they are read\n\n`{asked}`\n\n"
        path.with_suffix(".md").write_text(head + table(rows) + "\n" + "\n".join(f"- {n}" for n in notes) + "\n")


if __name__ == "__main__":
    main()
