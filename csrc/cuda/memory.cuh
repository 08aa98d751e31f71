// Elements in memory: where they lie, how neighbours of them are read and written.

#ifndef FUSED_ADAFACTOR_CUDA_MEMORY_CUH
#define FUSED_ADAFACTOR_CUDA_MEMORY_CUH

#include "job.cuh"
#include "rounding.cuh"
#include "shared.cuh"

namespace fused_adafactor {

// The neighbours of one thread: the number of the first, and how many there are. Where several are taken together,
// they are all there or none is.
struct Place {
  int64_t k;
  int count;
};

template <class T>
__device__ __forceinline__ Place place_of(int64_t k, bool here) {
  return {k, here ? T::kElements : 0};
}

// Where something is read from.
enum class From {
  kGlobal,  // and will be read again
  kLast,    // global too, for the last time in a step: it makes room in the caches
  kShared,
};

// As it lies in memory. The compiler is told where that is, since the address comes from a table.
template <From kFrom, class W>
__device__ __forceinline__ W words_at(const void* at) {
  const W* place = static_cast<const W*>(at);
  if constexpr (kFrom == From::kLast) return __ldcs(place);
#if !defined(FA_EMULATED)
  __builtin_assume(kFrom == From::kShared ? __isShared(place) : __isGlobal(place));
#endif
  return *place;
}

// A run of neighbours as 32-bit words: 4, 8, 16 or 32 bytes, of which 16 are moved at a time.
template <int kWords>
struct Words {
  uint32_t word[kWords];

  template <From kFrom>
  __device__ __forceinline__ void read(const void* at) {
    if constexpr (kWords == 1) {
      word[0] = words_at<kFrom, uint32_t>(at);
    } else if constexpr (kWords == 2) {
      const uint2 w = words_at<kFrom, uint2>(at);
      word[0] = w.x;
      word[1] = w.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 w = words_at<kFrom, uint4>(static_cast<const uint32_t*>(at) + i);
        word[i] = w.x;
        word[i + 1] = w.y;
        word[i + 2] = w.z;
        word[i + 3] = w.w;
      }
    }
  }

  __device__ __forceinline__ void write(void* at) const {
    if constexpr (kWords == 1) {
      __stcs(static_cast<uint32_t*>(at), word[0]);
    } else if constexpr (kWords == 2) {
      __stcs(static_cast<uint2*>(at), uint2{word[0], word[1]});
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        __stcs(reinterpret_cast<uint4*>(static_cast<uint32_t*>(at) + i),
               uint4{word[i], word[i + 1], word[i + 2], word[i + 3]});
      }
    }
  }
};

// Neighbours of 32 or of 16 bits, from an address that is a multiple of their size.
template <From kFrom, int N>
__device__ __forceinline__ void read_vector(const void* base, int dtype, int64_t k, float (&x)[N]) {
  const char* at = static_cast<const char*>(base);
  if (dtype == kFloat32) {
    Words<N> words;
    words.template read<kFrom>(at + 4 * k);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = float_from_bits(words.word[i]);
    return;
  }
  Words<N / 2> words;
  words.template read<kFrom>(at + 2 * k);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint32_t word = words.word[i / 2];
    if (dtype == kBfloat16) {
      x[i] = float_from_bits(i % 2 == 0 ? word << 16 : word & 0xFFFF0000u);
    } else {
      x[i] = from_float16(uint16_t(word >> (i % 2 * 16)));
    }
  }
}

// The same in the other direction, rounded to nearest.
template <int N>
__device__ __forceinline__ void write_vector(void* base, int dtype, int64_t k, const float (&x)[N]) {
  char* at = static_cast<char*>(base);
  if (dtype == kFloat32) {
    Words<N> words;
#pragma unroll
    for (int i = 0; i < N; ++i) words.word[i] = bits_of(x[i]);
    return words.write(at + 4 * k);
  }
  Words<N / 2> words;
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const uint32_t low = dtype == kBfloat16 ? to_bfloat16(x[i]) : to_float16(x[i]);
    const uint32_t high = dtype == kBfloat16 ? to_bfloat16(x[i + 1]) : to_float16(x[i + 1]);
    words.word[i / 2] = low | high << 16;
  }
  words.write(at + 2 * k);
}

