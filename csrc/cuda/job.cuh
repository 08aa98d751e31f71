// What a block knows of the tensor that its item is of, and what of it a kernel is compiled for.

#ifndef FUSED_ADAFACTOR_CUDA_JOB_CUH
#define FUSED_ADAFACTOR_CUDA_JOB_CUH

#include "block.cuh"
#include "fused_adafactor/abi.h"
#include "fused_adafactor/cuda.h"
#include "fused_adafactor/fields.h"

namespace fused_adafactor {

namespace f = fields;

constexpr int kBlock = 32;  // elements of a block of 8-bit numbers; the last one of a line may have fewer

static_assert(int(kUnfactored) == int(f::kUnfactored) && int(kFactored) == int(f::kFactored) &&
                  int(kTiny) == int(f::kTiny),
              "forms are those of the CPU");
static_assert(int(kParamStream) == int(f::kParamStream) && int(kRowVarStream) == int(f::kRowVarStream) &&
                  int(kColVarStream) == int(f::kColVarStream),
              "streams are those of the CPU");

template <class M>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr int value = kFloat32;
};
template <>
struct DtypeOf<double> {
  static constexpr int value = kFloat64;
};

// A tensor, its rule and its outcome, in shared memory: a table's row is read once for an item, and takes no registers.
template <class M>
struct Job {
  int64_t row[f::kTensorFields];
  M numbers[f::kNumbers];  // of its rule, in the math dtype
  const double* rule;      // the same as they were sent
  uint64_t seed;
  uint32_t step;
  const void* grad;
  M factor;  // of clipping by a norm
  char* scratch;
  double* outcome;
  uint8_t* skip;
  int32_t* progress;  // its counters
  M alpha, by_clip, decayed;  // of the outcome, once it is known

  __device__ __forceinline__ bool has(int bit) const { return (row[f::kSwitches] >> bit & 1) != 0; }
  __device__ __forceinline__ int momentum() const { return int(row[f::kSwitches] >> f::kMomentumSwitch & 3); }

  template <class T>
  __device__ __forceinline__ T* in_scratch(int field) const {
    return reinterpret_cast<T*>(scratch + row[field]);
  }

  // Where a sum is in a message to other processes, and from them; null where it is not sent. Numbers begin anywhere.
  __device__ __forceinline__ M* in_message(int field) const { return reinterpret_cast<M*>(row[field]); }

  // What the first sweep knows of lines: their second moments, or Σ_j g² where they are raw.
  __device__ __forceinline__ M* sums_of_lines() const {
    M* const sent = has(f::kRawLinesSwitch) ? in_message(f::kSharedLineSq) : nullptr;
    return sent != nullptr ? sent : in_scratch<M>(f::kLines);
  }
};

// Whether neighbours are taken together. Some that could be are rare enough to go element by element: state of float64
// where the math is not, more 8-bit numbers than 32 bits count, and parts of vectors whose numbers in the whole are
// others in every block of random bits.
template <class M>
__device__ __forceinline__ bool is_aligned(const Job<M>& job) {
  const int64_t exp_avg = job.row[f::kExpAvgDtype];
  if (job.has(f::kSplitSwitch) && !job.has(f::kWholeBlocksSwitch) && job.row[f::kForm] == f::kUnfactored) return false;
  return sizeof(M) == sizeof(float) && job.has(f::kAlignedSwitch) && job.row[f::kMomentDtype] != kFloat64 &&
         exp_avg != kFloat64 && (exp_avg != kBlocks || job.row[f::kNumel] <= UINT32_MAX);
}

// Neighbours that one thread takes at a time, and what is known of a tensor when its kernel is compiled.

// Any tensor, element by element: neighbouring threads take neighbouring elements.
struct Loose {
  static constexpr int kElements = 1;
  static constexpr bool kTinyMatrices = false;
  static constexpr bool kStashes = false;  // gradients may come from, and stay in, shared memory
  static constexpr int kStashedDtype = kFloat32;

  template <class M>
  static __device__ __forceinline__ bool has(const Job<M>& job, int bit) {
    return job.has(bit);
  }
  template <class M>
  static __device__ __forceinline__ int momentum(const Job<M>& job) {
    return job.momentum();
  }
  template <class M>
  static __device__ __forceinline__ int param_dtype(const Job<M>& job) {
    return int(job.row[f::kParamDtype]);
  }
  template <class M>
  static __device__ __forceinline__ int grad_dtype(const Job<M>& job) {
    return int(job.row[f::kGradDtype]);
  }
};

// The same where a block of threads has the sums of whole matrices at hand.
struct TinyMatrices : Loose {
  static constexpr bool kTinyMatrices = true;
};

// Lines and arrays begin at multiples of 16 bytes, and elements lie one after the other. All that any rule may keep of
// four of them fits the registers of a thread. Where sums are taken along lines and across them, it is eight: the same
// as below, and so the same bits.
template <int kNeighbours>
struct Aligned : Loose {
  static constexpr int kElements = kNeighbours;

