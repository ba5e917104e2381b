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
    assert trained_models.accuracy(trained_models.recall_model(), pairs, length, count=8, seed=1) == 1.0


def test_what_a_window_costs():
    """The judge of long context: the recall model fails with a window, the language model hardly notices."""
    made = recall_task.recall_batch(4, 32, 512, seed=1)
    seen = trained_models.sinks_and_window(made.tokens.shape[1], 4, 64)
    with torch.no_grad():
        logits = trained_models.recall_model()(made.tokens, attention_mask=seen.expand(4, 1, -1, -1), use_cache=False).logits
    assert float(made.accuracy(logits).mean()) < 0.5
    model, windows = trained_models.code_lm(), trained_models.code_windows(4, 256)
    whole = trained_models.losses(model, windows)
    near = trained_models.losses(model, windows, seen=trained_models.sinks_and_window(256, 4, 64))
    assert abs(float((near - whole).mean())) < 0.1
    everything = trained_models.losses(model, windows, seen=trained_models.sinks_and_window(256, 0, 256))
    torch.testing.assert_close(everything, whole, atol=1e-4, rtol=1e-4)


def test_without_an_attention():
    model, windows = trained_models.code_lm(), trained_models.code_windows(4, 256)
    whole = trained_models.losses(model, windows).mean()
    with trained_models.without_attention(model, 0):
        assert trained_models.losses(model, windows).mean() > whole + 0.1
    assert trained_models.losses(model, windows).mean() == whole


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
