"""Pages by bounds: the reference's choice, a state that grows with the cache, and the output of the pages that were chosen."""

from __future__ import annotations

import pytest
import torch
from ir.operands import close

from attnopt.codegen.chosen_pages import refuses, run_pages
from attnopt.ir.kv_cache import attend_cache
from attnopt.ir.reference import attend, reference
from attnopt.ir.spec import parse
from attnopt.selectors.pages import bounds, extended, seen, state_of


def qkv(length=45, heads=4, key_heads=2, width=8):
    made = torch.Generator().manual_seed(3)
    shapes = ((2, heads, 1, width), (2, key_heads, length, width), (2, key_heads, length, width))
    return tuple(torch.randn(s, generator=made, dtype=torch.float64) for s in shapes)


def test_a_bound_is_above_every_score_of_its_page():
    q, k, _ = qkv()
    found = bounds(q, state_of(k, 4))[:, :, 0]
    scores = (q @ k.repeat_interleave(2, 1).mT)[:, :, 0]
    for page in range(12):
        assert (found[..., page] >= scores[..., 4 * page : 4 * page + 4].amax(-1) - 1e-12).all()


@pytest.mark.parametrize("steps", [(45,), (1,) * 45, (8, 5, 1, 1, 30)])
def test_a_state_grows_with_the_cache(steps):
    _, k, _ = qkv()
    parts = k.split(list(steps), 2)
    state = state_of(parts[0], 4)
    for part in parts[1:]:
        state = extended(state, part, 4)
    whole = state_of(k, 4)
    assert torch.equal(state.low, whole.low) and torch.equal(state.high, whole.high) and state.length == 45


@pytest.mark.parametrize("options", ["", ", group=max", ", group=mean", ", recent=1", ", recent=2, group=max"])
@pytest.mark.parametrize("length", [45, 48])
def test_the_chosen_pages_are_those_of_the_reference(options, length):
    q, k, v = qkv(length)
    spec = parse(f"softmax scale(0.4) offset(size(k) - size(q)) causal pages(4, 3{options})")
    room = (
        torch.nn.functional.pad(k, (0, 0, 0, 48 - length), value=9.0),
        torch.nn.functional.pad(v, (0, 0, 0, 48 - length), value=9.0),
    )

    def run(kernel, q, cache):
        assert cache.pages.shape[-1] == 3
        return attend_cache(kernel, q, cache).output

    state = state_of(k, 4)
    close(run_pages(run, spec, q, *room, state), reference(spec, q, k, v))
    named = parse(str(spec).replace("pages(4, 3", "pages(4, 3, low=l, high=h"))
    close(reference(named, q, k, v, l=state.low, h=state.high), reference(spec, q, k, v))
    assert not torch.equal(reference(named, q, k, v, l=-state.high, h=-state.low), reference(spec, q, k, v))


def test_all_pages_are_dense_and_the_newest_is_among_them():
    q, k, v = qkv()
    dense = attend("softmax scale(0.4)", q, k, v)
    close(reference("softmax scale(0.4) pages(4, 12)", q, k, v), dense.output)
    shown = attend("softmax scale(0.4) offset(size(k) - size(q)) causal pages(4, 3, recent=1)", q, k, v).weights > 0
    assert shown[..., 44].all()


def test_refusals():
    for line, why in (
        ("softmax causal", "chooses no pages"),
        ("softmax causal & window(8) pages(16, 4)", "reads positions"),
        ("softmax add(load(slopes, h) * (k - q)) causal pages(16, 4)", "a score reads positions"),
        ("sigmoid pages(16, 4)", "no plain softmax"),
        ("softmax sink(0.5) pages(16, 4)", "no plain softmax: sink"),
    ):
        found = refuses(parse(line))
        assert found is not None and why in found.reason, line


@pytest.mark.parametrize("options", ["", ", group=max", ", group=mean"])
@pytest.mark.parametrize("recent", [1, 2])
def test_each_query_of_a_prompt_sees_what_it_would_as_the_newest(options, recent):
    clause = parse(f"softmax pages(4, 3, recent={recent}{options})").selection
    _, k, v = qkv()
    q = torch.randn(2, 4, 45, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = attend(f"softmax scale(0.4) causal {clause}", q, k, v).weights
    assert torch.equal(seen(clause, q, k), weights > 0)
    assert torch.equal(seen(clause, q[:, :, 20:30], k[:, :, :30], 20), (weights > 0)[:, :, 20:30, :30])
