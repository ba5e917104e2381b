"""Key heads that query heads share unevenly, in live models: kept once, read once for each query head."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from live_models import generated, host_of, tokens

import attnopt
from attnopt.errors import AttnoptError
from attnopt.hosts.module.changes import read
from attnopt.passes.edits.heads.groups import contiguous, shared
from attnopt.passes.edits.heads.writer import write
from attnopt.plan.live.converting import changed, read_back
from attnopt.plan.options.groups import Grouping

READS = ((0, 1, 1, 1), (0, 0, 0, 1))  # by layer, the key head of each query head


@lru_cache
def made():
    """(rewritten graph, changes, live model)."""
    host = host_of("llama")
    result = host.copy()
    for group, reads in zip(Grouping(result).of("block"), READS, strict=True):
        write(group, shared(group.blocks[0], contiguous(2, 2), reads=reads))
    result.finish()
    changes = read_back(host, result)
    assert isinstance(changes, list), str(changes)
    return result, changes, changed(host.model, changes)


def test_the_live_model_computes_what_the_graph_does():
    result, changes, fast = made()
    assert [c.options["reads"] for c in changes if c.kind == "widths"] == [list(reads) for reads in READS]
    with torch.no_grad():
        found, plain = (model(**tokens(), use_cache=False).logits for model in (fast, host_of("llama").model))
    assert torch.allclose(found, result.runner()(tokens())[0], atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generation_from_a_cache_of_two_heads_is_that_without_one(options):
    fast = made()[2]
    found = generated(fast, tokens(padded=3), return_dict_in_generate=True, **options)
    wanted = generated(fast, tokens(padded=3), use_cache=False, **{k: v for k, v in options.items() if k == "num_beams"})
    assert torch.equal(found.sequences, wanted)
    assert {x.keys.shape[1] for x in found.past_key_values.layers} == {2}


def test_what_a_folder_holds_makes_the_same_model():
    _, changes, fast = made()
    state = fast.state_dict()
    again = changed(host_of("llama").model, [read(c.to_json(), state) for c in changes])
    assert torch.equal(generated(again, tokens()), generated(fast, tokens()))


def test_a_cache_policy_around_it_is_an_error():
    with attnopt.cache("snapkv", keep=0.5), pytest.raises(AttnoptError, match="share key heads unevenly"):
        generated(made()[2], tokens())
