"""One use of a policy on live models: which layers it is given, when it evicts, and what that came to.

prepare(cache, i)      before a layer's cache takes tokens: a full-attention layer forgets from then on, others keep what they have
attended(…)            after its attention: the first time the prompt is compressed, later what came, every so many tokens
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin

from attnopt.errors import AttnoptError, InputMismatch
from attnopt.hosts.eviction.block_layer import BlockLayer
from attnopt.hosts.eviction.coded import CodedLayer
from attnopt.hosts.eviction.layer import EvictingLayer
from attnopt.hosts.eviction.live_forms import keeps_ends
from attnopt.hosts.eviction.turning import Turning, function_of, reads, turns, unreadable
from attnopt.hosts.eviction.whole_layer import WholeLayer
from attnopt.hosts.module.interface import HELD
from attnopt.hosts.module.widths import cut_queries, lifts, spreads
from attnopt.ir.clause import Clause
from attnopt.ir.eviction import Policy, Room, Seen, choose
from attnopt.ir.spec import AttentionSpec, as_spec


@dataclass(eq=False)
class Session:
    """policy and room: see `ir.eviction`. clause: how rows are kept, None as they come.

    layers: the caches that forget, by layer, of the last cache that was used. left: why other layers keep all. turnings: the last call of
    each rotary module, by layer type.
    """

    policy: Policy
    room: Room
    clause: Clause | None = None
    layers: dict[int, EvictingLayer] = field(default_factory=dict)
    specs: dict[int, AttentionSpec] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)
    turnings: dict[str, Turning] = field(default_factory=dict)
    evicted: int = 0
    waiting: EvictingLayer | None = None

    def prepare(self, cache: Cache, index: int, rows: Tensor) -> None:
        """Lets the layer of a cache forget; what it holds already, it holds from now on as tokens of the first places.

        rows: the keys that come. One head of one channel is no key: a layer without attention counts its tokens by it.
        """
        self.require_attended()
        if rows.shape[1] == rows.shape[3] == 1:
            self.left[index] = "its attention is gone, and a number for each token counts them"
            return
        if getattr(cache, "offloading", False):
            raise unsupported("a cache that is moved between devices", index)
        while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[index]
        if isinstance(layer, EvictingLayer):
            self.layers[index] = self.waiting = layer
            layer.admitted = True
            return
        if isinstance(layer, BlockLayer) or (isinstance(layer, CodedLayer) and keeps_ends(layer.clause)):
            raise AttnoptError(
                "a cache that keeps some tokens exactly beside codes cannot forget others",
                where=f"layer {index}, {layer.clause}",
                next_move='Set model.cache_codes = None, or "int4", or generate outside of attnopt.cache(…).',
            )
        if not any(type(x) is DynamicLayer or isinstance(x, (EvictingLayer, WholeLayer)) for x in cache.layers):
            raise refused(cache, index)
        if type(layer) is not DynamicLayer and not isinstance(layer, WholeLayer):
            self.left[index] = reason(layer) or raised(unsupported(f"a cache layer {type(layer).__name__}", index))
            return
        stored = isinstance(layer, WholeLayer)
        made = EvictingLayer(index, layer.clause if stored and self.clause is None else self.clause)
        if layer.is_initialized and layer.get_seq_length():
            made.take(layer.keys, layer.values)
            if stored and made.clause == layer.clause:
                made.k, made.v = layer.k, layer.v  # rounded once
        made.admitted = True
        cache.layers[index] = self.layers[index] = self.waiting = made

    def require_attended(self) -> None:
        """Raises where the attention of the layer before never came: it does not go through transformers' interface."""
        if (waiting := self.waiting) is not None:
            self.waiting = None
            raise AttnoptError(
                "its attention does not go through transformers' AttentionInterface, so that nothing says what it attends to",
                where=f"layer {waiting.index}",
                next_move="Generate with this model outside of attnopt.cache(…).",
            )

    def attend(
        self, function: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any
    ) -> Any:
        """The attention of a layer on what it holds, and then its eviction."""
        layer, self.waiting = self.waiting, None
        if layer is None:
            if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[3] != k.shape[2] and self.layers:
                raise unsupported("a cache whose keys several layers read", getattr(module, "layer_idx", -1))
            return function(module, q, k, v, mask, **given)
        config = getattr(module, "config", None)
        if getattr(getattr(module, HELD, None), "narrowed", False):
            raise AttnoptError(
                "a plan hides keys of this layer by their places in its cache, which a cache policy changes",
                where=f"layer {layer.index}",
                next_move="Optimise the model without passes that narrow masks, or generate outside of attnopt.cache(…).",
            )
        if getattr(config, "is_encoder_decoder", False):
            raise unsupported("the cache of an encoder and decoder", layer.index)
        if spreads(module):
            raise AttnoptError(
                "a plan lets query heads share key heads unevenly, which policies do not know",
                where=f"layer {layer.index}",
                next_move="Optimise the model without key-norm-groups, or generate outside of attnopt.cache(…).",
            )
        assert layer.places is not None
        read = cut_queries(module, q).shape[3]
        known = read == layer.width or lifts(module)
        if k.shape[:3] != layer.places.shape or k.shape[3] not in (read, q.shape[3]) or not known:
            raise unsupported("a cache of other rows than attention reads", layer.index)
        first = layer.seen == q.shape[2]
        if layer.start is None:
            layer.start = start_of(mask, len(q), layer.seen, layer.index).to(q.device)
        found = function(module, q, k, v, layer.visible(mask, q), **given)
        with torch.no_grad():
            self.attended(layer, module, q, k[..., :read], spec_of(module, q, k, given), first)
        return found

    def attended(self, layer: EvictingLayer, module: nn.Module, q: Tensor, k: Tensor, spec: AttentionSpec, first: bool) -> None:
        """Keep the last queries where they are needed later, and evict when it is time."""
        if why := self.policy.unfit(spec, layer.index):
            self.left[layer.index] = why
            return
        self.specs[layer.index] = spec
        every, count = self.room.interval(self.policy), self.policy.queries
        plain = cut_queries(module, self.undone(module, q)) if self.policy.plain else None
        q = cut_queries(module, q)
        remembers = every is not None and count > 0
        prompt = first or (self.room.every == 0 and q.shape[2] > 1)  # a prompt may come in pieces, and another turn behind it
        if remembers or prompt:
            layer.q = q if layer.q is None else torch.cat([layer.q, q], 2)
            layer.plain = plain if layer.plain is None or plain is None else torch.cat([layer.plain, plain], 2)
        if prompt or (every is not None and layer.fresh >= every):
            self.evict(layer, module, k, spec, not prompt)
        held = (x[:, :, -count:].contiguous() if remembers and x is not None else None for x in (layer.q, layer.plain))
        layer.q, layer.plain = held

    def evict(self, layer: EvictingLayer, module: nn.Module, k: Tensor, spec: AttentionSpec, decoding: bool) -> None:
        assert layer.places is not None and layer.start is not None
        v, q = layer.v.read(), layer.q
        q_places = None if q is None else torch.arange(layer.seen - q.shape[2], layer.seen, device=k.device)
        seen = Seen(
            spec, layer.index, k, v, layer.places, layer.start, layer.seen, q, q_places, layer.plain,
            self.future(module, k.shape[3]), decoding,
        )  # fmt: skip
        index, counts = choose(self.policy, self.room, seen)
        before = layer.places.shape[2]
        layer.keep_only(index, counts)
        self.evicted += before - layer.places.shape[2]

    def undone(self, module: nn.Module, q: Tensor) -> Tensor:
        turning, apply = self.turning(module), function_of(module)
        if turning is None or apply is None:
            return q
        return turning.undone(q, apply)

    def future(self, module: nn.Module, width: int) -> Callable[[int], Tensor] | None:
        turning, apply = (self.turning(module), function_of(module)) if self.policy.plain else (None, None)
        return None if turning is None or apply is None else functools.partial(turning.future, width=width, apply=apply)

    def turning(self, module: nn.Module) -> Turning | None:
        """How this layer's queries were turned; None where they are not. Raises AttnoptError where that cannot be read."""
        if not turns(module):
            return None
        reads(module)
        found = self.turnings.get("full_attention") or self.turnings.get("") or next(iter(self.turnings.values()), None)
        if (found is None) != (function_of(module) is None):
            raise unreadable(module, "its rotary module and function are not those of transformers' decoders")
        return found

    @property
    def bytes(self) -> int:
        """What the caches that forget take, with places and scales."""
        return sum(layer.bytes for layer in self.layers.values())

    @property
    def whole_bytes(self) -> int:
        """What they would take with all tokens, as the model has them."""
        return sum(
            layer.exact_bytes * layer.seen * (0 if layer.start is None else len(layer.start)) for layer in self.layers.values()
        )

    def __str__(self) -> str:
        """What was kept, layer by layer."""
        lines = [f"{self.policy.name}: {self.bytes} of {self.whole_bytes} bytes in the caches of {len(self.layers)} layers"]
        for index in sorted({*self.layers, *self.left}):
            if index in self.left:
                lines.append(f"  layer {index}: keeps all: {self.left[index]}")
            elif (layer := self.layers[index]).places is not None:
                held = layer.places.shape[2]
                clause = f"{self.specs[index]} {self.policy.clause(held)}" if index in self.specs else ""
                lines.append(f"  layer {index}: {held} of {layer.seen} tokens: {clause}")
        return "\n".join(lines)


