"""Every pass of sparsify/: nothing leaks from the future, all that is kept is dense, no output changes beyond its bound."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ir.operands import close
from self_attention import SelfAttention

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.reference import attend, reference
from attnopt.ir.spec import parse
from attnopt.passes import (
    ALL,
    BigBird,
    BlockTopk,
    DeltaAttention,
    DilatedWindow,
    HeadWindows,
    Moba,
    Neighborhood,
    PowerAttention,
    SinksWindow,
    SpargeAttn,
)  # fmt: skip
from attnopt.passes.edits.caches.pages import Pages
from attnopt.passes.sparsify import dilated_window, neighborhood
from attnopt.patterns import recognise
from attnopt.plan.options.groups import Grouping

LENGTH = 160
CAUSAL = (
    SinksWindow(sinks=(2,), windows=(16,)),
    HeadWindows(windows=((2, 16),), widths=(16, 48), sinks=2, shares=(0.65,)),
    DeltaAttention(gamma=8, bases=((2, 16),)),
    SpargeAttn(tile=(16, 16), settings=("share=0.5, similarity=-0.1", "mass=0.9, similarity=0.3")),
    Moba(blocks=((16, 3),)),
    BlockTopk(blocks=((16, 3),), rows=16),
    PowerAttention(blocks=(8,)),
    BigBird(blocks=(8,)),
    DilatedWindow(windows=((8, 64, 4),)),
)
TOGETHER = ("sparge-attn", "block-topk")  # whose choice for a query depends on queries after it
ELSEWHERE = {"neighborhood": "has no causal form", "quest": "is of one query: tests/passes/sparsify/test_quest.py"}


class Causal(SelfAttention):
    """Each position sees those up to its own."""

    def forward(self, x, seen=None, *, many=False):
        q, k, v = self.rows(x)
        return self.o(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def rows(self, x):
        return [layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)]


@pytest.fixture(scope="module")
def seen():
    """The group of one causal attention, what calibration says of it, and the q, k, v of that."""
    torch.manual_seed(0)
    model = Causal().eval()
    with torch.no_grad():  # scores that differ, by heads that look near and far
        model.q.weight *= torch.tensor([1.0, 3.0, 6.0, 9.0]).repeat_interleave(16)[:, None]
    x = torch.randn(1, LENGTH, 64).cumsum(1) / 4
    host = FxHost.from_captured(capture(model, (x,), dynamic_shapes={"x": None}))
    (group,) = Grouping(host, recognise(host.graph).sites).of("site")
    evidence = Evidence(host, Calibration.of(host.graph, [{"x": x}]), sites=group.sites)
    return SimpleNamespace(group=group, evidence=evidence, rows=[part.detach().double() for part in model.rows(x)])


@pytest.fixture(scope="module")
def made(seen):
    """By pass, its candidates with the specs that they make."""
    return {
        rewrite.name: [(c, rewrite.apply(c, seen.group).sites[0].spec) for c in rewrite.propose(seen.group, seen.evidence)]
        for rewrite in CAUSAL
    }


def test_all_passes_are_here():
    there = {p.name for p in ALL if ".sparsify." in type(p).__module__}
    assert there == {p.name for p in CAUSAL} | set(ELSEWHERE)


@settings(max_examples=2, deadline=None)
@given(cut=st.integers(1, LENGTH - 1), seed=st.integers(0, 9))
def test_nothing_leaks_from_the_future(made, cut, seed):
    """Values after a query never reach it; where it chooses alone, nor do later keys and queries."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 4, LENGTH, 16, generator=random, dtype=torch.float64).cumsum(2) / 3 for _ in range(3))
    later = torch.cat([v[:, :, :cut], v[:, :, cut:] + 100], 2)
    others = [torch.cat([x[:, :, :cut], -3 * x[:, :, cut:]], 2) for x in (q, k)]
    for name, found in made.items():
        for _, spec in found:
            rows = (q, k) if name in TOGETHER else others
            close(reference(spec, *rows, later)[:, :, :cut], reference(spec, q, k, v)[:, :, :cut])


def test_no_output_changes_beyond_its_bound(made, seen):
    """2 m max|v| of each row, m the weight that is left out; with a correction as much again, of the row that it was taken from."""
    q, k, v = seen.rows
    dense = attend(seen.group.sites[0].spec, q, k, v)
    for name, found in made.items():
        assert found, name
        for candidate, spec in found:
            sparse = attend(spec.with_(correction=None), q, k, v)
            mass = (dense.weights * (sparse.weights == 0)).sum(-1)
            change = (attend(spec, q, k, v).output - dense.output).abs().amax(-1)
            allowed = 2 * mass * v.abs().max()
            if spec.correction is not None:
                step = spec.correction.count(0)
                allowed = allowed + allowed[..., ::step].repeat_interleave(step, -1)[..., :LENGTH]
            assert (change <= allowed + 1e-9).all(), name
            assert float(change.max()) > 0, name
            told = candidate.options
            assert told["dropped"] == pytest.approx(float(mass.mean()), abs=1e-5)
            assert float(change.mean(-1).max()) <= told["bound"] * (1 + 1e-5), name


WHOLE = {
    "sinks-window": f"window({LENGTH})",
    "head-windows": "(window(16) | global(2) | h == 0 | h == 1 | h == 2 | h == 3)",
    "delta-attention": "(window(16) | global(2)) delta(1, dense=causal, tail=0)",
    "sparge-attn": "pooled_blocks(16, 16, share=1.0, similarity=-1.0)",
    "sparge-attn, mass": "pooled_blocks(16, 16, mass=2.0, similarity=-1.0)",
    "moba": Moba().choice(16, 10),
    "block-topk": BlockTopk(rows=16).choice(16, 10),
    "power-attention": "(near_blocks(32, 4) | power_blocks(32) | global(32))",
    "big-bird": BigBird(chance=20).line(8, 5, back=True),
    "dilated-window": dilated_window.line(8, LENGTH, 1, back=True),
    "quest": Pages(16, 10).clause,
}


@pytest.mark.parametrize("name", WHOLE)
def test_all_that_is_kept_is_dense(name, seen):
    q, k, v = seen.rows
    close(
        reference(f"softmax scale(0.25) causal {joined(WHOLE[name])}", q, k, v), reference("softmax scale(0.25) causal", q, k, v)
    )


def joined(line: str) -> str:
    return line if parse(f"softmax {line}").mask is None else f"& {line}"


def test_whole_forms_that_look_both_ways(seen):
    q, k, v = (x[:, :, :144] for x in seen.rows)
    dense = reference("softmax scale(0.25)", q, k, v)
    for line in (BigBird(chance=20).line(8, 5, back=False), "neighborhood(144, 1, 1, 144, 1)", neighborhood.image(12, 12, 1, 0)):
        close(reference(f"softmax scale(0.25) {line}", q, k, v), dense)
    assert Neighborhood().name in ELSEWHERE
