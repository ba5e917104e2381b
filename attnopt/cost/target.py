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

from attnopt.errors import UnknownTarget

RUNTIMES = ("torch", "onnxruntime")


@dataclass(frozen=True)
class Target:
    """A machine. Rates in 1e12 operations per second by dtype (dense), bandwidth in bytes per second, sizes in bytes."""

    name: str
    kind: str  # "cpu" or "gpu"
    description: str
    source: str
    arch: str = ""
    units: int = 0  # streaming multiprocessors, compute units or cores
    bandwidth: float = 0.0
    memory: int = 0
    shared_memory: int = 0  # per unit
    cache: int = 0  # last level
    peak: dict[str, float] = field(default_factory=dict)
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
    """Cores, memory and last-level cache of the machine, where the system tells."""
    found: dict[str, object] = {
        "units": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    }
    for key, name in (("cache", "SC_LEVEL3_CACHE_SIZE"), ("pages", "SC_PHYS_PAGES")):
        try:
            found[key] = max(0, os.sysconf(name))
        except (ValueError, OSError):
            found[key] = 0
    pages = int(found.pop("pages"))  # type: ignore[call-overload]
    found["memory"] = pages * os.sysconf("SC_PAGE_SIZE") if pages else 0
    return found
