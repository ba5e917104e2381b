"""Calibration data: what is taken, what is refused and why, and halves that share no sample."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from attnopt.analysis.calibration import MOST, Calibration, batch_dims, check_values, read_calibration, read_npz
from attnopt.errors import InputMismatch
from attnopt.hosts.onnx.inputs import InputSpec, named_inputs
from attnopt.ir.dims import symbol
from attnopt.ir.graph import Graph, Value

SPECS = [InputSpec("x", (None, 3), torch.float32), InputSpec("attention_mask", (None, 3), torch.float32)]
NAMES = [s.name for s in SPECS]


def read(given):
    return read_calibration(given, NAMES, lambda batch: named_inputs(SPECS, batch))


def batch(count=2, value=1.0):
    return {name: torch.full((count, 3), value) for name in NAMES}


def graph(**shapes):
    named = {name: tuple(symbol(d) if isinstance(d, str) else d for d in shape) for name, shape in shapes.items()}
    return Graph(inputs=[Value(name, shape, "float32") for name, shape in named.items()])


def counted(sizes, **shapes):
    """Calibration of batches of these sizes; x holds the number of each sample."""
    numbers = torch.arange(sum(sizes), dtype=torch.float32).split(list(sizes))
    batches = [{"x": n[:, None].expand(-1, 3).clone(), "table": torch.zeros(5, 2)} for n in numbers]
    return Calibration.of(graph(**(shapes or {"x": ("batch", 3), "table": (1, 2)})), batches)


def test_lists_tuples_loaders_and_generators_read_alike():
    x, mask = torch.randn(4, 3), torch.ones(4, 3)
    wanted = read([{"x": x[:2], "attention_mask": mask[:2]}, {"x": x[2:], "attention_mask": mask[2:]}])
    as_tuples = read(((x[:2], mask[:2]), [x[2:], mask[2:]]))
    as_loader = read(DataLoader(TensorDataset(x, mask), batch_size=2))
    as_arrays = read({"x": x[i : i + 2].numpy(), "attention_mask": mask[i : i + 2].numpy()} for i in (0, 2))
    for other in (as_tuples, as_loader, as_arrays):
        assert len(other) == 2
        for a, b in zip(wanted, other, strict=True):
            torch.testing.assert_close(a, b)


def test_an_iterable_without_end_is_cut():
    def forever():
        while True:
            yield batch(1)

    assert len(read(forever())) == MOST


@pytest.mark.parametrize("given", [[], batch(), torch.zeros(2, 3), np.zeros(3), 3])
def test_what_is_no_list_of_inputs(given):
    with pytest.raises(InputMismatch, match="not a non-empty list") as raised:
        read(given)
    assert raised.value.where == type(given).__name__
    assert "DataLoader" in raised.value.next_move


@pytest.mark.parametrize(
    ("changes", "message", "where"),
    [
        ({"y": torch.zeros(2, 3)}, "the model has no input 'y'", "calibration batch 1"),
        ({"x": torch.zeros(2, 4)}, r"input 'x' is float32\[2, 4\]", "calibration batch 1"),
        ({"x": torch.zeros(2, 3).double()}, r"input 'x' is float64\[2, 3\]", "calibration batch 1"),
        (
            {"x": torch.tensor([[1.0, 2.0, float("nan")]])},
            "input 'x' holds 1 values that are NaN",
            "batch 1, the first at .0, 2.",
        ),
        ({"x": torch.full((1, 3), -torch.inf)}, "input 'x' holds 3 values that are NaN or infinite", "calibration batch 1"),
        ({"attention_mask": torch.full((1, 3), torch.inf)}, "input 'attention_mask' holds 3", "calibration batch 1"),
        ({"x": torch.zeros(0, 3)}, "input 'x' is empty", "calibration batch 1"),
        ({"attention_mask": None}, "input 'attention_mask' is missing", "calibration batch 1"),
    ],
)
def test_a_wrong_batch_is_named(changes, message, where):
    with pytest.raises(InputMismatch, match=message) as raised:
        read([batch(), {name: x for name, x in {**batch(), **changes}.items() if x is not None}])
    assert raised.value.where.startswith("calibration batch 1")
    assert re.search(where, raised.value.where)
    assert raised.value.next_move


def test_a_mask_may_hide_with_minus_infinity():
    check_values({"attention_mask": torch.tensor([0.0, -torch.inf]), "bias": torch.tensor([-torch.inf])})


def test_files_are_cut_into_samples(tmp_path):
    arrays = {name: np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32) for name in NAMES}
    np.savez(tmp_path / "data.npz", other=np.zeros(2), **arrays)
    batches = read(tmp_path / "data.npz")
    assert [tuple(b["x"].shape) for b in batches] == [(1, 3)] * 3
    assert np.array_equal(np.concatenate([b["x"].numpy() for b in batches]), arrays["x"])
    assert [list(sample) for sample in read_npz(tmp_path / "data.npz", ["x"])] == [["x"]] * 3


def test_files_that_are_none(tmp_path):
    np.savez(tmp_path / "none.npz", q=np.zeros((0, 2)))
    (tmp_path / "text.npz").write_text("text")
    for name, wanted, message in (
        ("none.npz", ["q"], "number of samples"),
        ("text.npz", ["q"], "cannot read calibration data"),
        ("missing.npz", ["q"], "cannot read calibration data"),
    ):
        with pytest.raises(InputMismatch, match=message):
            read_npz(tmp_path / name, wanted)
    with pytest.raises(InputMismatch, match="lacks v") as raised:
        read_npz(tmp_path / "none.npz", ["q", "v"])
    assert raised.value.next_move == "It holds q; the model reads q, v."


@pytest.mark.parametrize(
    ("shapes", "dims"),
    [
        ({"x": ("b", 3), "mask": ("b", "l")}, {"b"}),
        ({"x": ("b", 3), "table": (1, 4), "positions": ("l",)}, {"b"}),
        ({"x": ("b0", 3), "mask": ("b1", "l")}, {"b0", "b1"}),  # named anew for each input, of equal size
        ({"x": (2, 3), "mask": (2, 3)}, {2}),
        ({"x": ("b", 3), "table": (7, 4)}, set()),
        ({"x": ("b", 3), "other": ("n", 4)}, set()),  # of different size
    ],
)
def test_the_batch_axis(shapes, dims):
    sizes = {"b": 2, "b0": 2, "b1": 2, "n": 5, "l": 4}
    made = {name: torch.zeros([sizes.get(d, d) for d in shape]) for name, shape in shapes.items()}
    assert {d if isinstance(d, int) else str(d) for d in batch_dims(graph(**shapes), [made])} == dims


def test_samples_are_counted_along_the_batch_axis():
    assert counted((3, 2)).samples == 5
    assert counted((3, 2), x=("batch", 3), table=(5, 2)).samples == 2  # inputs share no axis: a batch is a sample


@pytest.mark.parametrize("sizes", [(40,), (33, 8, 5), (4,) * 10, (1,) * 41])
def test_halves_share_no_sample(sizes):
    whole = counted(sizes)
    choose, validate = whole.split(seed=3)
    first, second = ([int(v) for b in half.batches for v in b["x"][:, 0]] for half in (choose, validate))
    assert sorted([*first, *second]) == list(range(sum(sizes)))
    assert abs(len(first) - len(second)) <= max(1, max(sizes) if len(sizes) >= 4 else 1)
    assert (choose.samples, validate.samples) == (len(first), len(second))
    again, other = whole.split(seed=3)[0], whole.split(seed=4)[0]
    assert again.fingerprint == choose.fingerprint != other.fingerprint
    assert all(torch.equal(b["table"], torch.zeros(5, 2)) for b in choose.batches)  # no samples along its first axis


def test_too_few_samples():
    with pytest.raises(InputMismatch, match="holds 31 samples in 2 batches, too few") as raised:
        counted((16, 15)).split()
    assert raised.value.next_move == "Give at least 32 independent sequences; each half needs 16."
    assert raised.value.where == "x along the batch axis"
    assert [half.samples for half in counted((3, 3)).split(least=3)] == [3, 3]


def test_a_fixed_batch_is_not_cut():
    with pytest.raises(InputMismatch, match="too few"):
        counted((40,), x=(40, 3), table=(1, 2)).split()
    assert [h.samples for h in counted((16,) * 2, x=(16, 3), table=(1, 2)).split()] == [16, 16]


def test_fingerprints_tell_contents_apart():
    same, changed = counted((2, 2)), counted((2, 2))
    assert same.fingerprint == changed.fingerprint
    changed.batches[1]["x"][0, 0] += 1
    assert same.fingerprint != changed.fingerprint
    wide = Calibration((batch(2),)).fingerprint
    assert wide != Calibration(({name: x.double() for name, x in batch(2).items()},)).fingerprint


def test_pieces_hold_the_same_samples():
    given = Calibration(({"x": torch.arange(10.0).reshape(5, 2), "table": torch.ones(3)},), frozenset({"x"}), sliced=True)
    pieces = given.pieces(2)
    assert [pieces.size(b) for b in pieces.batches] == [2, 2, 1]
    assert torch.equal(torch.cat([b["x"] for b in pieces.batches]), given.batches[0]["x"])
    assert all(len(b["table"]) == 3 for b in pieces.batches)
    fixed = Calibration(given.batches, given.axis, sliced=False)
    assert fixed.pieces(2) is fixed and given.pieces(5) is given
