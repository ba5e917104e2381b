"""Gate-Norm by itself: seconds for the shape of a large model, and how its ranking agrees with what layers are measured to be worth."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from scipy.stats import spearmanr

from attnopt.passes import DropAttention, GateNorm
from attnopt.passes.prune.gate_norm import gate_norm
from attnopt.plan.options.groups import Grouping
from shrinking.methods import applied, offered

HIDDEN, HEADS, WIDTH = 5120, 40, 128
FLAGS = {"whole layer": {}, "per head": {"per_head": True}, "per head, gains folded": {"per_head": True, "fold_norm_gain": True}}


def scoring_seconds(layers: int) -> float:
    """Seconds to score so many layers, per head, on all cores; each layer's weights are made before its clock runs, and let go."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    spent = 0.0
    for layer in range(layers):
        generator = torch.Generator().manual_seed(layer)
        q, k = (torch.rand(HEADS, WIDTH, HIDDEN, generator=generator).sub_(0.5) for _ in "qk")
        started = time.perf_counter()
        gate_norm(q, k, per_head=True)
        spent += time.perf_counter() - started
    torch.set_num_threads(threads)
    return spent


def ranking(folder: Path, quick: bool) -> dict[str, float]:
    """Spearman's rho between g of each layer of code-lm and the loss measured without that layer's attention, by flags of Gate-Norm."""
    from quantize.subjects import code_lm

    subject = code_lm(folder, quick)
    losses = {}
    for kind in offered("drop-attention", DropAttention(), subject.torch, None):
        for name, candidate in kind.candidates:
            made = applied(subject.torch, type(kind)(kind.method, kind.strength, kind.rewrite, ((name, candidate),)))
            losses[name] = subject.loss(made.host.runner())[0].mean
    grouping = Grouping(subject.torch)
    (group,) = grouping.of("model")
    found = {}
    for flags, options in FLAGS.items():
        ranked = GateNorm(**options).ranked(group)  # type: ignore[arg-type]
        scores = {s.site.name: g for g, layers in ranked for s in layers}  # type: ignore[union-attr]
        found[flags] = float(spearmanr([scores[n] for n in losses], list(losses.values())).statistic)
    return found
