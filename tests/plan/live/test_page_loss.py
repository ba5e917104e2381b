"""The loss of pages is that of every query that has more keys than it reads, as if it were the newest."""

from __future__ import annotations

import pytest
import torch
from live_models import language_model, tokens

from attnopt.analysis.calibration import Calibration
from attnopt.errors import AttnoptError
from attnopt.hosts.eviction.paged import page_choice
from attnopt.hosts.module.layer_attention import LayerAttention
from attnopt.ir.reference import reference
from attnopt.plan.judge.quality import kl
from attnopt.plan.live import page_loss
from attnopt.plan.live.converting import noted
from attnopt.plan.live.page_loss import PagesOfPrompt, longer, on_prompts, weighed
from attnopt.plan.live.pages import PagesChooser

WORDS = "pages(4, 3, recent=1)"
CLAUSE = page_choice(WORDS)


@pytest.fixture(scope="module")
def model():
    return language_model("llama")


def judged(model):
    layers = {path: LayerAttention("softmax scale(0.25) causal empty(zero)", c) for path, c in noted(model, tokens()).items()}
    found = PagesChooser(dense=1).choose(model, layers, CLAUSE)
    return on_prompts(model, layers, found, windows=True)


@pytest.mark.parametrize("line", ["softmax scale(0.3) causal", "softmax scale(0.3) softcap(1.5) causal"])
@pytest.mark.parametrize("options", ["", ", group=max"])
def test_a_prompt_is_what_the_spec_means(line, options, monkeypatch):
    monkeypatch.setattr(page_loss, "ROWS", 16)
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 45, 8, generator=made, dtype=torch.float64) for h in (4, 2, 2))
    words = f"pages(4, 3, recent=1{options})"
    found = PagesOfPrompt(page_choice(words), 0.3, 1.5 if "softcap" in line else None)(q, k, v)[0]
    torch.testing.assert_close(found, reference(f"{line} {words}", q, k, v), rtol=1e-10, atol=1e-10)


def test_positions_that_read_all_are_not_counted(model):
    ids = tokens(rows=3, length=20)["input_ids"]
    chooses = judged(model)
    loss = weighed(chooses, model, list(ids), CLAUSE, 0)
    with torch.no_grad():
        before, after = model(ids).logits, chooses(ids).logits
    torch.testing.assert_close(before[:, :12], after[:, :12])
    expected = [kl(a[12:], b[12:]) for a, b in zip(before, after, strict=True)]
    assert loss.samples == 3 and min(loss.values) > 0 and loss.values == pytest.approx(expected, rel=1e-3)
    assert weighed(model, model, list(ids), CLAUSE, 0).mean == 0.0


def test_a_layer_that_was_not_asked_is_no_loss_of_nothing(model):
    chooses = judged(model)
    chooses.double()  # a layer computes by kernels what it was optimised in alone
    with pytest.raises(AttnoptError, match="prompts in its own way"):
        weighed(chooses, language_model("llama").double(), list(tokens(length=20)["input_ids"]), CLAUSE, 0)


def test_texts_count_without_their_padding():
    given = tokens(length=13, padded=2)
    data = Calibration((given,), frozenset(given), True)
    assert [len(row) for row in longer(data, 10)] == [11, 13] and [len(row) for row in longer(data, 11)] == [13]
