"""Inputs of a model as it was opened, as those that a rewritten one takes.

past.2.key [float]   ->   past.1.key [int8], past.1.key_scales, past.1.key_zeros      layer 1 removed, the cache in int8
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Remake = Callable[[Tensor], Sequence[Tensor]]


def adapted(
    names: Sequence[str],
    inputs: Mapping[str, Tensor],
    first_names: Mapping[str, str],
    remade: Mapping[str, tuple[str, Remake, int]],
) -> dict[str, Tensor]:
    """What is at hand for these names. first_names: of inputs that were renamed. remade: (source, how, which of the results)."""
    found: dict[str, Tensor] = {name: inputs[name] for name in names if name in inputs and inputs.keys() == set(names)}
    for name in names if not found else ():
        source, remake, part = remade.get(name, (name, None, 0))
        given = inputs.get(first_names.get(source, source))
        if given is not None:
            found[name] = given if remake is None else remake(given)[part]
    return found
