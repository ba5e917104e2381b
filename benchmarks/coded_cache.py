"""A step of generation on a cache in codes beside one on a cache of float32: by the kernel that reads codes, and by reading them back.

    code-lm, 256 to 4,096 tokens in the cache     float32 | int8, int4, akvq-vl, zip-cache: read back by torch | read by the kernel

All are live models of one plan, which differ in their cache; steps are taken in turn, each makes the cache a token longer. Bytes are those
that the cache holds for each token behind the last step, empty places counted.

    OMP_NUM_THREADS=1 python benchmarks/coded_cache.py [--models code-lm llama] [--forms akvq-vl zip-cache] [--lengths 256 1024 4096]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from generation.steps import Row, arguments, behind_a_prompt, run
from generation.subjects import NAMES, subject

import attnopt
from attnopt.hosts.module.copying import shared_copy
from attnopt.ir.token_blocks import TokenBlocks
from attnopt.passes.edits.caches.state import clause
from attnopt.passes.kvcache.akvq_vl import AkvqVl
from attnopt.plan.live.codes import held_by

PLAIN = "float32"
FORMS = {
    "int8": "int8",
    "int4": "cache(k=int4, v=int4, group=32, scales=fp16)",
    "akvq-vl": str(clause(dict.fromkeys("kv", AkvqVl().kept(of_text=False)))),
    "zip-cache": TokenBlocks(100, 50).words_of_a_spec,
}


def contenders(name: str, small: bool, forms: Sequence[str]) -> dict[str, Any]:
    """Live models that share their weights and their kernels for numbers."""
    made = {PLAIN: attnopt.optimize(subject(name, small=small), select="model" if small else "measure")}
    for form in forms:
        words = FORMS[form]
        back, kernel = shared_copy(made[PLAIN]), shared_copy(made[PLAIN])
        back.choose_codes = None
        back.cache_codes = kernel.cache_codes = words
        made |= {f"{form}, read back": back, f"{form}, kernel": kernel}
        print(*(n for n in kernel.report.notes if n.startswith("live, decode on codes")), flush=True)
        for each in held_by(kernel).values():
            assert each.on_codes is not None
            assert each.on_codes.run is not None, each.on_codes.why
    return made


def main() -> None:
    parser = arguments(__doc__, NAMES, "code-lm", (256, 1024, 4096))
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    given = parser.parse_args()
    kept = {PLAIN: PLAIN} | {f"{form}, kernel": form for form in given.forms}
    asked = "" if given.forms == list(FORMS) else f" --forms {' '.join(given.forms)}"

    def rows_of(name: str) -> Callable[[int, float], Row]:
        models = contenders(name, given.quick, given.forms)
        return lambda length, seconds: behind_a_prompt(name, models, length, seconds)

    run(given, "coded_cache", "A step on a cache in codes", kept, rows_of, asked=asked)


if __name__ == "__main__":
    main()
