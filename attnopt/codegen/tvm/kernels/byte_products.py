"""Products of bytes: an instruction multiplies four unsigned bytes with four signed ones in each word of a vector, and adds them up.

    multiplied(total, codes, digits, lanes)[lane]  =  total[lane] + sum over i < 4 of byte i of codes[lane] * byte i of digits
"""

from tvm.script import tirx as T

PRODUCT = "llvm.x86.avx512.vpdpbusd.512"


def multiplied(total, codes, digits, lanes):
    """total int32 x lanes, codes int32 x lanes of unsigned bytes, digits one int32 of signed bytes, the same in all lanes."""
    unsigned = T.reinterpret(f"int8x{4 * lanes}", codes)
    signed = T.reinterpret(f"int8x{4 * lanes}", T.Broadcast(digits, lanes))
    return T.call_llvm_pure_intrin(f"int32x{lanes}", PRODUCT, total, unsigned, signed)
