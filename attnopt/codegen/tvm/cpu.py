"""The CPU that kernels are compiled for: LLVM's name of it, what it can do, and the caches that tiles must fit.

    host()              ->   Cpu("sapphirerapids", "x86_64-linux-gnu", ("avx2", "fma", …, "amx-int8"), vector_bytes=64, …)
    named("apple-m1")   ->   the same for a machine that need not be here

The host gets the newest name whose instructions it has all: what a virtual machine hides is not used. Nothing is imported for it, so
that a kernel that is compiled already runs without a compiler in memory.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attnopt.cost.target import cache_sizes
from attnopt.errors import UnknownTarget

PROCESSORS = Path("/proc/cpuinfo")
# As Linux calls them, and as LLVM does.
FLAGS = {
    "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx_vnni": "avxvnni", "vaes": "vaes", "avx512f": "avx512f", "avx512bw": "avx512bw",
    "avx512dq": "avx512dq", "avx512vl": "avx512vl", "avx512cd": "avx512cd", "avx512_vnni": "avx512vnni", "avx512vbmi": "avx512vbmi",
    "avx512_vbmi2": "avx512vbmi2", "avx512ifma": "avx512ifma", "avx512_bitalg": "avx512bitalg", "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx512_bf16": "avx512bf16", "avx512_fp16": "avx512fp16", "avx512_vp2intersect": "avx512vp2intersect", "amx_tile": "amx-tile",
    "amx_int8": "amx-int8", "amx_bf16": "amx-bf16", "gfni": "gfni", "sse4_2": "sse4.2", "bmi2": "bmi2",
    "asimd": "neon", "asimdhp": "fullfp16", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve",
}  # fmt: skip
X86_64, AARCH64 = "x86_64", "aarch64"
TRIPLES = {("Linux", X86_64): "x86_64-linux-gnu", ("Linux", AARCH64): "aarch64-linux-gnu", ("Darwin", AARCH64): "arm64-apple-macos",
           ("Darwin", X86_64): "x86_64-apple-macos", ("Windows", X86_64): "x86_64-pc-windows-msvc"}  # fmt: skip
# What torch says of a machine whose system does not list its instructions.
CAPABILITIES = {"AVX512": ("sse4_2", "bmi2", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"),
                "AVX2": ("sse4_2", "bmi2", "avx2", "fma", "f16c")}  # fmt: skip


@dataclass(frozen=True)
class Cpu:
    """name and features as LLVM calls them; features: those of `FLAGS` alone, sorted. Bytes of a vector, and of the caches of a core."""

    name: str
    triple: str
    features: tuple[str, ...]
    vector_bytes: int
    l1: int
    l2: int

    def has(self, feature: str) -> bool:
        return feature in self.features

    @property
    def architecture(self) -> str:
        return AARCH64 if self.triple.startswith(("aarch64", "arm64")) else X86_64

    @property
    def target(self) -> dict[str, Any]:
        """The target of TVM that compiles for it; what it can do beyond its name is said besides."""
        more = [f"+{feature}" for feature in self.features if feature not in named(self.name).features]
        return {"kind": "llvm", "mcpu": self.name, "mtriple": self.triple, **({"mattr": more} if more else {})}


def cpu(name: str, triple: str, features: Iterable[str], l1: int, l2: int) -> Cpu:
    has = tuple(sorted(features))
    return Cpu(name, triple, has, 64 if "avx512f" in has else 32 if "avx2" in has else 16, l1 * 1024, l2 * 1024)


BASE = ("sse4.2",)
AVX2 = (*BASE, "bmi2", "avx2", "fma", "f16c")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")
ICELAKE = (*AVX512, "avx512vnni", "avx512vbmi", "avx512vbmi2", "avx512ifma", "avx512bitalg", "avx512vpopcntdq", "vaes", "gfni")
ARM = ("neon", "fullfp16", "dotprod")
LINUX, ARM_LINUX = TRIPLES["Linux", X86_64], TRIPLES["Linux", AARCH64]
AMD = ("znver5", "znver4", "znver3", "znver2")  # alike in instructions to others, not in how long they take

# Newest first: the first that a host covers is its name.
CPUS = (
    cpu("sapphirerapids", LINUX, (*ICELAKE, "avx512bf16", "avx512fp16", "avxvnni", "amx-tile", "amx-int8", "amx-bf16"), 48, 2048),
    cpu("znver5", LINUX, (*ICELAKE, "avx512bf16", "avxvnni", "avx512vp2intersect"), 48, 1024),
    cpu("znver4", LINUX, (*ICELAKE, "avx512bf16"), 32, 1024),
    cpu("icelake-server", LINUX, ICELAKE, 48, 1280),
    cpu("cascadelake", LINUX, (*AVX512, "avx512vnni"), 32, 1024),
    cpu("skylake-avx512", LINUX, AVX512, 32, 1024),
    cpu("alderlake", LINUX, (*AVX2, "avxvnni", "vaes", "gfni"), 48, 1280),
    cpu("znver3", LINUX, (*AVX2, "vaes"), 32, 512),
    cpu("znver2", LINUX, AVX2, 32, 512),
    cpu("haswell", LINUX, AVX2, 32, 256),
    cpu("x86-64-v2", LINUX, BASE, 32, 256),
    cpu("x86-64", LINUX, (), 32, 256),
    cpu("neoverse-v2", ARM_LINUX, (*ARM, "i8mm", "bf16", "sve"), 64, 2048),
    cpu("neoverse-n1", ARM_LINUX, ARM, 64, 1024),
    cpu("apple-m1", TRIPLES["Darwin", AARCH64], ARM, 64, 4096),
    cpu("generic", ARM_LINUX, ("neon",), 32, 512),
)  # fmt: skip


def named(name: str) -> Cpu:
    """A machine of the list by LLVM's name of it. Raises UnknownTarget."""
    found = next((x for x in CPUS if x.name == name), None)
    if found is None:
        raise UnknownTarget(name, [x.name for x in CPUS])
    return found


@functools.cache
def host() -> Cpu:
    """The CPU that this runs on."""
    text = PROCESSORS.read_text(encoding="utf-8") if PROCESSORS.exists() else ""
    machine = {"arm64": AARCH64, "amd64": X86_64}.get(platform.machine().lower(), platform.machine().lower())
    return detected(text, machine, platform.system(), cache_sizes(), torch.backends.cpu.get_cpu_capability())


def detected(text: str, machine: str, system: str, caches: dict[int, int], capability: str) -> Cpu:
    """text: what /proc/cpuinfo says, of which the first processor counts; machine: x86_64 or aarch64; caches: bytes by level."""
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.split("\n\n")[0].splitlines())}
    words = said.get("flags", said.get("Features", "")).split() or CAPABILITIES.get(capability, ())
    features = {FLAGS[word] for word in words if word in FLAGS}
    fits = [x for x in CPUS if x.architecture == machine and set(x.features) <= features]
    amd = said.get("vendor_id") == "AuthenticAMD"
    if machine == AARCH64:
        known = named("apple-m1") if system == "Darwin" else next(iter(fits), named("generic"))
    else:
        known = next((x for x in fits if (x.name in AMD) == amd), None) or next(iter(fits), named("x86-64"))
    triple = TRIPLES.get((system, machine), known.triple)
    kept = tuple(sorted(features)) or known.features
    return replace(known, triple=triple, features=kept, l1=caches.get(1, known.l1), l2=caches.get(2, known.l2))
