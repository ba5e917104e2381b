"""Quest: the pages that a step chooses and its output are those of the reference, step after step, and its state is that of all keys."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cached_step import Step, example
from rounded_steps import inputs_of, opened, whole

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.codegen.tvm.availability import missing
from attnopt.cost.target import load_target
from attnopt.ir.reference import attend
from attnopt.ir.site import Refusal
from attnopt.passes import Quest
from attnopt.passes.edits.caches.pages import Pages
from attnopt.patterns import recognise
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.plan.options.workshop import Workshop
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


@pytest.mark.skipif(missing() is not None, reason="TVM is not here")
@pytest.mark.parametrize("variant", ["12 tokens", "12 tokens together"])
def test_a_kernel_reads_the_pages_where_they_lie(variant):
    """The graph that is built gathers nothing, and its steps are those of the nodes that choose and gather."""
    host = opened("torch", past=PAST)
    group = Grouping(host, recognise(host.graph).sites).whole()[0]
    candidate = next(c for c in SMALL.propose(group, seen(0.2, 0.1)) if c.kind == variant)
    shop = Workshop(host, {}, load_target("cpu")[0], "torch", 0, host.graph.sizes(host.example_inputs()))
    made = shop.built([Move(SMALL, group, candidate)])
    called = [str(n.target) for n in made.module.graph.nodes if n.op == "call_function"]
    assert called.count("attnopt.tvm_pages.default") == 1
    assert not any(word in name for name in called for word in ("topk", "index", "attention", "gather"))
    plain = host.copy()
    SMALL.apply(candidate, whole(plain))
    plain.finish()
    state, runs = made.adapt(inputs_of(host, past=14)), (made.runner(), plain.runner())
    for _ in range(3):  # over the end of a page
        found, right = (run(state) for run in runs)
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
        state = dict(zip(state, found, strict=True))


@pytest.mark.parametrize("past", [3, 11])
def test_few_pages_are_all_of_them(past):
    """Where there are no more pages than are read, a step is dense; the places that are left over hold nothing."""
    host = opened("torch", past=PAST)
    made = host.copy()
    group = whole(made)
    candidate = next(c for c in SMALL.propose(group, seen(0.2, 0.1)) if c.kind == "12 tokens")
    SMALL.apply(candidate, group)
    made.finish()
    output, *_ = made.runner()(made.adapt(inputs_of(host, past=past)))
    wanted, *_ = host.runner()(inputs_of(host, past=past))
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)


def test_calibration_says_what_the_other_pages_hold():
    host = opened("torch", past=PAST)
    group = whole(host)
    inputs = inputs_of(host, past=PAST)
    evidence = Evidence(host, Calibration.of(host.graph, [inputs]), sites=group.sites)
    apart, together = SMALL.propose(group, evidence)
    x, (keys, _) = example(past=PAST)
    q, k, _ = Step().eval().rows(x)
    q, k = q.detach(), k.detach()
    weights = attend(f"softmax scale({8**-0.5})", q, torch.cat([keys, k], 2), torch.cat([keys, k], 2)).weights
    shown = attend(f"softmax scale({8**-0.5}) offset(size(k) - size(q)) causal pages(4, 3, recent=1)", q, torch.cat([keys, k], 2),
                   torch.cat([keys, k], 2)).weights > 0  # fmt: skip
    assert apart.options["dropped"] == pytest.approx(float((weights * ~shown).sum(-1).mean()), abs=1e-5)
    assert apart.options["kept"] == pytest.approx(float(shown.double().mean()), abs=1e-6)
    assert 0 < apart.options["dropped"] <= apart.options["worst"] <= 1 and apart.options["bound"] > 0
    assert together.options["dropped"] >= 0 and together.kind == "12 tokens together"
    assert apart.shapes == {group.sites[0].name: {"k": 12}} and not apart.exact


def test_refusals():
    group = whole(opened("torch", past=PAST))
    for rewrite, given, why in (
        (SMALL, None, "weighed on calibration data, and there are none"),
        (Quest(), seen(0.1, 0.1, 0.1, 0.1), "no attention after the first 2"),
        (SMALL, seen(0.0, 0.0), "no calibration sequence has more than 12 keys"),
    ):
        found = rewrite.propose(group, given)
        assert isinstance(found, Refusal) and why in found.reason
    short = rewrite_of_past(5)
    assert isinstance(short, Refusal) and "traced" in short.reason


def rewrite_of_past(past):
    return Quest(size=16, budgets=(48,), dense=0).propose(whole(opened("torch", past=past)), seen(0.1, 0.1))
