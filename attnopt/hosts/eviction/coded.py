"""A live cache in codes: each token is rounded once, when it comes, and read as its codes stand for it.

    DynamicCache of DynamicLayer   ->   the same cache of CodedLayer       k, v [B, G, n, D] -> codes, scales, zeros     (`Stored`)

What attention reads is what `cache(k=int8, v=int8)` of a spec means, to the last bit, for prompts and for new tokens alike. A new token
gets its keys and values as they are stored (`Unread`): a kernel of ours reads the codes, anything else the numbers. Beams, batches and
rolling back work as on any cache of transformers. Layers that keep something else than all their tokens keep it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from attnopt.hosts.eviction.preparing import cannot, empty, keeps_its_own, unmoved
from attnopt.hosts.eviction.unread import Unread
from attnopt.hosts.eviction.whole_layer import WholeLayer
from attnopt.ir.clause import Clause

SAID = "cache_codes", "in codes"


class CodedLayer(WholeLayer):
    """Keys and values of all tokens of one layer in the codes of a clause, which `stored.storage` made."""

    hands_codes = False  # whether one new token gets its cache unread

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        one = self.take(key_states, value_states)
        if not (one and self.hands_codes) or self.k.clause is None or key_states.requires_grad or torch.compiler.is_compiling():
            return self.k.read(), self.v.read()
        return Unread(self.k, key_states.shape[3]), Unread(self.v, value_states.shape[3])


def in_codes(cache: Cache, clause: Clause, hands_codes: bool = False) -> None:
    """Let the layers of a cache that keep all their tokens keep them in codes from now on; what they hold is rounded.

    hands_codes: who asks for them in the next call may get them as they are stored.

    Raises AttnoptError for caches that cannot: of fixed size, quantised by transformers, moved between devices.
    """
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = functools.partial(CodedLayer, clause)
    unmoved(cache, *SAID)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, CodedLayer):
            layer.hands_codes = hands_codes
        elif type(layer) is DynamicLayer or isinstance(layer, WholeLayer):
            cache.layers[i] = made = CodedLayer(clause)
            if layer.get_seq_length():
                made.update(layer.keys, layer.values)
        elif not keeps_its_own(layer):
            raise cannot(f"a {type(cache).__name__} of {type(layer).__name__}", *SAID)


def fresh(model: Any, clause: Clause) -> Cache:
    """An empty cache in codes, as the model would make one."""
    return empty(model, lambda cache, hands: in_codes(cache, clause, hands))


def bytes_per_token(cache: Cache) -> float:
    """What all layers hold, codes with their scales, for each token of each sequence that was seen."""
    total, tokens = 0, 0
    for layer in cache.layers:
        sides = [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(x, Tensor)]
        total += getattr(layer, "bytes", sum(x.nbytes for x in sides))
        tokens = max(tokens, len(sides[0]) * int(layer.get_seq_length()) if sides else 0)
    return total / max(1, tokens)
