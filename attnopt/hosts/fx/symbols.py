"""torch's symbolic sizes as canonical dimensions, with readable names.

s43, 4*s53, s53 + 1    ->    batch, 4*sequence, "sequence + 1"

A length that the model has shown to be a multiple of 6 is 6*sequence_per_6, so that its parts (s53//3 = 2*sequence_per_6) are products
as well, and chunks of a sequence fit together by plain algebra.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from attnopt.hosts.fx.quotients import without_quotients
from attnopt.ir.dims import Dim, Shape, make, symbol

LAYER = re.compile(r"(_(key|value)(_cache|s)?)?(_?[0-9]+)*$")  # what tells the tensors of one cache apart: past_3_1 is of past
TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


@dataclass
class Symbols:
    """Names for the symbols of one program. Two symbols that must be equal may share a name.

    `first`: for each symbol the first one that has its name, and stands for it in arithmetic.
    multiples: for a symbol that is a multiple of a number, what it is in terms of their quotient.
    """

    names: dict[str, str] = field(default_factory=dict)
    first: dict[sympy.Symbol, sympy.Symbol] = field(default_factory=dict)
    multiples: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)

    def dim(self, size: Any) -> Dim:
        """One size: an int, a product of symbols, or one opaque symbol for anything else."""
        if isinstance(size, int) or not isinstance(size, torch.SymInt):
            return int(size)
        expr = size.node.expr.xreplace(self.first)
        if not expr.is_Symbol:
            expr = without_quotients(expr)
        if not expr.is_Symbol and (number := known_number(size)) is not None:
            return number
        if self.multiples.keys() & expr.free_symbols:
            expr = sympy.expand(expr.xreplace(self.multiples))
            if expr.is_Integer:
                return int(expr)
        coefficient, rest = expr.primitive() if expr.has(FloorDiv) else expr.as_coeff_Mul()
        factors = rest.as_ordered_factors() if rest.is_Mul else [rest]
        names: list[str] = []
        for factor in factors:
            base, power = factor.as_base_exp()
            if base.is_Symbol and power.is_Integer and power > 0:
                names += [self.named(str(base))] * int(power)
            elif expr.has(FloorDiv) and power.is_Integer and power > 0:
                names += [self.renamed(str(base))] * int(power)
            elif not factor.is_Integer:
                return symbol(self.renamed(str(expr)))
        return make(int(coefficient), names) if coefficient.is_Integer else symbol(self.renamed(str(expr)))

    def shape(self, tensor: torch.Tensor) -> Shape:
        return tuple(self.dim(size) for size in tensor.shape)

    def named(self, name: str) -> str:
        return self.names.get(name, name)

    def renamed(self, text: str) -> str:
        for old, new in self.names.items():
            text = text.replace(old, new)
        return text.replace("*", "·")


def known_number(size: torch.SymInt) -> int | None:
    """The value of an expression that the ranges of its symbols leave no choice, such as 1 - Max(0, 1 - s) for s >= 1."""
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    return int(bounds.lower) if bounds.lower == bounds.upper and bounds.lower.is_Integer else None


def name_symbols(placeholders: Iterable[fx.Node]) -> Symbols:
    """`batch` for first, `sequence` for second dimensions of token inputs, by side; `past` for the length of a cache.

    Equal roles of equal size when traced share a name; whoever calls the model must keep them equal.
    """
    symbols = Symbols()
    taken: dict[tuple[str, str], dict[int | None, str]] = {}
    firsts: dict[str, sympy.Symbol] = {}
    for node in placeholders:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        for axis, size in enumerate(value.shape):
            if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
                continue
            raw = str(size.node.expr)
            if raw not in symbols.names:
                owner, name = role(str(node.target), axis, value.ndim, raw)
                others = [n for (_, kind), sizes in taken.items() if kind == name for n in sizes.values()]
                named = f"{name}_{len(others)}" if others else name
                symbols.names[raw] = taken.setdefault((owner, name), {}).setdefault(size.node.hint, named)
                first = firsts.setdefault(symbols.names[raw], size.node.expr)
                symbols.first[size.node.expr] = first
                number = divisor(size)
                if number > 1:
                    quotient = sympy.Symbol(f"{symbols.names[raw]}_per_{number}", integer=True, positive=True)
                    symbols.multiples[first] = number * quotient
    return symbols


def divisor(size: torch.SymInt) -> int:
    """The number that the traced model has shown to divide a symbol: a chunk length, 1 where there is none."""
    facts = [fact for fact in size.node.shape_env.divisible if fact.args[0] == size.node.expr and fact.args[1].is_Integer]
    return math.lcm(*(int(fact.args[1]) for fact in facts))


def role(name: str, axis: int, rank: int, raw: str) -> tuple[str, str]:
    """(whose size it is, its name): batch and sequence belong to all token inputs, past to all layers of one cache."""
    if "past" in name and rank == 4 and axis in (0, 2):
        return ("", "batch") if axis == 0 else (LAYER.sub("", name), "past")
    side = "decoder_" if name.startswith("decoder_") else ""
    if rank < 2 or name.removeprefix(side) not in TOKENS or axis > 1:
        return name, raw
    return "", f"{side}sequence" if axis == 1 else "batch"
