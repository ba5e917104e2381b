"""The record of a search under a budget: for each group what was considered and why it lost, the steps that were checked, the effort."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptionReport:
    """One option of a group. Seconds and losses are of the whole model; None where nothing was predicted or measured.

    predicted, measured: seconds saved by the cost model, and as the options of its kind were timed together. loss: alone, on the data to
    choose by; estimated: whether it was taken from what its kind loses everywhere. bytes: of weights and cache that it saves.
    """

    kind: str
    description: str
    taken: bool
    why: str
    source: str = ""
    predicted: float | None = None
    measured: float | None = None
    loss: float | None = None
    estimated: bool = False
    bytes: float | None = None


@dataclass(frozen=True)
class GroupReport:
    """What must agree, and its options; the first that is taken is what it became. refusals: why passes proposed nothing."""

    name: str
    options: tuple[OptionReport, ...]
    refusals: tuple[str, ...] = ()

    @property
    def taken(self) -> str:
        return next((o.kind for o in self.options if o.taken), "as it is")


@dataclass(frozen=True)
class StepReport:
    """One kind of rewrite of a plan, or some groups of it, as it was checked: whole-model times before and after, the loss so far.

    names: of its groups. loss: None where it was slower, and so was not asked.
    """

    kind: str
    groups: int
    kept: bool
    why: str
    seconds_before: float
    seconds_after: float
    loss: float | None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class SearchReport:
    """What the search was given and used. gap: how far the solver's choice may be from the best, as a share of what could be saved.

    samples: (to choose by, to validate by). measurements were made, `remembered` were read back. peak_memory: the most bytes that the
    process held, of memory_limit that it might; 0 where the system does not tell.
    """

    effort: str
    seed: int
    seconds: float
    measurements: int
    remembered: int
    peak_memory: int
    gap: float
    samples: tuple[int, int]
    loss: float | None = None
    bound: float | None = None
    metric: str = ""
    groups: tuple[GroupReport, ...] = ()
    steps: tuple[StepReport, ...] = ()
    memory_limit: int = 0
