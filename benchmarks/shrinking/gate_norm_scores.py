"""Gate-Norm by itself: seconds for the shape of a large model, and how its ranking agrees with what layers are measured to be worth."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from scipy.stats import spearmanr

from attnopt.passes import GateNorm
from attnopt.passes.prune.gate_norm import gate_norm
from attnopt.plan.options.groups import Grouping

HIDDEN, HEADS, WIDTH = 5120, 40, 128
FLAGS = {"whole layer": {}, "per head": {"per_head": True}, "per head, gains folded": {"per_head": True, "fold_norm_gain": True}}


def scoring_seconds(layers: int, device: str = "cpu") -> float:
    """Seconds to score so many layers, per head, on two cores or a GPU; each layer's weights are made before its clock runs, and let go."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    spent = 0.0
    for layer in range(layers):
        generator = torch.Generator().manual_seed(layer)
        q, k = (torch.rand(HEADS, WIDTH, HIDDEN, generator=generator).sub_(0.5).to(device) for _ in "qk")
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        gate_norm(q, k, per_head=True)  # a float: what a GPU does for it is done when it is there
        spent += time.perf_counter() - started
    torch.set_num_threads(threads)
    return spent


def scored(layers: int) -> list[str]:
    """A line for two CPU cores, and one for the GPU where there is one."""
    places = {"cpu": "two CPU cores"} | ({"cuda": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})
    shape = f"{layers} layers shaped like a model of 13 billion parameters (hidden {HIDDEN}, {HEADS} heads of {WIDTH})"
    return [
        f"gate-norm, per head: {scoring_seconds(layers, device):.3g} s on {name} to score {shape}, weights at hand"
        for device, name in places.items()
    ]


def ranking(subject: Any, losses: Mapping[str, float]) -> list[str]:
    """Spearman's rho between g of each layer and the loss measured without that layer's attention, by flags of Gate-Norm."""
    (group,) = Grouping(subject.torch).of("model")
    found = []
    for flags, options in FLAGS.items():
        ranked = GateNorm(**options).ranked(group)  # type: ignore[arg-type]
        scores = {s.site.name: g for g, layers in ranked for s in layers}  # type: ignore[union-attr]
        rho = float(spearmanr([scores[n] for n in losses], list(losses.values())).statistic)
        found.append(f"Spearman's rho of gate-norm ({flags}) with the measured loss of each layer of {subject.name}: {rho:.2f}")
    return found
