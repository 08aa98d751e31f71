// What the second sweep writes: parameter, moments, and what else a tensor owns. Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_APPLY_H
#define FUSED_ADAFACTOR_CPU_APPLY_H

#include "mirror.h"
#include "statistics.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

// Whether the parameter is rounded with random bits.
inline bool rounds_stochastically(const Tensor& t, const Rule& r) {
  return r.rounding == kStochastic && t.param_dtype == kBfloat16;
}

// p = round(value): nearest, stochastic, or with what is lost kept as the compensation.
template <class M>
void write_param(const Tensor& t, const Rule& r, const M* value, int64_t k, int64_t n, M* spare, M* other) {
  if (t.compensation != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      const M rounded = stored(value[i], t.param_dtype);
      spare[i] = rounded;
      other[i] = is_finite(rounded) ? value[i] - rounded : M(0);
    }
    write(t, t.strides, spare, t.param, t.param_dtype, k, n);
    write(t, t.state_strides, other, t.compensation, t.param_dtype, k, n);
  } else if (rounds_stochastically(t, r)) {
    float* single = reinterpret_cast<float*>(spare);
    for (int64_t i = 0; i < n; ++i) single[i] = float(value[i]);
    write_stochastic(t, r, t.strides, single, t.param, k, n);
  } else {
    write(t, t.strides, value, t.param, t.param_dtype, k, n);
  }
  if (t.mirror != nullptr) write_mirror(t, r, k, n, mirrors_stochastically(t, r));
}

// avg = momentum avg + (1 - momentum) p of one chunk; p takes its value where that is due.
template <class M>
void average_chunk(Tensor& t, const Rule& r, int64_t k, int64_t n, Chunk<M>& c) {
  const M* param = read(t, t.strides, t.param, t.param_dtype, k, n, c.buffer[8]);
  const M* old = read(t, t.state_strides, t.average, t.math_dtype, k, n, c.buffer[9]);
  const M momentum = M(r.average_momentum), rest = M(1.0 - r.average_momentum);
  M* value = c.buffer[10];
  for (int64_t i = 0; i < n; ++i) value[i] = momentum * old[i] + rest * param[i];
  write(t, t.state_strides, value, t.average, t.math_dtype, k, n);
  if (!r.overwrite_with_average) return;
  write(t, t.strides, value, t.param, t.param_dtype, k, n);
  if (t.mirror != nullptr) write_mirror(t, r, k, n, false);
  if (t.compensation != nullptr) {  // it belongs to the value that was overwritten
    zero(c.buffer[11], n);
    write(t, t.state_strides, c.buffer[11], t.compensation, t.param_dtype, k, n);
  }
}

inline double decay_of(const Tensor& t, const Rule& r) {
  if (r.decay_factor == kNoDecay) return 1.0;
  return 1.0 - r.decay_coefficient * (r.decay_factor == kDecayAlpha ? t.alpha : r.decay_factor == kDecayLr ? r.lr : 1.0);
}

// Whether apply_line can write all that a tensor owns but its second moments, and random bits come in its order.
inline bool writes_plainly(const Tensor& t, const Rule& r) {
  const bool draws = rounds_stochastically(t, r);
  const int last = t.ndim - 1;
  return lies_plainly(t) && !r.overwrite_with_average && (!draws || t.logical[last] == 1);
}

// Whether nothing is written but the parameter, perhaps its mirror, and second moments, and that without random bits.
inline bool writes_param_alone(const Tensor& t, const Rule& r) {
  return r.momentum == kNoMomentum && t.compensation == nullptr && t.average == nullptr && !rounds_stochastically(t, r);
}

// Whether apply_line does the whole of it for a matrix, and apply_vector for an unfactored tensor.
inline bool applies_plainly(const Tensor& t, const Rule& r) {
  if (!writes_plainly(t, r) || r.amsgrad || t.form == kTiny) return false;
  if (t.exp_avg_scale != nullptr && !one_line_at_a_time(t)) return false;
  const bool bare = r.momentum == kNoMomentum && t.compensation == nullptr && t.average == nullptr;
  return t.form != kUnfactored || (bare && reads_plainly(t, r));
}

