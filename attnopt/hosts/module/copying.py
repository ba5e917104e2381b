"""A copy of a model that holds no weight twice.

    twin = shared_copy(model)      twin.layer.weight shares the numbers of model.layer.weight; modules and configuration are its own

Replacing a submodule or a parameter of the copy leaves the original as it was. Buffers, which are small and may be written, are copied.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def shared_copy(model: Any) -> Any:
    """The model again, in evaluation mode, without gradients; tied parameters stay tied."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared).eval()
