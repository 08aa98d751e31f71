// Stochastic rounding of runs of elements, with the random bits of many blocks at a time. Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_ROUNDING_H
#define FUSED_ADAFACTOR_CPU_ROUNDING_H

#include "vector.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

typedef uint64_t Longs __attribute__((vector_size(kVectorBytes)));
constexpr int64_t kBlocksTogether = kVectorBytes / 8;
// Vectors of blocks that are computed in turn: one alone waits for its multiplications. Their numbers fit the registers.
constexpr int kChains = kVectorBytes == 64 ? 4 : 2;
constexpr int64_t kDrawnTogether = 8 * kBlocksTogether * kChains;  // elements
// Blocks that `kChunk` elements touch, wherever they begin, in whole vectors.
constexpr int64_t kBlocksOfChunk = (kChunk / 8 + 1 + kBlocksTogether - 1) / kBlocksTogether * kBlocksTogether;

// Products of the low halves.
inline Longs multiply_halves(Longs a, Longs b) {
#if defined(__AVX512F__)
  return Longs(_mm512_mul_epu32(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return Longs(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Stores a0 b0 a1 b1 ... of two vectors.
inline void store_in_turn(uint16_t* to, Longs a, Longs b) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  store(to, Longs(_mm512_permutex2var_epi64(__m512i(a), first, __m512i(b))));
  store(to + 4 * kBlocksTogether, Longs(_mm512_permutex2var_epi64(__m512i(a), second, __m512i(b))));
#elif defined(__AVX2__)
  const __m256i low = _mm256_unpacklo_epi64(__m256i(a), __m256i(b));
  const __m256i high = _mm256_unpackhi_epi64(__m256i(a), __m256i(b));
  store(to, Longs(_mm256_permute2x128_si256(low, high, 0x20)));
  store(to + 4 * kBlocksTogether, Longs(_mm256_permute2x128_si256(low, high, 0x31)));
#else
  store(to, Longs{a[0], b[0]});
  store(to + 4 * kBlocksTogether, Longs{a[1], b[1]});
#endif
}

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low half comes first");

// What random bits follow from, with the index of the element.
struct RandomKey {
  uint64_t seed;
  uint32_t step, param, stream;
};

inline RandomKey random_key(const Tensor& t, const Rule& r, Stream stream) {
  return {r.seed, uint32_t(r.step), uint32_t(t.param_index), stream};
}

// Philox-4x32-10 of consecutive blocks, `kVectors` vectors of them side by side: eight numbers of 16 bits each. Its key
// is the seed, its counter (block and stream, parameter, step). What is above the low half of a counter's number is of
// no account.
template <int kVectors>
FA_INLINE void vectors_of_blocks(const RandomKey& key, uint64_t block, uint16_t* halves) {
  Longs c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    for (int i = 0; i < kBlocksTogether; ++i) c0[v][i] = block + uint64_t(v * kBlocksTogether + i);
    c1[v] = (c0[v] >> 32) | (uint64_t(key.stream) << kStreamShift);
    c2[v] = Longs{} + key.param;
    c3[v] = Longs{} + key.step;
  }
  const Longs multiplier0 = Longs{} + kPhiloxMultiplier0, multiplier1 = Longs{} + kPhiloxMultiplier1;
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Longs product0 = multiply_halves(c0[v], multiplier0), product1 = multiply_halves(c2[v], multiplier1);
      c0[v] = (product1 >> 32) ^ c1[v] ^ k0;
      c2[v] = (product0 >> 32) ^ c3[v] ^ k1;
      c1[v] = product1;
      c3[v] = product0;
    }
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  for (int v = 0; v < kVectors; ++v) {
    const Longs low = (c0[v] & 0xFFFFFFFFu) | (c1[v] << 32), high = (c2[v] & 0xFFFFFFFFu) | (c3[v] << 32);
    store_in_turn(halves + 8 * kBlocksTogether * v, low, high);
  }
}

// Those of `count` blocks, and of up to a vector of blocks more.
inline void rounding_blocks(const RandomKey& key, uint64_t block, int64_t count, uint16_t* halves) {
  int64_t first = 0;
  for (; first + (kChains - 1) * kBlocksTogether < count; first += kChains * kBlocksTogether) {
    vectors_of_blocks<kChains>(key, block + uint64_t(first), halves + 8 * first);
  }
  for (; first < count; first += kBlocksTogether) {
    vectors_of_blocks<1>(key, block + uint64_t(first), halves + 8 * first);
  }
}

// The random bits of some elements in a row; count <= kChunk.
class RandomBits {
 public:
  const uint16_t* of(const RandomKey& key, uint64_t element, int64_t count) {
    const uint64_t block = element >> 3, blocks = ((element + uint64_t(count) - 1) >> 3) - block + 1;
    rounding_blocks(key, block, int64_t(blocks), halves_);
    return halves_ + (element & 7);
  }

 private:
  uint16_t halves_[8 * kBlocksOfChunk];
};

inline Stream stream_of_lines(const Tensor& t) { return t.swapped ? kColVarStream : kRowVarStream; }
inline Stream stream_across(const Tensor& t) { return t.swapped ? kRowVarStream : kColVarStream; }

// Number in the whole parameter of a matrix of this part of it.
inline int64_t whole_matrix(const WholeParameter& whole, int64_t number) {
  int64_t found = whole.first_matrix;
  for (int d = whole.stack_ndim - 1; d >= 0; --d) {
    found += number % whole.stack_sizes[d] * whole.stack_strides[d];
    number /= whole.stack_sizes[d];
  }
  return found;
}

// Index in the whole entry of number k of second moments, and how many follow it there one after the other.
inline Run moment_at(const Tensor& t, Stream stream, int64_t k) {
  if (t.form == kUnfactored) {
    const Run run = run_at(t, t.logical, k);
    return {t.whole.first_element + run.offset, stride_of_runs(t, t.logical) == 1 ? run.count : 1};
  }
  if (!t.whole.is_split) return {k, INT64_MAX};
  const bool of_lines = stream == stream_of_lines(t), tiny = t.form == kTiny;
  const int64_t count = tiny ? (of_lines ? t.matrix_rows : t.matrix_cols) : (of_lines ? t.rows : t.cols);
  const int64_t all = tiny ? count : (of_lines ? t.whole.rows : t.whole.cols);
  const int64_t begin = of_lines ? t.whole.first_row : t.whole.first_col;
  return {whole_matrix(t.whole, k / count) * all + begin + k % count, count - k % count};
}

// New second moments as they are read back from their dtype, `count` of them from number `first` of their entry on.
// In bfloat16 they are rounded at random: an average that is rounded to nearest stalls.
template <class M>
void round_moments(const Tensor& t, const Rule& r, Stream stream, int64_t first, int64_t count, M* value) {
  if (t.moment_dtype == DtypeOf<M>::value) return;
  if (t.moment_dtype != kBfloat16) {
    for (int64_t i = 0; i < count; ++i) value[i] = stored(value[i], t.moment_dtype);
    return;
  }
  RandomBits bits;
  for (int64_t i = 0; i < count;) {
    const Run run = moment_at(t, stream, first + i);
    const int64_t n = least(least(kChunk, run.count), count - i);
    const uint16_t* random = bits.of(random_key(t, r, stream), uint64_t(run.offset), n);
    M* part = value + i;
    for (int64_t j = 0; j < n; ++j) part[j] = M(from_bfloat16(to_bfloat16_stochastic(float(part[j]), random[j])));
    i += n;
  }
}

// Numbers rounded to bfloat16 with random bits keyed by the element's row-major index in the parameter; n <= kChunk.
inline void write_stochastic(const Tensor& t, const Rule& r, const int64_t* strides, const float* value, void* bfloat16,
                             int64_t k, int64_t n) {
  RandomBits bits;
  uint16_t* all = static_cast<uint16_t*>(bfloat16);
  const int64_t stride = stride_of_runs(t, strides), logical_stride = stride_of_runs(t, t.logical);
  for (int64_t i = 0; i < n;) {
    const Run to = run_at(t, strides, k + i), run = run_at(t, t.logical, k + i);
    const int64_t count = logical_stride == 1 ? least(run.count, n - i) : 1;
    const uint64_t element = uint64_t(t.whole.first_element + run.offset);
    const uint16_t* random = bits.of(random_key(t, r, kParamStream), element, count);
    uint16_t* out = all + to.offset;
    if (stride == 1) {
      for (int64_t j = 0; j < count; ++j) out[j] = to_bfloat16_stochastic(value[i + j], random[j]);
    } else {
      for (int64_t j = 0; j < count; ++j) out[j * stride] = to_bfloat16_stochastic(value[i + j], random[j]);
    }
    i += count;
  }
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_ROUNDING_H
