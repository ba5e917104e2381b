"""Complex numbers as pairs of real ones: some models turn queries and keys by products with e^(i p f).

    view_as_real(view_as_complex(x) * polar(1, p f))   ->   concat(x0 * cos - x1 * sin, x0 * sin + x1 * cos)

A complex value is no value of the canonical graph; its two parts are. What has no rule here is opaque and reads both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from attnopt.hosts.fx.rules.layout import Arguments, Rule
from attnopt.ir.dims import Shape
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.fx.translate import Translation


@dataclass(frozen=True)
class Pair:
    """re + i * im, of one shape."""

    re: Value
    im: Value


def is_complex(t: Translation, node: fx.Node) -> bool:
    """Whether a node makes or reads complex numbers."""
    made = node.meta.get("val")
    return (isinstance(made, Tensor) and made.is_complex()) or any(
        isinstance(t.values.get(n), Pair) for n in node.all_input_nodes
    )


def pair(t: Translation, argument: Any) -> Pair | None:
    """The parts of an argument: of a complex node, or of a complex constant."""
    held = t.values.get(argument) if isinstance(argument, fx.Node) else None
    if isinstance(held, Value) and held.load is not None and held.dtype.startswith("complex"):
        read, real = held.load, "float32" if held.dtype == "complex64" else "float64"
        parts: list[Callable[[], Tensor]] = [lambda: read().real.contiguous(), lambda: read().imag.contiguous()]
        return Pair(*(Value(t.virtual_name(), held.shape, real, load=part) for part in parts))
    return held if isinstance(held, Pair) else None


def keep(t: Translation, re: Value, im: Value) -> bool:
    t.values[t.node] = Pair(re, im)
    return True


def view_as_complex(t: Translation, a: Arguments) -> bool:
    x = t.value(a["self"])
    if x is None or x.shape is None:
        return False
    axis, shape = len(x.shape) - 1, x.shape[:-1]
    parts = [t.emit("slice", x, shape=(*shape, 1), axis=axis, start=i, stop=i + 1, step=1) for i in range(2)]
    return keep(t, *(t.emit("reshape", part, shape=shape) for part in parts))


def view_as_real(t: Translation, a: Arguments) -> bool:
    z = pair(t, a["self"])
    if z is None:
        return False
    apart = [t.emit("reshape", part, shape=(*t.shape[:-1], 1)) for part in (z.re, z.im)]
    return t.result("concat", *apart, axis=len(t.shape) - 1)


def polar(t: Translation, a: Arguments) -> bool:
    length, angle = t.value(a["abs"]), t.value(a["angle"])
    if length is None or angle is None or angle.shape is None:
        return False
    waves = [t.emit(op, angle, shape=angle.shape) for op in ("cos", "sin")]
    if length.scalar() == 1:
        return keep(t, *waves)
    return keep(t, *(t.emit("mul", length, wave, shape=t.shape) for wave in waves))


def mul(t: Translation, a: Arguments) -> bool:
    x, y = pair(t, a["self"]), pair(t, a["other"])
    shape: Shape = t.shape
    if x is not None and y is not None:
        both = [t.emit("mul", u, v, shape=shape) for u, v in ((x.re, y.re), (x.im, y.im), (x.re, y.im), (x.im, y.re))]
        return keep(t, t.emit("sub", *both[:2], shape=shape), t.emit("add", *both[2:], shape=shape))
    z, factor = (x, t.value(a["other"])) if x is not None else (y, t.value(a["self"]))
    if z is None or factor is None or factor.dtype.startswith("complex"):
        return False
    return keep(t, *(t.emit("mul", part, factor, shape=shape) for part in (z.re, z.im)))


def layout(op: str) -> Rule:
    def rule(t: Translation, a: Arguments) -> bool:
        z = pair(t, a["self"])
        return z is not None and keep(t, *(t.emit(op, part, shape=t.shape) for part in (z.re, z.im)))

    return rule


def same(t: Translation, a: Arguments) -> bool:
    z = pair(t, a["self"])
    return z is not None and t.node.meta["val"].is_complex() and keep(t, z.re, z.im)


def whole(t: Translation, a: Arguments) -> bool:
    """A slice of everything, as z[:, :, None] has them."""
    z = pair(t, a["self"])
    return z is not None and not a["start"] and a["step"] == 1 and z.re.shape == t.shape and keep(t, z.re, z.im)


RULES: dict[str, Rule] = {
    "aten.slice": whole,
    "aten.view_as_complex": view_as_complex,
    "aten.view_as_real": view_as_real,
    "aten.polar": polar,
    "aten.mul": mul,
    **{f"aten.{name}": layout("reshape") for name in ("view", "reshape", "unsqueeze", "squeeze", "flatten")},
    "aten.expand": layout("expand"),
    **{f"aten.{name}": same for name in ("to", "_to_copy", "clone", "contiguous", "alias", "detach")},
}
