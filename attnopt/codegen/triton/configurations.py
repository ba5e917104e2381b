"""How the prefill family may be compiled for a spec on an architecture, first choice first: tiles, and what Hopper adds to them.

    softmax causal, sm_90, width 128, float16   ->   (Tile(128, 128, 8, 2, persistent, descriptors), …, Tile(128, 128, 8, 2), …)

Which of them the compiler makes as they are meant is for it to say (see compile): the first that it does is taken.
"""

from __future__ import annotations

from dataclasses import replace

from attnopt.codegen.triton import listed
from attnopt.codegen.triton.low_precision import AS_IT_IS, fitted, scores, values
from attnopt.codegen.triton.prefill import Form, from_rows, pieces
from attnopt.codegen.triton.ranking import Question, ranked
from attnopt.codegen.triton.tiles import Tile, tiles
from attnopt.ir.ranges import key_range
from attnopt.ir.spec import AttentionSpec

COPY_ENGINE = ("sm_90", "sm_100")
VECTOR = 8  # half-precision channels in the 16 bytes to which rows must be aligned for the copy engine
# One group of warps reads and two calculate 64 rows each: the shapes that the compiler splits so.
SPECIALISED = {64: Tile(128, 128, 4, 2, descriptors=True, specialised=True),
               128: Tile(128, 128, 4, 2, descriptors=True, specialised=True),
               256: Tile(128, 64, 4, 2, descriptors=True, specialised=True)}  # fmt: skip


def configurations(spec: AttentionSpec, form: Form, architecture: str) -> tuple[Tile, ...]:
    """The tiles to try, best first."""
    asked = Question("prefill", from_rows(spec), form.width, form.value_width, form.dtype, architecture)
    held = kind(spec, form)
    fits = listed.fitted(fitted(tiles(architecture, form.width, form.value_width, held), spec), spec.selection)
    table = ranked(fits, asked)
    if architecture not in COPY_ENGINE or held == "float32":
        return table
    # Programs that take items in turns even out rows that see more keys than others.
    table = tuple(replace(tile, persistent=key_range(from_rows(spec).mask).grows) for tile in table)
    if form.width % VECTOR or form.value_width % VECTOR:
        return table
    return (*specialised(spec, form, architecture), *(replace(tile, descriptors=True) for tile in table), *table)


def kind(spec: AttentionSpec, form: Form) -> str:
    """The type that decides how much of a tile fits: single precision is none where both products have narrow operands."""
    return "float16" if scores(spec) and values(spec) != AS_IT_IS else form.dtype


def specialised(spec: AttentionSpec, form: Form, architecture: str) -> tuple[Tile, ...]:
    """Specialised warps take one loop over all keys, so a mask is asked in every block: worth it only where there is none."""
    plain = (
        spec.mask is spec.qk_norm is spec.precision is spec.selection is None
        and not form.packed
        and not pieces(form.width)[1] + pieces(form.value_width)[1]
    )
    if architecture != "sm_90" or not plain:
        return ()
    return (SPECIALISED[next(w for w in sorted(SPECIALISED) if max(form.width, form.value_width) <= w)],)
