"""The calling convention of a model: from any way a user may call it to the flat inputs of its graph, and back.

    model(ids, attention_mask=mask)   ->   bind   ->   {"input_ids": ids, "attention_mask": mask}   ->   flat leaves

An exported program takes its arguments exactly as it was traced. Users call models by position, by keyword and with defaults
left out; `Convention` accepts all of these and says clearly what the traced graph cannot take.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.errors import InputMismatch
from attnopt.hosts.fx.trees import Forms, flatten, told, unflatten

Arguments = dict[str, Any]


def bind(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
    """Parameter name -> value, with *args as numbered names left in a tuple and **kwargs spread out."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as failure:
        raise InputMismatch(
            f"the inputs do not fit the model's parameters: {failure}",
            next_move=f"The model takes {signature}.",
        ) from None
    arguments: Arguments = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    return arguments


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as users give them (a tensor, a tuple, or a dict of keywords) as (args, kwargs)."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def split(signature: inspect.Signature, arguments: Arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as (args, kwargs) for a call: keywords wherever the parameter allows it."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    positional = any(
        signature.parameters[n].kind is inspect.Parameter.VAR_POSITIONAL for n in arguments if n in signature.parameters
    )
    for name, value in arguments.items():
        parameter = signature.parameters.get(name)
        if parameter is None or parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kwargs[name] = value
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            args += value
        elif positional or parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            args.append(value)
        else:
            kwargs[name] = value
    return tuple(args), kwargs


@dataclass(frozen=True)
class Convention:
    """How the traced graph is called. `traced` are the arguments at tracing time; `in_spec` the tree of (args, kwargs).

    caches: the forms of the cache classes in both trees. A call reads them here, whatever torch has been told since.
    """

    signature: inspect.Signature
    traced: Arguments
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    caches: Forms = field(default_factory=dict)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat inputs of the graph for this call. Raises InputMismatch for what was not traced."""
        given = bind(self.signature, args, kwargs)
        for name, value in given.items():
            if name not in self.traced and not self.is_default(name, value):
                raise InputMismatch(
                    f"'{name}' was not among the example inputs, so the optimised model cannot take it",
                    next_move=f"Optimise again with example inputs that hold '{name}'.",
                )
        complete = {}
        for name, traced in self.traced.items():
            if name not in given and holds_tensor(traced, self.caches):
                raise InputMismatch(
                    f"'{name}' is missing; the model was optimised with it",
                    next_move="Pass it, or optimise again with example inputs that leave it out.",
                )
            complete[name] = given.get(name, traced)
        leaves, spec = flatten(split(self.signature, complete), self.caches)
        if spec != self.in_spec:
            raise InputMismatch(
                "the inputs are nested in another way than the example inputs",
                where=short(spec),
                next_move=f"Wanted: {short(self.in_spec)}",
            )
        for leaf, traced in zip(leaves, self.leaves(), strict=True):
            if not isinstance(traced, Tensor) and leaf != traced:
                raise InputMismatch(
                    f"the model was optimised for the value {traced!r} where this call gives {short(leaf)}",
                    next_move="Optimise again with that value in the example inputs.",
                )
        return leaves

    def leaves(self) -> list[Any]:
        """The flat inputs at tracing time, tensors and other values alike."""
        return flatten(split(self.signature, self.traced), self.caches)[0]

    def is_default(self, name: str, value: Any) -> bool:
        parameter = self.signature.parameters.get(name)
        return value is None or (parameter is not None and not isinstance(value, Tensor) and parameter.default == value)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The return value of the model, in its own type."""
        return unflatten(leaves, self.out_spec, self.caches)

    def output_names(self) -> list[str]:
        """A name for each flat output: the key of a ModelOutput or dict, else output_0, output_1, …"""
        count = self.out_spec.num_leaves
        try:
            with told(self.caches):
                leaves = [torch.zeros(1, 1, 1, 1)] * count  # tensors: other forms take numbers in a cache for no leaves
                tree = pytree.tree_unflatten(leaves, self.out_spec)
                paths, _ = pytree.tree_flatten_with_path(tree)
        except (TypeError, ValueError):
            return [f"output_{i}" for i in range(count)]
        names = ["_".join(filter(None, map(key_name, path))) for path, _ in paths]
        return [f"output_{name or i}" if not name or name[0].isdigit() else name for i, name in enumerate(names)]


def key_name(key: Any) -> str:
    if isinstance(key, pytree.SequenceKey):
        return str(key.idx)
    return str(getattr(key, "key", getattr(key, "name", "")))


def holds_tensor(tree: Any, caches: Forms) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in flatten(tree, caches)[0])


def short(thing: Any) -> str:
    if isinstance(thing, Tensor):
        return f"{str(thing.dtype).removeprefix('torch.')}{list(thing.shape)}"
    text = " ".join(str(thing).split())
    return text if len(text) <= 160 else f"{text[:157]}..."


def traced_signature(arguments: Sequence[tuple[str, Any, bool]], caches: Forms) -> inspect.Signature:
    """A signature for a program that has none: (name, traced value, keyword only); values that are no tensors become defaults."""
    parameters = []
    for name, value, keyword in arguments:
        kind = inspect.Parameter.KEYWORD_ONLY if keyword else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = inspect.Parameter.empty if holds_tensor(value, caches) else value
        parameters.append(inspect.Parameter(name, kind, default=default))
    optional = False
    for i, parameter in enumerate(parameters):  # a parameter after one with a default needs one too, or becomes a keyword
        optional = optional or parameter.default is not inspect.Parameter.empty
        if (
            optional
            and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            and parameter.default is inspect.Parameter.empty
        ):
            parameters[i] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    order = sorted(parameters, key=lambda p: p.kind is inspect.Parameter.KEYWORD_ONLY)
    return inspect.Signature(order)
