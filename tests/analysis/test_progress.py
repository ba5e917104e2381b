"""A bar where somebody looks, nothing where nobody does."""

from __future__ import annotations

import io
import sys

from attnopt.analysis.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_gets_no_bar(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    assert list(progress([1, 2, 3], "layers")) == [1, 2, 3]
    assert log.getvalue() == ""


def test_a_terminal_gets_one(monkeypatch):
    log = Terminal()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress([1, 2, 3], "layers")) == [1, 2, 3]
    assert "layers" in log.getvalue()
