"""Smaller heads through the planner: priced, measured, chosen under a budget, applied again from the plan in the ONNX export."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from shrunk_models import IDS, evidence, host, model, output

import attnopt
from attnopt.cost.target import load_target
from attnopt.ir.block import Rotary
from attnopt.passes import DropAttention, MeanPooling
from attnopt.plan.arrays import Arrays
from attnopt.plan.budgeted import recovered
from attnopt.plan.judge.quality import Loss
from attnopt.plan.memory.memory import Memory
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.replay import moves_from, step_of, transferred


@functools.cache
def identical():
    """A language model whose key heads are alike: sharing them loses nothing."""
    import copy

    made = copy.deepcopy(model("turned"))
    with torch.no_grad():
        for attention in made.attentions:
            for projection in (attention.k, attention.v):
                projection.weight[8:] = projection.weight[:8]
    return made


@functools.cache
def optimized():
    batches = [{"input_ids": torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(i))} for i in range(8)]
    return attnopt.optimize(
        identical(), {"input_ids": IDS}, budget=1e-6, calibration=batches, passes=["mean-pooling"], select="model", minimise="memory"
    )  # fmt: skip


def test_heads_that_are_alike_are_shared_under_a_tiny_budget():
    fast = optimized()
    assert [s.kind for s in fast.plan.steps] == ["1 of 2 heads"] * 2
    assert fast.report.bytes_after < fast.report.bytes_before
    torch.testing.assert_close(fast(input_ids=IDS), identical()(IDS), atol=1e-5, rtol=1e-5)


def test_the_weights_that_go_are_counted():
    given = host("turned", "torch")
    grouping = Grouping(given)
    group = grouping.of("block")[0]
    rewrite = MeanPooling()
    move = Move(rewrite, group, rewrite.propose(group, None)[0])
    memory = Memory(given.graph, list(zip(grouping.sites, grouping.blocks, strict=True)), [{}])
    made = given.copy()
    rewrite.apply(move.candidate, Grouping(made).of("block")[0])
    made.finish()
    frequencies = group.blocks[0].part("k", Rotary).inv_freq.nbytes  # written anew beside the turned keys
    assert memory.saved([move]) == 2 * 8 * 32 * 4 == memory.weights - Memory(made.graph, (), ()).weights + frequencies


def test_the_report_says_what_tuning_recovered():
    def lost(mean, samples=16):
        return Loss("kl", mean, mean, samples)

    found = {"a: 2 of 4": lost(0.4), "a: 2 of 4, fitted": lost(0.1), "b": lost(0.2), "b, fitted": lost(0.3), "c": lost(1.0, 4)}
    search = SimpleNamespace(kinds=[*found, "c, fitted"], everywhere={**found, "c, fitted": lost(0.5)})
    assert recovered(search) == [
        "tuned, a: 2 of 4 everywhere loses 0.4 -> 0.1: 75% of it recovered",
        "tuned, b everywhere loses 0.2 -> 0.3: nothing recovered",
    ]


def test_a_layer_that_is_fitted_outside_of_its_block_is_carried_over_to_an_export():
    """Without the first attention the output projection of the second is fitted, which stands in another block."""
    given, other, found = host("turned", "torch"), host("turned", "onnx"), evidence("turned", "torch")
    group, second = Grouping(given).of("block")
    fitted = next(c for c in DropAttention().propose(group, found) if c.needs == "tuning")
    assert fitted.nodes == (second.blocks[0].o.node,)
    (move,) = Arrays(found).ready([Move(DropAttention(), group, fitted)])
    steps = [step_of(move)]
    made = []
    for at, own in ((given, steps), (other, transferred(steps, given, other))):
        shop = Workshop(at, {}, load_target("cpu")[0], "torch", 0, {})
        made.append(output(shop.edited(at.copy(), moves_from(own, at), {})))
    torch.testing.assert_close(*made, atol=1e-5, rtol=1e-5)
    assert float((made[0] - output(given)).abs().max()) > 1e-2
