"""Columns of the tables that a launch reads: what Python fills, and what the kernels look up."""

from __future__ import annotations

import triton.language as tl

# int64, one row for each tensor: see ``slabs.Geometry`` and ``tickets.Pieces``.
PARAM = tl.constexpr(0)  # addresses
LINE_VAR = tl.constexpr(1)
CROSS_VAR = tl.constexpr(2)
VAR = tl.constexpr(3)
VAR_MAX = tl.constexpr(4)
EXP_AVG = tl.constexpr(5)
COMPENSATION = tl.constexpr(6)
AVERAGE = tl.constexpr(7)
ACCUMULATOR = tl.constexpr(8)
RULE = tl.constexpr(9)  # row in the tables of numbers
PARAM_INDEX = tl.constexpr(10)
FORM = tl.constexpr(11)
BATCH = tl.constexpr(12)
ROWS = tl.constexpr(13)
COLS = tl.constexpr(14)
NUMEL = tl.constexpr(15)
MATRIX_ROWS = tl.constexpr(16)
MATRIX_COLS = tl.constexpr(17)
SWAPPED = tl.constexpr(18)
LINES_PER_SLAB = tl.constexpr(19)
SLABS_PER_MATRIX = tl.constexpr(20)
CHUNK = tl.constexpr(21)  # columns of a unit
CHUNKS = tl.constexpr(22)
UNITS = tl.constexpr(23)
WIDTH = tl.constexpr(24)  # of a tile in the first sweep
SPAN = tl.constexpr(25)  # of a tile in the second sweep
STRIDE = tl.constexpr(26)  # elements from tile to tile, where lines are no matrix's
PARTS = tl.constexpr(27)  # of what is known of a matrix
PART_LINES = tl.constexpr(28)  # lines of a part
MERGES = tl.constexpr(29)  # merging items
SUMS = tl.constexpr(30)  # places in the scratch, in bytes: see ``tickets.Scratch``
MATRICES = tl.constexpr(31)
PART_SUMS = tl.constexpr(32)
LINES = tl.constexpr(33)
CROSS = tl.constexpr(34)
FACTOR = tl.constexpr(35)
PARTIAL = tl.constexpr(36)
CHUNK_SUMS = tl.constexpr(37)
PROGRESS = tl.constexpr(38)  # number of its first counter
WAVE = tl.constexpr(39)  # counter of what its wave has applied
AFTER = tl.constexpr(40)  # counter of the wave whose place it takes over, or -1
AFTER_COUNT = tl.constexpr(41)
DIMS = tl.constexpr(42)
SIZES = tl.constexpr(43)  # up to 8 each
STRIDES = tl.constexpr(51)
GRAD_STRIDES = tl.constexpr(59)
STATE_STRIDES = tl.constexpr(67)
LOGICAL = tl.constexpr(75)
EXP_AVG_SCALE = tl.constexpr(83)  # address
BLOCK_LINE = tl.constexpr(84)  # elements of a line that blocks lie along
TENSOR_FIELDS = tl.constexpr(85)

# Counters of a tensor.
STATS_DONE = tl.constexpr(0)
MERGES_DONE = tl.constexpr(1)
FINALIZED = tl.constexpr(2)
RMS_DONE = tl.constexpr(3)
MEASURED = tl.constexpr(4)
CHUNKS_DONE = tl.constexpr(5)  # of each slab, where its lines are summed chunk by chunk
# Counters of a launch.
NEXT_TICKET = tl.constexpr(0)
PROGRAMS_DONE = tl.constexpr(1)

