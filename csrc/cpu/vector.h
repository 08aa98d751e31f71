// Vectors as wide as the instruction set has them, through the compiler's vector extension. Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_VECTOR_H
#define FUSED_ADAFACTOR_CPU_VECTOR_H

#include "memory.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// For what is done to one vector: a call would put all others into memory and back.
#define FA_INLINE inline __attribute__((always_inline))

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
// Of float32 and of float64.
template <class M>
struct VectorOf {
  typedef M type __attribute__((vector_size(kVectorBytes)));
};
template <class M>
using Vector = typename VectorOf<M>::type;
template <class M>
constexpr int64_t lanes_of = kVectorBytes / sizeof(M);

typedef Vector<float> Floats;
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
constexpr int64_t kLanes = lanes_of<float>;

template <class M>
Vector<M> load(const M* from) {
  Vector<M> value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class M>
void store(M* to, V value) {
  memcpy(to, &value, sizeof value);
}

// __builtin_convertvector does both of these, but GCC takes halves of vectors apart for it.
inline Words widened(Halves halves) {
#if defined(__AVX512F__)
  return Words(_mm512_cvtepu16_epi32(__m256i(halves)));
#elif defined(__AVX2__)
  return Words(_mm256_cvtepu16_epi32(__m128i(halves)));
#else
  return __builtin_convertvector(halves, Words);
#endif
}

inline Halves narrowed(Words words) {
#if defined(__AVX512F__)
  return Halves(_mm512_cvtepi32_epi16(__m512i(words)));
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128(__m256i(words)), high = _mm256_extracti128_si256(__m256i(words), 1);
  return Halves(_mm_packus_epi32(low, high));
#else
  return __builtin_convertvector(words, Halves);
#endif
}

using fused_adafactor::from_bfloat16;
using fused_adafactor::to_bfloat16;
using fused_adafactor::to_bfloat16_stochastic;

inline Floats from_bfloat16(Halves halves) { return Floats(widened(halves) << 16); }

inline Floats load(const uint16_t* bfloat16) {
  Halves halves;
  memcpy(&halves, bfloat16, sizeof halves);
  return from_bfloat16(halves);
}

// Two vectors of bfloat16 at once, by every other number: one load, and one operation for each.
struct EveryOther {
  Floats first, second;  // numbers 0, 2, 4, ... and 1, 3, 5, ...
};

inline EveryOther load_every_other(const uint16_t* bfloat16) {
  Words pairs;
  memcpy(&pairs, bfloat16, sizeof pairs);
  const Floats low = Floats(pairs << 16), high = Floats(pairs & 0xFFFF0000u);
  return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? EveryOther{low, high} : EveryOther{high, low};
}

inline Halves to_bfloat16(Floats value) {
#if defined(__AVX512BF16__)
  // Flushes what is below the normal numbers, so those go the long way.
  if (_mm512_fpclass_ps_mask(__m512(value), 0x20) == 0) {
    const __m256bh rounded = _mm512_cvtneps_pbh(__m512(value));
    Halves halves;
    memcpy(&halves, &rounded, sizeof halves);
    return halves;
  }
#endif
  const Words bits = Words(value);
  const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = Words((bits & 0x7FFFFFFFu) > 0x7F800000u);
  return narrowed((nan & 0x7FC0u) | (~nan & rounded));
}

inline Halves to_bfloat16_stochastic(Floats value, Halves random16) {
  const Words bits = Words(value), rounded = (bits + widened(random16)) >> 16;
#if defined(__AVX512F__)
  if (_mm512_fpclass_ps_mask(__m512(value), 0x99) == 0) return narrowed(rounded);  // neither infinite nor NaN
#endif
  const Words magnitude = bits & 0x7FFFFFFFu, exact = Words(magnitude >= 0x7F800000u);
  const Words kept = (bits >> 16) | (Words(magnitude > 0x7F800000u) & 0x40u);
  return narrowed((exact & kept) | (~exact & rounded));
}

inline void store(uint16_t* to, Floats value) {
  const Halves halves = to_bfloat16(value);
  memcpy(to, &halves, sizeof halves);
}

// One element, for what a row of whole vectors leaves over.
inline double load_element(const double* from) { return *from; }
inline float load_element(const float* from) { return *from; }
inline float load_element(const uint16_t* bfloat16) { return from_bfloat16(*bfloat16); }
inline void store_element(float* to, float value) { *to = value; }
inline void store_element(uint16_t* to, float value) { *to = to_bfloat16(value); }

struct Float16 {
  uint16_t bits;
};

template <class T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<uint16_t> = true;

inline Halves to_float16(Floats value) {
#if defined(__AVX512F__)
  return Halves(_mm512_cvtps_ph(__m512(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return Halves(_mm256_cvtps_ph(__m256(value), _MM_FROUND_TO_NEAREST_INT));
#else
  Halves halves;
  for (int64_t i = 0; i < kLanes; ++i) halves[i] = float_to_half(value[i]);
  return halves;
#endif
}

inline void store(Float16* to, Floats value) {
  const Halves halves = to_float16(value);
  memcpy(to, &halves, sizeof halves);
}
inline void store_element(Float16* to, float value) { to->bits = float_to_half(value); }

inline Floats from_float16(Halves halves) {
#if defined(__AVX512F__)
  return Floats(_mm512_cvtph_ps(__m256i(halves)));
#elif defined(__AVX2__)
  return Floats(_mm256_cvtph_ps(__m128i(halves)));
#else
  Floats value;
  for (int64_t i = 0; i < kLanes; ++i) value[i] = half_to_float(halves[i]);
  return value;
#endif
}

inline Floats load(const Float16* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return from_float16(halves);
}

// A whole vector, or the first lanes of one, which is what is left over at the end of a row. What is not there is read
// as 0, and not written.
struct AllLanes {
  static constexpr int64_t count = kLanes;
};
struct SomeLanes {
  int64_t count;
};

// Calls f(j, lanes) for the elements from `begin` to `end`, a vector at a time.
template <class F>
void for_each_vector(int64_t begin, int64_t end, F f) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) f(j, AllLanes{});
  if (j < end) f(j, SomeLanes{end - j});
}

// A number that is known when this is compiled.
template <int kNumber>
struct Known {
  static constexpr int value = kNumber;
};

// Calls f(j, lanes, number) likewise, with the numbers 0 to 3 in turn, of as many sums that do not wait for each other.
template <class F>
FA_INLINE void for_each_vector_in_turn(int64_t begin, int64_t end, F f) {
  int64_t j = begin;
  for (; j + 4 * kLanes <= end; j += 4 * kLanes) {
    f(j, AllLanes{}, Known<0>{});
    f(j + kLanes, AllLanes{}, Known<1>{});
    f(j + 2 * kLanes, AllLanes{}, Known<2>{});
    f(j + 3 * kLanes, AllLanes{}, Known<3>{});
  }
  for_each_vector(j, end, [&](int64_t here, auto lanes) { f(here, lanes, Known<0>{}); });
}

template <class T>
Floats load(const T* from, AllLanes) {
  return load(from);
}
template <class T>
void store(T* to, Floats value, AllLanes) {
  store(to, value);
}
inline Halves load_halves(const uint16_t* from, AllLanes) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return halves;
}
inline void store_halves(uint16_t* to, Halves halves, AllLanes) { memcpy(to, &halves, sizeof halves); }
// Of any vector, where the machine has nothing for it.
template <class V, class T>
V one_by_one(const T* from, SomeLanes part) {
  V value{};
  for (int64_t i = 0; i < part.count; ++i) value[i] = from[i];
  return value;
}
template <class V, class T>
void one_by_one(T* to, V value, SomeLanes part) {
  for (int64_t i = 0; i < part.count; ++i) to[i] = value[i];
}
// Without what was never read: not 0 any more, where it has been divided by 0.
inline Floats kept(Floats value, AllLanes) { return value; }

#if defined(__AVX512F__)
inline __mmask16 mask_of(SomeLanes part) { return __mmask16((1u << part.count) - 1u); }
inline Floats load(const float* from, SomeLanes part) { return Floats(_mm512_maskz_loadu_ps(mask_of(part), from)); }
inline void store(float* to, Floats value, SomeLanes part) { _mm512_mask_storeu_ps(to, mask_of(part), __m512(value)); }
inline Halves load_halves(const uint16_t* from, SomeLanes part) {
  return Halves(_mm256_maskz_loadu_epi16(mask_of(part), from));
}
inline void store_halves(uint16_t* to, Halves halves, SomeLanes part) {
  _mm256_mask_storeu_epi16(to, mask_of(part), __m256i(halves));
}
inline Floats kept(Floats value, SomeLanes part) { return Floats(_mm512_maskz_mov_ps(mask_of(part), __m512(value))); }
#else
inline Floats load(const float* from, SomeLanes part) { return one_by_one<Floats>(from, part); }
inline void store(float* to, Floats value, SomeLanes part) { one_by_one(to, value, part); }
inline Halves load_halves(const uint16_t* from, SomeLanes part) { return one_by_one<Halves>(from, part); }
inline void store_halves(uint16_t* to, Halves halves, SomeLanes part) { one_by_one(to, halves, part); }
inline Floats kept(Floats value, SomeLanes part) {
  for (int64_t i = part.count; i < kLanes; ++i) value[i] = 0.0f;
  return value;
}
#endif
inline Floats load(const Float16* from, SomeLanes part) { return from_float16(load_halves(&from->bits, part)); }
inline Floats load(const uint16_t* bfloat16, SomeLanes part) { return from_bfloat16(load_halves(bfloat16, part)); }
inline void store(uint16_t* to, Floats value, SomeLanes part) { store_halves(to, to_bfloat16(value), part); }

typedef int32_t Flags __attribute__((vector_size(kVectorBytes)));  // -1 where a comparison holds

inline bool any(Flags flags) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(flags), __m512i(flags)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(__m256i(flags), __m256i(flags));
#else
  int32_t found = 0;
  for (int64_t i = 0; i < kLanes; ++i) found |= flags[i];
  return found != 0;
#endif
}

