"""Rewrites. To add one: a file in a family's folder, a line here, a test beside the others."""

from __future__ import annotations

from attnopt.passes.candidate import Candidate, Evidence, Group, Pass
from attnopt.passes.factorize.eigen_attention import EigenAttention
from attnopt.passes.factorize.low_rank import LowRank
from attnopt.passes.fold.center_stream import CenterStream
from attnopt.passes.fold.fold_biases import FoldBiases
from attnopt.passes.fold.fold_norm_gain import FoldNormGain
from attnopt.passes.fold.merge_projections import MergeProjections
from attnopt.passes.fold.merge_score_terms import MergeScoreTerms
from attnopt.passes.fold.pack_projections import PackProjections
from attnopt.passes.fuse.fuse_attention import FuseAttention
from attnopt.passes.heads.key_norm_groups import KeyNormGroups
from attnopt.passes.heads.mean_pooling import MeanPooling
from attnopt.passes.heads.prune_heads import PruneHeads
from attnopt.passes.heads.weighted_groups import WeightedGroups
from attnopt.passes.kvcache.akvq_vl import AkvqVl
from attnopt.passes.kvcache.int2_cache import Int2Cache
from attnopt.passes.kvcache.int4_cache import Int4Cache
from attnopt.passes.kvcache.int8_cache import Int8Cache
from attnopt.passes.kvcache.zip_cache import ZipCache
from attnopt.passes.prune.drop_attention import DropAttention
from attnopt.passes.prune.gate_norm import GateNorm
from attnopt.passes.quantize.dynamic_int8 import DynamicInt8
from attnopt.passes.quantize.gptq import Gptq
from attnopt.passes.quantize.quest_rounding import QuestRounding
from attnopt.passes.quantize.round_tables import RoundTables
from attnopt.passes.quantize.round_weights import RoundWeights
from attnopt.passes.quantize.rsq import Rsq
from attnopt.passes.quantize.sage_attention import SageAttention
from attnopt.passes.sparsify.big_bird import BigBird
from attnopt.passes.sparsify.block_topk import BlockTopk
from attnopt.passes.sparsify.delta_attention import DeltaAttention
from attnopt.passes.sparsify.dilated_window import DilatedWindow
from attnopt.passes.sparsify.head_windows import HeadWindows
from attnopt.passes.sparsify.moba import Moba
from attnopt.passes.sparsify.neighborhood import Neighborhood
from attnopt.passes.sparsify.power_attention import PowerAttention
from attnopt.passes.sparsify.quest import Quest
from attnopt.passes.sparsify.sinks_window import SinksWindow
from attnopt.passes.sparsify.sparge_attn import SpargeAttn

ALL: tuple[Pass, ...] = (
    FuseAttention(),
    CenterStream(),
    FoldNormGain(),
    FoldBiases(),
    MergeProjections(),
    MergeScoreTerms(),
    PackProjections(),
    DynamicInt8(),
    RoundWeights(),
    RoundTables(),
    Gptq(),
    QuestRounding(),
    Rsq(),
    SageAttention(),
    DropAttention(),
    GateNorm(),
    EigenAttention(),
    LowRank(),
    MeanPooling(),
    KeyNormGroups(),
    WeightedGroups(),
    PruneHeads(),
    SinksWindow(),
    HeadWindows(),
    DeltaAttention(),
    SpargeAttn(),
    Moba(),
    BlockTopk(),
    PowerAttention(),
    BigBird(),
    Quest(),
    DilatedWindow(),
    Neighborhood(),
    Int8Cache(),
    Int4Cache(),
    Int2Cache(),
    AkvqVl(),
    ZipCache(),
)

__all__ = [
    "ALL",
    "AkvqVl",
    "BigBird",
    "BlockTopk",
    "Candidate",
    "CenterStream",
    "DeltaAttention",
    "DilatedWindow",
    "DropAttention",
    "DynamicInt8",
    "EigenAttention",
    "Evidence",
    "FoldBiases",
    "FoldNormGain",
    "FuseAttention",
    "GateNorm",
    "Gptq",
    "Group",
    "HeadWindows",
    "Int2Cache",
    "Int4Cache",
    "Int8Cache",
    "KeyNormGroups",
    "LowRank",
    "MeanPooling",
    "MergeProjections",
    "MergeScoreTerms",
    "Moba",
    "Neighborhood",
    "PackProjections",
    "Pass",
    "PowerAttention",
    "PruneHeads",
    "Quest",
    "QuestRounding",
    "RoundTables",
    "RoundWeights",
    "Rsq",
    "SageAttention",
    "SinksWindow",
    "SpargeAttn",
    "WeightedGroups",
    "ZipCache",
]
