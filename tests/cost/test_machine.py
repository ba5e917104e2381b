"""Rates of the machine that runs the tests: that they are measured, plausible, and once."""

from __future__ import annotations

from toy_target import TOY

from attnopt.cost import machine
from attnopt.cost.machine import falling, product_rate, rated, with_rates
from attnopt.cost.target import load_target


def test_a_target_with_rates_is_taken_as_it_is():
    assert rated(TOY) is TOY


def test_this_machine_is_measured_once(monkeypatch):
    monkeypatch.setattr(machine, "RATED", {})
    asked = []

    def quick(target, **options):
        asked.append(options["types"])
        return with_rates(target, seconds=0.001, types=("float32",), sizes=(2**18, 2**20))

    monkeypatch.setattr(machine, "with_rates", quick)
    cpu = load_target("cpu")[0]
    first = rated(cpu)
    assert rated(cpu) is first
    assert asked == [("float32", "int8")]  # else int8 layers are priced at the rate of float32, and lose
    assert 1e6 < first.rate("float32") < 1e14  # however busy the machine is
    assert 1e5 < first.bandwidth <= first.cache_bandwidth < 1e13
    assert 0 < first.launch < 1
    assert [size for size, _ in first.levels] == [2**18, 2**20]


def test_runs_for_which_the_clock_stood_still_do_not_count(monkeypatch):
    ticks = iter([0.0, 5.0, 5.0, 6.0, 8.0, 8.0, 8.0])
    monkeypatch.setattr(machine, "clock", lambda: lambda: next(ticks))
    assert machine.least_seconds(lambda: None, 7.0) == 2.0


def test_a_type_that_torch_has_no_product_for():
    assert product_rate("bool", 0.001) is None


def test_larger_sets_are_never_faster():
    assert list(falling([(1.0, 5.0), (2.0, 9.0), (4.0, 3.0)])) == [(1.0, 9.0), (2.0, 9.0), (4.0, 3.0)]
