"""TVM's kernel in the graph of a model: which attentions it takes, and that the model survives all that torch does with it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from lowering_cases import CASES, check, opened
from softcapped_window import Window

import attnopt
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.lowerings.tvm_prefill import TvmPrefill
from attnopt.errors import InputMismatch
from attnopt.ir.spec import parse

pytestmark = pytest.mark.skipif(missing() is not None, reason="TVM is not installed")
TRIED = ("other_widths", "grouped", "padding_mean", "bias_and_mask", "tensor_scale", "sigmoid", "length")
REFUSED = {"sigmoid": "the normaliser is sigmoid, not softmax"}
ELSEWHERE = """
import sys, torch, attnopt
program = torch.export.load(sys.argv[1])
assert "attnopt.codegen" not in sys.modules
with torch.no_grad():
    torch.save(program.module()(x=torch.load(sys.argv[2])), sys.argv[3])
assert "tvm" not in sys.modules  # compiled before
"""


@pytest.fixture(scope="module")
def fast():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnopt.plan.choose.LOWERINGS", (TvmPrefill(),))
        return attnopt.optimize(Window().eval(), (torch.randn(2, 40, 32),), target="cpu", select="always")


def test_taken(fast):
    (site,) = fast.report.sites
    assert (site.kernel, site.after) == ("tvm-prefill", "softmax heads(4) width(8) scale(0.25) softcap(5.0) causal & window(8)")
    called = [str(n.target) for n in fast.module.graph_module.graph.nodes if str(n.target).startswith("attnopt.")]
    assert called == ["attnopt.tvm_attention.default"]


def test_tried_and_timed_on_a_cpu_only():
    for target, wanted in (("cpu", True), ("h200", False)):
        fast = attnopt.optimize(Window().eval(), (torch.randn(2, 40, 32),), target=target, select="model")
        (site,) = fast.report.sites
        assert ("tvm-prefill" in {choice.kernel for choice in site.choices}) is wanted


@pytest.mark.parametrize("length", [1, 40, 67])
def test_every_length(fast, length):
    x = torch.randn(3, length, 32)
    torch.testing.assert_close(fast(x), Window().eval()(x), atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_elsewhere(fast, tmp_path):
    path, x = fast.export(tmp_path / "fast.pt2"), torch.randn(3, 21, 32)
    wanted = fast(x)
    torch.testing.assert_close(attnopt.load(path)(x), wanted, atol=1e-6, rtol=1e-6)
    torch.save(x, tmp_path / "x.pt")
    files = (path, tmp_path / "x.pt", tmp_path / "y.pt")
    told = subprocess.run([sys.executable, "-c", ELSEWHERE, *files], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    torch.testing.assert_close(torch.load(files[2]), wanted, atol=1e-6, rtol=1e-6)


def test_compiled_by_torch(fast):
    x = torch.randn(3, 21, 32)
    compiled = torch.compile(fast.module, backend="aot_eager")
    torch.testing.assert_close(compiled(x), Window().eval()(x), atol=1e-5, rtol=1e-5)


def test_gradients_are_refused(fast):
    with pytest.raises(InputMismatch, match="have no gradient"):
        fast.module.graph_module(torch.randn(2, 9, 32, requires_grad=True))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", TRIED)
def test_the_table_of_all_lowerings(name):
    check(TvmPrefill(), CASES[name], REFUSED.get(name, ""))


def test_refusals():
    _, site = opened(CASES["causal"], "torch")
    assert TvmPrefill().supports(site, "onnxruntime").reason == "runtime onnxruntime has no TVM kernels"
    other = site.with_step("test", parse("softmax causal & load(other, b, k)"))
    assert TvmPrefill().supports(other, "torch").reason == "other is not known inside the kernel"
