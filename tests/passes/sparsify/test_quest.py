"""Quest: the pages that a step chooses and its output are those of the reference, step after step, and its state is that of all keys."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cached_step import Step, example
from rounded_steps import inputs_of, opened, whole

from attnopt.ir.reference import attend
from attnopt.passes import Quest
from attnopt.passes.cache_pages import Pages
from attnopt.selectors.pages import state_of

SMALL = Quest(size=4, budgets=(12,), dense=0)
PAST = 21


def seen(*dropped):
    made = [SimpleNamespace(mean=d, worst=2 * d, kept=1 - d, bound=8 * d) for d in dropped]
    return SimpleNamespace(left_out=lambda site, name, forms: made[: len(forms(site))])


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("variant", ["12 tokens", "12 tokens together"])
def test_steps_are_those_of_the_reference(kind, variant):
    host = opened(kind, past=PAST)
    made = host.copy()
    group = whole(made)
    candidate = next(c for c in SMALL.propose(group, seen(0.2, 0.1)) if c.kind == variant)
    SMALL.apply(candidate, group)
    made.finish()
    pages = Pages(**candidate.options["pages"])
    line = f"softmax scale({8**-0.5}) offset(size(k) - size(q)) causal {pages.clause}"
    model = Step().eval()
    x, (keys, values) = example(past=PAST)
    state, run = made.adapt(inputs_of(host, past=PAST)), made.runner()
    names = [s.name for s in made.input_specs]
    for _ in range(6):
        output, *kept = run(state)
        q, k, v = model.rows(x)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        wanted = model.finished(x, attend(line, q, keys, values).output)
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(output, model.finished(x, attend("softmax", q, keys, values).output), atol=1e-3)
        bounds = state_of(keys, 4)
        for got, want in zip(kept, (keys, bounds.low, bounds.high, values), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        state, x = dict(zip(names, (wanted, *kept), strict=True)), wanted
