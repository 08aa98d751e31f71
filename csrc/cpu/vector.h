// Vectors as wide as the instruction set has them, through the compiler's vector extension. Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_VECTOR_H
#define FUSED_ADAFACTOR_CPU_VECTOR_H

#include "memory.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace fused_adafactor {
namespace FA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int64_t kLanes = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

inline Floats load(const float* from) {
  Floats value;
  memcpy(&value, from, sizeof value);
  return value;
}

inline Floats load(const uint16_t* bfloat16) {
  Halves halves;
  memcpy(&halves, bfloat16, sizeof halves);
  return Floats(__builtin_convertvector(halves, Words) << 16);
}

inline void store(float* to, Floats value) { memcpy(to, &value, sizeof value); }

// to_bfloat16, on a vector.
inline void store(uint16_t* to, Floats value) {
  const Words bits = Words(value);
  const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = Words((bits & 0x7FFFFFFFu) > 0x7F800000u);
  const Halves halves = __builtin_convertvector((nan & 0x7FC0u) | (~nan & rounded), Halves);
  memcpy(to, &halves, sizeof halves);
}

// One element, for what a row of whole vectors leaves over.
inline float load_element(const float* from) { return *from; }
inline float load_element(const uint16_t* bfloat16) { return from_bfloat16(*bfloat16); }
inline void store_element(float* to, float value) { *to = value; }
inline void store_element(uint16_t* to, float value) { *to = to_bfloat16(value); }

inline float sum_of(Floats value) {
  float lane[kLanes];
  memcpy(lane, &value, sizeof lane);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

inline Floats least(Floats a, float most) { return a > most ? Floats{} + most : a; }

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_VECTOR_H
