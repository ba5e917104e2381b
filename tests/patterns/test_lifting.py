"""Masks and biases of real models as expressions, each proved equal to the tensor that it stands for."""

from __future__ import annotations

import functools

import hf_models
import lifted
import onnx_exports
import pytest
import torch
from spelling import B, L, Recorder

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.dims import symbol
from attnopt.patterns import recognise

SPECS = {
    "bert": {"padding"},
    "gpt2": {"causal & padding"},
    "llama": {"causal & padding"},
    "mistral": {"causal & window(6) & padding"},
    "t5": {"padding", "causal", "bucket(8, 2.7725887298583984)", "causal_bucket(16, 2.079441547393799)"},
}


@functools.cache
def traced(family: str, attention: str) -> FxHost:
    return FxHost.from_captured(capture(hf_models.build(family, attention), hf_models.inputs(family)))


@functools.cache
def exported(family: str, attention: str, exporter: str) -> OnnxHost:
    return OnnxHost.from_model(onnx_exports.export(family, attention, exporter))


def words(sites) -> set[str]:
    return {part for site in sites for part in [str(site.spec.mask), *map(str, site.spec.biases)]}


def require_said(family: str, sites) -> None:
    assert all(map(lifted.is_lifted, sites))
    said = words(sites)
    assert all(any(wanted in text for text in said) for wanted in SPECS[family]), said


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "attention"), hf_models.CASES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_torch_models(family, attention, padding):
    host = traced(family, attention)
    sites = recognise(host.graph).sites
    require_said(family, sites)
    given = hf_models.inputs(family, padding=padding, batch=3, length=9)
    lifted.check(host, sites, host.named_inputs({n: x for n, x in given.items() if isinstance(x, torch.Tensor)}))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "attention", "exporter"), onnx_exports.CASES)
def test_onnx_models(family, attention, exporter):
    host = exported(family, attention, exporter)
    sites = recognise(host.graph).sites
    require_said(family, sites)
    for padding in ("left", "right"):
        given = onnx_exports.tensors(hf_models.inputs(family, padding=padding, batch=3, length=9))
        lifted.check(host, sites, host.named_inputs(given))


# By hand.


def attention(r: Recorder, *, mask=None, bias=None):
    """Scores of [B, 4, L, 8] with a bool mask or a bias, in a small graph; the one spec that is found."""
    x = r.input("x", B, L, 32)
    q, k, v = (r.permute(r.reshape(r.linear(x, 32), B, L, 4, 8), 0, 2, 1, 3) for _ in range(3))
    s = r.matmul(q, r.permute(k, 0, 1, 3, 2))
    s = s if bias is None else r.binary("add", s, bias)
    s = s if mask is None else r.where(mask, s, float("-inf"))
    r.output(r.matmul(r.softmax(s), v))
    found = recognise(r.graph)
    assert not found.refusals, found.refusals
    return str(found.sites[0].spec).removeprefix("softmax heads(4) width(8)").removesuffix(" empty(zero)").strip()


def rows_and_columns(r: Recorder):
    counted = r.node("iota", shape=(L,), dtype="int64", start=0, step=1)
    return r.reshape(counted, L, 1), r.reshape(counted, 1, L)


def test_a_stored_causal_buffer():
    r = Recorder()
    buffer = r.constant(torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64))
    cut = r.node("slice", buffer, shape=(1, 1, L, 64), dtype="bool", axis=2, start=0, stop=None, step=1)
    cut = r.node("slice", cut, shape=(1, 1, L, L), dtype="bool", axis=3, start=0, stop=None, step=1)
    assert attention(r, mask=cut) == "causal"


def test_a_stored_buffer_with_one_wrong_element_stays_a_tensor():
    r = Recorder()
    data = torch.ones(64, 64, dtype=torch.bool).tril()
    data[40, 50] = True
    cut = r.node("slice", r.constant(data), shape=(L, 64), dtype="bool", axis=0, start=0, stop=None, step=1)
    cut = r.node("slice", cut, shape=(L, L), dtype="bool", axis=1, start=0, stop=None, step=1)
    assert attention(r, mask=cut) == "load(mask0, row, k)"


