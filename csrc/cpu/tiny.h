// Matrices of a few elements, as those of a 3x3 convolution: one matrix in each lane. Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_TINY_H
#define FUSED_ADAFACTOR_CPU_TINY_H

#include "memory.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

constexpr int64_t kGroup = 16;  // matrices side by side

// to[e][l] = from[l][e], of `lanes` rows with `count` elements; 0 in the other lanes.
template <class M>
void to_lanes(const M* __restrict from, int64_t count, int64_t lanes, M* __restrict to) {
  if (lanes < kGroup) zero(to, count * kGroup);
  for (int64_t l = 0; l < lanes; ++l) {
    for (int64_t e = 0; e < count; ++e) to[e * kGroup + l] = from[l * count + e];
  }
}

template <class M>
void from_lanes(const M* __restrict from, int64_t count, int64_t lanes, M* __restrict to) {
  for (int64_t l = 0; l < lanes; ++l) {
    for (int64_t e = 0; e < count; ++e) to[l * count + e] = from[e * kGroup + l];
  }
}

// New second moments of the rows or columns of a group, [count][kGroup], from their sums of g².
template <class M>
void new_tiny(const Tensor& t, const Rule& r, void* var, int64_t matrix, int64_t lanes, int64_t count, int64_t reduced,
              M* sums, bool stores) {
  M flat[kMaxTiny * kGroup], old[kMaxTiny * kGroup];
  convert_from(flat, var, t.moment_dtype, matrix * count, 1, lanes * count);
  to_lanes(flat, count, lanes, old);
  const M beta2 = M(r.beta2), rest = M(1) - M(r.beta2);
  const M added = r.eps1_rule == kEps1Add ? M(reduced) * M(r.eps1) : M(0), by = r.sums ? M(1) : M(reduced);
  for (int64_t i = 0; i < count * kGroup; ++i) sums[i] = beta2 * old[i] + rest * ((sums[i] + added) / by);
  if (t.moment_dtype != DtypeOf<M>::value) {
    for (int64_t i = 0; i < count * kGroup; ++i) sums[i] = stored(sums[i], t.moment_dtype);
  }
  if (!stores) return;
  from_lanes(sums, count, lanes, flat);
  convert_to(flat, var, t.moment_dtype, matrix * count, 1, lanes * count);
}

// 1 / sqrt(v) of whole matrices, n elements from element k on; where `stores`, their new second moments are written.
template <class M>
void tiny_roots(const Tensor& t, const Rule& r, const M* grad, int64_t k, int64_t n, M* root, bool stores) {
  const int64_t rows = t.matrix_rows, cols = t.matrix_cols, size = rows * cols;
  M element[kMaxTiny * kGroup], row[kMaxTiny * kGroup], col[kMaxTiny * kGroup];
  M norm[kGroup];
  const int64_t matrices = n / size;
  for (int64_t first = 0; first < matrices; first += kGroup) {
    const int64_t lanes = least(kGroup, matrices - first);
    to_lanes(grad + first * size, size, lanes, element);
    zero(row, rows * kGroup);
    zero(col, cols * kGroup);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        for (int64_t l = 0; l < kGroup; ++l) {
          const M g = element[(i * cols + j) * kGroup + l];
          row[i * kGroup + l] += g * g;
          col[j * kGroup + l] += g * g;
        }
      }
    }
    const int64_t matrix = k / size + first;
    new_tiny(t, r, t.line_var, matrix, lanes, rows, cols, row, stores);
    new_tiny(t, r, t.cross_var, matrix, lanes, cols, rows, col, stores);
    zero(norm, kGroup);
    const M by = r.sums ? M(1) : M(rows), smallest = r.eps1_rule == kEps1Clamp ? M(r.eps1) : M(0);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t l = 0; l < kGroup; ++l) norm[l] += row[i * kGroup + l];
    }
    for (int64_t l = 0; l < kGroup; ++l) {
      norm[l] = norm[l] / by;
      norm[l] = norm[l] < smallest ? smallest : norm[l];  // so written that NaN stays
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t l = 0; l < kGroup; ++l) row[i * kGroup + l] = M(1) / std::sqrt(row[i * kGroup + l] / norm[l]);
    }
    for (int64_t j = 0; j < cols * kGroup; ++j) col[j] = M(1) / std::sqrt(col[j]);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        for (int64_t l = 0; l < kGroup; ++l) {
          element[(i * cols + j) * kGroup + l] = row[i * kGroup + l] * col[j * kGroup + l];
        }
      }
    }
    from_lanes(element, size, lanes, root + first * size);
  }
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_TINY_H
