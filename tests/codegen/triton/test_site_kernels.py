"""Kernels of recognised sites: one for each distinct spec and form, refusals beside them."""

from __future__ import annotations

from dataclasses import replace

import torch
from lowering_cases import CASES, Case, opened

from attnopt.codegen.site_form import decodes
from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.site_kernels import form_of, limits_of, write_kernels
from attnopt.ir.clause import Clause
from attnopt.ir.site import Refusal


def test_alike_sites_share_a_kernel(tmp_path):
    _, site = opened(CASES["causal"], "torch")
    _, other = opened(CASES["padding"], "torch")
    read = replace(site, name="read", weights_used=site.nodes[0])
    made = write_kernels([site, replace(site, name="second"), other, read], "sm_80", tmp_path)
    assert [(kernel.name, len(kernel.sites)) for kernel in made] == [("attention_0", 2), ("attention_1", 1), ("attention_2", 1)]
    assert [type(kernel.result) for kernel in made] == [Compiled, Compiled, Refusal]
    assert made[0].sites == (site.name, "second")
    assert "def attention(q, k, v, seen, o=None):" in (tmp_path / "attention_1.py").read_text()
    assert not (tmp_path / "attention_2.py").exists()


def test_forms():
    case = Case("softmax scale(0.25) add(load(bias, b, h, row, k)) load(seen, b, 0, 0, k)", width=(24, 32), dtype="float16")
    _, site = opened(case, "onnx")
    form = Form(24, 32, "float16", (("bias", "float16"), ("seen", "bool")))
    assert form_of(site) == form
    assert form_of(site, "bfloat16") == replace(form, dtype="bfloat16")


def test_weights_that_multiply_channels_bound_the_scores():
    _, site = opened(CASES["causal"], "torch")
    gain = replace(site.q.value, load=lambda: torch.tensor([0.5, -3.0]))
    spec = site.spec.with_(qk_norm=Clause("norm", ("rms",), (("q_gain", "g"), ("k_gain", "moving"))))
    normed = replace(site, spec=spec, operands={"g": replace(site.q, value=gain), "moving": site.k})
    assert limits_of(normed) == (("g", 3.0),)
    assert limits_of(site) == ()


def test_few_queries_get_a_kernel_that_splits_the_keys(tmp_path):
    _, site = opened(Case("softmax scale(0.25) offset(size(k) - size(q)) causal", lengths=(5, 12), dtype="float16"), "torch")
    _, other = opened(Case("softmax scale(0.25)", lengths=(5, 12), dtype="float16"), "torch")
    assert (decodes(site), decodes(other)) == (True, False)
    made = write_kernels([site], "sm_80", tmp_path)
    assert [kernel.name for kernel in made] == ["attention_0", "attention_0_decode"]
    assert all(isinstance(kernel.result, Compiled) for kernel in made)
    assert {"attention_0_decode.py", "attention_0_decode_merge.cubin"} <= {f.name for f in tmp_path.iterdir()}
