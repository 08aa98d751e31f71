// What the sums of a matrix say: its factors, how far the clamp reaches, and Σ u². Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_MATRIX_H
#define FUSED_ADAFACTOR_CPU_MATRIX_H

#include <float.h>

#include "lines.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

// The smallest and the largest of those numbers that are above 0.
template <class M>
struct Range {
  M smallest = M(INFINITY), largest = M(0);

  Range(const M* x, int64_t n) {
    Vector<M> low = Vector<M>{} + smallest, high{};
    int64_t i = 0;
    for (; i + lanes_of<M> <= n; i += lanes_of<M>) {
      const Vector<M> here = load(x + i);
      low = (here > M(0)) & (here < low) ? here : low;
      high = here > high ? here : high;
    }
    for (int64_t l = 0; l < lanes_of<M>; ++l) add(low[l]), add(high[l]);
    for (; i < n; ++i) add(x[i]);
  }

 private:
  void add(M value) {
    if (value > M(0) && value < smallest) smallest = value;
    if (value > largest) largest = value;
  }
};

// How far the clamp reaches, from the smallest and the largest second moments. A line of zeros is never clamped.
// Every line is measured, as if it were clamped, where the identity cannot be trusted.
template <class M>
Clamp clamp_of(const Tensor& t, const Rule& r, Matrix<M>& m) {
  const Range<M> line(m.line, t.rows), cross(m.cross, t.cols);
  const M most = most_root<M>(r), norm = *m.norm;
  if (!is_finite(norm)) return Clamp::kEveryLine;  // no bounds hold, and NaN must reach RMS(u)
  const M smallest_line = M(1) / std::sqrt(line.largest / norm), largest_line = M(1) / std::sqrt(line.smallest / norm);
  const M smallest_factor = M(1) / std::sqrt(cross.largest), largest_factor = M(1) / std::sqrt(cross.smallest);
  *m.largest = largest_factor;
  if (r.eps1_rule != kEps1Clamp) {
    // Where a root is so large, g² can be lost below all range while u² is above 1e-4 of what is usual.
    const M lossless = std::sqrt(M(1e-4) / M(sizeof(M) == sizeof(float) ? FLT_MIN : DBL_MIN));
    return largest_line * largest_factor > lossless ? Clamp::kEveryLine : Clamp::kNowhere;
  }
  if (!is_finite(largest_line)) return Clamp::kEveryLine;  // what the identity has counted for it cannot be told
  if (largest_line * largest_factor <= most) return Clamp::kNowhere;
  if (smallest_line * smallest_factor >= most) return Clamp::kEverywhere;
  return smallest_line * largest_factor > most ? Clamp::kEveryLine : Clamp::kSomeLines;
}

// Whether lines are kept as sums of g² until kFinalize: clipping is not known yet, or not all of their elements are here.
inline bool lines_are_raw(const Tensor& t, const Rule& r) { return r.norm_clipped || t.partial.line_sq != nullptr; }

inline bool rows_are_split(const Tensor& t) {
  return t.partial.row_var_sum != nullptr || t.partial.all_row_sq != nullptr;
}

// Σ row_var of a matrix, of rows that are rounded here as they are where they are kept.
template <class M>
double sum_of_all_rows(const Tensor& t, const Rule& r, int64_t number) {
  Tensor all = t;
  all.rows = t.whole.rows;
  all.whole.first_row = 0;
  const int64_t first = number * all.rows;
  M* const rows = static_cast<M*>(t.partial.all_row_sq) + first;  // its own: nothing else follows from these sums
  const M square = M(t.grad_factor) * M(t.grad_factor);
  for (int64_t l = 0; l < all.rows; ++l) rows[l] *= square;
  new_moments(all, r, stream_of_lines(t), t.partial.all_row_var, DtypeOf<M>::value, first, all.rows, t.whole.cols, rows);
  return total_of(rows, all.rows);
}

// Σ row_var of a matrix whose rows are on several processes: it was summed up, follows from two sums, in which it is
// linear, or from all rows.
template <class M>
double sum_of_split_rows(const Tensor& t, const Rule& r, int64_t number) {
  if (t.partial.all_row_sq != nullptr) return sum_of_all_rows<M>(t, r, number);
  const double sum = static_cast<const M*>(t.partial.row_var_sum)[number];
  if (t.partial.row_sq_sum == nullptr) return sum;
  double grad_sq = static_cast<const M*>(t.partial.row_sq_sum)[number] * t.grad_factor * t.grad_factor;
  if (r.eps1_rule == kEps1Add) grad_sq += double(t.whole.rows) * double(t.whole.cols) * r.eps1;
  return r.beta2 * sum + (1.0 - r.beta2) * (r.sums ? grad_sq : grad_sq / double(t.whole.cols));
}

