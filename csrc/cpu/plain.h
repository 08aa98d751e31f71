// The loops that nearly all bytes go through: float32 and bfloat16 lines, straight from memory. Part of kernels.cpp.
//
// A core reads memory at its full rate only where it reads at several places at once, so lines are read a block at a
// time; the parameter is read while the columns of the block are added, which come from the core's cache.

#ifndef FUSED_ADAFACTOR_CPU_PLAIN_H
#define FUSED_ADAFACTOR_CPU_PLAIN_H

#include "vector.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

constexpr int64_t kFlush = 2048;  // columns after which the lanes of a sum are added up

// How far ahead of a block of lines its streams are asked for, and of a line that is written. The hardware does it too,
// but stops at the end of a page.
constexpr int64_t kAheadOfBlock = 512, kAheadOfLine = 2048;  // bytes

// sum[l] = Σ g² of L lines.
template <int L, class G>
void square_lines(const G* const* grad, float scale, int64_t n, float* sum) {
  double total[L] = {};
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    const int64_t end = least(n, begin + kFlush);
    Floats lanes[L] = {};
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      for (int l = 0; l < L; ++l) {
        ask_for(grad[l] + j, kAheadOfBlock);
        const Floats g = load(grad[l] + j) * scale;
        lanes[l] += g * g;
      }
    }
    for (int l = 0; l < L; ++l) {
      float rest = 0;
      for (int64_t i = j; i < end; ++i) {
        const float g = load_element(grad[l] + i) * scale;
        rest += g * g;
      }
      total[l] += double(sum_of(lanes[l]) + rest);
    }
  }
  for (int l = 0; l < L; ++l) sum[l] = float(total[l]);
}

// across += Σ g², weighted += Σ g² / line over L lines; returns Σ p² of them, if that is wanted.
template <int L, bool WithParam, class P, class G>
double add_lines(const G* const* grad, const P* const* param, const float* inverse, float scale, int64_t n,
                 float* across, float* weighted) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    const int64_t end = least(n, begin + kFlush);
    Floats lanes[2] = {};
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      Floats a{}, w{};
      for (int l = 0; l < L; ++l) {
        const Floats g = load(grad[l] + j) * scale;
        const Floats square = g * g;
        a += square;
        w += square * inverse[l];
        if (WithParam) {
          ask_for(param[l] + j, kAheadOfBlock);
          const Floats p = load(param[l] + j);
          lanes[l % 2] += p * p;
        }
      }
      store(across + j, load(across + j) + a);
      store(weighted + j, load(weighted + j) + w);
    }
    float rest = 0;
    for (; j < end; ++j) {
      for (int l = 0; l < L; ++l) {
        const float g = load_element(grad[l] + j) * scale;
        across[j] += g * g;
        weighted[j] += g * g * inverse[l];
        if (WithParam) rest += load_element(param[l] + j) * load_element(param[l] + j);
      }
    }
    total += double(sum_of(lanes[0] + lanes[1]) + rest);
  }
  return total;
}

// Σ u² of a line under the clamp; where it corrects, less what the identity has counted for it.
template <class G>
double measure_line(const G* grad, const float* factor, float of_line, float most, float scale, int64_t n,
                    bool corrects) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    const int64_t end = least(n, begin + kFlush);
    Floats kept{}, counted{};
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      const Floats g = load(grad + j) * scale, root = load(factor + j) * of_line;
      const Floats u = g * least(root, most);
      kept += u * u;
      // An infinite factor is that of an all-zero column, which the identity leaves out.
      const Floats without_clamp = g * (root > 3e38f ? Floats{} : root);
      counted += without_clamp * without_clamp;
    }
    float rest = 0;
    for (; j < end; ++j) {
      const float g = load_element(grad + j) * scale, root = factor[j] * of_line;
      const float u = g * (root > most ? most : root), without_clamp = g * (root > 3e38f ? 0.0f : root);
      rest += corrects ? u * u - without_clamp * without_clamp : u * u;
    }
    total += double(sum_of(kept) - (corrects ? sum_of(counted) : 0.0f) + rest);
  }
  return total;
}

// to = decay p - step u, u = g / sqrt(v); `to` may be where p is.
template <class T, class P, class G>
void apply_line(T* to, const P* param, const G* grad, const float* factor, float of_line, float most, float scale,
                float decay, float step, int64_t n) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    ask_for(grad + j, kAheadOfLine);
    ask_for(param + j, kAheadOfLine);
    const Floats u = (load(grad + j) * scale) * least(load(factor + j) * of_line, most);
    store(to + j, fused(load(param + j), Floats{} + decay, -(u * step)));
  }
  for (; j < n; ++j) {
    const float root = factor[j] * of_line;
    const float u = (load_element(grad + j) * scale) * (root > most ? most : root);
    store_element(to + j, fused(load_element(param + j), decay, -(u * step)));
  }
}

// The numbers that the loops over an unfactored tensor need.
struct VectorRule {
  float scale, beta2, rest, added, most;

  template <class V>
  V var(V old, V g) const {
    return fused(V{} + rest, fused(g, g, V{} + added), old * beta2);  // new_moment of formulas.h
  }
};

// Adds Σ g², Σ p² if that is wanted, and Σ u².
template <bool WithParam, class P, class G>
void sum_vector(const P* param, const G* grad, const float* var, const VectorRule& r, int64_t n, double* sums) {
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    const int64_t end = least(n, begin + kFlush);
    Floats grad_sq{}, param_sq{}, update_sq{};
    float rest[3] = {};
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      ask_for(grad + j, kAheadOfLine);
      ask_for(var + j, kAheadOfLine);
      const Floats g = load(grad + j) * r.scale;
      const Floats u = g * least(inverse_root(r.var(load(var + j), g)), r.most);
      grad_sq += g * g;
      update_sq += u * u;
      if (!WithParam) continue;
      ask_for(param + j, kAheadOfLine);
      const Floats p = load(param + j);
      param_sq += p * p;
    }
    for (; j < end; ++j) {
      const float g = load_element(grad + j) * r.scale, p = WithParam ? load_element(param + j) : 0.0f;
      const float root = 1.0f / std::sqrt(r.var(var[j], g)), u = g * (root > r.most ? r.most : root);
      rest[0] += g * g;
      rest[1] += p * p;
      rest[2] += u * u;
    }
    sums[0] += double(sum_of(grad_sq) + rest[0]);
    sums[1] += double(sum_of(param_sq) + rest[1]);
    sums[2] += double(sum_of(update_sq) + rest[2]);
  }
}

// to = decay p - step u, and the new second moments.
template <class T, class P, class G>
void apply_vector(T* to, const P* param, const G* grad, float* var, const VectorRule& r, float decay, float step,
                  int64_t n) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    ask_for(grad + j, kAheadOfLine);
    ask_for(param + j, kAheadOfLine);
    ask_for(var + j, kAheadOfLine);
    const Floats g = load(grad + j) * r.scale, v = r.var(load(var + j), g);
    store(var + j, v);
    store(to + j, fused(load(param + j), Floats{} + decay, -(g * least(inverse_root(v), r.most) * step)));
  }
  for (; j < n; ++j) {
    const float g = load_element(grad + j) * r.scale, v = r.var(var[j], g), root = 1.0f / std::sqrt(v);
    var[j] = v;
    store_element(to + j, fused(load_element(param + j), decay, -(g * (root > r.most ? r.most : root) * step)));
  }
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_PLAIN_H
