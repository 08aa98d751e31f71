// The formulas of the rule, on single numbers: no loads, no loops, no headers of torch. Shared by the CPU and the CUDA
// kernels; the names are those of fused_adafactor/backends/reference, which is the specification.

#ifndef FUSED_ADAFACTOR_FORMULAS_H
#define FUSED_ADAFACTOR_FORMULAS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define FA_HD __host__ __device__ __forceinline__
#else
#define FA_HD inline __attribute__((always_inline))
#endif

namespace fused_adafactor {

// a b + c with one rounding where the machine has an instruction for that. The compiler would fuse of itself, but of two
// products that are added it may choose either, and not the same one in every loop.
FA_HD float fused(float a, float b, float c) {
#if defined(__CUDACC__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FA_HD double fused(double a, double b, double c) {
#if defined(__CUDACC__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// `rest` is 1 - beta2, subtracted in double: in float32 that of 0.999 is wrong by 1e-5 of itself.
template <class M>
FA_HD M new_moment(M old, M value, M beta2, M rest) {
  return fused(rest, value, beta2 * old);
}

// What enters a second moment: the mean of `count` g², or their sum, with eps1 added.
template <class M>
FA_HD M mean_or_sum(M total, M count, M added, bool sums) {
  total += count * added;
  return sums ? total : total / count;
}

template <class M>
FA_HD M inverse_root(M x) {
  return M(1) / M(sqrt(x));
}

// The smaller one; NaN stays.
template <class M>
FA_HD M at_most(M x, M limit) {
  return x > limit ? limit : x;
}

// g, clipped by value; NaN passes.
template <class M>
FA_HD M clipped_by_value(M g, M limit) {
  return g > limit ? limit : g < -limit ? -limit : g;
}

// AMSGrad's maximum; NaN of either stays.
template <class M>
FA_HD M new_maximum(M var, M old) {
  return var > old || var != var ? var : old;
}

// A bfloat16 as the upper half of a float32.
FA_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

FA_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

FA_HD float from_bfloat16(uint16_t half) { return float_from_bits(uint32_t(half) << 16); }

// Round to nearest, ties to even; a NaN becomes the quiet NaN.
FA_HD uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// Add 16 random bits below the result and cut; NaN stays NaN and Inf is exact.
FA_HD uint16_t to_bfloat16_stochastic(float value, uint32_t random16) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t rounded = (bits + random16) >> 16;
  const uint32_t kept = (bits >> 16) | (magnitude > 0x7F800000u ? 0x40u : 0u);
  return uint16_t(magnitude >= 0x7F800000u ? kept : rounded);
}

// 2^(scale - 127), NaN for 0xFF: the scale of a block of 8-bit numbers; see fused_adafactor/blocks.py.
FA_HD float power_of_two(uint32_t scale) {
  return float_from_bits(scale == 0u ? 0x00400000u : scale == 0xFFu ? 0x7FC00000u : scale << 23);
}

// Philox-4x32-10: Salmon et al., SC 2011. Ten rounds of two products, with a key that moves on by these.
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

// The four words of a counter become the random ones of a key.
FA_HD void philox(uint32_t (&counter)[4], uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(kPhiloxMultiplier0) * counter[0];
    const uint64_t product1 = uint64_t(kPhiloxMultiplier1) * counter[2];
    counter[0] = uint32_t(product1 >> 32) ^ counter[1] ^ k0;
    counter[1] = uint32_t(product1);
    counter[2] = uint32_t(product0 >> 32) ^ counter[3] ^ k1;
    counter[3] = uint32_t(product0);
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
}

// What is rounded: each has random bits of its own, as rounding.Stream says. They follow the name, not the layout: where
// lines are columns, line_var is col_var. An unfactored var takes those of row_var.
enum Stream : uint32_t { kParamStream = 0, kRowVarStream = 1, kColVarStream = 2 };
constexpr int kStreamShift = 28;  // in the second word of the counter

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_FORMULAS_H