def test_a_bias_under_a_finite_fill_is_added_once():
    """where(c, lowest, bias) beside a mask of minus infinity: the fill alone, and the bias."""
    r = Recorder()
    rows, columns = rows_and_columns(r)
    padded, slopes = r.input("padded", B, 1, 1, L, dtype="bool"), r.input("bias", 1, 4, 1, L)
    hidden = r.where(r.binary("le", columns, rows, dtype="bool"), 0.0, float("-inf"))
    filled = r.where(padded, torch.finfo(torch.float32).min, slopes)
    said = attention(r, bias=r.binary("add", filled, hidden))
    assert said.count("load(bias1") + said.count("load(bias0") == 2, said
    assert "add(where(" in said and ", 0.0))" in said and said.endswith("causal"), said


def test_a_triangle_of_minus_infinity():
    r = Recorder()
    hidden = r.node("triangle", r.node("full", shape=(L, L), value=float("-inf")), shape=(L, L), diagonal=1, upper=True)
    assert attention(r, bias=hidden) == "causal"


def test_a_stored_alibi_table():
    r = Recorder()
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    apart = torch.arange(64)[None] - torch.arange(64)[:, None]
    table = r.constant(slopes[:, None, None] * apart)
    cut = r.node("slice", table, shape=(4, L, 64), axis=1, start=0, stop=None, step=1)
    cut = r.node("slice", cut, shape=(4, L, L), axis=2, start=0, stop=None, step=1)
    assert attention(r, bias=cut) == "add(alibi)"


def test_alibi_from_positions():
    r = Recorder()
    rows, columns = rows_and_columns(r)
    apart = r.unary("cast", r.binary("sub", columns, rows, dtype="int64"), "float32")
    slopes = r.constant(torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(4, 1, 1))
    assert attention(r, bias=r.binary("mul", slopes, apart)) == "add(alibi)"


def test_shifted_windows():
    """0 inside of a region, -100 across: an additive term, said by labels."""
    r = Recorder()
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 3])
    table = torch.where(labels[:, None] == labels[None], 0.0, -100.0)
    x = r.input("x", B, 8, 32)
    q, k, v = (r.permute(r.reshape(r.linear(x, 32), B, 8, 4, 8), 0, 2, 1, 3) for _ in range(3))
    s = r.binary("add", r.matmul(q, r.permute(k, 0, 1, 3, 2)), r.constant(table))
    r.output(r.matmul(r.softmax(s), v))
    (site,) = recognise(r.graph).sites
    assert str(site.spec.biases[0]) == "where(load(bias0, row) == load(bias0, k), 0.0, -100.0)"
    assert torch.equal(site.operands["bias0"].value.load(), torch.tensor([0, 0, 2, 2, 4, 4, 0, 7]))