template <class V>
auto sum_of_array(V value) {
  auto sum = value[0] + value[1];
  for (size_t i = 2; i < sizeof value / sizeof sum; ++i) sum += value[i];
  return sum;
}

using fused_adafactor::fused;

inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX2__)
  return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  for (int64_t i = 0; i < kLanes; ++i) c[i] = fused(a[i], b[i], c[i]);
  return c;
#endif
}

inline Vector<double> fused(Vector<double> a, Vector<double> b, Vector<double> c) {
  for (int64_t i = 0; i < lanes_of<double>; ++i) c[i] = fused(a[i], b[i], c[i]);
  return c;
}

inline float sum_of(Floats value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(__m512(value));
#elif defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(__m256(value)), _mm256_extractf128_ps(__m256(value), 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return sum_of_array(value);
#endif
}

inline double sum_of(Vector<double> value) { return sum_of_array(value); }

// Σ x² of numbers of the math dtype, or of bfloat16.
template <class T>
auto sum_of_squares(const T* x, int64_t n) {
  using V = decltype(load(x));
  constexpr int64_t kStep = sizeof(V) / sizeof(decltype(load_element(x)));
  V a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * kStep <= n; i += 4 * kStep) {
    for (int64_t line = 0; line < 4 * kStep * int64_t(sizeof(T)); line += 64) ask_for_later(x + i, kAheadOfSquares + line);
    const V p = load(x + i), q = load(x + i + kStep), r = load(x + i + 2 * kStep), s = load(x + i + 3 * kStep);
    a += p * p;
    b += q * q;
    c += r * r;
    d += s * s;
  }
  for (; i + kStep <= n; i += kStep) {
    const V p = load(x + i);
    a += p * p;
  }
  auto sum = sum_of((a + b) + (c + d));
  for (; i < n; ++i) {
    const auto rest = load_element(x + i);
    sum += rest * rest;
  }
  return sum;
}

