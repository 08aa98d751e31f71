// The formulas of the rule, on single numbers: no loads, no loops, no headers of torch. Shared by the CPU and the CUDA
// kernels; the names are those of fused_adafactor/backends/reference.py, which is the specification.

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

// `rest` is 1 - beta2, subtracted in double: in float32 that of 0.999 is wrong by 1e-5 of itself.
template <class M>
FA_HD M new_moment(M old, M value, M beta2, M rest) {
  return beta2 * old + rest * value;
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

struct PhiloxBlock {
  uint32_t word[4];
};

// Philox-4x32-10: Salmon et al., SC 2011.
FA_HD PhiloxBlock philox_4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * c0;
    const uint64_t product1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t next0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(product1);
    c3 = uint32_t(product0);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return PhiloxBlock{{c0, c1, c2, c3}};
}

// The block that serves elements 8 b to 8 b + 7 of a parameter.
FA_HD PhiloxBlock rounding_block(uint64_t block, uint32_t param_index, uint32_t step, uint64_t seed) {
  return philox_4x32(uint32_t(block), uint32_t(block >> 32), param_index, step, uint32_t(seed), uint32_t(seed >> 32));
}

// The 16 bits of one element out of its block: word (e & 7) / 2, low half first.
FA_HD uint32_t rounding_bits(const PhiloxBlock& block, uint64_t element) {
  const uint32_t word = block.word[(element & 7) >> 1];
  return (element & 1) ? word >> 16 : word & 0xFFFFu;
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_FORMULAS_H
