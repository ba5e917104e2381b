"""What options that change the spec of an attention lose where they are made: it tells how the loss of a kind is spread over its groups.

    e(option) = |o - o'|² / |o|² at the site, on real q, k and v          loss of the model = sensitivity of the site * e

One pass over a few samples holds q, k and v of all sites, on which the reference computes each option: a run of the whole model for each
takes many times as long. The sensitivity is that of another option of the group, where one was measured alone in the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnopt.analysis.evidence import Evidence
from attnopt.analysis.operands import held, tapped
from attnopt.analysis.padding import Padding
from attnopt.errors import AttnoptError
from attnopt.ir.graph import Value
from attnopt.ir.site import NotIsolated, Site
from attnopt.ir.spec import AttentionSpec
from attnopt.plan.knapsack import Place
from attnopt.plan.proposals import places
from attnopt.plan.site_loss import outputs

if TYPE_CHECKING:
    from attnopt.plan.search import Search

FEW = 4  # samples
PART = 0.1  # of the effort's seconds, after which what is not known stays unknown
Change = tuple[Place, Site, AttentionSpec]


@dataclass
class Sum:
    """Squares of the differences, and of the output, over what was seen."""

    apart: float = 0.0
    whole: float = 0.0

    @property
    def share(self) -> float:
        return self.apart / self.whole if self.whole > 0 else 0.0


def site_errors(search: Search) -> dict[Place, float]:
    """e of every option that only changes specs; of several sites their sum. Nothing where time is up before all are known."""
    evidence = search.evidence
    changes = [] if evidence is None else list(changed(search, evidence))
    if evidence is None or not changes or search.spent.over:
        return {}
    until = search.spent.seconds + PART * search.effort.seconds
    by_site: dict[str, list[Change]] = {}
    for change in changes:
        by_site.setdefault(change[1].name, []).append(change)
    sums: dict[tuple[Place, str], Sum] = {}
    try:
        for data, inputs in some(evidence, changes):
            for own in by_site.values():
                if search.spent.seconds > until:
                    return {}
                add(sums, own, data, inputs, evidence)
    except (NotIsolated, AttnoptError, RuntimeError, NotImplementedError):  # the reference lacks what a candidate brings itself
        return {}
    found: dict[Place, float] = {}
    for (place, _), total in sums.items():
        found[place] = found.get(place, 0.0) + total.share
    return found


def changed(search: Search, evidence: Evidence) -> Iterator[Change]:
    for place, option in places(search.classes):
        if option.moves and not any(m.edits for m in option.moves):
            for site, after in option.specs():
                if after.spec != site.spec and evidence.can_tap(tapped(site)):
                    yield place, site, after.spec


def some(evidence: Evidence, changes: Sequence[Change]) -> Iterator[tuple[Mapping[Value, Tensor], Mapping[str, Tensor]]]:
    """What all sites read on the first batches, with their inputs."""
    reads = list(dict.fromkeys(value for _, site, _ in changes for value in tapped(site)))
    seen = 0
    for inputs, data in evidence.hold(reads):
        yield dict(zip(reads, data, strict=True)), inputs
        seen += evidence.calibration.size(inputs)
        if seen >= FEW:
            return


def add(
    sums: dict[tuple[Place, str], Sum],
    changes: Sequence[Change],
    data: Mapping[Value, Tensor],
    inputs: Mapping[str, Tensor],
    evidence: Evidence,
) -> None:
    """Count one batch for all options of one site. Padding and queries that see no key do not count."""
    site = changes[0][1]
    on = held(site, {value: data[value] for value in tapped(site)}, evidence.host.graph.sizes(inputs))
    q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (on.q, on.k, on.v))
    real = Padding.of(evidence.host.graph).rows(site.size("q"), len(q), q.shape[2], inputs)
    wanted, sees = outputs(site.spec, q, k, v, on.operands, on.sizes)
    counts = sees if real is None else sees & real
    whole = squares(wanted, counts)
    for place, _, spec in changes:
        got, _ = outputs(spec, q, k, v, on.operands, on.sizes)
        total = sums.setdefault((place, site.name), Sum())
        total.apart += squares(wanted - got, counts)
        total.whole += whole


def squares(x: Tensor, counts: Tensor) -> float:
    """The sum over the rows [B, Q] that count."""
    return float(x.double().square().sum((1, 3)).masked_fill(~counts, 0.0).sum())
