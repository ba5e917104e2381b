"""A basis folded into weights: no output changes before something is rounded, to the last digits in float64; or a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cached_step import Step, example
from rounded_steps import opened, whole

from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.block import Rotary
from attnopt.ir.storage import hadamard
from attnopt.passes import AkvqVl
from attnopt.passes.edits.caches.basis import basis_refusal, turned_layers, weights_turned

DOUBLE = torch.float64


@pytest.mark.parametrize("sides", ["v", "k", "kv"])
def test_outputs_stay_and_the_cache_is_turned(sides):
    host = FxHost.from_captured(capture(Step(DOUBLE).eval(), example(DOUBLE)))
    copy = host.copy()
    (site,) = whole(copy).sites
    weights_turned(whole(copy), {site.name: list(sides)}).write(copy)
    copy.finish()
    x, past = example(DOUBLE)
    h = hadamard(8)
    given = [side @ h if name in sides else side for name, side in zip("kv", past, strict=True)]
    names = [spec.name for spec in host.input_specs]
    wanted, *present = host.runner()(dict(zip(names, (x, *past), strict=True)))
    got, *turned = copy.runner()(dict(zip(names, (x, *given), strict=True)))
    torch.testing.assert_close(got, wanted, atol=1e-13, rtol=1e-13)
    for name, before, after in zip("kv", present, turned, strict=True):
        torch.testing.assert_close(after, before @ h if name in sides else before, atol=1e-13, rtol=1e-13)


def test_what_stands_between_is_refused():
    group = whole(opened("torch"))
    (site,), (block,) = group.sites, group.blocks
    assert basis_refusal(group, site.name, "k") is basis_refusal(group, site.name, "v") is None

    def refused(side, **changed):
        return basis_refusal(replace(group, blocks=(replace(block, **changed),)), site.name, side).reason

    turning = Rotary(8, 0, False, torch.ones(4), 1e4, 1.0, None, ("q", "k"))
    streams = {**block.streams, "k": (block.streams["k"][0], turning, *block.streams["k"][1:])}
    assert refused("k", streams=streams) == "something stands between the layer that makes k and the product"
    assert "between the layer that makes values" in refused("v", o=None)
    twice = replace(group, sites=(site, replace(site, name="other")), blocks=(block, replace(block)))
    assert basis_refusal(twice, site.name, "v").reason == "another attention reads the same cache"
    wide = whole(opened("torch", width=12))
    assert basis_refusal(wide, wide.sites[0].name, "v").reason == "heads of 12 channels have no Hadamard matrix"


def test_a_candidate_names_the_layers_that_it_changes():
    group = whole(opened("torch"))
    plain, folded = AkvqVl().propose(group, None)
    assert plain.nodes == () and "weights" not in plain.changes
    assert (
        set(folded.nodes) == turned_layers(group, {(group.sites[0].name, side): True for side in "kv"}) and len(folded.nodes) == 4
    )
    assert "weights" in folded.changes and "the basis of keys and values folded into weights" in folded.description
    assert folded.cached == plain.cached
