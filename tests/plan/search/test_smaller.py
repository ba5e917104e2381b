"""What makes a model smaller after a search for time: the most bytes first, within budget and time; else a step says why not."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from attnopt.ir.graph import Node
from attnopt.ir.site import Refusal
from attnopt.passes import Candidate, Group
from attnopt.plan.judge.quality import Loss
from attnopt.plan.options.proposals import Class, Move, Proposal
from attnopt.plan.search.effort import EFFORTS, Spent
from attnopt.plan.search.smaller import Smaller
from attnopt.plan.timing.timing import Timing


@dataclass(frozen=True)
class Told:
    name: str = "told"
    exact: bool = False
    per: str = "model"

    def propose(self, group: Group, evidence: object) -> list[Candidate] | Refusal:
        return Refusal("not asked")


def move(kind, group="model", op="gather"):
    node = Node(op, (), (), name=f"{op} of {group}")
    return Move(Told(), Group(None, name=group), Candidate("told", False, kind, kind=kind, nodes=(node,), changes=("weights",)))


class Asked:
    """Stands for a search, its losses, workshop, stopwatch and memory: each kind loses, saves and takes what it is told to."""

    def __init__(self, classes, loses, frees, slower=None, elsewhere=1.0):
        self.classes, self.loses, self.frees, self.slower, self.elsewhere = classes, loses, frees, slower or {}, elsewhere
        self.losses = self.workshop = self.stopwatch = self.memory = self
        self.validator, self.allowed, self.spent, self.attempts = object(), 1.0, Spent(EFFORTS["low"]), []
        self.exact, self.everywhere = self.runs(()), {}

    def runs(self, moves):
        return lambda: moves

    def built(self, moves):
        return SimpleNamespace(runner=lambda: self.runs(tuple(moves)))

    def times(self, runners):
        seconds = {n: 1.0 + sum(self.slower.get(m.candidate.kind, 0.0) for m in run()) for n, run in runners.items()}
        return {name: Timing((x,) * 3) for name, x in seconds.items()}

    def of(self, moves, title="", scale=1.0):
        lost = scale * sum(self.loses[m.candidate.kind] for m in moves)
        return Loss("told", lost, lost, 1)

    def validation(self, moves, attempt):
        self.attempts.append(attempt)
        return self.of(moves, scale=self.elsewhere)

    def limit(self, loss):
        return loss.upper

    def holds(self, loss):
        return loss.upper <= self.allowed

    def worth(self, option):
        return self.saved(option.moves)

    def saved(self, moves):
        return sum(self.frees[m.candidate.kind] for m in moves)


INT8, INT4, LAYER = move("int8"), move("int4"), move("layers", "mlp", "linear")
CLASSES = [Class("mlp", (Proposal(), Proposal((LAYER,)))), Class("model", (Proposal(), Proposal((INT8,)), Proposal((INT4,))))]
FREES = {"int8": 3e6, "int4": 5e6, "layers": 1e6}


def added(loses, kept=(LAYER,), undone=frozenset(), **told):
    search = Asked(CLASSES, {"layers": 0.5, **loses}, FREES, **told)
    return Smaller(search, (1 if kept else 0, 0), kept, search.of(kept), undone).run()


def test_the_most_bytes_that_hold():
    made = added({"int8": 0.1, "int4": 0.3})
    assert made.picks == (1, 2) and made.kept == (LAYER, INT4) and made.loss.mean == pytest.approx(0.8)
    (step,) = made.steps
    assert step.kept and step.why == (
        "measured 1.00x the speed of the model before it, loss 0.8 so far, and 5 MB smaller: added, the budget had room"
    )
    made = added({"int8": 0.1, "int4": 0.6})
    assert made.picks == (1, 1) and made.kept == (LAYER, INT8)
    assert [(s.kept, s.names) for s in made.steps] == [(False, ("model",)), (True, ("model",))]
    assert made.steps[0].why == "to make the model smaller: loss up to 1.1, over the budget 1"


def test_an_exact_plan_within_a_budget_is_made_smaller_too():
    assert added({"int8": 0.1, "int4": 0.3}, kept=()).kept == (LAYER, INT4)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"slower": {"int8": 0.2, "int4": 0.2}}, "it is slower"),
        ({"elsewhere": 3.0}, "on the data held back, over the budget 1"),
    ],
)
def test_what_costs_time_or_fails_on_other_data_is_left(told, said):
    made = added({"int8": 0.1, "int4": 0.3}, **told)
    assert made.picks == (1, 0) and made.kept == (LAYER,) and made.loss.mean == 0.5
    assert len(made.steps) == 2 and all(not s.kept and s.why.endswith(said) for s in made.steps)
    assert made.search.attempts == ([1, 2] if "elsewhere" in told else [])  # each at a higher confidence


def test_what_was_undone_is_not_tried_again():
    made = added({"int8": 0.1, "int4": 0.3}, undone=frozenset({("told: int4", "model")}))
    assert made.kept == (LAYER, INT8)


def test_groups_that_were_left_take_another_kind_where_it_is_not_slower():
    """Both layers were to be int4, which was undone; int8 of both is one step, and must save what a table need not: time."""
    layers = [[move(kind, name, "linear") for kind in ("int4", "int8")] for name in "ab"]
    classes = [Class(name, (Proposal(), *(Proposal((m,)) for m in each))) for name, each in zip("ab", layers, strict=True)]
    undone = frozenset(("told: int4", name) for name in "ab")

    def left(slower=None, everywhere=None):
        search = Asked(classes, {"int8": 0.1, "int4": 0.1}, FREES, slower)
        search.everywhere = everywhere or {}
        return Smaller(search, (1, 1), (), None, undone).run()

    assert left().kept == (layers[0][1], layers[1][1]) and left().picks == (2, 2)
    assert [(s.names, s.groups) for s in left().steps] == [(("a", "b"), 2)]
    assert left(slower={"int8": 0.01}).kept == ()
    assert left(everywhere={"told: int8": Loss("told", 2.0, 2.0, 8)}).steps == []  # it is known to lose too much


def test_what_saves_no_byte_is_not_tried():
    search = Asked([CLASSES[0]], {"layers": 0.1}, {"layers": 0.0})
    assert Smaller(search, (0,), (), None).run().steps == []
