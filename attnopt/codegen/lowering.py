"""What every lowering answers: can you compute this site, and if so, write it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal, Site


class Lowering(Protocol):
    """A way to compute a site in one host. `name` is what reports print."""

    @property
    def name(self) -> str: ...

    @property
    def host(self) -> str:
        """ "torch" or "onnx"."""
        ...

    @property
    def opset(self) -> int:
        """The lowest ONNX opset whose operators it uses; 0 for torch."""
        ...

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        """None where the lowering computes exactly this spec on that runtime; else why not."""
        ...

    def emit(self, site: Site, builder: Builder) -> Value:
        """Write the kernel; the result has the layout of `site.output`."""
        ...


@runtime_checkable
class GivesWeights(Protocol):
    """A lowering whose kernel says as well what the last tokens of a cache were given, where the codes of a site name it."""

    def emit_both(self, site: Site, builder: Builder) -> tuple[Value, Value]:
        """The kernel as `emit` writes it, and the value that stands for `site.codes["received"]`."""
        ...


def first_refusal(*checks: tuple[bool, str], at: object = None) -> Refusal | None:
    """The first failing check as a refusal: `(ok, reason)` pairs in the order in which they matter."""
    return next((Refusal(reason, at) for ok, reason in checks if not ok), None)
