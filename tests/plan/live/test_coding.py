"""Which codes a live model's cache is kept in: the fewest bytes whose loss, with the rewrites, holds the budget on both halves."""

from __future__ import annotations

import re

import pytest
import torch
from live_models import language_model

from attnopt.analysis.calibration import Calibration
from attnopt.hosts.eviction.live_forms import live_form
from attnopt.ir.exact_ends import ExactEnds
from attnopt.ir.token_blocks import TokenBlocks
from attnopt.passes.kvcache.akvq_vl import AkvqVl
from attnopt.passes.kvcache.int2_cache import Int2Cache
from attnopt.passes.kvcache.int4_cache import Int4Cache
from attnopt.passes.kvcache.int8_cache import Int8Cache
from attnopt.passes.kvcache.zip_cache import ZipCache
from attnopt.passes.quantize.dynamic_int8 import DynamicInt8
from attnopt.plan.judge.budget import Budget
from attnopt.plan.live import coding
from attnopt.plan.live.coding import coded, forms, is_cache_pass, of_rows, weighed

PASSES = (Int8Cache(), Int4Cache(group=8), Int2Cache(group=8))
INT8 = "cache(k=int8, v=int8)"
ENDS = (
    "cache(k=int2, v=int2, group=128, k_bits=where(k < 2, 16, 2), v_bits=where(k < 2, 16, 2), clip=0.8, recent=4, scales=fp16, "
    "k_basis=hadamard, v_basis=hadamard)"
)


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
    assert [is_cache_pass(p) for p in (*PASSES, AkvqVl(), ZipCache(), DynamicInt8())] == [True] * 5 + [False]
    assert forms([AkvqVl(recent=4, pivots=2)]) == [ENDS]


def test_the_fewest_bytes_within_the_budget_are_taken(model, data):
    everything, said = coded(model, model, data, Budget.of(50.0), PASSES, 0)
    assert everything == "cache(k=int2, v=int2, group=8, scales=fp16)"
    assert said[0].startswith(f"the cache is kept as {everything}: 96 bytes a token in place of 512; with the rewrites mean KL")
    exact = weighed(model, model, data.split(0)[0], INT8, 0)
    found, said = coded(model, model, data, Budget.of(2 * exact.loss.upper), PASSES, 0)
    assert found == INT8 and "in place of 512" in said[0]
    assert any(re.match(r"cache\(k=int2.*: loses at most .*, over the budget", line) for line in said)


def test_a_form_that_costs_time_is_left_where_that_counts(model, data):
    def timed(words):
        return words == INT8, f"a step takes {'0.80' if words == INT8 else '1.18'} of its time on 4096 tokens"

    found, said = coded(model, model, data, Budget.of(50.0), PASSES, 0, timed)
    assert found == INT8
    assert "cache(k=int2, v=int2, group=8, scales=fp16): a step takes 1.18 of its time on 4096 tokens" in said
    assert f"{INT8}: a step takes 0.80 of its time on 4096 tokens" in said


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


def test_texts_are_read_as_they_are_generated_where_the_newest_tokens_are_exact(model, data, monkeypatch):
    """A prompt, then pieces: with pieces of one token the loss is that of steps, and with longer ones hardly another."""
    choosing = data.split(0)[0]
    at_once = weighed(model, model, choosing, ENDS.replace(", recent=4", ""), 0)
    losses = []
    for piece in (1, 2):
        monkeypatch.setattr(coding, "PIECE", piece)
        found = weighed(model, model, choosing, ENDS, 0)
        losses.append(found.loss.mean)
    assert 0 < losses[0] < losses[1] < at_once.loss.mean and found.bytes < 512
    batch = choosing.batches[0]
    logits, cache = coding.read(model, batch, live_form(ENDS))
    assert logits.shape[:2] == batch["input_ids"].shape and cache.get_seq_length() == 12
    whole, none = read_whole(model, batch), live_form(ENDS.replace("recent=4", "recent=12"))
    monkeypatch.setattr(coding, "exact_ends", lambda form: ExactEnds(form, 0, 0, ()))
    torch.testing.assert_close(coding.read(model, batch, none)[0], whole, atol=1e-4, rtol=1e-4)  # all of them exact


def read_whole(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_short_texts_say_nothing_of_exact_tokens(model, data):
    found, said = coded(model, model, data, Budget.of(50.0), [AkvqVl(recent=8, pivots=2)], 0)
    assert found is None and "of texts of 12 tokens 10 stay exact" in said[1]


def test_blocks_are_judged_as_they_are_read_and_padded_texts_are_refused(model, data, monkeypatch):
    monkeypatch.setattr(coding, "LENGTH", 64)
    found, said = coded(model, model, data, Budget.of(50.0), [ZipCache(block=4)], 0)
    assert found is None and all("rows are padded" in line for line in said[1:])
    texts = Calibration(tuple({**b, "attention_mask": torch.ones_like(b["input_ids"])} for b in data.batches), data.axis, True)
    found, said = coded(model, model, texts, Budget.of(50.0), [ZipCache(block=4)], 0)
    assert found == TokenBlocks(4, 4).words_of_a_spec  # of so few tokens two sets have more scales than codes
    losses = [weighed(model, model, texts.split(0)[0], TokenBlocks(4, n).words_of_a_spec, 0).loss.mean for n in (2, 4)]
    assert 0 < losses[1] < losses[0] and model.config._attn_implementation == "sdpa"
    assert coded(model, model, texts, Budget.of(50.0), [ZipCache(shares=(0.5,))], 0)[1][1].count(
        "of texts of 12 tokens 100 stay exact"
    )
    assert coded(model, model, texts, Budget.of(50.0), [ZipCache(block=4, shares=(0.25,))], 0) == (
        None,
        ["1 of 4 tokens salient: a live cache has half or all; traced graphs take it"],
    )


def test_what_cannot_be_tried_is_a_line(model, data):
    found, said = coded(model, model, data, Budget(metric="cosine", limit=0.1), [Int8Cache()], 0)
    assert found is None and "the budget is in cosine" in said[0]
    assert coded(model, model, data, Budget.of(1.0), [], 0) == (None, [])
