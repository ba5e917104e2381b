"""Rounded products in Triton's interpreter: the kernels against the reference, codes and scales against the eager twin."""

from __future__ import annotations

import pytest
import torch
from precision_cases import FP8, GROUPS, INT8, SAGE, TABLE, Rounded

from attnopt.codegen.emitted import load
from attnopt.codegen.triton.kernels.prefill_codes_eager import coded_rows, coded_values
from attnopt.codegen.triton.low_precision import INTERPRETER
from attnopt.codegen.triton.prefill import emit, supports
from attnopt.codegen.triton.tiles import Tile
from attnopt.codegen.triton.triton_attention import form_of
from attnopt.ir.reference import attend
from attnopt.ir.spec import parse

ALLOWED = {"fp8": 5e-6, "fp16": 2e-4}


def module(line, q, v, lse=False, tile=Tile(64, 64, 1, 1)):
    spec, form = parse(line), form_of(q, v.shape[3], {}, lse)
    assert supports(spec, form) is None
    return load(emit(spec, form, tile, INTERPRETER))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", TABLE)
def test_computes_what_the_reference_does(name):
    """Rounding itself changes results by a hundredth or more: within 5e-6 every code, weight and scale is the same."""
    case = TABLE[name]
    q, k, v = case.tensors()
    poisoned = torch.full((*q.shape[:3], v.shape[3]), torch.nan)
    found = module(case.spec, q, v).attention(q, k, v, o=poisoned)
    right = attend(case.spec, q.double(), k.double(), v.double()).output
    allowed = ALLOWED["fp16" if "fp16" in case.spec else "fp8"]
    near = (found.double() - right).abs() <= allowed * right.abs().clamp(min=1)
    assert near.float().mean() > 0.97  # a number that lies between two codes may become either
    assert (found.double() - right).abs().max() < 0.1
    exact = attend(parse(case.spec).with_(precision=None), q.double(), k.double(), v.double()).output
    assert (exact - right).abs().max() > 10 * allowed


@pytest.mark.parametrize("tile", [Tile(128, 64, 1, 1, persistent=True), Tile(32, 64, 1, 1, descriptors=True)])
def test_tiles(tile):
    case = TABLE["all_smooth"]
    q, k, v = case.tensors()
    found, plain = (module(case.spec, q, v, tile=t).attention(q, k, v) for t in (tile, Tile(64, 64, 1, 1)))
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("line", [f"softmax scale(0.125) causal {SAGE}", f"softmax scale(0.125) softcap(2.0) sink(0.5) {SAGE}"])
def test_log_sum_exp(line):
    """Smoothing of keys moves all scores of a row, and the sum of their exponentials with them: that returns."""
    q, k, v = Rounded(line, lengths=(70, 70)).tensors()
    _, lse = module(line, q, v, lse=True).attention(q, k, v)
    torch.testing.assert_close(lse.double(), attend(line, q.double(), k.double(), v.double()).lse, atol=2e-5, rtol=2e-5)


def test_codes_and_scales():
    q, k, v = Rounded("", width=(40, 24), lengths=(150, 140)).tensors()
    line = f"softmax scale(0.125) precision({INT8}, {FP8})"
    made = module(line, q, v)
    codes, scales = made.coded_keys(k, made.smooth(k))
    row = torch.arange(k.shape[2])
    wanted, steps = coded_rows(k - k.mean(2, keepdim=True), row // 64 * 4 + row % 8 // 2)
    assert codes.shape == (1, 1, 256, 64) and codes.dtype == torch.int8
    torch.testing.assert_close(scales[..., :140], steps)
    assert (codes[:, :, :140, :40] == wanted).float().mean() > 0.999
    assert codes[:, :, 140:].abs().sum() == codes[..., 40:].abs().sum() == 0
    values, channels, _ = made.coded_values(v)
    wanted, steps = coded_values(v)
    assert values.shape == (1, 1, 32, 256)  # channels first
    torch.testing.assert_close(channels[..., :24], steps)
    assert (values[:, :, :24, :140] == wanted.mT).float().mean() > 0.999
    assert values[..., 140:].abs().sum() == 0


def test_every_number_of_e4m3():
    """Between two neighbours lies a half that goes to the even one; the interpreter's own conversion gets that wrong."""
    numbers = torch.arange(-128, 128).to(torch.int8).view(torch.float8_e4m3fn).float()
    grid = numbers[numbers.isfinite()].unique()
    tried = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, grid[:-1] + 0.3 * (grid[1:] - grid[:-1])])
    v = torch.zeros(1, 1, len(tried) + 1, 16)
    v[0, 0, :-1, 0], v[0, 0, -1, 0] = tried, 448.0
    codes, _, _ = module(f"softmax precision({FP8})", v, v).coded_values(v)
    assert torch.equal(codes[0, 0, 0, : len(tried)], tried.to(torch.float8_e4m3fn).float())


def test_narrow_sums_are_within_their_rounding():
    """The interpreter adds in float32 what tensor cores add in FP22."""
    line = f"softmax scale(0.125) precision({INT8}, {FP8}, sum=fp22)"
    q, k, v = Rounded(line).tensors()
    right = attend(line, q.double(), k.double(), v.double()).output
    assert (module(line, q, v).attention(q, k, v).double() - right).abs().max() < 1e-3 * right.abs().max()


def test_through_the_operator():
    q, k, v = (x.bfloat16() for x in Rounded("", lengths=(40, 70)).tensors())
    line = f"softmax scale(0.125) precision(q=int8, k=int8, {GROUPS}, k_smooth=0, {FP8})"
    found = torch.ops.attnopt.triton_attention(q, k, v, [], line)
    right = attend(line, q.double(), k.double(), v.double()).output
    assert found.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found.double().flatten(), right.flatten(), dim=0) > 0.99999
