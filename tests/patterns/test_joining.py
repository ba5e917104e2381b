"""Scores of several key sets in one softmax, and weights cut among several value sets: one attention, or a refusal with its reason."""

from __future__ import annotations

import io

import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn

import attnopt
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.reference import reference
from attnopt.patterns import recognise

HEADS, WIDTH, GLOBAL, BLOCK = 4, 8, 3, 4
SCALE = 0.25


class GlobalAndLocal(nn.Module):
    """Each block of queries sees a few global tokens and its own block: x [B, N * BLOCK, D], g [B, GLOBAL, D]."""

    def __init__(self, **how: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(4))
        self.how = {
            "scores": "joined", "values": "cut", "query": 1.0, "of": "one", "bias": False, "sum": "add", "masked": True, **how,
        }  # fmt: skip

    def parts(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """q, k, v of the blocks [B, H, N, BLOCK, D]; k, v of the global tokens [B, H, GLOBAL, D]."""
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2).unflatten(2, (-1, BLOCK)) for layer in (self.q, self.k, self.v)
        )
        far_k, far_v = (layer(g).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for layer in (self.k, self.v))
        return q * SCALE, k, v, far_k, far_v

    def forward(self, x: Tensor, g: Tensor, bias: Tensor) -> Tensor:
        how = self.how
        q, k, v, far_k, far_v = self.parts(x, g)
        blocks = q.shape[2]
        if how["scores"] == "joined":
            other = k if how["of"] == "another" else q
            far = torch.einsum("bhnqd,bhgd->bhnqg", other * how["query"], far_k)
            near = q @ k.mT
            if how["bias"]:
                near = near - bias[..., GLOBAL:]
            if how["bias"] == "mask":
                near = near.masked_fill(bias[..., GLOBAL:] > 1, -torch.inf)
            if how["bias"] == "scaled":
                near = near * 2.0
            scores = torch.cat([far, near], -1)
        else:
            scores = q @ torch.cat([far_k[:, :, None].expand(-1, -1, blocks, -1, -1), k], 3).mT
        p = (scores + bias if how["masked"] else scores).softmax(-1)
        if how["values"] == "cut":
            a = torch.einsum("bhnqg,bhgd->bhnqd", p[..., :GLOBAL], far_v)
            b = p[..., GLOBAL:] @ v
            out = a + b if how["sum"] == "add" else a * b
        else:
            out = p @ torch.cat([far_v[:, :, None].expand(-1, -1, blocks, -1, -1), v], 3)
        return self.o(out.permute(0, 2, 3, 1, 4).reshape(x.shape))


def example(blocks: int = 3, batch: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    width = HEADS * WIDTH
    return {
        "x": torch.randn(batch, blocks * BLOCK, width), "g": torch.randn(batch, GLOBAL, width),
        "bias": torch.randn(batch, 1, blocks, 1, GLOBAL + BLOCK),
    }  # fmt: skip


SHAPES = {"x": {0: torch.export.Dim.AUTO}, "g": {0: torch.export.Dim.AUTO}, "bias": {0: torch.export.Dim.AUTO}}
SPEC = f"softmax heads({HEADS}) width({WIDTH}) scale({SCALE}) add(load(bias0, b // 3, 0, b % 3, 0, k))"


def exported(model: nn.Module) -> onnx.ModelProto:
    written = io.BytesIO()
    torch.onnx.export(model, (), written, kwargs=example(), dynamic_shapes=SHAPES, dynamo=True, verbose=False)
    return onnx.load_from_string(written.getvalue())


def hosts(model: nn.Module) -> tuple[FxHost, OnnxHost]:
    captured = capture(model.eval(), example(), dynamic_shapes=SHAPES)
    return FxHost.from_captured(captured), OnnxHost.from_model(exported(model))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("scores", "values"), [("joined", "cut"), ("joined", "whole"), ("whole", "cut"), ("whole", "whole")])
def test_joined_keys_and_values_are_one_attention(scores, values):
    for host in hosts(GlobalAndLocal(scores=scores, values=values)):
        found = recognise(host.graph)
        assert not found.refusals, found.refusals
        (site,) = found.sites
        assert str(site.spec) == SPEC
        assert (site.size("q"), site.size("k"), site.size("h")) == (BLOCK, GLOBAL + BLOCK, HEADS)


