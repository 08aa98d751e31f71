// The sums of the first sweep, the factors, and RMS(u). Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_STATISTICS_H
#define FUSED_ADAFACTOR_CPU_STATISTICS_H

#include "update.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

// New second moment of a line from its Σ g².
template <class M>
M new_line(const Tensor& t, const Rule& r, M sum, int64_t line) {
  if (r.eps1_rule == kEps1Add) sum += M(t.cols) * M(r.eps1);
  const M value = r.sums ? sum : sum / M(t.cols);
  return stored(new_moment(load_one<M>(t.line_var, t.moment_dtype, line), value, M(r.beta2)), t.moment_dtype);
}

template <class M>
M new_cross(const Tensor& t, const Rule& r, M sum, int64_t index) {
  if (r.eps1_rule == kEps1Add) sum += M(t.rows) * M(r.eps1);
  const M value = r.sums ? sum : sum / M(t.rows);
  return stored(new_moment(load_one<M>(t.cross_var, t.moment_dtype, index), value, M(r.beta2)), t.moment_dtype);
}

// Whether Σ u² comes from the sums of the first sweep.
inline bool by_identity(const Tensor& t, const Rule& r) {
  return is_factored(t) && !r.amsgrad && !r.norm_clipped;
}

// a += g², w += num² / line_var over a block of lines.
template <class M>
void add_lines(M* __restrict a, M* __restrict w, const M* const* grad, const M* const* num, const M* inverse,
               int64_t lines, int64_t n) {
  if (lines == kBlockLines && grad[0] == num[0]) {
    const M *g0 = grad[0], *g1 = grad[1], *g2 = grad[2], *g3 = grad[3];
    const M *g4 = grad[4], *g5 = grad[5], *g6 = grad[6], *g7 = grad[7];
    const M i0 = inverse[0], i1 = inverse[1], i2 = inverse[2], i3 = inverse[3];
    const M i4 = inverse[4], i5 = inverse[5], i6 = inverse[6], i7 = inverse[7];
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      const M q0 = g0[j] * g0[j], q1 = g1[j] * g1[j], q2 = g2[j] * g2[j], q3 = g3[j] * g3[j];
      const M q4 = g4[j] * g4[j], q5 = g5[j] * g5[j], q6 = g6[j] * g6[j], q7 = g7[j] * g7[j];
      a[j] += ((q0 + q1) + (q2 + q3)) + ((q4 + q5) + (q6 + q7));
      w[j] += ((q0 * i0 + q1 * i1) + (q2 * i2 + q3 * i3)) + ((q4 * i4 + q5 * i5) + (q6 * i6 + q7 * i7));
    }
    return;
  }
  for (int64_t l = 0; l < lines; ++l) {
    const M *g = grad[l], *x = num[l];
    const M i = inverse[l];
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      a[j] += g[j] * g[j];
      w[j] += x[j] * x[j] * i;
    }
  }
}

template <class M>
void factored_stats(Tensor& t, const Rule& r, Sums<M>& s, ThreadBuffers& buffers, M* across, M* weighted, Lines lines,
                    double* grad_sq, double* param_sq) {
  Chunk<M> c(buffers);
  M* block = static_cast<M*>(buffers.lines);
  zero(across, t.cols);
  zero(weighted, t.cols);
  const bool raw = grad_is_raw<M>(t, r);
  const bool averaged = r.momentum == kMomentumGrad;
  const int64_t per_block = block_lines(t);
  for (int64_t first = lines.begin; first < lines.end; first += per_block) {
    const int64_t count = least(per_block, lines.end - first);
    const M* grad[kBlockLines];
    const M* num[kBlockLines];
    M inverse[kBlockLines];
    for (int64_t l = 0; l < count; ++l) {
      const int64_t k = (first + l) * t.cols;
      M sum = M(0);
      const M* whole = nullptr;
      if (raw) {
        const Run run = run_at(t, t.strides, k, t.cols);
        if (run.straight && run.stride == 1 && t.grad_dtype == DtypeOf<M>::value) {
          whole = static_cast<const M*>(t.grad) + run.offset;
        }
      }
      M* own = block + 2 * l * t.cols;
      double line_sq = 0;
      for (int64_t j = 0; j < t.cols; j += kChunk) {
        const int64_t n = least(kChunk, t.cols - j);
        const M* g = whole != nullptr ? whole + j : read_grad(t, r, k + j, n, own + j, c.buffer[1], grad_sq);
        if (whole == nullptr && g != own + j) memcpy(own + j, g, n * sizeof(M));
        sum += sum_of_squares(g, n);
        if (averaged) numerator(t, r, g, k + j, n, own + t.cols + j, c.buffer[2], c.buffer[5]);
        if (t.measures_param_rms) {
          line_sq += double(sum_of_squares(read(t, t.strides, t.param, t.param_dtype, k + j, n, c.buffer[3]), n));
        }
      }
      grad[l] = whole != nullptr ? whole : own;
      num[l] = averaged ? own + t.cols : grad[l];
      if (r.clip_value < 0) *grad_sq += double(sum);
      *param_sq += line_sq;
      // With a norm to clip by the factor of the gradient is not known yet, so the sum is kept as it is.
      const M var = r.norm_clipped ? sum : new_line(t, r, sum, first + l);
      s.line[first + l] = var;
      inverse[l] = var > M(0) ? M(1) / var : M(0);
    }
    add_lines(across, weighted, grad, num, inverse, count, t.cols);
  }
}

