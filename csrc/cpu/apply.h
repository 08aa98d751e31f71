// What the second sweep writes: parameter, moments, and what else a tensor owns. Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_APPLY_H
#define FUSED_ADAFACTOR_CPU_APPLY_H

#include "statistics.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

// p rounded to its dtype with random bits keyed by the element's row-major index in the parameter.
inline void write_stochastic(const Tensor& t, const Rule& r, const float* value, int64_t k, int64_t n) {
  uint16_t* param = static_cast<uint16_t*>(t.param);
  PhiloxBlock block{};
  uint64_t held = ~uint64_t(0);
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t element = uint64_t(offset_of(t, t.logical, k + i));
    if (element >> 3 != held) {
      held = element >> 3;
      block = rounding_block(held, uint32_t(t.param_index), uint32_t(r.step), r.seed);
    }
    param[offset_of(t, t.strides, k + i)] = to_bfloat16_stochastic(value[i], rounding_bits(block, element));
  }
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
  } else if (r.rounding == kStochastic && t.param_dtype == kBfloat16) {
    float* single = reinterpret_cast<float*>(spare);
    for (int64_t i = 0; i < n; ++i) single[i] = float(value[i]);
    write_stochastic(t, r, single, k, n);
  } else {
    write(t, t.strides, value, t.param, t.param_dtype, k, n);
  }
}

// avg = momentum avg + (1 - momentum) p of one chunk; p takes its value where that is due.
template <class M>
void average_chunk(Tensor& t, const Rule& r, int64_t k, int64_t n, Chunk<M>& c) {
  const M* param = read(t, t.strides, t.param, t.param_dtype, k, n, c.buffer[8]);
  const M* old = read(t, t.state_strides, t.average, t.math_dtype, k, n, c.buffer[9]);
  const M momentum = M(r.average_momentum);
  M* value = c.buffer[10];
  for (int64_t i = 0; i < n; ++i) value[i] = momentum * old[i] + (M(1) - momentum) * param[i];
  write(t, t.state_strides, value, t.average, t.math_dtype, k, n);
  if (!r.overwrite_with_average) return;
  write(t, t.strides, value, t.param, t.param_dtype, k, n);
  if (t.compensation != nullptr) {  // it belongs to the value that was overwritten
    zero(c.buffer[11], n);
    write(t, t.state_strides, c.buffer[11], t.compensation, t.param_dtype, k, n);
  }
}

inline double decay_of(const Tensor& t, const Rule& r) {
  if (r.decay_factor == kNoDecay) return 1.0;
  return 1.0 - r.decay_coefficient * (r.decay_factor == kDecayAlpha ? t.alpha : r.decay_factor == kDecayLr ? r.lr : 1.0);
}

// The plainest rule: factored, no momentum, rounding to nearest. One multiply and one fused multiply-add for an element,
// straight from and to memory.
template <class P>
void apply_plain_line(P* __restrict param, const P* __restrict grad, const float* __restrict factor, float decay,
                      float step, int64_t n) {
  for (int64_t j = 0; j < n; ++j) param[j] = decay * param[j] - (step * factor[j]) * grad[j];
}

template <>
void apply_plain_line(uint16_t* __restrict param, const uint16_t* __restrict grad, const float* __restrict factor,
                      float decay, float step, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    param[j] = to_bfloat16(decay * from_bfloat16(param[j]) - (step * factor[j]) * from_bfloat16(grad[j]));
  }
}

// Whether apply_plain_line does all that the rule asks for.
inline bool is_plain(const Tensor& t, const Rule& r) {
  return is_factored(t) && t.math_dtype == kFloat32 && t.param_dtype == t.grad_dtype &&
         (t.param_dtype == kFloat32 || t.param_dtype == kBfloat16) && r.momentum == kNoMomentum && !r.amsgrad &&
         (r.rounding == kNearest || t.param_dtype == kFloat32) && t.average == nullptr &&
         t.accumulator == nullptr && r.clip_value < 0 && t.strides[t.ndim - 1] == 1 &&
         t.sizes[t.ndim - 1] % t.cols == 0;
}

inline void apply_plain_line(Tensor& t, const Sums<float>& s, int64_t line, float decay, double step) {
  const int64_t offset = offset_of(t, t.strides, line * t.cols);
  const float of_line = float(step * t.grad_scale * t.grad_factor) * line_factor(t, s, line);
  const float* factor = s.factor + line / t.rows * t.cols;
  if (t.param_dtype == kFloat32) {
    apply_plain_line(static_cast<float*>(t.param) + offset, static_cast<const float*>(t.grad) + offset, factor, decay,
                     of_line, t.cols);
  } else {
    apply_plain_line(static_cast<uint16_t*>(t.param) + offset, static_cast<const uint16_t*>(t.grad) + offset, factor,
                     decay, of_line, t.cols);
  }
}

