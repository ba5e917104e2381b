"""RotaryEmbedding (ai.onnx and com.microsoft)  ->  slices, products with cosines and sines, concat.

x1, x2 = halves (or even and odd channels) of x     ->     concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.dims import Dim, divide, product
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def standard(t: Translation, x: Inputs) -> bool:
    value, cos, sin, positions = (*x, None)[:4]
    return rotated(t, value, cos, sin, positions)


def contrib(t: Translation, x: Inputs) -> bool:
    """com.microsoft: positions come second, and are [B, L] (one offset for the whole batch is left alone)."""
    value, positions, cos, sin = x[:4]
    scaled = t.attr("scale", 1.0) != 1.0 or t.attr("is_packed_batching", 0)
    if scaled or positions is None or positions.shape is None or len(positions.shape) != 2:
        return False
    return rotated(t, value, cos, sin, positions)


def rotated(t: Translation, x: Value | None, cos: Value | None, sin: Value | None, positions: Value | None) -> bool:
    if x is None or cos is None or sin is None or x.shape is None or cos.shape is None or sin.shape is None:
        return False
    shape, heads = x.shape, int(t.attr("num_heads", 0))
    flat = len(shape) == 3
    if flat:  # [B, L, H * D] as [B, L, H, D]: heads are the third dimension, so that nothing has to be moved
        width = divide(shape[2], heads) if heads else None
        if width is None:
            return False
        x = t.emit("reshape", x, shape=(shape[0], shape[1], heads, width))
    elif len(shape) != 4:
        return False
    whole = x.shape[-1]  # type: ignore[index]
    dims = int(t.attr("rotary_embedding_dim", 0)) or whole
    half = cos.shape[-1]
    if not isinstance(dims, int) or half != dims // 2 or dims % 2:
        return False
    tables = [at_rows(t, table, positions, 2 if flat else 1) for table in (cos, sin)]
    if any(table is None for table in tables):
        return False
    turned = turn(t, part(t, x, 0, dims), *tables, interleaved=bool(t.attr("interleaved", 0)))  # type: ignore[arg-type]
    if not flat and dims == whole:
        return t.result("reshape", turned, shape=shape)
    if dims != whole:
        rest = part(t, x, dims, whole)  # type: ignore[arg-type]
        turned = t.emit("concat", turned, rest, shape=x.shape, axis=3)  # type: ignore[arg-type]
    return t.result("reshape", turned, shape=shape)


def at_rows(t: Translation, table: Value, positions: Value | None, axis: int) -> Value | None:
    """[B, L, dims / 2] from the cache at the positions, with a dimension for the heads."""
    shape = table.shape or ()
    if positions is not None:
        if len(shape) != 2 or positions.shape is None:
            return None
        shape = (*positions.shape, shape[1])
        table = t.emit("gather", table, positions, shape=shape, axis=0)
    return t.emit("reshape", table, shape=(*shape[:axis], 1, *shape[axis:])) if len(shape) == 3 else None


def part(t: Translation, x: Value, start: int, stop: int, step: int = 1) -> Value:
    shape: tuple[Dim, ...] = x.shape or ()
    if (start, stop, step) == (0, shape[-1], 1):
        return x
    size = -(-(stop - start) // step)
    return t.emit("slice", x, shape=(*shape[:-1], size), axis=len(shape) - 1, start=start, stop=stop, step=step)


def turn(t: Translation, x: Value, cos: Value, sin: Value, *, interleaved: bool) -> Value:
    shape = x.shape or ()
    dims = int(product(shape[-1:]))  # type: ignore[arg-type]
    first = part(t, x, 0, dims, 2) if interleaved else part(t, x, 0, dims // 2)
    second = part(t, x, 1, dims, 2) if interleaved else part(t, x, dims // 2, dims)
    half = first.shape or ()
    terms = [t.emit("mul", a, b, shape=half) for a, b in ((first, cos), (second, sin), (second, cos), (first, sin))]
    made = (t.emit("sub", *terms[:2], shape=half), t.emit("add", *terms[2:], shape=half))
    if not interleaved:
        return t.emit("concat", *made, shape=shape, axis=len(shape) - 1)
    apart = [t.emit("reshape", m, shape=(*half, 1)) for m in made]
    return t.emit("reshape", t.emit("concat", *apart, shape=(*half, 2), axis=len(half)), shape=shape)


RULES: dict[str, Rule] = {"RotaryEmbedding": standard, "com.microsoft::RotaryEmbedding": contrib}
