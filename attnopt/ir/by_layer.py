"""Layers of one model that keep their caches differently.

"cache(k=int2, v=int2); layers 0 1: cache(k=int4, v=int4)"   <->   ByLayer(cache(k=int2, v=int2), ((0, cache(k=int4, …)), (1, …)))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnopt.ir.clause import Clause


@dataclass(frozen=True)
class ByLayer:
    """usual: of the layers that `others` does not name, by their index in the model."""

    usual: Clause
    others: tuple[tuple[int, Clause], ...]

    def __str__(self) -> str:
        named: dict[str, list[str]] = {}
        for index, clause in self.others:
            named.setdefault(str(clause), []).append(str(index))
        return "; ".join([str(self.usual), *(f"layers {' '.join(at)}: {words}" for words, at in named.items())])


CacheForm = Clause | ByLayer


def clauses_of(form: CacheForm) -> tuple[Clause, ...]:
    return (form,) if isinstance(form, Clause) else (form.usual, *(clause for _, clause in form.others))


def of_layer(form: CacheForm, index: int) -> Clause:
    return form if isinstance(form, Clause) else dict(form.others).get(index, form.usual)


def parts_of(words: str) -> tuple[str, Mapping[int, str]]:
    """What stands for most layers, and for others by index. Raises ValueError for words of another shape."""
    usual, *rest = (part.strip() for part in words.split(";"))
    found: dict[int, str] = {}
    for part in rest:
        where, colon, said = part.partition(":")
        kind, *at = where.split()
        if kind != "layers" or not colon or not at or not all(x.isdecimal() for x in at):
            raise ValueError(f"'{part}' names no layers")
        found |= dict.fromkeys(map(int, at), said.strip())
    return usual, found
