// The sums of the first sweep, the factors, and RMS(u). Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_STATISTICS_H
#define FUSED_ADAFACTOR_CPU_STATISTICS_H

#include <float.h>

#include "plain.h"
#include "update.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

// Whether gradient and parameter can be read where they are, with nothing to do but to scale g.
inline bool reads_plainly(const Tensor& t, const Rule& r) {
  const bool plain_dtypes = (t.param_dtype == kFloat32 || t.param_dtype == kBfloat16) &&
                            (t.grad_dtype == kFloat32 || t.grad_dtype == kBfloat16);
  const bool plain_lines = t.strides[t.ndim - 1] == 1 && t.sizes[t.ndim - 1] % t.cols == 0;
  const bool one_run = t.ndim == 1 && t.strides[0] == 1 && t.state_strides[0] == 1;
  return t.math_dtype == kFloat32 && plain_dtypes && t.accumulator == nullptr && r.clip_value < 0 &&
         r.momentum != kMomentumGrad && t.form != kTiny &&
         (t.form == kUnfactored ? one_run && t.moment_dtype == kFloat32 && !r.amsgrad : plain_lines);
}

// Calls f with a pointer to the parameter's dtype and one to the gradient's, of a tensor that reads_plainly.
template <class F>
auto by_dtypes(const Tensor& t, F f) {
  float* p = static_cast<float*>(t.param);
  uint16_t* half_p = static_cast<uint16_t*>(t.param);
  const float* g = static_cast<const float*>(t.grad);
  const uint16_t* half_g = static_cast<const uint16_t*>(t.grad);
  if (t.param_dtype == kFloat32) return t.grad_dtype == kFloat32 ? f(p, g) : f(p, half_g);
  return t.grad_dtype == kFloat32 ? f(half_p, g) : f(half_p, half_g);
}

inline float scale_of_grad(const Tensor& t) { return float(t.grad_scale * t.grad_factor); }

inline VectorRule vector_rule(const Tensor& t, const Rule& r) {
  const float added = r.eps1_rule == kEps1Add ? float(r.eps1) : 0.0f;
  return {scale_of_grad(t), float(r.beta2), float(1.0 - r.beta2), added, most_root<float>(r)};
}

// Elements of a slab of a tensor that is one run.
inline Lines elements_of(const Tensor& t, Lines lines) {
  return {lines.begin * t.cols, least(lines.end * t.cols, t.numel)};
}

// Of some elements of an unfactored tensor that reads_plainly.
inline void sum_plain_vector(const Tensor& t, const Rule& r, Lines elements, double* sums) {
  by_dtypes(t, [&](auto* param, auto* grad) {
    const int64_t begin = elements.begin, n = elements.end - begin;
    const float* var = static_cast<const float*>(t.var) + begin;
    t.measures_param_rms ? sum_vector<true>(param + begin, grad + begin, var, vector_rule(t, r), n, sums)
                         : sum_vector<false>(param + begin, grad + begin, var, vector_rule(t, r), n, sums);
  });
}

// New second moments, `count` of them from number `first` on, from their sums of g² over `reduced` elements each.
template <class M>
void new_moments(const Tensor& t, const Rule& r, const void* var, int64_t first, int64_t count, int64_t reduced, M* sums) {
  const M beta2 = M(r.beta2), rest = M(1.0 - r.beta2), by = r.sums ? M(1) : M(1) / M(reduced);
  const M added = r.eps1_rule == kEps1Add ? M(reduced) * M(r.eps1) : M(0);
  for (int64_t i = 0; i < count; i += kChunk) {
    M old[kChunk];
    const int64_t n = least(kChunk, count - i);
    convert_from(old, var, t.moment_dtype, first + i, 1, n);
    for (int64_t j = 0; j < n; ++j) sums[i + j] = beta2 * old[j] + rest * ((sums[i + j] + added) * by);
    if (t.moment_dtype == DtypeOf<M>::value) continue;
    for (int64_t j = 0; j < n; ++j) sums[i + j] = stored(sums[i + j], t.moment_dtype);
  }
}

// What Σ u² is weighted with; 0 for a line that has never seen anything but zeros.
template <class M>
M inverse_of(M line) {
  return line > M(0) ? M(1) / line : M(0);
}

