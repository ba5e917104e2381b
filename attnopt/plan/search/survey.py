"""What rewrites lose and save, before any is chosen: measured as far as the effort reaches, in an order in which little is known of all
before much is known of few.

    every kind everywhere, those that save most first: its loss, on a few samples where all would take too long and these show that it is
        far over the budget, or where much of the time is gone; not at all where time is up
    options alone, on a few samples where all would take too long, for half of the time that is left
    times of the kinds that may hold the budget, each whole and then by shape, while time lasts
    options alone on all samples, until time is up

A loss on a few samples is scaled by what all samples of its kind everywhere lose beside these few. What is not measured alone has a part
of what its kind loses everywhere: spread over the groups as another kind of the same passes is, which was measured for each (windows of
64 tell where windows of 256 hurt), times what each loses at its site beside that one (`site_errors`); else as the losses at the sites, else
in equal parts. So the kind of each pass that saves most comes first. What is not timed is predicted by the cost model, as its kin was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from attnopt.plan.judge.quality import Loss
from attnopt.plan.judge.site_errors import site_errors
from attnopt.plan.options.proposals import Move, Proposal, moves_of, places
from attnopt.plan.search.knapsack import Place
from attnopt.plan.timing.pricing import Timed

if TYPE_CHECKING:
    from attnopt.plan.search.search import Search

FEW = 4  # samples for a first idea of what an option loses
FAR = 30.0  # times the budget that a kind loses everywhere: no large part of it will be in a plan
LEAST = 4  # kinds that are measured on all samples, and timed, however late it is
KINDS = 0.6  # of the effort's seconds, after which kinds are measured on a few samples
PART = 0.25  # of the effort's seconds: where all kinds on all samples would take longer, those that are far over it are not measured so


def measure(search: Search) -> None:
    """Fill `search.everywhere`, `search.alone` and the times of its prices."""
    seconds = measure_kinds(search)
    known = alone_already(search)
    waiting = by_worth(search, known)
    start, end = search.spent.seconds, search.effort.seconds
    middle = start + search.effort.alone * max(end - start, 0.0) if search.stopwatch is not None else end
    each = statistics.median(seconds) if seconds else 0.0
    most = None if start + each * len(waiting) <= middle else FEW
    if most is not None:
        search.errors = site_errors(search)
    rough = [place for place, _ in Alone(search, most).each(waiting, middle)]
    search.spread = spread(search)
    if search.stopwatch is not None:
        time_kinds(search)
    left = by_worth(search, known if most is not None else set(search.alone))
    whole = [place for place, _ in Alone(search, None).each(left, end)]
    search.spread = spread(search)
    said(search, [p for p in rough if most is not None and p not in whole])


def measure_kinds(search: Search) -> list[float]:
    """What kinds lose everywhere; the seconds that each took that was measured on all samples."""
    seconds, effort, unknown = list[float](), search.effort.seconds, 0
    for i, kind in enumerate(sorted(search.kinds, key=lambda k: -search.total_worth(search.whole(k)))):
        spent = search.spent.seconds
        if i >= LEAST and spent > effort:
            search.everywhere[kind] = Loss(search.losses.judge.metric.name, math.inf, math.inf, 0)
            unknown += 1
            continue
        late = i >= LEAST and spent > KINDS * effort
        slow = bool(seconds) and statistics.median(seconds) * len(search.kinds) > PART * effort
        few = everywhere(search, kind, FEW) if slow or late else None
        if few is not None and (late or far(search, few)):
            search.everywhere[kind] = few
        else:
            started = search.spent.seconds
            search.everywhere[kind] = everywhere(search, kind)
            seconds.append(search.spent.seconds - started)
    if unknown:
        search.notes.append(f"{unknown} of {len(search.kinds)} kinds were not measured: time was up, a higher effort has more")
    return seconds


def everywhere(search: Search, kind: str, most: int | None = None) -> Loss:
    return search.losses.of(moves_of(search.classes, search.whole(kind)), f"{kind} everywhere", most)


def far(search: Search, loss: Loss) -> bool:
    """Whether a few samples show that a kind loses far more than the budget everywhere."""
    return search.losses.additive(loss.mean) > FAR * search.losses.additive(search.allowed)


def alone_already(search: Search) -> set[Place]:
    """Options that are all of their kind: alone they lose what the kind loses everywhere."""
    single = ((place, o.kind) for place, o in places(search.classes) if o.moves and search.counts[o.kind] == 1)
    found = {place: kind for place, kind in single if search.everywhere[kind].samples}
    search.alone.update({place: search.everywhere[kind] for place, kind in found.items()})
    return set(found)


def in_turns(search: Search, kinds: Iterable[str]) -> list[str]:
    """Of each pass the kind that is predicted to save most, then the next of each.

    A prediction may be wrong for all kinds of a pass alike: so one of each comes early, however little it promises.
    """
    by_pass: dict[tuple[str, ...], list[str]] = {}
    for kind in sorted(kinds, key=lambda k: (-search.total_worth(search.whole(k)), k)):
        by_pass.setdefault(search.passes_of(kind), []).append(kind)
    return [kind for turn in zip_longest(*by_pass.values()) for kind in turn if kind is not None]


def by_worth(search: Search, known: Iterable[Place]) -> list[tuple[Place, Proposal]]:
    """Options that are not known yet and save anything: first the kind of each pass that saves most, then the next, the best first."""
    left = [(p, o) for p, o in places(search.classes) if o.moves and p not in known and search.worth(o) > 0]
    saved: dict[tuple[str, ...], dict[str, float]] = {}
    for _, o in left:
        kinds = saved.setdefault(search.passes_of(o.kind), {})
        kinds[o.kind] = kinds.get(o.kind, 0.0) + search.worth(o)
    rank = {kind: i for kinds in saved.values() for i, kind in enumerate(sorted(kinds, key=lambda k: (-kinds[k], k)))}
    return sorted(left, key=lambda found: (rank[found[1].kind], -search.worth(found[1]), found[0]))


def spread(search: Search) -> dict[str, dict[int, float]]:
    """For each kind the part of its loss that each group has: from another kind of the same passes that is known alone in all of them, by
    what both lose at the sites; else from that alone. Kinds of which neither is known are absent.
    """
    at: dict[str, dict[int, Place]] = {}
    for place, o in places(search.classes):
        if o.moves:
            at.setdefault(o.kind, {})[place[0]] = place
    made = {}
    for kind, own in at.items():
        errors = at_sites(search, own)
        parts = errors
        for other in (k for k in at if search.passes_of(k) == search.passes_of(kind)):
            known = [search.alone.get(at[other].get(g, (-1, -1))) for g in own]
            losses = [search.losses.additive(loss.mean) for loss in known if loss is not None]
            if len(losses) == len(own) and 0 < sum(losses) < math.inf:
                beside = at_sites(search, {g: at[other][g] for g in own})
                factors = [errors[g] / beside[g] if errors and beside else 1.0 for g in own]
                parts = {g: x * f for g, x, f in zip(own, losses, factors, strict=True)}
                break
        if parts and 0 < (total := sum(parts.values())) < math.inf:
            made[kind] = {g: part / total for g, part in parts.items()}
    return made


def at_sites(search: Search, own: Mapping[int, Place]) -> dict[int, float]:
    """What options lose at their sites, by group; nothing where that is not known of each, or is 0 for one."""
    found = {g: search.errors.get(place, 0.0) for g, place in own.items()}
    return found if all(found.values()) else {}


@dataclass(frozen=True)
class Alone:
    """Measures options alone, on `most` samples (None: on all)."""

    search: Search
    most: int | None

    def each(self, waiting: Iterable[tuple[Place, Proposal]], until: float) -> list[tuple[Place, Loss]]:
        """Those that were measured before `until`, in seconds that the search has spent."""
        made = []
        for place, option in waiting:
            if self.search.spent.seconds > until or not self.search.spent.fits(self.search.losses.needs):
                break
            loss = self.scaled(self.search.losses.of(option.moves, option.description, self.most), option.kind)
            self.search.alone[place] = loss
            made.append((place, loss))
        return made

    def scaled(self, loss: Loss, kind: str) -> Loss:
        """A loss on the first samples, as it would be on all if it stood to its kind everywhere as on these."""
        whole = self.search.everywhere[kind]
        few = whole.values[: loss.samples]
        if self.most is None or len(few) == len(whole.values) or not sum(few) > 0 or not whole.mean > 0:
            return loss
        return replace(loss, mean=loss.mean * whole.mean * len(few) / sum(few))


def time_kinds(search: Search) -> None:
    """Time each kind everywhere; those of several shapes then by shape, while time lasts. Not those of which no option may hold."""
    options: dict[str, list[tuple[Place, Proposal]]] = {}
    for place, option in places(search.classes):
        if option.moves and search.everywhere[option.kind].samples:
            options.setdefault(option.kind, []).append((place, option))
    allowed = search.losses.additive(search.allowed)
    held = {kind: own for kind, own in options.items() if min(search.predicted(place) for place, _ in own) <= allowed}
    timed = list[str]()
    for kind in in_turns(search, held):
        if len(timed) < LEAST or not search.spent.over:
            time_whole(search, kind, [o for _, o in held[kind]])
            timed.append(kind)
    if len(timed) < len(held):
        search.notes.append(f"the times of {len(held) - len(timed)} of {len(options)} kinds are predicted: time was up")
    for kind in timed:
        time_shapes(search, kind, [o for _, o in held[kind]])
    if len(held) < len(options):
        untimed = len(options) - len(held)
        search.notes.append(f"{untimed} of {len(options)} kinds were not timed: one of them alone is over the budget")


def time_whole(search: Search, kind: str, options: list[Proposal]) -> None:
    whole = moves_of(search.classes, search.whole(kind))
    remember(search, (kind, ""), whole, [o for o in options if set(o.moves) <= set(whole)])


def time_shapes(search: Search, kind: str, options: list[Proposal]) -> None:
    whole = moves_of(search.classes, search.whole(kind))
    by_key: dict[tuple[str, str], list[Proposal]] = {}
    for option in options:
        if set(option.moves) <= set(whole):
            by_key.setdefault(search.prices.key(option), []).append(option)
    for key, own in by_key.items():
        if len(by_key) > 1 and not search.spent.over:
            moves = {m for o in own for m in o.moves}
            remember(search, key, tuple(m for m in whole if m in moves), own)


def remember(search: Search, key: tuple[str, str], moves: tuple[Move, ...], touched: list[Proposal]) -> None:
    """Time these moves together, and keep what each option of the key saves."""
    assert search.stopwatch is not None
    saved = search.stopwatch.saved(search.losses.workshop.built(moves).runner())
    predicted = [search.prices.predicted(o) for o in touched]
    before, promised = sum(b for b, _ in predicted), sum(b - a for b, a in predicted)
    search.prices.timed[key] = Timed(saved, before, max(1, len(touched)), promised, search.passes_of(key[0]))


def said(search: Search, rough: list[Place]) -> None:
    """Note what was not measured, or not on all samples."""
    every = [place for place, o in places(search.classes) if o.moves and search.worth(o) > 0]
    if skipped := [place for place in every if place not in search.alone]:
        crowded = not search.spent.fits(search.losses.needs)
        held = f"the search would have held more than {search.spent.memory_limit / 2**30:.3g} GiB"
        why = held if crowded else "time was up, a higher effort has more"
        search.notes.append(f"{len(skipped)} of {len(every)} options were not measured alone: {why}")
    if rough:
        few, all_samples = search.alone[rough[0]].samples, search.losses.judge.calibration.samples
        search.notes.append(f"{len(rough)} of {len(every)} options were measured alone on {few} of {all_samples} samples")
