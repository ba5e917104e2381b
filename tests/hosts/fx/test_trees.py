"""Caches in trees: torch knows our forms only within a scope, others find theirs again, and calls need no scope at all."""

from __future__ import annotations

import threading

import pytest
import torch
from hf_models import build, inputs
from torch import nn
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.integrations.executorch import register_dynamic_cache_export_support

import attnopt
from attnopt.errors import UnreadableModel, UntraceableModel
from attnopt.hosts.fx.caches import our_forms
from attnopt.hosts.fx.trees import ABSENT, Form, flatten, tables, told, unflatten

KINDS = (DynamicCache, EncoderDecoderCache)
ABSENT_FORM = dict.fromkeys(KINDS, Form())


def everything():
    """All that torch knows of containers."""
    return [dict(t) for t in (*tables(), pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE)]


def transformers_forms():
    """What the exporter of transformers writes, taken down in a process that had told nothing."""
    from transformers.exporters.exporter_dynamo import register_pytree_node

    with told(ABSENT_FORM):
        for kind in KINDS:
            register_pytree_node(kind)
        return {kind: Form.known(kind) for kind in KINDS}


def executorch_forms():
    with told(ABSENT_FORM):
        register_dynamic_cache_export_support()
        return {DynamicCache: Form.known(DynamicCache)}


BEFORE = {"nothing": lambda: ABSENT_FORM, "transformers": transformers_forms, "executorch": executorch_forms}


@pytest.fixture(params=BEFORE)
def before(request):
    """A process in which this is what torch has been told of caches."""
    with told(ABSENT_FORM), told(BEFORE[request.param]()):
        yield request.param


def cache_of(model, length=12):
    with torch.no_grad():
        return model(**{n: x for n, x in inputs("llama", "none", length=length).items() if n != "use_cache"}).past_key_values


def test_a_scope_puts_back_what_it_found(before):
    found = everything()
    with told(our_forms()):
        assert DynamicCache in pytree.SUPPORTED_NODES
        assert DynamicCache not in fx_pytree.SUPPORTED_NODES
        inside = everything()
        with told(our_forms()):
            pass
        assert everything() != found
        assert [list(t) for t in everything()] == [list(t) for t in inside]
    assert everything() == found


def fail():
    assert DynamicCache not in pytree.SUPPORTED_NODES
    raise RuntimeError("inside")


def test_a_scope_ends_with_an_error(before):
    found = everything()
    with pytest.raises(RuntimeError, match="inside"), told(our_forms()), told(ABSENT_FORM):
        fail()
    assert everything() == found


def test_scopes_of_two_threads_do_not_mix():
    with told(ABSENT_FORM):
        found, entered, order = everything(), threading.Event(), []

        def other():
            entered.set()
            with told(our_forms()):
                order.append("other")

        thread = threading.Thread(target=other)
        with told(our_forms()):
            thread.start()
            assert entered.wait(10)
            order.append("first")
    thread.join(10)
    assert order == ["first", "other"]
    with told(ABSENT_FORM):
        assert everything() == found


@pytest.mark.sampled(1)
def test_the_product_leaves_the_process_as_it_was(before, tmp_path):
    """Optimised, called, saved, exported and read back, whatever others have told torch about the same classes."""
    model, found = build("llama", "sdpa"), everything()
    ids = torch.randint(0, 99, (2, 1))
    fast = attnopt.optimize(model, {"input_ids": ids, "past_key_values": cache_of(model)}, select="always")
    assert fast.report.fused == 2
    again = attnopt.load(fast.export(tmp_path / "fast.pt2"))
    fast.export(tmp_path / "fast.onnx")
    for call in (fast, again):
        with torch.no_grad():
            wanted = model(input_ids=ids, past_key_values=cache_of(model, 20))
            got = call(input_ids=ids, past_key_values=cache_of(model, 20))
        torch.testing.assert_close(got.logits, wanted.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.past_key_values.layers[1].keys, wanted.past_key_values.layers[1].keys)
    assert everything() == found


class Stubborn(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


def test_a_model_that_cannot_be_traced_leaves_the_process_as_it_was(before):
    found = everything()
    with pytest.raises(UntraceableModel):
        attnopt.optimize(Stubborn(), (torch.ones(2, 3),))
    assert everything() == found


@pytest.mark.sampled(1)
@pytest.mark.parametrize("length", [9, 20])
def test_a_program_in_the_form_of_transformers_keeps_it(length):
    """Its leaves come layer by layer, ours keys before values: read in our order they would be mixed up."""
    model, ids = build("llama", "eager"), torch.randint(0, 99, (2, 3))
    with told(transformers_forms()):
        given = {"input_ids": ids, "past_key_values": cache_of(model)}
        program = DynamoExporter().export(model, given, config=DynamoConfig(dynamic=True)).program
        fast = attnopt.optimize(program, select="always")
    assert fast.report.fused == 2
    with torch.no_grad():
        wanted = model(input_ids=ids, past_key_values=cache_of(model, length))
    got = fast(input_ids=ids, past_key_values=cache_of(model, length))
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-5, rtol=1e-5)
    for a, b in zip(wanted.past_key_values.layers, got.past_key_values.layers, strict=True):
        torch.testing.assert_close(b.keys, a.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(b.values, a.values, atol=1e-5, rtol=1e-5)
    with told(ABSENT_FORM), pytest.raises(UnreadableModel, match="holds a DynamicCache in a form that torch does not know"):
        attnopt.inspect(program)


def test_flattening_by_given_forms_is_that_of_torch():
    tree = {"a": [torch.ones(1), (2, None)], "cache": DynamicCache([(torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 4))])}
    with told(our_forms()):
        wanted, spec = pytree.tree_flatten(tree)
    leaves, own = flatten(tree, our_forms())
    assert own == spec
    assert all(a is b for a, b in zip(leaves, wanted, strict=True))
    again = unflatten(leaves, own, our_forms())
    assert type(again["cache"]) is DynamicCache
    assert again["cache"].layers[0].values is leaves[-1]
    assert flatten(tree, ABSENT_FORM)[0][-1] is tree["cache"]
    assert Form().node is ABSENT