template <class M>
void stats_in(Tensor& t, const Rule& r, int64_t slab, void* scratch, ThreadBuffers& buffers) {
  Sums<M> s(t, scratch);
  double* sums = s.slab + 3 * slab;
  sums[0] = sums[1] = sums[2] = 0;
  const Lines lines = lines_of(t, slab);
  if (is_factored(t)) {
    // A slab that holds whole matrices owns their cross sums: they stand where the finished ones will.
    const bool whole = slabs_per_matrix(t) == 1;
    for (int64_t first = lines.begin; first < lines.end; first += whole ? t.rows : lines.end - lines.begin) {
      const int64_t matrix = first / t.rows;
      M* across = whole ? s.cross + matrix * t.cols : s.partial + 2 * slab * t.cols;
      M* weighted = whole ? s.factor + matrix * t.cols : across + t.cols;
      const Lines part = whole ? Lines{first, first + t.rows} : lines;
      factored_stats(t, r, s, buffers, across, weighted, part, &sums[0], &sums[1]);
    }
    return;
  }
  Chunk<M> c(buffers);
  for (int64_t line = lines.begin; line < lines.end; ++line) {
    const int64_t length = line_length(t, line);
    for (int64_t j = 0; j < length; j += kChunk) {
      const int64_t n = least(kChunk, length - j);
      const int64_t k = line * t.cols + j;
      if (t.measures && !r.norm_clipped) {
        sums[2] += double(sum_of_squares(update_of(t, r, s, line, j, n, c).value, n));
      }
      const M* grad = read_grad(t, r, k, n, c.buffer[0], c.buffer[1], &sums[0]);
      if (r.clip_value < 0) sums[0] += double(sum_of_squares(grad, n));
      if (t.measures_param_rms) sums[1] += double(sum_of_squares(read(t, t.strides, t.param, t.param_dtype, k, n, c.buffer[8]), n));
    }
  }
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

// Factors of one matrix from its sums; returns its share of Σ u² by the identity.
template <class M>
double finalize_matrix(Tensor& t, const Rule& r, Sums<M>& s, int64_t matrix) {
  M* cross = s.cross + matrix * t.cols;
  M* factor = s.factor + matrix * t.cols;
  const int64_t slabs = slabs_per_matrix(t);
  const bool whole = slabs == 1;
  for (int64_t j = 0; j < t.cols && !whole; ++j) cross[j] = factor[j] = M(0);
  for (int64_t i = 0; i < slabs && !whole; ++i) {
    const M* partial = s.partial + 2 * (matrix * slabs + i) * t.cols;
    for (int64_t j = 0; j < t.cols; ++j) cross[j] += partial[j];
    for (int64_t j = 0; j < t.cols; ++j) factor[j] += partial[t.cols + j];
  }
  const M* line = s.line + matrix * t.rows;
  const M square = r.norm_clipped ? M(t.grad_factor) * M(t.grad_factor) : M(1);
  for (int64_t j = 0; j < t.cols; ++j) cross[j] = new_cross(t, r, cross[j] * square, matrix * t.cols + j);
  const M* row = t.swapped ? cross : line;
  const int64_t rows = t.swapped ? t.cols : t.rows;
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) total += double(row[i]);
  M norm = M(r.sums ? total : total / double(rows));
  if (r.eps1_rule == kEps1Clamp && norm < M(r.eps1)) norm = M(r.eps1);
  s.norm[matrix] = norm;
  double share = 0;
  for (int64_t j = 0; j < t.cols; ++j) share += cross[j] > M(0) ? double(factor[j]) / double(cross[j]) : 0.0;
  for (int64_t j = 0; j < t.cols; ++j) factor[j] = M(1) / std::sqrt(cross[j]);
  s.largest[matrix] = largest_of(factor, t.cols);
  return share * double(norm);
}

