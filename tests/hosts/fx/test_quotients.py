"""Quotients of sizes: what divides exactly is the quotient, for every value; what does not stays as it is."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from torch import nn
from torch.utils._sympy.functions import FloorDiv, Mod

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.fx.quotients import without_quotients
from attnopt.ir.dims import Symbol
from attnopt.patterns import recognise

B, N, M = sympy.symbols("b n m", integer=True, positive=True)
HALF = FloorDiv(M - 1, 2)

SAME = [
    (FloorDiv(4 * B * (N + 1) ** 2, (N + 1) * (4 * N + 4)), B),
    (B * FloorDiv(4 * B, FloorDiv(4 * B * (N + 1) ** 2, (N + 1) * (4 * N + 4))), 4 * B),
    (FloorDiv(B * (HALF + 1) * N, HALF + 1), B * N),
    (FloorDiv(M - 1, 2) + 1, FloorDiv(M + 1, 2)),
    (FloorDiv(4 * N + M + 9, 4), N + 2 + FloorDiv(M + 1, 4)),
    (M - Mod(M, 8), 8 * FloorDiv(M, 8)),
    (FloorDiv(M - Mod(M, 8) + 8, FloorDiv(M - Mod(M, 8), 8) + 1), sympy.Integer(8)),
    (FloorDiv(2 * FloorDiv(M - 3, 2) + 6, 2), FloorDiv(M + 1, 2) + 1),
]
KEPT = [FloorDiv(N * (N + 1), 2), FloorDiv(B, N), FloorDiv(3 * B * N, 2 * N), FloorDiv(B * N + 1, N)]


@pytest.mark.parametrize(("written", "wanted"), SAME)
def test_what_divides_exactly_is_the_quotient(written, wanted):
    assert without_quotients(written) == wanted


@pytest.mark.parametrize("written", [*(w for w, _ in SAME), *KEPT])
def test_nothing_changes_its_value(written):
    result = without_quotients(written)
    for b, n, m in itertools.product((1, 2, 5), (1, 3, 4), (4, 5, 7, 12)):
        sizes = {B: b, N: n, M: m}
        assert result.subs(sizes) == written.subs(sizes), (result, sizes)


@pytest.mark.parametrize("written", KEPT)
def test_a_quotient_with_a_rest_stays(written):
    assert without_quotients(written).has(FloorDiv)


def test_a_multiple_of_a_sum_is_a_product_with_a_name_that_reads_alike():
    assert str(Symbol(8, ("((n//8)) + 1",))) == "8*(((n//8)) + 1)"
    assert str(Symbol(1, ("n + 1",))) == "n + 1"
    assert str(Symbol(4, ("batch", "n"))) == "4*batch*n"


class Inferred(nn.Module):
    """Heads folded into the batch after a strided convolution, and unfolded by views that infer what the batch is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv1d(32, 32, 3, stride=2, padding=1)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x.mT).mT
        q, k, v = (self.folded(layer(x)) for layer in (self.q, self.k, self.v))
        scores = torch.bmm(q, k.mT)
        p = scores.view(-1, 4, scores.shape[-2], scores.shape[-1]).softmax(-1)
        out = torch.bmm(p.view(-1, p.shape[-2], p.shape[-1]), v)
        return out.view(-1, 4, out.shape[-2], out.shape[-1]).transpose(1, 2).flatten(2)

    @staticmethod
    def folded(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (4, 8)).permute(0, 2, 1, 3).reshape(-1, x.shape[1], 8)


def test_heads_that_views_infer_are_found():
    shapes = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    host = FxHost.from_captured(capture(Inferred().eval(), {"x": torch.randn(3, 22, 32)}, dynamic_shapes=shapes))
    (site,) = recognise(host.graph).sites
    assert str(site.spec) == "softmax heads(4) width(8)"
    assert isinstance(site.size("b"), Symbol) and isinstance(site.size("q"), Symbol)