// The factors of a matrix, from its line and cross sums; returns what these say of its Σ u². The rest of it, see
// is_measured, takes another look at the gradient.
template <class M>
double finalize_matrix(const Tensor& t, const Rule& r, Matrix<M>& m) {
  const int64_t first = m.number * t.cols;
  const M square = M(t.grad_factor) * M(t.grad_factor);
  const bool raw = lines_are_raw(t, r) && t.form == kFactored;
  if (raw) {
    for (int64_t l = 0; l < t.rows; ++l) m.line[l] *= square;
    for (int64_t j = 0; j < t.cols; ++j) m.cross[j] *= square;
    new_moments(t, r, stream_of_lines(t), t.line_var, t.moment_dtype, m.first, t.rows, t.whole.cols, m.line);
  }
  const double grad_sq = t.partial.cross_sq != nullptr ? double(*m.grad_sq) : total_of(m.cross, t.cols);
  new_moments(t, r, stream_across(t), t.cross_var, t.moment_dtype, first, t.cols, t.whole.rows, m.cross);
  const M* row = t.swapped ? m.cross : m.line;
  const int64_t rows = t.swapped ? t.cols : t.rows;
  const double total =
      rows_are_split(t) ? sum_of_split_rows<M>(t, r, m.number) : total_of(row, rows);
  M norm = M(r.sums ? total : total / double(t.swapped ? t.whole.cols : t.whole.rows));
  if (r.eps1_rule == kEps1Clamp && norm < M(r.eps1)) norm = M(r.eps1);
  *m.norm = norm;
  for (int64_t j = 0; j < t.cols; ++j) m.factor[j] = m.cross[j] > M(0) ? m.factor[j] / m.cross[j] : M(0);
  const double share = total_of(m.factor, t.cols);
  memcpy(m.factor, m.cross, t.cols * sizeof(M));
  inverse_roots(m.factor, t.cols);
  const double known = share * double(norm);
  if (t.partial.weighted != nullptr) {  // of all rows, so no other Σ u² can be put beside it
    *m.clamp = Clamp::kNowhere;
    return known;
  }
  *m.clamp = clamp_of(t, r, m);
  if (r.amsgrad || raw) {
    *m.clamp = Clamp::kEveryLine;  // the identity does not hold, or was taken before its time
  } else if (*m.clamp == Clamp::kEverywhere && r.momentum == kMomentumGrad) {
    *m.clamp = Clamp::kEveryLine;  // Σ num² is not known
  }
  if (*m.clamp == Clamp::kNowhere && !is_finite(known)) *m.clamp = Clamp::kEveryLine;
  if (*m.clamp == Clamp::kSomeLines) {
    // What has been counted without the clamp is taken off again. Its rounding stays: it must be small beside d².
    const double d = r.clip_threshold, trusted = 16.0 * double(t.rows) * double(t.cols) * d * d;
    if (!(known <= trusted)) *m.clamp = Clamp::kEveryLine;
  }
  const double most = double(most_root<M>(r));
  switch (*m.clamp) {
    case Clamp::kEveryLine:
      return 0;
    case Clamp::kEverywhere:
      return grad_sq * most * most;
    default:
      return known;
  }
}

// Whether Σ u² of a line has to be measured.
template <class M>
bool is_measured(const Rule& r, const Matrix<M>& m, int64_t line) {
  if (*m.clamp == Clamp::kEveryLine) return true;
  return *m.clamp == Clamp::kSomeLines && m.line[line - m.first] > M(0) &&
         m.line_factor(line) * *m.largest > most_root<M>(r);
}

