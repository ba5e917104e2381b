"""A sweep over batches: bounded, in order, and after an interrupt the same bits as without one."""

from __future__ import annotations

import functools

import pytest
import torch
from self_attention import SelfAttention, example

from attnopt.analysis.linear_inputs import MomentMeasure, linear_inputs
from attnopt.analysis.padding import Padding
from attnopt.analysis.store import Store
from attnopt.analysis.sweep import Sweep, bytes_of, partial
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.dims import product, symbol
from attnopt.ir.graph import Value

BATCHES = [example(2, 5 + i) for i in range(6)]


@functools.cache
def host_of_one_block():
    return FxHost.from_captured(capture(SelfAttention().eval(), example(), None))


class Counted:
    """A host that counts the batches it runs and is interrupted at one of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.host = host_of_one_block()
        self.graph, self.stop, self.runs = self.host.graph, stop, 0

    def tapper(self, values):
        tap = self.host.tapper(values)

        def run(inputs):
            if self.runs == self.stop:
                raise KeyboardInterrupt
            self.runs += 1
            return tap(inputs)

        return run


def measures(host):
    return [MomentMeasure(v.name, v, width, Padding()) for v, width in linear_inputs(host.graph).items()]


def swept(host, folder=None, memory=2**30):
    sweep = Sweep(host, BATCHES, Store.open(folder) if folder else Store(), memory)
    return {m.key: result["moment"] for m, result in sweep.measured(measures(host), "moments")}


def test_one_group_where_memory_allows():
    host = Counted()
    found = swept(host)
    assert host.runs == len(BATCHES)
    (x, _) = found
    rows = torch.cat([b["x"].reshape(-1, 64) for b in BATCHES]).double()
    torch.testing.assert_close(found[x], rows.T @ rows / len(rows), rtol=1e-12, atol=1e-12)


def test_one_measure_at_a_time_where_it_does_not():
    host = Counted()
    found, whole = swept(host, memory=1), swept(Counted())
    assert host.runs == 2 * len(BATCHES)
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_groups_are_as_large_as_memory():
    host = Counted()
    mine = measures(host)
    one = mine[0].size + bytes_of(mine[0].value, host.graph.sizes(max(BATCHES, key=lambda b: b["x"].numel())))
    sizes = {m: [len(g) for g in Sweep(host, BATCHES, Store(), m).groups(mine)] for m in (0, 2 * one - 1, 2 * one)}
    assert sizes == {0: [1, 1], 2 * one - 1: [1, 1], 2 * one: [2]}


@pytest.mark.parametrize("memory", [1, 2**30])
@pytest.mark.parametrize("stop", [0, 1, 4, 5])
def test_an_interrupt_changes_no_bit(tmp_path, stop, memory):
    with pytest.raises(KeyboardInterrupt):
        swept(Counted(stop), tmp_path, memory)
    again = Counted()
    found, whole = swept(again, tmp_path, memory), swept(Counted())
    assert again.runs == len(BATCHES) * (2 if memory == 1 else 1) - stop  # nothing is run twice
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert sorted(f.stem for f in tmp_path.iterdir()) == sorted(whole)  # nothing half done is left


def test_where_time_is_up_it_ends_and_a_later_run_goes_on(tmp_path):
    host = Counted()
    sweep = Sweep(host, BATCHES, Store.open(tmp_path), late=lambda: host.runs == 2)
    mine = measures(host)
    (result, *_) = [result for _, result in sweep.measured(mine, "moments")]
    rows = torch.cat([b["x"].reshape(-1, 64) for b in BATCHES[:2]]).double()
    torch.testing.assert_close(result["moment"], rows.T @ rows / len(rows), rtol=1e-12, atol=1e-12)
    assert (host.runs, sweep.cut) == (2, ["moments (2): 2 of 6 batches"])
    assert [f.stem for f in tmp_path.iterdir()] == [partial(mine)]  # what is half done is no result
    again = Counted()
    found, whole = swept(again, tmp_path), swept(Counted())
    assert again.runs == len(BATCHES) - 2
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_what_is_stored_is_not_measured_again(tmp_path):
    first = swept(Counted(), tmp_path)
    host = Counted(stop=0)
    assert all(torch.equal(x, first[key]) for key, x in swept(host, tmp_path).items())
    next(tmp_path.iterdir()).unlink()
    host = Counted()
    swept(host, tmp_path)
    assert host.runs == len(BATCHES)


def test_an_interrupt_within_a_batch_falls_back_to_the_last_save(tmp_path, monkeypatch):
    """States that hold a part of a batch are never kept: half the measures would count it twice."""
    host = Counted()
    mine = measures(host)
    real = mine[1].add

    def add(data, inputs):
        if inputs is BATCHES[3]:
            raise KeyboardInterrupt
        real(data, inputs)

    monkeypatch.setattr(mine[1], "add", add)
    sweep = Sweep(host, BATCHES, Store.open(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        list(sweep.measured(mine, "moments"))
    assert sweep.store.get(partial(mine)) is None
    whole = swept(Counted())
    assert all(torch.equal(x, whole[key]) for key, x in swept(Counted(), tmp_path).items())


def test_work_is_saved_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr("attnopt.analysis.sweep.EVERY", 0.0)
    saved = []
    monkeypatch.setattr(Store, "put", lambda self, key, tensors: saved.append(int(tensors.get("done", -1))))
    swept(Counted(), tmp_path)
    assert saved == [1, 2, 3, 4, 5, 6, -1, -1]


def test_bytes():
    shape = (product((symbol("b"), 2)), 5)
    assert bytes_of(Value("x", shape, "float32"), {"b": 3}) == 6 * 5 * 4
    assert bytes_of(Value("x", shape, "float64"), {"b": 3}) == 6 * 5 * 8
    assert bytes_of(Value("x", shape, "float32"), {}) == bytes_of(Value("x", None), {}) == 2**20
