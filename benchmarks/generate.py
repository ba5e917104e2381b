"""Generation by live models beside transformers' own: time to first token, tokens per second, cache bytes per token, peak memory.

Contenders: transformers with eager and with sdpa attention, its forward under torch.compile, `attnopt.optimize` with nothing lost, alone
and under torch.compile, and with a budget. Each row runs in a process of its own: its peak memory is read before transformers' sdpa joins
it there and takes turns with it, prompt by prompt, so that ratios are those of one minute. Medians of several prompts of equal length,
greedy decoding, float32, batch 1. Results are kept after each row.

    python benchmarks/generate.py [--models llama] [--lengths 256 1024] [--quick] [--resume]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import harness
import torch
from generation.subjects import NAMES, batches, longest, subject

BASE = "sdpa"
COMPILED = "attnopt exact, compiled"
CONTENDERS = ("eager", BASE, "torch.compile", "attnopt exact", COMPILED, "attnopt budget")
BUDGET, TOKENS, RUNS = 0.02, 128, 3


@dataclass(frozen=True)
class Row:
    """Seconds to the first token, tokens per second after it (medians), bytes of cache per token, peak memory of the process in bytes.

    sooner, faster: times sdpa's, in turn with it. equal: whether the tokens are those of sdpa. prepared: seconds until it could generate.
    note: what attnopt did. processor: of the machine, whose ratios are those of one run and whose times are comparable with its own alone.
    """

    model: str
    length: int
    contender: str
    first: float
    rate: float
    cache: float
    peak: int
    sooner: float
    faster: float
    equal: bool
    prepared: float
    note: str = ""
    processor: str = ""

    @property
    def key(self) -> tuple[str, int, str]:
        return self.model, self.length, self.contender


class Clock:
    """A logits processor that notes when each token's logits were there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def prepared(name: str, contender: str, length: int, small: bool) -> tuple[Any, str]:
    """The model as a contender has it, and a note."""
    model = subject(name, "eager" if contender == "eager" else "sdpa", small)
    if contender == "torch.compile":
        model.forward = torch.compile(model.forward, dynamic=True)
        return model, ""
    if not contender.startswith("attnopt"):
        return model, ""
    import attnopt

    if contender in ("attnopt exact", COMPILED):
        fast = attnopt.optimize(model)
    else:
        data = batches(name, count=5, rows=8, length=64 if small else 128)
        fast = attnopt.optimize(model, budget=BUDGET, calibration=data)
    if contender == COMPILED:
        fast.forward = torch.compile(fast.forward, dynamic=True)
    live = [note for note in fast.report.notes if note.startswith("live")]
    return fast, "; ".join([*live, *sorted({f"{s.rewrite} {s.kind}" for s in fast.plan.steps})])


@dataclass(frozen=True)
class Run:
    """One prompt continued: seconds to its first token, tokens per second after it, the new tokens, bytes of cache per token."""

    first: float
    rate: float
    tokens: list[int]
    cache: float


def continued(model: Any, prompt: torch.Tensor, count: int) -> Run:
    clock, begun, length = Clock(), time.perf_counter(), len(prompt)
    made = model.generate(
        prompt[None], attention_mask=torch.ones(1, length, dtype=torch.long), max_new_tokens=count, min_new_tokens=count,
        do_sample=False, pad_token_id=0, logits_processor=[clock], return_dict_in_generate=True,
    )  # fmt: skip
    held = [x for layer in made.past_key_values.layers for x in (layer.keys, layer.values) if x is not None]
    cache = sum(x.numel() * x.element_size() for x in held) / (length + count - 1)
    rate = (count - 1) / (clock.times[-1] - clock.times[0])
    return Run(clock.times[0] - begun, rate, made.sequences[0, length:].tolist(), cache)


