"""How much a result may lose, and in which measure.

Budget.of(0.01)                          at most 0.01 in the output's natural metric
Budget(metric="kl", limit=0.02)          at most 0.02 nats of mean KL divergence
Budget(metric="quality", drop=0.005)     the user's own score falls by at most 0.005
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnopt.errors import BudgetError

NATURAL, QUALITY = "natural", "quality"
NAMES = (NATURAL, "kl", "cosine", "relative", QUALITY)


@dataclass(frozen=True)
class Budget:
    """A limit on the loss. metric: natural (by the output), kl (nats), cosine (1 - cosine), relative, or quality (the user's score).

    limit: largest mean loss; drop: of "quality", by how much the mean score may fall. Raises BudgetError for what means nothing.
    """

    metric: str = NATURAL
    limit: float | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        if self.metric not in NAMES:
            raise BudgetError(
                f"metric={self.metric!r} is none of {', '.join(NAMES)}", next_move="Leave it out for the natural one."
            )
        wanted, other = ("drop", "limit") if self.metric == QUALITY else ("limit", "drop")
        if getattr(self, other) is not None:
            raise BudgetError(f"a budget in {self.metric} has a {wanted}, not a {other}", next_move=f"Give {wanted}=0.01.")
        given = 0.0 if getattr(self, wanted) is None and self.metric == NATURAL else getattr(self, wanted)
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < math.inf:
            raise BudgetError(
                f"budget {given!r} is not a number of at least 0", where=wanted, next_move="Give 0 for exact rewrites only."
            )

    @classmethod
    def of(cls, given: Budget | float) -> Budget:
        """A budget as it is; a bare number in the natural metric."""
        return given if isinstance(given, Budget) else cls(limit=given)

    @property
    def allowed(self) -> float:
        """The largest loss that is within the budget."""
        return float((self.drop if self.metric == QUALITY else self.limit) or 0.0)

    @property
    def exact(self) -> bool:
        """Whether nothing may be lost, so that only exact rewrites are asked for."""
        return self.allowed == 0.0

    def __str__(self) -> str:
        return f"{self.allowed:g}" if self.metric == NATURAL else f"{self.metric} {self.allowed:g}"
