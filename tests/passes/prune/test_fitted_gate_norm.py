"""Gate-Norm's removal of several layers of a trained model, and the layers that follow fitted in order to make up for them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.hosts.fx import FxHost, capture
from attnopt.passes import GateNorm
from attnopt.plan.options.groups import Grouping

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples"))
import trained_models


@pytest.mark.exhaustive
def test_several_layers_are_fitted_in_order_and_lose_less():
    model, windows = trained_models.code_lm(), trained_models.code_windows(24, 128)
    judged, seen = windows[:4, :64], windows[4:]
    host = FxHost.from_captured(capture(model, {"input_ids": judged}))
    (group,) = Grouping(host).of("model")
    evidence = Evidence(host, Calibration.of(host.graph, [{"input_ids": seen}]), sites=Grouping(host).sites)
    rewrite = GateNorm(per_head=True)
    *_, plain, twin = rewrite.propose(group, evidence)
    assert twin.kind == f"{plain.kind}, fitted" and twin.needs == "tuning" and len(twin.options["sites"]) > 1
    assert len(twin.nodes) == len(twin.options["sites"])
    arrays = rewrite.arrays(twin, group, evidence)
    alone = {name: held for name, held in arrays.items() if name == twin.nodes[0].name}  # the others as they were
    as_was = {n.name: {"weight": n.inputs[1].load()} for n in twin.nodes}
    wanted, lost = host.runner()({"input_ids": judged})[0].log_softmax(-1), []
    for candidate in (plain, replace(twin, arrays=as_was | alone), replace(twin, arrays=arrays)):
        made = host.copy()
        rewrite.apply(candidate, Grouping(made).of("model")[0])
        made.finish()
        got = made.runner()({"input_ids": judged})[0].log_softmax(-1)
        lost.append(float((wanted.exp() * (wanted - got)).sum(-1).mean()))
    assert lost[2] < lost[1] < lost[0] and lost[2] < 0.5 * lost[0]
