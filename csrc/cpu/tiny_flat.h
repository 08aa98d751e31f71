// Matrices of a tiny size that is known when this is compiled, as many at a time as a vector has lanes, in the order in
// which they lie in memory: what a step reads and writes of them stays in registers. Part of kernels.cpp.
//
// In that order the new second moments of rows and columns are in the order of the state too. Only sums along a row or
// a column, and what is handed back to its elements, have to be picked from several vectors. The bits of an element are
// those that the loops of tiny.h give it.

#ifndef FUSED_ADAFACTOR_CPU_TINY_FLAT_H
#define FUSED_ADAFACTOR_CPU_TINY_FLAT_H

#include "lines.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

// The numbers of lanes.
template <int... kLane>
struct Numbers {};

template <int kCount, int... kLane>
struct NumbersBelow : NumbersBelow<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct NumbersBelow<0, kLane...> {
  using type = Numbers<kLane...>;
};

// Number q of a result is number From::at(q) of the vectors. Where the numbers of one vector of the result lie.
template <class From, int kVector>
struct Origin {
  static constexpr int kAll = int(kLanes);
  static constexpr int at(int lane) { return From::at(kVector * kAll + lane); }
  static constexpr int first_vector() {
    int first = at(0) / kAll;
    for (int lane = 1; lane < kAll; ++lane) first = at(lane) / kAll < first ? at(lane) / kAll : first;
    return first;
  }
  static constexpr int last_vector() {
    int last = 0;
    for (int lane = 0; lane < kAll; ++lane) last = at(lane) / kAll > last ? at(lane) / kAll : last;
    return last;
  }
  // Counted from the first of the vectors that have some.
  static constexpr int place(int lane) { return at(lane) - first_vector() * kAll; }
};

// By pairs of vectors: what lies in the first kPairs of them.
template <class From, int kVector, int kPairs, int... kLane>
FA_INLINE Floats picked(const Floats* vectors, Numbers<kLane...> lanes) {
  using Here = Origin<From, kVector>;
  constexpr int kAll = Here::kAll, kLast = Here::last_vector();
  constexpr int kEven = Here::first_vector() + 2 * (kPairs - 1), kOdd = kEven < kLast ? kEven + 1 : kLast;
  const Floats pair = FA_SHUFFLE(vectors[kEven], vectors[kOdd], (Here::place(kLane) % (2 * kAll))...);
  if constexpr (kPairs == 1) {
    return pair;
  } else {
    const Floats others = picked<From, kVector, kPairs - 1>(vectors, lanes);
    return FA_SHUFFLE(others, pair, (kLane + (Here::place(kLane) / (2 * kAll) < kPairs - 1 ? 0 : kAll))...);
  }
}

template <class From, int kVector>
FA_INLINE Floats pick(const Floats* vectors) {
  using Here = Origin<From, kVector>;
  constexpr int kPairs = (Here::last_vector() - Here::first_vector()) / 2 + 1;
  return picked<From, kVector, kPairs>(vectors, typename NumbersBelow<int(kLanes)>::type{});
}

// Calls f with each number below kCount, which it knows when it is compiled.
template <int kCount, class F>
FA_INLINE void for_each_known(F f) {
  if constexpr (kCount > 0) {
    for_each_known<kCount - 1>(f);
    f(Known<kCount - 1>{});
  }
}

// The numbers that these loops need of a rule.
struct FlatRule {
  float scale, beta2, rest, most;
  float added_to_row, row_by, added_to_col, col_by;  // a sum s becomes (s + added) by
  float norm_by, least_norm;

  FlatRule(const Tensor& t, const Rule& r) {
    const int64_t rows = t.matrix_rows, cols = t.matrix_cols;
    const float eps1 = r.eps1_rule == kEps1Add ? float(r.eps1) : 0.0f;
    scale = grad_rule(t, r).scale;
    beta2 = float(r.beta2);
    rest = float(1.0 - r.beta2);
    most = most_root<float>(r);
    added_to_row = float(cols) * eps1;
    added_to_col = float(rows) * eps1;
    row_by = r.sums ? 1.0f : 1.0f / float(cols);
    col_by = r.sums ? 1.0f : 1.0f / float(rows);
    norm_by = col_by;
    least_norm = r.eps1_rule == kEps1Clamp ? float(r.eps1) : 0.0f;
  }

