"""Kernels of recognised sites: one for each distinct spec and form, refusals beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lowering_cases import CASES, Case, opened

from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.cpu import host
from attnopt.codegen.tvm.files import Emitted
from attnopt.codegen.tvm.site_kernels import write_kernels
from attnopt.ir.site import Refusal

pytestmark = pytest.mark.skipif(missing() is not None, reason="TVM is not installed")


def test_alike_sites_share_a_kernel(tmp_path):
    _, site = opened(CASES["plain"], "torch")
    read = replace(site, name="read", weights_used=site.nodes[0])
    made = write_kernels([site, replace(site, name="second"), read], host(), tmp_path)
    assert [(kernel.name, len(kernel.sites)) for kernel in made] == [("attention_0", 2), ("attention_1", 1)]
    assert [type(kernel.result) for kernel in made] == [Emitted, Refusal]
    assert not (tmp_path / "attention_1.py").exists()


def test_few_queries_get_a_kernel_that_splits_the_keys(tmp_path):
    _, site = opened(Case("softmax scale(0.25) offset(size(k) - size(q))", lengths=(5, 12)), "torch")
    made = write_kernels([site], host(), tmp_path)
    assert [kernel.name for kernel in made] == ["attention_0", "attention_0_decode"]
    assert all(isinstance(kernel.result, Emitted) for kernel in made)