// Σ x, in double precision from every few thousand numbers on.
template <class M>
double total_of(const M* x, int64_t n) {
  constexpr int64_t kFlush = 4096;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    const int64_t end = least(n, begin + kFlush);
    Vector<M> a{};
    int64_t i = begin;
    for (; i + lanes_of<M> <= end; i += lanes_of<M>) a += load(x + i);
    double rest = 0;
    for (; i < end; ++i) rest += double(x[i]);
    total += double(sum_of(a)) + rest;
  }
  return total;
}

// At most so much, and between -limit and limit. NaN stays: the machine's minimum is its second argument then.
inline Floats least(Floats a, float most) {
#if defined(__AVX512F__)
  return Floats(_mm512_min_ps(__m512(Floats{} + most), __m512(a)));
#elif defined(__AVX2__)
  return Floats(_mm256_min_ps(__m256(Floats{} + most), __m256(a)));
#else
  return a > most ? Floats{} + most : a;
#endif
}

inline Floats clipped(Floats a, float limit) {
#if defined(__AVX512F__)
  return Floats(_mm512_max_ps(__m512(Floats{} - limit), __m512(least(a, limit))));
#elif defined(__AVX2__)
  return Floats(_mm256_max_ps(__m256(Floats{} - limit), __m256(least(a, limit))));
#else
  a = least(a, limit);
  return a < -limit ? Floats{} - limit : a;
#endif
}

