"""The Triton kernel in the graph of a model: which attentions it takes, and that the model survives all that torch does with it.

Without a GPU the operator computes the reference, so these numbers show that operands, heads and lengths arrive where they must;
the kernel's own numbers stand in `interpreted`.
"""

from __future__ import annotations

import subprocess
import sys

import onnx
import pytest
import torch
from lowering_cases import CASES, check, opened
from softcapped_window import Window

import attnopt
from attnopt.codegen.triton.lowerings.triton_prefill import TritonPrefill
from attnopt.errors import InputMismatch, UnsupportedFormat
from attnopt.ir.spec import parse

TRIED = ("other_widths", "grouped", "padding_mean", "bias_and_mask", "half_padding", "tensor_scale", "sink", "sigmoid", "length")
REFUSED = {"sigmoid": "the normaliser is sigmoid, not softmax"}
ELSEWHERE = """
import sys, torch, attnopt
assert "attnopt.codegen" not in sys.modules
program = torch.export.load(sys.argv[1])
assert "attnopt.codegen" not in sys.modules
with torch.no_grad():
    torch.save(program.module()(x=torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.fixture(scope="module")
def fast():
    return attnopt.optimize(Window().eval(), (torch.randn(2, 40, 32),), target="h200")


def test_taken_where_the_mask_has_structure(fast):
    (site,) = fast.report.sites
    assert (site.kernel, site.after) == (
        "triton-prefill",
        "softmax heads(4) width(8) scale(0.25) softcap(5.0) causal & window(8)",
    )
    assert fast.report.difference.max_rel < 1e-5
    called = [str(n.target) for n in fast.module.graph_module.graph.nodes if str(n.target).startswith("attnopt.")]
    assert called == ["attnopt.triton_attention.default"]


def test_libraries_keep_what_they_are_made_for():
    (site,) = attnopt.optimize(Window(structured=False).eval(), (torch.randn(2, 40, 32),), target="h200").report.sites
    assert (site.kernel, site.after) == ("sdpa", "softmax heads(4) width(8) scale(0.25) causal")


def test_no_candidate_on_a_cpu():
    (site,) = attnopt.optimize(Window().eval(), (torch.randn(2, 40, 32),), target="cpu", select="model").report.sites
    assert "triton-prefill" not in {site.kernel, *(choice.kernel for choice in site.choices)}


@pytest.mark.parametrize("length", [1, 40, 67])
def test_every_length(fast, length):
    x = torch.randn(3, length, 32)
    torch.testing.assert_close(fast(x), Window().eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.exhaustive
def test_saved_and_loaded_elsewhere(fast, tmp_path):
    path, x = fast.export(tmp_path / "fast.pt2"), torch.randn(3, 21, 32)
    wanted = Window().eval()(x)
    torch.testing.assert_close(attnopt.load(path)(x), wanted, atol=1e-5, rtol=1e-5)
    torch.save(x, tmp_path / "x.pt")
    files = (path, tmp_path / "x.pt", tmp_path / "y.pt")
    told = subprocess.run([sys.executable, "-c", ELSEWHERE, *files], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    torch.testing.assert_close(torch.load(files[2]), wanted, atol=1e-5, rtol=1e-5)


def test_compiled_by_torch(fast):
    x = torch.randn(3, 21, 32)
    compiled = torch.compile(fast.module, backend="aot_eager")
    torch.testing.assert_close(compiled(x), Window().eval()(x), atol=1e-5, rtol=1e-5)


def test_onnx_files_hold_kernels_of_onnx(fast, tmp_path):
    path, x = fast.export(tmp_path / "fast.onnx"), torch.randn(3, 21, 32)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "com.microsoft"}
    torch.testing.assert_close(torch.from_numpy(attnopt.load(path)(x)[0]), Window().eval()(x), atol=1e-5, rtol=1e-5)


def test_kernels_written_out(fast, tmp_path):
    (made,) = fast.kernels(tmp_path / "kernels", dtype="float16")
    assert (made.sites, made.result.architecture) == ((fast.report.sites[0].name,), "sm_90")
    (same,) = attnopt.kernels(
        Window().eval(), tmp_path / "same", target="h200", dtype="float16", example_inputs=(torch.randn(2, 40, 32),)
    )
    assert same == made
    files = {path.name: path.read_bytes() for path in (tmp_path / "kernels").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "same").iterdir()}
    with pytest.raises(UnsupportedFormat, match="'h200' is no CPU"):
        fast.kernels(tmp_path / "none", cpu="haswell")
    assert not (tmp_path / "none").exists()


def test_gradients_are_refused(fast):
    with pytest.raises(InputMismatch, match="have no gradient"):
        fast.module.graph_module(torch.randn(2, 9, 32, requires_grad=True))


@pytest.mark.parametrize("name", TRIED)
def test_the_table_of_all_lowerings(name):
    check(TritonPrefill(), CASES[name], REFUSED.get(name, ""))


def test_refusals():
    _, site = opened(CASES["causal"], "torch")
    assert TritonPrefill().supports(site, "onnxruntime").reason == "runtime onnxruntime has no Triton kernels"
    other = site.with_step("test", parse("softmax causal & load(other, b, k)"))
    assert TritonPrefill().supports(other, "torch").reason == "other is not known inside the kernel"
