"""The shipped models are as good as their README says, and their loaders give what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import recall_task
import trained_models


def test_code_lm_loses_what_it_should_by_position():
    """On 12 documents, as measured; one that has learned nothing loses 8.3 nats."""
    found = trained_models.loss_by_position(trained_models.code_lm(), trained_models.code_windows(12, 512))
    assert list(found) == [(0, 64), (64, 256), (256, 512)]
    assert found == pytest.approx({(0, 64): 2.390, (64, 256): 2.485, (256, 512): 3.419}, abs=0.01)


@pytest.mark.parametrize(("pairs", "length"), [(8, 64), (32, 512)])
def test_recall_is_exact(pairs, length):
    made = recall_task.recall_batch(8, pairs, length, seed=1)
    with torch.no_grad():
        accuracy = made.accuracy(trained_models.recall_model()(made.tokens, use_cache=False).logits)
    assert accuracy.mean() == 1.0


def test_recall_needs_the_pair_that_is_asked_for():
    """With the pairs overwritten by filler the model knows nothing: it guesses among 32 values."""
    made = recall_task.recall_batch(8, 32, 512, seed=1)
    tokens = made.tokens.clone()
    tokens[:, 1:512] = recall_task.FILLER
    for i, key in enumerate(made.asked.tolist()):
        if i + 1 < len(made.asked):  # earlier queries would tell the answer to later ones
            tokens[:, key : key + 2] = recall_task.FILLER
    tokens[:, made.asked[-1]] = made.tokens[:, made.asked[-1]]
    with torch.no_grad():
        logits = trained_models.recall_model()(tokens, use_cache=False).logits
    assert float((logits[:, made.asked[-1]].argmax(-1) == made.answers[:, -1]).double().mean()) < 0.5


def test_windows_are_of_different_documents():
    windows = trained_models.code_windows(57, 1024)
    assert windows.shape == (57, 1024)
    assert bool((windows[:, 0] == trained_models.BOUNDARY).all())
    assert bool((windows[:, 1:] != trained_models.BOUNDARY).all())
    assert len({tuple(w.tolist()) for w in windows}) == 57
    with pytest.raises(ValueError, match="only 57 held-out documents have 1024 tokens, not 58"):
        trained_models.code_windows(58, 1024)
