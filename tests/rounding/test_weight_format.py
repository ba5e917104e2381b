"""Formats print and read back, count their bits, and refuse groups that do not divide with the nearest that do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnopt.rounding.weight_format import WeightFormat, nearest_divisor

formats = st.builds(WeightFormat, st.integers(1, 8), st.integers(0, 512), st.booleans())


@given(formats)
def test_print_and_read(format):
    assert WeightFormat.read(str(format)) == format


@pytest.mark.parametrize("text", ["int8", "int4 group", "int4 group 32 zero", "", "fp8 row"])
def test_other_texts_are_no_format(text):
    assert WeightFormat.read(text) is None


def test_bits_per_weight_count_steps_and_zero_points():
    assert WeightFormat(4, 32).width(192) == 5.0
    assert WeightFormat(4, 0, True).width(192) == 4 + 36 / 192
    assert WeightFormat(3, 128).width(512) == 3.25


@pytest.mark.parametrize(("inputs", "group", "near"), [(192, 128, 96), (384, 100, 96), (512, 1000, 512), (7, 4, 7)])
def test_a_group_that_does_not_divide_is_refused_with_the_nearest(inputs, group, near):
    refusal = WeightFormat(4, group).refusal(inputs)
    assert refusal.reason == f"groups of {group} do not divide rows of {inputs} inputs; {near} do"
    assert refusal.remedy == f"a group of {near}, or of 0"
    assert WeightFormat(4, near).refusal(inputs) is None


@given(st.integers(1, 400), st.integers(1, 400))
def test_the_nearest_divisor_divides(number, to):
    found = nearest_divisor(number, to)
    assert number % found == 0
    assert found == to or number % to


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_widths_of_codes(bits):
    assert "they have 1 to 8" in WeightFormat(bits).refusal(64).reason
