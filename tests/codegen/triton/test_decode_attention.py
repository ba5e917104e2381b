"""The decode operator without a GPU: it traces, and says what it cannot do. Its numbers stand in `interpreted`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnopt.codegen.triton.decode_attention import decode_attention
from attnopt.errors import InputMismatch
from attnopt.ir.kv_cache import Cache, pack_cache

LINE = "softmax scale(0.1) cache(k=int8, v=int4)"


class Model(nn.Module):
    def forward(self, q, k, v, k_scales, k_zeros, v_scales, v_zeros):
        o, lse = decode_attention(q, Cache(k, v, k_scales, k_zeros, v_scales, v_zeros), LINE, lse=True)
        return decode_attention(o, Cache(k, v, k_scales, k_zeros, v_scales, v_zeros), LINE), lse


def test_survives_export():
    cache = pack_cache(LINE, torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16))
    given = (torch.randn(2, 4, 1, 16), cache.k, cache.v, cache.k_scales, cache.k_zeros, cache.v_scales, cache.v_zeros)
    length = torch.export.Dim("length")
    with torch.no_grad():
        program = torch.export.export(Model(), given, dynamic_shapes=(None, *({2: length} for _ in range(6))))
    called = [str(node.target) for node in program.graph.nodes if "triton" in str(node.target)]
    assert called == ["attnopt.triton_decode_lse.default", "attnopt.triton_decode.default"]
    shapes = [tuple(node.meta["val"].shape) for node in program.graph.nodes if node.op == "output" for node in node.args[0]]
    assert shapes == [(2, 4, 1, 16), (2, 4, 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sigmoid", "the normaliser is sigmoid, not softmax"),
        ("softmax padding", "the spec loads 'padding', which was not given"),
    ],
)
def test_refusals(line, message):
    x = torch.randn(1, 2, 4, 16)
    with pytest.raises(InputMismatch, match=message):
        decode_attention(x[:, :, :1], Cache(x, x), line)