// 1 / sqrt(x).
inline Vector<double> inverse_root(Vector<double> x) {
  for (int64_t i = 0; i < lanes_of<double>; ++i) x[i] = 1.0 / std::sqrt(x[i]);
  return x;
}

#if defined(__AVX2__)
// Where a number is so small, so large or so odd that a guess of 1 / x or 1 / sqrt(x) cannot be made better. The others
// beside it in a vector are not touched by that.
inline Flags extremes(Floats x) { return ~((x > 1e-37f) & (x < 1e37f)); }
#endif

inline Floats exact_inverse_root(Floats x) {
  for (int64_t i = 0; i < kLanes; ++i) x[i] = 1.0f / std::sqrt(x[i]);
  return x;
}

inline Floats inverse_root(Floats x) {
#if defined(__AVX2__)
  // A guess of 12 bits or more and one step of Newton's method: within two units in the last place, in a fifth of the
  // time of a division and a root.
#if defined(__AVX512F__)
  const Floats guess = Floats(_mm512_rsqrt14_ps(__m512(x)));
#else
  const Floats guess = Floats(_mm256_rsqrt_ps(__m256(x)));
#endif
  const Floats better = guess + guess * (0.5f - 0.5f * x * guess * guess);
  const Flags extreme = extremes(x);
  return any(extreme) ? (extreme ? exact_inverse_root(x) : better) : better;
#else
  return exact_inverse_root(x);
#endif
}

inline Floats inverse_root(Floats x, AllLanes) { return inverse_root(x); }

// What is left over at the end of a row is not worth a guess.
inline Floats inverse_root(Floats x, SomeLanes part) {
  for (int64_t i = 0; i < part.count; ++i) x[i] = 1.0f / std::sqrt(x[i]);
  return x;
}

// 1 / x, likewise.
inline Vector<double> inverse(Vector<double> x) { return 1.0 / x; }

inline Floats inverse(Floats x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const Floats guess = Floats(_mm512_rcp14_ps(__m512(x)));
#else
  const Floats guess = Floats(_mm256_rcp_ps(__m256(x)));
#endif
  const Floats better = guess + guess * (1.0f - x * guess);
  const Flags extreme = extremes(x);
  return any(extreme) ? (extreme ? 1.0f / x : better) : better;
#else
  return 1.0f / x;
#endif
}

// x[i] = 1 / sqrt(x[i]).
template <class M>
void inverse_roots(M* x, int64_t n) {
  int64_t i = 0;
  for (; i + lanes_of<M> <= n; i += lanes_of<M>) store(x + i, inverse_root(load(x + i)));
  for (; i < n; ++i) x[i] = M(1) / std::sqrt(x[i]);
}

// Numbers of two vectors, by their places in both, which are known when this is compiled.
#if defined(__clang__) || __GNUC__ >= 12
#define FA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Flags{__VA_ARGS__})
#endif

// a0 b0 a1 b1 ... of the first halves of two vectors, and of their second halves.
inline Floats first_halves(Floats a, Floats b) {
#if defined(__AVX512F__)
  return FA_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return FA_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return FA_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}

inline Floats second_halves(Floats a, Floats b) {
#if defined(__AVX512F__)
  return FA_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return FA_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return FA_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// Adds two vectors to as many numbers as they have, every other one to each.
inline void add_every_other(float* to, const EveryOther& value) {
  store(to, load(to) + first_halves(value.first, value.second));
  store(to + kLanes, load(to + kLanes) + second_halves(value.first, value.second));
}

// Rows of a square become columns: every round deals two halves of the rows like cards.
inline void transpose(Floats (&row)[kLanes]) {
#pragma GCC unroll 4
  for (int64_t rounds = kLanes; rounds > 1; rounds /= 2) {
    Floats dealt[kLanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      dealt[2 * i] = first_halves(row[i], row[i + kLanes / 2]);
      dealt[2 * i + 1] = second_halves(row[i], row[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) row[i] = dealt[i];
  }
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_VECTOR_H
