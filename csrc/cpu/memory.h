// Where elements lie, and how they become numbers of the math dtype and numbers of a state's or a parameter's.
// Part of kernels.cpp: compiled once per instruction set, so without templates of the standard library, of which the
// linker would keep one copy for all.

#ifndef FUSED_ADAFACTOR_CPU_MEMORY_H
#define FUSED_ADAFACTOR_CPU_MEMORY_H

#include <cmath>

#include "fused_adafactor/formulas.h"
#include "kernels.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

template <class M>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr int32_t value = kFloat32;
};
template <>
struct DtypeOf<double> {
  static constexpr int32_t value = kFloat64;
};

// Not the templates of the standard library: the linker keeps one copy of those for all instruction sets.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class M>
void zero(M* to, int64_t count) {
  memset(to, 0, count * sizeof(M));
}

template <class M>
bool is_finite(M value) {
  return value - value == M(0);
}

// Where element k lies, and how many follow it at equal distances.
struct Run {
  int64_t offset, count;
};

inline Run run_at(const Tensor& t, const int64_t* strides, int64_t k) {
  const int last = t.ndim - 1;
  int64_t offset = 0, index = k;  // no division where all is one run
  if (last > 0) {
    index = k % t.sizes[last];
    k /= t.sizes[last];
    for (int d = last - 1; d > 0; --d) {
      offset += k % t.sizes[d] * strides[d];
      k /= t.sizes[d];
    }
    offset += k * strides[0];
  }
  return {offset + index * strides[last], t.sizes[last] - index};
}

inline int64_t offset_of(const Tensor& t, const int64_t* strides, int64_t k) { return run_at(t, strides, k).offset; }

inline int64_t stride_of_runs(const Tensor& t, const int64_t* strides) { return strides[t.ndim - 1]; }

inline float half_to_float(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return float(half);
}

inline uint16_t float_to_half(float value) {
  const _Float16 half = _Float16(value);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}

template <class M>
void convert_from(M* __restrict to, const void* from, int32_t dtype, int64_t offset, int64_t stride, int64_t count) {
  if (dtype == kFloat32) {
    const float* p = static_cast<const float*>(from) + offset;
    for (int64_t i = 0; i < count; ++i) to[i] = M(p[i * stride]);
  } else if (dtype == kBfloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(from) + offset;
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = M(from_bfloat16(p[i]));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = M(from_bfloat16(p[i * stride]));
    }
  } else if (dtype == kFloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(from) + offset;
    for (int64_t i = 0; i < count; ++i) to[i] = M(half_to_float(p[i * stride]));
  } else if (dtype == kBlocks) {
    const int8_t* p = static_cast<const int8_t*>(from) + offset;
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = M(p[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = M(p[i * stride]);
    }
  } else {
    const double* p = static_cast<const double*>(from) + offset;
    for (int64_t i = 0; i < count; ++i) to[i] = M(p[i * stride]);
  }
}

template <class M>
void convert_to(const M* __restrict from, void* to, int32_t dtype, int64_t offset, int64_t stride, int64_t count) {
  if (dtype == kFloat32) {
    float* p = static_cast<float*>(to) + offset;
    for (int64_t i = 0; i < count; ++i) p[i * stride] = float(from[i]);
  } else if (dtype == kBfloat16) {
    uint16_t* p = static_cast<uint16_t*>(to) + offset;
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) p[i] = to_bfloat16(float(from[i]));
    } else {
      for (int64_t i = 0; i < count; ++i) p[i * stride] = to_bfloat16(float(from[i]));
    }
  } else if (dtype == kFloat16) {
    uint16_t* p = static_cast<uint16_t*>(to) + offset;
    for (int64_t i = 0; i < count; ++i) p[i * stride] = float_to_half(float(from[i]));
  } else if (dtype == kBlocks) {
    int8_t* p = static_cast<int8_t*>(to) + offset;
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) p[i] = int8_t(int32_t(from[i]));
    } else {
      for (int64_t i = 0; i < count; ++i) p[i * stride] = int8_t(int32_t(from[i]));
    }
  } else {
    double* p = static_cast<double*>(to) + offset;
    for (int64_t i = 0; i < count; ++i) p[i * stride] = double(from[i]);
  }
}

// Elements k .. k + count in the math dtype: where they lie if that is possible, else converted into `buffer`.
template <class M>
const M* read(const Tensor& t, const int64_t* strides, const void* from, int32_t dtype, int64_t k, int64_t count,
              M* buffer) {
  const int64_t stride = stride_of_runs(t, strides);
  for (int64_t i = 0; i < count;) {
    const Run run = run_at(t, strides, k + i);
    const int64_t n = least(run.count, count - i);
    if (n == count && stride == 1 && dtype == DtypeOf<M>::value) return static_cast<const M*>(from) + run.offset;
    convert_from(buffer + i, from, dtype, run.offset, stride, n);
    i += n;
  }
  return buffer;
}

template <class M>
void write(const Tensor& t, const int64_t* strides, const M* from, void* to, int32_t dtype, int64_t k, int64_t count) {
  const int64_t stride = stride_of_runs(t, strides);
  for (int64_t i = 0; i < count;) {
    const Run run = run_at(t, strides, k + i);
    const int64_t n = least(run.count, count - i);
    convert_to(from + i, to, dtype, run.offset, stride, n);
    i += n;
  }
}

template <class T>
void ask_for(const T* at, int64_t ahead) {
  const char* there = reinterpret_cast<const char*>(at) + ahead;
  __builtin_prefetch(there);
  asm volatile("" : : "r"(there));  // GCC drops a loop that does nothing else
}

// Into the core's cache, not the one before it, which holds what is worked on.
template <class T>
void ask_for_later(const T* at, int64_t ahead) {
  const char* there = reinterpret_cast<const char*>(at) + ahead;
  __builtin_prefetch(there, 0, 2);
  asm volatile("" : : "r"(there));
}

// How far ahead chunks are asked for, and what is read for its squares alone, in bytes. The hardware does it too, but
// stops at the end of a page.
constexpr int64_t kAheadOfChunk = 2048, kAheadOfSquares = 4096;

// A number rounded to a state's dtype and read back: what is used is what is stored.
template <class M>
M stored(M value, int32_t dtype) {
  if (dtype == kBfloat16) return M(from_bfloat16(to_bfloat16(float(value))));
  if (dtype == kFloat32) return M(float(value));
  if (dtype == kFloat16) return M(half_to_float(float_to_half(float(value))));
  return value;
}

template <class M>
M load_one(const void* from, int32_t dtype, int64_t index) {
  M value;
  convert_from(&value, from, dtype, index, 1, 1);
  return value;
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_MEMORY_H
