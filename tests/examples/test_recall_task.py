"""The task: what a sequence holds, and that the answer can be read nowhere but where it should."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from recall_task import BOS, FILLER, KEYS, VALUES, VOCABULARY, recall_batch


@pytest.mark.parametrize(("pairs", "length"), [(1, 3), (8, 64), (32, 65), (32, 300)])
def test_a_sequence(pairs, length):
    made = recall_batch(5, pairs, length, seed=2)
    assert made.tokens.shape == (5, length + 4 * pairs)
    context, queries = made.tokens.split([length, 4 * pairs], 1)
    assert bool((context[:, 0] == BOS).all())
    is_key = context < KEYS
    assert is_key.sum(1).tolist() == [pairs] * 5
    for row, key_row in zip(context, is_key, strict=True):
        at = key_row.nonzero().flatten()
        assert bool((at % 2 == 1).all())
        assert len(row[at].unique()) == pairs
        assert bool(((row[at + 1] >= KEYS) & (row[at + 1] < KEYS + VALUES)).all())
        rest = torch.ones(length, dtype=torch.bool)
        rest[at] = rest[at + 1] = False
        assert bool(((row[rest][1:] >= FILLER) & (row[rest][1:] < VOCABULARY)).all())
    assert torch.equal(made.tokens[:, made.asked], queries[:, 0::2])
    assert torch.equal(made.answers, queries[:, 1::2])
    assert torch.equal(context.gather(1, made.places), queries[:, 0::2])
    assert torch.equal(context.gather(1, made.places + 1), made.answers)


def test_queries_are_drawn_with_replacement():
    made = recall_batch(20, 8, 64, seed=0)
    assert any(len(row.unique()) < 8 for row in made.places)
    assert any(int(row.unique(return_counts=True)[1].max()) > 2 for row in made.places)


def test_seeds():
    assert torch.equal(recall_batch(3, 4, 32, seed=1).tokens, recall_batch(3, 4, 32, seed=1).tokens)
    assert not torch.equal(recall_batch(3, 4, 32, seed=1).tokens, recall_batch(3, 4, 32, seed=2).tokens)


@pytest.mark.parametrize(("pairs", "length"), [(33, 500), (0, 10), (8, 16)])
def test_what_does_not_fit(pairs, length):
    with pytest.raises(ValueError, match="do not fit"):
        recall_batch(1, pairs, length, seed=0)


def test_accuracy_and_loss():
    made = recall_batch(3, 4, 32, seed=1)
    right = torch.nn.functional.one_hot(made.tokens.roll(-1, 1), VOCABULARY).float() * 50
    assert made.accuracy(right).tolist() == [1.0] * 3
    assert float(made.loss(right)) < 1e-3
    right[0, made.asked[:2]] = 0.0
    right[0, made.asked[:2], FILLER] = 50.0
    assert made.accuracy(right).tolist() == [0.75, 1.0, 1.0]
