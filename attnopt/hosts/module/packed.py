"""Several linear layers of one input as one product, each still called where its layer stood.

    q = q_proj(x), k = k_proj(x), v = v_proj(x)     ->     q_proj makes x [Wq Wk Wv], gives its part and keeps the others for k_proj, v_proj

A layer takes the part that is kept for it where it is called with the same tensor, once; with another one it computes anew. So calls in
another order, of one layer alone, or from several threads give the same numbers, and nothing is held when the last layer has its part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class PackedLinear(nn.Module):
    """In place of the first layer: `layer` makes all of `sizes` channels, the first of which are its own."""

    def __init__(self, layer: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layer, self.sizes = layer, list(sizes)
        self.kept: list[tuple[Tensor, tuple[Tensor, ...]] | None] = [
            None
        ]  # in a list: to set an attribute of a module takes long

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x).split(self.sizes, -1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts(x)
        self.kept[0] = (x, parts)
        return parts[0]


class PackedPart(nn.Module):
    """In place of another layer: part `at` of what the first one makes."""

    def __init__(self, first: PackedLinear, at: int) -> None:
        super().__init__()
        self.first, self.kept, self.at = (
            (first,),
            first.kept,
            at,
        )  # in a tuple: no module of this one, whose weights are the first's
        self.last = at == len(first.sizes) - 1

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept[0]
        parts = kept[1] if kept is not None and kept[0] is x else self.first[0].parts(x)
        if self.last:
            self.kept[0] = None
        return parts[self.at]

    def extra_repr(self) -> str:
        return f"part {self.at} of {self.first[0].sizes}"


def pack(model: nn.Module, path: str, own: int, others: Mapping[str, int], layer: nn.Module) -> None:
    """Let the layer at `path`, of `own` channels, make what these others do too, by `layer`. others: paths and channels, in its order."""
    first = PackedLinear(layer, [own, *others.values()]).eval()
    model.set_submodule(path, first)
    for at, other in enumerate(others, 1):
        model.set_submodule(other, PackedPart(first, at).eval())


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of these numbers, weight [out, in], without gradients."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta").requires_grad_(False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return made.eval()
