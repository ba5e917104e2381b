"""Exact rewrites of weights, before kernels are chosen and anything is searched: each is taken where it saves time.

    model -> fold-norm-gain? -> fold-biases? -> … -> the model that kernels are chosen for and budgets are searched on

A rewrite is offered to all its groups at once, on a copy. It goes no further where the cost model sees no gain that would be noticed.
select="measure" times the copy in turn with what was there before, and takes it where that is faster beyond noise; "model" and "always"
take what is predicted to save. Copies that do not run, or whose outputs are not equal, are not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

from torch import Tensor

from attnopt.cost.nodes import estimate_nodes
from attnopt.cost.target import Target
from attnopt.ir.site import Host, Refusal, Runner
from attnopt.passes import ALL, Pass
from attnopt.plan.choose import NOISE
from attnopt.plan.judge.verify import difference, seeded
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.plan.replay import moves_from, step_of, transferred
from attnopt.plan.timing.stepwise import summed
from attnopt.plan.timing.timing import counted, in_turn
from attnopt.report.data import RewriteReport
from attnopt.report.plan import PlanStep

NOTICEABLE = 0.01  # of the whole model's predicted time: less is within what a prediction may be off
SECONDS = 0.3  # for timing one rewrite
FUSED = {("onnxruntime", "fold-norm-gain")}  # what a runtime computes with its neighbours in one kernel: prediction sees two

Loads = Sequence[tuple[float, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Folded:
    """The model after the folds that were taken (the given one where none was), these, and a line for each that was offered."""

    host: Host
    moves: tuple[Move, ...] = ()
    reports: tuple[RewriteReport, ...] = ()

    @property
    def steps(self) -> tuple[PlanStep, ...]:
        return tuple(step_of(m) for m in self.moves)


@dataclass(frozen=True)
class Folding:
    """What folds are decided by. loads: weighted inputs of the shapes that count. sizes: of the model's symbols, with weights.

    named: say of each rewrite that no group takes why the first does not."""

    select: str
    target: Target
    runtime: str
    loads: Loads
    sizes: Sequence[tuple[float, Mapping[str, int]]]
    named: bool = False

    def of(self, host: Host, passes: Sequence[Pass]) -> Folded:
        """Never changes the given host."""
        made, grouping = Folded(host), Grouping(host)
        for rewrite in passes:
            made = self.after(made, rewrite, grouping)
            grouping = grouping if made.host is grouping.host else Grouping(made.host)
        return made

    def after(self, before: Folded, rewrite: Pass, grouping: Grouping) -> Folded:
        """With one more rewrite, where it is taken. grouping: of the host that it is offered to."""
        moves, refusals = offers(grouping, rewrite)
        if not moves:
            if not self.named:
                return before
            why = next((r.reason for r in refusals), "no group to look at")
            return replace(before, reports=(*before.reports, RewriteReport(rewrite.name, "nothing proposed", False, why)))
        trial = before.host
        try:
            trial, why, kept = self.judged(before.host, edited(before.host, moves), rewrite)
        except Exception as failure:  # of any runtime; the model as it was is a plan too
            why, kept = f"failed: {type(failure).__name__}: {str(failure).splitlines()[0][:120] if str(failure) else ''}", False
        kinds = ", ".join(dict.fromkeys(m.candidate.kind for m in moves))
        said = RewriteReport(rewrite.name, f"{len(moves)} groups: {kinds}", kept, why)
        reports = (*before.reports, said)
        return (
            Folded(self.settled(trial), (*before.moves, *moves), reports) if kept else Folded(before.host, before.moves, reports)
        )

    def judged(self, before: Host, trial: Host, rewrite: Pass) -> tuple[Host, str, bool]:
        """The model that is run with a fold, why the fold is taken or not, and whether it is."""
        old, new = self.predicted(before), self.predicted(trial)
        said = f"predicted {old * 1e3:.3g} ms -> {new * 1e3:.3g} ms"
        if not new < old * (1.0 - NOTICEABLE):
            return trial, f"{said}: nothing is saved that would be noticed", False
        held = self.held(before, trial)
        if isinstance(held, Refusal):
            return trial, str(held), False
        for _, inputs in self.loads[:1]:
            found = difference(seeded(self.runner(before), inputs), seeded(self.runner(held), inputs))
            if not found.max_rel <= found.tolerance:
                return held, f"outputs differ by {found.max_rel:.2g}, where {found.tolerance:g} is allowed", False
        if self.select == "measure" and self.loads:
            ratio = self.measured(before, held)
            return held, f"measured {ratio:.3f} of the time before, {said}", ratio < 1.0 - NOISE
        if self.select != "always" and (why := self.untold(rewrite)):
            return held, f"{why}: only a measurement tells", False
        return held, said, True

    def held(self, before: Host, trial: Host) -> Host | Refusal:
        """The rewritten graph as it is run: itself."""
        return trial

    def settled(self, host: Host) -> Host:
        """The model with a fold that is taken, as what follows sees it."""
        return host

    def runner(self, host: Host) -> Runner:
        return host.runner()

    def untold(self, rewrite: Pass) -> str:
        """Why a prediction does not say whether a rewrite saves time; "" where it does."""
        return f"{self.runtime} computes both in one kernel" if (self.runtime, rewrite.name) in FUSED else ""

    def predicted(self, host: Host) -> float:
        times = [(w, estimate_nodes(host.graph.nodes, sizes, self.target, runtime=self.runtime)) for w, sizes in self.sizes]
        return sum(w * each.seconds for w, each in times)

    def measured(self, before: Host, trial: Host) -> float:
        runners = {"before": self.runner(before), "after": self.runner(trial)}
        times = summed([(w, in_turn(calls(runners, x), seconds=SECONDS, clock=counted())) for w, x in self.loads])
        return times["after"].ratio(times["before"])


def calls(runners: Mapping[str, Callable[..., object]], inputs: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
    return {name: partial(run, inputs) for name, run in runners.items()}


def is_fold(rewrite: Pass) -> bool:
    """Whether a pass edits the model, and changes no output."""
    return rewrite.exact and rewrite.per != "site"


def fold_steps(steps: Sequence[PlanStep]) -> tuple[tuple[PlanStep, ...], tuple[PlanStep, ...]]:
    """(the steps of folds, which come first; the others)."""
    names = {p.name for p in ALL if is_fold(p)}
    return tuple(s for s in steps if s.rewrite in names), tuple(s for s in steps if s.rewrite not in names)


def offered(grouping: Grouping, rewrite: Pass) -> tuple[Move, ...]:
    """The first candidate for each group."""
    return offers(grouping, rewrite)[0]


def offers(grouping: Grouping, rewrite: Pass) -> tuple[tuple[Move, ...], tuple[Refusal, ...]]:
    """The first candidate for each group, and why others have none."""
    proposed = [(group, rewrite.propose(group, None)) for group in grouping.of(rewrite.per)]
    moves = tuple(Move(rewrite, group, found[0]) for group, found in proposed if not isinstance(found, Refusal))
    return moves, tuple(found for _, found in proposed if isinstance(found, Refusal))


def edited(host: Host, moves: Sequence[Move]) -> Host:
    """A copy after moves of one pass."""
    made = host.copy()
    groups = {g.name: g for g in Grouping(made).of(moves[0].rewrite.per)}
    for move in moves:
        move.rewrite.apply(move.candidate, groups[move.group.name])
    made.finish()
    return made


def again(host: Host, steps: Sequence[PlanStep]) -> Folded:
    """The folds of a plan, without asking whether they save anything. Raises PlanError for a model that they are not of."""
    made = Folded(host)
    for _, own in groupby(steps, key=lambda s: s.rewrite):
        moves = moves_from(own, made.host)
        made = Folded(edited(made.host, moves), (*made.moves, *moves))
    return made


def carried(steps: Sequence[PlanStep], before: Host, after: Host) -> tuple[Folded, Folded]:
    """The folds of a plan in the model and in its export, whose names differ."""
    one, other = Folded(before), Folded(after)
    for _, own in groupby(steps, key=lambda s: s.rewrite):
        run = list(own)
        there = moves_from(transferred(run, one.host, other.host), other.host)
        one = again(one.host, run)
        other = Folded(edited(other.host, there), (*other.moves, *there))
    return one, other
