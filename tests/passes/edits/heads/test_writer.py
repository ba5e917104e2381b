"""Blocks written anew: equal where the maps change nothing, alike in both hosts, found again afterwards; what cannot change says why."""

from __future__ import annotations

import copy

import cached_step
import pytest
import torch
from shrunk_models import IDS, host, model, output, rewritten
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.passes.edits.heads.changes import HeadChanges, refuses_change
from attnopt.passes.edits.heads.head_map import HeadMap
from attnopt.passes.edits.heads.writer import write
from attnopt.plan.options.groups import Grouping


def bases(heads: int, width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(heads, width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[0]


def turned(group) -> HeadChanges:
    """Another basis in each head, for keys with their queries where no rotation stands between, and for values with the output."""
    block = group.blocks[0]
    heads, width = block.k.channels.shape
    repeats = len(block.q.channels) // heads
    basis = bases(heads, width)
    for_queries = HeadMap.of_bases(basis.repeat_interleave(repeats, 0))
    if block.rotary is not None:
        return HeadChanges(v=HeadMap.of_bases(basis), o=for_queries)
    return HeadChanges(for_queries, HeadMap.of_bases(basis), HeadMap.of_bases(basis), for_queries)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("family", ["packed", "turned"])
def test_an_orthogonal_basis_inside_a_head_changes_nothing(family, kind):
    given = host(family, kind)
    made = rewritten(given, lambda group: write(group, turned(group)))
    torch.testing.assert_close(output(made), output(given), atol=2e-5, rtol=2e-5)
    before, after = Grouping(given), Grouping(made)
    assert [s.name for s in after.sites] == [s.name for s in before.sites]
    assert [s.spec.with_(empty_row="mean") for s in after.sites] == [s.spec.with_(empty_row="mean") for s in before.sites]
    assert all(not b.missing and b.o is not None for b in after.blocks)


def test_in_float64_the_same_to_ten_digits():
    exact = FxHost.from_captured(capture(copy.deepcopy(model("packed")).double(), {"input_ids": IDS}))
    made = rewritten(exact, lambda group: write(group, turned(group)))
    assert float((output(made) - output(exact)).abs().max()) < 1e-10


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_cache_comes_and_goes_in_the_new_heads_and_past_rows_are_taken_in(kind):
    x, past = cached_step.example()
    free = torch.export.Dim.DYNAMIC
    dims = {"x": {0: free}, "past": ({0: free, 2: free}, {0: free, 2: free})}
    given = FxHost.from_captured(capture(cached_step.Step().eval(), (x, past), dims))
    given = OnnxHost.from_model(given.to_onnx()) if kind == "onnx" else given
    inputs = dict(zip([s.name for s in given.input_specs], (x, *past), strict=True))
    made = rewritten(given, lambda group: write(group, turned(group)), [0])
    wanted, got = given.runner()(inputs), made.runner()(inputs)
    torch.testing.assert_close(got[0], wanted[0], atol=1e-5, rtol=1e-5)
    basis = HeadMap.of_bases(bases(2, 8))
    for held, was in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(held, basis.past(was), atol=1e-5, rtol=1e-5)
    own = dict(zip([s.name for s in made.input_specs], (x, *(basis.past(p) for p in past)), strict=True))
    torch.testing.assert_close(made.runner()(own)[0], wanted[0], atol=1e-5, rtol=1e-5)


class Hidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids)[0]


class Low(nn.Module):
    """A linear layer with a low-rank update beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.a, self.b = layer, nn.Linear(32, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.b(self.a(x))


def test_a_layer_with_a_low_rank_update_is_refused():
    changed = copy.deepcopy(model("turned"))
    changed.attentions[0].v = Low(changed.attentions[0].v)
    found = FxHost.from_captured(capture(changed.eval(), {"input_ids": IDS}))
    first, second = Grouping(found).of("block")
    assert "values" in str(refuses_change(first)) and refuses_change(second) is None


def test_quantised_projections_are_refused():
    made = host("turned", "torch").copy()
    made.quantize_linears([b.v.node for b in Grouping(made).blocks[:1]])
    made.finish()
    assert "values" in str(refuses_change(Grouping(made).of("block")[0]))


def test_sparse_projections_are_refused_and_heads_of_zeros_are_none():
    changed = copy.deepcopy(model("turned"))
    with torch.no_grad():
        changed.attentions[0].v.weight.view(16, 8, 4)[..., :2] = 0
        changed.attentions[1].o.weight[:, :16] = 0
    first, second = Grouping(FxHost.from_captured(capture(changed, {"input_ids": IDS}))).of("block")
    assert "50% of the weights that make values are zero" in str(refuses_change(first)) and refuses_change(second) is None


def test_blocks_that_share_their_weights_share_the_new_ones():
    import transformers

    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=99, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    given = FxHost.from_captured(capture(Hidden(transformers.AlbertModel(config)).eval(), {"input_ids": IDS}))
    (group,) = Grouping(given).of("block")
    assert len(group.sites) == 2
    made = given.copy()
    write(Grouping(made).of("block")[0], turned(group))
    made.finish()
    torch.testing.assert_close(output(made), output(given), atol=1e-5, rtol=1e-5)
    (after,) = Grouping(made).of("block")
    assert len({b.v.weight for b in after.blocks}) == 1
