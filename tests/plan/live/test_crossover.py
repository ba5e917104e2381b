"""From how many tokens on decode kernels are used: by steps of the whole model, which are made up here."""

from __future__ import annotations

import pytest
import torch
from live_models import generated, language_model, tokens

import attnopt
from attnopt.hosts.module.interface import HELD
from attnopt.plan.live import crossover, layers
from attnopt.plan.live.codes import held_by
from attnopt.plan.timing.timing import Timing


@pytest.fixture
def model():
    """With positions for every length that is timed."""
    made = language_model("llama")
    made.config.max_position_embeddings = 4096
    return made


def optimised(monkeypatch, model, shares):
    """With kernels in both phases, and steps with decode kernels that take these shares of the time without, by tokens."""
    asked = []

    def times(held, used, batch, length, most):
        asked.append(length)
        share = shares[length]
        return None if share is None else {"own": Timing((1.0,)), "kernels": Timing((share,))}

    monkeypatch.setattr(
        layers, "measured", lambda host, site, fits, refused, *_: layers.Chosen(site, fits[0], "as it is asked for")
    )
    monkeypatch.setattr(crossover, "step_times", times)
    fast = attnopt.optimize(model, target="cpu", passes=["fuse-attention"])
    return fast, asked, [n for n in fast.report.notes if n.startswith("live, decode: a step")]


def leasts(fast) -> set[int]:
    return {held.least for held in held_by(fast).values()}


def names(fast) -> set[str]:
    return {held.names[1] for held in held_by(fast).values()}


def test_kernels_that_pay_everywhere_are_used_everywhere(monkeypatch, model):
    fast, asked, said = optimised(monkeypatch, model, {128: 0.9, 512: 0.8, 2048: 0.7})
    assert asked == [2048, 128]
    assert leasts(fast) == {0}
    assert said == ["live, decode: a step takes 0.90 on 128, 0.70 on 2048 tokens of its time without kernels"]


def test_kernels_are_used_from_where_on_they_pay(monkeypatch, model, tmp_path):
    fast, asked, said = optimised(monkeypatch, model, {128: 1.1, 512: 0.99, 2048: 0.7})
    assert asked == [2048, 128, 512]
    assert leasts(fast) == {512}
    assert said[0].endswith("they are used from 512 on")
    held = getattr(fast.model.layers[0].self_attn, HELD)
    q, k = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 512, 16)
    assert held.kernel(q, k, True, {}) is held.decode
    assert held.kernel(q, k[:, :, 1:], True, {}) is None
    fast.save_pretrained(tmp_path / "fast")
    assert leasts(attnopt.load(tmp_path / "fast")) == {512}
    assert torch.equal(generated(fast, tokens()), generated(model, tokens()))


def test_kernels_that_never_pay_are_left_out(monkeypatch, model):
    fast, asked, said = optimised(monkeypatch, model, {2048: 1.2})
    assert asked == [2048]
    assert names(fast) == {""}
    assert said == ["live, decode: a step on 2048 tokens takes 1.20 of its time by kernels, so that none is used"]
    assert torch.equal(generated(fast, tokens()), generated(model, tokens()))


def test_kernels_stay_where_no_step_can_be_timed(monkeypatch, model):
    fast, _, said = optimised(monkeypatch, model, {2048: None})
    assert names(fast) != {""}
    assert said == []
    model.config.max_position_embeddings = 100
    fast, asked, said = optimised(monkeypatch, model, {})
    assert (asked, said) == ([], [])
    assert names(fast) != {""}


def test_steps_are_timed_in_the_model_itself(model):
    """Without anything made up: what is said is what was found."""
    fast = attnopt.optimize(model, target="cpu", passes=["fuse-attention"])
    if names(fast) - {""}:
        assert any(n.startswith("live, decode: a step takes") for n in fast.report.notes)
