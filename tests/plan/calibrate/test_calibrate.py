"""A calibration from end to end on few points: what it measures, tells and keeps, and that an interrupt keeps what was there."""

from __future__ import annotations

import itertools

import pytest

from attnopt.cost.target import load_target
from attnopt.cost.target_file import measured_path
from attnopt.plan.calibrate import calibrate as module
from attnopt.plan.calibrate.calibrate import calibrate
from attnopt.plan.calibrate.linear_points import LinearPoint
from attnopt.plan.calibrate.point_grid import groups


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Some small lines, timed for a moment each."""
    small = [g for g in groups(kernels=("sdpa", "ort-mha")) if g[0].shape["q"] * g[0].shape["k"] <= 64 * 512]
    monkeypatch.setattr(module, "groups", lambda **_: itertools.islice(small, 8))
    monkeypatch.setattr(module, "linear_points", lambda: [LinearPoint("ort-linear", rows, 256, 688) for rows in range(1, 9)])
    monkeypatch.setattr(module, "share", lambda *_: 0)
    monkeypatch.setattr(module, "TUNED", ())
    monkeypatch.setattr(module, "EACH", 0.0005)
    monkeypatch.setattr(module, "RATE", 0.002)
    monkeypatch.setenv("ATTNOPT_CONFIG", str(tmp_path))
    return tmp_path


def test_it_measures_tells_and_keeps(few):
    told = []
    target, path = calibrate(said=lambda what, done: told.append((what, done)))
    assert path == measured_path()
    assert load_target("cpu")[0] == target
    assert target.measured
    assert target.peak["float32"] > 0
    assert {"ort-linear", "sdpa"} <= target.efficiencies.keys()
    assert [done for _, done in told] == sorted(done for _, done in told)
    assert told[0][0] == "products of float32" and told[-1] == ("fitting", 1.0)


def test_an_interrupt_keeps_what_was_there(few):
    measured_path().write_text("kind = 'cpu'\nmeasured = 'before'\n")

    def interrupting(what, done):
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(said=interrupting)
    assert load_target("cpu")[0].measured == "before"
    assert list(few.iterdir()) == [measured_path()]


def test_tiles_of_tvm(monkeypatch):
    told, asked = [], []
    monkeypatch.setattr(module, "tune", lambda spec, form: asked.append((str(spec), form.width)))
    monkeypatch.setattr(module, "missing", lambda: None)
    module.tuned(lambda what, done: told.append((what, done)))
    assert asked == [("softmax", 64), ("softmax causal", 64), ("softmax causal & window(256)", 64)]
    assert told[0] == ("tiles for softmax", 0.0)
    monkeypatch.setattr(module, "missing", lambda: "TVM is not installed")
    module.tuned(lambda what, done: asked.append(what))
    assert len(asked) == 3