def reason(layer: Any) -> str:
    """Why a layer of another kind keeps its own cache; empty where nothing is known of it."""
    if getattr(layer, "is_sliding", False) and not hasattr(layer, "max_cache_len"):
        return f"a sliding window of {layer.sliding_window} keeps its own cache"
    return "a linear attention keeps a state, not tokens" if isinstance(layer, LinearAttentionCacheLayerMixin) else ""


def refused(cache: Cache, index: int) -> AttnoptError:
    """Why no layer of a cache can forget."""
    known = [reason(layer) for layer in cache.layers]
    if all(known) and known:
        return AttnoptError(
            f"no layer of this model has a cache that a policy could shorten: {known[0]}",
            where=f"layer {index}",
            next_move="Generate outside of attnopt.cache(…).",
        )
    return unsupported(f"a {type(cache).__name__} of {type(cache.layers[index]).__name__}", index)


def unsupported(what: str, index: int) -> AttnoptError:
    return AttnoptError(
        f"{what} cannot forget tokens",
        where=f"layer {index}",
        next_move='Leave cache_implementation= and past_key_values= out; for fewer bits give store="int8" to attnopt.cache.',
    )


def raised(error: AttnoptError) -> str:
    raise error


def spec_of(module: nn.Module, q: Tensor, k: Tensor, given: dict[str, Any]) -> AttentionSpec:
    """What the interface is asked to compute, in the words of a spec."""
    if given.get("position_bias") is not None:
        raise InputMismatch("scores have a bias by position, which policies do not know", where=type(module).__name__)
    scale = given.get("scaling")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    normed = any(getattr(module, name, None) is not None for name in ("k_norm", "k_layernorm", "key_layernorm"))
    return written(q.shape[1], k.shape[1], scale, given.get("softcap"), normed, given.get("s_aux") is not None)


