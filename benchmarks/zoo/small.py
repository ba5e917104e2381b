"""What generic shrinking loses, as data: fields of a configuration that it must not decide, inputs, the part that is measured.

Fields of inner configurations are written with a dot: "text_config.hidden_size".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from zoo.examples import Inputs


@dataclass(frozen=True)
class Small:
    """part: what is measured in place of the whole model, where only that can be traced."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Any], Inputs] | None = None
    part: Callable[[Any], nn.Module] | None = None
