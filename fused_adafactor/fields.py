"""Columns of the tables that a GPU's launch reads: what Python fills, and what kernels look up.

The same names and numbers are in ``csrc/include/fused_adafactor/fields.h``; a test compares them.
Triton's kernels see them through ``backends/triton/fields.py``.
"""

from __future__ import annotations

import torch

# Dtypes, as ``Dtype`` of ``abi.h`` numbers them.
DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int8: 4,  # in blocks
}

# int64, one row for each tensor: see ``slabs.Geometry`` and ``tickets.Pieces``.
PARAM = 0  # addresses
LINE_VAR = 1
CROSS_VAR = 2
VAR = 3
VAR_MAX = 4
EXP_AVG = 5
COMPENSATION = 6
AVERAGE = 7
ACCUMULATOR = 8
RULE = 9  # row in the tables of numbers
PARAM_INDEX = 10
FORM = 11
BATCH = 12
ROWS = 13
COLS = 14
NUMEL = 15
MATRIX_ROWS = 16
MATRIX_COLS = 17
SWAPPED = 18
LINES_PER_SLAB = 19
SLABS_PER_MATRIX = 20
CHUNK = 21  # columns of a unit
CHUNKS = 22
UNITS = 23
WIDTH = 24  # of a tile in the first sweep
SPAN = 25  # of a tile in the second sweep
STRIDE = 26  # elements from tile to tile, where lines are no matrix's
PARTS = 27  # of what is known of a matrix
PART_LINES = 28  # lines of a part
MERGES = 29  # merging items
SUMS = 30  # places in the scratch, in bytes: see ``tickets.Scratch``
MATRICES = 31
PART_SUMS = 32
LINES = 33
CROSS = 34
FACTOR = 35
PARTIAL = 36
CHUNK_SUMS = 37
PROGRESS = 38  # number of its first counter
WAVE = 39  # counter of what its wave has applied
AFTER = 40  # counter of the wave whose place it takes over, or -1
AFTER_COUNT = 41
DIMS = 42
SIZES = 43  # up to 8 each
STRIDES = 51
GRAD_STRIDES = 59
STATE_STRIDES = 67
LOGICAL = 75
EXP_AVG_SCALE = 83  # address
BLOCK_LINE = 84  # elements of a line that blocks lie along
PARAM_DTYPE = 85  # of ``DTYPES``; what follows is for kernels that are not compiled for one rule
GRAD_DTYPE = 86
MOMENT_DTYPE = 87
EXP_AVG_DTYPE = 88
SWITCHES = 89  # the bits below
MIRROR = 90  # address; nobody writes one yet
# Sums of a tensor that other processes have other parts of, in the math dtype: addresses in
# messages, 0 for what is not sent. See ``binding.sums_of``.
SHARED_GRAD_SQ = 91
SHARED_PARAM_SQ = 92
SHARED_UPDATE_SQ = 93  # taken with those above: the first segment finalizes the tensor
SHARED_MEASURED_SQ = 94  # Σ u² too, taken before APPLY
SHARED_ROW_VAR_SUM = 95  # [batch]
SHARED_ROW_SQ_SUM = 96  # [batch]
SHARED_LINE_SQ = 97  # [batch, rows]
SHARED_CROSS_SQ = 98  # [batch, cols]
SHARED_WEIGHTED = 99  # [batch, cols]
SAYS_UPDATE_SQ = 100  # 1, or 0 where another process says what is known of all rows
WHOLE_NUMEL = 101  # the parameter, of which a tensor may be a part: see ``slabs.WholeParameter``
WHOLE_ROWS = 102  # lines of a matrix of it
WHOLE_COLS = 103  # elements of such a line
FIRST_ROW = 104
FIRST_COL = 105
FIRST_ELEMENT = 106
FIRST_MATRIX = 107
STACK_DIMS = 108
STACK_SIZES = 109  # up to 8 each
STACK_STRIDES = 117
TENSOR_FIELDS = 125

