"""Work on a cache that stays out of the graphs of torch.compile.

@uncompiled
def grown(self, x): …       in a compiled model a break of the graph, as by torch.compiler.disable; in any other call nothing at all
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """torch.compiler.disable asks what to do at each call, which takes as long as a token's way into its place."""
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call  # type: ignore[return-value]
