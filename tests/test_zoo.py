"""The zoo's ground truth on small graphs, its counting, and recall and precision on a few real model types."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from zoo.lifted import counts
from zoo.measure import measured
from zoo.parts import with_answers
from zoo.shrink import small_config
from zoo.truth import Truth

from attnopt.errors import UntraceableModel
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.dims import Symbol
from attnopt.ir.spec import parse

X = torch.randn(2, 5, 16)
SMALL_TYPES = ("bert", "gpt_oss", "llama", "perceiver", "swin", "vit")


class Projected(nn.Module):
    """q, k, v of x, and what a subclass makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.experts = nn.Parameter(torch.randn(4, 16, 16))

    def scores(self, x: Tensor) -> Tensor:
        return self.q(x) @ self.k(x).transpose(1, 2)


class Attention(Projected):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.scores(x) * 0.25 + torch.ones(5, 5).triu(1) * -1e9, -1) @ self.v(x)


class ByHand(Projected):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x) / 4
        exponential = torch.exp(scores - scores.amax(-1, keepdim=True))
        return (exponential / exponential.sum(-1, keepdim=True)) @ self.v(x)


class ByLogarithm(Projected):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        return torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ self.v(x)


class Einsum(Projected):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 4)) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).tanh().mul(30.0).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)


class LatentQueries(Projected):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q(self.weight) @ self.k(x).transpose(1, 2), -1) @ self.v(x)


class PackedProbe(Projected):
    """One learned query pools the rows; its projections are cut from one weight."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.weight.chunk(2)
        queries = nn.functional.linear(self.experts[0, :1].expand(2, 1, 16), q)
        return torch.softmax(queries @ nn.functional.linear(x, k).transpose(1, 2), -1) @ self.v(x)


class Fused(Projected):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


class Cut(Projected):
    """The scores in two halves that are put together again, the weights cut apart again."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = torch.cat([q @ k[:, :2].transpose(1, 2), q @ k[:, 2:].transpose(1, 2)], -1)
        weights = scores.softmax(-1)
        return weights[..., :2] @ v[:, :2] + weights[..., 2:] @ v[:, 2:]


class Router(Projected):
    """Which expert a token takes: a softmax over a projection, then a product with what the experts computed."""

    def forward(self, x: Tensor) -> Tensor:
        share = torch.softmax(x @ self.weight[:, :4], -1)
        made = torch.einsum("bld,edf->blef", x, self.experts)
        return torch.einsum("ble,blef->blf", share, made)


class WeightSide(Projected):
    """A softmax of a weight mixes activations, but no activation chose the mixture."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.softmax(self.weight @ self.weight.T, -1)


class ConstantValues(Projected):
    """A codebook is read, not attended to."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.scores(x), -1) @ self.weight[:5]


class NoValues(Projected):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.scores(x), -1).sum(-1)


class StraightThrough(Projected):
    """Every query takes one key; the softmax is there for its gradient alone."""

    def forward(self, x: Tensor) -> Tensor:
        soft = torch.softmax(self.scores(x), -1)
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return (hard - soft.detach() + soft) @ self.v(x)


class NormBetween(Projected):
    """A layer between the product and the softmax: these are logits, not scores."""

    def forward(self, x: Tensor) -> Tensor:
        scores = nn.functional.layer_norm(self.scores(x), (5,))
        return torch.softmax(scores, -1) @ self.v(x)


def truth_of(model: nn.Module) -> Truth:
    torch.manual_seed(0)
    return Truth(FxHost.from_captured(capture(model, (X,))).module.graph)


@pytest.mark.parametrize("model", [Attention, ByHand, ByLogarithm, Einsum, LatentQueries, PackedProbe, Fused, Cut])
def test_attention_is_true(model):
    truth = truth_of(model())
    assert len(truth.softmaxes) == 1
    assert truth.all == truth.softmaxes


@pytest.mark.parametrize("model", [Router, WeightSide, ConstantValues, NoValues, NormBetween, StraightThrough])
def test_what_only_looks_like_attention_is_not(model):
    truth = truth_of(model())
    assert truth.softmaxes == ()
    assert len(truth.all) == 1


def test_the_softmax_by_hand_is_named_after_its_division():
    assert truth_of(ByHand()).softmaxes == ("div_1",)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("softmax scale(0.125)", (0, 0)),
        ("softmax scale(0.125) add(load(bias0, b, 0, row, k))", (0, 1)),
        ("softmax causal & window(6) & padding", (3, 0)),
        ("softmax causal & load(mask0, b, 0, row, k)", (1, 1)),
        ("softmax add(load(table, h, min(max(k - q, 0), 7)))", (1, 0)),
        ("softmax scale(load(scale0, b, h, 0, k)) document", (2, 0)),
        ("softmax add(load(bias0, 0, h, q // 2, k // 2) + 1.0) add(-1.0)", (0, 1)),
    ],
)
def test_lifted_terms_are_told_from_tensors(line, expected):
    assert counts(parse(line)) == expected


def test_a_bias_that_is_a_product_itself_counts_as_neither():
    spec = parse("softmax add(load(bias0, b, h, row, k)) add(load(bias1, b, 0, row, k)) causal")
    assert counts(spec, products=frozenset({"bias0"})) == (1, 1)


def test_a_table_is_an_expression_and_a_flattened_tensor_is_not():
    spec = parse("softmax add(load(bias0, q * 4 + k, h))")
    assert counts(spec, {"bias0": (9, 2)}, 16) == (1, 0)
    assert counts(spec, {"bias0": (16, 2)}, 16) == (0, 1)
    assert counts(spec, {"bias0": (Symbol(1, ("n", "n")), 2)}, Symbol(1, ("n", "n"))) == (0, 1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("model_type", SMALL_TYPES)
def test_every_attention_of_a_type_is_found_and_nothing_else(model_type):
    record = measured(model_type, "eager")
    assert record.error == ""
    assert record.truth > 0
    assert (record.covered, record.false) == (record.truth, 0)
    assert record.difference is not None and record.difference < 1e-4


def test_a_type_that_cannot_be_made_is_listed_with_its_error():
    record = measured("timm_wrapper", "eager")
    assert record.error.startswith("ImportError: ")
    assert (record.truth, record.covered) == (0, 0)


class Split(Projected):
    """The rows in chunks whose lengths are data: each attends to itself."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        lengths = (ends[1:] - ends[:-1]).tolist()
        parts = [self.scores(part).softmax(-1) @ self.v(part) for part in x.split(lengths, 1)]
        if (ends > 100).any():
            parts.append(x)
        repeated = torch.repeat_interleave(ends, ends).unique_consecutive()
        return torch.cat(parts, 1) + repeated[repeated > 2].sum() + torch.arange(ends[-1])[:, None]


def test_a_model_is_traced_along_the_path_of_its_example():
    model, inputs = Split(), {"x": X, "ends": torch.tensor([0, 2, 5])}
    with pytest.raises(UntraceableModel):
        capture(model, inputs)
    model = with_answers(Split())
    expected = model(**inputs)
    captured = capture(model, inputs)
    assert len(Truth(FxHost.from_captured(captured).module.graph).softmaxes) == 2
    assert torch.allclose(captured.program.module()(**inputs), expected)


def test_shrinking_keeps_what_an_inner_configuration_was_given():
    assert small_config("paligemma").text_config.num_key_value_heads == 1
