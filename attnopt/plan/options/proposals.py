"""What could be done: for each group the options of all passes, and which of them go together.

    group "layers.3.self_attn"    as it is | window 64 | int8 cache | window 64 + int8 cache
    group "layers.3.mlp.down"     as it is | int8 | int8 smoothed

Passes that propose for the same sites share a class of options: candidates that change different things are also offered together.
Options of different classes exclude each other where they touch one node. Each pass that proposes nothing for a group says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations, islice

from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import as_spec
from attnopt.passes import Candidate, Evidence, Group, Pass
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.tuning import Tuning
from attnopt.plan.search.knapsack import Place

MOST = 30  # options of one class
LATE = "time for proposing was up, a higher effort has more"
EDITS = ("weights", "structure")  # changes that edit the host; all others change the spec of sites


@dataclass(frozen=True, eq=False)
class Move:
    """One candidate of a pass for one group."""

    rewrite: Pass
    group: Group
    candidate: Candidate

    @property
    def edits(self) -> bool:
        """Whether applying it edits the host, rather than the spec of sites."""
        return any(change in EDITS for change in self.candidate.changes)

    @property
    def narrows(self) -> bool:
        """Whether it only stores tables narrower: that makes nothing faster, and the model smaller."""
        return bool(self.candidate.nodes) and all(n.op == "gather" for n in self.candidate.nodes)

    @property
    def sites(self) -> frozenset[str]:
        """Nodes of the sites whose spec it changes."""
        return frozenset() if self.edits else frozenset(n.name for s in self.group.sites for n in s.nodes)

    @cached_property
    def caches(self) -> frozenset[str]:
        """The caches that it stores in another form, each side of each site: "k of layers.0.attn"."""
        clauses = {name: as_spec(f"softmax {text}").cache for name, text in self.candidate.cached.items() if text}
        return frozenset(f"{side} of {name}" for name, c in clauses.items() for side in "kv" if c and c.word(side) != "fp32")

    def excludes(self, other: Move) -> bool:
        """Whether both cannot be applied: they change one weight or one cache, or one removes what the other changes."""
        mine, others = self.candidate, other.candidate
        removed, gone = ({n.name for n in c.removes} for c in (mine, others))
        disturbed = mine.disturbs(others) or others.disturbs(mine)
        shared = mine.touches & others.touches or self.caches & other.caches
        return bool(disturbed or shared or removed & other.sites or gone & self.sites)


def described(move: Move) -> str:
    """All that says what a move does: a key of what is measured of it, or computed for it."""
    options = json.dumps(dict(move.candidate.options), sort_keys=True, default=str)
    return f"{move.candidate.pass_name} | {move.group.name} | {move.candidate.kind} | {options}"


@dataclass(frozen=True, eq=False)
class Proposal:
    """Moves that are made together; none leaves the group as it is. kind: of what, equal for all groups it is offered to."""

    moves: tuple[Move, ...] = ()

    @property
    def kind(self) -> str:
        return " + ".join(f"{m.candidate.pass_name}: {m.candidate.kind or m.candidate.description}" for m in self.moves)

    @property
    def description(self) -> str:
        return "; ".join(m.candidate.description for m in self.moves) or "as it is"

    @property
    def tie(self) -> str:
        return next((m.candidate.tie for m in self.moves if m.candidate.tie), "")

    @property
    def nodes(self) -> frozenset[str]:
        """Names that options of other classes may share: only such can exclude each other."""
        scaled = ({n.name for n in m.candidate.scales} for m in self.moves)
        return frozenset().union(*(m.candidate.touches | m.sites | m.caches | s for m, s in zip(self.moves, scaled, strict=True)))

    def specs(self) -> tuple[tuple[Site, Site], ...]:
        """(site as it is, site as the moves make it) where the spec changes. Nothing is edited."""
        moves = [m for m in self.moves if not m.edits]
        if not moves:
            return ()
        group = moves[0].group
        for move in moves:
            group = move.rewrite.apply(move.candidate, group)
        return tuple(zip(moves[0].group.sites, group.sites, strict=True))


AS_IT_IS = Proposal()


@dataclass(frozen=True)
class Class:
    """The options of one group, of which one is taken; the first leaves it as it is. refusals: why passes proposed nothing."""

    name: str
    options: tuple[Proposal, ...]
    refusals: tuple[tuple[str, Refusal], ...] = ()


@dataclass
class Offers:
    """What passes proposed for one set of sites or layers, while it is gathered."""

    name: str
    by_pass: list[list[Move]] = field(default_factory=list)
    refusals: list[tuple[str, Refusal]] = field(default_factory=list)


def classes_of(
    grouping: Grouping,
    passes: Sequence[Pass],
    evidence: Evidence | None,
    tuning: Tuning | None = None,
    late: Callable[[], bool] = lambda: False,
) -> list[Class]:
    """The options of every group that any of these passes is shown, in the order of passes and of the graph.

    tuning: what becomes of candidates that need it; without it all are taken as they are. late: whether time for this is up: what is
    proposed from then on is proposed without calibration data, and what needs them is refused.
    """
    offers: dict[object, Offers] = {}
    for rewrite in passes:
        for group in grouping.of(rewrite.per):
            over = late()
            shared = tuple(s.name for s in group.sites) if rewrite.per in ("site", "block", "table") else ()
            found = offers.setdefault(shared or (rewrite.name, group.name), Offers(group.name))
            proposed = rewrite.propose(group, None if over else evidence)
            if isinstance(proposed, Refusal) and over and evidence is not None:
                found.refusals.append((rewrite.name, Refusal(f"{LATE}: {proposed.reason}", proposed.at)))
            elif isinstance(proposed, Refusal):
                found.refusals.append((rewrite.name, proposed))
            else:
                ready = [tuning.of(rewrite, group, c, evidence) if tuning is not None else c for c in proposed]
                ready = [c if isinstance(c, Refusal) else refused(group, c) or c for c in ready]
                found.refusals += [(rewrite.name, c) for c in ready if isinstance(c, Refusal)]
                found.by_pass.append([Move(rewrite, group, c) for c in ready if isinstance(c, Candidate)])
    return [Class(o.name, (AS_IT_IS, *combined(o.by_pass)), tuple(o.refusals)) for o in offers.values()]


def refused(group: Group, candidate: Candidate) -> Refusal | None:
    """Why the host cannot hold what a candidate makes of its sites."""
    return group.host.refuses_change(candidate.changes, group.sites, candidate.shapes)


def combined(by_pass: Sequence[Sequence[Move]]) -> list[Proposal]:
    """Each candidate alone, then those of different passes together where they change different things; of those at most so
    many that the class has MOST options.
    """
    made = [Proposal((m,)) for moves in by_pass for m in moves]
    most = max(MOST - 1, len(made))
    return list(islice(chain(made, combinations_of(by_pass)), most))


def combinations_of(by_pass: Sequence[Sequence[Move]]) -> Iterator[Proposal]:
    """Two moves that go together, then three, …; in each those of earlier passes first, so that each combination is made once."""
    grown: list[tuple[tuple[Move, ...], int]] = [((m,), at) for at, moves in enumerate(by_pass) for m in moves]  # at: of the last
    while grown:
        longer = list[tuple[tuple[Move, ...], int]]()
        for moves, last in grown:
            for at in range(last + 1, len(by_pass)):
                for m in by_pass[at]:
                    if all(together(m, other) for other in moves):
                        longer.append(((*moves, m), at))
                        yield Proposal((*moves, m))
        grown = longer


def together(a: Move, b: Move) -> bool:
    tied = a.candidate.tie or b.candidate.tie
    return not tied and not set(a.candidate.changes) & set(b.candidate.changes) and not a.excludes(b)


def ties_of(classes: Sequence[Class]) -> tuple[tuple[Place, ...], ...]:
    """Places of options with one tie."""
    found: dict[str, list[Place]] = {}
    for place, option in places(classes):
        if option.tie:
            found.setdefault(option.tie, []).append(place)
    return tuple(tuple(tied) for tied in found.values() if len(tied) > 1)


def exclusions_of(classes: Sequence[Class]) -> tuple[tuple[Place, Place], ...]:
    """Pairs of places of different classes that cannot be taken together."""
    at: dict[str, list[tuple[Place, Proposal]]] = {}
    for place, option in places(classes):
        for name in sorted(option.nodes):
            at.setdefault(name, []).append((place, option))
    pairs: dict[tuple[Place, Place], None] = {}
    for holders in at.values():
        for (a, one), (b, two) in combinations(holders, 2):
            if a[0] != b[0] and any(m.excludes(n) for m in one.moves for n in two.moves):
                pairs[a, b] = None
    return tuple(pairs)


def places(classes: Sequence[Class]) -> Iterable[tuple[Place, Proposal]]:
    return (((g, i), option) for g, each in enumerate(classes) for i, option in enumerate(each.options))


def uniform(classes: Sequence[Class], kind: str) -> tuple[int, ...]:
    """The option of one kind everywhere it is offered, but where an earlier one excludes it: what a user would do by hand."""
    taken: list[Move] = []
    picks = []
    for each in classes:
        fits = (
            i for i, o in enumerate(each.options) if o.kind == kind and not any(m.excludes(t) for m in o.moves for t in taken)
        )
        pick = next(fits, 0)
        taken += each.options[pick].moves
        picks.append(pick)
    return tuple(picks)


def moves_of(classes: Sequence[Class], picks: Sequence[int]) -> tuple[Move, ...]:
    return tuple(m for each, pick in zip(classes, picks, strict=True) for m in each.options[pick].moves)


def kinds_of(classes: Sequence[Class]) -> Mapping[str, int]:
    """Every kind, and how many groups it is offered to; in the order they are met."""
    counts: dict[str, int] = {}
    for _, option in places(classes):
        if option.moves:
            counts[option.kind] = counts.get(option.kind, 0) + 1
    return counts
