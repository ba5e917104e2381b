"""The record of one optimisation: what was found, what was done and why, what it cost, and the proof."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from attnopt.ir.site import Refusal
from attnopt.report.plan import Plan
from attnopt.report.search import SearchReport

ORIGINAL, REMOVED = "original", "removed"  # in place of a kernel: the nodes as they were, or none any more


@dataclass(frozen=True)
class Choice:
    """One way to compute a site: its time in seconds per call where it was measured, and why it was taken or not."""

    kernel: str
    taken: bool
    why: str
    seconds: float | None = None


@dataclass(frozen=True)
class SiteReport:
    """One attention. Times are of the site alone, on the example inputs, in seconds per call."""

    name: str
    before: str
    after: str
    shape: dict[str, str]
    kernel: str
    why: str
    steps: tuple[str, ...] = ()
    seconds_before: float | None = None
    seconds_after: float | None = None
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class RewriteReport:
    """One approximate rewrite that was tried on the whole model: loss against the budget, time before and after."""

    name: str
    description: str
    kept: bool
    why: str
    metric: str = ""
    loss: float | None = None
    budget: float | None = None
    seconds_before: float | None = None
    seconds_after: float | None = None


@dataclass(frozen=True)
class Difference:
    """How far the result is from the original on the example inputs, and what its dtype allows."""

    max_abs: float
    max_rel: float
    tolerance: float
    exact: bool = True


@dataclass(frozen=True)
class Report:
    """Everything about one `optimize`. Times are medians of runs in turn, in seconds per call of the whole model.

    bytes_before, bytes_after: of weights and caches; None where there was no search.
    search: what was considered under the budget; None where nothing approximate was asked for. plan: what was done, to do it again.
    fuses: whether kernels might be chosen at all: exact passes were asked for, or a plan named some.
    """

    target: str
    runtime: str
    select: str
    budget: float
    sites: tuple[SiteReport, ...]
    refusals: tuple[Refusal, ...] = ()
    rewrites: tuple[RewriteReport, ...] = ()
    difference: Difference | None = None
    seconds_before: float | None = None
    seconds_after: float | None = None
    bytes_before: float | None = None
    bytes_after: float | None = None
    notes: tuple[str, ...] = ()
    seconds_spent: dict[str, float] = field(default_factory=dict)
    search: SearchReport | None = None
    plan: Plan | None = None
    fuses: bool = True

    @property
    def fused(self) -> int:
        return sum(site.kernel not in (ORIGINAL, REMOVED) for site in self.sites)

    @property
    def speedup(self) -> float | None:
        """Time before over time after, for the whole model."""
        return self.seconds_before / self.seconds_after if self.seconds_before and self.seconds_after else None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary with the same content as the table and `explain`; the plan has a JSON of its own."""
        record = asdict(replace(self, refusals=(), plan=None))  # a refusal holds its node, and with it the whole graph
        del record["plan"]
        record["refusals"] = [refusal_json(r) for r in self.refusals]
        record["fused"], record["speedup"] = self.fused, self.speedup
        return record

    def explain(self) -> Any:
        """For each group what was considered, and why it lost; a table that prints."""
        from attnopt.report.search_table import search_table

        return search_table(self.search)

    def __str__(self) -> str:
        from attnopt.report.table import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from attnopt.report.table import report_table

        return report_table(self)


def refusal_json(refusal: Refusal) -> dict[str, str]:
    return {
        "reason": refusal.reason,
        "node": refusal.node,
        "module": refusal.source.module,
        "line": refusal.source.line,
        "reached": refusal.reached,
        "remedy": refusal.remedy,
    }
