"""Every rewrite that a module can hold is read back from the graph, and the live model computes what the graph does."""

from __future__ import annotations

import pytest
import torch
from live_models import generated, host_of, tokens

from attnopt.hosts.module.changes import Change
from attnopt.hosts.module.host import ModuleHost
from attnopt.ir.site import Refusal
from attnopt.passes import ALL
from attnopt.passes.edits.layers.ends import ends_of
from attnopt.passes.edits.layers.linear_layers import matrix
from attnopt.passes.factorize.low_rank import factored, write
from attnopt.plan.live.converting import changed, read_back
from attnopt.plan.options.groups import Grouping

PASSES = {p.name: p for p in ALL}


def rewritten(host, name: str, first: bool = False, kind: str | None = None):
    """A copy of the host after one pass, everywhere that it proposes something or in its first group."""
    rewrite, made = PASSES[name], host.copy()
    count = 0
    for group, twin in zip(Grouping(host).of(rewrite.per), Grouping(made).of(rewrite.per), strict=True):
        proposed = rewrite.propose(group, None)
        if not isinstance(proposed, Refusal) and not (first and count):
            rewrite.apply(next(c for c in proposed if kind in (None, c.kind)), twin)
            count += 1
    made.finish()
    assert count
    return made


def changes_of(host, made) -> list[Change]:
    found = read_back(host, made)
    assert isinstance(found, list), str(found)
    return found


@pytest.mark.parametrize(
    ("family", "name", "kinds"),
    [
        ("llama", "dynamic-int8", {"int8"}),
        ("llama", "round-weights", {"rounded"}),
        ("llama", "round-tables", {"rows"}),
        ("llama", "quest-rounding", {"rounded"}),
        ("gpt2", "dynamic-int8", {"int8", "int8-rows"}),
        pytest.param("gemma2", "drop-attention", {"no-attention", "no-norm"}, marks=pytest.mark.exhaustive),
        ("gpt2", "drop-attention", {"no-attention", "no-norm"}),
    ],
)
def test_the_live_model_computes_what_the_graph_does(family, name, kinds):
    host = host_of(family)
    made = rewritten(host, name, first=name == "drop-attention")
    changes = changes_of(host, made)
    assert {c.kind for c in changes} == kinds
    fast = changed(host.model, changes)
    with torch.no_grad():
        got = fast(**tokens(), use_cache=False).logits
        plain = host.model(**tokens(), use_cache=False).logits
    assert torch.allclose(got, made.runner()(tokens())[0], atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-5)


def test_what_mixes_an_input_is_no_layer_to_a_plan_behind_it():
    host = host_of("llama")
    mixed = rewritten(host, "quest-rounding")
    twice = ModuleHost.open(changed(host.model, changes_of(host, mixed)), {**tokens(), "use_cache": False})
    products = [n for n in twice.graph.of("matmul") if n.inputs[1].is_constant]
    assert len(products) > 2
    assert not {n for group in Grouping(twice).of("linear") for n in group.linears} & set(products)


def test_generation_with_a_cache_is_generation_without_where_the_first_attention_is_gone():
    """transformers reads the length of the cache from the first layer, which has no attention any more."""
    host = host_of("llama")
    fast = changed(host.model, changes_of(host, rewritten(host, "drop-attention", first=True)))
    assert torch.equal(generated(fast, tokens(padded=3)), generated(fast, tokens(padded=3), use_cache=False))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_layers_of_lower_rank_in_place_of_one_are_read_back(family):
    host = host_of(family)
    made = host.copy()
    for group in Grouping(made).of("linear"):
        for node in group.linears:
            down, up = factored(matrix(node), torch.eye(matrix(node).shape[1]), 16)
            write(group, ends_of(node), {"down": down.float(), "up": up.float()}, {})
    made.finish()
    changes = changes_of(host, made)
    assert {c.kind for c in changes} == {"low-rank"}
    fast = changed(host.model, changes)
    with torch.no_grad():
        got, plain = (model(**tokens(), use_cache=False).logits for model in (fast, host.model))
    assert torch.allclose(got, made.runner()(tokens())[0], atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-2)


def test_the_same_graph_changes_nothing():
    assert changes_of(host_of("llama"), host_of("llama").copy()) == []


def test_a_constant_that_two_nodes_read_in_two_forms_is_a_refusal():
    host = host_of("gpt2")  # its table of tokens is the weight of its head as well
    made = host.copy()
    head = next(n for n in made.graph.of("linear"))
    made.set_input(head, head.inputs[1], head.inputs[1].load() * 2)
    made.finish()
    found = read_back(host, made)
    assert isinstance(found, Refusal) and "holds one form" in found.reason and found.node == "lm_head.weight"
