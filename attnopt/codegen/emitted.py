"""Load an emitted file without writing it: Triton and TVM read the source of a kernel through `linecache`, so it must be found there.

load(source)   ->   a module with `attention` and the kernel; equal sources give one module
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import sys
from types import ModuleType


@functools.lru_cache(maxsize=256)
def load(source: str) -> ModuleType:
    """Run the source as a module of its own. It is ours: nothing but `emit` makes it."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    name, path = f"attnopt_emitted_{digest}", f"<attnopt {digest}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    module = ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module  # both resolve the globals of a kernel through its module
    exec(compile(source, path, "exec"), module.__dict__)
    return module