@functools.lru_cache(maxsize=64)
def written(heads: int, key_heads: int, scale: float, softcap: float | None, normed: bool, sink: bool) -> AttentionSpec:
    words = ["softmax", f"heads({heads}, {key_heads})", "norm(rms)" if normed else "", f"scale({scale!r})"]
    words += [f"softcap({float(softcap)!r})" if softcap else "", "causal", "sink(load(sinks, h))" if sink else ""]
    return as_spec(" ".join(word for word in words if word))


def start_of(mask: Any, batch: int, length: int, index: int) -> Tensor:
    """The place of the first token behind left padding, [B], from the mask of the first call, which sees `length` places.

    Raises InputMismatch for other padding.
    """
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise AttnoptError(
            f"a mask of type {type(mask).__name__} does not say which tokens are padding",
            where=f"layer {index}",
            next_move='Load the model with attn_implementation="sdpa" or "eager".',
        )
    last = mask[:, 0, -1] if mask.ndim == 4 else mask  # what the last query sees
    seen = last if last.dtype == torch.bool else (last > torch.finfo(last.dtype).min / 2 if mask.ndim == 4 else last != 0)
    seen = seen[..., :length].expand(batch, -1)
    first = seen.to(torch.int8).argmax(-1)
    if not bool((seen.sum(-1) == seen.shape[-1] - first).all()):
        raise InputMismatch(
            "the prompt is padded on the right or has holes",
            where="attention_mask",
            next_move='Pad on the left: tokenizer.padding_side = "left".',
        )
    return first
