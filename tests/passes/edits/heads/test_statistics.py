"""Moments of heads from those of what their projections read: what counting their rows gives, bias and all."""

from __future__ import annotations

import torch
from shrunk_models import IDS, evidence, host

from attnopt.ir.block_reference import projected
from attnopt.passes.edits.heads.statistics import moments
from attnopt.plan.options.groups import Grouping


def test_moments_are_those_of_the_rows():
    given = host("packed", "torch")
    group = Grouping(given).of("block")[1]
    seen, block = moments(group, evidence("packed", "torch")), group.blocks[0]
    (x,) = given.tap([block.k.input], {"input_ids": IDS})
    q, k, v = (projected(layer, x).flatten(0, -3).double() for layer in (block.q, block.k, block.v))  # [tokens, H, D]
    torch.testing.assert_close(seen.keys, torch.einsum("tia,tjb->ijab", k, k) / len(k), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.values, torch.einsum("tia,tjb->ijab", v, v) / len(v), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.queries, torch.einsum("tha,thb->hab", q, q) / len(q), atol=1e-4, rtol=1e-4)
