"""The folder and the tuple of policies agree, and names derive from each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from seen_caches import places_kept, seen

import attnopt.passes.kvcache.eviction as room
from attnopt.ir.eviction import Room
from attnopt.passes.kvcache.eviction import POLICIES


def test_every_policy_in_the_folder_is_in_the_tuple():
    files = {f.stem for f in Path(room.__file__).parent.glob("*.py")} - {"__init__"}
    assert {kind.__module__.rpartition(".")[2] for kind in POLICIES} == files


@pytest.mark.parametrize("kind", POLICIES, ids=lambda kind: kind.__name__)
def test_a_policy_is_named_after_its_file(kind):
    assert kind().name.replace("-", "_") == kind.__module__.rpartition(".")[2]
    assert kind() == kind()


@pytest.mark.parametrize("kind", POLICIES[:4], ids=lambda kind: kind.__name__)
def test_equal_arguments_keep_equal_tokens(kind):
    assert places_kept(kind(), Room(keep=0.5), seen(40)) == places_kept(kind(), Room(keep=0.5), seen(40))
