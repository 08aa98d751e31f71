// Slabs, and the sums of a tensor: where they lie in the scratch and how they are taken. Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_SUMS_H
#define FUSED_ADAFACTOR_CPU_SUMS_H

#include "memory.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

struct Lines {
  int64_t begin, end;  // line numbers, over all matrices
};

// Elements of a line; the last one of an unfactored tensor may be shorter than the others.
inline int64_t line_length(const Tensor& t, int64_t line) { return least(t.cols, t.numel - line * t.cols); }

inline int64_t slabs_per_matrix(const Tensor& t) {
  return t.lines_per_slab >= t.rows ? 1 : (t.rows + t.lines_per_slab - 1) / t.lines_per_slab;
}

// A slab is a range of lines of one matrix, or several whole matrices.
inline Lines lines_of(const Tensor& t, int64_t slab) {
  const int64_t all = t.batch * t.rows;
  if (t.lines_per_slab >= t.rows) {
    const int64_t begin = slab * t.lines_per_slab;
    return {begin, least(all, begin + t.lines_per_slab)};
  }
  const int64_t per_matrix = slabs_per_matrix(t);
  const int64_t first = slab / per_matrix * t.rows;
  const int64_t begin = first + slab % per_matrix * t.lines_per_slab;
  return {begin, least(first + t.rows, begin + t.lines_per_slab)};
}

// The sums of a tensor in the scratch. Python reserves the same bytes: see _scratch_bytes in backends/cpp.py.
template <class M>
struct Sums {
  double* slab;   // [slabs, 3]  Σ g², Σ p², Σ u²
  M* line;        // [batch, rows]  new second moments of the lines
  M* cross;       // [batch, cols]  those across
  M* factor;      // [batch, cols]  1 / sqrt(cross)
  M* norm;        // [batch]
  M* largest;     // [batch]  largest factor of a matrix
  M* partial;     // [slabs, 2, cols]  Σ g² and Σ num² / line of a slab; only where a matrix has several slabs

  Sums(const Tensor& t, void* scratch) {
    char* at = static_cast<char*>(scratch) + t.scratch;
    slab = reinterpret_cast<double*>(at);
    line = reinterpret_cast<M*>(slab + 3 * t.slabs);
    cross = line + t.batch * t.rows;
    factor = cross + t.batch * t.cols;
    norm = factor + t.batch * t.cols;
    largest = norm + t.batch;
    partial = largest + t.batch;
  }
};

inline bool is_factored(const Tensor& t) { return t.factored != 0; }

// 1 / sqrt(line / norm): what is the line's in 1 / sqrt(v).
template <class M>
M line_factor(const Tensor& t, const Sums<M>& s, int64_t line) {
  return M(1) / std::sqrt(s.line[line] / s.norm[line / t.rows]);
}

// The largest of an array.
template <class M>
M largest_of(const M* x, int64_t n) {
  M largest = x[0];
  for (int64_t i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_SUMS_H
