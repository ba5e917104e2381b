"""A cache in codes is read by a kernel as it is stored, where there is one; elsewhere the codes are made floats before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rounded_steps import inputs_of, opened, rewritten, wanted

from attnopt.codegen.tvm.availability import missing
from attnopt.cost.target import load_target
from attnopt.passes import AkvqVl, Int2Cache, Int4Cache, Int8Cache, ZipCache
from attnopt.patterns import recognise
from attnopt.plan.choose import Chosen
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.site_reports import site_reports

METHODS = [
    (Int8Cache(), "int8", "tvm-decode"),
    (Int8Cache(), "int8 values", "tvm-decode"),
    (Int4Cache(group=4), "int4", "tvm-decode"),
    (Int2Cache(group=4), "2-bit", "tvm-decode"),
    (AkvqVl(recent=3, pivots=2, group=4), "2-bit pivots", "tvm-pieces"),
    (AkvqVl(recent=3, pivots=2, group=4), "2-bit pivots, folded", "tvm-pieces"),
]


def built(kind, rewrite, wish):
    host = opened(kind)
    group = Grouping(host, recognise(host.graph).sites).whole()[0]
    candidate = next(c for c in rewrite.propose(group, None) if c.kind == wish)
    runtime = "torch" if kind == "torch" else "onnxruntime"
    shop = Workshop(host, {}, load_target("cpu")[0], runtime, 0, host.graph.sizes(host.example_inputs()))
    move = Move(rewrite, group, candidate)
    return host, shop, move, shop.built([move])


def calls(host):
    return [str(n.target) for n in host.module.graph.nodes if n.op == "call_function" and "attnopt" in str(n.target)]


@pytest.mark.sampled(3)
@pytest.mark.skipif(missing() is not None, reason="TVM is not here")
@pytest.mark.parametrize(("rewrite", "wish", "kernel"), METHODS, ids=[f"{r.name} {w}" for r, w, _ in METHODS])
def test_the_kernel_reads_the_codes(rewrite, wish, kernel):
    host, shop, move, made = built("torch", rewrite, wish)
    assert calls(made) == [f"attnopt.{kernel.replace('-', '_')}.default"]
    output, *_ = made.runner()(made.adapt(inputs_of(host, past=9)))
    expected, *_ = wanted(move.candidate, past=9)
    torch.testing.assert_close(output, expected, atol=2e-4, rtol=2e-4)
    (site,) = move.group.sites
    (report,) = site_reports([Chosen(site, None, "as it was")], (move,), shop)
    assert report.kernel == kernel and "cache(" in report.after


@pytest.mark.skipif(missing() is not None, reason="TVM is not here")
@pytest.mark.parametrize("wish", ["50% salient", "4-bit blocks"])
def test_a_kernel_reads_blocks_and_says_what_their_tokens_were_given(wish):
    """Eleven steps beside the nodes that a plain graph has: outputs, codes and saliency, past blocks that fill."""
    rewrite = ZipCache(block=4)
    host, shop, move, made = built("torch", rewrite, wish)
    (report,) = site_reports([Chosen(*move.group.sites, None, "as it was")], (move,), shop)
    assert (report.kernel, report.why) == ("tvm-blocks", "reads the cache as it is stored")
    plain, _ = rewritten(rewrite, host, wish)
    assert calls(made) == ["attnopt.tvm_blocks.default"] and calls(plain) == []
    inputs = inputs_of(host, past=2)
    states = [made.adapt(inputs), plain.adapt(inputs)]
    tokens = next(i for i, s in enumerate(made.input_specs[1:]) if s.shape[-1] == 0)
    for _ in range(11):
        (output, *kept), (wanted, *others) = (run.runner()(x) for run, x in zip((made, plain), states, strict=True))
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
        for got, want in zip(kept, others, strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            if got.shape[2:] == (4, 1):  # saliency: what it is of tokens in full blocks nobody reads
                got, want = (x[:, :, 4 - kept[tokens].shape[2] % 4 :] for x in (got, want))
            torch.testing.assert_close(got.float(), want.float(), atol=1e-5, rtol=1e-5)
        first, *rest = (s.name for s in made.input_specs)
        states = [{first: output, **dict(zip(rest, kept, strict=True))} for _ in states]


def test_elsewhere_codes_are_read_before():
    host, shop, move, made = built("onnx", Int8Cache(), "int8")
    assert "attnopt" not in {n.domain for n in made.model.graph}
    assert shop.reads_stored(replace(move.group.sites[0], spec=move.group.sites[0].spec)) is None
    output, *_ = made.runner()(made.adapt(inputs_of(host, past=9)))
    torch.testing.assert_close(output, wanted(move.candidate, past=9)[0], atol=2e-6, rtol=2e-6)