# float64, one row for each rule: the numbers of this step.
BETA2 = tl.constexpr(0)
REST2 = tl.constexpr(1)  # 1 - beta2
BETA1 = tl.constexpr(2)
REST1 = tl.constexpr(3)
NUMERATOR_SCALE = tl.constexpr(4)
AMSGRAD_SCALE = tl.constexpr(5)
EPS1 = tl.constexpr(6)
ADDED = tl.constexpr(7)  # eps1 where it is added to g², else 0
MOST_ROOT = tl.constexpr(8)  # largest 1 / sqrt(v): 1 / eps1 where eps1 clamps, else infinite
LEAST_NORM = tl.constexpr(9)  # eps1 where it clamps, else 0
EPS2 = tl.constexpr(10)  # below 0: no parameter scale
CLIP_THRESHOLD = tl.constexpr(11)  # below 0: no clipping
RHO = tl.constexpr(12)
DECAY = tl.constexpr(13)  # of the parameter, subtracted from 1
DECAY_OF_ALPHA = tl.constexpr(14)  # the same, times alpha
DECAY_BEFORE_RMS = tl.constexpr(15)  # 1 or 0
CLIP_VALUE = tl.constexpr(16)
AVERAGE_MOMENTUM = tl.constexpr(17)
AVERAGE_REST = tl.constexpr(18)
OVERWRITE = tl.constexpr(19)  # 1 or 0
ACCUMULATION_STEPS = tl.constexpr(20)
GRAD_SCALE = tl.constexpr(21)
SUM_MOMENTS = tl.constexpr(22)  # 1 or 0: second moments hold sums
NUMBERS = tl.constexpr(23)

# int64, likewise.
SEED = tl.constexpr(0)
STEP = tl.constexpr(1)
INTEGERS = tl.constexpr(2)

# float64, one row for each tensor: what a step finds out.
GRAD_SQ = tl.constexpr(0)
PARAM_RMS = tl.constexpr(1)
ALPHA = tl.constexpr(2)
UPDATE_RMS = tl.constexpr(3)
UPDATE_SQ = tl.constexpr(4)  # what the first sweep knows of it
BY_CLIP = tl.constexpr(5)  # 1 / max(1, RMS(u) / d)
DECAYED = tl.constexpr(6)  # what the parameter is multiplied by
UNKNOWN = tl.constexpr(7)  # 1 if RMS(u) takes the third sweep, else 0
OUTCOMES = tl.constexpr(8)

# float64 in the scratch: of a unit, of a matrix, of a part of a matrix.
UNIT_GRAD_SQ = tl.constexpr(0)
UNIT_PARAM_SQ = tl.constexpr(1)
UNIT_UPDATE_SQ = tl.constexpr(2)
UNIT_SUMS = tl.constexpr(3)
MATRIX_NORM = tl.constexpr(0)
MATRIX_CLAMP = tl.constexpr(1)
MATRIX_LARGEST = tl.constexpr(2)
MATRIX_FIELDS = tl.constexpr(3)
PART_SHARE = tl.constexpr(0)
PART_LINE_SUM = tl.constexpr(1)
PART_LINE_MIN = tl.constexpr(2)
PART_LINE_MAX = tl.constexpr(3)
PART_CROSS_SUM = tl.constexpr(4)
PART_CROSS_MIN = tl.constexpr(5)
PART_CROSS_MAX = tl.constexpr(6)
PART_GRAD_SQ = tl.constexpr(7)
PART_FIELDS = tl.constexpr(8)

# What is rounded, and has random bits of its own; see ``rounding.Stream``.
PARAM_STREAM = tl.constexpr(0)
ROW_VAR_STREAM = tl.constexpr(1)
VAR_STREAM = tl.constexpr(1)
COL_VAR_STREAM = tl.constexpr(2)

# How the second moments of a tensor come about; see ``slabs.Form``.
UNFACTORED = tl.constexpr(0)
FACTORED = tl.constexpr(1)
TINY = tl.constexpr(3)

# How far the clamp reaches into a matrix.
NOWHERE = tl.constexpr(0)
SOME_LINES = tl.constexpr(1)
EVERY_LINE = tl.constexpr(2)
EVERYWHERE = tl.constexpr(3)

# What an item does; the values are those of ``slabs.ItemKind``.
STATS_KIND = tl.constexpr(1)
FINALIZE_KIND = tl.constexpr(2)
UPDATE_RMS_KIND = tl.constexpr(3)
MEASURE_KIND = tl.constexpr(4)
APPLY_KIND = tl.constexpr(5)
ACCUMULATE_KIND = tl.constexpr(6)
AVERAGE_KIND = tl.constexpr(7)
MERGE_KIND = tl.constexpr(8)
CHUNK_KIND = tl.constexpr(9)
TOTAL_KIND = tl.constexpr(10)