@pytest.mark.parametrize(("scores", "values"), [("joined", "cut"), ("joined", "whole"), ("whole", "cut")])
def test_the_spec_says_what_the_model_computes(scores, values):
    model, given = GlobalAndLocal(scores=scores, values=values).eval(), example()
    q, k, v, far_k, far_v = (t.detach() for t in model.parts(given["x"], given["g"]))
    far_k, far_v = (t[:, :, None].expand(-1, -1, 3, -1, -1) for t in (far_k, far_v))

    def flat(t: Tensor) -> Tensor:
        return t.transpose(1, 2).flatten(0, 1)  # blocks are batch entries

    keys, values_ = (flat(torch.cat(parts, 3)) for parts in ((far_k, k), (far_v, v)))
    out = reference(SPEC, flat(q / SCALE), keys, values_, bias0=given["bias"])
    wanted = model.o(out.unflatten(0, (2, 3)).permute(0, 1, 3, 2, 4).reshape(given["x"].shape))
    torch.testing.assert_close(model(**given), wanted)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_exact_rewrite_computes_the_same(masked, bias):
    """Biases on all keys, and on a part of them alone."""
    model = GlobalAndLocal(masked=masked, bias=bias).eval()
    fast = attnopt.optimize(model, example(), select="always")
    assert fast.report.fused == 1
    for blocks_and_batch in ((3, 2), (3, 5)):
        given = example(*blocks_and_batch)
        torch.testing.assert_close(fast(**given), model(**given), rtol=1e-4, atol=1e-5)


def test_the_exact_rewrite_computes_the_same_in_onnx():
    fast = attnopt.optimize(exported(GlobalAndLocal().eval()), {k: v.numpy() for k, v in example().items()}, select="always")
    assert fast.report.fused == 1
    assert fast.report.difference.max_rel < 1e-5


def test_a_bias_of_one_part_is_zero_on_the_others():
    host = FxHost.from_captured(capture(GlobalAndLocal(bias=True, masked=False).eval(), example(), dynamic_shapes=SHAPES))
    (site,) = recognise(host.graph).sites
    added = f"add(where(k <= {GLOBAL - 1}, 0.0, -load(bias0, b // 3, 0, b % 3, 0, max(k - {GLOBAL}, 0) + {GLOBAL})))"
    assert str(site.spec) == SPEC.replace("add(load(bias0, b // 3, 0, b % 3, 0, k))", added)


@pytest.mark.exhaustive
def test_the_blocks_of_big_bird():
    """Queries of a block see the first block, their neighbours, random blocks and the last, each a product with a mask of its own."""
    config = transformers.BigBirdConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=100, block_size=4,
        attention_type="block_sparse", num_random_blocks=1, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.BigBirdModel(config, add_pooling_layer=False).eval()
    ids, mask = torch.randint(3, 90, (2, 48)), torch.ones(2, 48, dtype=torch.long)
    mask[1, -5:] = 0
    fast = attnopt.optimize(model, {"input_ids": ids, "attention_mask": mask}, select="always")
    assert (len(fast.report.sites), fast.report.fused) == (5, 5)
    assert not fast.report.refusals
    assert fast.report.difference.max_rel < 1e-5


NEAR_MISSES = {
    "another scale": ({"query": 0.5}, "the parts of the joined scores differ in scale"),
    "another query": ({"of": "another"}, "the joined scores are products of different queries"),
    "a mask of one part": ({"bias": "mask"}, "a part of the joined scores is masked or changed before it is joined"),
    "a scale after a bias": ({"bias": "scaled"}, "a part of the joined scores is masked or changed before it is joined"),
    "no sum": ({"sum": "mul"}, "pieces of the weights meet values of their own, and the products are not summed"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    how, reason = NEAR_MISSES[name]
    host = FxHost.from_captured(capture(GlobalAndLocal(**how).eval(), example(), dynamic_shapes=SHAPES))
    found = recognise(host.graph)
    assert not found.sites
    (refusal,) = found.refusals
    assert reason in refusal.reason
    assert refusal.remedy
