// Sums of a tensor that other processes have other parts of: what this process says, and what it is told. Part of
// kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_SHARED_H
#define FUSED_ADAFACTOR_CPU_SHARED_H

#include "matrix.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

template <class M>
void put(void* to, double value) {
  if (to != nullptr) *static_cast<M*>(to) = M(value);
}

// `count` numbers of matrix number `number`, where these are summed up.
template <class M>
void put_all(void* to, int64_t number, const M* from, int64_t count) {
  if (to != nullptr) memcpy(static_cast<M*>(to) + number * count, from, count * sizeof(M));
}

template <class M>
void take_all(const void* from, int64_t number, M* to, int64_t count) {
  if (from != nullptr) memcpy(to, static_cast<const M*>(from) + number * count, count * sizeof(M));
}

// Of a part without elements. It has second moments all the same, where these are those of other processes' elements.
template <class M>
void zero_sums(const Tensor& t, const Sums<M>& sums, int64_t slab) {
  if (t.form != kFactored) return;
  const Matrix<M> m = sums.matrix(t, matrix_of(t, slab));
  zero(m.line, t.rows);
  zero(m.cross, t.cols);
  zero(m.factor, t.cols);
}

// The rows of a matrix that are here, from number `first` of `from` on, and zeros for those of other processes.
template <class M>
void put_among_all(const Tensor& t, const void* from, int32_t dtype, int64_t first, M* to) {
  zero(to, t.whole.rows);
  convert_from(to + t.whole.first_row, from, dtype, first, 1, t.rows);
}

// What is here of the sums of a matrix.
template <class M>
void share_matrix(const Tensor& t, const Rule& r, const Matrix<M>& m) {
  const PartialSums& sums = t.partial;
  *m.grad_sq = M(total_of(m.cross, t.cols));
  put_all(sums.line_sq, m.number, m.line, t.rows);
  put_all(sums.cross_sq, m.number, m.cross, t.cols);
  put_all(sums.weighted, m.number, m.factor, t.cols);
  if (sums.all_row_sq != nullptr) {
    put_among_all(t, m.line, DtypeOf<M>::value, 0, static_cast<M*>(sums.all_row_sq) + m.number * t.whole.rows);
    put_among_all(t, t.line_var, t.moment_dtype, m.first, static_cast<M*>(sums.all_row_var) + m.number * t.whole.rows);
  }
  if (sums.row_var_sum == nullptr) return;
  double row_var_sum = total_of(m.line, t.rows);
  if (sums.row_sq_sum != nullptr) {
    static_cast<M*>(sums.row_sq_sum)[m.number] = M(row_var_sum);
    row_var_sum = 0;
    for (int64_t l = 0; l < t.rows; ++l) row_var_sum += load_one<double>(t.line_var, t.moment_dtype, m.first + l);
  }
  static_cast<M*>(sums.row_var_sum)[m.number] = M(row_var_sum);
}

// The sums of a matrix over all processes, to where its own were.
template <class M>
void take_matrix(const Tensor& t, const Matrix<M>& m) {
  take_all(t.partial.line_sq, m.number, m.line, t.rows);
  take_all(t.partial.cross_sq, m.number, m.cross, t.cols);
  take_all(t.partial.weighted, m.number, m.factor, t.cols);
}

// Σ g², Σ p² and Σ u² over all processes, of those that have been taken.
template <class M>
void take_scalars(const Tensor& t, double* sums) {
  const void* const taken[3] = {t.partial.grad_sq, t.partial.param_sq, t.partial.update_sq};
  for (int j = 0; j < 3; ++j) {
    if (taken[j] != nullptr) sums[j] = double(*static_cast<const M*>(taken[j]));
  }
}

// What the first sweep has found out here. Matrices that are whole, each on one process, are finalized for that: what
// they have of Σ u² follows from their own sums.
template <class M>
void share_in(Tensor& t, const Rule& r, void* scratch, ThreadBuffers& buffers) {
  const Sums<M> s(t, scratch);
  double sums[3] = {};
  for (int64_t i = 0; i < t.slabs; ++i) {
    for (int j = 0; j < 3; ++j) sums[j] += s.slab[3 * i + j];
  }
  for (int64_t number = 0; t.form == kFactored && number < t.batch; ++number) {
    Matrix<M> m = s.matrix(t, number);
    if (t.partial.update_sq != nullptr) {
      sums[2] += finalize_matrix(t, r, m);
      sums[2] += measure_lines(t, r, m, Lines{m.first, m.first + t.rows}, buffers);
    } else {
      share_matrix(t, r, m);
    }
  }
  put<M>(t.partial.grad_sq, sums[0]);
  put<M>(t.partial.param_sq, sums[1]);
  put<M>(t.partial.update_sq, sums[2]);
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_SHARED_H
