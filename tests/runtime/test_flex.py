"""The operator that stands for FlexAttention: saved and loaded by torch.export, its shapes, its shared block masks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from attnopt.ir.expr import Term
from attnopt.ir.reference import reference
from attnopt.runtime.flex import block_mask, compiled, flex_operator

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
SPEC = "softmax scale(0.25) softcap(2.0) add(load(bias, 0, h, 0, k)) causal"


class Attends(nn.Module):
    def forward(self, q, k, v, bias):
        return flex_operator(q, k, v, [bias], SPEC)


def tensors(length: int):
    q, k, v = torch.randn(2, 4, length, 16), torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 32)
    return q, k, v, torch.randn(1, 4, 1, length)


LOADED = """
import sys, torch
import attnopt
program, given, wanted = torch.export.load(sys.argv[1]), *torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(*given), wanted, atol=1e-5, rtol=1e-5)
"""


@pytest.mark.exhaustive
def test_saved_and_loaded_where_attnopt_is_imported(tmp_path):
    """In another process, at another length."""
    length = torch.export.Dim("length")
    dims = {"q": {2: length}, "k": {2: length}, "v": {2: length}, "bias": {3: length}}
    program = torch.export.export(Attends(), tensors(12), dynamic_shapes=dims)
    torch.export.save(program, tmp_path / "m.pt2")
    q, k, v, bias = tensors(9)
    wanted = reference(SPEC, q, k, v, bias=bias)
    torch.save([(q, k, v, bias), wanted], tmp_path / "given.pt")
    ended = subprocess.run(
        [sys.executable, "-c", LOADED, tmp_path / "m.pt2", tmp_path / "given.pt"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_shapes_without_data():
    with torch._subclasses.FakeTensorMode():
        made = flex_operator(*(torch.empty_like(t) for t in tensors(12)[:3]), [torch.empty(1, 4, 1, 12)], SPEC)
    assert made.shape == (2, 4, 12, 32)


def test_block_masks_and_functions_are_shared():
    blocks = block_mask(Term("causal"), 256, 256, "cpu")
    assert block_mask(Term("causal"), 256, 256, "cpu") is blocks
    assert blocks.kv_num_blocks.flatten().tolist() == [1, 1]  # whole blocks below the diagonal are counted apart
    assert compiled(SPEC) is compiled(SPEC)
