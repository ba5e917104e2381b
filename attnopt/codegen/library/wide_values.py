"""softmax heads(4) width(64, 128)   ->   two calls with values 64 wide, side by side

Kernels that keep a block of each operand at hand want rows of one width: torch's SDPA falls back to the whole score matrix where
values are wider than keys, as in differential attention. The scores are then computed once for each piece.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from attnopt.codegen.library.sdpa import Sdpa
from attnopt.codegen.lowering import Lowering, first_refusal
from attnopt.ir.graph import Value
from attnopt.ir.layout import Axis, Layout, Operand, size_of
from attnopt.ir.site import Builder, Refusal, Site, arrange


@dataclass(frozen=True)
class WideValues:
    """`kernel` computes each piece."""

    kernel: Lowering = field(default_factory=Sdpa)

    @property
    def name(self) -> str:
        return f"wide-values-{self.kernel.name}"

    @property
    def host(self) -> str:
        return self.kernel.host

    @property
    def opset(self) -> int:
        return self.kernel.opset

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        refusal = first_refusal(
            (count(site) > 1, f"values of width {site.size('e')} are no multiple of keys of width {site.size('d')}"), at=site.name
        )
        return refusal or self.kernel.supports(piece(site, site.v), runtime)

    def emit(self, site: Site, builder: Builder) -> Value:
        a, dtype = site.axes, site.q.value.dtype
        made = [self.kernel.emit(piece(site, v), builder) for v in pieces(site, builder)]
        layout: Layout = (a["b"], (*a["g"], *a["r"]), a["q"], a["e"])
        wide = builder.emit("concat", *made, shape=tuple(map(size_of, layout)), dtype=dtype, axis=3)
        return arrange(builder, Operand(wide, layout), site.output.layout)


def count(site: Site) -> int:
    """How many times as wide as keys the values are; 0 where they are no multiple."""
    keys, values = site.size("d"), site.size("e")
    return values // keys if isinstance(keys, int) and isinstance(values, int) and keys and values % keys == 0 else 0


def channels(site: Site) -> Axis:
    return Axis("e", site.size("d"))


def piece(site: Site, v: Operand) -> Site:
    """The attention over one piece of the values, as a site that writes [B, H, Q, D]."""
    a, own = site.axes, channels(site)
    output = Operand(site.output.value, (a["b"], (*a["g"], *a["r"]), a["q"], (own,)))
    return replace(site, v=v, axes={**a, "e": (own,)}, output=output, spec=site.spec.with_(width=None))


def pieces(site: Site, builder: Builder) -> list[Operand]:
    """The values cut along their channels; where they were joined of such pieces, those."""
    a, own, width = site.axes, channels(site), site.size("d")
    node, layout = site.v.value.producer, site.v.layout
    if site.v.value.handle is None and node is not None and node.op == "concat" and layout[node.attrs["axis"]] == a["e"]:
        parts = [i for i in node.inputs if i is not None and i.shape is not None and i.shape[node.attrs["axis"]] == width]
        if len(parts) == len(node.inputs):
            held = tuple((own,) if group == a["e"] else group for group in layout)
            return [Operand(part, held) for part in parts]
    assert isinstance(width, int)
    whole: Layout = (a["b"], a["g"], a["k"], a["e"])
    value = arrange(builder, site.v, whole)
    kept: Layout = tuple(group if site.v.axes & set(group) else () for group in whole[:3])
    shape = (*map(size_of, kept), width)

    def cut(i: int) -> Value:
        return builder.emit("slice", value, shape=shape, dtype=value.dtype, axis=3, start=i * width, stop=(i + 1) * width, step=1)

    return [Operand(cut(i), (*kept, (own,))) for i in range(count(site))]
