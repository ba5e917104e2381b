"""view, transpose, expand, repeat, …  ->  reshape, permute, expand; what only copies or guards disappears."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attnopt.ir.dims import Dim, product

if TYPE_CHECKING:
    from attnopt.hosts.fx.translate import Translation

Arguments = dict[str, Any]
Rule = Callable[["Translation", Arguments], bool]


def source(a: Arguments) -> Any:
    """The tensor that a layout operator reads, whatever its schema calls it."""
    return a.get("self", a.get("input"))


def unchanged(t: Translation, a: Arguments) -> bool:
    return t.same(t.value(source(a)))


def inactive_dropout(t: Translation, a: Arguments) -> bool:
    active = bool(a.get("train", a.get("training"))) and bool(a["p"])
    return not active and t.same(t.value(source(a)))


def reshape(t: Translation, a: Arguments) -> bool:
    if a.get("dtype") is not None:  # view.dtype reads the bits as another type
        return False
    value = t.value(source(a))
    if value is not None and value.shape == t.shape:
        return t.same(value)
    return t.result("reshape", value)


def permutation(order: Callable[[int, Arguments], list[int]]) -> Rule:
    def rule(t: Translation, a: Arguments) -> bool:
        value = t.value(source(a))
        rank = len(value.shape or ()) if value is not None else 0
        perm = tuple(axis % rank for axis in order(rank, a)) if rank else ()
        if perm == tuple(range(rank)):
            return t.same(value)
        return t.result("permute", value, perm=perm)

    return rule


def swapped(rank: int, first: int, second: int) -> list[int]:
    order = list(range(rank))
    first, second = first % rank, second % rank
    order[first], order[second] = second, first
    return order


def moved(rank: int, a: Arguments) -> list[int]:
    def listed(x: Any) -> list[int]:
        return [axis % rank for axis in (x if isinstance(x, (list, tuple)) else [x])]

    start, to = listed(a["source"]), listed(a["destination"])
    rest = [axis for axis in range(rank) if axis not in start]
    placed = dict(zip(to, start, strict=True))
    return [placed[i] if i in placed else rest.pop(0) for i in range(rank)]


def expand(t: Translation, a: Arguments) -> bool:
    value = t.value(source(a))
    if value is not None and value.shape == t.shape:
        return t.same(value)
    return t.result("expand", value)


def repeat(t: Translation, a: Arguments) -> bool:
    """x.repeat(r…): the whole tensor tiled, so that index i of the result reads i mod size."""
    value = t.value(source(a))
    if value is None or value.shape is None:
        return False
    given = [t.dim(r) for r in (a["repeats"] if "repeats" in a else a["dims"])]
    times: list[Dim] = [*((1,) * (len(value.shape) - len(given))), *given]
    sizes = (1,) * (len(times) - len(value.shape)) + value.shape
    if all(r == 1 for r in times) and sizes == value.shape:
        return t.same(value)
    if all(r == 1 or size == 1 for r, size in zip(times, sizes, strict=True)):
        return t.result("expand", value)
    split = [axis for size in sizes for axis in (1, size)]
    tiled = [axis for r, size in zip(times, sizes, strict=True) for axis in (r, size)]
    wide = t.emit("expand", t.emit("reshape", value, shape=tuple(split)), shape=tuple(tiled))
    return t.result("reshape", wide)


def repeat_interleave(t: Translation, a: Arguments) -> bool:
    """Each element of one axis repeated in place: [B, G, L, D] -> [B, G, 1, L, D] -> [B, G, r, L, D] -> [B, G*r, L, D]."""
    value = t.value(source(a))
    if value is None or value.shape is None or a.get("dim") is None or not isinstance(a["repeats"], int):
        return False
    axis = a["dim"] % len(value.shape)
    before, size, after = value.shape[:axis], value.shape[axis], value.shape[axis + 1 :]
    apart = t.emit("reshape", value, shape=(*before, size, 1, *after))
    wide = t.emit("expand", apart, shape=(*before, size, a["repeats"], *after))
    return product(wide.shape or ()) == product(t.shape) and t.result("reshape", wide)


RULES: dict[str, Rule] = {
    **{
        f"aten.{name}": unchanged
        for name in ("contiguous", "clone", "alias", "detach", "detach_", "lift_fresh_copy", "resolve_conj", "resolve_neg")
    },
    "aten.dropout": inactive_dropout,
    "aten.feature_dropout": inactive_dropout,
    **{
        f"aten.{name}": reshape
        for name in ("view", "reshape", "_unsafe_view", "view_as", "unsqueeze", "squeeze", "flatten", "unflatten", "reshape_as")
    },
    "aten.transpose": permutation(lambda rank, a: swapped(rank, a["dim0"], a["dim1"])),
    "aten.swapaxes": permutation(lambda rank, a: swapped(rank, a["axis0"], a["axis1"])),
    "aten.permute": permutation(lambda rank, a: list(a["dims"])),
    "aten.movedim": permutation(moved),
    "aten.t": permutation(lambda rank, a: list(reversed(range(rank)))),
    "aten.numpy_T": permutation(lambda rank, a: list(reversed(range(rank)))),
    "aten.mT": permutation(lambda rank, a: swapped(rank, -1, -2)),
    **{f"aten.{name}": expand for name in ("expand", "expand_as", "broadcast_to")},
    "aten.repeat": repeat,
    "aten.tile": repeat,
    "aten.repeat_interleave": repeat_interleave,
}
