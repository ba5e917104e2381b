"""A step of generation whose keys are narrow in the cache and lifted when they are read, beside one on whole keys.

    code-lm, 256 to 4,096 tokens in the cache     whole keys | a half of their channels | a quarter

All are live models of one plan; bases are random, because what a step takes does not hang on the numbers. Steps are taken in turn, each
makes the cache a token longer.

    OMP_NUM_THREADS=1 python benchmarks/lifted_keys.py [--models code-lm llama] [--lengths 256 1024 4096] [--quick] [--anyway]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from generation.steps import Row, arguments, behind_a_prompt, run
from generation.subjects import NAMES, subject

import attnopt
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.widths import narrow

WHOLE = "whole"
SHARES = {"a half": 2, "a quarter": 4}
COLUMNS = (WHOLE, *SHARES)


def contenders(name: str, small: bool) -> dict[str, Any]:
    """Live models of the Llama family that share their weights."""
    made = {WHOLE: attnopt.optimize(subject(name, small=small), select="model" if small else "measure")}
    config = made[WHOLE].config
    heads, width = config.num_key_value_heads, config.head_dim
    turn = {"dims": width, "first": 0, "interleaved": False, "inv_freq": made[WHOLE].model.rotary_emb.inv_freq.tolist()}
    for share, part in SHARES.items():
        made[share] = shared_copy(made[WHOLE])
        for layer in made[share].model.layers:
            up = torch.linalg.qr(torch.randn(heads, width, width)).Q[..., : width // part].mT.contiguous()
            narrow(layer.self_attn, width // part, width, width, {**turn, "scaling": 1.0}, up)
    return made


def main() -> None:
    given = arguments(__doc__, [n for n in NAMES if n in ("code-lm", "llama")], "code-lm", (256, 1024, 4096)).parse_args()

    def rows_of(name: str) -> Callable[[int, float], Row]:
        models = contenders(name, given.quick)
        return lambda length, seconds: behind_a_prompt(name, models, length, seconds)

    run(given, "lifted_keys", "A step on keys that are lifted when they are read", {c: c for c in COLUMNS}, rows_of)


if __name__ == "__main__":
    main()
