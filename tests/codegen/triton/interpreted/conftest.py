"""Only collected where Triton interprets (see test_interpreted.py): compiled and interpreted kernels need different processes."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
