"""The memory of this process, as the system tells it: what it holds now, the most that it has held, and how much there is.

    held()   ->   1.2e9 bytes          peak()   ->   1.9e9          machine()   ->   3.4e10, or the limit of its container

Memory of a GPU is not counted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def held() -> int:
    """Bytes in memory now; the most so far where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):  # no Linux
        return peak()


def peak() -> int:
    """The most bytes that this process has held so far; 0 on a system that does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def machine() -> int:
    """Bytes of memory of this machine, or of the container that it runs in; 0 on a system that does not tell."""
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0
    return min([whole, *(limit for limit in map(container_limit, CONTAINER) if limit)])


def container_limit(path: Path) -> int:
    """0 where there is none."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max"
        return 0
