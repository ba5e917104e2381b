"""The policy that `attnopt.optimize(model, policies=[…])` takes under a budget, on texts that it has not seen, beside every choice by hand.

    code-lm, recall     budgets 0.01, 0.05, …     for time: tokens alone leave     for memory: what stays may be in int8

Texts of 512 tokens, of which 384 are compressed and 128 read on: 36 are given to optimize (18 choose, 18 hold the budget), 24 others judge.
Loss: mean KL of what is read on, with a 95 % bound. By hand: each policy at each share, in each storage; the one of fewest bytes that stays
within the budget on the judging texts, which it was chosen by. Steps: tokens generated behind 384 with the policy and with the whole cache,
in turn; on one thread the clock counts this process alone.

    OMP_NUM_THREADS=1 python benchmarks/cache_policies.py [--quick] [--resume]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import harness
import torch
from eviction.subjects import PAIRS, code_lm, code_windows, recall_batch, recall_model
from torch import Tensor

import attnopt
from attnopt.cost.machine import clock
from attnopt.passes.kvcache.eviction import BY_NAME
from attnopt.plan.cache_choice import KEEPS, Weighed, measured
from attnopt.plan.live.evicting import PROMPT, STORES, with_filters
from attnopt.plan.timing.timing import in_turn

NAME = "cache_policies"
BUDGETS = (0.003, 0.01, 0.03, 0.1, 0.3)
GIVEN, JUDGING, LONG = 36, 24, 512


@dataclass(frozen=True)
class Row:
    """policy: what was taken, empty for none. share: bytes of those of the whole cache. loss, upper: on the judging texts; promised: the
    bound that optimize gave. hand, hand_share: the choice by hand. step: times that of the whole cache."""

    subject: str
    goal: str
    budget: float
    policy: str
    share: float
    loss: float
    upper: float
    promised: float
    hand: str
    hand_share: float
    step: float

    @property
    def key(self) -> tuple[str, str, float]:
        return self.subject, self.goal, self.budget


def subject(name: str) -> tuple[Any, Tensor, Tensor]:
    """A model, the texts that it is optimised on, and others."""
    if name == "code-lm":
        windows = code_windows(GIVEN + JUDGING, LONG)
        return code_lm(), windows[:GIVEN], windows[GIVEN:]
    tokens = recall_batch(
        GIVEN + JUDGING, PAIRS, round(PROMPT * LONG), seed=21
    ).tokens  # what follows the prompt are the questions
    return recall_model(), tokens[:GIVEN], tokens[GIVEN:]


def by_hand(model: Any, texts: Tensor, seen: Tensor) -> list[Weighed]:
    """Every policy, share and storage on the judging texts."""
    policies = [with_filters(kind(), model, seen, 0) for kind in BY_NAME.values()]
    chosen = [(p, keep, store) for p in policies for keep in KEEPS for store in STORES["memory"]]
    return list(measured(model, texts, round(PROMPT * texts.shape[1]), chosen, 4, 0))


@torch.no_grad()
def step_ratio(fast: Any, prompt: Tensor, seconds: float) -> float:
    """Seconds of a generated token with the policy, times those with the whole cache."""
    pasts, policy = {}, fast.cache_policy
    with policy.session():
        pasts["policy"] = fast(prompt).past_key_values
    pasts["whole"] = fast(prompt).past_key_values

    def step(name: str) -> None:
        if name == "whole":
            fast(prompt[:, -1:], past_key_values=pasts[name])
            return
        with policy.session():
            fast(prompt[:, -1:], past_key_values=pasts[name])

    times = in_turn({name: lambda name=name: step(name) for name in pasts}, seconds=seconds, clock=clock())  # type: ignore[misc]
    return times["policy"].ratio(times["whole"])


def row(name: str, goal: str, budget: float, seconds: float, known: dict[str, list[Weighed]]) -> Row:
    model, given, judging = subject(name)
    fast = attnopt.optimize(
        model, budget=budget, calibration=list(given.split(4)), passes=[], policies=list(BY_NAME), minimise=goal, select="model"
    )
    (said,) = [n for n in fast.report.notes if n.startswith(("cache policy", "no cache policy holds"))][:1]
    hand = [w for w in known[name] if w.loss.upper <= budget and w.store in STORES[goal]]
    best = min(hand, key=lambda w: (w.share, w.loss.mean), default=None)
    by = (str(best.chosen), best.share) if best is not None else ("", 1.0)
    policy = fast.cache_policy
    if policy is None:
        return Row(name, goal, budget, "", 1.0, 0.0, 0.0, 0.0, *by, 1.0)
    cut = round(PROMPT * judging.shape[1])
    (held,) = measured(model, judging, cut, [(policy.policy, policy.keep, policy.store)], 4, 0)
    promised = float(said.split("(at most ")[1].split()[0])
    ratio = step_ratio(fast, judging[:1, :cut], seconds)
    return Row(name, goal, budget, str(policy), held.share, held.loss.mean, held.loss.upper, promised, *by, ratio)


def table(rows: list[Row]) -> str:
    columns = ("model", "for", "budget", "taken", "of the bytes", "loss, at most", "promised", "by hand", "of the bytes", "step")
    lines = []
    for r in rows:
        lost = f"{r.loss:.3g}, {r.upper:.3g}" + ("" if r.upper <= r.budget else " (over)") if r.policy else ""
        lines.append([
            r.subject, r.goal, f"{r.budget:g}", r.policy or "the whole cache", f"{r.share:.3f}", lost,
            f"{r.promised:.3g}" if r.policy else "", r.hand or "none holds", f"{r.hand_share:.3f}", f"{r.step:.2f}",
        ])  # fmt: skip
    return harness.markdown(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one budget of each model; nothing is written")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[Row] = harness.kept(NAME, Row) if given.resume else []
    known: dict[str, list[Weighed]] = {}
    for name in ("code-lm", "recall"):
        for goal in ("time", "memory"):
            for budget in BUDGETS[2:3] if given.quick else BUDGETS:
                if (name, goal, budget) in {r.key for r in rows}:
                    continue
                if name not in known:
                    model, texts, judging = subject(name)
                    known[name] = by_hand(model, judging, texts)
                rows.append(row(name, goal, budget, 0.05 if given.quick else 1.0, known))
                print(table(rows[-1:]), flush=True)
                if not given.quick:
                    write(rows, given.threads)


def write(rows: list[Row], threads: int) -> None:
    over = sum(r.upper > r.budget for r in rows if r.policy)
    gap = math.prod(r.share / r.hand_share for r in rows) ** (1 / len(rows))
    notes = [
        f"{threads} threads. {len(rows)} budgets: the bound of the loss on unseen texts is over {over} of them, its mean over "
        f"{sum(r.loss > r.budget for r in rows)}. The choice by hand was made by the judging texts themselves",
        f"bytes of what was taken, beside those of the choice by hand: {gap:.2f} (geometric mean)",
    ]
    path = harness.save(NAME, rows, notes)
    head = f"# Cache policies under a budget\n\n`OMP_NUM_THREADS={threads} python benchmarks/cache_policies.py`\n\n"
    path.with_suffix(".md").write_text(head + table(rows) + "\n" + "\n".join(f"- {n}" for n in notes) + "\n")


if __name__ == "__main__":
    main()
