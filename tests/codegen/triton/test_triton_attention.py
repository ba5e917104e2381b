"""The operator without a GPU: it traces, computes the reference, and says what it cannot do. Its kernels stand in `interpreted`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from attnopt.codegen.triton.triton_attention import architecture
from attnopt.errors import InputMismatch
from attnopt.ir.reference import attend

WITHOUT = """
import os, sys
sys.modules["triton"] = None
import torch, attnopt
from attnopt.codegen.triton.prefill import Form, emit, supports
from attnopt.codegen.triton.tiles import Tile
assert "import triton" in emit(attnopt.parse("softmax causal"), Form(64, 64), Tile(64, 64, 4, 2))
x = torch.randn(1, 1, 4, 16)
print(attnopt.attention(x, x, x, "softmax causal").shape)
print(torch.ops.attnopt.triton_attention(x, x, x, [], "softmax").shape)
os.environ["TRITON_INTERPRET"] = "1"
try:
    torch.ops.attnopt.triton_attention(x, x, x, [], "softmax")
except attnopt.errors.InputMismatch as error:
    print(error)
"""


class Model(nn.Module):
    def forward(self, q, k, v):
        o, lse = torch.ops.attnopt.triton_attention_lse(q, k, v, [], "softmax causal")
        return torch.ops.attnopt.triton_attention(o, k, v, [], "softmax"), lse


def test_survives_export():
    q, k = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16)
    length = torch.export.Dim("length")
    with torch.no_grad():
        program = torch.export.export(Model(), (q, k, k), dynamic_shapes=({2: length}, {2: length}, {2: length}))
    called = [str(node.target) for node in program.graph.nodes if "triton" in str(node.target)]
    assert called == ["attnopt.triton_attention_lse.default", "attnopt.triton_attention.default"]
    shapes = [
        tuple(map(str, node.meta["val"].shape)) for node in program.graph.nodes if node.op == "output" for node in node.args[0]
    ]
    assert [len(shape) for shape in shapes] == [4, 3]
    assert shapes[0][:2] == ("2", "4")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sigmoid", "the normaliser is sigmoid, not softmax"),
        ("softmax heads(3)", "the spec says heads"),
    ],
)
def test_refusals(line, message):
    x = torch.randn(1, 2, 4, 16)
    with pytest.raises(InputMismatch, match=message):
        torch.ops.attnopt.triton_attention(x, x, x, [], line)


def test_devices_without_kernels():
    with pytest.raises(InputMismatch, match="Triton kernels run on a GPU, not on 'xpu'"):
        architecture(torch.device("xpu"))


def test_halves_are_added_as_floats_on_a_cpu():
    q, k, v = (torch.randn(2, 2, length, 16, dtype=torch.bfloat16) for length in (8, 9, 9))
    right = attend("softmax scale(0.25) softcap(2.0) causal", q.float(), k.float(), v.float()).output
    found = torch.ops.attnopt.triton_attention(q, k, v, [], "softmax scale(0.25) softcap(2.0) causal")
    assert torch.equal(found, right.to(torch.bfloat16))


def test_everything_else_works_without_triton():
    told = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    *shapes, refusal = told.stdout.splitlines()
    assert shapes == ["torch.Size([1, 1, 4, 16])"] * 2
    assert refusal.startswith("Triton is not installed, so its kernels are left out (softmax).")
