// What one instruction set's build of kernels.cpp offers to step.cpp.

#ifndef FUSED_ADAFACTOR_CPU_KERNELS_H
#define FUSED_ADAFACTOR_CPU_KERNELS_H

#include "fused_adafactor/abi.h"

namespace fused_adafactor {

// Memory of one thread: lines of a tensor in the math dtype, and chunks on their way through the formulas.
struct ThreadBuffers {
  void* lines;   // of lines that have to be converted, or the numerators of a block of lines
  void* chunks;  // kChunkBuffers chunks
  void* matrix;  // the sums of a small matrix
  void* whole;   // the sums of a tensor that one item deals with alone
};

constexpr int64_t kChunk = 512;        // elements of a chunk: a few of them fit the first-level cache
constexpr int64_t kChunkBuffers = 12;
constexpr int64_t kBlockLines = 8;     // lines whose columns are added together: a column sum is loaded once for them
constexpr int64_t kBlockElements = 1 << 17;  // of such a block at most, unless one line is longer
constexpr int64_t kNarrow = 32;        // lines so short are taken many at a time
constexpr int64_t kMaxTiny = 64;       // elements of a tiny matrix

// Lines of a tensor whose columns are added together: fewer where so many would not stay in a core's cache.
inline int64_t block_lines(const Tensor& t) {
  int64_t lines = kBlockLines;
  while (lines > 1 && lines * t.cols > kBlockElements) lines /= 2;
  return lines;
}

struct Kernels {
  void (*expect)(Tensor&, const Rule&);  // before the first sweep
  void (*stats)(Tensor&, const Rule&, int64_t slab, void* scratch, ThreadBuffers&);
  void (*merge)(Tensor&, int64_t part, void* scratch);
  void (*finalize)(Tensor&, const Rule&, void* scratch);
  void (*update_rms)(Tensor&, const Rule&, int64_t slab, void* scratch, ThreadBuffers&);
  void (*measure)(Tensor&, const Rule&, void* scratch);  // RMS(u) from the sums of the third sweep
  void (*share)(Tensor&, const Rule&, void* scratch, ThreadBuffers&);
  void (*settle)(Tensor&);
  void (*apply)(Tensor&, const Rule&, int64_t strip, void* scratch, ThreadBuffers&);
  void (*confirm)(Tensor&, const Rule&, void* scratch);  // after the last strip
  void (*accumulate)(Tensor&, const Rule&, int64_t slab, ThreadBuffers&);
  void (*average)(Tensor&, const Rule&, int64_t slab, ThreadBuffers&);
};

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_KERNELS_H
