"""Key/value caches of transformers as trees of tensors, so that models that return or take one can be traced and saved.

    DynamicCache(layers)   <->   keys [B, Hk, K, D] of each layer, values [B, Hk, K, Dv] of each layer, tokens seen by sliding layers

torch.export knows no cache class. The tree has the form that transformers itself gives to `DynamicCache`, so that files written
with its registration read back here; only the count of tokens that a sliding layer has seen is added, for its keys do not tell.
torch is told this form only while we export (`trees.told`): others tell it theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnopt.errors import UnreadableModel
from attnopt.hosts.fx.trees import ABSENT, Form, Forms, flatten, nodes

KEYS, VALUES, SEEN = "key_cache", "value_cache", "seen"
TRACED = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")


def our_forms() -> Forms:
    """The cache classes of transformers in our form; none where transformers is not loaded."""
    module = sys.modules.get("transformers.cache_utils")
    found: dict[type, Form] = {}
    for name, apart, together in (
        ("DynamicCache", flatten_layers, unflatten_layers),
        ("EncoderDecoderCache", flatten_pair, unflatten_pair),
    ):
        kind = getattr(module, name, None)
        if kind is not None:
            node = pytree.NodeDef(kind, apart, together, with_keys(apart))
            found[kind] = Form(node, pytree._SerializeNodeDef(kind, f"{kind.__module__}.{name}", None, None))
    return found


def stored_classes() -> list[type]:
    """What the example inputs in a file may hold beside tensors: torch reads no other classes without being told."""
    module = sys.modules.get("transformers.cache_utils")
    layers = [kind for name in TRACED if (kind := getattr(module, name, None)) is not None]
    return [*our_forms(), *layers]


def forms_of(program: ExportedProgram) -> Forms:
    """The forms in which a program takes and returns caches: ours where they fit, else those that torch knows now."""
    forms = our_forms()
    specs = [spec for spec in program.call_spec if spec is not None]
    used = [part for spec in specs for part in nodes(spec) if part.type in forms]
    fits = all(part.context is None or isinstance(part.context, list) for part in used)
    if fits and program.example_inputs is not None and program.call_spec.in_spec is not None:
        fits = cache_parts(flatten(program.example_inputs, forms)[1], forms) == cache_parts(program.call_spec.in_spec, forms)
    if fits:
        return forms
    known = {kind: Form.known(kind) for kind in forms}
    for part in used:
        if known[part.type].node is ABSENT:
            raise UnreadableModel(
                f"the program holds a {part.type.__name__} in a form that torch does not know",
                next_move="Register the class as it was when the program was exported, or export the program again.",
            )
    return known


def cache_parts(spec: pytree.TreeSpec, forms: Forms) -> list[str]:
    return sorted(str(part) for part in nodes(spec) if part.type in forms)


def flatten_layers(cache: Any) -> tuple[list[Any], Any]:
    for layer in cache.layers:
        if type(layer).__name__ not in TRACED:
            raise TypeError(f"a {type(layer).__name__} of a cache is no pair of keys and values")
    held = [layer for layer in cache.layers if layer.keys is not None]
    layout = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    names, children = [KEYS, VALUES], [[layer.keys for layer in held], [layer.values for layer in held]]
    if any(window is not None for window in layout):
        names.append(SEEN)
        children.append([layer.cumulative_length for layer in held if getattr(layer, "sliding_window", None) is not None])
    return children, [names, layout]


def unflatten_layers(children: Sequence[Any], context: Any) -> Any:
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    names, layout = context
    parts = dict(zip(names, children, strict=True))
    keys, values, seen = iter(parts[KEYS]), iter(parts[VALUES]), iter(parts.get(SEEN, ()))
    layers = []
    for window in layout:
        layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
        layer.keys, layer.values = next(keys, None), next(values, None)
        layer.is_initialized = layer.keys is not None
        layer.dtype, layer.device = getattr(layer.keys, "dtype", None), getattr(layer.keys, "device", None)
        if window is not None and layer.is_initialized:
            layer.cumulative_length = next(seen, None) or getattr(layer.keys, "shape", (0, 0))[-2]
        layers.append(layer)
    cache = DynamicCache()
    if layers:
        cache.layers = layers
        cache.layer_class_to_replicate = None
    return cache


def flatten_pair(cache: Any) -> tuple[list[Any], Any]:
    return [cache.self_attention_cache, cache.cross_attention_cache], None


def unflatten_pair(children: Sequence[Any], context: Any) -> Any:
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    pair = EncoderDecoderCache(DynamicCache(), DynamicCache())
    pair.self_attention_cache, pair.cross_attention_cache = children
    layers = getattr(children[1], "layers", ())
    pair.is_updated = {i: layer.is_initialized for i, layer in enumerate(layers)}
    return pair


def with_keys(apart: Any) -> Any:
    """The same flattening with a name for each child: key_cache, value_cache; self, cross."""

    def named(cache: Any) -> tuple[list[Any], Any]:
        children, context = apart(cache)
        names = ["self", "cross"] if context is None else context[0]
        return [(pytree.MappingKey(n), c) for n, c in zip(names, children, strict=True)], context

    return named
