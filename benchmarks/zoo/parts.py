"""The traceable part of models that torch.export cannot follow as a whole.

DBRX loops over the experts that data chose; each expert is run instead. Longformer and LED ask in Python whether any token attends
globally, and divide lengths by `torch.div`, which makes numbers into data. Their attention is measured by itself: one layer, without
global tokens, its lengths divided as numbers. Vision encoders cut images apart at lengths that are read out of a tensor of grids, and
others ask in Python whether a mask is all ones: such a model is traced with the answers that its example gave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class WholeDivision(TorchFunctionMode):
    """torch.div(12, 6, rounding_mode="trunc") is 2, not a tensor."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.div and not any(isinstance(a, Tensor) for a in args):
            return args[0] // args[1]
        return func(*args, **(kwargs or {}))


READ = {Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__index__, Tensor.__float__}
BY_SIZES = {torch.arange, torch.linspace, torch.zeros, torch.ones, torch.full}
TO_SIZES = {Tensor.view, Tensor.reshape, nn.functional.interpolate}
NONZERO = {torch.nonzero, Tensor.nonzero}
UNIQUE = {torch.unique_consecutive, Tensor.unique_consecutive}


class Answers(TorchFunctionMode):
    """What Python reads out of tensors: noted where they are real, given again in the same order where they are traced.

    Read are numbers, sizes, and positions whose count depends on data.
    """

    def __init__(self, noted: list[Any], given: Iterator[Any] | None) -> None:
        super().__init__()
        self.noted, self.given = noted, given

    def read(self, ask: Callable[[], Any]) -> Any:
        if self.given is not None:
            return next(self.given)
        self.noted.append(ask())
        return self.noted[-1]

    def size(self, value: Any) -> Any:
        is_number = isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point()
        return self.read(value.item) if is_number else value

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist:  # only of real tensors: traced ones are asked for each item
            self.noted += args[0].flatten().tolist()
        elif func in READ:
            return self.read(lambda: func(*args, **kwargs))
        elif func in BY_SIZES:
            args, kwargs = tree_map(self.size, (args, kwargs))
        elif func in TO_SIZES:
            args, kwargs = (args[0], *tree_map(self.size, args[1:])), tree_map(self.size, kwargs)
        elif func in NONZERO or (func is torch.where and len(args) == 1 and not kwargs):
            places = torch.tensor(self.read(lambda: torch.nonzero(args[0]).tolist()), dtype=torch.int64).reshape(-1, args[0].ndim)
            return places.unbind(1) if func is torch.where or kwargs.get("as_tuple") else places
        elif func in UNIQUE or is_choice_of_positions(func, args):
            return torch.tensor(self.read(lambda: func(*args, **kwargs).tolist()), dtype=args[0].dtype)
        elif func in (torch.repeat_interleave, Tensor.repeat_interleave) and len(args) > 1 and isinstance(args[1], Tensor):
            kwargs = {**kwargs, "output_size": self.read(lambda: int(args[1].sum()))}
        return func(*args, **kwargs)


def is_choice_of_positions(func: Callable[..., Any], args: Any) -> bool:
    """index[mask] of whole numbers."""
    return (
        func is Tensor.__getitem__
        and isinstance(args[1], Tensor)
        and args[1].dtype == torch.bool
        and args[0].dtype in (torch.int64, torch.int32)
    )


def with_answers(model: nn.Module) -> nn.Module:
    """The model, traced along the path that its last real run took."""
    forward = model.forward
    noted: list[Any] = []

    @functools.wraps(forward)
    def along(*args: Any, **kwargs: Any) -> Any:
        traced = torch.compiler.is_exporting()
        if not traced:
            noted.clear()
        with Answers(noted, iter(noted) if traced else None):
            return forward(*args, **kwargs)

    model.forward = along
    return model


class WindowedLayer(nn.Module):
    """hidden_states [B, L, D], attention_mask [B, L] (0 to attend, -10000 for padding) -> what the layer gives."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Any:
        with WholeDivision():
            return self.layer(
                hidden_states,
                attention_mask=attention_mask,
                is_index_masked=attention_mask < 0,
                is_index_global_attn=attention_mask > 0,
                is_global_attn=False,
            )


class DenseExperts(nn.Module):
    """DBRX's experts, each run on every token and weighted by zero where it was not chosen: equal numbers, and no loop over data."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        mlp, count = self.experts.mlp, self.experts.num_experts
        w1, v1, w2 = (w.view(count, -1, w.shape[-1]) for w in (mlp.w1, mlp.v1, mlp.w2))
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = torch.zeros(tokens.shape[0], count).scatter(1, top_k_index, top_k_weights)
        made = [weights[:, i, None] * mlp(tokens, w1[i], v1[i], w2[i]) for i in range(count)]
        return torch.stack(made).sum(0).view_as(hidden_states)


def with_dense_experts(model: Any) -> nn.Module:
    for block in model.blocks:
        block.ffn.experts = DenseExperts(block.ffn.experts)
    return model
