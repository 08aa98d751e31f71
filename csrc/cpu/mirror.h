// The mirror of a parameter: what has just been stored, rounded once more, written past the caches. Part of kernels.cpp.
//
// Nobody here ever reads a mirror, so a line of it that went through the caches would first be fetched from memory, and
// then push out a line of the gradient or of the parameter. What is read for it, a chunk of the parameter, is still in
// the core's first cache.

#ifndef FUSED_ADAFACTOR_CPU_MIRROR_H
#define FUSED_ADAFACTOR_CPU_MIRROR_H

#include "rounding.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

constexpr int64_t kCacheLineBytes = 64;
constexpr int64_t kLeastStreamed = 512;  // bytes: less is not worth finding where a cache line begins

// A vector to where a vector may begin, past the caches.
inline void stream_vector(void* to, Words value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), __m512i(value));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), __m256i(value));
#else
  memcpy(to, &value, sizeof value);
#endif
}

inline Words joined(Halves a, Halves b) {
#if defined(__AVX512F__)
  return Words(_mm512_inserti64x4(_mm512_castsi256_si512(__m256i(a)), __m256i(b), 1));
#elif defined(__AVX2__)
  return Words(_mm256_inserti128_si256(_mm256_castsi128_si256(__m128i(a)), __m128i(b), 1));
#else
  Words words;
  memcpy(&words, &a, sizeof a);
  memcpy(reinterpret_cast<char*>(&words) + sizeof a, &b, sizeof b);
  return words;
#endif
}

// Streamed vectors may be seen later than other stores: this comes between them and saying that they are there.
inline void publish_streamed() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class P>
void stream(float* to, const P* from) {
  stream_vector(to, Words(load(from)));
}
template <class P>
void stream(uint16_t* to, const P* from) {
  stream_vector(to, joined(to_bfloat16(load(from)), to_bfloat16(load(from + kLanes))));
}
template <class P>
void stream(Float16* to, const P* from) {
  stream_vector(to, joined(to_float16(load(from)), to_float16(load(from + kLanes))));
}

// One run of elements of both.
template <class Q, class P>
void mirror_run(Q* to, const P* from, int64_t n) {
  constexpr int64_t kLine = kCacheLineBytes / sizeof(Q), kVector = kVectorBytes / sizeof(Q);
  int64_t i = 0;
  if (n * int64_t(sizeof(Q)) >= kLeastStreamed) {
    const int64_t past = int64_t(reinterpret_cast<uintptr_t>(to) % kCacheLineBytes / sizeof(Q));
    for (; (past + i) % kLine != 0; ++i) store_element(to + i, load_element(from + i));
    for (; i + kLine <= n; i += kLine) {
      for (int64_t j = 0; j < kLine; j += kVector) stream(to + i + j, from + i + j);
    }
  }
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) store_element(to + i, load_element(from + i));
}

template <class P>
void mirror_runs(const Tensor& t, const P* param, int64_t k, int64_t n) {
  for (int64_t i = 0; i < n;) {
    const Run from = run_at(t, t.strides, k + i), to = run_at(t, t.state_strides, k + i);
    const int64_t count = least(from.count, n - i);
    const P* there = param + from.offset;
    if (t.mirror_dtype == kBfloat16) {
      mirror_run(static_cast<uint16_t*>(t.mirror) + to.offset, there, count);
    } else if (t.mirror_dtype == kFloat16) {
      mirror_run(static_cast<Float16*>(t.mirror) + to.offset, there, count);
    } else {
      mirror_run(static_cast<float*>(t.mirror) + to.offset, there, count);
    }
    i += count;
  }
}

// Whether the mirror is rounded with random bits; what is bfloat16 already needs none.
inline bool mirrors_stochastically(const Tensor& t, const Rule& r) {
  return r.rounding == kStochastic && t.mirror_dtype == kBfloat16 && t.param_dtype != kBfloat16;
}

template <class M>
void mirror_converted(const Tensor& t, int64_t k, int64_t n) {
  M buffer[kChunk];
  write(t, t.state_strides, read(t, t.strides, t.param, t.param_dtype, k, n, buffer), t.mirror, t.mirror_dtype, k, n);
}

// The mirror of elements k .. k + n, n <= kChunk, from the parameter as it is stored.
inline void write_mirror(const Tensor& t, const Rule& r, int64_t k, int64_t n, bool stochastic) {
  if (stochastic) {
    float buffer[kChunk];
    const float* value = read(t, t.strides, t.param, t.param_dtype, k, n, buffer);
    return write_stochastic(t, r, t.state_strides, value, t.mirror, k, n);
  }
  const bool in_runs = stride_of_runs(t, t.strides) == 1 && stride_of_runs(t, t.state_strides) == 1;
  if (in_runs && t.mirror_dtype != kFloat64 && t.param_dtype == kFloat32) {
    mirror_runs(t, static_cast<const float*>(t.param), k, n);
  } else if (in_runs && t.mirror_dtype != kFloat64 && t.param_dtype == kBfloat16) {
    mirror_runs(t, static_cast<const uint16_t*>(t.param), k, n);
  } else if (t.param_dtype == kFloat64) {
    mirror_converted<double>(t, k, n);
  } else {
    mirror_converted<float>(t, k, n);
  }
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_MIRROR_H
