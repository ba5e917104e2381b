"""The spec at the projections means, by the reference, what the whole model computes from them."""

from __future__ import annotations

import block_models
import pytest
import torch

from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.block_reference import as_rows, projected
from attnopt.ir.block_spec import lifted
from attnopt.ir.reference import reference
from attnopt.patterns import recognise
from attnopt.patterns.block import find_block

SPECS = {
    "gpt2": "",
    "llama": "rotary(8)",
    "qwen3": "norm(rms, q_gain=q_gain, k_gain=k_gain) rotary(8)",
    "gptj": "rotary(4, pairs=interleaved)",
    "gpt_neox": "rotary(4)",
}


def found_in(family, **changes):
    model = block_models.build(family)
    host = FxHost.from_captured(capture(model, {**block_models.inputs(family), **changes}))
    (site,) = recognise(host.graph).sites
    return host, site, find_block(host.graph, site)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", SPECS)
def test_the_reference_at_the_projections(family):
    host, site, block = found_in(family)
    made = lifted(site, block)
    clauses = " ".join(str(c) for c in (made.spec.qk_norm, made.spec.position) if c is not None)
    assert clauses == SPECS[family]
    check(host, site, block, made)


def test_positions_that_are_given():
    """Positions of the user are loaded; here they do not start at zero."""
    ids = torch.arange(12)[None] + torch.tensor([[3], [0]])
    host, site, block = found_in("llama", position_ids=ids)
    made = lifted(site, block)
    assert str(made.spec.position) == "rotary(8, q=load(positions, b, row), k=load(positions, b, k))"
    assert made.positions.value.name == "position_ids"
    check(host, site, block, made)


def check(host, site, block, made):
    loads = {name: operand.value for name, operand in site.operands.items()}
    loads |= {"positions": made.positions.value} if made.positions is not None else {}
    names = ["q", "k", "v"]
    asked = [*(getattr(block, n).input for n in names), *loads.values(), site.output.value]
    held = host.tap(asked, host.example_inputs())
    rows = {
        n: projected(getattr(block, n), x).reshape(2, 12, *getattr(block, n).channels.shape)
        for n, x in zip(names, held, strict=False)
    }
    given = dict(zip(loads, held[3:], strict=False))
    out = reference(made.spec, *(rows[n].transpose(1, 2) for n in names), **given, **made.constants)
    wanted = as_rows(site.output, held[-1], site.axes, batch=2)
    torch.testing.assert_close(out.transpose(1, 2), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("olmo2", "norms over all heads, with a bias, or that differ between queries and keys have no clause"),
        ("llama_yarn", "a rotation of one side only, of two kinds, or that scales has no clause"),
    ],
)
def test_what_no_clause_says(family, reason):
    _, site, block = found_in(family)
    assert lifted(site, block).reason == reason
