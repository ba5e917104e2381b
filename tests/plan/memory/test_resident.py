"""What the system tells about this process and its machine."""

from __future__ import annotations

import pytest
import torch

from attnopt.plan.memory import resident


@pytest.mark.skipif(not resident.peak(), reason="the system does not tell")
def test_what_is_held_follows_what_is_taken():
    before = resident.held()
    block = torch.ones(64 * 2**20 // 4)
    assert resident.held() - before > 0.8 * block.nbytes
    assert resident.peak() >= before + 0.8 * block.nbytes
    assert resident.held() < resident.machine()


def test_a_container_holds_less_than_its_machine(tmp_path, monkeypatch):
    whole = resident.machine()
    for text, wanted in (("1048576\n", min(whole, 2**20)), ("max\n", whole), ("9223372036854771712\n", whole)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(resident, "CONTAINER", (tmp_path / "limit", tmp_path / "absent"))
        assert resident.machine() == wanted
