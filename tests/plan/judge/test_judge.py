"""Losses sample by sample against values worked out by hand: padding, users' scores, and what no metric can judge."""

from __future__ import annotations

import pytest
import torch

from attnopt.analysis.calibration import Calibration
from attnopt.errors import BudgetError
from attnopt.ir.dims import symbol
from attnopt.ir.graph import Graph, Value
from attnopt.plan.judge.budget import Budget
from attnopt.plan.judge.judge import Judge
from attnopt.plan.judge.quality import METRICS, Loss

B, L = symbol("batch"), symbol("length")
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


class Scaled:
    """A host whose output is x [batch, length, 3] times a number; it counts its runs."""

    def __init__(self, factor=1.0, output=None):
        self.factor, self.output, self.runs = factor, output or (lambda x: x), 0
        inputs = [Value("x", (B, L, 3), "float32"), Value("attention_mask", (B, L), "int64")]
        shape = (B, L, 3) if output is None else None
        self.graph = Graph(inputs=inputs, outputs=[Value("ids", (B, L), "int64"), Value("y", shape, "float32")])

    def runner(self):
        def run(inputs):
            self.runs += 1
            return [inputs["attention_mask"], self.output(inputs["x"] * self.factor)]

        return run


def data(host, sizes=(3, 2), mask=MASK):
    batches = [{"x": torch.rand(n, 4, 3) + 0.5, "attention_mask": mask[:n]} for n in sizes]
    return Calibration.of(host.graph, batches)


def judge(budget=Budget("relative", 0.1), host=None, sizes=(3, 2), **options):
    host = host or Scaled()
    return Judge(host, data(host, sizes), budget, names=("ids", "y"), **options)


def test_one_loss_for_each_sample():
    judged = judge()
    loss = judged.loss(Scaled(1.25))
    assert (loss.metric, loss.samples) == ("relative error", 5)
    assert loss.values == pytest.approx((0.25,) * 5)
    assert (loss.mean, loss.upper) == pytest.approx((0.25, 0.25))
    assert not judged.accepts(loss)
    assert judged.accepts(judged.loss(Scaled(1.05)))
    assert judged.loss(Scaled()).upper == 0.0


def test_a_first_idea_is_measured_on_the_first_samples():
    """Whole batches of 3 and 2 samples: one is enough for 3, both for 4."""
    judged = judge()
    assert [judged.loss(Scaled(1.25), most=n).samples for n in (1, 3, 4, 99)] == [3, 3, 5, 5]
    asked = []
    assert judged.loss(Scaled(1.25), most=1, ends=lambda first: asked.append(first.samples)).samples == 5
    assert asked == [3]  # of the first batch; it was not enough


def test_padding_does_not_count():
    judged = judge()

    def rows_off(x):
        made = x.clone()
        made[0, 3] += 5.0  # the mask hides it
        made[1, 0] *= 2.0
        return made

    batch = judged.calibration.batches[0]["x"]
    wanted = float(batch[1, 0].norm() / batch[1, :2].norm())
    losses = judged.loss(Scaled(output=rows_off)).values
    assert losses[:3] == pytest.approx((0.0, wanted, 0.0), abs=1e-6)


def test_a_loss_is_accepted_by_its_bound_and_not_by_its_mean():
    judged = judge()
    assert not judged.accepts(Loss.of("relative error", [0.0] * 15 + [0.5]))  # a mean of 0.03 of which little is known
    assert judged.accepts(Loss.of("relative error", [0.03] * 16))


def test_the_original_runs_once_where_memory_allows():
    host = Scaled()
    judged = judge(host=host)
    for _ in range(3):
        judged.loss(Scaled(1.1))
    assert host.runs == 2
    tight = Scaled()
    poor = judge(host=tight, memory=0)
    assert poor.loss(Scaled(1.1)).mean == pytest.approx(0.1)
    assert poor.loss(Scaled(1.1)).mean == pytest.approx(0.1)
    assert tight.runs == 1 + 2 * 2


def test_metrics():
    assert judge(Budget.of(0.1)).metric is METRICS["relative"]  # by the output's name and shape
    assert judge(Budget("kl", 0.1)).loss(Scaled(2.0)).mean > 0
    assert judge(Budget("cosine", 0.1)).loss(Scaled(2.0)).mean == pytest.approx(0.0, abs=1e-6)
    named = Scaled()
    assert Judge(named, data(named), Budget.of(0.1), names=("ids", "logits")).metric is METRICS["kl"]


def test_what_is_no_number_is_never_within_a_budget():
    judged = judge()
    assert judged.loss(Scaled(float("nan"))).mean == judged.loss(Scaled(float("nan"))).upper == float("inf")
    holes = Scaled(output=lambda x: x.masked_fill(torch.arange(4)[:, None] == 0, float("nan")))  # of the original: no promise
    assert judge(host=holes).loss(Scaled(1.5)).values == pytest.approx((0.5,) * 5)


def test_a_batch_whose_output_has_no_batch_axis_is_one_sample():
    whole = Scaled(output=lambda x: x.flatten(0, 1))
    assert judge(host=whole).loss(Scaled(1.5, lambda x: x.flatten(0, 1))).samples == 2


def score(inputs, outputs):
    """Mean of the output over real tokens, one number for each sample."""
    mask = inputs["attention_mask"][..., None]
    return (outputs["y"] * mask).sum((1, 2)) / mask.sum((1, 2)) / 3


def test_the_users_score():
    judged = judge(Budget("quality", drop=0.5), quality=score)
    before = torch.cat([score(b, {"y": b["x"]}) for b in judged.calibration.batches])
    loss = judged.loss(Scaled(0.75))
    assert (loss.metric, loss.samples) == ("drop of quality", 5)
    assert loss.values == pytest.approx((before / 4).tolist(), rel=1e-5)
    assert judged.loss(Scaled(2.0)).mean < 0  # better than the original
    by_batch = judge(Budget("quality", drop=0.5), quality=lambda inputs, outputs: float(score(inputs, outputs).mean()))
    assert by_batch.loss(Scaled(0.75)).samples == 2


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("good", "returned a str, not one number"),
        (None, "returned a NoneType"),
        (torch.zeros(2), "returned 2 scores for a batch of 3"),
        (float("nan"), "returned NaN"),
    ],
)
def test_scores_that_are_none(returned, says):
    judged = judge(Budget("quality", drop=0.5), quality=lambda inputs, outputs: returned)
    with pytest.raises(BudgetError, match=says):
        judged.loss(Scaled())


def test_what_cannot_be_judged():
    whole = Scaled(output=lambda x: (x > 0).long())
    for make, says in (
        (lambda: judge(Budget("quality", drop=0.1)), "a budget in quality needs a score"),
        (lambda: judge(Budget("kl", 0.1), quality=score), "a score is given, but the budget is in kl"),
        (lambda: judge(host=whole), "returns no real numbers"),
        (lambda: judge(Budget("kl", 0.1), host=Scaled(output=lambda x: x.sum((1, 2)))), "has no last dimension for kl"),
        (lambda: Judge(Scaled(), Calibration(()), Budget.of(0.1)), "no data to measure a loss on"),
    ):
        with pytest.raises(BudgetError, match=says) as raised:
            make()
        assert raised.value.next_move
