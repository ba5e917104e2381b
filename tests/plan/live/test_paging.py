"""Pages are taken where a step measures faster with them and the budget holds on both halves; the report says why not."""

from __future__ import annotations

import pytest
import torch
from live_models import language_model, tokens

from attnopt.analysis.calibration import Calibration
from attnopt.hosts.module.layer_attention import LayerAttention
from attnopt.passes.kvcache.int8_cache import Int8Cache
from attnopt.passes.sparsify.quest import Quest
from attnopt.plan.judge.budget import Budget
from attnopt.plan.live import paging
from attnopt.plan.live.codes import held_by
from attnopt.plan.live.converting import noted
from attnopt.plan.live.pages import PagesChooser
from attnopt.plan.live.paging import Paging, choices, is_page_pass
from attnopt.plan.timing.timing import Timing

PASSES = (Quest(size=4, budgets=(16, 12)),)
TOGETHER, APART = "pages(4, 3, recent=1, group=max)", "pages(4, 3, recent=1)"
FASTER = {"plain": Timing((1.0,)), "whole": Timing((0.8,)), "pages": Timing((0.5,))}


@pytest.fixture(scope="module")
def model():
    return language_model("llama")


@pytest.fixture(scope="module")
def data():
    rows = torch.randint(2, 97, (32, 18), generator=torch.Generator().manual_seed(0))
    batches = tuple({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows.split(8))
    return Calibration(batches, frozenset(("input_ids", "attention_mask")), True)


@pytest.fixture
def asked(model, data, monkeypatch):
    """Paging(…) with other options, and what a clock would tell."""

    def made(limit=50.0, times=FASTER, **options):
        monkeypatch.setattr(paging, "step_times", lambda *given: times)
        monkeypatch.setattr(paging, "SHORT", 1)  # tests have short caches
        layers = {path: LayerAttention("softmax scale(0.25) causal empty(zero)", c) for path, c in noted(model, tokens()).items()}
        given = {"data": data, "batch": 1, "length": 64, "chooser": PagesChooser(layers, windows=True, dense=1), **options}
        return Paging(model, model, budget=Budget.of(limit), **given).taken(PASSES)

    return made


def test_the_choices_are_those_of_the_pass():
    assert [p.clause for p in choices(PASSES)] == [TOGETHER, APART, TOGETHER.replace("3", "4"), APART.replace("3", "4")]
    assert [is_page_pass(p) for p in (*PASSES, Int8Cache())] == [True, False]


def test_the_fewest_keys_that_hold_the_budget_are_taken(asked, model):
    words, said = asked()
    assert words == TOGETHER and len(said) == 1 and not held_by(model)
    assert said[0].startswith(
        f"one query reads {TOGETHER} of a cache: a step takes 0.50 of its time on 64 tokens; with the rewrites mean KL"
    )
    assert said[0].endswith("without pages 0 (behind the first 12 tokens of texts of up to 18; longer caches were not judged)")


def test_over_the_budget_they_are_not(asked):
    words, said = asked(1e-6)
    assert words is None and said[0] == "every query reads the whole cache"
    assert [line.split(":")[0] for line in said[1:]] == [p.clause for p in choices(PASSES)]
    assert all("loses at most" in line and line.endswith("over the budget") for line in said[1:])


def test_a_step_must_be_a_tenth_faster(asked):
    words, said = asked(times={**FASTER, "pages": Timing((0.95,))})
    assert words is None and "a step takes 0.95 of its time on 64 tokens" in said[-1]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"length": 0}, 'no step on a long cache is asked for; shapes="decode:16384" asks for one'),
        ({"minimise": "memory"}, "it saves time"),
        ({"length": 12}, "a cache of 12 tokens, not 1 times what a query reads, is read whole"),
        ({"times": None}, "no step could be timed"),
        ({"chooser": PagesChooser(dense=2)}, "no layer can choose pages: no layer was recognised"),
    ],
)
def test_why_not(asked, options, why):
    words, said = asked(**options)
    assert words is None and any(why in line for line in said)


def test_texts_that_are_no_longer_than_what_is_read_tell_nothing(asked, data):
    short = Calibration(tuple({n: x[:, :12] for n, x in b.items()} for b in data.batches), data.axis, True)
    words, said = asked(data=short)
    assert words is None
    assert "more than the 12 tokens that a query reads, and a half of the data has 0 of 16 that are needed" in said[1]
    assert len(said) == 3  # once for each number of keys
