"""One rule per ATen operator: arguments by schema name in, canonical nodes out. False leaves the operator opaque."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnopt.hosts.fx.rules import access, blocks, casts, contraction, elementwise, layout, padding, reduction, windows

RULES: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    **layout.RULES,
    **casts.RULES,
    **elementwise.RULES,
    **reduction.RULES,
    **contraction.RULES,
    **access.RULES,
    **padding.RULES,
    **windows.RULES,
    **blocks.RULES,
}