  FA_INLINE Floats moment(Floats old, Floats sum, float added, float by) const {
    return fused(Floats{} + rest, (sum + added) * by, old * beta2);  // new_moment of formulas.h
  }
};

// kLanes matrices.
template <int kRows, int kCols>
struct FlatMatrices {
  static constexpr int kSize = kRows * kCols;
  static constexpr int64_t kElements = kSize * kLanes, kOfRows = kRows * kLanes, kOfCols = kCols * kLanes;

  // Number q of the rows is the sum of these elements; number q of the columns of those.
  template <int kPlace>
  struct InRow {
    static constexpr int at(int q) { return kCols * q + kPlace; }
  };
  template <int kPlace>
  struct InCol {
    static constexpr int at(int q) { return q / kCols * kSize + kPlace * kCols + q % kCols; }
  };
  // A row of the matrix that row q is one of.
  template <int kPlace>
  struct RowOfMatrix {
    static constexpr int at(int q) { return q / kRows * kRows + kPlace; }
  };
  // Row and column of element q.
  struct RowOf {
    static constexpr int at(int q) { return q / kCols; }
  };
  struct ColOf {
    static constexpr int at(int q) { return q / kSize * kCols + q % kCols; }
  };

  Floats grad[kSize];
  Floats row[kRows], col[kCols];            // new second moments
  Floats row_root[kRows], col_root[kCols];  // 1 / sqrt(v) is the product of two of them

  template <class G>
  FA_INLINE FlatMatrices(const G* from, const float* row_var, const float* col_var, const FlatRule& r) {
    for_each_known<kSize>([&](auto i) {
      ask_for(from + i.value * kLanes, kAheadOfLine);
      grad[i.value] = load(from + i.value * kLanes) * r.scale;
    });
    for_each_known<kRows>([&](auto i) {
      Floats sum{};
      for_each_known<kCols>([&](auto j) { add_square(sum, pick<InRow<j.value>, i.value>(grad)); });
      ask_for(row_var + i.value * kLanes, kAheadOfLine);
      row[i.value] = r.moment(load(row_var + i.value * kLanes), sum, r.added_to_row, r.row_by);
    });
    for_each_known<kCols>([&](auto j) {
      Floats sum{};
      for_each_known<kRows>([&](auto i) { add_square(sum, pick<InCol<i.value>, j.value>(grad)); });
      ask_for(col_var + j.value * kLanes, kAheadOfLine);
      col[j.value] = r.moment(load(col_var + j.value * kLanes), sum, r.added_to_col, r.col_by);
      col_root[j.value] = inverse_root(col[j.value]);
    });
    for_each_known<kRows>([&](auto i) {
      Floats norm{};
      for_each_known<kRows>([&](auto other) { norm += pick<RowOfMatrix<other.value>, i.value>(row); });
      norm *= r.norm_by;
      norm = norm < r.least_norm ? Floats{} + r.least_norm : norm;  // so written that NaN stays
      row_root[i.value] = inverse_root(row[i.value] * inverse(norm));
    });
  }

  static FA_INLINE void add_square(Floats& sum, Floats x) { sum = fused(x, x, sum); }

  // u of one vector of elements, before it is clipped.
  template <int kVector>
  FA_INLINE Floats update(const FlatRule& r) const {
    return grad[kVector] * least(pick<RowOf, kVector>(row_root) * pick<ColOf, kVector>(col_root), r.most);
  }
};

// Adds Σ g², Σ p² if that is wanted, and Σ u².
template <class Matrices, bool kWithParam, class P, class G>
void sum_flat(const P* param, const G* grad, const float* row_var, const float* col_var, const FlatRule& r, int64_t n,
              double* sums) {
  for (int64_t k = 0, rows = 0, cols = 0; k < n; k += Matrices::kElements) {
    const Matrices m(grad + k, row_var + rows, col_var + cols, r);
    Floats grad_sq{}, param_sq{}, update_sq{};
    for_each_known<Matrices::kSize>([&](auto i) {
      const Floats g = m.grad[i.value], u = m.template update<i.value>(r);
      grad_sq += g * g;
      update_sq += u * u;
      if (!kWithParam) return;
      ask_for(param + k + i.value * kLanes, kAheadOfLine);
      const Floats p = load(param + k + i.value * kLanes);
      param_sq += p * p;
    });
    sums[0] += double(sum_of(grad_sq));
    sums[1] += double(sum_of(param_sq));
    sums[2] += double(sum_of(update_sq));
    rows += Matrices::kOfRows;
    cols += Matrices::kOfCols;
  }
}

