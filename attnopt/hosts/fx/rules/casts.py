"""to, _to_copy, type_as, float, …  ->  cast, or nothing where the type stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.hosts.fx.rules.layout import Arguments, Rule, source

if TYPE_CHECKING:
    from attnopt.hosts.fx.translate import Translation


def cast(t: Translation, a: Arguments) -> bool:
    value = t.value(source(a))
    made = t.node.meta["val"]
    dtype = str(made.dtype).removeprefix("torch.")
    if value is None or value.dtype == dtype:
        return t.same(value)
    return t.result("cast", value, dtype=dtype)


RULES: dict[str, Rule] = {f"aten.{name}": cast for name in ("to", "_to_copy", "type_as")}
