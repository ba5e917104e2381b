"""A live model whose layers read codes by a kernel generates what it generates where they are read back, however it is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from live_models import generated, host_of, tokens

from attnopt.codegen.tvm.availability import missing
from attnopt.cost.target import read
from attnopt.hosts.eviction.chosen import ChosenPolicy
from attnopt.hosts.eviction.coded import CodedLayer
from attnopt.hosts.eviction.preparing import compiled
from attnopt.hosts.eviction.stored import storage
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.interface import HELD, attnopt_attention
from attnopt.hosts.module.model import as_live, on_codes
from attnopt.ir.reference import reference
from attnopt.passes.kvcache.eviction import Snapkv
from attnopt.plan.live.codes import CodesChooser
from attnopt.plan.live.converting import live
from attnopt.plan.live.layers import Chooser

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
WAYS = {"plain": {}, "beams": {"num_beams": 3}, "rolling back": {"prompt_lookup_num_tokens": 2}}
INT8, INT4 = "cache(k=int8, v=int8)", "cache(k=int4, v=int4, group=8, scales=fp16)"


@pytest.fixture(scope="module")
def made():
    return live(host_of("llama"), [], tokens(), Chooser("always", read("cpu"), length=16)).model


def in_form(model, words, kernels=True):
    fast = as_live(shared_copy(model), None, None, {}, choose_codes=CodesChooser("always") if kernels else None)
    fast.cache_codes = words
    return fast


def listening(model):
    """What ran: each call of a kernel on codes notes how many tokens it read."""
    ran = []
    for module in model.modules():
        held = getattr(module, HELD, None)
        if held is not None and held.on_codes is not None:
            setattr(module, HELD, replace(held, on_codes=replace(held.on_codes, run=noting(ran, held.on_codes.run))))
    return ran


def noting(ran, run):
    def call(q, k, v):
        ran.append(k.codes.shape[2])
        return run(q, k, v)

    return call


@pytest.mark.parametrize("words", [INT8, INT4])
def test_one_query_reads_what_the_spec_says(made, words):
    fast = in_form(made, words)
    module = fast.model.layers[1].self_attn
    layer, random = CodedLayer(storage(words)), torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 24, 16, generator=random) for _ in range(2))
    q = torch.randn(2, 4, 1, 16, generator=random)
    layer.hands_codes = True
    layer.update(k[:, :, :23], v[:, :, :23])
    held = layer.update(k[:, :, 23:], v[:, :, 23:])
    found, _ = attnopt_attention(module, q, *held, None, scaling=0.25)
    assert held[0].found is None and held[1].found is None  # nothing was read back
    right = reference(f"softmax scale(0.25) {words}", q.double(), k.double(), v.double())
    torch.testing.assert_close(found.transpose(1, 2).double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_are_those_of_codes_that_are_read_back(made, way):
    fast, plain = in_form(made, "int8"), in_form(made, "int8", kernels=False)
    ran, given = listening(fast), tokens(rows=1)
    assert torch.equal(generated(fast, given, **WAYS[way]), generated(plain, given, **WAYS[way]))
    assert ran if way == "rolling back" else ran == [n for n in range(13, 20) for _ in range(2)]


def test_padding_and_several_queries_are_masked_and_read_back(made):
    fast, plain = in_form(made, "int8"), in_form(made, "int8", kernels=False)
    ran, given = listening(fast), tokens(padded=3)
    assert torch.equal(generated(fast, given), generated(plain, given)) and not ran
    ids = tokens()["input_ids"]
    with torch.no_grad():
        found = [m(ids[:, 8:], past_key_values=m(ids[:, :8]).past_key_values).logits for m in (fast, plain)]
    assert torch.equal(*found) and not ran


def test_a_mask_that_is_given_hides_what_it_hides(made):
    """One query with a mask of its own: the numbers are those of the model's own attention, to the last bit."""
    fast, plain = in_form(made, "int8"), in_form(made, "int8", kernels=False)
    ran, ids = listening(fast), tokens(rows=1)["input_ids"]
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 4:7] = 0
    with torch.no_grad():
        found = [
            m(ids[:, 11:], past_key_values=m(ids[:, :11]).past_key_values, attention_mask=mask).logits for m in (fast, plain)
        ]
        seen = fast(ids[:, 11:], past_key_values=fast(ids[:, :11]).past_key_values).logits
    assert torch.equal(*found) and len(ran) == 2 and not torch.allclose(seen, found[0], atol=1e-3)


def test_cut_and_cleared_caches_go_on(made):
    fast, plain = in_form(made, "int8"), in_form(made, "int8", kernels=False)
    ids, found = tokens(rows=2)["input_ids"], []
    for model in (fast, plain):
        with torch.no_grad():
            past = model(ids[:, :10]).past_key_values
            model(ids[:, 10:11], past_key_values=past)
            past.crop(-4)
            model(ids[:, 7:8], past_key_values=past)
            again = model(ids[:, 8:9], past_key_values=past).logits
            past.reset()
            model(ids[:, :3], past_key_values=past)
            found.append((again, model(ids[:, 3:4], past_key_values=past).logits, past.get_seq_length()))
    assert found[0][2] == found[1][2] == 4
    for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_another_clause_than_the_kernels_is_read_back(made):
    """A cache that was made before the model's codes were changed."""
    fast = in_form(made, "int8")
    with torch.no_grad():
        past = fast(tokens()["input_ids"]).past_key_values
        fast.cache_codes = INT4
        ran = listening(fast)
        fast(tokens()["input_ids"][:, :1], past_key_values=past)
    assert not ran and past.layers[0].clause == storage("int8")


def test_a_compiled_model_is_known():
    model = as_live(shared_copy(host_of("llama").model), None, None, {})
    assert not compiled(model)
    model.forward = torch.compile(model.forward, backend="eager")  # which compiles nothing before it is called
    assert compiled(model)


@pytest.mark.exhaustive  # dynamo traces each length again
def test_a_compiled_model_reads_numbers(made):
    fast = in_form(made, "int8")
    ran, plain = listening(fast), in_form(made, "int8", kernels=False)
    fast.forward = torch.compile(fast.forward, backend="eager")
    assert torch.equal(generated(fast, tokens(), 5), generated(plain, tokens(), 5)) and not ran


def test_what_a_policy_leaves_in_codes_is_read_by_the_kernel(made):
    policy = ChosenPolicy(Snapkv(window=3), 0.5, "int8")
    fast, plain = (as_live(shared_copy(made), None, None, {}, policy) for _ in range(2))
    CodesChooser("always")(fast, policy.clause)
    assert {name for name, _ in on_codes(fast).values()} == {"tvm-decode"}
    ran = listening(fast)
    found, wanted = (generated(model, tokens(1)) for model in (fast, plain))
    assert torch.equal(found, wanted)
    assert ran == sorted(ran) and ran[0] == 6 + 1 and len(ran) == 7 * 2  # half of the prompt, and the token itself
