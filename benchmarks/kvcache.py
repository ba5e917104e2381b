"""Caches that forget: what each policy loses against the share of tokens that it keeps, beside random eviction, windows and kvpress.

    python benchmarks/kvcache.py [--quick] [--resume] [--kvpress <python of an environment with kvpress>]

code-lm: 36 held-out documents, one sample each; the cache of 512 tokens is compressed once, and the next 128 are read with what is left:
nats more than with the full cache. recall: 48 sequences of 32 pairs among 512 tokens, 64 questions each; the cache is compressed before
any question was seen, or behind 32 of them; share of right answers to keys that were not asked before, and by distance. streamed:
code-lm reads on 16 tokens at a time with a fixed room, evicting each time. agreement: of 12 documents. About twenty minutes on one thread;
a row is kept as soon as it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from eviction import subjects
from eviction.agreement import agreements
from eviction.subjects import Compressing, Recall, Subject
from harness import RESULTS, machine, markdown
from torch import Tensor

import attnopt
from attnopt.ir.eviction import Policy, Seen
from attnopt.passes.kvcache.eviction import ExpectedAttention, KeyNorm, SinksWindow, Snapkv

KEEPS = (0.5, 0.25, 0.125, 0.0625)
WINDOW = 16  # of SnapKV: the source's 32 is all that the least share of 512 tokens keeps
STREAMED, STEP = (128, 64), 16


@dataclass(frozen=True)
class Random(KeyNorm):
    """Keeps tokens by lot."""

    name: str = "random"
    whole: int = 0

    def scores(self, seen: Seen) -> Tensor:
        return torch.rand(seen.places.shape, generator=torch.Generator().manual_seed(seen.layer + seen.end))


@dataclass(frozen=True)
class Row:
    """value: the mean over samples; low, high: a 95 % bootstrap interval of it. held: share of the tokens that layers held on average."""

    subject: str
    method: str
    keep: float
    held: float
    value: float
    low: float
    high: float
    samples: int
    by_distance: dict[str, float] = field(default_factory=dict)


def policies(filters: Policy) -> dict[str, tuple[Policy, dict[str, Any]]]:
    return {
        "random": (Random(), {}),
        "window": (SinksWindow(sinks=0), {}),
        "sinks-window": (SinksWindow(), {}),
        "key-norm": (KeyNorm(), {}),
        "key-norm, all layers": (KeyNorm(whole=0), {}),
        "snapkv": (Snapkv(window=WINDOW), {}),
        "snapkv, int8": (Snapkv(window=WINDOW), {"store": "int8"}),
        "expected-attention": (ExpectedAttention(), {}),
        "expected-attention, heads share": (ExpectedAttention(adaptive=True, eps=0.01), {}),
        "q-filters": (filters, {}),
    }


def interval(values: Tensor) -> tuple[float, float]:
    drawn = values[torch.randint(len(values), (4000, len(values)), generator=torch.Generator().manual_seed(0))].mean(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return low, high


def row(subject: Subject, method: str, keep: float, values: Tensor, held: float, distance: dict[str, float]) -> Row:
    low, high = interval(values)
    return Row(subject.name, method, keep, held, float(values.mean()), low, high, len(values), distance)


def held_share(sessions: list[Any], prompt: int) -> float:
    """Of the prompt, what each head held on average behind it: the tokens that came later are not counted."""
    shares = []
    for session in sessions:
        for layer in session.layers.values():
            shares.append(float((layer.places < prompt).sum(-1).double().mean() / prompt))
    return sum(shares) / len(shares)


def measured(subject: Subject, method: str, keep: float, compressing: Compressing, whole: Tensor) -> Row:
    """whole: the loss of each document with the full cache."""
    logits, sessions = subject.logits(compressing)
    held = held_share(sessions, subject.prompt)
    if isinstance(subject, Recall):
        right = subjects.by_distance(subject, subject.right(logits))
        return row(subject, method, keep, subject.accuracy(logits), held, right)
    return row(subject, method, keep, (subjects.nats(subject, logits) - whole).double(), held, {})


@torch.no_grad()
def streamed(subject: Subject, room: int, policy: Policy, whole: Tensor) -> Tensor:
    """Nats more than with the full cache [N], of all tokens behind the first 128, read 16 at a time."""
    found = []
    for part in subject.tokens.split(12):
        made = []
        with attnopt.cache(policy, capacity=room, every=STEP):
            past = None
            for start in range(0, part.shape[1], STEP):
                places = torch.arange(start, min(part.shape[1], start + STEP))[None]
                out = subject.model(part[:, start : start + STEP], past_key_values=past, position_ids=places, use_cache=True)
                past = out.past_key_values
                made.append(out.logits)
        found.append(loss_behind(torch.cat(made, 1), part))
    return torch.cat(found) - whole


def loss_behind(logits: Tensor, tokens: Tensor, first: int = 128) -> Tensor:
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), tokens[:, 1:], reduction="none")
    return each[:, first:].mean(1).double()


def rows(quick: bool, done: set[tuple[str, str, float]], python: str) -> Iterator[Row]:
    keeps = KEEPS[1:2] if quick else KEEPS
    made: dict[int, Tensor] = {}
    for subject in (subjects.code(quick), subjects.recall(quick), subjects.recall(quick, 32)):
        filters = attnopt.query_filters(subject.model, subject.seen.split(4))
        made[subject.model.config.hidden_size] = torch.stack([filters.filters[i] for i in sorted(filters.filters)])
        full, _ = subject.logits(contextlib.nullcontext)
        whole = torch.zeros(0) if isinstance(subject, Recall) else subjects.nats(subject, full)
        if isinstance(subject, Recall) and (subject.name, "full", 1.0) not in done:
            right = subjects.by_distance(subject, subject.right(full))
            yield row(subject, "full", 1.0, subject.accuracy(full), 1.0, right)
        for keep in keeps:
            for method, (policy, given) in policies(filters).items():
                if (subject.name, method, keep) not in done:
                    yield measured(
                        subject, method, keep, lambda p=policy, k=keep, g=given: attnopt.cache(p, k, every=None, **g), whole
                    )
        if subject.name == "code-lm":
            yield from agreed(subject, filters, done, quick)
            yield from streams(subject, filters, done, STREAMED[:1] if quick else STREAMED)
    if python:
        yield from peers(python, quick, keeps, made, done)


def agreed(subject: Subject, filters: Policy, done: set[tuple[str, str, float]], quick: bool) -> Iterator[Row]:
    """How the order of scores agrees with the attention of the next tokens: of methods that keep a cache of their own order."""
    name = "code-lm, agreement"
    chosen = {m: p for m, (p, given) in policies(filters).items() if not given and "heads" not in m and m != "key-norm"}
    if all((name, method, 1.0) in done for method in chosen):
        return
    for method, values in agreements(subject, chosen, 4 if quick else 12).items():
        low, high = interval(values)
        yield Row(name, method, 1.0, 1.0, float(values.mean()), low, high, len(values))


def streams(subject: Subject, filters: Policy, done: set[tuple[str, str, float]], rooms: tuple[int, ...]) -> Iterator[Row]:
    with torch.no_grad():
        whole = torch.cat([loss_behind(subject.model(part, use_cache=False).logits, part) for part in subject.tokens.split(12)])
    for room in rooms:
        for method, (policy, given) in policies(filters).items():
            if not given and ("code-lm, streamed", method, float(room)) not in done:
                values = streamed(subject, room, policy, whole)
                low, high = interval(values)
                share = room / subject.tokens.shape[1]
                yield Row("code-lm, streamed", method, float(room), share, float(values.mean()), low, high, len(values))


def peers(
    python: str, quick: bool, keeps: tuple[float, ...], filters: dict[int, Tensor], done: set[tuple[str, str, float]]
) -> Iterator[Row]:
    """kvpress in its own environment; losses of code-lm less those of the full cache there."""
    code = subjects.code(quick)
    whole = subjects.nats(code, code.logits(contextlib.nullcontext)[0])
    with tempfile.TemporaryDirectory() as folder:
        torch.save(filters, Path(folder) / "filters.pt")
        command = [python, "-m", "eviction.peers", "--filters", str(Path(folder) / "filters.pt"), "--window", str(WINDOW)]
        command += ["--keep", *map(str, keeps), *(["--quick"] if quick else [])]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                method = f"kvpress {found['method']}"
                if (found["subject"], method, found["keep"]) in done:
                    continue
                values = torch.tensor(found["values"], dtype=torch.float64)
                values = values - whole if found["subject"] == "code-lm" else values
                low, high = interval(values)
                yield Row(found["subject"], method, found["keep"], found["keep"], float(values.mean()), low, high, len(values))


NOTES = (
    "Intervals: 95 % bootstrap over documents or sequences, paired with the full cache on code-lm.",
    "code-lm hardly looks beyond 64 tokens: a window looks good there, and that says nothing about long context.",
    "recall: only questions whose key was not asked before count, since other answers stand behind the prompt as well.",
    "held: the share of the prompt that layers held; key-norm keeps the first two layers whole, as its source does.",
    f"snapkv: a window of {WINDOW}, pooled over 5. q-filters: from 20 other sequences. streamed: the room is a number of tokens.",
)


def write(found: list[Row]) -> None:
    record = {"machine": machine(), "threads": torch.get_num_threads(), "notes": NOTES, "rows": [vars(r) for r in found]}
    (RESULTS / "kvcache.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"# Caches that forget ({machine()['processor']}, {torch.get_num_threads()} threads)", ""]
    lines += ["`python benchmarks/kvcache.py`", "", *(f"- {note}" for note in NOTES), ""]
    for subject in dict.fromkeys(r.subject for r in found):
        mine = [r for r in found if r.subject == subject]
        what = "right answers" if subject.startswith("recall") else "nats more than the full cache"
        what = "Spearman of scores with the attention of the next 128 tokens" if "agreement" in subject else what
        lines += [f"## {subject}: {what}", ""]
        keeps = sorted({r.keep for r in mine}, reverse=True)
        cells = {(r.method, r.keep): r for r in mine}
        table = []
        for method in dict.fromkeys(r.method for r in mine):
            shown = [cells.get((method, keep)) for keep in keeps]
            table.append([method, *("" if r is None else f"{r.value:.3f} ({r.low:.3f} to {r.high:.3f})" for r in shown)])
        head = [f"room {k:g}" if "streamed" in subject else f"keep {k:g}" for k in keeps]
        head = ["mean over heads"] if "agreement" in subject else head
        lines += [markdown(["method", *head], table)]
        far = [r for r in mine if r.by_distance and r.keep in (1.0, 0.25)]
        if far:
            names = list(far[0].by_distance)
            lines += ["By distance, a quarter kept:", "", markdown(["method", "held", *names], [
                [r.method, f"{r.held:.2f}", *(f"{r.by_distance.get(n, float('nan')):.3f}" for n in names)] for r in far
            ])]  # fmt: skip
    (RESULTS / "kvcache.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few samples, one share: to see that it runs; nothing is kept")
    parser.add_argument("--resume", action="store_true", help="go on after the rows that are kept already")
    parser.add_argument("--kvpress", default="", help="python of an environment that has kvpress")
    given = parser.parse_args()
    found: list[Row] = []
    if given.resume and (RESULTS / "kvcache.json").exists():
        found = [Row(**r) for r in json.loads((RESULTS / "kvcache.json").read_text())["rows"]]
    done = {(r.subject, r.method, r.keep) for r in found}
    for one in rows(given.quick, done, given.kvpress):
        found.append(one)
        print(f"{one.subject:28} {one.method:34} {one.keep:8g} {one.value:8.4f} ({one.low:.4f} to {one.high:.4f})", flush=True)
        if not given.quick:
            write(found)
    if not found:
        sys.exit("nothing was measured")


if __name__ == "__main__":
    main()
