"""Which CPU kernels are compiled for: read from what systems say of machines that are not here, and checked against LLVM."""

from __future__ import annotations

import importlib.util

import pytest

from attnopt.codegen.tvm.cpu import AARCH64, CPUS, FLAGS, X86_64, detected, host, named
from attnopt.errors import UnknownTarget

LINUX = (
    "processor : 0\nvendor_id : {}\nmodel name : some\nflags : fpu sse4_2 bmi2 avx2 fma f16c {}\n\nprocessor : 1\nflags : fpu\n"
)
AVX512 = "avx512f avx512bw avx512dq avx512vl avx512cd"
CACHES = {1: 32768, 2: 524288, 3: 2**25}
NEEDS_TVM = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="TVM is not installed")


def seen(vendor: str, flags: str):
    return detected(LINUX.format(vendor, flags), X86_64, "Linux", CACHES, "DEFAULT")


@pytest.mark.parametrize(
    ("vendor", "flags", "name", "vector"),
    [
        ("GenuineIntel", "", "haswell", 32),
        ("AuthenticAMD", "", "znver2", 32),
        ("AuthenticAMD", "vaes vpclmulqdq", "znver3", 32),
        ("GenuineIntel", AVX512, "skylake-avx512", 64),
        ("GenuineIntel", f"{AVX512} avx512_vnni", "cascadelake", 64),
        ("GenuineIntel", "avx512f", "haswell", 32),  # what a virtual machine hides is not used
        ("GenuineIntel", "avx_vnni vaes gfni", "alderlake", 32),
    ],
)
def test_machines_of_linux(vendor, flags, name, vector):
    found = seen(vendor, flags)
    assert (found.name, found.vector_bytes, found.l1, found.l2) == (name, vector, 32768, 524288)
    assert set(found.features) >= set(named(name).features)
    assert found.target["mcpu"] == name


def test_what_a_machine_has_besides_is_said_to_llvm():
    found = seen("AuthenticAMD", "avx_vnni")
    assert found.name == "znver2"
    assert found.has("avxvnni") and not found.has("avx512f")
    assert found.target["mattr"] == ["+avxvnni"]
    assert "mattr" not in seen("AuthenticAMD", "").target


def test_systems_that_list_nothing():
    assert detected("", X86_64, "Darwin", {}, "AVX2").target == {
        "kind": "llvm",
        "mcpu": "haswell",
        "mtriple": "x86_64-apple-macos",
    }
    assert detected("", X86_64, "Windows", {}, "AVX512").name == "skylake-avx512"
    assert detected("", X86_64, "Linux", {}, "DEFAULT").name == "x86-64"
    mac = detected("", AARCH64, "Darwin", {}, "DEFAULT")
    assert (mac.name, mac.vector_bytes, mac.has("dotprod")) == ("apple-m1", 16, True)


def test_arm():
    text = "processor : 0\nFeatures : fp asimd asimdhp asimddp i8mm bf16 sve\n"
    assert detected(text, AARCH64, "Linux", CACHES, "DEFAULT").name == "neoverse-v2"
    assert detected("Features : fp asimd", AARCH64, "Linux", CACHES, "DEFAULT").name == "generic"


def test_names():
    assert len({cpu.name for cpu in CPUS}) == len(CPUS)
    assert all(set(cpu.features) <= set(FLAGS.values()) for cpu in CPUS)
    with pytest.raises(UnknownTarget, match="skylake-avx512"):
        named("skylake")


@NEEDS_TVM
@pytest.mark.parametrize("name", [cpu.name for cpu in CPUS])
def test_llvm_knows_each_name_and_its_instructions(name):
    import tvm
    import tvm_ffi

    features = tvm_ffi.get_global_func("target.llvm_get_cpu_features")(tvm.target.Target(named(name).target))
    assert set(named(name).features) <= set(features)


@NEEDS_TVM
def test_the_host_has_what_its_name_promises():
    import tvm_ffi

    true = {name for name, has in tvm_ffi.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")().items() if has}
    assert set(host().features) <= true | {"neon"}
