"""The benchmark of caches computes all positions of a text at once; a step graph followed token by token computes the same."""

from __future__ import annotations

import functools

import pytest
import torch
from quantize.cache import TURNED, clause
from quantize.decoding import step, with_cache
from quantize.streaming import Blocks, ByToken, streaming
from recall_task import recall_batch
from trained_models import recall_model

from attnopt.passes import AkvqVl, Int2Cache, Int8Cache, ZipCache

CASES = {
    "int8": (Int8Cache(), "int8", ByToken((clause("k=int8, v=int8"),))),
    "2-bit": (Int2Cache(), "2-bit", ByToken((clause("k=int2, v=int2, group=32, scales=fp16"),))),
    "AKVQ-VL": (
        AkvqVl(recent=6, pivots=2),
        "2-bit pivots",
        ByToken((clause(TURNED.format(2, ", clip=0.8")),), first=2, recent=6),
    ),
    "ZipCache": (ZipCache(block=8), "50% salient", Blocks(block=8)),
}


@functools.cache
def traced():
    model, tokens = recall_model(), recall_batch(1, 8, 24, 0).tokens
    return model, tokens, step(model, tokens[:, :20])[0]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", CASES)
def test_steps_of_a_trained_model(name):
    """From one token on, so that all the cache but one row was made by the steps themselves."""
    rewrite, kind, method = CASES[name]
    model, tokens, host = traced()
    made = with_cache(host, rewrite, kind)
    with torch.no_grad(), streaming(model, method):  # the first token reads itself as the cache holds it
        past = model(tokens[:, :1], use_cache=True).past_key_values.layers
    flat = [tokens[:, 1:2], *(x for layer in past for x in (layer.keys, layer.values))]
    state = made.adapt(dict(zip([s.name for s in host.input_specs], flat, strict=True)))
    names, run, found = list(state), made.runner(), []
    for at in range(1, tokens.shape[1]):
        logits, *kept = run(state)
        found.append(logits[0])
        state = dict(zip(names, (tokens[:, at + 1 : at + 2], *kept), strict=True))
    with torch.no_grad(), streaming(model, method):
        wanted = model(tokens, use_cache=False).logits[0, 1:]
    got = torch.cat(found)
    near = (got - wanted).abs().amax(-1) < 0.02 * wanted.std()
    assert near.float().mean() > 0.9  # the others: a code at an edge, or a tie of saliency
    assert (got.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9
