// Matrices of a few elements, as those of a 3x3 convolution, and short lines: one in each lane of a vector. Part of
// kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_TINY_H
#define FUSED_ADAFACTOR_CPU_TINY_H

#include "rounding.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

// A chunk of tiny matrices, or of short lines, with one of them in each lane: element e of all of them is a row of
// `stride` numbers, a whole number of vectors.
inline int64_t stride_of(int64_t lanes) { return (lanes + kLanes - 1) / kLanes * kLanes; }

#if defined(__AVX512F__)
// Where each number of `kCount` vectors belongs, for rows of two, three or four numbers.
template <int kCount>
struct Deal {
  int32_t gather[16];          // of the first number of each row, in the flat order
  int32_t scatter[kCount][16];  // in the first or the second pair of vectors
  int32_t second[kCount];      // bits: which come from the second pair

  constexpr Deal() : gather(), scatter(), second() {
    for (int lane = 0; lane < 16; ++lane) gather[lane] = lane * kCount;
    for (int flat = 0; flat < 16 * kCount; ++flat) {
      const int lane = flat / kCount, element = flat % kCount;
      scatter[flat / 16][flat % 16] = lane + 16 * (element % 2);
      second[flat / 16] |= (element / 2) << (flat % 16);
    }
  }
};

template <int kCount>
void deal_out(const float* from, float* to, int64_t stride) {
  static constexpr Deal<kCount> deal;
  const __m512 a = __m512(load(from)), b = __m512(load(from + 16));
  const __m512 c = kCount > 2 ? __m512(load(from + 32)) : a, d = kCount > 3 ? __m512(load(from + 48)) : c;
  __m512i index = _mm512_loadu_si512(deal.gather);
  for (int e = 0; e < kCount; ++e) {
    const __mmask16 second = _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(32));
    store(to + e * stride, Floats(_mm512_mask_blend_ps(second, _mm512_permutex2var_ps(a, index, b),
                                                       _mm512_permutex2var_ps(c, index, d))));
    index = _mm512_add_epi32(index, _mm512_set1_epi32(1));
  }
}

template <int kCount>
void deal_back(const float* from, int64_t stride, float* to) {
  static constexpr Deal<kCount> deal;
  const __m512 a = __m512(load(from)), b = __m512(load(from + stride));
  const __m512 c = kCount > 2 ? __m512(load(from + 2 * stride)) : a, d = kCount > 3 ? __m512(load(from + 3 * stride)) : c;
  for (int i = 0; i < kCount; ++i) {
    const __m512i index = _mm512_loadu_si512(deal.scatter[i]);
    const __m512 first = _mm512_permutex2var_ps(a, index, b), second = _mm512_permutex2var_ps(c, index, d);
    store(to + 16 * i, Floats(_mm512_mask_blend_ps(__mmask16(deal.second[i]), first, second)));
  }
}

#endif

// The same for rows of any length, by transposing squares of vectors. A length that is known when this is compiled
// keeps a square in registers; kCount = 0 is for all others.
template <int kCount>
void square_out(const float* from, int64_t any_count, float* to, int64_t stride) {
  const int64_t count = kCount > 0 ? kCount : any_count;
  for (int64_t e = 0; e < count; e += kLanes) {
    Floats row[kLanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) row[i] = load(from + i * count + e);
    transpose(row);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) {
      if (e + i < count) store(to + (e + i) * stride, row[i]);
    }
  }
}

template <int kCount>
void square_back(const float* from, int64_t stride, int64_t any_count, float* to) {
  const int64_t count = kCount > 0 ? kCount : any_count;
  // What is too much at the end of a row falls on the next one, whose turn comes later.
  for (int64_t e = (count - 1) / kLanes * kLanes; e >= 0; e -= kLanes) {
    Floats row[kLanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) row[i] = e + i < count ? load(from + (e + i) * stride) : Floats{};
    transpose(row);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) store(to + i * count + e, row[i]);
  }
}

// One vector of lanes.
inline void vector_out(const float* from, int64_t count, float* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) ask_for(from + i * kLanes, kAheadOfChunk);
  switch (count) {
#if defined(__AVX512F__)
    case 2:
      return deal_out<2>(from, to, stride);
    case 3:
      return deal_out<3>(from, to, stride);
    case 4:
      return deal_out<4>(from, to, stride);
#endif
    case 9:
      return square_out<9>(from, count, to, stride);
    default:
      return square_out<0>(from, count, to, stride);
  }
}

