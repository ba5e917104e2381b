"""Targets: machines as data, one TOML file each in `targets/`.

    load_target("h200+torch")   ->   (Target(name="h200", arch="sm_90", …), "torch")

`cpu` is the machine that attnopt runs on: its cores and caches are read when it is loaded.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

from attnopt.errors import UnknownTarget

RUNTIMES = ("torch", "onnxruntime")
LINUX_CORE = Path("/sys/devices/system/cpu/cpu0")  # the kernel's own table, the same on every Linux
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Target:
    """A machine. Rates in 1e12 operations a second by dtype (dense), bandwidth in bytes a second, sizes in bytes."""

    name: str
    kind: str  # "cpu" or "gpu"
    description: str
    source: str
    arch: str = ""
    units: int = 0  # streaming multiprocessors, compute units or cores
    bandwidth: float = 0.0
    memory: int = 0
    shared_memory: int = 0  # per unit; on a cpu its second-level cache
    cache: int = 0  # last level
    peak: dict[str, float] = field(default_factory=dict)
    efficiencies: dict[str, float] = field(default_factory=dict)  # share of the peak reached, where it was measured
    features: tuple[str, ...] = ()


def load_target(name: str) -> tuple[Target, str | None]:
    """The target, and the runtime that follows a plus sign (None where there is none). Raises UnknownTarget."""
    machine, plus, runtime = name.partition("+")
    known = names()
    if machine not in known:
        raise UnknownTarget(name, known)
    if plus and runtime not in RUNTIMES:
        raise UnknownTarget(name, [f"{machine}+{r}" for r in RUNTIMES])
    return read(machine), runtime or None


def names() -> list[str]:
    files = (resources.files("attnopt.cost") / "targets").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def all_targets() -> list[Target]:
    return [read(name) for name in names()]


@cache
def read(name: str) -> Target:
    text = (resources.files("attnopt.cost") / "targets" / f"{name}.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)
    if data["kind"] == "cpu":
        data = this_machine() | data
    data["features"] = tuple(data.get("features", ()))
    return Target(name=name, **data)


def this_machine() -> dict[str, object]:
    """Cores, memory and caches (of a core, of all) of the machine, where the system tells; 0 where it does not."""
    sizes = cache_sizes()
    return {
        "units": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory": system_value("SC_PHYS_PAGES") * system_value("SC_PAGE_SIZE"),
        "shared_memory": sizes.get(2, 0),
        "cache": sizes[max(sizes)] if sizes else 0,
    }


def system_value(name: str) -> int:
    try:
        return max(0, os.sysconf(name))
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, others do not know every name
        return 0


def cache_sizes(core: Path = LINUX_CORE) -> dict[int, int]:
    """Bytes of the data caches of one core by level, as Linux lists them: Python's sysconf has no name for them."""
    found: dict[int, int] = {}
    for place in core.glob("cache/index*"):
        try:
            level, kind, size = ((place / part).read_text().strip() for part in ("level", "type", "size"))
            if kind != "Instruction":
                found[int(level)] = int(size[:-1]) * UNITS[size[-1]]
        except (OSError, ValueError, KeyError):  # an entry that this kernel writes in another way
            continue
    return found