  template <class M>
  static __device__ __forceinline__ bool has(const Job<M>& job, int bit) {
    return bit != f::kStridedSwitch && job.has(bit);
  }
};

// The same, and nothing beside parameter and gradient is read or written element by element.
template <int kParamDtype, int kGradDtype>
struct Plain : Aligned<8> {
  static constexpr bool kStashes = true;
  static constexpr int kStashedDtype = kGradDtype;
  // What is left to be looked up.
  static constexpr int64_t kSwitches = 1 << f::kMeasuresSwitch | 1 << f::kParamRmsSwitch | 1 << f::kNormClippedSwitch |
                                       1 << f::kStochasticSwitch | 1 << f::kWeighsSwitch | 1 << f::kSplitSwitch |
                                       1 << f::kWholeBlocksSwitch | 1 << f::kRawLinesSwitch;
  static constexpr int64_t kExcluded = 1 << f::kAmsgradSwitch | 1 << f::kValueClipSwitch | 1 << f::kAveragesSwitch |
                                       1 << f::kKahanSwitch | 1 << f::kStridedSwitch | 3 << f::kMomentumSwitch |
                                       1 << f::kAccumulatesSwitch;

  template <class M>
  static __device__ __forceinline__ bool has(const Job<M>& job, int bit) {
    return (kSwitches >> bit & 1) != 0 && job.has(bit);
  }
  template <class M>
  static __device__ __forceinline__ int momentum(const Job<M>&) {
    return 0;
  }
  template <class M>
  static __device__ __forceinline__ int param_dtype(const Job<M>&) {
    return kParamDtype;
  }
  template <class M>
  static __device__ __forceinline__ int grad_dtype(const Job<M>&) {
    return kGradDtype;
  }
  template <class M>
  static __device__ __forceinline__ bool takes(const Job<M>& job) {
    return is_aligned(job) && (job.row[f::kSwitches] & kExcluded) == 0 &&
           job.row[f::kParamDtype] == kParamDtype && job.row[f::kGradDtype] == kGradDtype;
  }
};

// Calls run(traits) with what a kernel for this tensor is compiled for.
template <int kNeighbours, class M, class F>
__device__ __forceinline__ void with_traits(const Job<M>& job, F run) {
  if constexpr (sizeof(M) == sizeof(double)) {
    run(Loose());  // parameters of float64 are rare
  } else if (Plain<kBfloat16, kBfloat16>::takes(job)) {
    run(Plain<kBfloat16, kBfloat16>());
  } else if (Plain<kFloat32, kFloat32>::takes(job)) {
    run(Plain<kFloat32, kFloat32>());
  } else if (is_aligned(job)) {
    run(Aligned<kNeighbours>());
  } else {
    run(Loose());
  }
}

// Calls run(traits) for what has no lines, and what is seldom run.
template <class M, class F>
__device__ __forceinline__ void with_alignment(const Job<M>& job, F run) {
  if constexpr (sizeof(M) == sizeof(float)) {
    if (is_aligned(job)) return run(Aligned<4>());
  }
  run(Loose());
}

// Threads that hold a block of 8-bit numbers together, so they must be neighbours of one warp; 1 where there is none.
template <class T, class M>
__device__ __forceinline__ int threads_of_block(const Job<M>& job) {
  return T::momentum(job) != kNoMomentum && job.row[f::kExpAvgDtype] == kBlocks ? kBlock / T::kElements : 1;
}

// Lines of a slab, and how many of them are of one matrix.
struct Lines {
  int64_t begin, end, block;
};

template <class M>
__device__ __forceinline__ Lines lines_of(const Job<M>& job, int64_t slab) {
  const int64_t rows = job.row[f::kRows], length = job.row[f::kLinesPerSlab], per_matrix = job.row[f::kSlabsPerMatrix];
  const int64_t first_of_matrix = slab / per_matrix * (per_matrix == 1 ? length : rows);
  const int64_t begin = first_of_matrix + slab % per_matrix * length;
  const int64_t last = per_matrix == 1 ? rows * job.row[f::kBatch] : first_of_matrix + rows;
  return {begin, least(begin + length, last), least(length, rows)};
}

// Columns of a chunk, or elements of a slab that has no lines.
struct Range {
  int64_t begin, end;
};

template <class M>
__device__ __forceinline__ Range columns_of(const Job<M>& job, int64_t chunk) {
  const int64_t begin = chunk * job.row[f::kChunk];
  return {begin, least(begin + job.row[f::kChunk], job.row[f::kCols])};
}

template <class M>
__device__ __forceinline__ Range elements_of(const Job<M>& job, int64_t slab) {
  const Lines lines = lines_of(job, slab);
  const int64_t cols = job.row[f::kCols];
  return {lines.begin * cols, least(lines.end * cols, job.row[f::kNumel])};
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_JOB_CUH
