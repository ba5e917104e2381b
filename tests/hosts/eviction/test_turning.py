"""How live models turn queries: undone, and the mean of turns to come, in every layout of pairs."""

from __future__ import annotations

import pytest
import torch
import transformers

import attnopt
from attnopt.errors import AttnoptError
from attnopt.hosts.eviction.patches import active
from attnopt.hosts.eviction.session import Session
from attnopt.hosts.eviction.turning import function_of, reads
from attnopt.ir.eviction import Room
from attnopt.passes.kvcache.eviction import ExpectedAttention

IDS = torch.randint(2, 99, (2, 9), generator=torch.Generator().manual_seed(0))
SHARED = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32,
          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}  # fmt: skip
KINDS = {
    "halves": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHARED)),
    "neighbours": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SHARED)),
    "cosines once": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            head_dim=8,
            num_key_value_heads=4,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["full_attention"],
            **SHARED,
        )
    ),
    "by layer type": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(head_dim=8, num_key_value_heads=4, layer_types=["full_attention"], **SHARED)
    ),
    "first channels": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(partial_rotary_factor=0.5, **SHARED)),
    "first neighbours": lambda: transformers.GlmForCausalLM(transformers.GlmConfig(head_dim=8, num_key_value_heads=4, **SHARED)),
}


class Remembers(Session):
    def attended(self, layer, module, q, k, spec, first):
        self.q, self.module, self.plain = q, module, self.undone(module, q)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_turns_are_undone_and_foreseen(kind):
    model = KINDS[kind]().eval()
    with active(Remembers(ExpectedAttention(), Room(keep=0.5))) as session:
        model(IDS)
        q, plain = session.q, session.plain
        assert not torch.allclose(q, plain)
        factor = getattr(session.turning(session.module).module, "attention_scaling", 1.0)
        torch.testing.assert_close(q[:, :, 0], plain[:, :, 0] * factor)  # the first position turns nothing
        turn = session.future(session.module, 8)(3)
        assert turn.shape == (1, 1, 8, 8)
        # One query at each of the next three positions, turned by the model's own function.
        turning = session.turning(session.module)
        kinds = (turning.kind,) if turning.kind else ()
        cos, sin = turning.module(torch.zeros(1), torch.arange(9, 12)[None], *kinds)
        width = 8 if kind == "cosines once" else cos.shape[-1]
        x = torch.randn(1, 4, 1, 8)
        y = x.expand(1, 4, 3, 8)
        apply = function_of(session.module)
        part = apply(y[..., :width], y[..., :width], cos, sin)[0]
        wanted = torch.cat([part, y[..., width:]], -1).mean(2)
        torch.testing.assert_close((turn @ x.mT).squeeze(-1), wanted, atol=1e-5, rtol=1e-4)
        assert (kind == "by layer type") == (turning.kind == "full_attention")


def test_queries_without_a_turn_are_taken_as_they_are():
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, attn_implementation="eager")
    with active(Remembers(ExpectedAttention(), Room(keep=0.5))) as session:
        transformers.GPT2LMHeadModel(config).eval()(IDS)
    assert torch.equal(session.q, session.plain)
    assert session.future(session.module, 8) is None


def test_a_part_of_its_own_for_positions_is_refused():
    """DeepSeek caches what its keys are made from, which no policy knows."""
    config = transformers.DeepseekV3Config(
        **SHARED, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        first_k_dense_replace=1,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    with pytest.raises(AttnoptError, match="a cache of other rows than attention reads"), attnopt.cache("snapkv", 0.5, window=2):
        model(IDS)
    with pytest.raises(AttnoptError, match=r"DeepseekV3Attention .* a part of their own"):
        reads(model.model.layers[0].self_attn)