// Whether a strip is summed up as it is read and written, see expected.h: a step can be made good where the
// gradient that it came from is still there.
inline bool sums_param(const Tensor& t, const Rule& r) {
  return t.expected.written != nullptr && t.form == kFactored && t.cols > kNarrow && !t.whole.is_split &&
         t.measures_param_rms && t.accumulator == nullptr && reads_plainly(t, r) && applies_plainly(t, r);
}

// What an update is divided by.
inline double clip_of(const Tensor& t, const Rule& r) {
  const double ratio = r.clip_threshold < 0 ? 1.0 : t.update_rms / r.clip_threshold;
  return ratio < 1.0 ? 1.0 : ratio;  // so written that NaN stays
}

inline ApplyRule apply_rule(const Tensor& t, const Rule& r, double clip) {
  ApplyRule rule{};
  rule.grad = grad_rule(t, r);
  rule.moment = moment_rule(r);
  rule.site = MomentumSite(r.momentum);
  rule.alpha = float(t.alpha);
  rule.by_clip = 1.0f / float(clip);
  rule.step = rule.alpha * rule.by_clip;
  rule.decay = float(decay_of(t, r));
  rule.average_momentum = float(r.average_momentum);
  rule.average_rest = float(1.0 - r.average_momentum);
  return rule;
}

template <class P>
Written<P> written_at(const Tensor& t, int64_t k) {
  Written<P> to{};
  if (t.compensation == nullptr && t.average == nullptr && t.accumulator == nullptr) return to;
  const int64_t offset = offset_of(t, t.state_strides, k);
  if (t.compensation != nullptr) to.compensation = static_cast<P*>(t.compensation) + offset;
  if (t.average != nullptr) to.average = static_cast<float*>(t.average) + offset;
  if (t.accumulator != nullptr) to.accumulator = static_cast<float*>(t.accumulator) + offset;
  return to;
}

// Of the element k and those that follow it.
inline Draws draws_at(const Tensor& t, const Rule& r, int64_t k) {
  if (!rounds_stochastically(t, r)) return {};
  return {true, random_key(t, r, kParamStream), uint64_t(t.whole.first_element + offset_of(t, t.logical, k))};
}

// Calls f(k, n) for elements k .. k + n: all of them at once, or chunk by chunk where there is a mirror, which is then
// written from the core's cache.
template <class F>
void for_each_part(const Tensor& t, const Rule& r, int64_t k, int64_t n, F f) {
  if (t.mirror == nullptr) return f(k, n);
  const bool mirrors_at_random = mirrors_stochastically(t, r);
  for (int64_t i = k; i < k + n; i += kChunk) {
    const int64_t part = least(kChunk, k + n - i);
    f(i, part);
    write_mirror(t, r, i, part, mirrors_at_random);
  }
}

// A run of elements, all that is written of them; `delta` as in Written.
template <class P, class G>
void apply_run(const Tensor& t, const Rule& r, const ApplyRule& rule, P* param, const G* grad, const Roots& roots,
               const float* delta, int64_t k, int64_t n) {
  const bool all = r.momentum != kNoMomentum || t.compensation != nullptr || t.average != nullptr ||
                   rounds_stochastically(t, r) || delta != nullptr;
  for_each_part(t, r, k, n, [&](int64_t first, int64_t part) {
    const Line<P, G> line = line_at(t, param, grad, first, r.momentum != kNoMomentum && delta == nullptr);
    const Roots of_part{roots.factor + (first - k), roots.of_line, roots.most};
    Written<P> to = written_at<P>(t, first);
    if (delta != nullptr) to.delta = delta + (first - k);
    by_extras(all ? kAllExtras : extras_of(t, r),
              [&](auto extras) { apply_line<extras.value>(rule, line, to, of_part, draws_at(t, r, first), part); });
  });
}

// A line whose first moment is in blocks.
template <class P, class G>
void apply_blocks(const Tensor& t, const Rule& r, const ApplyRule& rule, P* param, const G* grad, const Roots& roots,
                  int64_t line) {
  float delta[kChunk];
  for (int64_t j = 0; j < t.cols; j += kChunk) {
    const int64_t k = line * t.cols + j, n = least(kChunk, t.cols - j);
    const Roots here{roots.factor + j, roots.of_line, roots.most};
    deltas_of_blocks(rule, line_at(t, param, grad, k, false), blocks_at(t, line, j), here, n, delta);
    apply_run(t, r, rule, param, grad, here, delta, k, n);
  }
}

