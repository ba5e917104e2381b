"""A planted sink, and tokens that copy its direction for a while, are named and timed."""

from __future__ import annotations

import pytest
import torch

from attnopt.analysis.sink_tokens import received_by, sink_tokens

LAYERS, TOKENS, WIDTH = 20, 12, 64


def planted(lives):
    """Hidden states of random directions; token 0 is large in layers 3 to 17, and others copy it in the layers given."""
    hidden = torch.randn(LAYERS + 1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    hidden[3:18, 0] = 40.0 * direction
    for token, layers in lives.items():
        hidden[list(layers), token] = 3.0 * direction
    return hidden


def test_lives_tell_what_a_token_is():
    found = sink_tokens(planted({4: range(6, 12), 7: [9], 9: range(3, 18)}))
    assert (found.primary, found.start, found.end) == (0, 3, 18)
    assert found.lives[4] == (6, 7, 8, 9, 10, 11)
    assert dict(found.kinds) == {4: "secondary", 7: "noise", 9: "primary"}
    assert (found.of("secondary"), found.protected) == ((4,), (0, 4, 9))


@pytest.mark.parametrize("cosine", [0.8, 0.9, 0.95])
def test_the_threshold_of_the_cosine_hardly_matters(cosine):
    assert sink_tokens(planted({4: range(6, 12)}), cosine=cosine).of("secondary") == (4,)


def test_layers_outside_of_the_sinks_life_do_not_count():
    assert 5 not in sink_tokens(planted({5: [0, 1, 2, 18, 19]})).lives


def test_scores_are_means_over_heads_and_later_queries():
    weights = torch.softmax(torch.zeros(2, 4, 4).masked_fill(~torch.ones(4, 4).tril().bool(), -torch.inf), -1)
    torch.testing.assert_close(received_by(weights)[0], torch.tensor((1 / 2 + 1 / 3 + 1 / 4) / 3, dtype=torch.float64))
    assert received_by(weights)[3] == 0.0