inline void vector_back(const float* from, int64_t stride, int64_t count, float* to) {
  switch (count) {
#if defined(__AVX512F__)
    case 2:
      return deal_back<2>(from, stride, to);
    case 3:
      return deal_back<3>(from, stride, to);
    case 4:
      return deal_back<4>(from, stride, to);
#endif
    case 9:
      return square_back<9>(from, stride, count, to);
    default:
      return square_back<0>(from, stride, count, to);
  }
}

// to[e][l] = from[l][e] for all lanes; what is beyond them is 0. `there`: how many numbers may be read from `from` on.
template <class M>
void to_lanes(const M* from, int64_t count, int64_t lanes, int64_t there, M* to) {
  const int64_t stride = stride_of(lanes);
  if (count == 1) {
    memcpy(to, from, lanes * sizeof(M));
    for (int64_t i = lanes; i < stride; ++i) to[i] = M(0);
    return;
  }
  int64_t l = 0;
  if constexpr (sizeof(M) == sizeof(float)) {
    for (; l + kLanes <= lanes && there - l * count >= kLanes * (count + 1); l += kLanes) {
      vector_out(from + l * count, count, to + l, stride);
    }
  }
  for (int64_t e = 0; e < count && l < stride; ++e) {
    for (int64_t i = l; i < stride; ++i) to[e * stride + i] = i < lanes ? from[i * count + e] : M(0);
  }
}

// to[l][e] = from[e][l] for all lanes. Writes up to a vector more than there is.
template <class M>
void from_lanes(const M* from, int64_t count, int64_t lanes, M* to) {
  const int64_t stride = stride_of(lanes);
  if (count == 1) {
    memcpy(to, from, lanes * sizeof(M));
    return;
  }
  int64_t l = 0;
  if constexpr (sizeof(M) == sizeof(float)) {
    for (; l + kLanes <= lanes; l += kLanes) vector_back(from + l, stride, count, to + l * count);
  }
  for (; l < lanes; ++l) {
    for (int64_t e = 0; e < count; ++e) to[l * count + e] = from[e * stride + l];
  }
}

// Room for the lanes of a chunk.
constexpr int64_t kLanesOfChunk = kChunk + kMaxTiny * kLanes;

// New second moments of the rows or columns of matrices from their sums of g²; each is over `reduced` elements.
template <class M>
void new_tiny(const Tensor& t, const Rule& r, Stream stream, void* var, int64_t matrix, int64_t lanes, int64_t count,
              int64_t reduced, M* sums, bool stores) {
  M flat[kLanesOfChunk], old[kLanesOfChunk];
  const int64_t first = matrix * count, n = lanes * count, all = stride_of(lanes) * count;
  if (t.moment_dtype == DtypeOf<M>::value) {
    const int64_t there = t.numel / (t.matrix_rows * t.matrix_cols) * count - first;
    to_lanes(static_cast<const M*>(var) + first, count, lanes, there, old);
  } else {
    convert_from(flat, var, t.moment_dtype, first, 1, n);
    to_lanes(flat, count, lanes, kLanesOfChunk, old);
  }
  const M beta2 = M(r.beta2), rest = M(1.0 - r.beta2), by = r.sums ? M(1) : M(1) / M(reduced);
  const M added = r.eps1_rule == kEps1Add ? M(reduced) * M(r.eps1) : M(0);
  for (int64_t i = 0; i < all; ++i) sums[i] = new_moment(old[i], (sums[i] + added) * by, beta2, rest);
  const bool rounds = t.moment_dtype != DtypeOf<M>::value;
  if (!rounds && !stores) return;
  from_lanes(sums, count, lanes, flat);
  if (rounds) {  // in the order of the state, as random bits come
    round_moments(t, r, stream, first, n, flat);
    to_lanes(flat, count, lanes, kLanesOfChunk, sums);
  }
  if (stores) convert_to(flat, var, t.moment_dtype, first, 1, n);
}

// What the gradients of some tiny matrices say of them.
template <class M>
struct Tiny {
  int64_t lanes, stride;
  M element[kLanesOfChunk];                                // g
  M row[kLanesOfChunk], col[kLanesOfChunk], norm[kChunk];  // new second moments, v = row col / norm

