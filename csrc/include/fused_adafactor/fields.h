// Columns of the tables that a GPU's launch reads: what Python fills, and what the kernels look up.
// The same names and numbers as fused_adafactor/fields.py, which Triton's kernels read; a test holds the two together.

#ifndef FUSED_ADAFACTOR_FIELDS_H
#define FUSED_ADAFACTOR_FIELDS_H

namespace fused_adafactor {
namespace fields {

// int64, one row for each tensor: see slabs.Geometry and tickets.Pieces.
enum TensorField : int {
  kParam = 0,  // addresses
  kLineVar = 1,
  kCrossVar = 2,
  kVar = 3,
  kVarMax = 4,
  kExpAvg = 5,
  kCompensation = 6,
  kAverage = 7,
  kAccumulator = 8,
  kRule = 9,  // row in the tables of numbers
  kParamIndex = 10,
  kForm = 11,
  kBatch = 12,
  kRows = 13,
  kCols = 14,
  kNumel = 15,
  kMatrixRows = 16,
  kMatrixCols = 17,
  kSwapped = 18,
  kLinesPerSlab = 19,
  kSlabsPerMatrix = 20,
  kChunk = 21,  // columns of a unit
  kChunks = 22,
  kUnits = 23,
  kWidth = 24,   // of a tile in the first sweep
  kSpan = 25,    // of a tile in the second sweep
  kStride = 26,  // elements from tile to tile, where lines are no matrix's
  kParts = 27,   // of what is known of a matrix
  kPartLines = 28,  // lines of a part
  kMerges = 29,     // merging items
  kSums = 30,       // places in the scratch, in bytes: see tickets.Scratch
  kMatrices = 31,
  kPartSums = 32,
  kLines = 33,
  kCross = 34,
  kFactor = 35,
  kPartial = 36,
  kChunkSums = 37,
  kProgress = 38,  // number of its first counter
  kWave = 39,      // counter of what its wave has applied
  kAfter = 40,     // counter of the wave whose place it takes over, or -1
  kAfterCount = 41,
  kDims = 42,
  kSizes = 43,  // up to 8 each
  kStrides = 51,
  kGradStrides = 59,
  kStateStrides = 67,
  kLogical = 75,
  kExpAvgScale = 83,  // address
  kBlockLine = 84,    // elements of a line that blocks lie along
  kParamDtype = 85,   // as Dtype of abi.h
  kGradDtype = 86,
  kMomentDtype = 87,
  kExpAvgDtype = 88,
  kSwitches = 89,  // the bits below
  kMirror = 90,    // address, or 0
  // Sums of a tensor that other processes have other parts of, in the math dtype: addresses in messages, 0 for what is
  // not sent; see PartialSums of abi.h.
  kSharedGradSq = 91,
  kSharedParamSq = 92,
  kSharedUpdateSq = 93,    // taken with those above: the first segment finalizes the tensor
  kSharedMeasuredSq = 94,  // Σ u² too, taken before APPLY
  kSharedRowVarSum = 95,   // [batch]
  kSharedRowSqSum = 96,    // [batch]
  kSharedLineSq = 97,      // [batch, rows]
  kSharedCrossSq = 98,     // [batch, cols]
  kSharedWeighted = 99,    // [batch, cols]
  kSaysUpdateSq = 100,     // 1, or 0 where another process says what is known of all rows
  kWholeNumel = 101,       // the parameter, of which a tensor may be a part: see WholeParameter of abi.h
  kWholeRows = 102,        // lines of a matrix of it
  kWholeCols = 103,        // elements of such a line
  kFirstRow = 104,
  kFirstCol = 105,
  kFirstElement = 106,
  kFirstMatrix = 107,
  kStackDims = 108,
  kStackSizes = 109,  // up to 8 each
  kStackStrides = 117,
  kTensorFields = 125,
};

// Bits of a tensor's switches: what one of Triton's kernels is compiled for, see backends/triton/variants.py.
enum Switch : int {
  kAmsgradSwitch = 0,      // v is the largest so far
  kMeasuresSwitch = 1,     // RMS(u) is wanted
  kParamRmsSwitch = 2,     // RMS(p) is
  kSkipsSwitch = 3,        // a tensor whose gradient is not finite is left as it is
  kNormClippedSwitch = 4,  // gradients are clipped by a norm that is known after the first sweep
  kValueClipSwitch = 5,    // they are clipped element by element
  kAveragesSwitch = 6,     // an EMA of the weights is kept
  kStochasticSwitch = 7,   // the parameter is rounded with random bits
  kKahanSwitch = 8,        // what rounding loses is kept
  kClampsSwitch = 9,       // eps1 clamps v, and is not added to g²
  kStridedSwitch = 10,     // elements lie anywhere; otherwise one after the other, as they are numbered
  kAlignedSwitch = 11,     // every line, and every array, begins at a multiple of 16 bytes
  kWeighsSwitch = 12,      // the identity for Σ u² holds, so that the first sweep takes weighted sums
  kMomentumSwitch = 13,    // two bits: none, or the site of the first moment: 1 gradient, 2 update, 3 step
  kWholeBlocksSwitch = 15,  // eight neighbours share a Philox block
  kAccumulatesSwitch = 16,  // gradients are averaged over several calls
  kSplitSwitch = 17,        // other processes have other parts
  kRawLinesSwitch = 18,     // the first sweep sums g² along lines, whose second moments come later
};

// Counters of a tensor.
enum TensorCounter : int {
  kStatsDone = 0,
  kMergesDone = 1,
  kFinalized = 2,
  kRmsDone = 3,
  kMeasured = 4,
  kChunksDone = 5,  // of each slab, where its lines are summed chunk by chunk
};

// Counters of a launch.
enum LaunchCounter : int {
  kNextTicket = 0,
  kProgramsDone = 1,
};

// float64, one row for each rule: the numbers of this step.
enum NumberField : int {
  kBeta2 = 0,
  kRest2 = 1,  // 1 - beta2
  kBeta1 = 2,
  kRest1 = 3,
  kNumeratorScale = 4,
  kAmsgradScale = 5,
  kEps1 = 6,
  kAdded = 7,      // eps1 where it is added to g², else 0
  kMostRoot = 8,   // largest 1 / sqrt(v): 1 / eps1 where eps1 clamps, else infinite
  kLeastNorm = 9,  // eps1 where it clamps, else 0
  kEps2 = 10,      // below 0: no parameter scale
  kClipThreshold = 11,  // below 0: no clipping
  kRho = 12,
  kDecay = 13,           // of the parameter, subtracted from 1
  kDecayOfAlpha = 14,    // the same, times alpha
  kDecayBeforeRms = 15,  // 1 or 0
  kClipValue = 16,
  kAverageMomentum = 17,
  kAverageRest = 18,
  kOverwrite = 19,  // 1 or 0
  kAccumulationSteps = 20,
  kGradScale = 21,
  kSumMoments = 22,  // 1 or 0: second moments hold sums
  kLossless = 23,    // largest 1 / sqrt(v) that no g² which counts is lost below
  kNumbers = 24,
};

// int64, likewise.
enum IntegerField : int {
  kSeed = 0,
  kStep = 1,
  kIntegers = 2,
};

// float64, one row for each tensor: what a step finds out.
enum OutcomeField : int {
  kGradSq = 0,
  kParamRms = 1,
  kAlpha = 2,
  kUpdateRms = 3,
  kUpdateSq = 4,  // what the first sweep knows of it
  kByClip = 5,    // 1 / max(1, RMS(u) / d)
  kDecayed = 6,   // what the parameter is multiplied by
  kUnknown = 7,   // 1 if RMS(u) takes the third sweep, else 0
  kOutcomes = 8,
};

// float64 in the scratch: of a unit, of a matrix, of a part of a matrix.
enum UnitField : int {
  kUnitGradSq = 0,
  kUnitParamSq = 1,
  kUnitUpdateSq = 2,
  kUnitHeld = 3,  // 1 where a block has kept its gradient, and applies it itself
  kUnitSums = 4,
};
enum MatrixField : int {
  kMatrixNorm = 0,
  kMatrixClamp = 1,
  kMatrixLargest = 2,
  kMatrixFields = 3,
};
enum PartField : int {
  kPartShare = 0,
  kPartLineSum = 1,
  kPartLineMin = 2,
  kPartLineMax = 3,
  kPartCrossSum = 4,
  kPartCrossMin = 5,
  kPartCrossMax = 6,
  kPartGradSq = 7,
  kPartFields = 8,
};

// What is rounded, and has random bits of its own; see rounding.Stream, and Stream of formulas.h.
enum RoundedField : int {
  kParamStream = 0,
  kRowVarStream = 1,
  kVarStream = 1,
  kColVarStream = 2,
};

// How the second moments of a tensor come about; see slabs.Form, and Form of abi.h.
enum FormField : int {
  kUnfactored = 0,
  kFactored = 1,
  kTiny = 3,
};

// How far the clamp reaches into a matrix.
enum Clamp : int {
  kNowhere = 0,
  kSomeLines = 1,
  kEveryLine = 2,
  kEverywhere = 3,
};

// What an item does; see slabs.ItemKind.
enum Kind : int {
  kStatsKind = 1,
  kFinalizeKind = 2,
  kUpdateRmsKind = 3,
  kMeasureKind = 4,
  kApplyKind = 5,
  kAccumulateKind = 6,
  kAverageKind = 7,
  kMergeKind = 8,
  kChunkKind = 9,   // sums along very long lines, chunk by chunk
  kTotalKind = 10,  // sums of a tensor that something waits for: a norm, or a message
  kShareKind = 11,   // sums across lines that go into a message
  kSettleKind = 12,  // RMS(u) from a message
};

}  // namespace fields
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_FIELDS_H
