"""The live host: a transformers model whose modules are changed, so that it goes on generating."""

from __future__ import annotations

from attnopt.hosts.module.host import ModuleHost

__all__ = ["ModuleHost"]
