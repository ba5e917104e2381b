"""Arrays in many forms reach the model; what is no array of numbers is told by name."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from hosts.onnx import small_models
from hosts.onnx.small_models import value
from onnx import TensorProto, helper

from attnopt.errors import InputMismatch
from attnopt.hosts.onnx import OnnxHost

A = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def add():
    node = helper.make_node("Add", ["a", "b"], ["y"])
    return OnnxHost.from_model(small_models.model([node], [value("a", ["n", 4]), value("b", ["n", 4])])).callable()


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "same",
    [
        A[::-1][::-1],
        np.ascontiguousarray(A[::-1])[::-1],
        A.astype(">f4"),
        np.asfortranarray(A),
        read_only(A),
        torch.from_numpy(A),
    ],
)
def test_forms_of_one_array(add, same):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (result,) = add(same, A)
    np.testing.assert_array_equal(result, A + A)


@pytest.mark.parametrize("given", [np.full((2, 4), "a"), [[1.0], [1.0, 2.0]], None, object()])
def test_what_is_no_array(add, given):
    with pytest.raises(InputMismatch, match=r"input 'a', .* is no array of numbers") as raised:
        add(given, A)
    assert raised.value.next_move == "The model takes a: float32 [any, 4]."


def test_position_and_name_together(add):
    for result in (add(A, b=A), add({"a": A}, b=A), add(a=A, b=A)):
        np.testing.assert_array_equal(result[0], A + A)
    with pytest.raises(InputMismatch, match="input 'a' is given twice"):
        add(A, a=A)
    with pytest.raises(InputMismatch, match="no input 'input 2'"):
        add(A, A, A)


def test_bfloat16_goes_in_and_comes_out_as_float32():
    proto = small_models.model([helper.make_node("Identity", ["x"], ["y"])], [value("x", [3], TensorProto.BFLOAT16)])
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
    (result,) = OnnxHost.from_model(proto).callable()(np.array([1.5, -2.0, 3e38], dtype=ml_dtypes.bfloat16))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, [1.5, -2.0, 3e38], rtol=1e-2)
