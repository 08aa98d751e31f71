// Numbers of 8 bits in blocks of a line that share a scale. The specification is fused_adafactor/blocks.py: multiplying
// by powers of two is exact, so the bits are those of every other backend.
//
// Neighbouring threads of a warp hold a block together, which begins with the first of them.

#ifndef FUSED_ADAFACTOR_CUDA_BLOCKS_CUH
#define FUSED_ADAFACTOR_CUDA_BLOCKS_CUH

#include "memory.cuh"
#include "shared.cuh"

namespace fused_adafactor {

constexpr uint32_t kPoisoned = 255;  // scale of a block that reads as NaN

// Number of the block that an element is in. `I` has room for the numbers of elements.
template <class I, class M>
__device__ __forceinline__ int64_t block_of_element(const Job<M>& job, I k) {
  const I length = I(job.row[f::kBlockLine]), line = k / length;
  return line * ((length + kBlock - 1) / kBlock) + (k - line * length) / kBlock;
}

__device__ __forceinline__ uint32_t scale_of(float value) { return bits_of(value) >> 23 & 255u; }

__device__ __forceinline__ uint32_t scale_of(double value) {
  const int exponent = int(words_of(value).y >> 20 & 2047u);
  const int scale = exponent - (1023 - 127);
  return exponent == 2047 ? kPoisoned : scale < 0 ? 0u : scale > 254 ? 254u : uint32_t(scale);
}

// Rows of tiny matrices are of any length, so each thread, which holds one element, looks at those of its block.
template <class M>
__device__ __forceinline__ uint32_t largest_of_rows(Shared<M>& shared, Place at, uint32_t scale) {
  const int length = int(shared.job.row[f::kBlockLine]), me = thread_number();
  __syncthreads();
  shared.scales[me] = uint8_t(scale);
  __syncthreads();
  if (at.count == 0) return 0;
  const int column = int(at.k % length), in_block = column % kBlock;
  const int first = me - in_block, count = int(least(kBlock, length - (column - in_block)));
  for (int i = 0; i < count; ++i) scale = Largest::of(scale, uint32_t(shared.scales[first + i]));
  return scale;
}

// The scale that a block's new numbers ask for, for each thread that holds some of them: the largest of what the
// exponent of each asks for, which for infinity and NaN is 255.
template <class T, class M>
__device__ __forceinline__ uint32_t scale_of_block(Shared<M>& shared, Place at, const M (&value)[T::kElements]) {
  uint32_t scale = 0;
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) {
    const uint32_t asked = at.count > 0 ? scale_of(value[i]) : 0u;
    scale = asked > scale ? asked : scale;
  }
  if constexpr (T::kTinyMatrices) return largest_of_rows(shared, at, scale);
  return of_lanes<Largest>(scale, kBlock / T::kElements);
}

__device__ __forceinline__ float whole(float x) { return (x + 12582912.0f) - 12582912.0f; }
__device__ __forceinline__ double whole(double x) { return (x + 6755399441055744.0) - 6755399441055744.0; }

// A number as whole 64ths of the power of two that the scale stands for; 0 in a poisoned block.
template <class M>
__device__ __forceinline__ M to_units(M value, uint32_t scale) {
  if (scale == kPoisoned) return M(0);
  M q = value * M(power_of_two(254u - scale)) * M(64);
  q = q > M(127) ? M(127) : q < M(-127) ? M(-127) : q;
  return whole(q);
}

template <class M>
__device__ __forceinline__ M from_units(M units, uint32_t scale) {
  return units * M(1.0 / 64) * M(power_of_two(scale));
}

template <class T, class M>
__device__ __forceinline__ uint8_t* scale_at(const Job<M>& job, Place at) {
  uint8_t* scales = reinterpret_cast<uint8_t*>(job.row[f::kExpAvgScale]);
  if constexpr (T::kElements == 1) return scales + block_of_element<uint64_t>(job, uint64_t(at.k));
  return scales + block_of_element<uint32_t>(job, uint32_t(at.k));
}

// The first moment of elements, in the math dtype.
template <class T, class M>
__device__ __forceinline__ void read_blocks(const Job<M>& job, Place at, M (&x)[T::kElements]) {
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) x[i] = M(0);
  if (at.count > 0) {
    const void* base = reinterpret_cast<const void*>(job.row[f::kExpAvg]);
    if constexpr (T::kElements == 1) {
      x[0] = M(static_cast<const int8_t*>(base)[offset_of<T>(job, f::kStateStrides, at.k)]);
    } else {
      read_bytes(base, at.k, x);
    }
  }
  const uint32_t scale = at.count > 0 ? uint32_t(*scale_at<T>(job, at)) : 0u;
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) x[i] = from_units(x[i], scale);
}

// New numbers as they will be read back.
template <class T, class M>
__device__ __forceinline__ void round_to_blocks(Shared<M>& shared, Place at, M (&x)[T::kElements]) {
  const uint32_t scale = scale_of_block<T>(shared, at, x);
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) x[i] = from_units(to_units(x[i], scale), scale);
}

// Whether a thread's first element is that of a block.
template <class T, class M>
__device__ __forceinline__ bool begins_block(const Job<M>& job, Place at) {
  if constexpr (T::kElements == 1) return at.k % job.row[f::kBlockLine] % kBlock == 0;
  return uint32_t(at.k) % uint32_t(job.row[f::kBlockLine]) % kBlock == 0;
}

// Stores what has been rounded: rounding it again changes nothing.
template <class T, class M>
__device__ __forceinline__ void write_blocks(Shared<M>& shared, Place at, const M (&x)[T::kElements]) {
  const Job<M>& job = shared.job;
  const uint32_t scale = scale_of_block<T>(shared, at, x);
  M units[T::kElements];
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) units[i] = to_units(x[i], scale);
  if (at.count == 0) return;
  void* base = reinterpret_cast<void*>(job.row[f::kExpAvg]);
  if constexpr (T::kElements == 1) {
    static_cast<int8_t*>(base)[offset_of<T>(job, f::kStateStrides, at.k)] = int8_t(int32_t(units[0]));
  } else {
    write_bytes(base, at.k, units);
  }
  if (begins_block<T>(job, at)) *scale_at<T>(job, at) = uint8_t(scale);
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_BLOCKS_CUH
