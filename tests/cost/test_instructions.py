"""Products of bytes are read from what the system lists, and are unknown where it does not."""

from __future__ import annotations

import pytest

from attnopt.cost.instructions import byte_products


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("fpu avx2 avx512f avx512_vnni amx_int8", ("vnni", "amx")),
        ("fpu avx2 avx_vnni", ("vnni",)),
        ("fpu avx2 avx512f", ()),
    ],
)
def test_flags(tmp_path, flags, found):
    table = tmp_path / "cpuinfo"
    table.write_text(f"processor\t: 0\nmodel name\t: an avx_vnni in a name\nflags\t\t: {flags}\nflags\t\t: {flags}\n")
    assert byte_products(table) == found


def test_a_system_that_does_not_say(tmp_path):
    assert byte_products(tmp_path / "absent") == ()
    (tmp_path / "other").write_text("Features\t: asimd asimddp\n")
    assert byte_products(tmp_path / "other") == ()
