"""Roll-back: the groups that make the model slower are found and undone alone, tied ones together, within the time that there is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from attnopt.ir.site import Refusal
from attnopt.passes import Candidate, Group
from attnopt.plan.judge.quality import Loss
from attnopt.plan.options.proposals import Class, Move, Proposal
from attnopt.plan.search.effort import EFFORTS, Spent
from attnopt.plan.search.roll_back import Check, in_order, units_of
from attnopt.plan.timing.timing import Timing


@dataclass(frozen=True)
class Told:
    """Moves of kinds; never applied."""

    name: str = "told"
    exact: bool = False
    per: str = "site"

    def propose(self, group: Group, evidence: object) -> list[Candidate] | Refusal:
        return Refusal("not asked")


def offered(name, kind, tie=""):
    move = Move(Told(), Group(None, name=name), Candidate("told", False, f"{kind} of {name}", kind=kind, tie=tie))
    return Class(name, (Proposal(), Proposal((move,))))


class Machine:
    """Stands for workshop, stopwatch and losses: each group saves the share of time, and loses what it is told to."""

    def __init__(self, saves, loses=None, effort="high"):
        self.saves, self.loses, self.workshop = saves, loses or {}, self
        self.spent, self.reference, self.trials = Spent(EFFORTS[effort]), 1.0, 0
        self.exact = self.runs(())

    def runs(self, moves):
        return lambda: moves

    def built(self, moves):
        return type("Built", (), {"runner": lambda _: self.runs(tuple(moves))})()

    def times(self, runners):
        self.trials += 1
        seconds = {name: 1.0 - sum(self.saves[m.group.name] for m in run()) for name, run in runners.items()}
        return {name: Timing((x,) * 3) for name, x in seconds.items()}

    def of(self, moves, title=""):
        loss = sum(self.loses.get(m.group.name, 0.0) for m in moves)
        return Loss("told", loss, loss, 1)


def checked(machine, classes, predicted=0.05, allowed=1.0):
    picks = (1,) * len(classes)
    worth = predicted if callable(predicted) else lambda option: predicted
    moves = [m for c in classes for m in c.options[1].moves]
    check = Check(moves, machine, machine, allowed)
    check.run(units_of(classes, picks, worth))
    return check, [m.group.name for m in check.kept]


def test_one_slow_group_of_eight_is_undone_alone():
    saves = dict.fromkeys("abcdefgh", 0.05) | {"f": -0.5}
    machine = Machine(saves)
    check, kept = checked(machine, [offered(n, "int8") for n in "abcdefgh"])
    assert kept == list("abcdegh")
    (undone,) = [s for s in check.steps if not s.kept]
    assert undone.names == ("f",) and undone.why.endswith("undone, it is not faster") and undone.loss is None
    assert machine.trials == 7  # the whole, then two for each time that the half at fault is cut
    assert sum(s.groups for s in check.steps) == 8


def test_a_slow_group_in_a_step_that_is_faster_all_the_same():
    """The eight were to save 40 % and save 10 %: one of them costs 25 %."""
    saves = dict.fromkeys("abcdefgh", 0.05) | {"b": -0.25}
    check, kept = checked(Machine(saves), [offered(n, "int8") for n in "abcdefgh"])
    assert kept == list("acdefgh")
    check, kept = checked(Machine(dict.fromkeys("abcd", 0.02)), [offered(n, "int8") for n in "abcd"], predicted=0.1)
    assert kept == list("abcd")  # all save less than predicted, and each still something
    (step,) = check.steps
    assert "leaving parts out makes it no faster" in step.why


def test_tied_groups_go_together():
    saves = dict.fromkeys("abcd", 0.05) | {"c": -0.2}
    classes = [offered("a", "int8"), offered("b", "int8", "one"), offered("c", "window", "one"), offered("d", "int8")]
    check, kept = checked(Machine(saves), classes)
    assert kept == ["a", "d"]
    (undone,) = [s for s in check.steps if not s.kept]
    assert set(undone.names) == {"b", "c"}
    saves["b"] = 0.25  # together they save something
    assert checked(Machine(saves), classes)[1] == list("abcd")


def test_moves_of_one_option_are_one():
    both = Proposal((*offered("a", "int8").options[1].moves, *offered("a", "window").options[1].moves))
    (unit,) = units_of([Class("a", (Proposal(), both))], (1,), lambda option: 0.5)
    assert unit.moves == both.moves and unit.names == ("a",) and unit.gain == 0.5


def test_a_group_that_loses_too_much_is_undone_alone():
    machine = Machine(dict.fromkeys("abcd", 0.05), {"a": 0.1, "b": 0.1, "c": 5.0, "d": 0.1})
    check, kept = checked(machine, [offered(n, "int8") for n in "abcd"])
    assert kept == ["a", "b", "d"]
    assert [s.names for s in check.steps if "over the budget" in s.why] == [("c",)]


def test_what_gains_most_is_tried_first():
    gains = {"a": 0.01, "b": 0.3, "c": 0.02, "d": 0.2}
    classes = [offered(n, "int8") for n in "abcd"]
    units = units_of(classes, (1,) * 4, lambda option: gains[option.moves[0].group.name])
    assert [u.names for u in units] == [("b",), ("d",), ("c",), ("a",)]


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_when_time_is_up_the_kind_is_undone_as_one(seconds):
    machine = Machine(dict.fromkeys("abcd", 0.05) | {"c": -0.5})
    machine.spent = Spent(replace(EFFORTS["low"], seconds=seconds))
    _, kept = checked(machine, [offered(n, "int8") for n in "abcd"])
    assert kept == ([] if seconds == 0.0 else ["a", "b", "d"])


def test_order():
    assert in_order([1, 2, 3], [3, 1]) == (1, 3)
