"""Every error a user can see: what is wrong, where, and the next move."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AttnoptError(Exception):
    """Base of all errors; `exit_code` is what the command line returns."""

    exit_code = 2

    def __init__(self, message: str, *, where: str = "", next_move: str = "") -> None:
        self.message, self.where, self.next_move = message, where, next_move
        super().__init__(
            message
            + (f" ({where})" if where else "")
            + "." * (not message.endswith("."))
            + (f" {next_move}" if next_move else "")
        )


class UnknownName(AttnoptError):
    """A name that is not in a known list; the nearest known one is suggested."""

    kind = "name"
    listing = ""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        near = difflib.get_close_matches(name, list(known), n=1)
        guess = f"Did you mean '{near[0]}'? " if near else ""
        super().__init__(f"'{name}' is not a {self.kind}", next_move=f"{guess}`attnopt {self.listing}` lists all.")


class UnknownTarget(UnknownName):
    kind, listing = "target", "targets"


class UnreadableTarget(AttnoptError):
    """A target file of the user's that is not one."""


class UnknownPass(UnknownName):
    kind, listing = "pass", "passes"


class UnknownPolicy(AttnoptError):
    """A name that is no cache policy's; all are named, for they are few."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"'{name}' is not a cache policy", next_move=f"Known: {', '.join(known)}.")


class UnreadableModel(AttnoptError):
    """A file that is missing, not a model, truncated or corrupt."""


class UnsupportedFormat(AttnoptError):
    """A kind of model or file that attnopt does not take or write."""


class UntraceableModel(AttnoptError):
    """torch.export could not follow the model."""


class InputMismatch(AttnoptError):
    """Inputs that do not fit the model or the spec."""


class OutputNotWritable(AttnoptError):
    """A path that cannot be written."""


class BudgetError(AttnoptError):
    """A budget or selection that means nothing."""


class WorkloadError(AttnoptError):
    """Shapes that cannot be read, or that the model cannot have; ends in an example that works."""


class PlanError(AttnoptError):
    """A plan that is none, or does not fit the model."""


class AccuracyError(AttnoptError):
    """The result differs from the original beyond what its dtype allows; it is not handed over."""

    def __init__(self, max_abs: float, max_rel: float, tolerance: float) -> None:
        self.max_abs, self.max_rel, self.tolerance = max_abs, max_rel, tolerance
        super().__init__(
            f"the result differs from the original by {max_abs:.3g} absolute, {max_rel:.3g} relative; {tolerance:g} is allowed",
            next_move="This is a defect: please report the model. select='model' or passes=[…] narrow it down.",
        )


class SpecSyntaxError(AttnoptError):
    """A spec line or expression that does not parse; shows the place."""

    def __init__(self, text: str, at: int, expected: str) -> None:
        self.text, self.at, self.expected = text, at, expected
        super().__init__(f"expected {expected} at column {at + 1}\n  {text}\n  {' ' * at}^")


class OutOfRange(AttnoptError):
    """A number of a method's that it does not allow: a rank, a number of groups."""

    def __init__(self, allowed: str, given: str) -> None:
        super().__init__(f"{given} is out of range", next_move=f"Allowed: {allowed}.")
