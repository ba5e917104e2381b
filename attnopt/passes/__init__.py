"""Rewrites. To add one: a file in a family's folder, a line here, a test beside the others."""

from __future__ import annotations

from attnopt.passes.candidate import Candidate, Evidence, Group, Pass
from attnopt.passes.fuse.fuse_attention import FuseAttention
from attnopt.passes.kvcache.int8_cache import Int8Cache
from attnopt.passes.prune.drop_attention import DropAttention
from attnopt.passes.prune.gate_norm import GateNorm
from attnopt.passes.quantize.dynamic_int8 import DynamicInt8
from attnopt.passes.quantize.gptq import Gptq
from attnopt.passes.quantize.quest_rounding import QuestRounding
from attnopt.passes.quantize.round_tables import RoundTables
from attnopt.passes.quantize.round_weights import RoundWeights
from attnopt.passes.quantize.rsq import Rsq
from attnopt.passes.quantize.sage_attention import SageAttention
from attnopt.passes.sparsify.sinks_window import SinksWindow

ALL: tuple[Pass, ...] = (
    FuseAttention(),
    DynamicInt8(),
    RoundWeights(),
    RoundTables(),
    Gptq(),
    QuestRounding(),
    Rsq(),
    DropAttention(),
    SageAttention(),
    GateNorm(),
    SinksWindow(),
    Int8Cache(),
)

__all__ = [
    "ALL",
    "Candidate",
    "DropAttention",
    "DynamicInt8",
    "Evidence",
    "FuseAttention",
    "GateNorm",
    "Gptq",
    "Group",
    "Int8Cache",
    "Pass",
    "QuestRounding",
    "RoundTables",
    "RoundWeights",
    "Rsq",
    "SageAttention",
    "SinksWindow",
]
