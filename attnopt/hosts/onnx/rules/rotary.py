"""RotaryEmbedding, standard (opset 23) and of com.microsoft  ->  the products and sums that it stands for.

y1 = x1 * cos - x2 * sin,   y2 = x2 * cos + x1 * sin       x1, x2: the halves of a head, or its even and odd elements
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnopt.hosts.onnx.rules.heads import part
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.dims import divide
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def standard(t: Translation, x: Inputs) -> bool:
    """RotaryEmbedding(x, cos, sin, positions | None): tables [rows, R/2] with positions, else [B, L, R/2]."""
    value, cos, sin, positions = (*x, None)[:4]
    heads = int(t.attr("num_heads", 0)) or None
    dims = int(t.attr("rotary_embedding_dim", 0)) or None
    return embedding(t, value, cos, sin, positions, heads=heads, dims=dims)


def contrib(t: Translation, x: Inputs) -> bool:
    """com.microsoft::RotaryEmbedding(x, positions [B, L], cos, sin)."""
    value, positions, cos, sin = x
    if t.attr("scale", 1.0) != 1.0 or t.attr("is_packed_batching", 0) or positions is None or len(positions.shape or ()) != 2:
        return False
    heads = int(t.attr("num_heads", 0)) or None
    dims = int(t.attr("rotary_embedding_dim", 0)) or None
    return embedding(t, value, cos, sin, positions, heads=heads, dims=dims)


def embedding(
    t: Translation,
    x: Value | None,
    cos: Value | None,
    sin: Value | None,
    positions: Value | None,
    *,
    heads: int | None,
    dims: int | None,
) -> bool:
    """Of heads apart [B, H, L, D] or in a row [B, L, H*D]."""
    if x is None or x.shape is None or cos is None or sin is None or cos.shape is None:
        return False
    half = cos.shape[-1]
    if not isinstance(half, int) or (dims is not None and dims != 2 * half):
        return False
    interleaved = bool(t.attr("interleaved", 0))
    if len(x.shape) == 4:
        tables = [looked_up(t, table, positions, heads_at=1) for table in (cos, sin)]
        if None in tables or not isinstance(x.shape[3], int):
            return False
        op, inputs, attrs = turned(t, x, tables[0], tables[1], interleaved)  # type: ignore[arg-type]
        return t.result(op, *inputs, shape=x.shape, **attrs)
    width = 2 * half if heads is None else divide(x.shape[2], heads)
    count = divide(x.shape[2], width) if width is not None else None
    tables = [looked_up(t, table, positions, heads_at=2) for table in (cos, sin)]
    if count is None or not isinstance(width, int) or None in tables:
        return False
    apart = t.emit("reshape", x, shape=(*x.shape[:2], count, width))
    made = rotated(t, apart, tables[0], tables[1], interleaved)  # type: ignore[arg-type]
    return t.result("reshape", made, shape=x.shape)


def looked_up(t: Translation, table: Value, positions: Value | None, *, heads_at: int) -> Value | None:
    """The rows of a table [rows, R/2] at positions [B, L], or a table [B, L, R/2], with an axis for the heads."""
    if positions is not None and positions.shape is not None and len(table.shape or ()) == 2 and len(positions.shape) == 2:
        table = t.emit("gather", table, positions, shape=(*positions.shape, (table.shape or ())[1]), dtype=table.dtype, axis=0)
    if table.shape is None or len(table.shape) != 3:
        return None
    return t.emit("reshape", table, shape=(*table.shape[:heads_at], 1, *table.shape[heads_at:]))


def rotated(t: Translation, x: Value, cos: Value, sin: Value, interleaved: bool) -> Value:
    """The last dimension of x turned by angles whose tables broadcast over it; what lies beyond the tables stays."""
    op, inputs, attrs = turned(t, x, cos, sin, interleaved)
    return t.emit(op, *inputs, shape=x.shape or (), **attrs)


def turned(t: Translation, x: Value, cos: Value, sin: Value, interleaved: bool) -> tuple[str, list[Value], dict[str, Any]]:
    """The last node of a rotation, its inputs made."""
    shape, half = x.shape or (), (cos.shape or (0,))[-1]
    axis, width = len(shape) - 1, shape[-1]
    assert isinstance(half, int) and isinstance(width, int)
    both = 2 * half
    if interleaved:
        first, second = part(t, x, axis, 0, both, 2), part(t, x, axis, 1, both, 2)
    else:
        first, second = part(t, x, axis, 0, half), part(t, x, axis, half, both)
    small = (*shape[:-1], half)

    def product(a: Value, b: Value) -> Value:
        return t.emit("mul", a, b, shape=small)

    pieces = [
        t.emit("sub", product(first, cos), product(second, sin), shape=small),
        t.emit("add", product(second, cos), product(first, sin), shape=small),
    ]
    rest = [part(t, x, axis, both, width)] if width > both else []
    if not interleaved:
        return "concat", [*pieces, *rest], {"axis": axis}
    apart = [t.emit("reshape", p, shape=(*small, 1)) for p in pieces]
    pairs = t.emit("concat", *apart, shape=(*small, 2), axis=axis + 1)
    if not rest:
        return "reshape", [pairs], {}
    return "concat", [t.emit("reshape", pairs, shape=(*shape[:-1], both)), *rest], {"axis": axis}


RULES: dict[str, Rule] = {"RotaryEmbedding": standard, "com.microsoft::RotaryEmbedding": contrib}