template <class P, class G>
void apply_plain_line(const Tensor& t, const Rule& r, const ApplyRule& rule, P* param, const G* grad, const Roots& roots,
                      int64_t line) {
  t.exp_avg_scale != nullptr ? apply_blocks(t, r, rule, param, grad, roots, line)
                             : apply_run(t, r, rule, param, grad, roots, nullptr, line * t.cols, t.cols);
}

inline void apply_plain_lines(const Tensor& t, const Rule& r, const Matrix<float>& m, Lines lines, double clip) {
  const ApplyRule rule = apply_rule(t, r, clip);
  const float most = most_root<float>(r);
  float root[kChunk];
  by_dtypes(t, [&](auto* param, auto* grad) {
    if (one_line_at_a_time(t)) {
      for (int64_t line = lines.begin; line < lines.end; ++line) {
        apply_plain_line(t, r, rule, param, grad, Roots{m.factor, m.line_factor(line), most}, line);
      }
    } else {
      for_each_chunk(t, lines, [&](int64_t line, int64_t column, int64_t n) {
        factored_roots(t, m, line, column, n, root);
        apply_run(t, r, rule, param, grad, Roots{root, 1.0f, most}, nullptr, line * t.cols + column, n);
      });
    }
  });
}

// A line, and Σ p² of it before and after: on the way where the loop does little else, else while a core's cache has it.
template <class P, class G>
void apply_and_square_line(const Tensor& t, const Rule& r, const ApplyRule& rule, P* param, const G* grad,
                           const Roots& roots, int64_t number, double* read, double* written) {
  const int64_t k = number * t.cols;
  const Line<P, G> line = line_at(t, param, grad, k, false);
  if (!writes_param_alone(t, r)) {
    *read += square_param(line.param, t.cols);
    apply_plain_line(t, r, rule, param, grad, roots, number);
    *written += square_param(line.param, t.cols);
    return;
  }
  if (extras_of(t, r) == kNoExtras) {
    apply_and_square<kNoExtras>(rule, line, roots, t.cols, read, written);
  } else {
    apply_and_square<kClips>(rule, line, roots, t.cols, read, written);
  }
  if (t.mirror != nullptr) for_each_part(t, r, k, t.cols, [](int64_t, int64_t) {});
}

// A strip of a tensor whose sums_param. Another than was expected is noted.
inline void apply_and_square_lines(Tensor& t, const Rule& r, const ApplyRule& rule, const Matrix<float>& m, Lines lines,
                                   int64_t strip) {
  const float most = most_root<float>(r);
  double read = 0, written = 0;
  by_dtypes(t, [&](auto* param, auto* grad) {
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      apply_and_square_line(t, r, rule, param, grad, Roots{m.factor, m.line_factor(line), most}, line, &read, &written);
    }
  });
  if (!(read == t.expected.written[strip])) __atomic_store_n(&t.expected.surprised, 1, __ATOMIC_RELAXED);
  t.expected.read[strip] = read;
  t.expected.written[strip] = written;
}

inline void apply_plain_vector(const Tensor& t, const Rule& r, Lines elements, double clip) {
  const ApplyRule rule = apply_rule(t, r, clip);
  const VectorRule of_var = vector_rule(t, r);
  by_dtypes(t, [&](auto* param, auto* grad) {
    const int64_t begin = elements.begin;
    for_each_part(t, r, begin, elements.end - begin, [&](int64_t k, int64_t n) {
      float* var = static_cast<float*>(t.var) + k;
      apply_vector(param + k, grad + k, var, of_var, rule.decay, rule.step, draws_at(t, r, k), n);
    });
  });
}

