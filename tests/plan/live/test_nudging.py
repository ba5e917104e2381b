"""A model beside itself, its inputs moved by a millionth: a little apart where nothing is rounded, and none where only tokens go in."""

from __future__ import annotations

import torch
from live_models import language_model, tokens

from attnopt.plan.live.nudging import NUDGE, nudged


def test_without_codes_a_nudge_stays_one():
    model, inputs = language_model("llama"), tokens()
    with torch.no_grad():
        wanted = model(**inputs, use_cache=False).logits
    (got,) = nudged(model, inputs)
    apart = float((got - wanted).norm() / wanted.norm())
    assert NUDGE / 10 < apart < 100 * NUDGE
    assert torch.equal(got, nudged(model, inputs)[0])


def test_a_model_that_takes_only_tokens_has_none():
    class Embeds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(8, 4)

        def get_input_embeddings(self):
            return self.table

        def forward(self, input_ids):
            return self.table(input_ids)

    assert nudged(Embeds(), {"input_ids": torch.tensor([[1, 2]])}) is None