// Neighbours of 8 bits.
template <int N, class M>
__device__ __forceinline__ void read_bytes(const void* base, int64_t k, M (&x)[N]) {
  Words<N / 4> words;
  words.template read<From::kGlobal>(static_cast<const char*>(base) + k);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = M(int8_t(words.word[i / 4] >> (i % 4 * 8)));
}

template <int N, class M>
__device__ __forceinline__ void write_bytes(void* base, int64_t k, const M (&x)[N]) {
  Words<N / 4> words = {};
#pragma unroll
  for (int i = 0; i < N; ++i) words.word[i / 4] |= uint32_t(uint8_t(int8_t(int32_t(x[i])))) << (i % 4 * 8);
  words.write(static_cast<char*>(base) + k);
}

// One number of an array.
template <class M, From kFrom = From::kGlobal>
__device__ __forceinline__ M read_one(const void* base, int dtype, int64_t offset) {
  const char* at = static_cast<const char*>(base);
  if (dtype == kFloat32) return M(words_at<kFrom, float>(at + 4 * offset));
  if (dtype == kBfloat16) return M(from_bfloat16(words_at<kFrom, unsigned short>(at + 2 * offset)));
  if (dtype == kFloat16) return M(from_float16(words_at<kFrom, unsigned short>(at + 2 * offset)));
  return M(words_at<kFrom, double>(at + 8 * offset));
}

template <class M>
__device__ __forceinline__ void write_one(void* base, int dtype, int64_t offset, M value) {
  char* at = static_cast<char*>(base);
  if (dtype == kFloat32) {
    __stcs(reinterpret_cast<float*>(at + 4 * offset), float(value));
  } else if (dtype == kBfloat16) {
    __stcs(reinterpret_cast<unsigned short*>(at + 2 * offset), to_bfloat16(float(value)));
  } else if (dtype == kFloat16) {
    __stcs(reinterpret_cast<unsigned short*>(at + 2 * offset), to_float16(float(value)));
  } else {
    __stcs(reinterpret_cast<double*>(at + 8 * offset), double(value));
  }
}

// Where an element lies, by its number and the strides of some columns of the table.
template <class T, class M>
__device__ __forceinline__ int64_t offset_of(const Job<M>& job, int strides, int64_t k) {
  return T::has(job, f::kStridedSwitch) ? by_dims(job, f::kDims, f::kSizes, strides, k) : k;
}

// Row-major index of an element in its parameter. Where that is split, elements may lie one after the other and not be
// numbered so in the whole.
template <class T, class M>
__device__ __forceinline__ uint64_t element_of(const Job<M>& job, int64_t k) {
  if (!T::has(job, f::kSplitSwitch)) return uint64_t(offset_of<T>(job, f::kLogical, k));
  if (!T::has(job, f::kWholeBlocksSwitch)) k = by_dims(job, f::kDims, f::kSizes, f::kLogical, k);
  return uint64_t(job.row[f::kFirstElement] + k);
}

// Round numbers to bfloat16 with the random bits of neighbours, which share a block of them.
template <class T, class M>
__device__ __forceinline__ void round_block(const Job<M>& job, int stream, uint64_t index, M (&x)[T::kElements]) {
  const RandomWords random(job, stream, index >> 3);
  const int first = T::kElements == 8 ? 0 : int(index & 7);
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) x[i] = stored_at_random(x[i], random.of(first + i));
}

// The same of a part whose neighbours are anywhere in the whole, but all in one dimension of it.
template <class T, class M>
__device__ __forceinline__ void round_apart(const Job<M>& job, int stream, uint64_t index, M (&x)[T::kElements]) {
  const uint64_t step = uint64_t(job.row[f::kLogical + job.row[f::kDims] - 1]);
  RandomWords random(job, stream, index >> 3);
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) {
    x[i] = stored_at_random(x[i], random.of(int(index & 7)));
    const uint64_t next = index + step;
    if (i + 1 < T::kElements && next >> 3 != index >> 3) random = RandomWords(job, stream, next >> 3);
    index = next;
  }
}

// Elements in the math dtype, 0 where there are none.
template <class T, From kFrom = From::kGlobal, class M>
__device__ __forceinline__ void read_from(const Job<M>& job, const void* base, int strides, int dtype, Place at,
                                          M (&x)[T::kElements]) {
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) x[i] = M(0);
  if (at.count == 0) return;
  if constexpr (T::kElements == 1) {
    x[0] = read_one<M, kFrom>(base, dtype, offset_of<T>(job, strides, at.k));
  } else {
    read_vector<kFrom>(base, dtype, at.k, x);
  }
}

