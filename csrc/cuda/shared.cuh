// What the threads of a block have in common: its shared memory.

#ifndef FUSED_ADAFACTOR_CUDA_SHARED_CUH
#define FUSED_ADAFACTOR_CUDA_SHARED_CUH

#include "stash.cuh"

namespace fused_adafactor {

// Sizes by the math dtype: what is in flight in registers is what shared memory has to hold once.
template <class M>
struct Sizes;
template <>
struct Sizes<float> {
  static constexpr int kTile = 4 * kThreads;  // elements of tiny matrices that a block takes at a time
};
template <>
struct Sizes<double> {
  static constexpr int kTile = 2 * kThreads;
};
static_assert(Sizes<double>::kTile >= 64, "a tiny matrix has up to 64 elements");

constexpr int kWidest = 16 * kThreads;   // columns of a unit whose lines are aligned, at most
constexpr int kLinesOfRound = kThreads;  // lines that a block sums together, at most

// Tiny matrices, one after the other, and what they add up to.
template <class M>
struct TinyTile {
  M grad[Sizes<M>::kTile];
  M row[Sizes<M>::kTile];   // new second moments
  M col[Sizes<M>::kTile];
  M norm[Sizes<M>::kTile];  // of each matrix
};

// Sums of lines that are under way.
template <class M>
struct LineSums {
  M sums[kLinesOfRound];
  M weights[kLinesOfRound];  // 1 / new second moment
  M columns[8 * kThreads];
};

template <class M>
struct Shared {
  Job<M> job;
  Stash stash;
  double reduced[kWarps];
  int64_t ticket;
  int32_t flag;
  uint8_t scales[kThreads];
  union {
    TinyTile<M> tiny;
    LineSums<M> lines;
    M merged[kWarps][128];  // sums of slabs, of some columns
  };
};

// Bytes before the stash.
template <class M>
__host__ __device__ constexpr int32_t shared_size() {
  return (int32_t(sizeof(Shared<M>)) + kStashAlignment - 1) / kStashAlignment * kStashAlignment;
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_SHARED_CUH
