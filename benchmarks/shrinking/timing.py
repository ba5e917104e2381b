"""Losses and times of rewritten models beside the original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Host
from attnopt.passes.candidate import FITTED
from attnopt.plan.timing.timing import in_turn
from shrinking.kept import Kept
from shrinking.methods import Kind, applied
from shrinking.rows import Shrunk


def ratio(before: Host, after: Host, inputs: dict[str, Tensor], seconds: float) -> float:
    """Time of `after` as a share of `before`, run in turn."""
    runners = {"before": before.runner(), "after": after.runner()}
    times = in_turn({name: partial(run, inputs) for name, run in runners.items()}, seconds=seconds)
    return float(times["after"].ratio(times["before"]))


def onnx_of(host: Any) -> OnnxHost:
    return OnnxHost.from_model(host.to_onnx())


def compared(
    subject: Any, kinds: Iterable[Kind], twins: Iterable[Kind], exported: Host, kept: Kept, quick: bool
) -> Iterator[Shrunk]:
    """Every kind that is not kept already, in all its layers: loss in torch, time in torch and in onnxruntime, where twins are its kind.

    What differs in its numbers only, a fitted kind, has the times of the one before it.
    """
    inputs, seconds = dict(subject.judged[0]), 0.2 if quick else 1.0
    there = {(k.method, k.strength): k for k in twins}
    for kind in kinds:
        if kept.found(subject.name, kind.method, kind.strength):
            continue
        print(f"{subject.name}: {kind.method}, {kind.strength}", flush=True)
        made, twin = applied(subject.torch, kind), there.get((kind.method, kind.strength))
        loss, _ = subject.loss(made.host.runner())
        alike = kept.found(subject.name, kind.method, kind.strength.removesuffix(FITTED))  # other numbers in the same nodes
        times = (alike.torch, alike.onnx) if alike is not None else (
            ratio(subject.torch, made.host, inputs, seconds),
            None if twin is None else ratio(exported, applied(exported, twin).host, inputs, seconds),
        )  # fmt: skip
        yield Shrunk(
            subject.name,
            kind.method,
            kind.strength,
            loss.mean,
            loss.half,
            made.weights,
            made.cache,
            *times,
            f"{len(kind.candidates)} layers" if kind.rewrite.per == "block" else "",
            made.parameters,
            made.cache_bytes,
        )
