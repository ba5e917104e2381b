"""Five families of Hugging Face, eager and SDPA, through torch and through ONNX exporters: every attention found and replaced,
none invented, and the same outputs at other sizes, padded left, right or not at all."""

from __future__ import annotations

import hf_models
import onnx
import pytest
import torch
from hf_models import ATTENTIONS, build, inputs, visible_rows
from onnx_exports import CASES, export, tensors

import attnopt

SIZES = [(padding, batch, length) for padding in ("left", "right", "none") for batch, length in ((2, 12), (3, 9), (1, 5))]


def require_all_replaced(report, family):
    assert len(report.sites) == report.fused == ATTENTIONS[family]
    assert report.refusals == ()
    assert report.difference.max_rel <= 1e-4


def require_equal_outputs(family, model, first_output):
    """`first_output` maps named inputs to what the optimised model returns first."""
    for padding, batch, length in SIZES:
        named = inputs(family, padding, batch, length)
        with torch.no_grad():
            wanted = model(**named)[0]
        rows = visible_rows(family, named, wanted)
        torch.testing.assert_close(first_output(named)[rows], wanted[rows], atol=1e-4, rtol=1e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "attention"), hf_models.CASES)
def test_through_torch(family, attention):
    model = build(family, attention)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    fast = attnopt.optimize(model, inputs(family), select="always")
    require_all_replaced(fast.report, family)
    require_equal_outputs(family, model, lambda named: fast(**named)[0])
    named = inputs(family)
    assert type(fast(**named)) is type(model(**named))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("family", "attention", "exporter"), CASES)
def test_through_onnx(family, attention, exporter, tmp_path):
    proto = export(family, attention, exporter)
    before = proto.SerializeToString()
    fast = attnopt.optimize(proto, select="always")
    require_all_replaced(fast.report, family)
    require_equal_outputs(family, build(family, attention), lambda named: torch.from_numpy(fast(tensors(named))[0]))
    written = onnx.load(fast.export(tmp_path / "fast.onnx"))
    windowed = any(site.kernel == "local-attention" for site in fast.report.sites)  # chunk by chunk, in standard operators
    assert windowed or "Softmax" not in {node.op_type for node in written.graph.node}
    assert [o.name for o in written.graph.output] == [o.name for o in proto.graph.output]
    assert proto.SerializeToString() == before
    onnx.checker.check_model(proto)
