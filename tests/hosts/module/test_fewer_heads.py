"""Fewer heads in live layers of which one makes queries, keys and values."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import transformers
from live_models import COMMON, generated, host_of, tokens

from attnopt.hosts.module.changes import read
from attnopt.hosts.module.host import ModuleHost
from attnopt.hosts.module.reshaping import Side, places
from attnopt.ir.site import Refusal
from attnopt.passes.edits.heads.groups import contiguous, shared
from attnopt.passes.edits.heads.writer import write
from attnopt.passes.heads.prune_heads import pruned
from attnopt.plan.live.converting import calls_of, changed, live, read_back
from attnopt.plan.options.groups import Grouping

KEPT = ((0, 2, 3), (1, 2))  # by layer, of four heads


@lru_cache
def neox():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.GPTNeoXConfig(
        **sizes, max_position_embeddings=64, initializer_range=0.2, attn_implementation="sdpa", **COMMON
    )
    return ModuleHost.open(transformers.GPTNeoXForCausalLM(config).eval(), {**tokens(), "use_cache": False})


@lru_cache
def made(family: str):
    """(host, rewritten graph, changes)."""
    host = neox() if family == "gpt_neox" else host_of(family)
    result = host.copy()
    for group, kept in zip(Grouping(result).of("block"), KEPT, strict=False):
        write(group, pruned(group.blocks[0], list(kept)))
    result.finish()
    return host, result, read_back(host, result)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_the_live_model_computes_what_the_graph_does_and_generates_from_its_cache(family):
    host, result, changes = made(family)
    assert isinstance(changes, list), str(changes)
    fast = changed(host.model, changes)
    with torch.no_grad():
        given = fast(**tokens(), use_cache=False).logits
    assert torch.allclose(given, result.runner()(tokens())[0], atol=1e-5)
    found = generated(fast, tokens(padded=3), return_dict_in_generate=True)
    assert torch.equal(found.sequences, generated(fast, tokens(padded=3), use_cache=False))
    assert [x.keys.shape[1] for x in found.past_key_values.layers] == [3, 2][: host.model.config.num_hidden_layers]


def test_what_a_folder_holds_makes_the_same_model():
    host, _, changes = made("gpt2")
    held = {f"{c.path}.{name}" if name else c.path: x for c in changes for name, x in c.tensors.items()}
    again = changed(host.model, [read(c.to_json(), held) for c in changes])
    assert torch.equal(generated(again, tokens()), generated(changed(host.model, changes), tokens()))


def test_a_layer_that_does_not_run_so_is_a_refusal(monkeypatch):
    host, _, changes = made("gpt2")
    monkeypatch.setattr("attnopt.hosts.module.reshaping.SPLIT", "none")
    without = read_back(host, made("gpt2")[1])
    assert isinstance(without, Refusal) and "by the sizes of its class" in without.reason
    left = [c for c in changes if c.kind != "heads"]  # the size stays, and the layer is cut into heads that are not there
    wrong = [*left, *(type(c)("heads", c.path, {"split_size": 40}) for c in changes if c.kind == "heads")]
    found = live(host, wrong, tokens(), None, fuses=False)
    assert isinstance(found, Refusal) and "takes no heads of another" in found.reason and found.node == "transformer.h.0.attn"


def test_heads_have_places_where_the_attention_cuts_by_a_number_of_its_own_or_by_head():
    def sides(was, counts):
        return [
            Side("q", SimpleNamespace(channels=x), SimpleNamespace(channels=torch.zeros(n, 2)))
            for x, n in zip(was, counts, strict=True)
        ]

    behind, mixed = torch.arange(12).view(2, 3, 2), torch.arange(12).view(3, 2, 2).transpose(0, 1)  # two sides, three heads of 2
    assert [x.tolist() for x in places(sides(behind, [2, 2]), 6)] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert [x.tolist() for x in places(sides(mixed, [2, 2]), None)] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert [x.tolist() for x in places(sides(behind[:1], [1]), None)] == [[[0, 1]]]
    for was, counts, split in ((behind, [2, 2], None), (behind, [2, 2], 4), (behind, [2, 1], 6), (behind.flip(2), [2, 2], 6)):
        assert places(sides(was, counts), split) is None


@pytest.mark.parametrize("reads", [(), (0, 1, 1, 1)], ids=["evenly", "unevenly"])
def test_a_forward_that_cuts_keys_by_the_number_of_queries_is_a_refusal(reads):
    """OPT reads fewer key heads as a shorter text of more heads, which runs."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 64}
    config = transformers.OPTConfig(**sizes, max_position_embeddings=64, init_std=0.2, attn_implementation="sdpa", **COMMON)
    host = ModuleHost.open(transformers.OPTForCausalLM(config).eval(), {**tokens(), "use_cache": False})
    result = host.copy()
    for group in Grouping(result).of("block"):
        write(group, shared(group.blocks[0], contiguous(4, 2), reads=reads))
    result.finish()
    changes = read_back(host, result)
    assert isinstance(changes, list), str(changes)
    found = calls_of(changed(host.model, changes), changes, tokens())
    assert isinstance(found, Refusal) and "takes no heads of another width or number" in found.reason