// p = decay p - step u, and the new second moments.
template <class Matrices, class P, class G>
void apply_flat(P* param, const G* grad, float* row_var, float* col_var, const FlatRule& r, float decay, float step,
                int64_t n) {
  for (int64_t k = 0; k < n; k += Matrices::kElements) {
    const Matrices m(grad + k, row_var, col_var, r);
    for_each_known<Matrices::kSize>([&](auto i) {
      P* at = param + k + i.value * kLanes;
      ask_for(at, kAheadOfLine);
      store(at, fused(load(at), Floats{} + decay, -(m.template update<i.value>(r) * step)));
    });
    for (size_t i = 0; i < sizeof m.row / sizeof m.row[0]; ++i) store(row_var + i * kLanes, m.row[i]);
    for (size_t j = 0; j < sizeof m.col / sizeof m.col[0]; ++j) store(col_var + j * kLanes, m.col[j]);
    row_var += Matrices::kOfRows;
    col_var += Matrices::kOfCols;
  }
}

using ThreeByThree = FlatMatrices<3, 3>;

// Whether a tensor is made of those, and its sums are taken over the gradient alone.
inline bool lies_flat(const Tensor& t, const Rule& r) {
  return t.form == kTiny && t.matrix_rows == 3 && t.matrix_cols == 3 && lies_plainly(t) &&
         extras_of(t, r) == kNoExtras && t.moment_dtype == kFloat32 && !r.amsgrad;
}

// Of the elements of some lines, those that are taken here.
inline Lines flat_elements(const Tensor& t, Lines lines) {
  const Lines elements = elements_of(t, lines);
  const int64_t n = elements.end - elements.begin;
  return {elements.begin, elements.begin + n / ThreeByThree::kElements * ThreeByThree::kElements};
}

// Calls f(line, column, n), as for_each_chunk does, for the few matrices that are not.
template <class F>
void for_what_is_left(const Tensor& t, Lines lines, F f) {
  const int64_t begin = flat_elements(t, lines).end, n = elements_of(t, lines).end - begin;
  static_assert(ThreeByThree::kElements <= kChunk, "they are one chunk");
  if (n > 0) f(int64_t(0), begin, n);
}

// Second moments of the matrix that an element begins.
inline float* flat_var(void* var, int64_t element) { return static_cast<float*>(var) + element / 3; }

inline void sum_flat_elements(const Tensor& t, const Rule& r, Lines elements, double* sums) {
  const int64_t begin = elements.begin, n = elements.end - begin;
  const float *row_var = flat_var(t.line_var, begin), *col_var = flat_var(t.cross_var, begin);
  const FlatRule rule(t, r);
  if (t.measures_param_rms) {
    by_dtypes(t, [&](auto* p, auto* g) {
      sum_flat<ThreeByThree, true>(p + begin, g + begin, row_var, col_var, rule, n, sums);
    });
  } else {
    without_param(t, [&](auto* p, auto* g) {
      sum_flat<ThreeByThree, false>(p, g + begin, row_var, col_var, rule, n, sums);
    });
  }
}

inline void apply_flat_elements(const Tensor& t, const Rule& r, Lines elements, float decay, float step) {
  const int64_t begin = elements.begin, n = elements.end - begin;
  float *row_var = flat_var(t.line_var, begin), *col_var = flat_var(t.cross_var, begin);
  const FlatRule rule(t, r);
  by_dtypes(t, [&](auto* p, auto* g) {
    apply_flat<ThreeByThree>(p + begin, g + begin, row_var, col_var, rule, decay, step, n);
  });
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_TINY_FLAT_H
