"""The torch host: replaced attentions compute the same, signatures and return types stay, files come back."""

from __future__ import annotations

import inspect

import pytest
import torch
from hf_models import ATTENTIONS, build, inputs
from self_attention import SelfAttention, example
from torch import nn

from attnopt.codegen.library.sdpa import Sdpa
from attnopt.errors import InputMismatch, OutputNotWritable, UnreadableModel, UntraceableModel
from attnopt.hosts.fx import FxHost, capture, load_pt2
from attnopt.ir.spec import parse
from attnopt.patterns import recognise
from attnopt.plan.choose import apply_choices, boundary, choose, emit


def opened(model: nn.Module, example=None, **options) -> FxHost:
    return FxHost.from_captured(capture(model, example, **options))


def fused(host: FxHost) -> FxHost:
    sites = recognise(host.graph).sites
    return apply_choices(host, choose(host, sites, None, runtime="torch", opset=0, select="always"))


@pytest.fixture(scope="module")
def bert():
    return build("bert")


def test_every_way_to_call(bert):
    named = inputs("bert")
    call = fused(opened(bert, named)).callable()
    wanted = bert(**named).last_hidden_state
    ids, mask = named["input_ids"], named["attention_mask"]
    for got in (call(ids, mask), call(ids, attention_mask=mask), call(attention_mask=mask, input_ids=ids)):
        torch.testing.assert_close(got.last_hidden_state, wanted)
    assert str(inspect.signature(call)) == str(inspect.signature(bert.forward))
    assert call(ids, mask, return_dict=None).pooler_output.shape == (2, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_ids": torch.zeros(2, 12)}, "input 'input_ids' is float32[2, 12]"),
        ({"input_ids": torch.zeros(12, dtype=torch.long)}, "input 'input_ids' is int64[12]"),
        ({"output_attentions": True}, "'output_attentions' was not among the example inputs"),
        ({"no_such": 1}, "'no_such' was not among the example inputs"),
    ],
)
@pytest.mark.sampled(2)
def test_calls_that_do_not_fit(bert, change, said):
    call = fused(opened(bert, inputs("bert"))).callable()
    with pytest.raises(InputMismatch) as raised:
        call(**{**inputs("bert"), **change})
    assert raised.value.message.startswith(said)
    assert raised.value.next_move


def test_missing_tensor(bert):
    call = opened(bert, inputs("bert")).callable()
    with pytest.raises(InputMismatch, match="'attention_mask' is missing"):
        call(inputs("bert")["input_ids"])


def test_values_fixed_by_tracing():
    class Scaled(nn.Module):
        def forward(self, x, factor=2.0):
            return x * factor

    call = opened(Scaled(), (torch.randn(2, 3),)).callable()
    assert call(torch.ones(4, 5)).sum() == 40
    assert call(torch.ones(4, 5), factor=2.0).sum() == 40
    with pytest.raises(InputMismatch, match="'factor' was not among the example inputs"):
        call(torch.ones(4, 5), 3.0)


def test_mode_flags_and_gradients_are_restored():
    model = build("bert").train()
    model.pooler.eval()
    opened(model, inputs("bert"))
    assert model.training
    assert not model.pooler.training
    assert all(p.requires_grad for p in model.parameters())


def test_dummy_inputs_are_used(bert):
    assert [s.name for s in opened(bert).input_specs] == ["input_ids"]


def test_batch_of_one_stays_dynamic(bert):
    call = opened(bert, inputs("bert", batch=1)).callable()
    assert call(**inputs("bert", batch=3, length=7))[0].shape == (3, 7, 32)


def test_dynamic_shapes_as_asked(bert):
    named = inputs("bert")
    dims = {name: {0: torch.export.Dim("b")} for name in named}
    host = opened(bert, named, dynamic_shapes=dims)
    assert [s.shape for s in host.input_specs] == [(None, 12), (None, 12)]
    with pytest.raises(InputMismatch, match=r"input 'input_ids' is int64\[2, 9\]"):
        host.callable()(**inputs("bert", length=9))