// Whether the clamp of v by eps1² can bite an element of a line.
template <class M>
bool is_clamped(const Tensor& t, const Rule& r, const Sums<M>& s, int64_t line) {
  return r.eps1_rule == kEps1Clamp && !(line_factor(t, s, line) * s.largest[line / t.rows] <= M(1) / M(r.eps1));
}

template <class M>
void finalize_in(Tensor& t, const Rule& r, void* scratch) {
  Sums<M> s(t, scratch);
  double sums[3] = {};
  for (int64_t i = 0; i < t.slabs; ++i) {
    for (int j = 0; j < 3; ++j) sums[j] += s.slab[3 * i + j];
  }
  for (int64_t i = 0; i < t.slabs; ++i) s.slab[3 * i + 2] = 0;  // for the third sweep
  t.grad_sq = sums[0];
  set_alpha(t, r, sums[1]);
  if (is_factored(t)) {
    if (r.norm_clipped) {
      const M square = M(t.grad_factor) * M(t.grad_factor);
      for (int64_t l = 0; l < t.batch * t.rows; ++l) s.line[l] = new_line(t, r, s.line[l] * square, l);
    }
    sums[2] = 0;
    for (int64_t matrix = 0; matrix < t.batch; ++matrix) sums[2] += finalize_matrix(t, r, s, matrix);
  }
  // What the first sweep knows of Σ u²: all of it, all but the lines that the clamp bites, or nothing.
  t.update_sq = t.measures && (is_factored(t) ? by_identity(t, r) : !r.norm_clipped) ? sums[2] : 0.0;
  t.update_rms = std::sqrt(t.update_sq / double(t.numel));
}

// Whether the third sweep has something to do for a line.
template <class M>
bool is_measured(const Tensor& t, const Rule& r, const Sums<M>& s, int64_t line) {
  if (!t.measures) return false;
  if (!is_factored(t)) return r.norm_clipped;
  // A line whose second moment is 0 has never seen anything but zeros.
  return !by_identity(t, r) || (is_clamped(t, r, s, line) && s.line[line] > M(0));
}

template <class M>
void update_rms_in(Tensor& t, const Rule& r, int64_t slab, void* scratch, ThreadBuffers& buffers) {
  Sums<M> s(t, scratch);
  Chunk<M> c(buffers);
  const Lines lines = lines_of(t, slab);
  const bool corrects = by_identity(t, r);
  double sum = 0;
  for (int64_t line = lines.begin; line < lines.end; ++line) {
    if (!is_measured(t, r, s, line)) continue;
    const int64_t length = line_length(t, line);
    for (int64_t j = 0; j < length; j += kChunk) {
      const int64_t n = least(kChunk, length - j);
      const Update<M> u = update_of(t, r, s, line, j, n, c);
      sum += double(sum_of_squares(u.value, n));
      if (!corrects) continue;
      // The identity has counted these elements without the clamp, but for those of an all-zero column.
      const M of_line = line_factor(t, s, line);
      const M* factor = s.factor + line / t.rows * t.cols + j;
      const M* num = r.momentum == kMomentumGrad ? c.buffer[1] : u.grad;
      for (int64_t i = 0; i < n; ++i) c.buffer[8][i] = is_finite(factor[i]) ? num[i] * (of_line * factor[i]) : M(0);
      sum -= double(sum_of_squares(c.buffer[8], n));
    }
  }
  s.slab[3 * slab + 2] = sum;
}

template <class M>
void measure_in(Tensor& t, const Rule&, void* scratch) {
  Sums<M> s(t, scratch);
  double sum = t.update_sq;
  for (int64_t i = 0; i < t.slabs; ++i) sum += s.slab[3 * i + 2];
  t.update_rms = std::sqrt((sum > 0 ? sum : 0.0) / double(t.numel));
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_STATISTICS_H
