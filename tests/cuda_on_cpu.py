"""Runs CUDA source on a CPU, slowly: each thread of a block is a thread, a barrier stands for __syncthreads, blocks run one by one.

run(source, (blocks of queries, heads, batch), 64, {"q_ptr": q, "s_qb": q.stride(0), …}, folder)
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

HEAD = """
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>
using std::min; using std::max;
struct Place { int x, y, z; };
static thread_local Place threadIdx; static Place blockIdx;
static std::barrier<>* together;
static void __syncthreads() { together->arrive_and_wait(); }
#define __expf expf
#define __logf logf
#define alignas(n)
#define __global__
#define __launch_bounds__(n)
#define __shared__ static
#define CUDART_INF_F std::numeric_limits<float>::infinity()
typedef _Float16 half;
"""
LAUNCH = """
extern "C" void launch(int gx, int gy, int gz, int threads, {parameters}) {{
  std::barrier<> barrier(threads); together = &barrier;
  for (int z = 0; z < gz; ++z) for (int y = 0; y < gy; ++y) for (int x = 0; x < gx; ++x) {{
    blockIdx = {{x, y, z}};
    std::vector<std::thread> block;
    for (int t = 0; t < threads; ++t)
      block.emplace_back([=] {{ threadIdx = {{t, 0, 0}}; attention_kernel({arguments}); }});
    for (auto& thread : block) thread.join();
  }}
}}
"""


def run(source: str, grid: tuple[int, int, int], threads: int, values: Mapping[str, Tensor | int], folder: Path) -> None:
    """values: for each parameter of the kernel a tensor or a number; g++ compiles it."""
    body = source[source.rindex('extern "C"') :]
    parameters = re.search(r"attention_kernel\((.*?)\) \{", body, re.DOTALL).group(1).split(", ")
    names = [parameter.split()[-1] for parameter in parameters]
    text = HEAD + body + LAUNCH.format(parameters=", ".join(parameters), arguments=", ".join(names))
    (folder / "kernel.cpp").write_text(text, encoding="utf-8")
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-o", "kernel.so", "kernel.cpp"]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    given = [values[name] for name in names]
    passed = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int64(x) for x in given]
    ctypes.CDLL(str(folder / "kernel.so")).launch(*grid, threads, *passed)
