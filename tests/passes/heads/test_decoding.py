"""Decoders with fewer heads: a step with its cache gives, token for token, what the same model gives run without one."""

from __future__ import annotations

import hf_models
import pytest
import torch
from decoding_models import named, past_of, step_of
from shrunk_models import IDS, rewritten
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.site import Refusal
from attnopt.passes import MeanPooling
from attnopt.passes.edits.heads.changes import refuses_change
from attnopt.passes.edits.heads.writer import write
from attnopt.passes.heads.prune_heads import pruned
from attnopt.plan.options.groups import Grouping


class Whole(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def smaller(group):
    """Without key head 0 and its queries, or where there is one cache head too few, all pooled."""
    kept = range(1, len(group.blocks[0].k.channels))
    return write(group, pruned(group.blocks[0], kept))


def pooled(group):
    rewrite = MeanPooling(groups=(1,))
    return rewrite.apply(rewrite.propose(group, None)[0], group)


@pytest.mark.parametrize(
    ("family", "kind", "change"), [("gpt2", "torch", smaller), ("gpt2", "onnx", pooled), ("llama", "torch", smaller)]
)
def test_a_decoder_with_fewer_heads_goes_on_with_its_cache_token_for_token(family, kind, change):
    language = hf_models.build(family, "sdpa")
    step = step_of(language, IDS[:, :4], kind)
    assert not any(isinstance(refuses_change(g, norms=""), Refusal) for g in Grouping(step).of("block"))
    made = rewritten(step, change)
    whole = rewritten(FxHost.from_captured(capture(Whole(language), (IDS,))), change)
    wanted = whole.runner()(dict(zip([s.name for s in whole.input_specs], (IDS,), strict=True)))[0]
    state = made.adapt(named(step, IDS[:, :1], tuple((k[:, :, :0], v[:, :, :0]) for k, v in past_of(language, IDS[:, :1]))))
    names, run = list(state), made.runner()
    for at in range(IDS.shape[1]):
        logits, *past = run(state)
        torch.testing.assert_close(logits[:, 0], wanted[:, at], atol=2e-4, rtol=2e-4)
        assert torch.equal(logits[:, 0].argmax(-1), wanted[:, at].argmax(-1))
        state = dict(zip(names, (IDS[:, at + 1 : at + 2], *past), strict=True))
