"""How far a last bit comes in a model: what it computes where all that it embeds moves by a millionth.

Rounding to codes has borders. A number beside one falls to either side when its last bit changes, and behind many layers of codes a
part of what the rounding loses depends on that: two runtimes that do the same cannot agree better than one with itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NUDGE = 1e-6  # relative, normally distributed: some last bits of float32


@torch.no_grad()
def nudged(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor] | None:
    """The logits of a language model with its embedded tokens moved; None where it takes nothing but tokens."""
    rest = {name: x for name, x in inputs.items() if name != "input_ids"}
    try:
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0)).to(embedded)
        return [model(**rest, inputs_embeds=embedded * (1 + NUDGE * noise), use_cache=False).logits]
    except (KeyError, TypeError, ValueError, NotImplementedError):
        return None
