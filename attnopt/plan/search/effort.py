"""How long a search may take: minutes or hours.

    low       a minute of measuring, then the integer program on what is known        medium    ten minutes
    high      two hours, and steps of training for candidates that need them
    of it     proposing | what kinds lose everywhere | half of the rest: options alone | times of kinds | options alone again

What time does not allow to measure for each group alone is predicted from what all groups of its kind lose together (`survey`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

from attnopt.errors import BudgetError
from attnopt.plan.memory import resident
from attnopt.plan.timing.timing import counted


@dataclass(frozen=True)
class Effort:
    """seconds: of measuring, after which no new measurement begins. rounds: of tightening. timing: seconds for each callable timed.

    tunes: whether candidates that need tuning are given it; a user may ask for that at any effort.
    memory: share of the machine's that the process may hold.
    proposing: the share of the seconds in which evidence is gathered for proposals, and these are made.
    alone: the share of the seconds that are left for options and kinds in which options are measured alone, before kinds are timed.
    """

    name: str
    seconds: float
    rounds: int
    timing: float
    tunes: bool = False
    memory: float = 0.5
    alone: float = 0.5
    proposing: float = 0.4


EFFORTS = {
    e.name: e for e in (Effort("low", 60.0, 8, 0.4), Effort("medium", 600.0, 16, 1.0), Effort("high", 7200.0, 32, 3.0, True))
}


def effort_named(name: str) -> Effort:
    """Raises BudgetError for an unknown one."""
    if name not in EFFORTS:
        raise BudgetError(f"effort={name!r} is none of {', '.join(EFFORTS)}", next_move="Leave it out for a minute of search.")
    return EFFORTS[name]


@dataclass
class Spent:
    """What a search has used so far. On one thread its seconds are those of the process: a search beside other work learns as much."""

    effort: Effort
    clock: Callable[[], float] = field(default_factory=counted)
    started: float = 0.0
    measurements: int = 0
    remembered: int = 0  # measurements that were read back, not made

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def seconds(self) -> float:
        return self.clock() - self.started

    @property
    def over(self) -> bool:
        return self.seconds > self.effort.seconds

    @property
    def peak_memory(self) -> int:
        """The most bytes that this process has held so far; 0 on a system that does not tell."""
        return resident.peak()

    @property
    def memory_limit(self) -> int:
        """Bytes that this process may hold while it searches; 0 where the machine does not tell what it has."""
        return int(self.effort.memory * resident.machine())

    def fits(self, more: float) -> bool:
        """Whether so many bytes more stay within the limit."""
        if not self.memory_limit or resident.held() + more <= self.memory_limit:
            return True
        gc.collect()  # models that were tried refer to themselves, and are only let go when somebody looks
        return resident.held() + more <= self.memory_limit
