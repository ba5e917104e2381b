"""Whatever a user gives becomes a host with named inputs; calibration data are read, cut and checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hosts.onnx import small_models
from self_attention import SelfAttention, example
from torch import nn

from attnopt.errors import InputMismatch, UnreadableModel, UnsupportedFormat
from attnopt.opening import is_onnx, open_model, read_npz

SHAPE = ("batch", 4, "length", 8)


def opened(model, example_inputs=None, need_inputs=False):
    return open_model(model, example_inputs, dynamic_shapes=None, need_inputs=need_inputs)


def test_torch():
    given = opened(SelfAttention().eval(), example())
    assert (given.host.kind, given.runtime, given.opset, given.output_name) == ("torch", "torch", 0, "hidden")
    assert {name: tuple(x.shape) for name, x in given.inputs.items()} == {"x": (2, 6, 64), "seen": (2, 6)}
    assert sorted(given.symbols().values()) == [2, 6]


def test_onnx():
    arrays = {name: np.zeros((3, 4, 5, 8), np.float32) for name in "qkv"}
    given = opened(small_models.spelled_out(), arrays)
    assert (given.host.kind, given.runtime, given.opset, given.output_name) == ("onnx", "onnxruntime", 17, "y")
    assert given.symbols() == {"batch": 3, "length": 5}
    assert all(isinstance(x, torch.Tensor) for x in given.inputs.values())
    made = opened(small_models.spelled_out())  # inputs that the model's own shapes tell
    assert made.symbols() == {"batch": 2, "length": 16}


def test_which_host(tmp_path):
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    assert [is_onnx(m) for m in (nn.Linear(2, 2), program, program.module(), small_models.spelled_out())] == [False] * 3 + [True]
    assert [is_onnx(p) for p in ("a.onnx", tmp_path / "a.pt2")] == [True, False]
    (tmp_path / "a.txt").write_text("text")
    for model, error, says in (
        (tmp_path / "a.txt", UnsupportedFormat, "'a.txt' is neither .onnx nor .pt2"),
        (tmp_path / "b.txt", UnreadableModel, "there is no file"),
        ([], UnsupportedFormat, "a list is not a model"),
        (None, UnsupportedFormat, "a NoneType is not a model"),
    ):
        with pytest.raises(error, match=says):
            is_onnx(model)


def test_calibration_is_a_list_of_inputs():
    given = opened(small_models.spelled_out())
    one, two = ({name: torch.randn(1, 4, length, 8) for name in "qkv"} for length in (3, 4))
    assert given.batches(None) == []
    batches = given.batches([one, tuple(two.values())])
    assert [b["q"].shape[2] for b in batches] == [3, 4]
    torch.testing.assert_close(dict(batches[1]), two)
    for wrong in ([], one, torch.zeros(2), 3):
        with pytest.raises(InputMismatch, match="not a non-empty list") as raised:
            given.batches(wrong)
        assert raised.value.where == type(wrong).__name__
    with pytest.raises(InputMismatch, match="input 'v' is missing"):
        given.batches([one, {"q": one["q"], "k": one["k"]}])


def test_calibration_files_are_cut_into_samples(tmp_path):
    arrays = {name: np.random.default_rng(0).standard_normal((3, 4, 5, 8)).astype(np.float32) for name in "qkv"}
    np.savez(tmp_path / "data.npz", other=np.zeros(2), **arrays)
    batches = opened(small_models.spelled_out()).batches(tmp_path / "data.npz")
    assert [tuple(b["q"].shape) for b in batches] == [(1, 4, 5, 8)] * 3
    assert np.array_equal(np.concatenate([b["k"].numpy() for b in batches]), arrays["k"])
    read = read_npz(tmp_path / "data.npz", ["q"])
    assert [list(sample) for sample in read] == [["q"]] * 3
    np.savez(tmp_path / "none.npz", q=np.zeros((0, 2)))
    with pytest.raises(InputMismatch, match="number of samples"):
        read_npz(tmp_path / "none.npz", ["q"])
    with pytest.raises(InputMismatch, match="lacks v") as raised:
        read_npz(tmp_path / "none.npz", ["q", "v"])
    assert raised.value.next_move == "It holds q; the model reads q, v."