// Of L lines, which reads_plainly.
template <int L, class P, class G>
double measure_plain_block(const Tensor& t, const Rule& r, const Matrix<float>& m, P* param, const G* grad,
                           const int64_t* numbers, bool corrects, float* buffer) {
  Line<P, G> lines[L];
  float of_line[L];
  for (int l = 0; l < L; ++l) {
    lines[l] = line_of(t, r, param, grad, numbers[l], buffer + l * t.cols);
    of_line[l] = m.line_factor(numbers[l]);
    ask_for_head(lines[l].grad);
  }
  const float most = most_root<float>(r);
  return by_extras(extras_of(t, r), [&](auto extras) {
    const auto f = corrects ? square_updates<L, extras.value, true, P, G>
                            : square_updates<L, extras.value, false, P, G>;
    return f(lines, of_line, m.factor, most, grad_rule(t, r), moment_rule(r), t.cols);
  });
}

inline double measure_plain_lines(const Tensor& t, const Rule& r, const Matrix<float>& m, Lines lines, bool corrects,
                                  float* buffer) {
  const bool in_blocks = block_lines(t) == kBlockLines;
  double sum = 0;
  without_param(t, [&](auto* param, auto* grad) {
    int64_t numbers[kBlockLines];
    int count = 0;
    for (int64_t number = lines.begin; number < lines.end; ++number) {
      if (!is_measured(r, m, number)) continue;
      numbers[count++] = number;
      if (in_blocks && count < kBlockLines) continue;
      sum += in_blocks ? measure_plain_block<kBlockLines>(t, r, m, param, grad, numbers, corrects, buffer)
                       : measure_plain_block<1>(t, r, m, param, grad, numbers, corrects, buffer);
      count = 0;
    }
    for (int i = 0; i < count; ++i) sum += measure_plain_block<1>(t, r, m, param, grad, numbers + i, corrects, buffer);
  });
  return sum;
}

// Σ u² of those lines that have to be measured, less what the identity has counted for them.
template <class M>
double measure_lines(const Tensor& t, const Rule& r, const Matrix<M>& m, Lines lines, ThreadBuffers& buffers) {
  if (!t.measures || *m.clamp == Clamp::kNowhere || *m.clamp == Clamp::kEverywhere) return 0;
  const bool corrects = *m.clamp == Clamp::kSomeLines;
  double sum = 0;
  if constexpr (sizeof(M) == sizeof(float)) {
    if (reads_plainly(t, r) && !r.amsgrad) {
      return measure_plain_lines(t, r, m, lines, corrects, static_cast<float*>(buffers.lines));
    }
  }
  Chunk<M> c(buffers);
  for_each_chunk(t, lines, [&](int64_t line, int64_t column, int64_t n) {
    const Update<M> u = update_of(t, r, &m, line, column, n, c, false);
    if (!corrects) {
      sum += double(sum_of_squares(u.value, n));
      return;
    }
    const int64_t length = least(n, t.cols);
    M* without_clamp = c.buffer[8];
    factored_roots(t, m, line, column, n, without_clamp);
    for (int64_t i = 0; i < n; i += length, ++line) {
      if (!is_measured(r, m, line)) continue;
      sum += double(sum_of_squares(u.value + i, length));
      for (int64_t j = i; j < i + length; ++j) {
        // The identity has left out all-zero columns.
        without_clamp[j] = is_finite(without_clamp[j]) ? u.num[j] * without_clamp[j] : M(0);
      }
      sum -= double(sum_of_squares(without_clamp + i, length));
    }
  });
  return sum;
}

// Sums and factors of a small matrix, from its gradient; returns its Σ u² where that is wanted and not too early.
template <class M>
double small_matrix(const Tensor& t, const Rule& r, Matrix<M>& m, LineSums<M>& s, ThreadBuffers& buffers,
                    bool measures) {
  const Lines lines{m.first, m.first + t.rows};
  s.line = m.line;
  s.across = m.cross;
  s.weighted = m.factor;
  add_lines_of(t, r, lines, s, buffers);
  if (s.raw) return 0;
  const double known = finalize_matrix(t, r, m);
  return measures ? known + measure_lines(t, r, m, lines, buffers) : 0;
}

// Calls f(matrix, its Σ u²) for every small matrix of a slab; adds to the sums.
template <class M, class F>
void for_each_small(const Tensor& t, const Rule& r, Lines lines, LineSums<M>& s, ThreadBuffers& buffers, bool measures,
                    F f) {
  for (int64_t first = lines.begin; first < lines.end; first += t.rows) {
    Matrix<M> m(t, first / t.rows, static_cast<char*>(buffers.matrix));
    const double update_sq = small_matrix(t, r, m, s, buffers, measures);
    f(m, update_sq);
  }
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_MATRIX_H
