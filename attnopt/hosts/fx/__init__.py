"""The torch host: a model traced by torch.export, edited as an FX graph."""

from __future__ import annotations

from attnopt.hosts.fx.capture import Captured, capture
from attnopt.hosts.fx.host import FxHost, load_pt2

__all__ = ["Captured", "FxHost", "capture", "load_pt2"]
