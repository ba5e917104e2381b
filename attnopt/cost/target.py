"""Targets: machines as data, one TOML file each in `targets/`.

    load_target("h200+torch")   ->   (Target(name="h200", arch="sm_90", …), "torch")

`cpu` is the machine that attnopt runs on: its cores and caches are read when it is loaded, and what `attnopt calibrate` measured of it
stands in a file of the user's (`target_file`).
"""

from __future__ import annotations

import math
import os
import tomllib
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from attnopt.cost.efficiency import PLAIN, Efficiency, efficiencies, shipped
from attnopt.cost.instructions import byte_products
from attnopt.cost.target_file import measured_path
from attnopt.errors import UnknownTarget, UnreadableTarget

RUNTIMES = ("torch", "onnxruntime")
LINUX_CORE = Path("/sys/devices/system/cpu/cpu0")  # the kernel's own table, the same on every Linux
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Target:
    """A machine. Rates in 1e12 operations a second by dtype (dense), bandwidths in bytes a second, sizes in bytes.

    levels: (working set, bandwidth) as measured, ascending; where empty, the last-level cache and the memory are the levels.
    launch: seconds until a kernel that does nothing is done. measured: the day on which this machine was measured.
    """

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
    cache_bandwidth: float = 0.0
    launch: float = 0.0
    levels: tuple[tuple[float, float], ...] = ()
    peak: dict[str, float] = field(default_factory=dict)
    efficiencies: dict[str, Efficiency] = field(default_factory=dict)  # where they were measured
    features: tuple[str, ...] = ()
    measured: str = ""

    def rate(self, dtype: str) -> float:
        """Operations a second of matrix products; of a type without a rate of its own, that of float32."""
        return self.peak.get(dtype, self.peak.get("float32", 0.0)) * 1e12

    def bandwidth_at(self, working_set: float) -> float:
        """Bytes a second where so many bytes are gone through again and again: between two measured levels, by their logarithms."""
        levels = self.levels or ((self.cache, self.cache_bandwidth or self.bandwidth), (2 * self.cache, self.bandwidth))
        below = [level for level in levels if level[0] <= working_set]
        if not below:
            return levels[0][1]
        if len(below) == len(levels):
            return levels[-1][1]
        (low, fast), (high, slow) = below[-1], levels[len(below)]
        share = math.log(working_set / low) / math.log(high / low)
        return fast * (slow / fast) ** share

    def efficiency(self, family: str) -> Efficiency:
        """Of this machine where it was measured, else as shipped for its kind."""
        return self.known.get(family, self.known[PLAIN])

    @cached_property
    def known(self) -> dict[str, Efficiency]:
        by_feature = {name: e for feature in self.features for name, e in shipped(f"{self.kind}-{feature}").items()}
        return {**shipped(self.kind), **by_feature, **self.efficiencies}


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
def shipped_data(name: str) -> dict[str, Any]:
    text = (resources.files("attnopt.cost") / "targets" / f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def read(name: str) -> Target:
    """The target as shipped; of `cpu` what the system tells, and what was measured where it was."""
    data = shipped_data(name)
    if data["kind"] != "cpu":
        return target_from(name, data)
    path = measured_path()
    try:
        measured = tomllib.loads(path.read_text(encoding="utf-8"))
        return target_from(name, this_machine() | data | measured)
    except FileNotFoundError:
        return target_from(name, this_machine() | data)
    except (OSError, ValueError, TypeError) as failure:
        raise UnreadableTarget(
            f"the target file cannot be read: {failure}",
            where=str(path),
            next_move="Delete it, or run `attnopt calibrate` again.",
        ) from None


def target_from(name: str, data: dict[str, Any]) -> Target:
    """A target from the tables of its file."""
    held = dict(data)
    held["features"] = tuple(held.get("features", ()))
    held["levels"] = tuple((float(size), float(rate)) for size, rate in held.get("levels", ()))
    held["efficiencies"] = efficiencies(held.get("efficiencies", {}))
    return Target(name=name, **held)


def this_machine() -> dict[str, object]:
    """Cores, memory, caches (of a core, of all) and products of bytes of the machine, where the system tells; 0 or none where not."""
    sizes = cache_sizes()
    return {
        "units": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory": system_value("SC_PHYS_PAGES") * system_value("SC_PAGE_SIZE"),
        "shared_memory": sizes.get(2, 0),
        "cache": sizes[max(sizes)] if sizes else 0,
        "features": byte_products(),
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
