"""Memory: caches per token, and the most that a run holds."""

from __future__ import annotations

import pytest
import torch
import transformers
from hosts.onnx import small_models

from attnopt.cost.memory import cache_bytes, cache_bytes_per_token, peak_memory, scratch
from attnopt.cost.problem import Problem
from attnopt.cost.workload import parse_workload
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.spec import parse
from attnopt.patterns import recognise
from attnopt.patterns.block import find_blocks

SIZES = {"batch": 2, "length": 16}


@pytest.fixture(scope="module")
def decoding():
    """A step of a decoder of two layers with two key heads of 16, on a cache that is given."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        past = model(torch.zeros(2, 8, dtype=torch.int64), use_cache=True).past_key_values
    host = FxHost.from_captured(capture(model, {"input_ids": torch.zeros(2, 1, dtype=torch.int64), "past_key_values": past}))
    sites = recognise(host.graph).sites
    return host, sites, find_blocks(host.graph, sites)


def test_what_a_token_takes(decoding):
    _, sites, blocks = decoding
    pairs = list(zip(sites, blocks, strict=True))
    assert cache_bytes_per_token(pairs) == 2 * 2 * (2 * 16) * 4  # layers, keys and values, heads x width, float32
    narrow = {site.name: "cache(k=int8, v=int4)" for site in sites}
    scales = 2 * 2 * 2 * 8  # layers, keys and values, heads: a scale and a zero of 4 bytes each
    assert cache_bytes_per_token(pairs, narrow) == 2 * (32 * 1 + 32 / 2) + scales
    assert cache_bytes_per_token(pairs, {sites[0].name: ""}) == cache_bytes_per_token(pairs) / 2
    assert cache_bytes_per_token([]) == 0


def test_what_all_tokens_take(decoding):
    _, sites, blocks = decoding
    pairs, sizes = list(zip(sites, blocks, strict=True)), {"batch": 3, "past": 1000}
    assert cache_bytes(pairs, sizes) == 3 * 1001 * cache_bytes_per_token(pairs)
    half = {sites[0].name: "", sites[1].name: "cache(k=fp16, v=fp16)"}
    assert cache_bytes(pairs, sizes, half) == cache_bytes(pairs, sizes) / 4


def test_a_workload_binds_to_a_real_decoder(decoding):
    _, sites, _ = decoding
    (bound,) = parse_workload("decode:1000x3").bind(sites)
    assert bound.sizes == {"batch": 3, "past": 1000}
    assert bound.shape(sites[0]) == {"b": 3, "h": 4, "g": 2, "q": 1, "k": 1001, "d": 16, "e": 16}


def test_the_peak_holds_the_cache_and_the_weights(decoding):
    host, sites, _ = decoding
    short, long = (peak_memory(host.graph, {"batch": 1, "past": past}) for past in (100, 1100))
    assert long - short >= 1000 * 2 * 2 * 32 * 4
    assert peak_memory(host.graph, {"batch": 1, "past": 100}, weights=0.0) < short
    fused = peak_memory(host.graph, {"batch": 1, "past": 1100}, sites, ["sdpa"] * 2)
    assert fused <= long


def test_the_score_matrix_is_scratch_of_kernels_that_write_it():
    graph = OnnxHost.from_model(small_models.spelled_out()).graph
    sites = recognise(graph).sites
    sizes = {"batch": 2, "length": 256}
    problem = Problem(parse("softmax"), {"b": 2, "h": 4, "g": 4, "q": 256, "k": 256, "d": 8, "e": 8})
    matrix = 2 * 4 * 256 * 256 * 4
    assert (scratch("ort-gqa", problem), scratch("sdpa", problem)) == (matrix, 0)
    operands = 4 * 2 * 4 * 256 * 8 * 4  # q, k, v and the output
    assert peak_memory(graph, sizes, sites, ["sdpa"]) == operands
    assert peak_memory(graph, sizes, sites, ["ort-gqa"]) == operands + matrix
    assert peak_memory(graph, sizes, sites, [""]) == peak_memory(graph, sizes) > 2 * matrix
