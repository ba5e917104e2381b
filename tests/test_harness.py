"""What benchmarks share: rows of a run that was cut off are read back as they were kept."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import harness


@dataclass(frozen=True)
class Made:
    name: str
    times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Other:
    title: str


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


def test_rows_are_read_back():
    rows = [Made("one", (1.0, 2.0)), Made("two")]
    harness.save("some", rows)
    assert harness.kept("some", Made) == rows


def test_what_is_not_there_or_of_another_form_is_measured_anew(folder):
    assert harness.kept("some", Made) == []
    harness.save("some", [Made("one")])
    assert harness.kept("some", Other) == []
    (folder / "some.json").write_text("half a fi")
    assert harness.kept("some", Made) == []