  // Of n elements from element k on; where `stores`, the new second moments are written.
  Tiny(const Tensor& t, const Rule& r, const M* grad, int64_t k, int64_t n, bool stores) {
    const int64_t rows = t.matrix_rows, cols = t.matrix_cols, size = rows * cols, matrix = k / size;
    lanes = n / size;
    stride = stride_of(lanes);
    to_lanes(grad, size, lanes, t.numel - k, element);
    for (int64_t i = 0; i < rows; ++i) add_squares(element + i * cols * stride, cols, stride, row + i * stride);
    for (int64_t j = 0; j < cols; ++j) add_squares(element + j * stride, rows, cols * stride, col + j * stride);
    new_tiny(t, r, kRowVarStream, t.line_var, matrix, lanes, rows, cols, row, stores);
    new_tiny(t, r, kColVarStream, t.cross_var, matrix, lanes, cols, rows, col, stores);
    const M by = r.sums ? M(1) : M(1) / M(rows), smallest = r.eps1_rule == kEps1Clamp ? M(r.eps1) : M(0);
    for (int64_t l = 0; l < stride; l += lanes_of<M>) {
      Vector<M> sum{};
      for (int64_t i = 0; i < rows; ++i) sum += load(row + i * stride + l);
      sum *= by;
      store(norm + l, sum < smallest ? Vector<M>{} + smallest : sum);  // so written that NaN stays
    }
  }

 private:
  // sum[l] = Σ g² of every `apart`-th number, for all lanes.
  void add_squares(const M* g, int64_t count, int64_t apart, M* sum) const {
    for (int64_t l = 0; l < stride; l += lanes_of<M>) {
      Vector<M> total{};
      for (int64_t e = 0; e < count; ++e) {
        const Vector<M> x = load(g + e * apart + l);
        total = fused(x, x, total);
      }
      store(sum + l, total);
    }
  }
};

// 1 / sqrt(v) of whole matrices, n elements from element k on; where `stores`, their new second moments are written.
template <class M>
void tiny_roots(const Tensor& t, const Rule& r, const M* grad, int64_t k, int64_t n, M* root, bool stores) {
  const int64_t rows = t.matrix_rows, cols = t.matrix_cols;
  Tiny<M> tiny(t, r, grad, k, n, stores);
  const int64_t stride = tiny.stride;
  for (int64_t l = 0; l < stride; l += lanes_of<M>) {
    const Vector<M> by_norm = inverse(load(tiny.norm + l));
    Vector<M> of_col[kMaxTiny];
    for (int64_t j = 0; j < cols; ++j) of_col[j] = inverse_root(load(tiny.col + j * stride + l));
    for (int64_t i = 0; i < rows; ++i) {
      const Vector<M> of_row = inverse_root(load(tiny.row + i * stride + l) * by_norm);
      for (int64_t j = 0; j < cols; ++j) store(tiny.element + (i * cols + j) * stride + l, of_row * of_col[j]);
    }
  }
  from_lanes(tiny.element, rows * cols, tiny.lanes, root);
}

template <class M>
Vector<M> of_first_lanes(Vector<M> x, int64_t count) {
  for (int64_t i = count; i < lanes_of<M>; ++i) x[i] = M(0);
  return x;
}

// Σ u² of whole matrices where the numerator is the gradient: Σ g² / v, at most g² / eps1² each.
template <class M>
double tiny_update_sq(const Tensor& t, const Rule& r, const M* grad, int64_t k, int64_t n, M most_root) {
  const int64_t rows = t.matrix_rows, cols = t.matrix_cols;
  const Tiny<M> tiny(t, r, grad, k, n, false);
  Vector<M> total{};
  for (int64_t l = 0; l < tiny.lanes; l += lanes_of<M>) {
    const Vector<M> by_norm = inverse(load(tiny.norm + l));
    Vector<M> of_col[kMaxTiny];
    for (int64_t j = 0; j < cols; ++j) of_col[j] = inverse_root(load(tiny.col + j * tiny.stride + l));
    for (int64_t i = 0; i < rows; ++i) {
      const Vector<M> of_row = inverse_root(load(tiny.row + i * tiny.stride + l) * by_norm);
      for (int64_t j = 0; j < cols; ++j) {
        // Roots before they meet: their squares leave all range long before u does.
        const Vector<M> g = load(tiny.element + (i * cols + j) * tiny.stride + l), root = of_row * of_col[j];
        const Vector<M> u = g * (root > most_root ? Vector<M>{} + most_root : root);
        total += of_first_lanes<M>(u * u, tiny.lanes - l);  // those beyond the last have no root
      }
    }
  }
  return double(sum_of(total));
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_TINY_H
