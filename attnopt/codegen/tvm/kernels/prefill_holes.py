"""What one spec, one form of its tensors and one tile decide of prefill.py: its constants, and functions that are holes.

    mask_mod(…)  return T.bool(True)        ->   return (k <= q) & (q - k < 512)
    D = 16, LSE = False, …                  ->   D = 64, LSE = True, …

As they stand they are plain softmax attention of narrow rows.
"""

from tvm.script import tirx as T

DTYPE = "float32"
D = 16
E = 16
LANES = 16
VECTORS = 4
BLOCK_Q = 64
BLOCK_K = 64
KEYS = 4
CHANNELS = 4
CHANNELS_REST = 0
SCALE = 1.0
UNIT = 1.4426950408889634  # a difference of tops, or of scores and a top, times this is a power of two
TOP = 1.0  # a top times this is a logit
SCORES = False
MASK = False
INNER_MASK = False
PHASES = 0
RANGE = False
LEADING = False
EDGES = 1
GROWS = False
OFFSET = False
SINK = False
EMPTY_ROWS = False
MEAN_OF_EMPTY = False
LSE = False
STAGED = False
HELD_ANY = False
HELD = 1
HELD_WHOLE = 1
TILES_ANY = False
TILES = 1
TILES_WHOLE = 1
VISITS = False
CHUNK = 64  # keys of a piece that is visited or not
WHOLE = True  # inside the range that every row sees, matches alone decide of the mask
MATCHES = 0
MATCH_HEADS = False
operands = ()  # stands for the operands of the spec
held_values = ()  # stands for what is read of them for one query, or one query and one key


def first_key(q_first, q_last, q_len, kv_len):
    """The first key that any of the queries q_first … q_last sees."""
    return 0


def end_key(q_first, q_last, q_len, kv_len):
    """The key after the last that any of the queries q_first … q_last sees."""
    return kv_len


def inner_first_key(q_first, q_last, q_len, kv_len):
    """The first of the keys that all of the queries q_first … q_last see."""
    return 0


def inner_end_key(q_first, q_last, q_len, kv_len):
    """The key after the last of those that all of the queries q_first … q_last see."""
    return kv_len


def leading_keys(q_len, kv_len):
    """Keys 0 … n - 1 that are visible besides the range."""
    return 0


def query_offset(q_len, kv_len):
    """The position of the first query."""
    return 0


def score_mod(score, b, h, q, row, k, q_len, kv_len, operands, held_values):
    """What happens to a score after the first scale."""
    return score


def mask_mod(b, h, q, row, k, q_len, kv_len, operands, held_values):
    """Whether a query sees a key."""
    return T.bool(True)


def inner_mask_mod(b, h, q, row, k, q_len, kv_len, operands, held_values):
    """What of mask_mod is left to be asked inside the range that every row sees."""
    return T.bool(True)


def sink_logit(b, h, q, row, q_len, kv_len, operands, held_values):
    """One more logit of each row, which takes weight and gives nothing."""
    return T.float32(0.0)


@T.inline
def match_operands():
    """The buffers of operands."""


@T.inline
def hold_rows(held, held_whole, b, h, q_first, row_first, q_len, kv_len, operands):
    """What is read once for each query of a block: held [HELD, BLOCK_Q] float32, held_whole [HELD_WHOLE, BLOCK_Q] int32."""


@T.inline
def hold_tile(tiles, tiles_whole, b, h, q_first, row_first, k_first, keys, q_len, kv_len, operands):
    """What is read for each query of a block and each key of a step: tiles [TILES, BLOCK_K, BLOCK_Q], and of whole numbers."""