// Where the sums of some lines of a matrix go.
template <class M>
struct LineSums {
  M* line;             // of the first of these lines: new second moments, or Σ g² where `raw`
  M* across;           // [cols]
  M* weighted;         // [cols]
  bool raw;            // gradients are clipped by a norm that is not known yet
  bool with_param;
  double grad_sq, param_sq;
};

// The sums of g² of some lines become their second moments, unless it is too early for that; returns them inverted.
template <class M>
void set_lines(const Tensor& t, const Rule& r, const LineSums<M>& s, int64_t line, int64_t count, M* sums, M* inverse) {
  if (!s.raw) new_moments(t, r, t.line_var, line, count, t.cols, sums);
  for (int64_t l = 0; l < count; ++l) inverse[l] = inverse_of(sums[l]);
}

// Where a line begins, asking ahead in the one before it was of no use.
template <int L, class T>
void ask_for_heads(const T* const* lines) {
  for (int l = 0; l < L; ++l) {
    for (int64_t i = 0; i < kAheadOfBlock; i += 64) ask_for(lines[l], i);
  }
}

template <int L, bool WithParam, class P, class G>
void add_plain_block(const Tensor& t, const Rule& r, P* param, const G* grad, int64_t line, LineSums<float>& s,
                     float* of_line) {
  const G* g[L];
  const P* p[L];
  const G* next[L];
  float inverse[L];
  for (int l = 0; l < L; ++l) {
    const int64_t offset = offset_of(t, t.strides, (line + l) * t.cols);
    g[l] = grad + offset;
    p[l] = param + offset;
  }
  const float scale = scale_of_grad(t);
  if (WithParam) ask_for_heads<L>(p);
  square_lines<L>(g, scale, t.cols, of_line);
  for (int l = 0; l < L; ++l) s.grad_sq += double(of_line[l]);
  set_lines(t, r, s, line, L, of_line, inverse);
  for (int l = 0; l < L; ++l) next[l] = g[l] + L * t.cols;
  ask_for_heads<L>(next);
  s.param_sq += add_lines<L, WithParam>(g, p, inverse, scale, t.cols, s.across, s.weighted);
}

template <bool WithParam, class P, class G>
void add_plain_lines(const Tensor& t, const Rule& r, P* param, const G* grad, Lines lines, LineSums<float>& s) {
  const int64_t together = block_lines(t);
  int64_t line = lines.begin;
  for (; together == kBlockLines && line + kBlockLines <= lines.end; line += kBlockLines) {
    add_plain_block<kBlockLines, WithParam>(t, r, param, grad, line, s, s.line + (line - lines.begin));
  }
  for (; together >= 2 && line + 2 <= lines.end; line += 2) {
    add_plain_block<2, WithParam>(t, r, param, grad, line, s, s.line + (line - lines.begin));
  }
  for (; line < lines.end; ++line) {
    add_plain_block<1, WithParam>(t, r, param, grad, line, s, s.line + (line - lines.begin));
  }
}

// Any rule and layout: lines are converted, chunk by chunk, into a block.
template <class M>
void add_converted_lines(const Tensor& t, const Rule& r, Lines lines, LineSums<M>& s, ThreadBuffers& buffers) {
  Chunk<M> c(buffers);
  M* grad = static_cast<M*>(buffers.lines);
  M* num = grad + t.cols;
  const bool averaged = r.momentum == kMomentumGrad;
  for (int64_t line = lines.begin; line < lines.end; ++line) {
    double sum = 0;
    for (int64_t j = 0; j < t.cols; j += kChunk) {
      const int64_t k = line * t.cols + j, n = least(kChunk, t.cols - j);
      const M* g = read_grad(t, r, k, n, grad + j, c.buffer[1], &s.grad_sq);
      if (g != grad + j) memcpy(grad + j, g, n * sizeof(M));
      sum += double(sum_of_squares(g, n));
      if (averaged) numerator(t, r, g, k, n, num + j, c.buffer[2], c.buffer[5]);
      if (s.with_param) {
        s.param_sq += double(sum_of_squares(read(t, t.strides, t.param, t.param_dtype, k, n, c.buffer[3]), n));
      }
    }
    if (r.clip_value < 0) s.grad_sq += sum;
    M* of_line = s.line + (line - lines.begin);
    *of_line = M(sum);
    M inverse;
    set_lines(t, r, s, line, 1, of_line, &inverse);
    const M* x = averaged ? num : grad;
    for (int64_t j = 0; j < t.cols; ++j) {
      s.across[j] += grad[j] * grad[j];
      s.weighted[j] += x[j] * x[j] * inverse;
    }
  }
}