# Bits of a tensor's switches: see ``traits.Traits``.
AMSGRAD_SWITCH = 0
MEASURES_SWITCH = 1
PARAM_RMS_SWITCH = 2
SKIPS_SWITCH = 3
NORM_CLIPPED_SWITCH = 4
VALUE_CLIP_SWITCH = 5
AVERAGES_SWITCH = 6
STOCHASTIC_SWITCH = 7
KAHAN_SWITCH = 8
CLAMPS_SWITCH = 9
STRIDED_SWITCH = 10
ALIGNED_SWITCH = 11
WEIGHS_SWITCH = 12
MOMENTUM_SWITCH = 13  # two bits
WHOLE_BLOCKS_SWITCH = 15
ACCUMULATES_SWITCH = 16
SPLIT_SWITCH = 17
RAW_LINES_SWITCH = 18

# Counters of a tensor.
STATS_DONE = 0
MERGES_DONE = 1
FINALIZED = 2
RMS_DONE = 3
MEASURED = 4
CHUNKS_DONE = 5  # of each slab, where its lines are summed chunk by chunk
# Counters of a launch.
NEXT_TICKET = 0
PROGRAMS_DONE = 1

# float64, one row for each rule: the numbers of this step.
BETA2 = 0
REST2 = 1  # 1 - beta2
BETA1 = 2
REST1 = 3
NUMERATOR_SCALE = 4
AMSGRAD_SCALE = 5
EPS1 = 6
ADDED = 7  # eps1 where it is added to g², else 0
MOST_ROOT = 8  # largest 1 / sqrt(v): 1 / eps1 where eps1 clamps, else infinite
LEAST_NORM = 9  # eps1 where it clamps, else 0
EPS2 = 10  # below 0: no parameter scale
CLIP_THRESHOLD = 11  # below 0: no clipping
RHO = 12
DECAY = 13  # of the parameter, subtracted from 1
DECAY_OF_ALPHA = 14  # the same, times alpha
DECAY_BEFORE_RMS = 15  # 1 or 0
CLIP_VALUE = 16
AVERAGE_MOMENTUM = 17
AVERAGE_REST = 18
OVERWRITE = 19  # 1 or 0
ACCUMULATION_STEPS = 20
GRAD_SCALE = 21
SUM_MOMENTS = 22  # 1 or 0: second moments hold sums
LOSSLESS = 23  # largest 1 / sqrt(v) that no g² which counts is lost below
NUMBERS = 24

# int64, likewise.
SEED = 0
STEP = 1
INTEGERS = 2

# float64, one row for each tensor: what a step finds out.
GRAD_SQ = 0
PARAM_RMS = 1
ALPHA = 2
UPDATE_RMS = 3
UPDATE_SQ = 4  # what the first sweep knows of it
BY_CLIP = 5  # 1 / max(1, RMS(u) / d)
DECAYED = 6  # what the parameter is multiplied by
UNKNOWN = 7  # 1 if RMS(u) takes the third sweep, else 0
OUTCOMES = 8

# float64 in the scratch: of a unit, of a matrix, of a part of a matrix.
UNIT_GRAD_SQ = 0
UNIT_PARAM_SQ = 1
UNIT_UPDATE_SQ = 2
UNIT_HELD = 3  # 1 where a block has kept its gradient, and applies it itself
UNIT_SUMS = 4
MATRIX_NORM = 0
MATRIX_CLAMP = 1
MATRIX_LARGEST = 2
MATRIX_FIELDS = 3
PART_SHARE = 0
PART_LINE_SUM = 1
PART_LINE_MIN = 2
PART_LINE_MAX = 3
PART_CROSS_SUM = 4
PART_CROSS_MIN = 5
PART_CROSS_MAX = 6
PART_GRAD_SQ = 7
PART_FIELDS = 8

# What is rounded, and has random bits of its own; see ``rounding.Stream``.
PARAM_STREAM = 0
ROW_VAR_STREAM = 1
VAR_STREAM = 1
COL_VAR_STREAM = 2

# How the second moments of a tensor come about; see ``slabs.Form``.
UNFACTORED = 0
FACTORED = 1
TINY = 3

# How far the clamp reaches into a matrix.
NOWHERE = 0
SOME_LINES = 1
EVERY_LINE = 2
EVERYWHERE = 3

# What an item does; the values are those of ``slabs.ItemKind``.
STATS_KIND = 1
FINALIZE_KIND = 2
UPDATE_RMS_KIND = 3
MEASURE_KIND = 4
APPLY_KIND = 5
ACCUMULATE_KIND = 6
AVERAGE_KIND = 7
MERGE_KIND = 8
CHUNK_KIND = 9
TOTAL_KIND = 10
SHARE_KIND = 11
SETTLE_KIND = 12
