"""Mixes across heads by nodes of each host; tests/patterns/test_talking_heads.py holds whole models against them."""

from __future__ import annotations

import pytest
from lowering_cases import CASES, check

from attnopt.codegen.library.head_mixing import HeadMixing


@pytest.mark.parametrize("host", ["torch", "onnx"])
def test_attentions_without_a_mix_are_left_to_others(host):
    check(HeadMixing(host), CASES["plain"], "no mix across heads")


def test_the_names_of_both_hosts_differ():
    assert [HeadMixing(host).name for host in ("torch", "onnx")] == ["head-mixing", "onnx-head-mixing"]