// Short lines, side by side.
template <class M>
void add_narrow_lines(const Tensor& t, const Rule& r, Lines lines, LineSums<M>& s, ThreadBuffers& buffers) {
  Chunk<M> c(buffers);
  const bool averaged = r.momentum == kMomentumGrad;
  const int64_t together = kChunk / t.cols / kLanes * kLanes;
  M grad[kLanesOfChunk], num[kLanesOfChunk], sum[kChunk], inverse[kChunk];
  for (int64_t line = lines.begin; line < lines.end; line += together) {
    const int64_t lanes = least(together, lines.end - line), k = line * t.cols, n = lanes * t.cols;
    const int64_t stride = stride_of(lanes);
    const M* g = read_grad(t, r, k, n, c.buffer[0], c.buffer[1], &s.grad_sq);
    if (r.clip_value < 0) s.grad_sq += double(sum_of_squares(g, n));
    to_lanes(g, t.cols, lanes, t.numel - k, grad);
    if (averaged) {
      to_lanes(numerator(t, r, g, k, n, c.buffer[1], c.buffer[2], c.buffer[5]), t.cols, lanes, n, num);
    }
    if (s.with_param) {
      s.param_sq += double(sum_of_squares(read(t, t.strides, t.param, t.param_dtype, k, n, c.buffer[3]), n));
    }
    for (int64_t l = 0; l < stride; l += lanes_of<M>) {
      Vector<M> total{};
      for (int64_t j = 0; j < t.cols; ++j) {
        const Vector<M> x = load(grad + j * stride + l);
        total += x * x;
      }
      store(sum + l, total);
    }
    set_lines(t, r, s, line, lanes, sum, inverse);
    for (int64_t l = lanes; l < stride; ++l) inverse[l] = M(0);
    memcpy(s.line + (line - lines.begin), sum, lanes * sizeof(M));
    const M* x = averaged ? num : grad;
    for (int64_t j = 0; j < t.cols; ++j) {
      Vector<M> a{}, w{};
      for (int64_t l = j * stride; l < (j + 1) * stride; l += lanes_of<M>) {
        const Vector<M> g_here = load(grad + l), x_here = load(x + l);
        a += g_here * g_here;
        w += x_here * x_here * load(inverse + (l - j * stride));
      }
      s.across[j] += sum_of(a);
      s.weighted[j] += sum_of(w);
    }
  }
}

// One read of the gradient's lines, and of the parameter's where RMS(p) is wanted.
template <class M>
void add_lines_of(const Tensor& t, const Rule& r, Lines lines, LineSums<M>& s, ThreadBuffers& buffers) {
  zero(s.across, t.cols);
  zero(s.weighted, t.cols);
  if (t.cols <= kNarrow && lines.end - lines.begin > 1) {
    add_narrow_lines(t, r, lines, s, buffers);
    return;
  }
  if constexpr (sizeof(M) == sizeof(float)) {
    if (reads_plainly(t, r)) {
      by_dtypes(t, [&](auto* param, auto* grad) {
        s.with_param ? add_plain_lines<true>(t, r, param, grad, lines, s)
                     : add_plain_lines<false>(t, r, param, grad, lines, s);
      });
      return;
    }
  }
  add_converted_lines(t, r, lines, s, buffers);
}

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

