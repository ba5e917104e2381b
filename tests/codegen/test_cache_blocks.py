import pytest
import torch

import attnopt.operators  # noqa: F401
from attnopt.codegen.cache_blocks import BlockPieces, attend_blocks, blocks_of
from attnopt.errors import InputMismatch
from attnopt.ir.kv_cache import attend_cache, waiting_tokens
from attnopt.ir.reference import attend
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse
from attnopt.passes.edits.caches.blocks import Blocks

FORMS = {"two sets": Blocks(8, 4), "one set": Blocks(8, 8), "uneven": Blocks(10, 3)}


def held(blocks, length):
    """q, k and v [.., T, 32] with the state of such a cache in the step that reads the last of T tokens; the bits of each."""
    torch.manual_seed(length)
    q, (k, v) = torch.randn(2, 4, 1, 32), (torch.randn(2, 2, length, 32) for _ in "kv")
    full = (length - 1) // blocks.block * blocks.block
    ranks = torch.rand(2, 2, full // blocks.block, blocks.block).argsort(-1).flatten(2)
    sides = []
    for side, x in (("k", k), ("v", v)):
        parts = dict(zip(blocks.words(side), blocks.packed(side, x[:, :, : max(1, full)], ranks), strict=True))
        pad = max(0, blocks.block - length)
        parts |= {
            "tokens": x[..., :0].to(torch.uint8),
            "recent": torch.nn.functional.pad(x[:, :, -blocks.block :], (0, 0, pad, 0)),
        }
        sides.append([x for word, x in parts.items() if word != "saliency"])
    bits = torch.full((2, 2, length), 16.0)
    bits[:, :, :full] = torch.where(ranks < blocks.salient, 4.0, 2.0)
    return q, k, v, sides, bits.repeat_interleave(2, 1)


def spec_of(blocks, terms="scale(0.2)"):
    return parse(f"softmax {terms}").with_(cache=blocks.clause_of_kernels)


def by_reference(line, q, cache):
    made = attend_cache(line, q, cache)
    return made.output, made.lse


@pytest.mark.parametrize("length", [1, 8, 9, 10, 35])
@pytest.mark.parametrize("name", FORMS)
def test_blocks_are_the_attention_of_the_whole(name, length):
    blocks = FORMS[name]
    q, k, v, sides, bits = held(blocks, length)
    pieces = blocks_of(spec_of(blocks))
    assert isinstance(pieces, BlockPieces)
    found = attend_blocks(by_reference, pieces, q, *sides)
    waiting = length - (length - 1) // blocks.block * blocks.block
    wanted = attend(
        f"softmax scale(0.2) cache(k_axis=channel, block={blocks.block}, k_bits=load(bits, b, h, k), v_bits=load(bits, b, h, k), "
        f"recent={waiting}, scales=fp16, v_balance=root)", q, k, v, bits=bits,
    )  # fmt: skip
    torch.testing.assert_close(found[..., :32], wanted.output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(
        found[..., found.shape[3] - waiting :], wanted.weights[..., length - waiting :], atol=2e-5, rtol=2e-5
    )
    assert not found[..., 32 : 32 + max(0, blocks.block - length)].any()
    if name == "two sets":
        kernel = torch.ops.attnopt.tvm_blocks(q, *sides, str(spec_of(blocks)))
        torch.testing.assert_close(kernel, found, atol=2e-5, rtol=2e-5)


def test_how_many_tokens_wait():
    assert str(waiting_tokens(100)) == "size(k) - (size(k) - 1) // 100 * 100"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("softmax", "there is no cache"),
        ("softmax cache(k=int8, v=int8)", "tokens are not rounded a block at a time, keys by channel and values balanced"),
        ("softmax cache(k=int4, v=int4, k_axis=channel, block=8, v_balance=root)",
         "which tokens wait for a full block is not what recent= says"),
        ("softmax cache(k=int4, v=int4, k_axis=channel, block=8, v_balance=root, k_basis=hadamard)",
         "tokens are not rounded a block at a time, keys by channel and values balanced"),
        ("softmax window(9) cache(k=int4, v=int4, k_axis=channel, block=8, v_balance=root)",
         "the mask 'window(9)' reads positions, which a piece of a cache does not have"),
    ],
)  # fmt: skip
def test_refusals(line, reason):
    found = blocks_of(parse(line))
    assert isinstance(found, Refusal)
    assert found.reason == reason


def test_an_operator_is_given_all_that_a_cache_holds():
    q, _, _, (k, v), _ = held(FORMS["two sets"], 20)
    with pytest.raises(InputMismatch, match="one or two sets, the balance of values, 8 exact tokens"):
        torch.ops.attnopt.tvm_blocks(q, k, v[:-1], str(spec_of(FORMS["two sets"])))
    with pytest.raises(InputMismatch, match="tokens are not rounded a block at a time"):
        torch.ops.attnopt.tvm_blocks(q, k, v, "softmax cache(k=int8, v=int8)")
