"""Whether Triton can run here: it may be missing, and under its interpreter it runs on any machine."""

from __future__ import annotations

import functools
import importlib.util
import os


@functools.cache
def missing() -> str | None:
    """One line that says why there are no Triton kernels here; None where there are."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed, so its kernels are left out"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. It reads the variable when a kernel is defined, so it must be set before."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