template <class T, From kFrom = From::kGlobal, class M>
__device__ __forceinline__ void read(const Job<M>& job, int field, int strides, int dtype, Place at,
                                     M (&x)[T::kElements]) {
  read_from<T, kFrom>(job, reinterpret_cast<const void*>(job.row[field]), strides, dtype, at, x);
}

template <class T, class M>
__device__ __forceinline__ void write(const Job<M>& job, int field, int strides, int dtype, Place at,
                                      const M (&x)[T::kElements]) {
  if (at.count == 0) return;
  void* base = reinterpret_cast<void*>(job.row[field]);
  if constexpr (T::kElements == 1) {
    write_one(base, dtype, offset_of<T>(job, strides, at.k), x[0]);
  } else {
    write_vector(base, dtype, at.k, x);
  }
}

// Part of the next: elements of one width.
template <class W, class M, int kCount, class F>
__device__ __forceinline__ void read_words(const void* base, const int64_t (&offset)[kCount],
                                           const Place (&at)[kCount], M (&x)[kCount], F convert) {
  W word[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    word[i] = at[i].count > 0 ? words_at<From::kGlobal, W>(static_cast<const W*>(base) + offset[i]) : W(0);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = M(convert(word[i]));
}

// Elements that lie anywhere, in the math dtype, 0 where there are none. All of them are asked for before any is waited
// for, so their dtype is looked up outside of the loop.
template <class M, int kCount>
__device__ __forceinline__ void read_several(const Job<M>& job, const void* base, int strides, int dtype,
                                             const Place (&at)[kCount], M (&x)[kCount]) {
  int64_t offset[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) offset[i] = at[i].count > 0 ? offset_of<Loose>(job, strides, at[i].k) : 0;
  if (dtype == kFloat32) {
    read_words<float>(base, offset, at, x, [](float word) { return word; });
  } else if (dtype == kBfloat16) {
    read_words<unsigned short>(base, offset, at, x, [](unsigned short word) { return from_bfloat16(word); });
  } else if (dtype == kFloat16) {
    read_words<unsigned short>(base, offset, at, x, [](unsigned short word) { return from_float16(word); });
  } else {
    read_words<double>(base, offset, at, x, [](double word) { return word; });
  }
}

// What is made of the gradient as it lies: it is divided by the loss scale, then averaged over accumulated steps.
template <class T, class M>
__device__ __forceinline__ void unscale(const Job<M>& job, Place at, M (&g)[T::kElements]) {
  const M scale = job.numbers[f::kGradScale];
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) g[i] *= scale;
  if (T::has(job, f::kAccumulatesSwitch)) {
    M before[T::kElements];
    read<T>(job, f::kAccumulator, f::kStateStrides, DtypeOf<M>::value, at, before);
    const M steps = job.numbers[f::kAccumulationSteps];
#pragma unroll
    for (int i = 0; i < T::kElements; ++i) g[i] = (g[i] + before[i]) / steps;
  }
}

template <class T, From kFrom = From::kGlobal, class M>
__device__ __forceinline__ void read_unclipped(const Job<M>& job, Place at, M (&g)[T::kElements]) {
  read_from<T, kFrom>(job, job.grad, f::kGradStrides, T::grad_dtype(job), at, g);
  unscale<T>(job, at, g);
}

// Clip it, by value and by a norm; in Keras' order.
template <class T, class M>
__device__ __forceinline__ void clip(const Job<M>& job, M factor, M (&g)[T::kElements]) {
  if (T::has(job, f::kValueClipSwitch)) {
    const M limit = job.numbers[f::kClipValue];
#pragma unroll
    for (int i = 0; i < T::kElements; ++i) g[i] = clipped_by_value(g[i], limit);
  }
  if (T::has(job, f::kNormClippedSwitch)) {
#pragma unroll
    for (int i = 0; i < T::kElements; ++i) g[i] *= factor;
  }
}

template <class T, From kFrom = From::kGlobal, class M>
__device__ __forceinline__ void read_grad(const Job<M>& job, M factor, Place at, M (&g)[T::kElements]) {
  read_unclipped<T, kFrom>(job, at, g);
  clip<T>(job, factor, g);
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_MEMORY_CUH