// Everything else, chunk by chunk.
template <class M>
void apply_chunk(Tensor& t, const Rule& r, const Sums<M>& s, int64_t line, int64_t column, int64_t n, double clip,
                 Chunk<M>& c) {
  const int64_t k = line * t.cols + column;
  const Update<M> u = update_of(t, r, s, line, column, n, c);
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
  const M decay = M(decay_of(t, r));
  const M* param = read(t, t.strides, t.param, t.param_dtype, k, n, c.buffer[8]);
  M* value = c.buffer[9];
  if (t.compensation != nullptr) {
    const M* lost = read(t, t.state_strides, t.compensation, t.param_dtype, k, n, c.buffer[10]);
    for (int64_t i = 0; i < n; ++i) value[i] = decay * (param[i] + lost[i]) - delta[i];
  } else {
    for (int64_t i = 0; i < n; ++i) value[i] = decay * param[i] - delta[i];
  }
  if (t.exp_avg != nullptr) write(t, t.state_strides, exp_avg, t.exp_avg, t.exp_avg_dtype, k, n);
  if (r.amsgrad) write(t, t.state_strides, u.var_max, t.var_max, t.moment_dtype, k, n);
  if (!is_factored(t)) write(t, t.state_strides, u.var, t.var, t.moment_dtype, k, n);
  if (t.accumulator != nullptr) {
    zero(c.buffer[10], n);
    write(t, t.state_strides, c.buffer[10], t.accumulator, t.math_dtype, k, n);
  }
  write_param(t, r, value, k, n, c.buffer[10], c.buffer[11]);
  if (t.average != nullptr) average_chunk(t, r, k, n, c);
}

// The factors of a slab's lines, and of a matrix's columns with its first line.
template <class M>
void write_factors(Tensor& t, const Sums<M>& s, Lines lines) {
  convert_to(s.line + lines.begin, t.line_var, t.moment_dtype, lines.begin, 1, lines.end - lines.begin);
  for (int64_t line = lines.begin; line < lines.end; ++line) {
    if (line % t.rows != 0) continue;
    const int64_t first = line / t.rows * t.cols;
    convert_to(s.cross + first, t.cross_var, t.moment_dtype, first, 1, t.cols);
  }
}

template <class M>
void apply_in(Tensor& t, const Rule& r, int64_t slab, void* scratch, ThreadBuffers& buffers) {
  Sums<M> s(t, scratch);
  Chunk<M> c(buffers);
  const Lines lines = lines_of(t, slab);
  if (t.skip) return;
  double clip = 1.0;
  if (r.clip_threshold >= 0) {
    clip = t.update_rms / r.clip_threshold;
    if (clip < 1.0) clip = 1.0;
  }
  for (int64_t line = lines.end - 1; line >= lines.begin; --line) {
    if constexpr (sizeof(M) == 4) {
      if (is_plain(t, r) && !is_clamped(t, r, s, line)) {
        apply_plain_line(t, s, line, float(decay_of(t, r)), t.alpha / clip);
        continue;
      }
    }
    const int64_t length = line_length(t, line);
    for (int64_t j = 0; j < length; j += kChunk) apply_chunk(t, r, s, line, j, least(kChunk, length - j), clip, c);
  }
  if (is_factored(t)) write_factors(t, s, lines);
}

template <class M>
void accumulate_in(Tensor& t, const Rule& r, int64_t slab, ThreadBuffers& buffers) {
  if (t.skip) return;
  Chunk<M> c(buffers);
  const Lines lines = lines_of(t, slab);
  const M scale = M(t.grad_scale);
  const int64_t end = least(lines.end * t.cols, t.numel);
  for (int64_t k = lines.begin * t.cols; k < end; k += kChunk) {
    const int64_t n = least(kChunk, end - k);
    const M* grad = read(t, t.strides, t.grad, t.grad_dtype, k, n, c.buffer[0]);
    const M* old = read(t, t.state_strides, t.accumulator, t.math_dtype, k, n, c.buffer[1]);
    for (int64_t i = 0; i < n; ++i) c.buffer[2][i] = old[i] + grad[i] * scale;
    write(t, t.state_strides, c.buffer[2], t.accumulator, t.math_dtype, k, n);
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
