"""The cache in few bits: what each method loses against the bits that it keeps, and how long a step of decoding takes.

Loss: each text is decoded token by token, every step on what the cache holds then. code-lm: KL to the model with an exact cache and
perplexity, on beginnings of held-out documents, one sample each. recall: share of right answers among 1,024 tokens with 32 pairs.
Bits: per number of a cache of 1,024 tokens, scales, zero points and balances counted, tokens that stay exact as 16.
Time: the step of code-lm after 1,024 tokens on onnxruntime as a plain graph, one method after the other in turn; on a busy machine only
the ratios say something. onnxruntime has no kernel that reads these codes: a plain graph decodes the whole cache at every step.
On torch kernels read them (`--part choice`).
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import RESULTS, kept, machine
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from recall_task import RecallBatch, recall_batch
from trained_models import code_lm, code_windows, recall_model

from attnopt.ir.clause import Clause
from attnopt.ir.spec import parse
from attnopt.passes import AkvqVl, Int2Cache, Int4Cache, Int8Cache, ZipCache
from quantize.decoding import step, with_cache
from quantize.streaming import Blocks, ByToken, Method, streaming

LENGTH, WIDTH, DOCUMENTS, SEEN = 1024, 32, 12, 8  # SEEN: further documents, for the static spread of channels
PAIRS, SEQUENCES = 32, 12
TURNED = "k=int{0}, v=int{0}, group=128, scales=fp16, k_basis=hadamard, v_basis=hadamard{1}"


@dataclass(frozen=True)
class Row:
    """kl, nats, accuracy: means with half of a 95% interval. exact: what is kept exactly."""

    method: str
    exact: str
    bits: float
    kl: float
    kl_half: float
    perplexity: float
    accuracy: float
    accuracy_half: float


def clause(text: str) -> Clause:
    made = parse(f"softmax cache({text})").cache
    assert made is not None
    return made


def methods(models: list[nn.Module], windows: Tensor, asked: Tensor) -> dict[str, tuple[str, list[Method]]]:
    """By name what stays exact, and the method for each of the two models: static spreads are of the model."""
    plain = {bits: f"k=int{bits}, v=int{bits}, group=32, scales=fp16" for bits in (4, 2)}
    spreads = [spread_of(model, tokens) for model, tokens in zip(models, (windows, asked), strict=True)]

    def spread(bits: int) -> list[Method]:
        text = f"{plain[bits]}, k_shift=k_shift, k_spread=k_spread"
        return [ByToken((clause(text),), operands=operands) for operands in spreads]

    def both(method: Method) -> list[Method]:
        return [method, method]

    pivots = clause(TURNED.format(2, ", clip=0.8"))
    return {
        "int8": ("", both(ByToken((clause("k=int8, v=int8"),)))),
        "int4": ("", both(ByToken((clause(plain[4]),)))),
        "int4, keys spread (WKVQuant)": ("", spread(4)),
        "2-bit": ("", both(ByToken((clause(plain[2]),)))),
        "2-bit, keys spread (WKVQuant)": ("", spread(2)),
        "2-bit, Hadamard, clip 0.8": ("", both(ByToken((pivots,)))),
        "2-bit, newest exact": ("128 newest", both(ByToken((clause(plain[2]),), recent=128))),
        "AKVQ-VL, layers of pivots": ("128 newest, 15 first", both(ByToken((pivots,), first=15, recent=128))),
        "AKVQ-VL, layers of text": ("128 newest", both(ByToken((clause(TURNED.format(4, "")),), recent=128))),
        "2-bit blocks, keys by channel": ("50 on average", both(Blocks(salient=0.0, balance=False))),
        "ZipCache 50%": ("50 on average", both(Blocks())),
        "ZipCache 50%, a tenth as probes": ("50 on average", both(Blocks(probes=0.1))),
        "ZipCache 50%, sums not normalised": ("50 on average", both(Blocks(normalised=False))),
        "ZipCache, all in 4 bits": ("50 on average", both(Blocks(salient=1.0))),
    }


@torch.no_grad()
def spread_of(model: nn.Module, tokens: Tensor) -> tuple[dict[str, Tensor], ...]:
    """By layer the middle and half the range of each channel of keys [G, D]."""
    layers = model(tokens, use_cache=True).past_key_values.layers
    found = []
    for layer in layers:
        low, high = layer.keys.amin((0, 2)), layer.keys.amax((0, 2))
        found.append({"k_shift": (low + high) / 2, "k_spread": ((high - low) / 2).clamp(min=1e-6)})
    return tuple(found)


@torch.no_grad()
def language(
    model: nn.Module, windows: Tensor, method: Method | None, exact: list[Tensor] | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """KL [documents] and mean loss in nats [documents] of a cache, and the log-probabilities."""
    kl, lost, kept = [], [], []
    with streaming(model, method):
        for i, part in enumerate(windows.split(1)):
            log_p = model(part, use_cache=False).logits.log_softmax(-1)
            lost.append(-log_p[:, :-1].gather(2, part[:, 1:, None]).mean((1, 2)))
            if exact is None:
                kept.append(log_p)
            else:
                kl.append((exact[i].exp() * (exact[i] - log_p)).sum(-1).mean(1))
    return torch.cat(kl) if kl else torch.zeros(0), torch.cat(lost), kept


@torch.no_grad()
def recalled(model: nn.Module, batches: list[RecallBatch], method: Method | None) -> Tensor:
    with streaming(model, method):
        return torch.cat([b.accuracy(model(b.tokens, use_cache=False).logits) for b in batches])


def half(x: Tensor) -> float:
    return 1.96 * float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.nan


def run(quick: bool, resume: bool = False) -> None:
    torch.set_num_threads(1)
    documents, sequences = (2, 2) if quick else (DOCUMENTS, SEQUENCES)
    model, recaller = code_lm(), recall_model()
    tokens = code_windows(documents + SEEN, LENGTH)
    windows, seen = tokens[:documents], tokens[documents:]
    batches = [recall_batch(1, PAIRS, LENGTH, seed) for seed in range(sequences)]
    asked = recall_batch(4, PAIRS, LENGTH, 1000).tokens
    found = methods([model, recaller], seen, asked)
    chosen = dict(list(found.items())[::5]) if quick else found
    _, lost, exact = language(model, windows, None, None)
    right = recalled(recaller, batches, None)
    rows = [Row("exact", "all", 16.0, 0.0, 0.0, float(lost.mean().exp()), float(right.mean()), half(right))]
    rows += [r for r in (kept("quantize_cache", Row) if resume else ()) if r.method in chosen]
    for name, (what, pair) in ((n, m) for n, m in chosen.items() if n not in {r.method for r in rows}):
        kl, lost, _ = language(model, windows, pair[0], exact)
        right = recalled(recaller, batches, pair[1])
        bits = pair[0].bits(LENGTH, WIDTH)
        rows.append(Row(name, what, bits, float(kl.mean()), half(kl), float(lost.mean().exp()), float(right.mean()), half(right)))
        print(rows[-1], flush=True)
        if not quick:
            written(rows, {})
    times = timed(model, tokens[:1], quick)
    if not quick:
        written(rows, times)


def timed(model: nn.Module, ids: Tensor, quick: bool) -> dict[str, tuple[float, float]]:
    """Milliseconds of a step (median) and its ratio to the model as it is, taken in turn."""
    host, inputs = step(model, ids)
    kinds = (
        (Int8Cache(), "int8"),
        (Int4Cache(), "int4"),
        (Int2Cache(), "2-bit"),
        (AkvqVl(), "2-bit pivots"),
        (ZipCache(), "50% salient"),
    )
    runs = {"float32": (host.runner(), host.adapt(inputs))}
    for rewrite, kind in kinds:
        made = with_cache(host, rewrite, kind)
        runs[f"{rewrite.name} {kind}"] = (made.runner(), made.adapt(inputs))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3 if quick else 40):
        for name, (call, given) in runs.items():
            start = time.perf_counter()
            call(given)
            taken[name].append(time.perf_counter() - start)
    middle = {name: sorted(x)[len(x) // 2] for name, x in taken.items()}
    return {name: (1000 * t, t / middle["float32"]) for name, t in middle.items()}


def written(rows: list[Row], times: dict[str, tuple[float, float]]) -> None:
    """benchmarks/results/quantize_cache.json and .md."""
    record = {"machine": machine(), "rows": [vars(r) for r in rows], "step_ms_and_ratio": times}
    (RESULTS / "quantize_cache.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        f"# The cache in few bits ({machine()['processor']})",
        "",
        f"`python benchmarks/quantize.py --part cache`. {(__doc__ or '').split(chr(10), 2)[2].strip()}",
        f"{DOCUMENTS} documents of {LENGTH} tokens, {SEQUENCES} sequences of recall; ± is half of a 95% interval over them.",
        "",
        "| method | exact tokens | bits | KL | perplexity | recall |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        loss, right = f"{r.kl:.5f} ± {r.kl_half:.5f}", f"{r.accuracy:.3f} ± {r.accuracy_half:.3f}"
        cells = (r.method, r.exact or "none", f"{r.bits:.2f}", loss, f"{r.perplexity:.3f}", right)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *verdicts({r.method: r for r in rows})]
    lines += ["", "| step after 1,024 tokens | ms | times float32 |", "| --- | --- | --- |"]
    lines += [f"| {name} | {ms:.2f} | {ratio:.2f} |" for name, (ms, ratio) in times.items()]
    (RESULTS / "quantize_cache.md").write_text("\n".join(lines) + "\n")


def verdicts(rows: dict[str, Row]) -> list[str]:
    """What the table says of the goals."""
    found = []
    if "int8" in rows:
        found.append(f"- int8: KL {rows['int8'].kl:.1e}, {'below' if rows['int8'].kl < 1e-3 else 'not below'} 1e-3.")
    for base in ("2-bit", "2-bit, newest exact", "2-bit blocks, keys by channel"):
        for name in ("AKVQ-VL, layers of pivots", "ZipCache 50%"):
            if base not in rows or name not in rows:  # a run that was cut off
                continue
            a, b = rows[base], rows[name]
            found.append(f"- {name} ({b.bits:.2f} bits) has {a.kl / b.kl:.1f} times less KL than {base} ({a.bits:.2f} bits).")
    return found
