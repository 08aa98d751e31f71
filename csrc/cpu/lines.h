// One read of lines: their sums of squares, those across them, and those of the parameter. Part of kernels.cpp.

#ifndef FUSED_ADAFACTOR_CPU_LINES_H
#define FUSED_ADAFACTOR_CPU_LINES_H

#include "plain.h"
#include "update.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

inline bool is_plain(int32_t dtype) { return dtype == kFloat32 || dtype == kBfloat16; }

// Whether elements of float32 or bfloat16, one after the other along each line, are all that is read. The gradient may
// be of float16 too, and a first moment of 8 bits.
inline bool lies_plainly(const Tensor& t) {
  const bool plain_moment = t.exp_avg == nullptr || is_plain(t.exp_avg_dtype) || t.exp_avg_dtype == kBlocks;
  const bool plain_grad = is_plain(t.grad_dtype) || t.grad_dtype == kFloat16;
  const int last = t.ndim - 1;
  const bool plain_lines = t.strides[last] == 1 && t.state_strides[last] == 1 && t.sizes[last] % t.cols == 0;
  const bool one_run = t.ndim == 1 && t.strides[0] == 1 && t.state_strides[0] == 1;
  const bool of_lines = t.form == kFactored || t.form == kSmall;
  return t.math_dtype == kFloat32 && is_plain(t.param_dtype) && plain_grad && plain_moment &&
         (of_lines ? plain_lines : one_run);
}

// What reading the gradient, or what is divided in its place, takes beside scaling it.
inline Extras extras_of(const Tensor& t, const Rule& r) {
  if (t.accumulator != nullptr || r.momentum == kMomentumGrad) return kAllExtras;
  return r.clip_value < 0 ? kNoExtras : kClips;
}

// Calls f with something that knows the extras when it is compiled.
template <Extras kKnown>
struct KnownExtras {
  static constexpr Extras value = kKnown;
};

template <class F>
auto by_extras(Extras extras, F f) {
  switch (extras) {
    case kNoExtras:
      return f(KnownExtras<kNoExtras>{});
    case kClips:
      return f(KnownExtras<kClips>{});
    default:
      return f(KnownExtras<kAllExtras>{});
  }
}

// Whether the plain loops can read what the sums are taken over.
inline bool reads_plainly(const Tensor& t, const Rule& r) {
  if (t.form == kTiny || !lies_plainly(t)) return false;
  return t.form != kUnfactored || (extras_of(t, r) == kNoExtras && t.moment_dtype == kFloat32 && !r.amsgrad);
}

// Calls f with `param` and a pointer to the gradient's dtype, of a tensor that lies_plainly.
template <class P, class F>
auto by_grad_dtype(const Tensor& t, P* param, F f) {
  if (t.grad_dtype == kFloat32) return f(param, static_cast<const float*>(t.grad));
  if (t.grad_dtype == kFloat16) return f(param, static_cast<const Float16*>(t.grad));
  return f(param, static_cast<const uint16_t*>(t.grad));
}

// Calls f with a pointer to the parameter's dtype and one to the gradient's.
template <class F>
auto by_dtypes(const Tensor& t, F f) {
  return t.param_dtype == kFloat32 ? by_grad_dtype(t, static_cast<float*>(t.param), f)
                                   : by_grad_dtype(t, static_cast<uint16_t*>(t.param), f);
}

// The same where nobody looks at the parameter: half as much to compile.
template <class F>
auto without_param(const Tensor& t, F f) {
  return by_grad_dtype(t, static_cast<float*>(t.param), f);
}

inline GradRule grad_rule(const Tensor& t, const Rule& r) {
  const bool apart = factor_stands_apart(t, r);
  return {float(apart ? t.grad_scale : t.grad_scale * t.grad_factor), apart ? float(t.grad_factor) : 1.0f,
          r.clip_value < 0 ? INFINITY : float(r.clip_value), float(r.accumulation_steps)};
}

