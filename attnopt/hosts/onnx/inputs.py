"""What a user gives a model, as the named tensors it reads; or one clear error.

(ids, mask)   or   {"input_ids": ids, "attention_mask": mask}   ->   {"input_ids": tensor, "attention_mask": tensor}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from attnopt.errors import InputMismatch


@dataclass(frozen=True)
class InputSpec:
    """One tensor that the model reads; symbolic sizes are None."""

    name: str
    shape: tuple[int | None, ...] | None
    dtype: torch.dtype | None

    def __str__(self) -> str:
        shape = "any shape" if self.shape is None else "[" + ", ".join("any" if s is None else str(s) for s in self.shape) + "]"
        return f"{self.name}: {'any type' if self.dtype is None else str(self.dtype).removeprefix('torch.')} {shape}"


def named_inputs(specs: Sequence[InputSpec], inputs: Any) -> dict[str, Tensor]:
    """Arrays or tensors, by position or name, in the order of the model's inputs. Raises InputMismatch."""
    by_name = {s.name: s for s in specs}
    given = as_mapping(list(by_name), inputs)
    wanted = f"The model reads {'; '.join(map(str, specs))}." if specs else "The model reads no inputs."
    for name in given:
        if name not in by_name:
            raise InputMismatch(f"the model has no input '{name}'", next_move=wanted)
    for name in by_name:
        if name not in given:
            raise InputMismatch(f"input '{name}' is missing", next_move=wanted)
    return {name: checked(spec, given[name]) for name, spec in by_name.items()}


def call_inputs(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs of one call: a dict or arrays by position, and by name. Raises InputMismatch where one comes twice."""
    given = as_mapping(names, args[0] if len(args) == 1 and isinstance(args[0], Mapping) else args)
    for name in kwargs:
        if name in given:
            raise InputMismatch(f"input '{name}' is given twice", next_move="Give it by position or by name.")
    return {**given, **kwargs}


def as_mapping(names: Sequence[str], inputs: object) -> Mapping[str, Any]:
    """A user's inputs by name: a dict as it is, a tuple or single tensor in the order of the model's inputs."""
    if isinstance(inputs, Mapping):
        return inputs
    given = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    return dict(zip(names, given, strict=False)) | {f"input {i}": x for i, x in enumerate(given) if i >= len(names)}


def checked(spec: InputSpec, given: Any) -> Tensor:
    tensor = as_tensor(spec, given)
    fits = spec.dtype in (None, tensor.dtype)
    if spec.shape is not None:
        fits = fits and tensor.ndim == len(spec.shape)
        fits = fits and all(want in (None, got) for want, got in zip(spec.shape, tensor.shape, strict=True))
    if not fits:
        raise InputMismatch(
            f"input '{spec.name}' is {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
            next_move=f"The model takes {spec}.",
        )
    return tensor


def as_tensor(spec: InputSpec, given: Any) -> Tensor:
    """Torch takes neither negative strides nor foreign byte orders, and warns of read-only arrays: those are copied."""
    if isinstance(given, Tensor):
        return given
    try:
        array = np.asarray(given)
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(np.require(array, requirements=("C", "W")).view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ("C", "W")))
    except (TypeError, ValueError) as failure:
        reason = str(failure).split(". ")[0].rstrip(".")
        raise InputMismatch(
            f"input '{spec.name}', a {type(given).__name__}, is no array of numbers: {reason}",
            next_move=f"The model takes {spec}.",
        ) from None


def as_array(tensor: Tensor) -> np.ndarray:
    """Numpy has no bfloat16; it is handed over as float32, which holds every value of it."""
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
