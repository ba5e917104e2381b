"""The slots of a spec line: named clauses with checked arguments.

    softcap(50.0)        rotary(64, base=500000.0)        precision(q=int8, k=int8, v=fp8)

Every slot of a spec but the mask holds `Clause`s: a name, positional arguments and options. `signatures.SIGNATURES` says for
each name which slot it fills and what it takes, so that adding a variant is adding a row there and its meaning in `reference`.
A clause brings its arguments into one form, so that clauses that mean the same are equal and print equally.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Union

from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Scalar, Size, Term, check_name, render_number

if TYPE_CHECKING:
    from attnopt.ir.spec import AttentionSpec

Argument = Union[Scalar, str, Expr, "AttentionSpec"]
# "number", "count" (an int, not negative), "expr", "operand" (a tensor's name), "spec", or the words to choose from.
Kind = Union[str, tuple[str, ...]]
Option = tuple[Kind, Argument | None]
EXPRESSIONS = (Index, Const, Size, Load, Apply, Term)


@dataclass(frozen=True)
class Signature:
    """`slot` is the field of AttentionSpec. Of the arguments, the last `optional` may be left out: they equal the one before.

    Options carry a default; None where there is none.
    """

    slot: str
    args: tuple[Kind, ...] = ()
    options: Mapping[str, Option] = field(default_factory=dict)
    optional: int = 0


@dataclass(frozen=True)
class Clause:
    """`name(args…, option=value…)`. Options stand in the order of the signature, those at their default are left out.

    Raises ValueError for an unknown name or option, or an argument that is not of its kind.
    """

    name: str
    args: tuple[Argument, ...] = ()
    options: tuple[tuple[str, Argument], ...] = ()

    def __post_init__(self) -> None:
        signature, given = self.signature, dict(self.options)
        if not len(signature.args) - signature.optional <= len(self.args) <= len(signature.args):
            raise ValueError(f"{self.name} takes {len(signature.args)} argument(s), not {len(self.args)}")
        if unknown := given.keys() - signature.options.keys():
            raise ValueError(f"{self.name} has no option {', '.join(sorted(unknown))}")
        args = [checked(a, kind, self.name) for a, kind in zip(self.args, signature.args, strict=False)]
        while len(args) > max(1, len(signature.args) - signature.optional) and args[-1] == args[-2]:
            args.pop()
        options = []
        for name, (kind, default) in signature.options.items():
            if name in given and (value := checked(given[name], kind, f"{self.name}({name}=)")) != default:
                options.append((name, value))
        object.__setattr__(self, "args", tuple(args))
        object.__setattr__(self, "options", tuple(options))

    def __str__(self) -> str:
        inside = [render_argument(a) for a in self.args] + [f"{k}={render_argument(v)}" for k, v in self.options]
        return f"{self.name}({', '.join(inside)})" if inside else self.name

    @property
    def signature(self) -> Signature:
        from attnopt.ir.signatures import SIGNATURES

        if self.name not in SIGNATURES:
            raise ValueError(f"no clause is named '{self.name}'")
        return SIGNATURES[self.name]

    def get(self, which: int | str) -> Argument | None:
        """An argument by position, or an option by name; where it was left out, what that stands for."""
        if isinstance(which, int):
            return self.args[min(which, len(self.args) - 1)]
        return dict(self.options).get(which, self.signature.options[which][1])

    def number(self, which: int | str) -> float:
        value = self.get(which)
        assert isinstance(value, (int, float))
        return float(value)

    def count(self, which: int | str) -> int:
        value = self.get(which)
        assert isinstance(value, int)
        return value

    def word(self, which: int | str) -> str:
        value = self.get(which)
        assert isinstance(value, str)
        return value

    def operand(self, which: int | str) -> str | None:
        return None if self.get(which) is None else self.word(which)

    def expr(self, which: int | str) -> Expr:
        value = self.get(which)
        assert isinstance(value, EXPRESSIONS)
        return value

    def expr_or_none(self, which: int | str) -> Expr | None:
        return None if self.get(which) is None else self.expr(which)

    def spec(self, which: int | str) -> AttentionSpec:
        from attnopt.ir.spec import AttentionSpec

        value = self.get(which)
        assert isinstance(value, AttentionSpec)
        return value

    @property
    def arguments(self) -> tuple[tuple[Kind, Argument | None], ...]:
        """Every argument and option (also those at their default) with its kind."""
        signature = self.signature
        positional = tuple(zip(signature.args, self.args, strict=False))
        return positional + tuple((kind, self.get(name)) for name, (kind, _) in signature.options.items())


def checked(value: Argument, kind: Kind, where: str) -> Argument:
    """The value in the one form of its kind: numbers are floats, counts ints, plain numbers expressions where one is due."""
    if isinstance(kind, tuple):
        if value in kind:
            return value
        raise ValueError(f"{where} is one of {', '.join(kind)}, not {value}")
    if isinstance(value, (bool, int, float)):
        if kind == "expr":
            return Const(value)
        if kind == "number" and not isinstance(value, bool):
            return float(value)
        if kind == "count" and not isinstance(value, bool) and value == int(value) and value >= 0:
            return int(value)
    elif isinstance(value, str):
        if kind == "operand":
            check_name(value)
            return value
    elif (kind == "expr") == isinstance(value, EXPRESSIONS) and kind in ("expr", "spec"):
        return value
    wanted = {"expr": "an index expression", "operand": "the name of an operand"}.get(kind, f"a {kind}")
    raise ValueError(f"{where} takes {wanted}, not {render_argument(value)}")


def render_argument(value: Argument) -> str:
    return render_number(value) if isinstance(value, (bool, int, float)) else str(value)
