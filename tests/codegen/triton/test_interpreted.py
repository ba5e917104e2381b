"""Runs the tests in `interpreted` in a process of their own: Triton reads TRITON_INTERPRET when it is first imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOM = Path(__file__).parent / "interpreted"


def test_kernels_in_the_interpreter(request):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(ROOM)]
    command += ["--every-case"] if request.config.getoption("--every-case") else []
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOM.parents[3])
    assert told.returncode == 0, told.stdout[-20000:] + told.stderr[-2000:]
