"""Big Bird's pattern is what the source draws: as many blocks by chance as asked for, none twice, and any two tokens two steps apart."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import pytest
import torch
from self_attention import SelfAttention

from attnopt.codegen import LOWERINGS
from attnopt.codegen.sparse import refuses, run_sparse
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.reference import reference
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse
from attnopt.passes import BigBird
from attnopt.patterns import recognise
from attnopt.plan.choose import emit
from attnopt.plan.options.groups import Grouping

LENGTH, BLOCK = 100, 8
SEEN = SimpleNamespace(
    longest=lambda site: 200,
    left_out=lambda site, name, forms: [SimpleNamespace(mean=0.1, worst=0.2, kept=0.5, bound=0.8)] * len(forms(site)),
)


def tiles(line, length, heads=4):
    """bool [heads, N, N]."""
    count = -(-length // BLOCK)
    grid = Grid(1, heads, length, length, q_step=BLOCK, k_step=BLOCK)
    return evaluate(parse(f"softmax {line}").mask, grid).bool().expand(1, heads, count, count)[0]


@pytest.mark.parametrize(("length", "chance"), [(160, 3), (203, 2), (203, 1)])
def test_blocks_by_chance_are_as_many_as_asked_for_and_of_the_rest(length, chance):
    found = tiles(f"random_blocks({BLOCK}, 1, {chance}, 812)", length)
    count = found.shape[-1]
    place = torch.arange(count)
    assert not found[:, :, [0, -1]].any() and not found[:, (place[:, None] - place).abs() <= 1].any()
    assert (found.sum(-1) == chance).all()
    back = tiles(f"causal & causal_random_blocks({BLOCK}, 2, {chance}, 812)", length)
    assert not back[:, place[:, None] - place <= 2].any() and not back[:, :, 0].any()
    assert (back.sum(-1) == (place - 3).clamp(0, chance)).all()
    assert not torch.equal(found[0], found[1])  # heads differ, and so do seeds
    other = tiles(f"random_blocks({BLOCK}, 1, {chance}, 813)", length)
    assert not torch.equal(found, other)


def test_chance_favours_no_block():
    drawn = tiles("causal & causal_random_blocks(8, 2, 2, 812)", 203, heads=500)[:, -1, 1:23].sum(0)  # 22 blocks, 1000 draws
    assert drawn.min() > 25 and drawn.max() < 68  # three standard deviations of 45


def test_any_two_tokens_are_two_steps_apart():
    line = BigBird().line(BLOCK, 3, back=False)
    found = tiles(line, 203)
    once = found.float()
    assert ((once @ once) > 0).all() and not found.all()
    inner = found[:, 2:-2].sum(-1)
    assert (inner == 8).all()  # the first and the last, three of the window, three by chance


@pytest.mark.parametrize("host", ["torch", "onnx"])
def test_the_rewritten_model_computes_the_pattern(host):
    torch.manual_seed(0)
    model, x = SelfAttention().eval(), torch.randn(1, LENGTH, 64)
    made = FxHost.from_captured(capture(model, (x,), dynamic_shapes={"x": None}))
    made = made if host == "torch" else OnnxHost.from_model(made.to_onnx())
    trial = made.copy()
    (group,) = Grouping(trial, recognise(trial.graph).sites).of("site")
    rewrite = BigBird(blocks=(BLOCK,))
    line = rewrite.lines(group.sites[0])["3 of the blocks of 8 by chance"]
    assert line == rewrite.line(BLOCK, zlib.crc32(group.sites[0].name.encode()) % 46337, back=False)
    (site,) = rewrite.apply(SimpleNamespace(pass_name=rewrite.name, options={"adds": line}), group).sites
    assert site.steps == ("big-bird",)
    kernel = next(each for each in LOWERINGS if each.name == {"torch": "sdpa", "onnx": "ort-mha"}[host])
    emit(trial, site.reading({}), kernel)
    trial.finish()
    got, *_ = trial.runner()({"x": x})
    q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2).double() for f in (model.q, model.k, model.v))
    wanted = model.o(reference(site.spec, q, k, v).float().transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    kernels = run_sparse(lambda s, *qkv: reference(s, *qkv[:3], **qkv[3]), site.spec, q, k, v, {})
    torch.testing.assert_close(kernels, reference(site.spec, q, k, v))
    assert refuses(site.spec) is None


def test_what_a_pass_offers():
    made = FxHost.from_captured(capture(SelfAttention().eval(), (torch.randn(1, LENGTH, 64),), dynamic_shapes={"x": None}))
    (group,) = Grouping(made, recognise(made.graph).sites).of("site")
    (only,) = BigBird(blocks=(BLOCK, 64)).propose(group, SEEN)
    assert only.kind == "3 of the blocks of 8 by chance" and only.changes == ("mask",) and not only.exact
    refused = BigBird().propose(group, SEEN)
    assert isinstance(refused, Refusal) and refused.reason == "the smallest pattern covers all 100 keys"
