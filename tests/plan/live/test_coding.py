"""Which codes a live model's cache is kept in: the fewest bytes whose loss, with the rewrites, holds the budget on both halves."""

from __future__ import annotations

import re

import pytest
import torch
from live_models import language_model

from attnopt.analysis.calibration import Calibration
from attnopt.passes.kvcache.akvq_vl import AkvqVl
from attnopt.passes.kvcache.int2_cache import Int2Cache
from attnopt.passes.kvcache.int4_cache import Int4Cache
from attnopt.passes.kvcache.int8_cache import Int8Cache
from attnopt.passes.quantize.dynamic_int8 import DynamicInt8
from attnopt.plan.judge.budget import Budget
from attnopt.plan.live.coding import coded, forms, is_cache_pass, of_rows, weighed

PASSES = (Int8Cache(), Int4Cache(group=8), Int2Cache(group=8))
INT8 = "cache(k=int8, v=int8)"


@pytest.fixture(scope="module")
def model():
    return language_model("llama")


@pytest.fixture(scope="module")
def data():
    rows = torch.randint(2, 97, (32, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(rows)
    mask[::3, :2] = 0
    batches = tuple({"input_ids": ids, "attention_mask": m} for ids, m in zip(rows.split(8), mask.split(8), strict=True))
    return Calibration(batches, frozenset(("input_ids", "attention_mask")), True)


def test_the_clauses_are_those_of_the_passes():
    assert forms(PASSES) == [
        "cache(v=int8)",
        INT8,
        "cache(v=int4, group=8, scales=fp16)",
        "cache(k=int4, v=int4, group=8, scales=fp16)",
        "cache(k=int2, v=int2, group=8, scales=fp16)",
    ]
    assert [is_cache_pass(p) for p in (*PASSES, AkvqVl(), DynamicInt8())] == [True] * 4 + [False]


def test_the_fewest_bytes_within_the_budget_are_taken(model, data):
    everything, said = coded(model, model, data, Budget.of(50.0), PASSES, 0)
    assert everything == "cache(k=int2, v=int2, group=8, scales=fp16)"
    assert said[0].startswith(f"the cache is kept as {everything}: 96 bytes a token in place of 512; with the rewrites mean KL")
    exact = weighed(model, model, data.split(0)[0], INT8, 0)
    found, said = coded(model, model, data, Budget.of(2 * exact.loss.upper), PASSES, 0)
    assert found == INT8 and "in place of 512" in said[0]
    assert any(re.match(r"cache\(k=int2.*: loses at most .*, over the budget", line) for line in said)


def test_a_form_that_costs_time_is_left_where_that_counts(model, data):
    def slower(words):
        return "" if words == INT8 else "a step takes 1.18 of its time on 4096 tokens"

    found, said = coded(model, model, data, Budget.of(50.0), PASSES, 0, slower)
    assert found == INT8
    assert "cache(k=int2, v=int2, group=8, scales=fp16): a step takes 1.18 of its time on 4096 tokens" in said


def test_no_codes_are_better_than_some_over_the_budget(model, data):
    found, said = coded(model, model, data, Budget.of(1e-9), PASSES, 0)
    assert found is None and said[0] == "the cache stays as it is, 512 bytes a token" and "over the budget" in said[1]


def test_the_loss_is_that_of_each_text_without_its_padding():
    before = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[0, 0] += torch.arange(5.0)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert of_rows(before, after, {"attention_mask": mask}) == [0.0, 0.0]
    first, second = of_rows(before, after, {"attention_mask": torch.ones_like(mask)})
    assert first > 0 and second == 0.0


def test_what_cannot_be_tried_is_a_line(model, data):
    found, said = coded(model, model, data, Budget(metric="cosine", limit=0.1), [Int8Cache(), AkvqVl()], 0)
    assert found is None and "akvq-vl: a live cache holds codes" in said[0] and "the budget is in cosine" in said[1]
    assert coded(model, model, data, Budget.of(1.0), [AkvqVl()], 0) == (None, said[:1])
