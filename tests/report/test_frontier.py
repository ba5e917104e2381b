"""The page of a frontier: well-formed, self-contained, every point in picture and table; the table for a terminal."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from attnopt.errors import OutputNotWritable
from attnopt.report.frontier import Frontier, Point
from attnopt.report.frontier_page import horizontal, lower_steps
from attnopt.report.plan import Plan

PLAN = Plan("onnx", "cpu", "onnxruntime")


def point(name, loss, seconds, weights, **changes):
    return Point(name, None, loss, loss * 1.2, seconds, weights - 1e6, 1e6, "int8 (3)", PLAN, **changes)


@pytest.fixture
def frontier():
    points = (
        point("exact", 0.0, 0.010, 9e6),
        point("budget 0.001", 2e-4, 0.008, 7e6),
        point("<all> & none", 5e-3, 0.009, 8e6, best=False),
        point("budget 0.1", 0.03, 0.004, 3e6, timed=False),
    )
    return Frontier("model <1>.onnx", "cpu", "mean KL", points, "effort low", ("a note",))


def test_the_page(frontier, tmp_path):
    text = frontier.save(tmp_path / "frontier.html").read_text(encoding="utf-8")
    page = ElementTree.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>", "", text))
    assert page.find("head/title").text == "model <1>.onnx on cpu"
    assert not re.search(r"(src|href)=|<script|<link|@import|url\(", text)
    assert len(page.findall(".//svg")) == 2
    for picture in page.findall(".//svg"):
        circles = picture.findall(".//circle")
        assert len(circles) == 4
        assert all(0 <= float(c.get("cx")) <= 520 and 0 <= float(c.get("cy")) <= 340 for c in circles)
        left = [float(c.get("cx")) for c in circles]
        assert left == sorted(left)  # as the losses
        heights = [float(c.get("cy")) for c in circles]
        assert heights[0] < heights[2] < heights[1] < heights[3]  # the dearest on top
        assert circles[2].find("title").text.startswith("<all> & none: mean KL 0.005, 9 ms, 8 MB")
    rows = page.findall(".//table/tr")
    assert len(rows) == 5
    assert rows[3].get("class") == "beaten"
    assert [c.text for c in rows[4]] == ["budget 0.1", "0.03", "0.036", "4 ms (predicted)", "2.50x", "3 MB", "int8 (3)"]
    assert [p.text for p in page.findall(".//p")] == ["effort low", "a note"]


def test_only_the_exact_plan(frontier):
    page = replace(frontier, points=frontier.points[:1]).html()
    assert page.count("<circle") == 2


def test_steps_and_axis(frontier):
    assert [p.name for p in lower_steps(frontier.points, lambda p: p.seconds)] == ["exact", "budget 0.001", "budget 0.1"]
    place = horizontal([0.0, 1e-3, 1e-1])
    assert place(0.0) < place(1e-3) < place(1e-2) < place(1e-1)
    assert place(1e-2) - place(1e-3) == pytest.approx(place(1e-1) - place(1e-2))


def test_the_table_and_json(frontier):
    text = str(frontier)
    assert "budget 0.1" in text and "2.50x" in text and "a note" in text
    assert frontier.to_json()["points"][1]["loss"] == 2e-4


def test_a_place_that_cannot_be_written(frontier, tmp_path):
    with pytest.raises(OutputNotWritable):
        frontier.save(tmp_path / "absent" / "frontier.html")
