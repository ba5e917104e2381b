"""One rule per ONNX operator: canonical inputs in, canonical nodes out. False leaves the operator opaque."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnopt.hosts.onnx.rules import access, blocks, contraction, elementwise, layout, reduction, rotary, sizes

RULES: dict[str, Callable[[Any, list[Any]], bool]] = {
    **layout.RULES,
    **elementwise.RULES,
    **reduction.RULES,
    **contraction.RULES,
    **access.RULES,
    **blocks.RULES,
    **rotary.RULES,
    **sizes.over(elementwise.RULES, access.RULES, layout.RULES),
}