inline MomentRule moment_rule(const Rule& r) {
  return {float(r.beta1), float(1.0 - r.beta1), float(r.numerator_scale)};
}

// Elements from number k on. `param` and `grad` are where the tensor's begin.
template <class P, class G>
Line<P, G> line_at(const Tensor& t, P* param, const G* grad, int64_t k, bool with_moment) {
  const int64_t offset = offset_of(t, t.strides, k);
  Line<P, G> line{param + offset, grad + offset, nullptr, {nullptr, t.exp_avg_dtype == kBfloat16}, nullptr};
  if (t.accumulator == nullptr && !with_moment) return line;
  const int64_t kept = offset_of(t, t.state_strides, k);
  if (t.accumulator != nullptr) line.accumulated = static_cast<const float*>(t.accumulator) + kept;
  if (with_moment) line.exp_avg.at = static_cast<char*>(t.exp_avg) + kept * (line.exp_avg.half ? 2 : 4);
  return line;
}

// Of a line, from a column on where a block begins.
inline Blocks blocks_at(const Tensor& t, int64_t line, int64_t column) {
  const int64_t of_line = (t.cols + kBlock - 1) / kBlock;
  return {static_cast<int8_t*>(t.exp_avg) + offset_of(t, t.state_strides, line * t.cols + column),
          t.exp_avg_scale + line * of_line + column / kBlock};
}

// A whole line, whose numerators are in `buffer` where its average is in blocks.
template <class P, class G>
Line<P, G> line_of(const Tensor& t, const Rule& r, P* param, const G* grad, int64_t number, float* buffer) {
  const bool averaged = r.momentum == kMomentumGrad, in_blocks = averaged && t.exp_avg_scale != nullptr;
  Line<P, G> line = line_at(t, param, grad, number * t.cols, averaged && !in_blocks);
  if (in_blocks) {
    numerators_of_blocks(grad_rule(t, r), moment_rule(r), line, blocks_at(t, number, 0), t.cols, buffer);
    line.numerator = buffer;
  }
  return line;
}

inline VectorRule vector_rule(const Tensor& t, const Rule& r) {
  const float added = r.eps1_rule == kEps1Add ? float(r.eps1) : 0.0f;
  return {grad_rule(t, r).scale, float(r.beta2), float(1.0 - r.beta2), added, most_root<float>(r)};
}

// Elements of a slab of a tensor that is one run.
inline Lines elements_of(const Tensor& t, Lines lines) {
  return {lines.begin * t.cols, least(lines.end * t.cols, t.numel)};
}

// Of some elements of an unfactored tensor that reads_plainly.
inline void sum_plain_vector(const Tensor& t, const Rule& r, Lines elements, double* sums) {
  const int64_t begin = elements.begin, n = elements.end - begin;
  const float* var = static_cast<const float*>(t.var) + begin;
  if (t.measures_param_rms) {
    by_dtypes(t, [&](auto* p, auto* g) { sum_vector<true>(p + begin, g + begin, var, vector_rule(t, r), n, sums); });
  } else {
    without_param(t, [&](auto* p, auto* g) { sum_vector<false>(p, g + begin, var, vector_rule(t, r), n, sums); });
  }
}

// New second moments, `count` of them from number `first` on, from their sums of g² over `reduced` elements each. The
// old ones are in `var`.
template <class M>
void new_moments(const Tensor& t, const Rule& r, Stream stream, const void* var, int32_t var_dtype, int64_t first,
                 int64_t count, int64_t reduced, M* sums) {
  const M beta2 = M(r.beta2), rest = M(1.0 - r.beta2), by = r.sums ? M(1) : M(1) / M(reduced);
  const M added = r.eps1_rule == kEps1Add ? M(reduced) * M(r.eps1) : M(0);
  for (int64_t i = 0; i < count; i += kChunk) {
    M old[kChunk];
    const int64_t n = least(kChunk, count - i);
    convert_from(old, var, var_dtype, first + i, 1, n);
    for (int64_t j = 0; j < n; ++j) sums[i + j] = new_moment(old[j], (sums[i + j] + added) * by, beta2, rest);
  }
  round_moments(t, r, stream, first, count, sums);
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
  double param_sq_of_strip;  // where plain lines are read; not in param_sq yet

  // Strip by strip, as what apply writes is summed up.
  void add_param(double line_sq, bool begins_strip) {
    if (begins_strip) close_strip();
    param_sq_of_strip += line_sq;
  }
  void close_strip() {
    param_sq += param_sq_of_strip;
    param_sq_of_strip = 0;
  }
};

