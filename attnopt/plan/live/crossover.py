"""From how many tokens of a cache on the kernels of decoding pay in the whole model.

    llama, 12 layers by tvm-decode   ->   a step on 128 tokens takes 1.01 of its time, on 512 0.98, on 2,048 0.90: from 512 tokens on

A kernel is chosen by itself, on a cache of 1,024 tokens. What stands around it in a step, the call from Python and a processor full of
other work, weighs more the shorter a cache is. So steps of the model with its kernels and without them are timed in turn, on caches of a
few lengths: a kernel that pays on the longest is used from the shortest on which it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attnopt.hosts.module.host import ModuleHost
from attnopt.hosts.module.layer_attention import LayerAttention
from attnopt.plan.live.converting import Live, attach, changed
from attnopt.plan.live.generating import BLOCK, Used, positions_of
from attnopt.plan.live.steps import step_times

LENGTHS = (128, 512, 2048)
ROUNDS = 4  # of steps in turn at each


def settled(host: ModuleHost, made: Live) -> tuple[Live, list[str]]:
    """The same with decode kernels from where on they pay, or without those that never do, and what a report says of it.

    As it is where no step can be timed.
    """
    if not any(held.decode is not None for held in made.layers.values()):
        return made, []
    room = positions_of(made.model) - BLOCK * (2 * ROUNDS + 2)
    lengths = [n for n in LENGTHS if n <= room]
    plain = rebuilt(host, made, {path: without_decode(held) for path, held in made.layers.items()})
    models = {"own": Used(plain.model, live=True), "kernels": Used(made.model, live=True)}
    shares: dict[int, float] = {}
    for n in (*lengths[-1:], *lengths[:-1]):  # the longest tells whether others need be timed
        times = step_times({**made.idle, **made.layers}, models, 1, n, most=ROUNDS)
        if times is None:
            return made, []
        shares[n] = times["kernels"].ratio(times["own"])
        if n == lengths[-1] and shares[n] >= 1.0:
            said = f"live, decode: a step on {n} tokens takes {shares[n]:.2f} of its time by kernels, so that none is used"
            return plain, [said]
        if n != lengths[-1] and shares[n] < 1.0:
            break
    if not shares:
        return made, []
    told = ", ".join(f"{share:.2f} on {n}" for n, share in sorted(shares.items()))
    said = f"live, decode: a step takes {told} tokens of its time without kernels"
    least = min(n for n, share in shares.items() if share < 1.0)
    if least > lengths[0]:
        made = rebuilt(host, made, {path: replace(held, least=least) for path, held in made.layers.items()})
        said += f": they are used from {least} on"
    return made, [said]


def without_decode(held: LayerAttention) -> LayerAttention:
    return replace(held, decode=None, names=(held.names[0], ""))


def rebuilt(host: ModuleHost, made: Live, layers: Mapping[str, LayerAttention]) -> Live:
    """The model again with its attention by these."""
    model = changed(host.model, made.changes)
    used = {path: held for path, held in layers.items() if any(held.names) or held.narrowed}
    attach(model, used, windows=made.windows)
    idle = {**made.idle, **{path: held for path, held in layers.items() if path not in used}}
    return replace(made, model=model, layers=used, idle=idle)
