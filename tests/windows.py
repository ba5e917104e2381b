"""Attention with a window in every form that local attention must compute: one table for the lowerings of both hosts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import onnx
import torch
from hosts.onnx.small_models import value
from onnx import TensorProto, helper
from torch import Tensor

from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.layout import Group, Operand
from attnopt.ir.reference import reference
from attnopt.ir.site import Site
from attnopt.ir.spec import parse
from attnopt.patterns import recognise

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bool": TensorProto.BOOL, "int64": TensorProto.INT64}


@dataclass(frozen=True)
class Setting:
    """One attention with operands: their shapes by letters (b, h, q, k, 1), which are also their layouts."""

    spec: str
    heads: tuple[int, int] = (4, 2)
    width: int = 16
    dtype: str = "float32"
    operands: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def kind(self, name: str) -> str:
        return self.kinds.get(name, self.dtype)

    def model(self, opset: int = 23, batch: int | str = "batch", length: int | str = "length") -> onnx.ModelProto:
        """One Attention node; the operands are inputs beside it."""
        sizes = {"b": batch, "h": self.heads[0], "q": length, "k": length, "1": 1}
        made = TYPES[self.dtype]
        shapes = {
            n: (batch, h, length, self.width) for n, h in zip("qkv", (self.heads[0], self.heads[1], self.heads[1]), strict=True)
        }
        inputs = [value(n, shape, made) for n, shape in shapes.items()]
        inputs += [value(n, [sizes[x] for x in axes], TYPES[self.kind(n)]) for n, axes in self.operands.items()]
        node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention")
        graph = helper.make_graph([node], "one", inputs, [value("y", None, made)])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)

    def site(self, host: OnnxHost) -> Site:
        """The recognised site, with this spec in place of its own."""
        (site,) = recognise(host.graph).sites
        inputs = {v.name: v for v in host.graph.inputs}
        groups: dict[str, Group] = {n: site.axes[n] for n in "bqk"} | {"h": (*site.axes["g"], *site.axes["r"]), "1": ()}
        loads = {n: Operand(inputs[n], tuple(groups[x] for x in axes)) for n, axes in self.operands.items()}
        return replace(site, operands=loads).with_step("test", parse(self.spec))

    def data(self, batch: int, length: int, padding: str = "") -> dict[str, Tensor]:
        torch.manual_seed(length)
        sizes = {"b": batch, "h": self.heads[0], "q": length, "k": length, "1": 1}
        shapes = {"q": (batch, self.heads[0], length, self.width)} | dict.fromkeys(
            "kv", (batch, self.heads[1], length, self.width)
        )
        made = {n: torch.randn(shape).to(getattr(torch, self.dtype)) for n, shape in shapes.items()}
        for name, axes in self.operands.items():
            shape, kind = [sizes[x] for x in axes], self.kind(name)
            if "padding" in name:
                seen = torch.ones(shape)
                if padding == "left":
                    seen[-1, ..., : max(1, 2 * length // 3)] = 0
                elif padding == "right":
                    seen[-1, ..., -max(1, 2 * length // 3) :] = 0
                made[name] = seen.to(getattr(torch, kind))
            elif kind == "int64":
                made[name] = torch.arange(length).div(5, rounding_mode="floor").expand(shape).contiguous()
            else:
                made[name] = torch.randn(shape).to(getattr(torch, kind))
        return made

    def wanted(self, data: dict[str, Tensor]) -> Tensor:
        exact = {n: t.double() if t.is_floating_point() else t for n, t in data.items()}
        return reference(self.spec, **exact).to(getattr(torch, self.dtype))


PADDED = {"operands": {"padding": "bk"}, "kinds": {"padding": "bool"}}
SETTINGS = {
    "window": Setting("softmax heads(4, 2) scale(0.25) causal & window(20)"),
    "window_of_one": Setting("softmax causal & window(1)"),
    "window_of_none": Setting("softmax causal & window(0)"),
    "one_head_each": Setting("softmax scale(0.25) causal & window(20)", heads=(3, 3)),
    "one_key_head": Setting("softmax scale(0.25) causal & window(20)", heads=(4, 1)),
    "larger_than_a_chunk": Setting("softmax scale(0.25) causal & window(150)"),
    "both_sides": Setting("softmax scale(0.25) window(7) & lookahead(30)"),
    "ahead_only": Setting("softmax scale(0.25) k >= q & lookahead(9)"),
    "spelled_out": Setting("softmax scale(0.25) k > q - 20 & k <= q"),
    "dilated": Setting("softmax scale(0.25) causal & window(40) & dilated(3)"),
    "blocks": Setting("softmax scale(0.25) chunk(48)"),
    "causal_blocks": Setting("softmax scale(0.25) causal & chunk(48)"),
    "blocks_and_window": Setting("softmax scale(0.25) causal & chunk(4000) & window(20)"),
    "near_blocks": Setting("softmax scale(0.25) near_blocks(16, 1) & causal"),
    "window_and_more": Setting("softmax scale(0.25) causal & window(60) & (global(4) | window(20))"),
    "sinks": Setting("softmax scale(0.25) causal & (window(20) | global(4))"),
    "sinks_and_more": Setting("softmax scale(0.25) causal & (window(20) | global(4)) & padding", **PADDED),
    "many_sinks_both_sides": Setting(
        "softmax scale(0.25) add(alibi) window(9) & lookahead(9) | global(90)", operands={"slopes": "h"}
    ),
    "last_keys": Setting("softmax scale(0.25) causal & window(60) & (last(50) | diagonal)"),
    "softcap": Setting("softmax scale(0.25) softcap(2.0) causal & window(20)"),
    "softcap_then_scale": Setting("softmax scale(0.5) scale(0.5) softcap(2.0) scale(3.0) causal & window(20)"),
    "padding": Setting("softmax scale(0.25) causal & window(20) & padding", **PADDED),
    "padding_zero": Setting("softmax scale(0.25) causal & window(20) & padding empty(zero)", **PADDED),
    "padding_free": Setting("softmax scale(0.25) causal & window(20) & padding empty(free)", **PADDED),
    "padding_both_sides": Setting("softmax scale(0.25) window(9) & lookahead(5) & padding", **PADDED),
    "padding_of_numbers": Setting(
        "softmax causal & window(20) & padding", operands={"padding": "bk"}, kinds={"padding": "int64"}
    ),
    "padding_in_four": Setting(
        "softmax causal & window(20) & load(padding, b, 0, 0, k)", operands={"padding": "b11k"}, kinds={"padding": "bool"}
    ),
    "padding_turned": Setting(
        "softmax causal & window(20) & load(padding, k, b)", operands={"padding": "kb"}, kinds={"padding": "bool"}
    ),
    "documents": Setting(
        "softmax scale(0.25) causal & window(20) & document", operands={"document": "bk"}, kinds={"document": "int64"}
    ),
    "bias": Setting("softmax scale(0.25) add(load(bias, 0, h, row, k)) causal & window(20)", operands={"bias": "1hqk"}),
    "bias_of_batch": Setting("softmax add(load(bias, b, 0, row, k)) causal & window(20)", operands={"bias": "b1qk"}),
    "bias_of_rows": Setting("softmax add(load(bias, b, h, row, 0)) causal & window(20)", operands={"bias": "bhq1"}),
    "bias_of_keys": Setting("softmax add(load(bias, b, h, 0, k)) causal & window(20)", operands={"bias": "bh1k"}),
    "bias_then_softcap": Setting(
        "softmax scale(0.25) add(load(bias, h, row, k)) softcap(1.5) causal & window(20)", operands={"bias": "hqk"}
    ),
    "alibi": Setting("softmax scale(0.25) add(alibi) causal & window(20)", operands={"slopes": "h"}),
    "positions": Setting("softmax add(0.01 * float(q) - 0.02 * float(k)) causal & window(20)"),
    "scale_per_head": Setting(
        "softmax scale(0.5) add(0.5) scale(load(s, 0, h, 0, 0)) causal & window(20)", operands={"s": "1h11"}
    ),
    "half": Setting("softmax scale(0.25) causal & window(20) & padding", dtype="float16", **PADDED),
}
