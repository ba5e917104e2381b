"""Softmaxes over diagonals: read as windowed attention where every score and value is in its place, refused where one is not."""

from __future__ import annotations

import functools

import lifted
import pytest
import torch
from hosts.fx.test_translate import checked
from torch import Tensor, nn

import attnopt
import attnopt.ir.dims
import attnopt.ir.layout
from attnopt.codegen import LOWERINGS
from attnopt.ir.reference import reference
from attnopt.ir.site import Operand, Site
from attnopt.patterns import recognise
from attnopt.plan.choose import emit

HEADS, WIDTH = 2, 8
LOWEST = torch.finfo(torch.float32).min


def strided(x: Tensor, w: int) -> Tensor:
    """[N, L, D] -> chunks of 2w that overlap by half, [N, L / w - 1, 2w, D], as a view over memory."""
    x = x.view(x.size(0), x.size(1) // (2 * w), 2 * w, x.size(2))
    stride = list(x.stride())
    return x.as_strided((x.size(0), 2 * x.size(1) - 1, 2 * w, x.size(3)), (stride[0], stride[1] // 2, *stride[2:]))


def unfolded(x: Tensor, w: int) -> Tensor:
    return x.unfold(1, 2 * w, w).transpose(2, 3)


class Diagonals(nn.Module):
    """Sliding attention as Longformer spells it; `wrong` names the one thing that is not as it should be."""

    def __init__(self, w: int = 2, wrong: str = "", *, chunked=strided, lowest: float = -float("inf")) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.wrong, self.chunked, self.lowest = w, wrong, chunked, lowest
        self.q, self.k, self.v = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(3))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, L, H, D] twice -> [B, L, H, 2w + 1]: column j is the key q + j - w."""
        w = self.w
        batch, length, heads, width = q.shape
        q, k = (x.transpose(1, 2).reshape(batch * heads, length, width) for x in (q, k))
        made = torch.einsum("bcxd,bcyd->bcxy", self.chunked(q, w), self.chunked(k, w))
        made = nn.functional.pad(made, (0, 0, 0, 1))
        made = made.view(*made.shape[:2], made.size(3), made.size(2))
        out = made.new_zeros((batch * heads, length // w, w, 2 * w + 1))
        out[:, :-1, :, w:] = made[:, :, :w, : w + 1]
        out[:, -1, :, w:] = made[:, -1, w:, : w + 1]
        lower = made[:, :, -w:, w + 1 :] if self.wrong == "lower triangle a row too low" else made[:, :, -(w + 1) : -1, w + 1 :]
        out[:, 1:, :, :w] = lower
        out[:, 0, 1:w, 1:w] = made[:, 0, : w - 1, 1 - w :]
        out = out.view(batch, heads, length, 2 * w + 1).transpose(2, 1)
        return self.hidden(out)

    def hidden(self, out: Tensor) -> Tensor:
        """The corners without a key."""
        w = self.w
        rows = w - 1 if self.wrong == "corner one row too small" else w
        corner = (
            out.new_ones(rows, w + 1).tril(w - rows).flip(dims=[0])
            if rows == w
            else out.new_ones(rows, w + 1).tril().flip(dims=[0])
        )
        first = corner[None, :, None, :]
        last = (out.new_ones(w, w + 1).tril().flip(dims=[0]))[None, :, None, :].flip(dims=(1, 3))
        head, tail = out[:, :rows, :, : w + 1], out[:, -w:, :, -(w + 1) :]
        out[:, :rows, :, : w + 1] = torch.full_like(head, self.lowest).where(first.expand(head.size()).bool(), head)
        out[:, -w:, :, -(w + 1) :] = torch.full_like(tail, self.lowest).where(last.expand(tail.size()).bool(), tail)
        return out

    def summed(self, p: Tensor, v: Tensor) -> Tensor:
        """[B, L, H, 2w + 1] and [B, L, H, D] -> [B, L, H, D]."""
        w = self.w
        batch, length, heads, width = v.shape
        p = p.transpose(1, 2).reshape(batch * heads, length // w, w, 2 * w + 1)
        v = v.transpose(1, 2).reshape(batch * heads, length, width)
        ahead = 1 if self.wrong == "values one position ahead" else 0
        v = nn.functional.pad(v, (0, 0, w - ahead, w + ahead), value=-1)
        stride = v.stride()
        chunks = v.as_strided((batch * heads, length // w, 3 * w, width), (stride[0], w * stride[1], stride[1], stride[2]))
        if self.wrong == "values of the next chunk":
            chunks = torch.cat([chunks[:, 1:], chunks[:, :1]], 1)
        fill = 1.0 if self.wrong == "ones around the weights" else 0.0
        p = nn.functional.pad(p, (0, w + 1), value=fill)
        p = p.view(*p.shape[:2], -1)[:, :, :-w].view(batch * heads, length // w, w, 3 * w + 1)[:, :, :, :-1]
        out = torch.einsum("bcwd,bcdh->bcwh", p, chunks)
        return out.view(batch, heads, length, width).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor):
        """x [B, L, D], mask [B, L]: true for padding."""
        if x.shape[1] % (2 * self.w) or x.shape[:2] != mask.shape:
            raise ValueError("whole chunks, and a mask of all of them")
        q, k, v = (f(x).view(*x.shape[:2], HEADS, WIDTH) for f in (self.q, self.k, self.v))
        scores = self.scores(q / WIDTH**0.5, k)
        if self.wrong != "no padding":
            low = mask[:, :, None, None].float().masked_fill(mask[:, :, None, None], LOWEST)
            scores = scores + self.scores(torch.ones_like(low), low)
        p = scores.softmax(-1)
        zeroed = p.masked_fill(mask[:, :, None, None], 0.0)
        made = self.summed(zeroed, v).reshape(x.shape)
        return (made, p) if self.wrong == "weights are given" else made


def example(length: int, *, batch: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(length)
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[0, length // 2 :] = True
    mask[1, : length // 4] = True
    mask[2, ::3] = True
    return torch.randn(batch, length, HEADS * WIDTH), mask


@functools.cache
def traced(w: int = 2, wrong: str = "", chunked=strided, lowest: float = -float("inf"), static: bool = False):
    model = Diagonals(w, wrong, chunked=chunked, lowest=lowest).eval()
    host, _ = checked(model, example(6 * w), **({"dynamic_shapes": {"x": None, "mask": None}} if static else {}))
    return model, host


def rows(tensor: Tensor, operand: Operand, site: Site, wanted: str, sizes: dict[str, int]) -> Tensor:
    """An operand as [B, H, L, D]; `wanted` are the roles of its dimensions."""
    axes = [axis for group in operand.layout for axis in group]
    groups = [(*site.axes["g"], *site.axes["r"]) if role == "h" else site.axes[role] for role in wanted]
    number = functools.partial(attnopt.ir.dims.evaluate, sizes=sizes)
    whole = tensor.reshape([number(a.size) for a in axes]).permute([axes.index(a) for group in groups for a in group])
    return whole.reshape([number(attnopt.ir.layout.size_of(group)) for group in groups])


CASES = {"strided": {}, "unfolded": {"chunked": unfolded}, "wider": {"w": 3}, "static": {"static": True}}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", CASES)
def test_diagonals_are_windowed_attention(case):
    """The spec's reference gives what the model gives, padded rows included, at lengths that were not traced."""
    model, host = traced(**CASES[case])
    (site,) = recognise(host.graph).sites
    w = model.w
    mask = str(site.spec.mask)
    assert mask.startswith(f"window({w + 1}) & lookahead({w + 1}) & ~load("), mask
    assert site.weights_used is None
    for length in (6 * w,) if case == "static" else (6 * w, 4 * w, 14 * w):
        x, padding = example(length)
        named = host.named_inputs((x, padding))
        operands = {"q": "bhqd", "k": "bhkd", "v": "bhke"}
        held = host.tap([getattr(site, name).value for name in operands], named)
        sizes = lifted.symbols(host, named)
        q, k, v = (
            rows(tensor, getattr(site, name), site, roles, sizes)
            for (name, roles), tensor in zip(operands.items(), held, strict=True)
        )
        loaded = {name: lifted.base(o.value) for name, o in site.operands.items()}
        data = dict(zip(loaded, host.tap(list(loaded.values()), named), strict=True))
        said = {
            name: data[name].reshape([attnopt.ir.dims.evaluate(d, sizes) for d in o.value.shape])
            for name, o in site.operands.items()
        }
        got = reference(site.spec, q, k, v, **said).transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(got, model(x, padding), atol=1e-5, rtol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["sdpa", "local-sdpa"])
def test_the_kernels_that_take_its_place(name):
    """The whole model after the rewrite, also at another length."""
    lowering = next(x for x in LOWERINGS if x.name == name)
    model, host = traced(w=16)
    copy = host.copy()
    (site,) = recognise(copy.graph).sites
    assert lowering.supports(site, "torch") is None
    emit(copy, site, lowering)
    copy.finish()
    assert not any(n.op == "softmax" for n in copy.graph.nodes)
    for length in (96, 224):
        x, padding = example(length)
        (got,) = copy.runner()(copy.named_inputs((x, padding)))
        torch.testing.assert_close(got, model(x, padding), atol=1e-5, rtol=1e-5)


NEAR_MISSES = {
    "corner one row too small": "scores without a key are not hidden",
    "lower triangle a row too low": "a score within the band is a number, not a product",
    "values one position ahead": "the values of a band are not those of one position each",
    "values of the next chunk": "the values of a band are not those of one position each",
    "ones around the weights": "something else than weights meets the values of a band",
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("wrong", NEAR_MISSES)
def test_near_misses_are_refused(wrong):
    _, host = traced(w=3, wrong=wrong)
    found = recognise(host.graph)
    assert not found.sites
    (refusal,) = found.refusals
    assert NEAR_MISSES[wrong] in refusal.reason
    assert refusal.reached == "value product" and refusal.remedy


@pytest.mark.exhaustive
def test_corners_that_are_merely_low_are_no_mask():
    """-10000 in place of minus infinity leaves garbage a weight in rows without another key."""
    _, host = traced(lowest=-10000.0)
    found = recognise(host.graph)
    assert not found.sites and "scores without a key are not hidden" in found.refusals[0].reason


@pytest.mark.exhaustive
def test_weights_that_are_read_elsewhere_are_told():
    _, host = traced(wrong="weights are given")
    (site,) = recognise(host.graph).sites
    assert site.weights_used is not None


def test_without_padding_the_band_is_the_whole_mask():
    _, host = traced(wrong="no padding")
    (site,) = recognise(host.graph).sites
    assert str(site.spec).startswith("softmax heads(2) width(8) scale(0.3535534) window(3) & lookahead(3) & ~load(")
