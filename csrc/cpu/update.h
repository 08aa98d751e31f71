// The gradient and the update of one chunk: what every sweep computes. Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_UPDATE_H
#define FUSED_ADAFACTOR_CPU_UPDATE_H

#include "blocks.h"
#include "sums.h"
#include "tiny.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

template <class M>
struct Chunk {
  M* buffer[kChunkBuffers];
  explicit Chunk(const ThreadBuffers& buffers) {
    for (int64_t i = 0; i < kChunkBuffers; ++i) buffer[i] = static_cast<M*>(buffers.chunks) + i * kChunk;
  }
};

// Calls f(line, column, n) for the lines in chunks of at most kChunk elements: parts of a line, several lines of a
// matrix that are short, or whole tiny matrices.
template <class F>
void for_each_chunk(const Tensor& t, Lines lines, F f) {
  if (t.form != kTiny && t.cols <= kChunk / 2 && t.form != kUnfactored) {
    const int64_t together = kChunk / t.cols;
    for (int64_t line = lines.begin; line < lines.end; line += together) {
      f(line, int64_t(0), least(together, lines.end - line) * t.cols);
    }
    return;
  }
  const int64_t size = t.matrix_rows * t.matrix_cols;
  int64_t chunk = kChunk;
  if (t.form == kTiny) {
    chunk = (kChunk - kLanes) / size;  // leaves room for what from_lanes writes too much
    if (chunk > kLanes) chunk -= chunk % kLanes;
    chunk *= size;
  }
  for (int64_t line = lines.begin; line < lines.end; ++line) {
    const int64_t length = line_length(t, line);
    for (int64_t j = 0; j < length; j += chunk) f(line, j, least(chunk, length - j));
  }
}

template <class M>
bool grad_is_raw(const Tensor& t, const Rule& r) {
  return t.grad_scale == 1.0 && t.grad_factor == 1.0 && t.accumulator == nullptr && r.clip_value < 0;
}

// Whether something comes between the scale of a gradient and its factor; else they are one number.
inline bool factor_stands_apart(const Tensor& t, const Rule& r) {
  return t.accumulator != nullptr || r.clip_value >= 0 || r.momentum == kMomentumGrad;
}

// g: unscaled, averaged over accumulated steps, clipped; `buffer` is used unless the raw gradient will do.
template <class M>
const M* read_grad(const Tensor& t, const Rule& r, int64_t k, int64_t n, M* buffer, M* spare,
                   double* unclipped_sq = nullptr) {
  const M* raw = read(t, t.strides, t.grad, t.grad_dtype, k, n, buffer);
  if (grad_is_raw<M>(t, r)) return raw;
  const bool apart = factor_stands_apart(t, r);
  const M scale = M(apart ? t.grad_scale : t.grad_scale * t.grad_factor);
  for (int64_t i = 0; i < n; ++i) buffer[i] = raw[i] * scale;
  if (t.accumulator != nullptr) {
    const M* sum = read(t, t.state_strides, t.accumulator, t.math_dtype, k, n, spare);
    const M steps = M(r.accumulation_steps);
    for (int64_t i = 0; i < n; ++i) buffer[i] = (buffer[i] + sum[i]) / steps;
  }
  if (r.clip_value >= 0) {
    if (unclipped_sq != nullptr) *unclipped_sq += double(sum_of_squares(buffer, n));
    const M limit = M(r.clip_value);
    for (int64_t i = 0; i < n; ++i) {
      // Written so that NaN passes.
      buffer[i] = buffer[i] > limit ? limit : buffer[i] < -limit ? -limit : buffer[i];
    }
  }
  if (apart && t.grad_factor != 1.0) {
    const M factor = M(t.grad_factor);
    for (int64_t i = 0; i < n; ++i) buffer[i] *= factor;
  }
  return buffer;
}

// Chunks are made of whole blocks: for_each_chunk begins each at a line or at a multiple of kChunk in it.
static_assert(kChunk % kBlock == 0, "a chunk ends where a block does");

// beta1 m + (1 - beta1) x, rounded to the dtype of m, into `out`.
template <class M>
void new_exp_avg(const Tensor& t, const Rule& r, const M* value, M scale, int64_t k, int64_t n, M* out, M* spare) {
  const bool in_blocks = t.exp_avg_dtype == kBlocks;
  const M* old = in_blocks ? read_blocks(t, k, n, spare)
                           : read(t, t.state_strides, t.exp_avg, t.exp_avg_dtype, k, n, spare);
  const M beta1 = M(r.beta1), rest = M(1.0 - r.beta1);
  for (int64_t i = 0; i < n; ++i) out[i] = beta1 * old[i] + rest * (value[i] * scale);
  if (in_blocks) {
    round_to_blocks(t, k, n, out);
  } else if (t.exp_avg_dtype != DtypeOf<M>::value) {
    for (int64_t i = 0; i < n; ++i) out[i] = stored(out[i], t.exp_avg_dtype);
  }
}