// The factors of a matrix, from its line and cross sums; returns what these say of its Σ u². The rest of it, see
// is_measured, takes another look at the gradient.
template <class M>
double finalize_matrix(const Tensor& t, const Rule& r, Matrix<M>& m) {
  const int64_t first = m.first / t.rows * t.cols;
  const M square = M(t.grad_factor) * M(t.grad_factor);
  const bool raw = r.norm_clipped && t.form == kFactored;
  if (raw) {
    for (int64_t l = 0; l < t.rows; ++l) m.line[l] *= square;
    for (int64_t j = 0; j < t.cols; ++j) m.cross[j] *= square;
    new_moments(t, r, t.line_var, m.first, t.rows, t.cols, m.line);
  }
  const double grad_sq = total_of(m.cross, t.cols);
  new_moments(t, r, t.cross_var, first, t.cols, t.rows, m.cross);
  const M* row = t.swapped ? m.cross : m.line;
  const int64_t rows = t.swapped ? t.cols : t.rows;
  const double total = total_of(row, rows);
  M norm = M(r.sums ? total : total / double(rows));
  if (r.eps1_rule == kEps1Clamp && norm < M(r.eps1)) norm = M(r.eps1);
  *m.norm = norm;
  for (int64_t j = 0; j < t.cols; ++j) m.factor[j] = m.cross[j] > M(0) ? m.factor[j] / m.cross[j] : M(0);
  const double share = total_of(m.factor, t.cols);
  memcpy(m.factor, m.cross, t.cols * sizeof(M));
  inverse_roots(m.factor, t.cols);
  *m.clamp = clamp_of(t, r, m);
  if (r.amsgrad || raw) {
    *m.clamp = Clamp::kEveryLine;  // the identity does not hold, or was taken before its time
  } else if (*m.clamp == Clamp::kEverywhere && r.momentum == kMomentumGrad) {
    *m.clamp = Clamp::kEveryLine;  // Σ num² is not known
  }
  const double known = share * double(norm);
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

// Σ u² of those lines that have to be measured, less what the identity has counted for them.
template <class M>
double measure_lines(const Tensor& t, const Rule& r, const Matrix<M>& m, Lines lines, ThreadBuffers& buffers) {
  if (!t.measures || *m.clamp == Clamp::kNowhere || *m.clamp == Clamp::kEverywhere) return 0;
  const bool corrects = *m.clamp == Clamp::kSomeLines;
  double sum = 0;
  if constexpr (sizeof(M) == sizeof(float)) {
    if (reads_plainly(t, r) && !r.amsgrad) {
      by_dtypes(t, [&](auto*, auto* grad) {
        for (int64_t line = lines.begin; line < lines.end; ++line) {
          if (!is_measured(r, m, line)) continue;
          const int64_t offset = offset_of(t, t.strides, line * t.cols);
          sum += measure_line(grad + offset, m.factor, m.line_factor(line), most_root<float>(r), scale_of_grad(t),
                              t.cols, corrects);
        }
      });
      return sum;
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

template <class M>
void stats_in(Tensor& t, const Rule& r, int64_t slab, void* scratch, ThreadBuffers& buffers) {
  Sums<M> sums(t, scratch);
  double* sum = sums.slab + 3 * slab;
  sum[0] = sum[1] = sum[2] = 0;
  const Lines lines = lines_of(t, slab);
  if (t.form == kFactored || t.form == kSmall) {
    LineSums<M> s{};
    s.with_param = t.measures_param_rms;
    s.raw = r.norm_clipped;
    if (t.form == kSmall) {
      for_each_small(t, r, lines, s, buffers, true, [&](const Matrix<M>&, double part) { sum[2] += part; });
    } else {
      const Matrix<M> m = sums.matrix(t, lines.begin / t.rows);
      const bool whole = slabs_per_matrix(t) == 1;
      s.line = m.line + (lines.begin - m.first);
      s.across = whole ? m.cross : sums.partial + 2 * slab * t.cols;
      s.weighted = whole ? m.factor : s.across + t.cols;
      add_lines_of(t, r, lines, s, buffers);
    }
    sum[0] = s.grad_sq;
    sum[1] = s.param_sq;
    return;
  }
  if (t.form == kUnfactored && reads_plainly(t, r)) {
    sum_plain_vector(t, r, elements_of(t, lines), sum);
    return;
  }
  Chunk<M> c(buffers);
  for_each_chunk(t, lines, [&](int64_t line, int64_t column, int64_t n) {
    const int64_t k = line * t.cols + column;
    const M* grad = c.buffer[0];
    if (t.form == kTiny && t.measures && !r.norm_clipped && !r.amsgrad && r.momentum != kMomentumGrad) {
      grad = read_grad(t, r, k, n, c.buffer[0], c.buffer[1], &sum[0]);
      sum[2] += tiny_update_sq(t, r, grad, k, n, most_root<M>(r));
    } else if (t.measures && !r.norm_clipped) {
      const Update<M> u = update_of<M>(t, r, nullptr, line, column, n, c, false);
      sum[2] += double(sum_of_squares(u.value, n));
      grad = u.grad;
      if (r.clip_value >= 0) read_grad(t, r, k, n, c.buffer[9], c.buffer[10], &sum[0]);
    } else {
      grad = read_grad(t, r, k, n, c.buffer[0], c.buffer[1], &sum[0]);
    }
    if (r.clip_value < 0) sum[0] += double(sum_of_squares(grad, n));
    if (t.measures_param_rms) {
      sum[1] += double(sum_of_squares(read(t, t.strides, t.param, t.param_dtype, k, n, c.buffer[8]), n));
    }
  });
}

// alpha_t = max(eps2, RMS(p)) rho_t, and RMS(p).
inline void set_alpha(Tensor& t, const Rule& r, double param_sq) {
  t.alpha = r.rho;
  t.param_rms = std::sqrt(param_sq / double(t.numel));
  if (r.eps2 < 0) return;
  double scale = t.param_rms;
  if (r.decay_before_rms && r.decay_factor != kNoDecay) {
    scale = std::fabs(scale * (1.0 - r.decay_coefficient * (r.decay_factor == kDecayLr ? r.lr : 1.0)));
  }
  t.alpha = (scale < r.eps2 ? r.eps2 : scale) * r.rho;
}

// The sums across the lines of a matrix, from those of its slabs: some columns of them.
template <class M>
void merge_in(Tensor& t, int64_t part, void* scratch) {
  Sums<M> s(t, scratch);
  const int64_t parts = (t.cols + kMergeColumns - 1) / kMergeColumns, slabs = slabs_per_matrix(t);
  const int64_t number = part / parts, begin = part % parts * kMergeColumns;
  const int64_t n = least(kMergeColumns, t.cols - begin);
  const Matrix<M> m = s.matrix(t, number);
  M *across = m.cross + begin, *weighted = m.factor + begin;
  zero(across, n);
  zero(weighted, n);
  for (int64_t i = 0; i < slabs; ++i) {
    const M* partial = s.partial + 2 * (number * slabs + i) * t.cols + begin;
    for (int64_t j = 0; j < n; ++j) across[j] += partial[j];
    for (int64_t j = 0; j < n; ++j) weighted[j] += partial[t.cols + j];
  }
}

template <class M>
void finalize_in(Tensor& t, const Rule& r, void* scratch) {
  Sums<M> s(t, scratch);
  double sums[3] = {};
  for (int64_t i = 0; i < t.slabs; ++i) {
    for (int j = 0; j < 3; ++j) sums[j] += s.slab[3 * i + j];
    s.slab[3 * i + 2] = 0;  // for the third sweep
  }
  if (r.norm_clipped) sums[2] = 0;  // what was summed was not clipped yet
  t.grad_sq = sums[0];
  set_alpha(t, r, sums[1]);
  if (t.form == kFactored) {
    for (int64_t number = 0; number < t.batch; ++number) {
      Matrix<M> m = s.matrix(t, number);
      sums[2] += finalize_matrix(t, r, m);
    }
  }
  t.update_sq = sums[2];
  t.update_rms = std::sqrt(t.update_sq / double(t.numel));
}

// What the first sweep could not tell of Σ u².
template <class M>
void update_rms_in(Tensor& t, const Rule& r, int64_t slab, void* scratch, ThreadBuffers& buffers) {
  Sums<M> s(t, scratch);
  double& sum = s.slab[3 * slab + 2];
  const Lines lines = lines_of(t, slab);
  if (t.form == kFactored) {
    sum = measure_lines(t, r, s.matrix(t, lines.begin / t.rows), lines, buffers);
  } else if (r.norm_clipped && t.measures) {
    sum = 0;
    if (t.form == kSmall) {
      LineSums<M> ignored{};
      for_each_small(t, r, lines, ignored, buffers, true, [&](const Matrix<M>&, double part) { sum += part; });
      return;
    }
    if (t.form == kUnfactored && reads_plainly(t, r)) {
      double sums[3] = {};
      sum_plain_vector(t, r, elements_of(t, lines), sums);
      sum = sums[2];
      return;
    }
    Chunk<M> c(buffers);
    for_each_chunk(t, lines, [&](int64_t line, int64_t column, int64_t n) {
      sum += double(sum_of_squares(update_of<M>(t, r, nullptr, line, column, n, c, false).value, n));
    });
  }
}

template <class M>
void measure_in(Tensor& t, const Rule&, void* scratch) {
  Sums<M> s(t, scratch);
  double sum = t.update_sq;
  for (int64_t i = 0; i < t.slabs; ++i) sum += s.slab[3 * i + 2];
  t.update_rms = std::sqrt((sum < 0 ? 0.0 : sum) / double(t.numel));  // so written that NaN stays
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_STATISTICS_H
