// Rounding to the dtypes of parameters and state, and the random bits of it.

#ifndef FUSED_ADAFACTOR_CUDA_ROUNDING_CUH
#define FUSED_ADAFACTOR_CUDA_ROUNDING_CUH

#include "job.cuh"

#if !defined(FA_EMULATED)
#include <cuda_fp16.h>
#endif

namespace fused_adafactor {

#if defined(FA_EMULATED)
inline float from_float16(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return float(half);
}

inline uint16_t to_float16(float value) {
  const _Float16 half = _Float16(value);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
#else
__device__ __forceinline__ float from_float16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t to_float16(float value) { return __half_as_ushort(__float2half_rn(value)); }
#endif

__device__ __forceinline__ double double_from_words(uint32_t low, uint32_t high) {
  const uint64_t bits = low | uint64_t(high) << 32;
  double value;
  memcpy(&value, &bits, 8);
  return value;
}

__device__ __forceinline__ uint2 words_of(double value) {
  uint64_t bits;
  memcpy(&bits, &value, 8);
  return {uint32_t(bits), uint32_t(bits >> 32)};
}

// A number rounded to nearest and read back: what is used is what is stored. float64 goes to the 16-bit dtypes through
// float32, as torch's does.
template <class M>
__device__ __forceinline__ M stored(M value, int dtype) {
  if (dtype == kBfloat16) return M(from_bfloat16(to_bfloat16(float(value))));
  if (dtype == kFloat32) return M(float(value));
  if (dtype == kFloat16) return M(from_float16(to_float16(float(value))));
  return value;
}

// The random words of a block of eight elements. Its key is the seed, its counter (block and stream, parameter, step).
struct RandomWords {
  uint32_t words[4];

  template <class M>
  __device__ __forceinline__ RandomWords(const Job<M>& job, int stream, uint64_t block)
      : words{uint32_t(block), uint32_t(block >> 32) | uint32_t(stream) << kStreamShift,
              uint32_t(job.row[f::kParamIndex]), job.step} {
    philox(words, job.seed);
  }

  // The 16 bits of an element, by its number in the block.
  __device__ __forceinline__ uint32_t of(int element) const {
    const uint32_t low = element < 2 ? words[0] : words[1], high = element < 6 ? words[2] : words[3];
    return (element < 4 ? low : high) >> (element % 2 * 16) & 0xFFFFu;
  }
};

template <class M>
__device__ __forceinline__ uint32_t random16(const Job<M>& job, int stream, uint64_t element) {
  return RandomWords(job, stream, element >> 3).of(int(element & 7));
}

template <class M>
__device__ __forceinline__ M stored_at_random(M value, uint32_t random) {
  return M(from_bfloat16(to_bfloat16_stochastic(float(value), random)));
}

// A second moment as it will be read back. In bfloat16 it is rounded at random: an average that is rounded to nearest
// stalls.
template <class M>
__device__ __forceinline__ M stored_moment(const Job<M>& job, M value, uint32_t random) {
  const int dtype = int(job.row[f::kMomentDtype]);
  return dtype == kBfloat16 ? stored_at_random(value, random) : stored(value, dtype);
}

// What the strides of some columns of the table make of a number that is row-major over the sizes of others.
template <class M>
__device__ __forceinline__ int64_t by_dims(const Job<M>& job, int dims, int sizes, int strides, int64_t k) {
  int64_t offset = 0;
#pragma unroll 1
  for (int d = int(job.row[dims]) - 1; d >= 0; --d) {
    const int64_t size = job.row[sizes + d], before = k / size;
    offset += (k - before * size) * job.row[strides + d];
    k = before;
  }
  return offset;
}

// Number in the entry of the whole parameter of a second moment of a part of it, of lines or of what lies across them.
template <class M>
__device__ __forceinline__ int64_t moment_of(const Job<M>& job, int64_t element, bool across) {
  const bool tiny = job.row[f::kForm] == f::kTiny;
  const int64_t count = job.row[across ? (tiny ? f::kMatrixCols : f::kCols) : (tiny ? f::kMatrixRows : f::kRows)];
  const int64_t matrix = element / count;
  const int64_t stacked = by_dims(job, f::kStackDims, f::kStackSizes, f::kStackStrides, matrix);
  return (job.row[f::kFirstMatrix] + stacked) * job.row[across ? f::kWholeCols : f::kWholeRows] +
         job.row[across ? f::kFirstCol : f::kFirstRow] + (element - matrix * count);
}

// The random bits of a second moment of lines, or of what lies across them; 0 where none are wanted. The stream follows
// the name: lines are columns where the matrix lies the other way.
template <class M>
__device__ __forceinline__ uint32_t random_of_factor(const Job<M>& job, int64_t element, bool across) {
  if (job.row[f::kMomentDtype] != kBfloat16) return 0;
  const int swapped = int(job.row[f::kSwapped]);
  if (job.has(f::kSplitSwitch)) element = moment_of(job, element, across);
  return random16(job, across ? f::kColVarStream - swapped : f::kRowVarStream + swapped, uint64_t(element));
}

// Second moment of a row or a column, as it will be read back.
template <class M>
__device__ __forceinline__ M new_factor(const Job<M>& job, M old, M total, int64_t count, uint32_t random) {
  const M value = mean_or_sum(total, M(count), job.numbers[f::kAdded], job.numbers[f::kSumMoments] > M(0));
  return stored_moment(job, new_moment(old, value, job.numbers[f::kBeta2], job.numbers[f::kRest2]), random);
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_ROUNDING_CUH
