"""Caches: concatenated by transformers, or written in place; the past is an operand and the result is found where it leaves."""

from __future__ import annotations

import block_models
import pytest
import static_caches
import torch
from spelling import B, L, Recorder
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.block import CacheUpdate
from attnopt.ir.block_reference import as_rows, rows
from attnopt.ir.dims import symbol
from attnopt.patterns import recognise
from attnopt.patterns.block import find_block


def host_of(model, example):
    return FxHost.from_captured(capture(model, example))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_past_is_found_and_keys_are_computed_again(family):
    model = block_models.build(family, "sdpa")
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        past = model(input_ids=ids, use_cache=True).past_key_values
    host = host_of(model, {"input_ids": ids[:, :3], "past_key_values": past})
    (site,) = recognise(host.graph).sites
    block = find_block(host.graph, site)
    assert not block.missing
    assert "cache concat" in str(block)
    for name in "kv":
        update = block.part(name, CacheUpdate)
        assert update.present in host.graph.outputs
        assert update.past.value in host.graph.inputs
        turn = block.rotary if name == "k" else None
        asked = [getattr(block, name).input, getattr(site, name).value, update.past.value]
        asked += [turn.positions.value] if turn is not None else []
        x, wanted, held, *positions = host.tap(asked, host.example_inputs())
        wanted = as_rows(getattr(site, name), wanted, site.axes)
        given = {"positions": as_rows(turn.positions, positions[0], site.axes)[..., 0, 0]} if turn is not None else {}
        again = rows(block, name, x.reshape(2, 3, -1), past=as_rows(update.past, held, site.axes), **given)
        torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-5)


class FixedCache(nn.Module):
    """One layer with a cache of 16 places, as servers keep it: new rows are copied to their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, n, bias=False) for n in (32, 16, 16, 32))

    def forward(self, x, positions, keys, values):
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        keys, values = keys.index_copy(2, positions, k), values.index_copy(2, positions, v)
        visible = torch.arange(16)[None, :] <= positions[:, None]
        out = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=visible, enable_gqa=True)
        return x + self.o(out.transpose(1, 2).reshape(batch, length, 32)), keys, values


def fixed_cache_example():
    return (torch.randn(2, 3, 32), torch.arange(4, 7), torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8))


@pytest.mark.parametrize("through", ["fx", "onnx"])
def test_rows_written_into_a_fixed_cache(through):
    model = FixedCache().eval()
    example = fixed_cache_example()
    if through == "fx":
        host = FxHost.from_captured(capture(torch.export.export(model, example)))
        inputs = host.example_inputs()
    else:
        host = OnnxHost.from_model(torch.onnx.export(model, example, dynamo=True, verbose=False).model_proto)
        inputs = dict(zip([s.name for s in host.input_specs], example, strict=True))
    (site,) = recognise(host.graph).sites
    block = find_block(host.graph, site)
    assert str(block) == "q 32x32, k 32x16, v 32x16; cache scatter; o 32x32; residual"
    update = block.cache_k
    x, wanted, held, indices = host.tap([block.k.input, site.k.value, update.past.value, update.indices], inputs)
    again = rows(block, "k", x, past=as_rows(update.past, held, site.axes), indices=indices)
    torch.testing.assert_close(again, as_rows(site.k, wanted, site.axes), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_static_caches_of_transformers(family):
    """Their buffers are the past, `cache_position` says where new rows go, and the new state is what leaves."""
    host = host_of(static_caches.with_cache(family), static_caches.step(3))
    for site in recognise(host.graph).sites:
        block = find_block(host.graph, site)
        assert not block.missing
        assert "cache scatter" in str(block)
        for name in "kv":
            update = block.part(name, CacheUpdate)
            assert update.past.value in host.graph.inputs
            assert update.past.value.name.startswith("key_cache" if name == "k" else "value_cache")
            assert update.present in host.graph.outputs
            turn = block.rotary if name == "k" else None
            asked = [getattr(block, name).input, getattr(site, name).value, update.past.value, update.indices]
            asked += [turn.positions.value] if turn is not None else []
            x, wanted, held, indices, *positions = host.tap(asked, host.example_inputs())
            assert indices.tolist() == [3]
            given = {"positions": as_rows(turn.positions, positions[0], site.axes)[..., 0, 0]} if turn is not None else {}
            past = as_rows(update.past, held, site.axes)
            again = rows(block, name, x.reshape(1, 1, -1), past=past, indices=indices, **given)
            torch.testing.assert_close(again, as_rows(getattr(site, name), wanted, site.axes), atol=1e-5, rtol=1e-5)


def test_keys_of_two_sequences_are_no_cache():
    r = Recorder()
    x, other = r.input("x", B, L, 32), r.input("other", B, L, 32)

    def heads(v):
        return r.permute(r.reshape(v, B, L, 4, 8), 0, 2, 1, 3)

    both = symbol("both")
    joined = [
        r.node("concat", heads(r.linear(other, 32)), heads(r.linear(x, 32)), shape=(B, 4, both, 8), axis=2) for _ in range(2)
    ]
    scores = r.matmul(heads(r.linear(x, 32)), r.permute(joined[0], 0, 1, 3, 2))
    out = r.matmul(r.softmax(scores), joined[1])
    r.output(r.linear(r.reshape(r.permute(out, 0, 2, 1, 3), B, L, 32), 32))
    (site,) = recognise(r.graph).sites
    block = find_block(r.graph, site)
    assert block.q is not None and block.k is None
    assert [m.reason.partition(": ")[2] for m in block.missing[:1]] == [
        "rows of 2 values are joined here, the first no input of the model"
    ]
