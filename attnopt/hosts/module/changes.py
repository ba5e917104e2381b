"""What a live model has otherwise than the class and the configuration that it came from say, as data that a folder holds.

    Change("int8", "model.layers.0.mlp.up_proj", {weight, scales})   ->   model.layers.0.mlp.up_proj = Int8Linear(…)

kinds: `constant` (a parameter or buffer with other numbers, or of another shape), `int8`, `int8-rows`, `rounded`, `rows`, `low-rank`,
`narrow`, `norm`, `centred-rows` (see `layers`), `linear` (a plain one of these numbers), `packed` (several in one, see `packed`), `heads`
(numbers of heads that a layer keeps in attributes), `widths` (of the heads it keeps, see `widths`), `no-attention`, `no-norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from attnopt.hosts.module.layers import (
    CentredRows,
    Holding,
    Int8Linear,
    Int8Rows,
    LowRankLinear,
    NarrowLinear,
    NoAttention,
    NoNorm,
    PlainNorm,
    RoundedLinear,
    RoundedRows,
)
from attnopt.hosts.module.lifting import UP
from attnopt.hosts.module.packed import linear, pack
from attnopt.hosts.module.widths import narrow


@dataclass(frozen=True)
class Change:
    """path: of the module, or of the parameter. tensors: what the new module holds; they stand in the checkpoint, not in the record."""

    kind: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": self.path, "options": dict(self.options), "tensors": sorted(self.tensors)}

    def apply(self, model: nn.Module) -> None:
        """Make the change in place."""
        MAKERS[self.kind](model, self)


def read(record: Mapping[str, Any], state: Mapping[str, Tensor]) -> Change:
    """A change of a saved model; its tensors are in the checkpoint under its path, but those that a later change took the place of."""
    path = str(record["path"])
    names = {name: f"{path}.{name}" if name else path for name in record["tensors"]}
    return Change(record["kind"], path, record["options"], {name: state[key] for name, key in names.items() if key in state})


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    module.training = False
    model.set_submodule(path, module)


def constant(model: nn.Module, change: Change) -> None:
    """Other numbers for a parameter, or a buffer, in every module that holds it; none where a later change takes them out of it."""
    if "" not in change.tensors:
        return
    owner, _, name = change.path.rpartition(".")
    holder, data = model.get_submodule(owner), change.tensors[""]
    if name in holder._buffers:
        holder._buffers[name] = data
        return
    old, new = getattr(holder, name), nn.Parameter(data, requires_grad=False)
    for module in model.modules():
        for own, held in module._parameters.items():
            if held is old:
                module._parameters[own] = new
                if isinstance(module, nn.Linear) and own == "weight":
                    module.out_features, module.in_features = data.shape


def holding(kind: type[Holding]) -> Callable[[nn.Module, Change], None]:
    return lambda model, change: put(model, change.path, kind(change.tensors, **change.options))


def heads(model: nn.Module, change: Change) -> None:
    """Attributes of an attention that count heads, where its class has them."""
    module = model.get_submodule(change.path)
    for name, value in change.options.items():
        if hasattr(module, name):
            setattr(module, name, value)


def plain(model: nn.Module, change: Change) -> None:
    if (weight := change.tensors.get("weight")) is not None:
        put(model, change.path, linear(weight, change.tensors.get("bias")))


def packed(model: nn.Module, change: Change) -> None:
    """Without a weight the layer inside is the business of a later change."""
    weight, bias = (change.tensors.get(f"layer.{name}") for name in ("weight", "bias"))
    layer = nn.Identity() if weight is None else linear(weight, bias)
    pack(model, change.path, change.options["own"], change.options["others"], layer)


def centred(model: nn.Module, change: Change) -> None:
    table: nn.Embedding = model.get_submodule(change.path)  # type: ignore[assignment]
    put(model, change.path, CentredRows.of(table))


MAKERS: dict[str, Callable[[nn.Module, Change], None]] = {
    "constant": constant,
    "int8": holding(Int8Linear),
    "int8-rows": holding(Int8Rows),
    "rounded": holding(RoundedLinear),
    "rows": holding(RoundedRows),
    "low-rank": holding(LowRankLinear),
    "narrow": holding(NarrowLinear),
    "linear": plain,
    "packed": packed,
    "norm": holding(PlainNorm),
    "centred-rows": centred,
    "heads": heads,
    "widths": lambda model, change: narrow(model.get_submodule(change.path), **change.options, up=change.tensors.get(UP)),
    "no-attention": lambda model, change: put(model, change.path, NoAttention(change.options["layer_idx"])),
    "no-norm": lambda model, change: put(model, change.path, NoNorm()),
}