def test_a_table_of_two_dimensional_distances():
    r = Recorder()
    i = torch.arange(12)
    index = (i[:, None] // 4 - i[None] // 4) * 7 + (i[:, None] % 4 - i[None] % 4) + 17
    x = r.input("x", B, 12, 32)
    q, k, v = (r.permute(r.reshape(r.linear(x, 32), B, 12, 4, 8), 0, 2, 1, 3) for _ in range(3))
    chosen = r.node("gather", r.constant(torch.randn(35, 4)), r.constant(index), shape=(12, 12, 4), axis=0)
    s = r.binary("add", r.matmul(q, r.permute(k, 0, 1, 3, 2)), r.permute(chosen, 2, 0, 1))
    r.output(r.matmul(r.softmax(s), v))
    (site,) = recognise(r.graph).sites
    assert lifted.is_lifted(site)
    said = str(site.spec.biases[0])
    assert said.startswith("load(bias0, ") and all(part in said for part in ("q // 4", "k // 4", "q % 4", "k % 4"))


def test_documents_and_prefixes():
    r = Recorder()
    ids = r.input("ids", B, L, dtype="int64")
    same = r.binary("eq", r.reshape(ids, B, L, 1), r.reshape(ids, B, 1, L), dtype="bool")
    assert attention(r, mask=r.reshape(same, B, 1, L, L)) == "document"
    r = Recorder()
    prefix = r.input("prefix", B, dtype="int64")
    _, columns = rows_and_columns(r)
    inside = r.binary("lt", columns, r.reshape(prefix, B, 1), dtype="bool")
    assert attention(r, mask=r.reshape(inside, B, 1, 1, L)) == "padding"


def packed(r: Recorder, positions, before):
    """transformers' documents of packed rows: positions [B, L] that do not follow the last one, counted; before: what stands ahead."""
    joined = r.node("concat", before, positions, shape=(B, symbol("length + 1")), dtype="int64", axis=1)
    ahead = r.node("slice", joined, shape=(B, L), dtype="int64", axis=1, start=1, stop=None, step=1)
    behind = r.node("slice", joined, shape=(B, L), dtype="int64", axis=1, start=0, stop=-1, step=1)
    jumps = r.binary("ne", r.binary("sub", ahead, behind, dtype="int64"), 1, dtype="bool")
    ids = r.node("cumsum", r.unary("cast", jumps, dtype="int64"), shape=(B, L), dtype="int64", axis=1)
    return r.binary("eq", r.reshape(ids, B, 1, L, 1), r.reshape(ids, B, 1, 1, L), dtype="bool")


@pytest.mark.parametrize(
    ("start", "step", "ahead", "said"),
    [(0, 1, -1, ""), (5, 1, -1, ""), (0, 1, -2, "document"), (0, 2, -1, "document"), (0, 1, None, "document")],
)
def test_documents_of_positions_that_only_count_are_one(start, step, ahead, said):
    """torch.diff(arange, prepend=arange[:1] - 1) != 1 is false in every place. ahead: of the first position; None: an input."""
    r = Recorder()
    counted = r.expand(r.reshape(r.node("iota", shape=(L,), dtype="int64", start=start, step=step), 1, L), B, L)
    first = r.node("slice", counted, shape=(B, 1), dtype="int64", axis=1, start=0, stop=1, step=1)
    before = r.input("first", B, 1, dtype="int64") if ahead is None else r.binary("add", first, ahead, dtype="int64")
    assert attention(r, mask=packed(r, counted, before)) == said


def test_documents_of_positions_that_are_given_are_read():
    r = Recorder()
    given = r.input("positions", B, L, dtype="int64")
    first = r.node("slice", given, shape=(B, 1), dtype="int64", axis=1, start=0, stop=1, step=1)
    assert attention(r, mask=packed(r, given, r.binary("sub", first, 1, dtype="int64"))) == "document"


def test_chunks_and_both_sided_windows():
    r = Recorder()
    rows, columns = rows_and_columns(r)
    chunks = [r.binary("floordiv", x, r.constant(8), dtype="int64") for x in (rows, columns)]
    assert attention(r, mask=r.binary("eq", *chunks, dtype="bool")) == "chunk(8)"
    r = Recorder()
    rows, columns = rows_and_columns(r)
    near = r.binary("le", r.unary("abs", r.binary("sub", rows, columns, dtype="int64")), r.constant(5), dtype="bool")
    assert attention(r, mask=near) == "window(6) & lookahead(6)"


def test_a_condition_that_the_mask_has_already_is_said_once():
    """GPT-Neo: its own causal buffer fills the scores, and the mask that is added is causal once more."""
    r = Recorder()
    seen = r.input("seen", B, 1, 1, L, dtype="bool")
    rows, columns = rows_and_columns(r)
    causal = r.binary("le", columns, rows, dtype="bool")
    both = r.binary("and", r.reshape(causal, 1, 1, L, L), seen, dtype="bool")
    lowest = -3.4028234663852886e38
    said = attention(r, mask=r.reshape(causal, 1, 1, L, L), bias=r.where(both, 0.0, lowest))
    assert said == f"add(where(load(bias0, b, k), 0.0, {lowest!r})) causal"


def test_a_large_additive_number_is_no_mask():
    r = Recorder()
    seen = r.input("seen", B, 1, 1, L, dtype="bool")
    bias = r.where(seen, 0.0, -10000.0)
    assert attention(r, bias=bias) == "add(where(load(bias0, b, k), 0.0, -10000.0))"


def test_a_float_mask_that_may_hold_anything_is_no_mask():
    r = Recorder()
    given = r.input("given", B, 1, 1, L)
    bias = r.binary("mul", r.binary("sub", 1.0, given), -3.4028234663852886e38)
    assert attention(r, bias=bias) == "add((1.0 - load(bias0, b, 0, 0, k)) * -3.4028234663852886e+38)"


def test_two_finite_fills_add_up_so_one_stays_a_bias():
    lowest = -3.4028234663852886e38
    r = Recorder()
    seen = r.input("seen", B, 1, 1, L, dtype="bool")
    rows, columns = rows_and_columns(r)
    causal = r.where(r.binary("le", columns, rows, dtype="bool"), 0.0, lowest)
    both = r.binary("add", causal, r.where(seen, 0.0, lowest))
    assert attention(r, bias=both) == f"add(where(load(bias0, b, k), 0.0, {lowest!r})) causal"
