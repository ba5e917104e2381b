"""Local attention on chunks: equal to the reference on every mask that proves a band, by two runtimes, at every length."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import pytest
import torch
from hosts.onnx import small_models
from hosts.onnx.small_models import value
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from attnopt.codegen.library.local_attention import LocalAttention
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.layout import Group, Operand
from attnopt.ir.reference import attend, reference
from attnopt.ir.site import Refusal, Site
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

    def rewritten(self, **model: object) -> OnnxHost:
        host = OnnxHost.from_model(self.model(**model))
        site = self.site(host)
        assert LocalAttention().supports(site, "any runtime") is None
        made = LocalAttention().emit(site, host.builder(site.output.value.producer))
        host.replace(site.output.value, made)
        host.finish()
        assert "Attention" not in {n.op_type for n in host.model.graph}
        assert {n.domain for n in host.model.graph} == {""}
        return host

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


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_to_the_reference_at_every_length(name):
    """One model with an open length: shorter than the window, than a chunk, no multiple of it, several chunks."""
    setting = SETTINGS[name]
    run = setting.rewritten().runner()
    tolerance = 5e-3 if setting.dtype == "float16" else 2e-5
    for batch, length in ((1, 1), (2, 5), (2, 64), (1, 131), (2, 200)):
        for padding in ("left", "right") if "padding" in setting.operands else ("",):
            data = setting.data(batch, length, padding)
            made, wanted = run(data)[0], setting.wanted(data)
            assert bool(made.isfinite().all())
            if "free" in setting.spec:  # rows that see no key may hold anything finite
                seen = attend(setting.spec, **data).lse[..., None].isfinite()
                made, wanted = made * seen, wanted * seen
            torch.testing.assert_close(made, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["window", "padding", "padding_zero", "bias", "causal_blocks", "documents"])
@pytest.mark.parametrize("length", [5, 70])
def test_equal_in_the_reference_implementation_of_onnx(name, length):
    setting = SETTINGS[name]
    data = setting.data(2, length, "left")
    evaluator = ReferenceEvaluator(proto(setting.rewritten()))
    (made,) = evaluator.run(None, {n: t.numpy() for n, t in data.items()})
    torch.testing.assert_close(torch.from_numpy(np.asarray(made)), setting.wanted(data), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["window", "padding", "both_sides", "blocks", "bias"])
def test_sizes_that_are_known(name):
    setting = SETTINGS[name]
    for length in (300, 256):
        data = setting.data(2, length, "left")
        (made,) = setting.rewritten(batch=2, length=length).runner()(data)
        torch.testing.assert_close(made, setting.wanted(data), atol=2e-5, rtol=2e-5)


def proto(host: OnnxHost) -> onnx.ModelProto:
    import onnx_ir

    return onnx_ir.to_proto(host.model)


def refusal(setting: Setting, **model: object) -> Refusal:
    found = LocalAttention().supports(setting.site(OnnxHost.from_model(setting.model(**model))), "onnxruntime")
    assert found is not None
    return found


REFUSED = {
    "no_window": (Setting("softmax causal"), "proves no window"),
    "window_or_more": (Setting("softmax causal & (window(20) | global(4))"), "proves no window"),
    "no_mask": (Setting("softmax"), "proves no window"),
    "one_side": (Setting("softmax window(20)"), "proves no window"),
    "offset": (Setting("softmax offset(3) causal & window(20)"), "do not start at position 0"),
    "normaliser": (Setting("sigmoid causal & window(20)"), "normaliser"),
    "score_term": (Setting("softmax mod(relu) causal & window(20)"), "score term 'mod(relu)'"),
    "sink": (Setting("softmax causal & window(20) sink(load(s, h))", operands={"s": "h"}), "sink"),
    "tensor_scale_first": (
        Setting("softmax scale(load(s, h)) scale(0.5) causal & window(20)", operands={"s": "h"}), "a tensor stands first",
    ),
    "computed_places": (
        Setting("softmax add(load(table, 0, h, 0, max(q - k, 0))) causal & window(20)", operands={"table": "1h1k"}), "computed places",
    ),
    "diagonal_load": (Setting("softmax add(load(x, q, q)) causal & window(20)", operands={"x": "qk"}), "computed places"),
    "rank": (Setting("softmax add(load(x, h, q, k)) causal & window(20)", operands={"x": "qk"}), "another rank"),
    "unknown_operand": (Setting("softmax causal & window(20) & padding"), "'padding' is not an operand"),
    "unknown_length": (Setting("softmax causal & window(20) & k < size(memory)"), "size(memory)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    setting, reason = REFUSED[name]
    assert reason in refusal(setting).reason


def test_refused_where_there_is_nothing_to_gain():
    assert "cover all 80 keys" in refusal(SETTINGS["window"], length=80).reason
    assert "cover all 48 keys" in refusal(SETTINGS["blocks"], length=48).reason


def test_refused_where_queries_and_keys_differ():
    host = OnnxHost.from_model(small_models.attention(23, ("batch", 4, "length", 8), ("batch", 4, "all", 8)))
    (site,) = recognise(host.graph).sites
    refused = LocalAttention().supports(site.with_step("test", parse("softmax causal & window(20)")), "onnxruntime")
    assert "differ in number" in refused.reason


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_opsets(opset):
    host = OnnxHost.from_model(small_models.spelled_out(opset))
    (site,) = recognise(host.graph).sites
    spec = "softmax scale(0.3535534) causal & window(20)"
    made = LocalAttention().emit(site.with_step("test", parse(spec)), host.builder(site.output.value.producer))
    host.replace(site.output.value, made)
    host.finish()
    data = {n: torch.randn(2, 4, 90, 8) for n in "qkv"}
    torch.testing.assert_close(host.runner()(data)[0], reference(spec, **data), atol=2e-5, rtol=2e-5)


def test_memory_grows_with_the_length():
    """No tensor of the graph holds a score for every pair of positions."""
    host = SETTINGS["padding"].rewritten(batch=1, length=4096)
    sizes = [int(np.prod(v.shape.numpy())) for n in host.model.graph for v in n.outputs if v.shape is not None]
    assert max(sizes) < 4 * 4096 * 200
