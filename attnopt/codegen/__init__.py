"""From a spec to code: every lowering that can compute a site, in the order in which they are tried."""

from __future__ import annotations

from attnopt.codegen.library.flex import Flex
from attnopt.codegen.library.group_query_attention import GroupQueryAttention
from attnopt.codegen.library.head_mixing import HeadMixing
from attnopt.codegen.library.local_attention import LocalAttention
from attnopt.codegen.library.local_sdpa import LocalSdpa
from attnopt.codegen.library.multi_head_attention import MultiHeadAttention
from attnopt.codegen.library.onnx_attention import OnnxAttention
from attnopt.codegen.library.sdpa import Sdpa
from attnopt.codegen.library.summed import Summed
from attnopt.codegen.library.wide_values import WideValues
from attnopt.codegen.lowering import Lowering
from attnopt.codegen.triton.lowerings.triton_decode import TritonDecode
from attnopt.codegen.triton.lowerings.triton_prefill import TritonPrefill
from attnopt.codegen.triton.lowerings.triton_sparse import TritonSparse
from attnopt.codegen.tvm.lowerings.tvm_blocks import TvmBlocks
from attnopt.codegen.tvm.lowerings.tvm_decode import TvmDecode
from attnopt.codegen.tvm.lowerings.tvm_pages import TvmPages
from attnopt.codegen.tvm.lowerings.tvm_pieces import TvmPieces
from attnopt.codegen.tvm.lowerings.tvm_prefill import TvmPrefill
from attnopt.codegen.tvm.lowerings.tvm_sparse import TvmSparse

SINGLE: tuple[Lowering, ...] = (
    Sdpa(),
    Sdpa(grouped=False),
    WideValues(),
    Flex(),
    LocalSdpa(),
    GroupQueryAttention(),
    LocalAttention(),
    MultiHeadAttention(),
    OnnxAttention(),
)
# These are tried for targets with a GPU only: on a CPU they compute no more than what they mean.
ON_GPU: tuple[Lowering, ...] = (TritonDecode(), TritonPrefill(), Summed(TritonPrefill()), TritonSparse())
# And these for the CPU at hand only, where TVM compiles them.
ON_CPU: tuple[Lowering, ...] = (
    TvmDecode(),
    TvmPrefill(),
    Summed(TvmPrefill()),
    TvmSparse(),
    TvmPages(),
    TvmPieces(),
    TvmBlocks(),
)
# Of these the ones that read a cache as it is stored: codes, codes beside exact tokens, or pages that a query chooses.
AS_STORED: tuple[Lowering, ...] = (TvmDecode(), TvmPieces(), TvmBlocks(), TvmPages(), TritonDecode())
LOWERINGS: tuple[Lowering, ...] = (
    *SINGLE,
    *(Summed(kernel) for kernel in SINGLE),
    HeadMixing(),
    HeadMixing("onnx"),
    *ON_CPU,
    *ON_GPU,
)
