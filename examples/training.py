"""The loop that the two training examples share: AdamW, a warm-up, a cosine to zero, until the steps or the minutes are over.

train(model, batches, loss, steps=2000)   or   train(model, batches, loss, minutes=8.0)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

BatchT = TypeVar("BatchT")
WARM_UP = 0.03  # share of the training in which the rate rises


def rate(done: float, peak: float) -> float:
    """The learning rate when this share of the training is over."""
    if done < WARM_UP:
        return peak * done / WARM_UP
    return peak * 0.5 * (1.0 + math.cos(math.pi * (done - WARM_UP) / (1.0 - WARM_UP)))


def optimizer(model: nn.Module, peak: float, decay: float) -> torch.optim.AdamW:
    """Matrices decay, norms and biases do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))


def train(
    model: nn.Module,
    batches: Iterator[BatchT],
    loss: Callable[[nn.Module, BatchT], Tensor],
    *,
    steps: int | None = None,
    minutes: float | None = None,
    peak: float = 1e-3,
    decay: float = 0.1,
    report: float = 15.0,
) -> list[float]:
    """Train in place, for `steps` or for `minutes`, and return the loss of each step; prints one line in `report` seconds.

    On a GPU products are computed in bfloat16. Raises ValueError unless exactly one of steps and minutes is given.
    """
    if (steps is None) == (minutes is None):
        raise ValueError("give steps=… or minutes=…, and not both")
    device = next(model.parameters()).device
    adam, console, losses = optimizer(model, peak, decay), Console(stderr=True), []
    started = said = time.monotonic()
    model.train()
    while True:
        now = time.monotonic()
        spent, whole = (len(losses), steps) if steps is not None else (now - started, 60.0 * (minutes or 0.0))
        done = spent / whole if whole else 1.0
        if done >= 1.0:
            break
        for group in adam.param_groups:
            group["lr"] = rate(max(done, 1e-4), peak)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss(model, next(batches))
        adam.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        losses.append(float(value.detach()))
        if now - said > report:
            said, recent = now, losses[-50:]
            console.print(f"{done:4.0%}  step {len(losses)}  loss {sum(recent) / len(recent):.3f}")
    model.eval()
    return losses


def device_named(name: str | None) -> torch.device:
    """The device asked for, else a GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
