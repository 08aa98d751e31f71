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

// A unit of lines that is summed, round by round: registers are for its elements.
struct Rounds {
  int64_t first_line, first;  // and element
  int32_t length, width;      // lines and columns
  int32_t block;              // lines of one matrix
  int32_t lines;              // of a round
  int32_t group;              // threads of a line
  int32_t ring, begin;        // where its rounds arrive in the stash, and where those lie that stay
  int32_t held;               // lines that stay
  bool arrive;                // rounds come through the stash
};

// What the block is at. Here and not in registers, all of which an item may take.
struct Task {
  enum State : int32_t { kBeginning, kTaking, kEnding };  // before its first ticket, with one, after its last one
  static constexpr int32_t kNothing = -1;                 // a kind

  int64_t wave;       // units that are kept, up to this one, come first
  State state;
  int32_t item, end;  // of the ticket
  int32_t kind, tensor, unit;
  bool from_stash;    // the unit is the first one that this block keeps
};

template <class M>
struct Shared {
  CudaLaunch launch;
  Task task;
  Job<M> job;
  Stash stash;
  Rounds rounds;
  double reduced[kWarps];
  int32_t flag;
  uint8_t scales[kThreads];
  union {
    TinyTile<M> tiny;
    LineSums<M> lines;
    M merged[kWarps][128];  // sums of slabs, of some columns
  };
};

#if defined(FA_EMULATED)
inline char* shared_memory() { return emulation::shared_memory(); }
#else
extern __shared__ uint4 shared_words[];
__device__ __forceinline__ char* shared_memory() { return reinterpret_cast<char*>(shared_words); }
#endif

// Asked for wherever it is needed, so that the compiler knows what memory it is.
template <class M>
__device__ __forceinline__ Shared<M>& shared_of() {
  return *reinterpret_cast<Shared<M>*>(shared_memory());
}

// Bytes before the stash.
template <class M>
__host__ __device__ constexpr int32_t shared_size() {
  return (int32_t(sizeof(Shared<M>)) + kStashAlignment - 1) / kStashAlignment * kStashAlignment;
}

template <class M>
__device__ __forceinline__ char* stash_memory() {
  return shared_memory() + shared_size<M>();
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_SHARED_CUH