// num: g, or its average where momentum is on the gradient; `exp_avg` then holds the new average.
template <class M>
const M* numerator(const Tensor& t, const Rule& r, const M* grad, int64_t k, int64_t n, M* num, M* exp_avg, M* spare) {
  if (r.momentum != kMomentumGrad) return grad;
  new_exp_avg(t, r, grad, M(1), k, n, exp_avg, spare);
  const M scale = M(r.numerator_scale);
  for (int64_t i = 0; i < n; ++i) num[i] = exp_avg[i] * scale;
  return num;
}

// 1 / sqrt(v) by the factors of a line, or of several whole ones.
template <class M>
void factored_roots(const Tensor& t, const Matrix<M>& matrix, int64_t line, int64_t column, int64_t n, M* root) {
  const M* factor = matrix.factor + column;
  const int64_t length = least(n, t.cols), lines = n / length;
  M of_line[kChunk];
  for (int64_t l = 0; l < lines; ++l) of_line[l] = matrix.line[line + l - matrix.first] / *matrix.norm;
  if (one_line_at_a_time(t)) {
    for (int64_t l = 0; l < lines; ++l) of_line[l] = M(1) / std::sqrt(of_line[l]);  // as Matrix::line_factor
  } else {
    inverse_roots(of_line, lines);
  }
  for (int64_t l = 0; l < lines; ++l) {
    for (int64_t j = 0; j < length; ++j) root[l * length + j] = of_line[l] * factor[j];
  }
}

// 1 / sqrt(v) by the new second moment of each element, which goes into `var`.
template <class M>
void unfactored_roots(const Tensor& t, const Rule& r, const M* grad, int64_t k, int64_t n, M* root, M* var, M* spare) {
  const M* old = read(t, t.state_strides, t.var, t.moment_dtype, k, n, spare);
  const M beta2 = M(r.beta2), rest = M(1.0 - r.beta2), added = r.eps1_rule == kEps1Add ? M(r.eps1) : M(0);
  for (int64_t i = 0; i < n; ++i) var[i] = new_moment(old[i], fused(grad[i], grad[i], added), beta2, rest);
  round_moments(t, r, kRowVarStream, k, n, var);  // k is the row-major index: an unfactored tensor has no view
  for (int64_t i = 0; i < n; ++i) root[i] = var[i];
  inverse_roots(root, n);
}

// The largest 1 / sqrt(v): 1 / eps1 under torch.optim's clamp.
template <class M>
M most_root(const Rule& r) {
  return r.eps1_rule == kEps1Clamp ? M(1) / M(r.eps1) : M(INFINITY);
}

// What a chunk of the update leaves behind for apply to store.
template <class M>
struct Update {
  const M* grad;
  const M* num;     // what is divided by the root of v
  const M* value;   // u before clipping
  M* exp_avg;       // new average of the gradient, if momentum is there
  M* var;           // new second moment, if unfactored
  M* var_max;       // new maximum, if AMSGrad
};

// The update of one chunk. `matrix` is that of its lines, or nothing; where `stores`, the new second moments of tiny
// matrices are written on the way.
template <class M>
Update<M> update_of(const Tensor& t, const Rule& r, const Matrix<M>* matrix, int64_t line, int64_t column, int64_t n,
                    Chunk<M>& c, bool stores) {
  const int64_t k = line * t.cols + column;
  Update<M> u{};
  u.grad = read_grad(t, r, k, n, c.buffer[0], c.buffer[1]);
  u.exp_avg = c.buffer[2];
  u.var = c.buffer[3];
  u.var_max = c.buffer[4];
  u.num = numerator(t, r, u.grad, k, n, c.buffer[1], u.exp_avg, c.buffer[5]);
  M* root = c.buffer[6];
  if (t.form == kUnfactored) {
    unfactored_roots(t, r, u.grad, k, n, root, u.var, c.buffer[5]);
  } else if (t.form == kTiny) {
    tiny_roots(t, r, u.grad, k, n, root, stores);
  } else {
    factored_roots(t, *matrix, line, column, n, root);
  }
  if (r.eps1_rule == kEps1Clamp) {
    const M most = most_root<M>(r);
    for (int64_t i = 0; i < n; ++i) root[i] = root[i] > most ? most : root[i];
  }
  M* value = c.buffer[7];
  if (r.amsgrad) {
    const M* old = read(t, t.state_strides, t.var_max, t.moment_dtype, k, n, c.buffer[5]);
    const M scale = M(r.amsgrad_scale), eps1 = M(r.eps1);
    for (int64_t i = 0; i < n; ++i) {
      const M v = M(1) / (root[i] * root[i]);
      u.var_max[i] = v > old[i] || v != v ? v : old[i];  // NaN of either stays
    }
    // To nearest: a maximum of values that are rounded at random would keep every one that came out too large.
    if (t.moment_dtype != DtypeOf<M>::value) {
      for (int64_t i = 0; i < n; ++i) u.var_max[i] = stored(u.var_max[i], t.moment_dtype);
    }
    for (int64_t i = 0; i < n; ++i) value[i] = u.num[i] / (std::sqrt(u.var_max[i] * scale) + eps1);
  } else {
    for (int64_t i = 0; i < n; ++i) value[i] = u.num[i] * root[i];
  }
  u.value = value;
  return u;
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_UPDATE_H
