"""AKVQ-VL: what its clause means, in both hosts; pivots and the newest tokens exact, however long the past is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cached_step import Step, example
from rounded_steps import check_step, opened, rewritten, whole

import attnopt
from attnopt.passes import AkvqVl
from attnopt.passes.edits.caches.plan import forms_of

SMALL = AkvqVl(recent=3, pivots=2, group=4)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("folded", ["", ", folded"])
@pytest.mark.parametrize("rewrite", [SMALL, AkvqVl(recent=6, pivots=0), AkvqVl(recent=1, pivots=5)], ids=lambda r: f"{r.recent}")
def test_equal_to_the_reference_with_the_clause(kind, rewrite, folded):
    _, candidate, _ = check_step(rewrite, opened(kind), f"2-bit pivots{folded}")
    ((_, line),) = candidate.cached.items()
    assert f"clip=0.8, recent={rewrite.recent}, scales=fp16, k_basis=hadamard, v_basis=hadamard" in line
    assert ("k_bits=where(k < 5, 16, 2)" in line) == (rewrite.pivots == 5)


@pytest.mark.parametrize("past", [2, 3, 9])
def test_pasts_that_are_shorter_or_longer_than_what_stays_exact(past):
    check_step(SMALL, opened("torch"), "2-bit pivots", past=past)


def test_steps_that_follow_each_other_keep_the_state_of_all_their_tokens():
    host = opened("torch")
    made, candidate = rewritten(SMALL, host, "2-bit pivots")
    call, (x, past), forms = made.callable(), example(past=2), forms_of(candidate)
    model, exact = Step().eval(), past
    packed = tuple(tuple(forms[site, side].packed(x)) for (site, side), x in zip(forms, past, strict=True))
    for step in range(6):
        output, packed = call(x, packed)
        wanted, exact = model(x, exact)
        if step < 2:
            torch.testing.assert_close(output, wanted, atol=1e-6, rtol=1e-6)  # two pivots and three recent: all exact
        x = wanted
        for form, held, whole_past in zip(forms.values(), packed, exact, strict=True):
            for got, want in zip(held, form.packed(whole_past), strict=True):
                torch.testing.assert_close(got.float(), want.float(), atol=1e-5, rtol=1e-5)


def test_what_is_saved_takes_and_returns_the_same_state(tmp_path: Path):
    made, candidate = rewritten(SMALL, opened("torch"), "2-bit pivots")
    made.save_pt2(tmp_path / "step.pt2", {})
    loaded = attnopt.load(tmp_path / "step.pt2")
    for past in (2, 11):
        x, exact = example(past=past)
        state = tuple(tuple(f.packed(side)) for f, side in zip(forms_of(candidate).values(), exact, strict=True))
        flat = [[got, *[t for side in kept for t in side]] for got, kept in (loaded(x, state), made.callable()(x, state))]
        for got, want in zip(*flat, strict=True):
            torch.testing.assert_close(got, want)


def test_layers_that_read_their_text_have_4_bits():
    def seen(share):
        return SimpleNamespace(attention=lambda site: SimpleNamespace(kept=lambda first, window: torch.tensor([share, share])))

    pivots = ["2-bit pivots", "2-bit pivots, folded"]
    assert [c.kind for c in AkvqVl().propose(whole(opened("torch")), seen(0.95))] == pivots
    found = AkvqVl().propose(whole(opened("torch")), seen(0.5))
    assert [c.kind for c in found] == [*pivots, "bits by layer", "bits by layer, folded"]
    for candidate in found[2:]:
        assert candidate.needs == "calibration" and "1 layers that read their text in 4 bits" in candidate.description
        assert {(f.rows.bits, f.rows.clip, f.first, f.recent) for f in forms_of(candidate).values()} == {(4, 1.0, 0, 128)}


def test_a_width_without_a_basis_is_refused():
    refused = AkvqVl().propose(whole(opened("torch", width=12)), None)
    assert refused.reason == "keys: a Hadamard basis needs rows of a power of two, and these have 12 channels"
