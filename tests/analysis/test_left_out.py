"""What a form leaves out is what the weights of the attention say of the pairs that it hides; halves add up to the whole."""

from __future__ import annotations

import torch
from ir.operands import close
from self_attention import SelfAttention

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.reference import attend
from attnopt.passes.sparsity import changed
from attnopt.patterns import recognise


def forms(site):
    clauses = ("window(3)", "k >= 0", "block_topk(4, 2)")
    return [changed(site.spec, clause) for clause in clauses]


def test_what_a_form_leaves_out():
    model = SelfAttention().eval()
    host = FxHost.from_captured(capture(model, (torch.randn(2, 20, 64),)))
    sites = recognise(host.graph).sites
    batches = [{"x": torch.randn(2, 20, 64)} for _ in range(2)]
    evidence = Evidence(host, Calibration.of(host.graph, batches), sites=sites)
    window, whole, blocks = evidence.left_out(sites[0], "test", forms)
    assert (whole.mean, whole.worst, whole.kept) == (0.0, 0.0, 1.0)
    dropped = torch.zeros(4, dtype=torch.float64)
    pairs = torch.zeros(2)
    worst = 0.0
    for batch in batches:
        q, k, v = (layer(batch["x"]).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (model.q, model.k, model.v))
        weights = attend("softmax scale(0.25)", q, k, v).weights.double()
        place = torch.arange(20)
        far = (place[:, None] - place >= 3).expand_as(weights)
        dropped += (weights * far).sum(-1).mean(2).sum(0) / 4
        worst = max(worst, float((weights * far).sum(-1).max()))
        pairs += torch.tensor([float(((weights > 0) & ~far).sum()), float((weights > 0).sum())])
    close(window.dropped, dropped, 1e-6)
    assert abs(window.worst - worst) < 1e-6
    assert abs(window.kept - float(pairs[0] / pairs[1])) < 1e-6
    assert window.bound == 2 * float(window.dropped.max()) * window.largest
    assert 0 < blocks.mean < blocks.worst < 1
    assert evidence.left_out(sites[0], "test", forms)[0] is window  # measured once
    assert evidence.longest(sites[0]) == 20
    assert Evidence(host, sites=sites).left_out(sites[0], "test", forms) is None
