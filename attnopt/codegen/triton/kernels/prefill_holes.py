"""What one spec, one form of its tensors and one tile decide of prefill.py: its constants, and functions that are holes.

    mask_mod(…)  return True        ->   return (k <= q) & (q - k < 512)
    D = 16, PACKED = False, …       ->   D = 64, PACKED = False, …

As they stand they are plain softmax attention of narrow rows, so that the template runs by itself.
"""

import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(64)
BLOCK_K = tl.constexpr(32)
NUM_WARPS = 4
NUM_STAGES = 2
PROGRAMS = 1
SCALE = tl.constexpr(1.0)
LOG2E = tl.constexpr(1.4426950408889634)
D = tl.constexpr(16)
D_MAIN = tl.constexpr(16)
D_REST = tl.constexpr(0)
E = tl.constexpr(16)
E_MAIN = tl.constexpr(16)
E_REST = tl.constexpr(0)
D_PADDED = tl.constexpr(False)
E_PADDED = tl.constexpr(False)
PRECISION = tl.constexpr("ieee")
PACKED = tl.constexpr(False)
PERSISTENT = tl.constexpr(False)
DESCRIPTORS = tl.constexpr(False)
SPECIALISED = tl.constexpr(False)
STATIC = tl.constexpr(False)
STATIC_SCALE = tl.constexpr(1.0)
PHASES = tl.constexpr(0)
RANGE = tl.constexpr(False)
SCORES = tl.constexpr(False)
MASK = tl.constexpr(False)
INNER_MASK = tl.constexpr(False)
LEADING = tl.constexpr(False)
LEFT_EDGE = tl.constexpr(False)
LONGEST_FIRST = tl.constexpr(False)
OFFSET = tl.constexpr(False)
SINK = tl.constexpr(False)
EMPTY_ROWS = tl.constexpr(False)
MEAN_OF_EMPTY = tl.constexpr(False)
LSE = tl.constexpr(False)
LISTED = tl.constexpr(False)
LIST_ROWS = tl.constexpr(1)  # blocks of queries for which one row of the list holds
LIST_KEYS = tl.constexpr(1)  # blocks of keys that one number of the list stands for
LIST_PART = tl.constexpr(128)  # numbers of the list that are looked at together
SKIPS = tl.constexpr(False)
SKIP = tl.constexpr(0.0)  # blocks whose scores all lie so far below the largest that their rows have met give no values
tiles_map = ()  # stands for the operand that says which tiles are visited
FACTORS = tl.constexpr(False)
Q_NORM = tl.constexpr(False)
K_NORM = tl.constexpr(False)
NORM = tl.constexpr("rms")
EPS = tl.constexpr(0.0)
CENTERED = tl.constexpr(False)
INT8_SCORES = tl.constexpr(False)
FP8_VALUES = tl.constexpr(False)
HALF_VALUES = tl.constexpr(False)
KEY_MEAN = tl.constexpr(False)
QUERY_MEANS = tl.constexpr(False)
VALUE_MEAN = tl.constexpr(False)
SHIFTED_SCORES = tl.constexpr(False)
SHIFTED_TOP = tl.constexpr(False)
ROW_FACTORS = tl.constexpr(False)
QUERY_FACTOR = tl.constexpr(1.0)
SCORE_SCALE = tl.constexpr(1.0)
MEAN_PRECISION = tl.constexpr("ieee")
EMULATED = tl.constexpr(False)
CODED_ROWS = tl.constexpr(128)  # rows that one program makes codes of
D_CODES = tl.constexpr(triton.next_power_of_2(D_MAIN.value + D_REST.value))
E_CODES = tl.constexpr(triton.next_power_of_2(E_MAIN.value + E_REST.value))
MEAN_BLOCKS = tl.constexpr(16)  # means of queries that one program multiplies with so many keys
MEAN_KEYS = tl.constexpr(64)
LIFT = tl.constexpr(8.807354922057604)  # log2(448): weights are made so much larger, and so is their sum


@triton.jit
def key_range(q_first, q_last, q_len, kv_len):
    """The first key that any of the queries q_first … q_last sees, and the one after the last."""
    return 0, kv_len


@triton.jit
def inner_range(q_first, q_last, q_len, kv_len):
    """The first of the keys that all of the queries q_first … q_last see, and the one after the last."""
    return 0, kv_len


@triton.jit
def leading_keys(q_len, kv_len):
    """Keys 0 … n - 1 that are visible besides the range."""
    return 0


@triton.jit
def query_offset(q_len, kv_len):
    """The position of the first query."""
    return 0


@triton.jit
def score_mod(score, b, h, q, row, k, m_k, q_len, kv_len, operands):
    """What happens to a score after the first scale; rows stand along the first axis, keys along the second."""
    return score


@triton.jit
def mask_mod(b, h, q, row, k, m_k, q_len, kv_len, operands):
    """Whether a query sees a key."""
    return True


@triton.jit
def inner_mask_mod(b, h, q, row, k, m_k, q_len, kv_len, operands):
    """What of mask_mod is left to be asked inside the range that every row sees."""
    return True


@triton.jit
def sink_logit(b, h, q, row, q_len, kv_len, operands):
    """One more logit of each row, which takes weight and gives nothing."""
    return 0.0


@triton.jit
def channel_factor(h, key_head, d, operands):
    """By what the channels d of a query are multiplied: its gain, and that of the keys."""
    return 1.0


@triton.jit
def query_group(row):
    """Which rows of a block of queries share a scale: those of equal number."""
    return row


@triton.jit
def key_group(k):
    """Which keys of a block share a scale."""
    return k
