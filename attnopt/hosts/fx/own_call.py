"""The model as its user has it, called with the named inputs of its graph: what an optimised model is timed against.

    {"input_ids": x, "attention_mask": m}   ->   model(input_ids=x, attention_mask=m)

A traced graph is no measure of its model: while torch.export looks on, transformers builds masks that the model itself leaves out, and
such a graph may take half as long again as the model's own call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnopt.hosts.fx.capture import inference
from attnopt.hosts.fx.host import FxCallable, FxHost
from attnopt.hosts.fx.state import written
from attnopt.hosts.fx.trees import flatten, unflatten


@dataclass(frozen=True)
class OwnCall:
    """The module's own computation in evaluation mode without gradients. host: the graph traced from it."""

    model: nn.Module
    host: FxHost

    def __call__(self, inputs: Mapping[str, Tensor]) -> Any:
        """What the module returns, in its own type."""
        return self.on(self.host.flat_inputs(inputs))

    def on(self, leaves: Sequence[Any]) -> Any:
        """The same on the flat inputs of the graph."""
        convention = self.host.convention
        args, kwargs = unflatten(leaves, convention.in_spec, convention.caches)
        training = any(module.training for module in self.model.modules())
        with torch.no_grad(), inference(self.model) if training else nullcontext():
            return self.model(*args, **kwargs)

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The same tensors as the graph's runner returns, in its order."""
        leaves, _ = flatten(self(inputs), self.host.convention.caches)
        kept = [leaf for leaf, traced in zip(leaves, self.host.output_leaves(), strict=True) if isinstance(traced, fx.Node)]
        return [torch.as_tensor(leaf) for leaf in kept]


class Itself(FxCallable):
    """The given model where nothing was gained: it takes and refuses what an optimised one does, and computes as it always has."""

    def __init__(self, own: OwnCall) -> None:
        super().__init__(own.host.module, own.host.convention, own.host.input_specs)
        self.own = own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own.on(self.checked(args, kwargs))


def own_call(model: Any, host: FxHost, inputs: Mapping[str, Tensor]) -> OwnCall | None:
    """None where there is nothing but a graph, and where a call leaves its mark: in the model's state, or in its inputs."""
    if not isinstance(model, nn.Module) or written(host.module):
        return None
    own = OwnCall(model, host)
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    versions = {name: tensor._version for name, tensor in copies.items()}
    own(copies)
    return own if all(copies[name]._version == version for name, version in versions.items()) else None
