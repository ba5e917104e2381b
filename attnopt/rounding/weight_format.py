"""How a matrix of weights is held in few bits: width of a code, how many neighbours share a step, and whether zero points are kept.

    "int4 group 32"     4-bit codes, one float32 step for 32 inputs of a row          5 bits per weight
    "int4 row zeros"    one step and one 4-bit zero point for a row of 192 inputs      4.19 bits per weight

A weight is (code - zero) * step, 0 <= code < 2^bits; without zero points zero is 2^(bits - 1). The text is what a plan and the cost
model call the format, and "int8" alone is not one of these: it names layers whose inputs are rounded too (`runtime.dynamic_int8`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from attnopt.ir.site import Refusal

WIDEST = 8
STEP = 32  # bits of a step
TEXT = re.compile(r"int(\d+) (?:row|group (\d+))( zeros)?")


@dataclass(frozen=True)
class WeightFormat:
    """bits: 1 … 8 of a code. group: inputs of a row that share a step; 0 is the whole row. zeros: whether zero points are kept."""

    bits: int
    group: int = 0
    zeros: bool = False

    def __str__(self) -> str:
        return f"int{self.bits} {f'group {self.group}' if self.group else 'row'}{' zeros' if self.zeros else ''}"

    @classmethod
    def read(cls, text: str) -> WeightFormat | None:
        """The format of this text; None where it says something else."""
        found = TEXT.fullmatch(text)
        return None if found is None else cls(int(found[1]), int(found[2] or 0), found[3] is not None)

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def middle(self) -> int:
        """The code of 0 where no zero points are kept."""
        return self.levels // 2

    def groups(self, inputs: int) -> int:
        """Steps of a row."""
        return inputs // (self.group or inputs)

    def width(self, inputs: int) -> float:
        """Bits per weight of a row of so many inputs, steps and zero points included."""
        return self.bits + (STEP + self.bits * self.zeros) / (self.group or inputs)

    def refusal(self, inputs: int) -> Refusal | None:
        """None where rows of so many inputs can be held so; else why not, with the nearest group that divides them."""
        if not 1 <= self.bits <= WIDEST:
            return Refusal(f"codes of {self.bits} bits: they have 1 to {WIDEST}")
        if self.group < 0 or (self.group and inputs % self.group):
            near = nearest_divisor(inputs, self.group)
            return Refusal(
                f"groups of {self.group} do not divide rows of {inputs} inputs; {near} do", remedy=f"a group of {near}, or of 0"
            )
        return None


def nearest_divisor(number: int, to: int) -> int:
    """The divisor of a number that is nearest to another, by ratio; of two equally near the smaller."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (max(d, to) / max(1, min(d, to)), d))
