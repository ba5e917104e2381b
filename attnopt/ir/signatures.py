"""The table of clauses: for each name the slot it fills, its arguments, its options with their defaults.

    "softcap": Signature("score", ("number",))        softcap(50.0) is one of the score terms and takes a number

What each means stands in the function that computes it, under the same name: normalizers, selections, storage, operand_terms,
reference.
"""

from __future__ import annotations

from attnopt.ir.clause import Signature
from attnopt.ir.expr import Const, Index, Size

FLOATS = ("fp32", "fp16", "bf16", "fp8")
STORAGE = (*FLOATS, "int8", "int4", "int3", "int2", "int1")
FEATURES = (
    "identity", "elu1", "relu", "exp", "softmax", "square", "cube", "silu", "hedgehog", "dpfp", "focused", "norm_split", "safe_exp",
)  # fmt: skip
UNITS = ("none", "l1", "l2")
ONE, ZERO, Q, K, ROW = Const(1.0), Const(0.0), Index("q"), Index("k"), Index("row")

SIGNATURES: dict[str, Signature] = {
    # How a row of scores becomes a row of weights.
    "softmax": Signature("normalizer"),
    "sigmoid": Signature("normalizer"),
    "signed_softmax": Signature("normalizer"),
    "zscore": Signature("normalizer", (), {"gain": ("expr", ONE), "shift": ("expr", ZERO)}),
    "sinkhorn": Signature("normalizer", ("count",)),
    "orthogonal": Signature("normalizer"),
    "birkhoff": Signature("normalizer", ("count",)),
    "polynomial": Signature("normalizer", ("count",)),
    "kolmogorov": Signature(
        "normalizer",
        (),
        {"cos": ("operand", "fourier_cos"), "sin": ("operand", "fourier_sin"), "lift": ("operand", "fourier_lift")},
    ),
    "routed": Signature("normalizer", ("count",), {"centroids": ("operand", "centroids")}),
    "weights": Signature("normalizer"),
    "linear": Signature(
        "normalizer",
        (FEATURES,),
        {
            "denominator": (("sum", "none", "magnitude"), "sum"),
            "floor": ("number", 0.0),
            "eps": ("expr", ZERO),
            "q_gain": ("expr", ONE),
            "k_gain": ("expr", ONE),
            "order": ("count", 3),
            "unit": (UNITS, "none"),
            "spread": ("operand", None),
            "reweigh": (("none", "mean_query"), "none"),
        },
    ),
    "recurrent": Signature(
        "normalizer",
        (),
        {
            "feature": (FEATURES, "identity"),
            "order": ("count", 3),
            "unit": (UNITS, "none"),
            "decay": ("expr", ONE),
            "erase": ("expr", ZERO),
            "write": ("expr", ONE),
            "step": (("euler", "exact"), "euler"),
            "erase_from": (("decayed", "previous"), "decayed"),
            "key_decay": ("operand", None),
            "value_decay": ("operand", None),
            "erase_read": ("operand", None),
            "erase_write": ("operand", None),
        },
    ),
    # Shapes, and where q, k and v come from.
    "heads": Signature("heads", ("count", "count", "count"), {"map": ("operand", None)}, optional=2),
    "width": Signature("width", ("count", "count"), optional=1),
    "shared": Signature("shared", (("kv", "qk", "qkv"),)),
    "offset": Signature("offset", ("expr",)),
    "pair_keys": Signature("pairing", ("operand", "operand")),
    "through": Signature("through", ("operand", "spec")),
    # What happens to q and k before their product.
    "norm": Signature(
        "qk_norm",
        (("rms", "l2", "layer", "longest"),),
        {
            "eps": ("number", 1e-6),
            "q_gain": ("operand", None),
            "k_gain": ("operand", None),
            "center": (("no", "yes"), "no"),
            "on": (("both", "q", "k"), "both"),
        },
    ),
    "rotary": Signature(
        "position",
        ("count",),
        {
            "base": ("number", 10000.0),
            "pairs": (("half", "interleaved"), "half"),
            "first": ("count", 0),
            "angles": ("operand", None),
            "q": ("expr", Q),
            "k": ("expr", K),
            "on": (("rows", "features"), "rows"),
            "values": (("no", "yes"), "no"),
        },
    ),
    # What happens to a score, in the order written.
    "scale": Signature("score", ("expr",)),
    "softcap": Signature("score", ("number",)),
    "add": Signature("score", ("expr",)),
    "add_square": Signature("score", (("q", "k"), "expr")),
    "mod": Signature("score", (("relu", "tanh", "square", "silu", "exp", "log1p"),)),
    "conv": Signature("score", ("operand",)),
    "mix": Signature("score", ("operand",)),
    "lookahead_keys": Signature(
        "score",
        ("expr",),
        {
            "q": ("operand", "lookahead_q"),
            "k": ("operand", "lookahead_k"),
            "v": ("operand", "lookahead_v"),
            "window": ("count", 0),
        },
    ),
    "pyramid": Signature("score", ("count", "count"), {"levels": ("operand", "levels")}),
    # The rest of the row.
    "sink": Signature("sink", ("expr",)),
    "empty": Signature("empty_row", (("mean", "zero", "free"),)),
    "value_scale": Signature("value_scale", ("expr",)),
    "weight_conv": Signature("weighting", ("operand",)),
    "weight_mix": Signature("weighting", ("operand",), {"bias": ("operand", None)}),
    # Which keys each query may see when data decides, and what corrects for the others.
    "top_keys": Signature(
        "selection",
        ("count",),
        {"basis": ("operand", None), "query": ("operand", None), "key": ("operand", None), "recent": ("count", 0)},
    ),
    "sparsek": Signature("selection", ("count", "expr"), {"recent": ("count", 0)}),
    "block_topk": Signature(
        "selection",
        ("count", "count"),
        {
            "rows": ("count", 1),
            "probe": (("mean", "activation"), "mean"),
            "first": ("count", 0),
            "recent": ("count", 1),
        },
    ),
    "compressed_topk": Signature("selection", ("count", "count")),
    "pages": Signature(
        "selection",
        ("count", "count"),
        {"low": ("operand", None), "high": ("operand", None), "recent": ("count", 0), "group": (("none", "mean", "max"), "none")},
    ),
    "pooled_blocks": Signature(
        "selection",
        ("count", "count"),
        {
            "mass": ("number", 0.98),
            "share": ("number", 0.0),
            "similarity": ("number", 0.6),
            "first": ("count", 0),
            "skip": ("number", float("inf")),
            "skip_rows": ("count", 0),
        },
    ),
    "blocks": Signature(
        "selection",
        ("count", "count"),
        {"operand": ("operand", "block_mask"), "skip": ("number", float("inf")), "skip_rows": ("count", 0)},
    ),
    "keep": Signature(
        "selection",
        ("count",),
        {
            "by": (("key_norm", "filter", "snap", "expected", "score"), "key_norm"),
            "score": ("expr", ZERO),
            "filter": ("operand", None),
            "observed": ("operand", None),
            "mean": ("operand", None),
            "covariance": ("operand", None),
            "pool": ("count", 1),
            "pooling": (("mean", "max"), "mean"),
            "sinks": ("count", 0),
            "recent": ("count", 0),
            "prompt": ("expr", Size("k")),
            "group": (("mean", "none"), "mean"),
        },
    ),
    "delta": Signature("correction", ("count",), {"dense": ("expr", None), "tail": ("count", 128)}),
    # Storage of the operands of the products, and of the cache.
    "precision": Signature(
        "precision",
        (),
        {
            **dict.fromkeys("qkpv", (STORAGE, "fp32")),
            "q_group": ("expr", ROW),
            "k_group": ("expr", K),
            "v_axis": (("token", "channel"), "token"),
            "q_smooth": ("expr", None),
            "k_smooth": ("expr", None),
            "v_smooth": ("expr", None),
            "block": ("count", 0),
            "sum": (("fp32", "fp22", "fp16"), "fp32"),
        },
    ),
    "cache": Signature(
        "cache",
        (),
        {
            "k": (STORAGE, "fp32"),
            "v": (STORAGE, "fp32"),
            "k_axis": (("token", "channel"), "token"),
            "v_axis": (("token", "channel"), "token"),
            "group": ("count", 0),
            "block": ("count", 0),
            "k_bits": ("expr", None),
            "v_bits": ("expr", None),
            "clip": ("expr", ONE),
            "recent": ("expr", ZERO),
            "outliers": ("number", 0.0),
            "levels": (("ends", "middles", "symmetric"), "ends"),
            "scales": (("fp32", "fp16", "bf16"), "fp32"),
            **{f"{side}_basis": (("none", "hadamard"), "none") for side in "kv"},
            "v_balance": (("none", "root"), "none"),
            **{f"{side}_{what}": ("operand", None) for side in "kv" for what in ("shift", "spread")},
            "codebook": ("operand", None),
            "layout": (("contiguous", "paged", "ring"), "contiguous"),
            "page": ("count", 0),
        },
    ),
    # What happens to the output row.
    "gate": Signature("gate", ("expr",)),
    "plus": Signature("plus", ("expr", "spec"), {"q": ("operand", None), "k": ("operand", None), "v": ("operand", None)}),
}

NORMALIZERS = tuple(name for name, signature in SIGNATURES.items() if signature.slot == "normalizer")
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, **{f"int{n}": n for n in (8, 4, 3, 2, 1)}}