def test_programs_and_graph_modules():
    model, named = build("bert"), inputs("bert")
    program = torch.export.export(model, (), named, strict=False)
    wanted = model(**named).last_hidden_state
    torch.testing.assert_close(fused(opened(program)).callable()(**named).last_hidden_state, wanted)
    module = program.module()
    torch.testing.assert_close(fused(opened(module, named)).callable()(**named).last_hidden_state, wanted)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_round_trip_through_pt2(family, tmp_path):
    model, named = build(family), inputs(family)
    fused(opened(model, named)).save_pt2(tmp_path / "m.pt2", {"attnopt.report": "{}"})
    host, metadata = load_pt2(tmp_path / "m.pt2")
    assert metadata == {"attnopt.report": "{}"}
    other = inputs(family, "left", batch=3, length=8)
    got, wanted = host.callable()(**other), model(**other)
    assert type(got) is type(wanted)
    torch.testing.assert_close(got[0], wanted[0], atol=1e-4, rtol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    found = recognise(host.graph)
    assert len(found.sites) == ATTENTIONS[family]


def test_unwritable_place(bert, tmp_path):
    with pytest.raises(OutputNotWritable, match="there is no folder"):
        opened(bert).save_pt2(tmp_path / "missing" / "m.pt2", {})


@pytest.mark.parametrize("content", [None, b"not a zip"])
def test_unreadable_files(tmp_path, content):
    path = tmp_path / "m.pt2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableModel):
        capture(path)


def test_truncated_file(bert, tmp_path):
    path = tmp_path / "m.pt2"
    opened(bert).save_pt2(path, {})
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UnreadableModel):
        capture(path)


def test_untraceable_model_says_where():
    class Branching(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(UntraceableModel) as raised:
        capture(Branching(), (torch.randn(2, 3),))
    assert "test_host.py" in raised.value.where
    assert raised.value.next_move


def test_inputs_that_the_model_refuses(bert):
    with pytest.raises(InputMismatch, match="does not run on the example inputs"):
        capture(bert, (torch.zeros(2, 3),))
    with pytest.raises(InputMismatch, match="do not fit the model's parameters"):
        capture(nn.Linear(3, 3), (torch.zeros(2, 3), torch.zeros(2, 3)))
    with pytest.raises(InputMismatch, match="does not say what its inputs look like"):
        capture(nn.Linear(3, 3))


def test_isolated_part_computes_what_the_model_holds(bert):
    host = opened(bert, inputs("bert"))
    named = host.example_inputs()
    site = recognise(host.graph).sites[1]
    read = boundary(site)
    call = host.isolate(read, [site.output.value])
    (wanted,) = host.tap([site.output.value], named)
    torch.testing.assert_close(call(host.tap(read, named))[0], wanted)


def test_int8_layers_are_near_and_saved(bert, tmp_path):
    host = opened(bert, inputs("bert"))
    named = host.example_inputs()
    wanted = host.runner()(named)[0]
    copy = host.copy()
    copy.quantize_linears([n for n in copy.graph.of("linear") if n.inputs[1].is_constant])
    copy.finish()
    got = copy.runner()(named)[0]
    assert 0 < (got - wanted).abs().max() < 0.02
    torch.testing.assert_close(host.runner()(named)[0], wanted, atol=0, rtol=0)
    copy.save_pt2(tmp_path / "m.pt2", {})
    torch.testing.assert_close(load_pt2(tmp_path / "m.pt2")[0].callable()(**inputs("bert"))[0], got, atol=0, rtol=0)


def test_new_tensors_are_made_where_the_model_is():
    """A GPU's place: of a model that has no data, everything that a kernel adds has none either."""
    inputs = {name: x.to("meta") for name, x in example().items()}
    host = opened(SelfAttention().eval().to("meta"), inputs)
    (site,) = recognise(host.graph).sites
    before = set(host.module.graph.nodes)
    emit(host, site.with_step("test", parse("softmax scale(0.25) add((k - q) * 0.5) causal & window(3)")), Sdpa())
    added = [n for n in host.module.graph.nodes if n not in before]
    assert {"arange", "where"} <= {str(n.target).split(".")[1] for n in added if n.op == "call_function"}
    assert {n.meta["val"].device.type for n in added if isinstance(n.meta["val"], torch.Tensor)} == {"meta"}
    assert {x.device.type for x in host.module.state_dict().values()} == {"meta"}


def test_an_input_that_the_model_does_not_have():
    """It would be answered with what was traced."""
    host = opened(SelfAttention(), example())
    named = host.example_inputs()
    given = {**named, "sean": named["seen"]}
    del given["seen"]
    for run in (host.runner(), host.tapper([host.graph.outputs[0]])):
        with pytest.raises(InputMismatch, match=r"the model has no input 'sean'. It has x, seen"):
            run(given)
    assert len(host.runner()({"x": named["x"]})) == len(host.runner()(named))  # what is not given is as it was traced
