"""attnopt: find every attention in a model, understand it, and make it faster without losing accuracy unseen."""

from __future__ import annotations

from typing import Any

# torch finds operators by name when it loads a .pt2 file, so importing attnopt registers those that its graphs call.
from attnopt import operators
from attnopt.runtime import dynamic_int8, flex, local, rounded_linear
from attnopt.version import VERSION as __version__

_HOMES = {
    "inspect": "attnopt.api",
    "optimize": "attnopt.api",
    "explore": "attnopt.api",
    "kernels": "attnopt.api",
    "load": "attnopt.api",
    "calibrate": "attnopt.api",
    "export_decoder": "attnopt.decoder",
    "Decoder": "attnopt.decoder",
    "Optimized": "attnopt.api",
    "Budget": "attnopt.plan.judge.budget",
    "attention": "attnopt.runtime.attention",
    "reference": "attnopt.ir.reference",
    "parse": "attnopt.ir.spec",
    "AttentionSpec": "attnopt.ir.spec",
}


def __getattr__(name: str) -> Any:
    """Load the public names when they are first used: a program that only loads models needs no compiler."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'attnopt' has no attribute '{name}'")


__all__ = [*_HOMES, "__version__", "dynamic_int8", "flex", "local", "operators", "rounded_linear"]


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
