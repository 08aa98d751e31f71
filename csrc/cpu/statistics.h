// The phases before the last: the sums of the first sweep, the factors, and RMS(u). Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_STATISTICS_H
#define FUSED_ADAFACTOR_CPU_STATISTICS_H

#include "shared.h"
#include "tiny_flat.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

template <class M>
void stats_in(Tensor& t, const Rule& r, int64_t slab, void* scratch, ThreadBuffers& buffers) {
  Sums<M> sums(t, scratch);
  double* sum = sums.slab + 3 * slab;
  sum[0] = sum[1] = sum[2] = 0;
  if (t.numel == 0) return zero_sums(t, sums, slab);
  const Lines lines = lines_of(t, slab);
  if (t.form == kFactored || t.form == kSmall) {
    LineSums<M> s{};
    s.with_param = t.measures_param_rms && !t.expected.trusted;
    s.raw = lines_are_raw(t, r);
    if (t.form == kSmall) {
      for_each_small(t, r, lines, s, buffers, true, [&](const Matrix<M>&, double part) { sum[2] += part; });
    } else {
      const Matrix<M> m = sums.matrix(t, matrix_of(t, slab));
      const bool whole = slabs_per_matrix(t) == 1;
      s.line = m.line + (lines.begin - m.first);
      s.across = whole ? m.cross : sums.partial + 2 * slab * t.cols;
      s.weighted = whole ? m.factor : s.across + t.cols;
      add_lines_of(t, r, lines, s, buffers);
    }
    sum[0] = s.grad_sq;
    sum[1] = t.expected.trusted ? sum_of_strips(t, t.expected.written, slab) : s.param_sq;
    return;
  }
  if (t.form == kUnfactored && reads_plainly(t, r)) {
    sum_plain_vector(t, r, elements_of(t, lines), sum);
    return;
  }
  Chunk<M> c(buffers);
  const auto add_chunk = [&](int64_t line, int64_t column, int64_t n) {
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
  };
  if (t.measures && !r.norm_clipped && lies_flat(t, r)) {
    sum_flat_elements(t, r, flat_elements(t, lines), sum);
    for_what_is_left(t, lines, add_chunk);
  } else {
    for_each_chunk(t, lines, add_chunk);
  }
}

// alpha_t = max(eps2, RMS(p)) rho_t, and RMS(p).
inline void set_alpha(Tensor& t, const Rule& r, double param_sq) {
  t.alpha = r.rho;
  t.param_rms = std::sqrt(param_sq / double(t.whole.numel));
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
  take_scalars<M>(t, sums);
  t.grad_sq = sums[0];
  if (r.skips && !is_finite(M(t.grad_sq))) t.skip = 1;
  set_alpha(t, r, sums[1]);
  if (t.form == kFactored && t.partial.update_sq == nullptr) {
    for (int64_t number = 0; number < t.batch; ++number) {
      Matrix<M> m = s.matrix(t, number);
      take_matrix(t, m);
      sums[2] += finalize_matrix(t, r, m);
    }
  }
  t.update_sq = sums[2];
  t.update_rms = std::sqrt(t.update_sq / double(t.whole.numel));
}

// What the first sweep could not tell of Σ u².
template <class M>
void update_rms_in(Tensor& t, const Rule& r, int64_t slab, void* scratch, ThreadBuffers& buffers) {
  if (t.numel == 0 || t.partial.update_sq != nullptr) return;
  Sums<M> s(t, scratch);
  double& sum = s.slab[3 * slab + 2];
  const Lines lines = lines_of(t, slab);
  if (t.form == kFactored) {
    sum = measure_lines(t, r, s.matrix(t, matrix_of(t, slab)), lines, buffers);
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
    const auto add_chunk = [&](int64_t line, int64_t column, int64_t n) {
      sum += double(sum_of_squares(update_of<M>(t, r, nullptr, line, column, n, c, false).value, n));
    };
    if (lies_flat(t, r)) {
      double sums[3] = {};
      sum_flat_elements(t, r, flat_elements(t, lines), sums);
      sum = sums[2];
      for_what_is_left(t, lines, add_chunk);
    } else {
      for_each_chunk(t, lines, add_chunk);
    }
  }
}

inline void set_update_rms(Tensor& t, double update_sq) {
  t.update_rms = std::sqrt((update_sq < 0 ? 0.0 : update_sq) / double(t.whole.numel));  // so written that NaN stays
}

template <class M>
void measure_in(Tensor& t, const Rule&, void* scratch) {
  Sums<M> s(t, scratch);
  double sum = t.update_sq;
  for (int64_t i = 0; i < t.slabs; ++i) sum += s.slab[3 * i + 2];
  if (t.partial.measured_sq != nullptr) {
    put<M>(t.partial.measured_sq, t.says_update_sq ? sum : 0.0);
  } else {
    set_update_rms(t, sum);
  }
}

// RMS(u) from Σ u² of all processes.
template <class M>
void settle_in(Tensor& t) {
  if (t.partial.measured_sq != nullptr) set_update_rms(t, double(*static_cast<const M*>(t.partial.measured_sq)));
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_STATISTICS_H
