"""What one spec, one form of its tensors and one tile decide of prefill.py besides sight.py: its constants, and what it reads ahead.

    D = 16, LSE = False, …   ->   D = 64, LSE = True, …

As they stand they are plain softmax attention of narrow rows.
"""

from tvm.script import tirx as T

DTYPE = "float32"
D = 16
E = 16
D_SQUARES = 1  # of LANES channels
D_REST = 0  # channels besides
E_SQUARES = 1
E_REST = 0
LANES = 16
LANES_OVER_4 = True
LANES_OVER_8 = True
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
PIECES_ANY = False
PIECES = 1
PIECES_WHOLE = 1
VISITS = False
LISTED = False
CHUNK = 64  # keys of a piece that is visited or not
WHOLE = True  # inside the range that every row sees, matches alone decide of the mask
SKIPS = False
SKIP = 0.0  # tiles whose scores all lie so far below the largest that their queries have met give no values
MATCHES = 0
MATCH_HEADS = False
NORMS = False  # queries or keys are normalised
Q_NORM = False
K_NORM = False
GAINS = False
CENTERED = False
NORM = "rms"
EPS = 1e-6


@T.inline
def hold_rows(held, held_whole, b, h, q_first, row_first, q_len, kv_len, operands):
    """What is read once for each query of a block: held [HELD, BLOCK_Q] float32, held_whole [HELD_WHOLE, BLOCK_Q] int32."""


@T.inline
def hold_tile(tiles, tiles_whole, b, h, q_first, row_first, k_first, keys, q_len, kv_len, operands):
    """What is read for each query of a block and each key of a step: tiles [TILES, BLOCK_K, BLOCK_Q], and of whole numbers."""


@T.inline
def hold_piece(pieces, pieces_whole, b, h, q_first, row_first, k, q_len, kv_len, operands):
    """What is read for each query of a block and is the same for all keys of a step: pieces [PIECES, BLOCK_Q], and of whole numbers."""
