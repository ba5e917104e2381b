"""All types that have a small configuration of their own."""

from __future__ import annotations

from zoo.small import Small
from zoo.small_fields import FIELDS
from zoo.small_inputs import INPUTS

SMALL: dict[str, Small] = {**FIELDS, **INPUTS}
