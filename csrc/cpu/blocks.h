// Numbers of 8 bits in blocks of a line that share a scale. The specification is fused_adafactor/blocks.py: multiplying
// by powers of two is exact, so the bits are those of every other backend. Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_BLOCKS_H
#define FUSED_ADAFACTOR_CPU_BLOCKS_H

#include "vector.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

constexpr int64_t kBlock = 32;       // elements; the last block of a line may have fewer
constexpr uint32_t kPoisoned = 255;  // scale of a block that reads as NaN

// The bits of a math dtype as integers, where its exponent begins, what it is larger by than that of float32, and what
// numbers up to 2^22 are rounded to whole ones by when it is added and taken off again.
template <class M>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef int32_t Integer;
  static constexpr int kExponent = 23;
  static constexpr int32_t kOffset = 0, kMagnitude = 0x7FFFFFFF, kInfinite = 0x7F800000;
  static constexpr float kWhole = 12582912.0f;
};
template <>
struct BitsOf<double> {
  typedef int64_t Integer;
  static constexpr int kExponent = 52;
  static constexpr int64_t kOffset = 1023 - 127, kMagnitude = 0x7FFFFFFFFFFFFFFF, kInfinite = 0x7FF0000000000000;
  static constexpr double kWhole = 6755399441055744.0;
};

// Calls f(number of the block, where it begins in the chunk, its elements) for elements k .. k + n, which are whole
// blocks. Those of tiny matrices lie along their rows, those of an unfactored tensor along all of it.
template <class F>
void for_each_block(const Tensor& t, int64_t k, int64_t n, F f) {
  const int64_t length = t.form == kUnfactored ? t.numel : t.form == kTiny ? t.matrix_cols : t.cols;
  int64_t column = k % length, block = k / length * ((length + kBlock - 1) / kBlock) + column / kBlock;
  for (int64_t i = 0; i < n; ++block) {
    const int64_t count = least(kBlock, length - column);
    // A number that is known when this is compiled makes a loop without a rest.
    count == kBlock ? f(block, i, kBlock) : f(block, i, count);
    i += count;
    column = column + count == length ? 0 : column + count;
  }
}

// From the bits of the largest magnitude.
template <class M>
uint32_t scale_of_largest(typename BitsOf<M>::Integer largest) {
  if (largest >= BitsOf<M>::kInfinite) return kPoisoned;
  const auto scale = (largest >> BitsOf<M>::kExponent) - BitsOf<M>::kOffset;
  return uint32_t(scale < 0 ? 0 : scale > 254 ? 254 : scale);
}

template <class M>
uint32_t scale_of_block(const M* value, int64_t count) {
  typedef typename BitsOf<M>::Integer Integer;
  Integer largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    Integer bits;
    memcpy(&bits, value + i, sizeof bits);
    bits &= BitsOf<M>::kMagnitude;  // ordered as the magnitudes are, with infinity and then NaN above them
    largest = bits > largest ? bits : largest;
  }
  return scale_of_largest<M>(largest);
}

// x as a whole number of units, which are 64ths of the power of two that the scale stands for; 0 in a poisoned block.
template <class M>
void to_units(const M* x, int64_t count, uint32_t scale, M* units) {
  if (scale == kPoisoned) return zero(units, count);
  const M inverse = M(power_of_two(254u - scale));
  for (int64_t i = 0; i < count; ++i) {
    M q = x[i] * inverse * M(64);
    q = q > M(127) ? M(127) : q < M(-127) ? M(-127) : q;
    units[i] = (q + BitsOf<M>::kWhole) - BitsOf<M>::kWhole;  // to nearest, ties to even
  }
}

template <class M>
void from_units(const M* units, int64_t count, uint32_t scale, M* x) {
  const M power = M(power_of_two(scale));
  for (int64_t i = 0; i < count; ++i) x[i] = units[i] * M(1.0 / 64) * power;
}

// The first moment of elements k .. k + n.
template <class M>
const M* read_blocks(const Tensor& t, int64_t k, int64_t n, M* buffer) {
  read(t, t.state_strides, t.exp_avg, kBlocks, k, n, buffer);
  for_each_block(t, k, n, [&](int64_t block, int64_t i, int64_t count) {
    from_units(buffer + i, count, t.exp_avg_scale[block], buffer + i);
  });
  return buffer;
}

// What is used is what is stored.
template <class M>
void round_to_blocks(const Tensor& t, int64_t k, int64_t n, M* value) {
  for_each_block(t, k, n, [&](int64_t, int64_t i, int64_t count) {
    const uint32_t scale = scale_of_block(value + i, count);
    to_units(value + i, count, scale, value + i);
    from_units(value + i, count, scale, value + i);
  });
}

