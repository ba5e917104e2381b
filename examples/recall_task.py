"""Associative recall: pairs of a key and a value among filler, and later the keys again. Made, not collected; needs torch only.

    BOS  f f k7 v3 f f k2 v9 f f … (length tokens)  |  k2 v9 k7 v3 k2 v9 … (2 per pair)      judged: the token after each key on the right

A model that is exact here reads any place of its context, so whatever drops context (windows, eviction, sparse blocks) fails exactly
where it drops the pair that is asked for. Keys are asked for with replacement: without it a model learns to eliminate, not to recall.
The task is that of "Zoology: Measuring and Improving Recall in Efficient Language Models".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

KEYS, VALUES = 32, 32
BOS, FILLER, VOCABULARY = 64, 65, 80  # 0-31 keys, 32-63 values, 64, 65-79 filler


@dataclass(frozen=True)
class RecallBatch:
    """tokens [count, length + 4 * pairs], int64. asked [2 * pairs]: positions of the keys of the queries, at which a model must predict
    `answers` [count, 2 * pairs]. places [count, 2 * pairs]: where in the context the pair that is asked for stands."""

    tokens: Tensor
    asked: Tensor
    answers: Tensor
    places: Tensor

    def accuracy(self, logits: Tensor) -> Tensor:
        """Share of right answers of each sequence [count], from logits [count, length + 4 * pairs, VOCABULARY]."""
        return (logits[:, self.asked].argmax(-1) == self.answers).double().mean(-1)

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross entropy of the answers, in nats."""
        return nn.functional.cross_entropy(logits[:, self.asked].transpose(1, 2).float(), self.answers)


def recall_batch(count: int, pairs: int, length: int, seed: int) -> RecallBatch:
    """`count` sequences of `pairs` distinct keys among the first `length` tokens. Equal arguments give equal batches.

    Raises ValueError where the pairs do not fit: at most 32, and 1 + 2 * pairs tokens.
    """
    if not 1 <= pairs <= KEYS or length < 1 + 2 * pairs:
        raise ValueError(f"{pairs} pairs do not fit: at most {KEYS}, and a length of at least {1 + 2 * pairs}, not {length}")
    random = torch.Generator().manual_seed(seed)
    context = torch.randint(FILLER, VOCABULARY, (count, length), generator=random)
    context[:, 0] = BOS
    order = torch.rand(count, KEYS, generator=random).argsort(1)
    keys = order[:, :pairs]
    values = torch.randint(KEYS, KEYS + VALUES, (count, pairs), generator=random)
    slots = torch.rand(count, (length - 1) // 2, generator=random).argsort(1)[:, :pairs]
    places = 1 + 2 * slots
    context.scatter_(1, places, keys).scatter_(1, places + 1, values)
    drawn = torch.randint(0, pairs, (count, 2 * pairs), generator=random)
    asked_keys, answers = keys.gather(1, drawn), values.gather(1, drawn)
    queries = torch.stack([asked_keys, answers], -1).flatten(1)
    asked = length + 2 * torch.arange(2 * pairs)
    return RecallBatch(torch.cat([context, queries], 1), asked, answers, places.gather(1, drawn))