// The sums of g² of some lines become their second moments, unless it is too early for that; returns them inverted.
template <class M>
void set_lines(const Tensor& t, const Rule& r, const LineSums<M>& s, int64_t line, int64_t count, M* sums, M* inverse) {
  if (!s.raw) new_moments(t, r, stream_of_lines(t), t.line_var, t.moment_dtype, line, count, t.cols, sums);
  for (int64_t l = 0; l < count; ++l) inverse[l] = inverse_of(sums[l]);
}

// Where a line begins, asking ahead in the one before it was of no use.
template <class T>
void ask_for_head(const T* line) {
  for (int64_t i = 0; i < kAheadOfBlock; i += 64) ask_for(line, i);
}

template <int L, Extras kExtras, bool kWithParam, class P, class G>
void add_plain_block(const Tensor& t, const Rule& r, P* param, const G* grad, int64_t number, LineSums<float>& s,
                     float* of_line, float* buffer) {
  Line<P, G> lines[L];
  const G* following[L];
  float inverse[L];
  const GradRule rule = grad_rule(t, r);
  const int64_t last = t.batch * t.rows - 1;
  for (int l = 0; l < L; ++l) {
    lines[l] = line_of(t, r, param, grad, number + l, buffer + l * t.cols);
    following[l] = line_at(t, param, grad, least(number + L + l, last) * t.cols, false).grad;
  }
  s.grad_sq += square_lines<L, kExtras>(lines, rule, t.cols, of_line);
  set_lines(t, r, s, number, L, of_line, inverse);
  add_lines<L, kExtras>(lines, following, inverse, rule, moment_rule(r), t.cols, s.across,
                        s.raw ? nullptr : s.weighted);
  for (int l = 0; kWithParam && l < L; ++l) {
    s.add_param(square_param(lines[l].param, t.cols), begins_strip(t, number + l));
  }
}

template <Extras kExtras, bool kWithParam, class P, class G>
void add_plain_lines(const Tensor& t, const Rule& r, P* param, const G* grad, Lines lines, LineSums<float>& s,
                     float* buffer) {
  const int64_t together = block_lines(t);
  float* const sums = s.line - lines.begin;
  int64_t line = lines.begin;
  for (; together == kBlockLines && line + kBlockLines <= lines.end; line += kBlockLines) {
    add_plain_block<kBlockLines, kExtras, kWithParam>(t, r, param, grad, line, s, sums + line, buffer);
  }
  for (; together >= 2 && line + 2 <= lines.end; line += 2) {
    add_plain_block<2, kExtras, kWithParam>(t, r, param, grad, line, s, sums + line, buffer);
  }
  for (; line < lines.end; ++line) {
    add_plain_block<1, kExtras, kWithParam>(t, r, param, grad, line, s, sums + line, buffer);
  }
  s.close_strip();
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
      float* buffer = static_cast<float*>(buffers.lines);
      by_extras(extras_of(t, r), [&](auto extras) {
        constexpr Extras kExtras = decltype(extras)::value;
        if (s.with_param) {
          by_dtypes(t, [&](auto* p, auto* g) { add_plain_lines<kExtras, true>(t, r, p, g, lines, s, buffer); });
        } else {
          without_param(t, [&](auto* p, auto* g) { add_plain_lines<kExtras, false>(t, r, p, g, lines, s, buffer); });
        }
      });
      return;
    }
  }
  add_converted_lines(t, r, lines, s, buffers);
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_LINES_H
