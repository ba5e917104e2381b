import pytest
import torch

import attnopt.operators  # noqa: F401
from attnopt.codegen.cache_pieces import Pieces, attend_pieces, pieces_of
from attnopt.errors import InputMismatch
from attnopt.ir.kv_cache import attend_cache
from attnopt.ir.reference import attend
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse
from attnopt.passes.edits.caches.rows import Rows
from attnopt.passes.edits.caches.state import Kept, clause

AKVQ = Kept(Rows(bits=2, group=32, scales="fp16", clip=0.8, turned=True), first=3, recent=8)
FORMS = {
    "first and recent, turned": AKVQ,
    "recent, turned": Kept(Rows(bits=4, group=32, scales="fp16", turned=True), recent=8),
    "first": Kept(Rows(bits=8), first=5),
    "turned alone": Kept(Rows(bits=2, turned=True)),
}


def inputs(form, length):
    """q, and k and v as such a cache holds them beside what they are."""
    torch.manual_seed(length)
    q, (k, v) = torch.randn(2, 4, 1, 32), (torch.randn(2, 2, length, 32) for _ in "kv")
    return q, k, v, form.packed(k), form.packed(v)


def spec_of(form, terms="scale(0.2)"):
    return parse(f"softmax {terms}").with_(cache=clause({"k": form, "v": form}))


def by_reference(line, q, cache):
    made = attend_cache(line, q, cache)
    return made.output, made.lse


@pytest.mark.parametrize("length", [2, 9, 11, 40])
@pytest.mark.parametrize("name", FORMS)
def test_pieces_are_the_attention_of_the_whole(name, length):
    """From caches that have not reached all their places to those with tokens in codes between."""
    spec, (q, k, v, *held) = spec_of(FORMS[name]), inputs(FORMS[name], length)
    pieces = pieces_of(spec)
    assert isinstance(pieces, Pieces)
    found = attend_pieces(by_reference, pieces, q, *held)
    torch.testing.assert_close(found, attend(spec, q, k, v).output, atol=2e-5, rtol=2e-5)
    if FORMS[name] is AKVQ:
        kernel = torch.ops.attnopt.tvm_pieces(q, *held, str(spec))
        torch.testing.assert_close(kernel, found, atol=2e-5, rtol=2e-5)


def test_it_is_not_the_attention_of_exact_tokens():
    spec, (q, k, v, *held) = spec_of(AKVQ), inputs(AKVQ, 40)
    exact = attend(parse("softmax scale(0.2)"), q, k, v).output
    assert (torch.ops.attnopt.tvm_pieces(q, *held, str(spec)) - exact).abs().max() > 0.05


def test_what_is_read():
    found = pieces_of(spec_of(AKVQ, "scale(0.2) offset(size(k) - size(q)) causal"))
    assert found == Pieces(
        "softmax scale(0.2) cache(k=int2, v=int2, group=32, scales=fp16)", "softmax scale(0.2)", 3, 8, ("k", "v")
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("softmax", "there is no cache"),
        ("softmax cache(k=int8, v=int8)", "all tokens are in codes"),
        ("softmax cache(k=int8, recent=4)", "keys or values are not in codes"),
        ("softmax cache(k=int8, v=int8, recent=size(k) // 2)", "which tokens are exact is no number of first and last ones"),
        ("softmax cache(k=int8, v=int8, k_bits=where(k < 4, 16, 8))", "which tokens are exact is no number of first and last ones"),
        ("softmax cache(k=int8, v=int8, recent=4, k_axis=channel)", "k_axis of the cache"),
        ("softmax cache(k=int8, v=int8, recent=4, outliers=0.1)", "outliers of the cache"),
        ("softmax causal cache(k=int8, v=int8, recent=4)", "the mask 'causal' reads positions, which a piece of a cache does not have"),
        ("sigmoid cache(k=int8, v=int8, recent=4)", "pieces are put together as a softmax of scaled products, and this has sigmoid"),
        ("softmax sink(0.5) cache(k=int8, v=int8, recent=4)", "pieces are put together as a softmax of scaled products, and this has sink"),
    ],
)  # fmt: skip
def test_refusals(line, reason):
    found = pieces_of(parse(line))
    assert isinstance(found, Refusal)
    assert found.reason == reason


def test_an_operator_is_given_all_that_a_cache_holds():
    q, _, _, k, v = inputs(AKVQ, 40)
    with pytest.raises(InputMismatch, match="of either side codes, scales, zeros and 2 of exact tokens"):
        torch.ops.attnopt.tvm_pieces(q, k[:3], v, str(spec_of(AKVQ)))
    with pytest.raises(InputMismatch, match="keys or values are not in codes"):
        torch.ops.attnopt.tvm_pieces(q, k, v, "softmax cache(k=int8, recent=8)")