// Stores what has been rounded: rounding it again changes nothing.
template <class M>
void write_blocks(const Tensor& t, int64_t k, int64_t n, const M* value, M* units) {
  for_each_block(t, k, n, [&](int64_t block, int64_t i, int64_t count) {
    const uint32_t scale = scale_of_block(value + i, count);
    t.exp_avg_scale[block] = uint8_t(scale);
    to_units(value + i, count, scale, units + i);
  });
  write(t, t.state_strides, units, t.exp_avg, kBlocks, k, n);
}

// The same of one block in registers.

constexpr int kVectorsOfBlock = int(kBlock / kLanes);

// The part of a block that vector `i` has.
inline AllLanes lanes_of_block(AllLanes, int) { return {}; }
inline SomeLanes lanes_of_block(SomeLanes block, int i) {
  const int64_t rest = block.count - i * kLanes;
  return {rest < 0 ? 0 : rest > kLanes ? kLanes : rest};
}

typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));

inline Bytes load_bytes(const int8_t* from, AllLanes) {
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return bytes;
}
inline Bytes load_bytes(const int8_t* from, SomeLanes part) { return one_by_one<Bytes>(from, part); }
inline void store_bytes(int8_t* to, Bytes bytes, AllLanes) { memcpy(to, &bytes, sizeof bytes); }
inline void store_bytes(int8_t* to, Bytes bytes, SomeLanes part) { one_by_one(to, bytes, part); }

inline Floats to_floats(Bytes bytes) {
#if defined(__AVX512F__)
  return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(__m128i(bytes))));
#elif defined(__AVX2__)
  __m128i all{};
  memcpy(&all, &bytes, sizeof bytes);
  return Floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)));
#else
  Floats value;
  for (int64_t i = 0; i < kLanes; ++i) value[i] = float(bytes[i]);
  return value;
#endif
}

// Of whole numbers.
inline Bytes to_bytes(Floats value) {
#if defined(__AVX512F__)
  return Bytes(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(__m512(value))));
#else
  Bytes bytes;
  for (int64_t i = 0; i < kLanes; ++i) bytes[i] = int8_t(int32_t(value[i]));
  return bytes;
#endif
}

inline int32_t largest_of(Flags value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(__m512i(value));
#else
  int32_t largest = value[0];
  for (int64_t i = 1; i < kLanes; ++i) largest = value[i] > largest ? value[i] : largest;
  return largest;
#endif
}

// A block as it is stored.
template <class Lanes>
FA_INLINE void read_block(const int8_t* units, uint32_t scale, Lanes lanes, Floats (&x)[kVectorsOfBlock]) {
  const float power = power_of_two(scale);
  for (int i = 0; i < kVectorsOfBlock; ++i) {
    x[i] = to_floats(load_bytes(units + i * kLanes, lanes_of_block(lanes, i))) * (1.0f / 64) * power;
  }
}

// A block as it can be stored, in x and, unless that is null, in `units`; returns its scale. Where there are no lanes, x
// must be 0.
template <class Lanes>
FA_INLINE uint8_t round_block(int8_t* units, Lanes lanes, Floats (&x)[kVectorsOfBlock]) {
  Flags largest{};
  for (int i = 0; i < kVectorsOfBlock; ++i) {
    const Flags bits = Flags(x[i]) & BitsOf<float>::kMagnitude;
    largest = bits > largest ? bits : largest;
  }
  const uint32_t scale = scale_of_largest<float>(largest_of(largest));
  const float inverse = power_of_two(254u - scale), power = power_of_two(scale);
  for (int i = 0; i < kVectorsOfBlock; ++i) {
    const Floats whole = clipped(x[i] * inverse * 64.0f, 127.0f) + BitsOf<float>::kWhole - BitsOf<float>::kWhole;
    const Floats rounded = scale == kPoisoned ? Floats{} : whole;
    if (units != nullptr) store_bytes(units + i * kLanes, to_bytes(rounded), lanes_of_block(lanes, i));
    x[i] = rounded * (1.0f / 64) * power;
  }
  return uint8_t(scale);
}

// Calls f(begin, lanes) for the blocks of n elements.
template <class F>
void for_each_block_of_line(int64_t n, F f) {
  int64_t begin = 0;
  for (; begin + kBlock <= n; begin += kBlock) f(begin, AllLanes{});
  if (begin < n) f(begin, SomeLanes{n - begin});
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_BLOCKS_H
