"""attnopt: find every attention in a model, understand it, and make it faster without losing accuracy unseen."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "inspect": "attnopt.api",
    "optimize": "attnopt.api",
    "load": "attnopt.api",
    "Optimized": "attnopt.api",
    "attention": "attnopt.runtime.attention",
    "reference": "attnopt.ir.reference",
    "parse": "attnopt.ir.spec",
    "AttentionSpec": "attnopt.ir.spec",
}


def __getattr__(name: str) -> Any:
    """Load the public names when they are first used: `import attnopt` stays light, and operators register with torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'attnopt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
