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

// Elements k .. k + count of a tensor: an offset and a stride where they form one run, else a walk over the dimensions.
struct Run {
  int64_t offset, stride;
  bool straight;
};

inline Run run_at(const Tensor& t, const int64_t* strides, int64_t k, int64_t count) {
  const int last = t.ndim - 1;
  int64_t offset = 0, rest = k;
  for (int d = last; d >= 0; --d) {
    const int64_t index = rest % t.sizes[d];
    rest /= t.sizes[d];
    offset += index * strides[d];
    if (d == last && index + count > t.sizes[d]) return {0, 0, false};
  }
  return {offset, strides[last], true};
}

inline int64_t offset_of(const Tensor& t, const int64_t* strides, int64_t k) {
  int64_t offset = 0;
  for (int d = t.ndim - 1; d >= 0; --d) {
    offset += (k % t.sizes[d]) * strides[d];
    k /= t.sizes[d];
  }
  return offset;
}

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
  } else {
    double* p = static_cast<double*>(to) + offset;
    for (int64_t i = 0; i < count; ++i) p[i * stride] = double(from[i]);
  }
}

// Elements k .. k + count in the math dtype: where they lie if that is possible, else converted into `buffer`.
template <class M>
const M* read(const Tensor& t, const int64_t* strides, const void* from, int32_t dtype, int64_t k, int64_t count,
              M* buffer) {
  const Run run = run_at(t, strides, k, count);
  if (run.straight && run.stride == 1 && dtype == DtypeOf<M>::value) return static_cast<const M*>(from) + run.offset;
  if (run.straight) {
    convert_from(buffer, from, dtype, run.offset, run.stride, count);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      convert_from(buffer + i, from, dtype, offset_of(t, strides, k + i), 1, 1);
    }
  }
  return buffer;
}

template <class M>
void write(const Tensor& t, const int64_t* strides, const M* from, void* to, int32_t dtype, int64_t k, int64_t count) {
  const Run run = run_at(t, strides, k, count);
  if (run.straight) {
    convert_to(from, to, dtype, run.offset, run.stride, count);
  } else {
    for (int64_t i = 0; i < count; ++i) convert_to(from + i, to, dtype, offset_of(t, strides, k + i), 1, 1);
  }
}

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