// Everything else, chunk by chunk.
template <class M>
void apply_chunk(Tensor& t, const Rule& r, const Matrix<M>* matrix, int64_t line, int64_t column, int64_t n,
                 double clip, Chunk<M>& c) {
  const int64_t k = line * t.cols + column;
  const Update<M> u = update_of(t, r, matrix, line, column, n, c, true);
  const M alpha = M(t.alpha), by_clip = M(1) / M(clip);
  M* delta = c.buffer[7];
  const M* exp_avg = u.exp_avg;
  if (r.momentum == kMomentumUpdate || r.momentum == kMomentumStep) {
    const bool on_step = r.momentum == kMomentumStep;
    M* mine = c.buffer[2];
    new_exp_avg(t, r, u.value, on_step ? alpha * by_clip : by_clip, k, n, mine, c.buffer[5]);
    for (int64_t i = 0; i < n; ++i) delta[i] = on_step ? mine[i] : alpha * mine[i];
    exp_avg = mine;
  } else {
    const M scale = alpha * by_clip;
    for (int64_t i = 0; i < n; ++i) delta[i] = scale * u.value[i];
  }
  if (t.exp_avg_scale != nullptr) {
    write_blocks(t, k, n, exp_avg, c.buffer[10]);
  } else if (t.exp_avg != nullptr) {
    write(t, t.state_strides, exp_avg, t.exp_avg, t.exp_avg_dtype, k, n);
  }
  if (r.amsgrad) write(t, t.state_strides, u.var_max, t.var_max, t.moment_dtype, k, n);
  if (t.form == kUnfactored) write(t, t.state_strides, u.var, t.var, t.moment_dtype, k, n);
  if constexpr (sizeof(M) == sizeof(float)) {
    if (writes_plainly(t, r)) {
      const ApplyRule rule = apply_rule(t, r, clip);
      return by_dtypes(t, [&](auto* p, auto* g) { apply_run(t, r, rule, p, g, Roots{}, delta, k, n); });
    }
  }
  if (t.accumulator != nullptr) {
    zero(c.buffer[10], n);
    write(t, t.state_strides, c.buffer[10], t.accumulator, t.math_dtype, k, n);
  }
  const M decay = M(decay_of(t, r));
  const M* param = read(t, t.strides, t.param, t.param_dtype, k, n, c.buffer[8]);
  M* value = c.buffer[9];
  if (t.compensation != nullptr) {
    const M* lost = read(t, t.state_strides, t.compensation, t.param_dtype, k, n, c.buffer[10]);
    for (int64_t i = 0; i < n; ++i) value[i] = fused(decay, param[i] + lost[i], -delta[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) value[i] = fused(decay, param[i], -delta[i]);
  }
  write_param(t, r, value, k, n, c.buffer[10], c.buffer[11]);
  if (t.average != nullptr) average_chunk(t, r, k, n, c);
}

// Second moments of some lines, and with the first line of a matrix of what lies across.
template <class M>
void write_factors(const Tensor& t, const Matrix<M>& m, Lines lines) {
  const int64_t n = lines.end - lines.begin;
  convert_to(m.line + (lines.begin - m.first), t.line_var, t.moment_dtype, lines.begin, 1, n);
  if (lines.begin != m.first) return;
  convert_to(m.cross, t.cross_var, t.moment_dtype, m.number * t.cols, 1, t.cols);
}

template <class M>
void apply_matrix(Tensor& t, const Rule& r, const Matrix<M>& m, Lines lines, double clip, ThreadBuffers& buffers) {
  bool done = false;
  if constexpr (sizeof(M) == sizeof(float)) {
    if (applies_plainly(t, r)) {
      apply_plain_lines(t, r, m, lines, clip);
      done = true;
    }
  }
  if (!done) {
    Chunk<M> c(buffers);
    for_each_chunk(t, lines, [&](int64_t line, int64_t column, int64_t n) {
      apply_chunk(t, r, &m, line, column, n, clip, c);
    });
  }
  write_factors(t, m, lines);
}

template <class M>
void apply_in(Tensor& t, const Rule& r, int64_t strip, void* scratch, ThreadBuffers& buffers) {
  if (t.skip) return;
  const Lines lines = strip_of(t, strip);
  const double clip = clip_of(t, r);
  if (t.form == kFactored) {
    const Matrix<M> m = Sums<M>(t, scratch).matrix(t, matrix_of(t, strip / t.strips));
    if (t.numel == 0) return write_factors(t, m, lines);
    if constexpr (sizeof(M) == sizeof(float)) {
      if (sums_param(t, r)) {
        apply_and_square_lines(t, r, apply_rule(t, r, clip), m, lines, strip);
        return write_factors(t, m, lines);
      }
    }
    apply_matrix(t, r, m, lines, clip, buffers);
  } else if (t.form == kSmall) {
    LineSums<M> ignored{};
    for_each_small(t, r, lines, ignored, buffers, false, [&](const Matrix<M>& m, double) {
      apply_matrix(t, r, m, Lines{m.first, m.first + t.rows}, clip, buffers);
    });
  } else if (t.form == kUnfactored && applies_plainly(t, r)) {
    apply_plain_vector(t, r, elements_of(t, lines), clip);
  } else if (lies_flat(t, r) && writes_param_alone(t, r) && t.mirror == nullptr) {
    const ApplyRule rule = apply_rule(t, r, clip);
    apply_flat_elements(t, r, flat_elements(t, lines), rule.decay, rule.step);
    Chunk<M> c(buffers);
    for_what_is_left(t, lines, [&](int64_t line, int64_t column, int64_t n) {
      apply_chunk<M>(t, r, nullptr, line, column, n, clip, c);
    });
  } else {
    Chunk<M> c(buffers);
    for_each_chunk(t, lines, [&](int64_t line, int64_t column, int64_t n) {
      apply_chunk<M>(t, r, nullptr, line, column, n, clip, c);
    });
  }
}

// accumulated += scale g of elements begin .. end.
inline void accumulate_plainly(const Tensor& t, int64_t begin, int64_t end) {
  const float scale = float(t.grad_scale);
  without_param(t, [&](auto*, auto* all) {
    for (int64_t k = begin; k < end;) {
      const Run from = run_at(t, t.strides, k), to = run_at(t, t.state_strides, k);
      const int64_t n = least(least(from.count, to.count), end - k);
      const auto* grad = all + from.offset;
      float* accumulated = static_cast<float*>(t.accumulator) + to.offset;
      for_each_vector(0, n, [&](int64_t j, auto lanes) {
        ask_for(grad + j, kAheadOfLine);
        ask_for(accumulated + j, kAheadOfLine);
        store(accumulated + j, load(accumulated + j, lanes) + load(grad + j, lanes) * scale, lanes);
      });
      k += n;
    }
  });
}

template <class M>
void accumulate_in(Tensor& t, const Rule& r, int64_t slab, ThreadBuffers& buffers) {
  if (t.skip || t.numel == 0) return;
  Chunk<M> c(buffers);
  const Lines lines = lines_of(t, slab);
  const M scale = M(t.grad_scale);
  const int64_t begin = lines.begin * t.cols, end = least(lines.end * t.cols, t.numel);
  const bool plain = lies_plainly(t);
  if (plain) accumulate_plainly(t, begin, end);
  if (plain && t.average == nullptr) return;
  for (int64_t k = begin; k < end; k += kChunk) {
    const int64_t n = least(kChunk, end - k);
    if (!plain) {
      const M* grad = read(t, t.strides, t.grad, t.grad_dtype, k, n, c.buffer[0]);
      const M* old = read(t, t.state_strides, t.accumulator, t.math_dtype, k, n, c.buffer[1]);
      for (int64_t i = 0; i < n; ++i) c.buffer[2][i] = old[i] + grad[i] * scale;
      write(t, t.state_strides, c.buffer[2], t.accumulator, t.math_dtype, k, n);
    }
    if (t.average != nullptr) average_chunk(t, r, k, n, c);
  }
}

template <class M>
void average_in(Tensor& t, const Rule& r, int64_t slab, ThreadBuffers& buffers) {
  if (t.skip || t.average == nullptr) return;
  Chunk<M> c(buffers);
  const Lines lines = lines_of(t, slab);
  const int64_t end = least(lines.end * t.cols, t.numel);
  for (int64_t k = lines.begin * t.cols; k < end; k += kChunk) {
    average_chunk(t, r, k, least(kChunk, end - k), c);
  }
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_APPLY_H
