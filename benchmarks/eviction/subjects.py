"""What caches are shortened on: held-out documents and the recall task, compressed behind a prompt and read on from what is left.

`compressing` is any context in which a forward pass over a prompt leaves a shortened cache: attnopt.cache, or another library's.
Nothing here knows attnopt, so that a peer in an environment of its own measures by the same lines.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from recall_task import recall_batch
from trained_models import code_lm, code_windows, recall_model

PROMPT, REST = 512, 128
LENGTH, PAIRS = 512, 32
EDGES = (0, 128, 256, 384, 2048)  # of the distance between a question and its pair
Compressing = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class Subject:
    """tokens [N, L]: prompts of `prompt` tokens, and what follows them."""

    name: str
    model: nn.Module
    tokens: Tensor
    prompt: int
    seen: Tensor  # other sequences, for methods that need data

    @torch.no_grad()
    def logits(self, compressing: Compressing, batch: int = 12) -> tuple[Tensor, list[Any]]:
        """[N, L - prompt, classes] behind a shortened cache; and what the contexts gave."""
        made, given = [], []
        for part in self.tokens.split(batch):
            with compressing() as inside:
                past = self.model(part[:, : self.prompt]).past_key_values
                places = torch.arange(self.prompt, part.shape[1])[None]
                made.append(self.model(part[:, self.prompt :], past_key_values=past, position_ids=places).logits)
                given.append(inside)
        return torch.cat(made), given


def code(quick: bool) -> Subject:
    windows = code_windows(57, 1024)
    count = 4 if quick else 36
    return Subject("code-lm", code_lm(), windows[:count, : PROMPT + REST], PROMPT, windows[37:])


def nats(subject: Subject, logits: Tensor) -> Tensor:
    """Loss of each document in nats, [N]."""
    rest = subject.tokens[:, subject.prompt + 1 :]
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), rest, reduction="none").mean(1)


@dataclass(frozen=True, eq=False)
class Recall(Subject):
    """asked, answers, distances: of the questions behind the prompt. fresh: bool [N, questions], those whose key was not asked before: the
    answer to another stands behind the prompt as well, where nothing is evicted."""

    asked: Tensor
    answers: Tensor
    distances: Tensor
    fresh: Tensor

    def right(self, logits: Tensor) -> Tensor:
        """Of each question whether its answer is right, [N, questions]."""
        return (logits[:, self.asked - self.prompt].argmax(-1) == self.answers).double()

    def accuracy(self, logits: Tensor) -> Tensor:
        """Share of right answers to fresh questions of each sequence, [N]."""
        return (self.right(logits) * self.fresh).sum(1) / self.fresh.sum(1)


def recall(quick: bool, shown: int = 0) -> Recall:
    """shown: questions with their answers that belong to the prompt."""
    made = recall_batch(4 if quick else 48, PAIRS, LENGTH, seed=7)
    asked, answers, places = made.asked[shown:], made.answers[:, shown:], made.places[:, shown:]
    name = "recall" if not shown else f"recall, {shown} questions seen"
    seen = recall_batch(20, PAIRS, LENGTH, seed=11).tokens
    fresh = first_asked(made.tokens[:, made.asked])[:, shown:]
    return Recall(name, recall_model(), made.tokens, LENGTH + 2 * shown, seen, asked, answers, asked - places, fresh)


def first_asked(keys: Tensor) -> Tensor:
    """Where a key was not asked before, bool [N, questions]."""
    return ~(keys[:, :, None] == keys[:, None]).tril(-1).any(-1)


def by_distance(subject: Recall, right: Tensor) -> dict[str, float]:
    """Share of right answers by how far back the pair stands."""
    found = {}
    for low, high in itertools.pairwise(EDGES):
        mine = (subject.distances >= low) & (subject.distances < high) & subject.fresh
        if mine.any():
            found[f"{low}-{high - 1}"] = float(right[mine].mean())
    return found
