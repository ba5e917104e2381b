"""What generation asks of a model that was traced on a prompt, and how long the live model takes for it.

    decode:1024x8   ->   a prompt of one token for each of 8 sequences          first token 21 ms, then 4.8 ms each

A live model's rewrites change weights and layers, and a step that reads one token goes through the same ones as a prompt of one token.
What its attention reads of the cache is missing there. It is the same before and after, but where heads or layers go: their gain is
understated.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.cost.workload import Load, Workload, parse_workload
from attnopt.hosts.eviction.chosen import ChosenPolicy
from attnopt.plan.timing.timing import in_turn

TOKENS = 128  # that are generated behind a prompt, where nobody says how many
SECONDS = 0.5  # of timing, for each model and phase


def usual(length: int) -> Workload:
    """A prompt of so many tokens, and as many calls for one more token as TOKENS."""
    return parse_workload(f"prefill:{length} decode:{length}@{TOKENS}")


def on_prompts(workload: Workload) -> Workload:
    """The same with a prompt of one token in place of each decoding step; it prints as before."""
    loads = tuple(Load("prefill", load.batch, 1, 0, load.weight) if load.past else load for load in workload.loads)
    return replace(workload, loads=loads, text=str(workload))


@dataclass(frozen=True)
class Pace:
    """Seconds to the first token behind a prompt, and for each further one."""

    first: float
    step: float

    def __str__(self) -> str:
        return f"{1e3 * self.first:.3g} ms to the first token, then {1 / self.step:.3g} tokens a second"


@torch.no_grad()
def paces(models: Mapping[str, tuple[Any, ChosenPolicy | None]], ids: Tensor, seconds: float = SECONDS) -> dict[str, Pace]:
    """Of each model with its cache policy, in turn, on a prompt [1, L]. Every timed step makes its cache a token longer."""
    sessions = {name: None if policy is None else policy.session for name, (_, policy) in models.items()}
    pasts: dict[str, Any] = {}

    def read(name: str) -> None:
        with nullcontext() if (session := sessions[name]) is None else session():
            pasts[name] = models[name][0](ids).past_key_values

    def step(name: str) -> None:
        with nullcontext() if (session := sessions[name]) is None else session():
            models[name][0](ids[:, -1:], past_key_values=pasts[name])

    first = in_turn({name: lambda name=name: read(name) for name in models}, seconds=seconds)  # type: ignore[misc]
    steps = in_turn({name: lambda name=name: step(name) for name in models}, seconds=seconds)  # type: ignore[misc]
    return {name: Pace(first[name].median, steps[name].median) for name in models}