def measured(name: str, contender: str, length: int, count: int, runs: int, small: bool) -> Row:
    started = time.perf_counter()
    model, note = prepared(name, contender, length, small)
    prompts = torch.randint(3, 4096, (runs + 1, length), generator=torch.Generator().manual_seed(length))
    warm = continued(model, prompts[0], count)  # compiles, and warms up
    spent = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    base = model if contender == BASE else subject(name, "sdpa", small)
    alike = [continued(base, prompts[0], count).tokens == warm.tokens]
    pairs = []
    for prompt in prompts[1:]:
        pairs.append((continued(base, prompt, count), continued(model, prompt, count)))
        alike.append(pairs[-1][0].tokens == pairs[-1][1].tokens)
    ours = [b for _, b in pairs]
    return Row(
        name, length, contender, statistics.median(b.first for b in ours), statistics.median(b.rate for b in ours), warm.cache, peak,
        statistics.median(a.first / b.first for a, b in pairs), statistics.median(b.rate / a.rate for a, b in pairs), all(alike),
        spent, note, harness.machine()["processor"],
    )  # fmt: skip


def in_own_process(given: argparse.Namespace, name: str, contender: str, length: int) -> Row | str:
    """A row, or the last line of what went wrong, all of which is printed."""
    task = ["--one", name, contender, str(length), "--tokens", str(given.tokens), "--runs", str(given.runs)]
    task += ["--threads", str(given.threads)] + ["--quick"] * given.quick
    done = subprocess.run([sys.executable, __file__, *task], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        print(done.stderr, file=sys.stderr, flush=True)
        return (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    return Row(**json.loads(lines[-1]))


def table(rows: list[Row]) -> str:
    columns = ("model", "prompt", "contender", "first token", "tokens/s", "cache/token", "peak", "tokens", "processor", "what")
    lines = []
    for r in rows:
        lines.append(
            (r.model, str(r.length), r.contender, f"{r.first * 1e3:.0f} ms ({r.sooner:.2f}x)", f"{r.rate:.1f} ({r.faster:.2f}x)",
             f"{r.cache / 1e3:.1f} kB", f"{r.peak / 1e6:.0f} MB", "equal" if r.equal else "differ", r.processor, r.note)
        )  # fmt: skip
    return harness.markdown(columns, lines)


def kept() -> list[Row]:
    path = harness.RESULTS / "generate.json"
    if not path.is_file():
        return []
    names = [f.name for f in fields(Row)]  # a row without ratios is of a time when contenders did not take turns
    rows = json.loads(path.read_text())["rows"]
    return [Row(**{n: row[n] for n in names}) for row in rows if all(n in row for n in names)]


def save(rows: list[Row], given: argparse.Namespace, failures: list[str]) -> None:
    rows = sorted(rows, key=lambda r: (NAMES.index(r.model), r.length, CONTENDERS.index(r.contender)))
    notes = [
        f"{given.threads} threads, {given.tokens} new tokens, budget {BUDGET}, medians of {given.runs} prompts",
        *failures,
    ]
    harness.save("generate", rows, notes)
    head = f"# Generation\n\n`python benchmarks/generate.py`. {notes[0]}; x is against sdpa, in turn with it.\n\n"
    more = "".join(f"\n{line}\n" for line in failures)
    (harness.RESULTS / "generate.md").write_text(head + table(rows) + more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="two small layers, a short prompt, nothing kept: does it run?")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.quick:
        given.tokens, given.runs, given.lengths = 8, 1, [64]
    if given.one:
        name, contender, length = given.one
        row = measured(name, contender, int(length), given.tokens, given.runs, given.quick)
        print(json.dumps(asdict(row)))
        return
    rows = kept() if given.resume else []
    failures: list[str] = []
    for name in given.models:
        for length in sorted({min(x, longest(name)) for x in given.lengths}):
            for contender in given.contenders:
                if any(r.key == (name, length, contender) for r in rows):
                    continue
                row = in_own_process(given, name, contender, length)
                if isinstance(row, str):
                    failures.append(f"{name}, {length}, {contender}: {row}")
                    print(failures[-1], flush=True)
                else:
                    rows.append(row)
                    print(
                        f"{name:8} {length:5} {contender:15} {row.first:7.3f} s {row.rate:7.1f} tokens/s  {row.note}", flush=True
                    )
                if not given.quick:
                    save(rows, given, failures)
    print(table(rows))


if __name__ == "__main__":
    main()
