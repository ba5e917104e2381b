"""A copy of a model that holds no weight twice.

    twin = shared_copy(model)      twin.layer.weight shares the numbers of model.layer.weight; modules and configuration are its own

Replacing a submodule or a parameter of the copy leaves the original as it was. Buffers, which are small and may be written, are copied,
but for the codes of layers that stand for others: those are weights.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from attnopt.hosts.module.layers import Holding


def shared_copy(model: Any) -> Any:
    """The model again, in evaluation mode, without gradients; tied parameters stay tied."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(b): b for m in model.modules() if isinstance(m, Holding) for b in m.buffers()}
    return copy.deepcopy(model, shared).eval()
