// The loops that nearly all bytes go through: float32 and bfloat16 lines, straight from memory. Part of kernels.cpp.
//
// A core reads memory at its full rate only where it reads at several places at once, so lines are read a block at a
// time: first the gradient, whose columns are then added from the core's cache, then the parameter.
//
// A loop is compiled for what a rule asks for beside scaling the gradient: nothing, clipping by value, or anything. In
// the last of them a switch costs little, as it is the same for every vector.

#ifndef FUSED_ADAFACTOR_CPU_PLAIN_H
#define FUSED_ADAFACTOR_CPU_PLAIN_H

#include "blocks.h"
#include "rounding.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

constexpr int64_t kFlush = 2048;  // columns after which the lanes of a sum are added up

// How far ahead of a block of lines its streams are asked for, and of a line that is written. The hardware does it too,
// but stops at the end of a page.
constexpr int64_t kAheadOfBlock = 512, kAheadOfLine = 2048;  // bytes

enum Extras { kNoExtras, kClips, kAllExtras };

// What a raw gradient becomes: g = factor clip((scale raw + accumulated) / steps).
struct GradRule {
  float scale, factor, limit, steps;
};

// The first moment, beta1 m + rest x, and what it is multiplied by where it is divided by the root of v.
struct MomentRule {
  float beta1, rest, numerator_scale;

  FA_INLINE Floats next(Floats old, Floats x) const { return fused(Floats{} + rest, x, old * beta1); }
};

// Memory of a first moment, float32 or bfloat16; null where there is none.
struct Moment {
  void* at;
  bool half;

  template <class Lanes>
  FA_INLINE Floats read(int64_t j, Lanes lanes) const {
    return half ? load(static_cast<const uint16_t*>(at) + j, lanes) : load(static_cast<const float*>(at) + j, lanes);
  }
  // What is used is what is stored.
  FA_INLINE Floats next(const MomentRule& r, Floats old, Floats x) const {
    const Floats value = r.next(old, x);
    return half ? from_bfloat16(to_bfloat16(value)) : value;
  }
  template <class Lanes>
  FA_INLINE void write(int64_t j, Floats value, Lanes lanes) const {
    half ? store(static_cast<uint16_t*>(at) + j, value, lanes) : store(static_cast<float*>(at) + j, value, lanes);
  }
  void ask(int64_t j, int64_t ahead) const { ask_for(static_cast<const char*>(at) + j * (half ? 2 : 4), ahead); }
};

// One line, or another run of elements: where its numbers lie.
template <class P, class G>
struct Line {
  P* param;
  const G* grad;
  const float* accumulated;  // null where nothing is
  Moment exp_avg;            // null where it is not looked at
  const float* numerator;    // null where it is not known yet
};

// Where the first moment of some elements lies that is in blocks.
struct Blocks {
  int8_t* units;
  uint8_t* scales;
};

// g; the square of what is not clipped yet is added to `unclipped_sq`.
template <Extras kExtras, class P, class G, class Lanes>
FA_INLINE Floats grad_of(const GradRule& r, const Line<P, G>& line, int64_t j, Lanes lanes,
                         Floats* unclipped_sq = nullptr) {
  Floats g = load(line.grad + j, lanes) * r.scale;
  if (kExtras == kNoExtras) return g;
  if (kExtras == kAllExtras && line.accumulated != nullptr) g = (g + load(line.accumulated + j, lanes)) / r.steps;
  if (unclipped_sq != nullptr) *unclipped_sq += g * g;
  g = clipped(g, r.limit);
  return kExtras == kAllExtras ? g * r.factor : g;
}

// num: g, or its average where momentum is on the gradient.
template <Extras kExtras, class P, class G, class Lanes>
FA_INLINE Floats numerator_of(const MomentRule& r, const Line<P, G>& line, Floats g, int64_t j, Lanes lanes) {
  if constexpr (kExtras == kAllExtras) {
    if (line.numerator != nullptr) return load(line.numerator + j, lanes);
    const Moment& m = line.exp_avg;
    if (m.at != nullptr) return m.next(r, m.read(j, lanes), g) * r.numerator_scale;
  }
  return g;
}

// The same of n elements of a line, from the beginning of a block on, whose average is in blocks.
template <class P, class G>
void numerators_of_blocks(GradRule r, MomentRule moment, Line<P, G> line, Blocks blocks, int64_t n, float* num) {
  for_each_block_of_line(n, [&](int64_t begin, auto lanes) {
    Floats m[kVectorsOfBlock];
    read_block(blocks.units + begin, blocks.scales[begin / kBlock], lanes, m);
    for (int i = 0; i < kVectorsOfBlock; ++i) {
      const auto here = lanes_of_block(lanes, i);
      m[i] = kept(moment.next(m[i], grad_of<kAllExtras>(r, line, begin + i * kLanes, here)), here);
    }
    round_block(nullptr, lanes, m);
    for (int i = 0; i < kVectorsOfBlock; ++i) {
      store(num + begin + i * kLanes, m[i] * moment.numerator_scale, lanes_of_block(lanes, i));
    }
  });
}

// sum[l] = Σ g² of L lines; returns that of all of them before they are clipped.
template <int L, Extras kExtras, class P, class G>
double square_lines(const Line<P, G>* lines, GradRule r, int64_t n, float* sum) {
  double total[L] = {}, unclipped = 0;
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    Floats squares[L] = {}, unclipped_sq{};
    for_each_vector(begin, least(n, begin + kFlush), [&](int64_t j, auto lanes) {
      for (int l = 0; l < L; ++l) {
        const Floats g = grad_of<kExtras>(r, lines[l], j, lanes, &unclipped_sq);
        squares[l] += g * g;
      }
    });
    for (int l = 0; l < L; ++l) total[l] += double(sum_of(squares[l]));
    if (kExtras != kNoExtras) unclipped += double(sum_of(unclipped_sq));
  }
  for (int l = 0; l < L; ++l) {
    sum[l] = float(total[l]);
    if (kExtras == kNoExtras) unclipped += double(sum[l]);
  }
  return unclipped;
}

// As add_lines, of bfloat16 that is only scaled, whose columns are a multiple of two vectors.
template <int L, class P>
void add_bfloat16_lines(const Line<P, uint16_t>* lines, const uint16_t* const* following, const float* inverse,
                        float scale, int64_t n, float* across, float* weighted) {
  for (int64_t j = 0; j < n; j += 2 * kLanes) {
    EveryOther a{}, w{};
    for (int l = 0; l < L; ++l) {
      ask_for_later(following[l] + j, 0);
      const EveryOther g = load_every_other(lines[l].grad + j);
      const Floats first = g.first * scale, second = g.second * scale;
      const Floats of_first = first * first, of_second = second * second;
      a.first += of_first;
      a.second += of_second;
      w.first += of_first * inverse[l];
      w.second += of_second * inverse[l];
    }
    add_every_other(across + j, a);
    if (weighted != nullptr) add_every_other(weighted + j, w);
  }
}

// across += Σ g², weighted += Σ num² / line over L lines, unless that is null. Meanwhile the gradient of the lines that
// follow is asked for, so that memory is at work while these come from the core's cache.
template <int L, Extras kExtras, class P, class G>
void add_lines(const Line<P, G>* lines, const G* const* following, const float* inverse, GradRule r, MomentRule moment,
               int64_t n, float* across, float* weighted) {
  int64_t begin = 0;
  if constexpr (kExtras == kNoExtras && is_bfloat16<G>) {
    begin = n - n % (2 * kLanes);
    add_bfloat16_lines<L>(lines, following, inverse, r.scale, begin, across, weighted);
  }
  for_each_vector(begin, n, [&](int64_t j, auto count) {
    Floats a{}, w{};
    for (int l = 0; l < L; ++l) {
      ask_for_later(following[l] + j, 0);
      const Floats g = grad_of<kExtras>(r, lines[l], j, count);
      const Floats x = numerator_of<kExtras>(moment, lines[l], g, j, count);
      const Floats square = g * g;
      a += square;
      if (weighted != nullptr) w += (kExtras == kAllExtras ? x * x : square) * inverse[l];
    }
    store(across + j, load(across + j, count) + a, count);
    if (weighted != nullptr) store(weighted + j, load(weighted + j, count) + w, count);
  });
}

// Σ x² of a line, with the same bits in whichever loop the line comes by.
struct SquaresOfLine {
  double total = 0;
  Floats sums[4] = {};

  template <int kNumber>
  FA_INLINE void add(Floats x, Known<kNumber>) {
    sums[kNumber] = fused(x, x, sums[kNumber]);
  }
  FA_INLINE void flush() {
    total += double(sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])));
    for (Floats& sum : sums) sum = Floats{};
  }
};

// Σ p² of a line.
template <class P>
double square_param(const P* param, int64_t n) {
  SquaresOfLine squares;
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    for_each_vector_in_turn(begin, least(n, begin + kFlush), [&](int64_t j, auto lanes, auto number) {
      if (number.value * kLanes * sizeof(P) % 64 == 0) ask_for_later(param + j, kAheadOfSquares);
      squares.add(load(param + j, lanes), number);
    });
    squares.flush();
  }
  return squares.total;
}

// Σ u² of L lines under the clamp; where it corrects, less what the identity has counted for it.
template <int L, Extras kExtras, bool kCorrects, class P, class G>
double square_updates(const Line<P, G>* lines, const float* of_line, const float* factor, float most, GradRule r,
                     MomentRule moment, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    Floats measured[L] = {}, counted[L] = {};
    for_each_vector(begin, least(n, begin + kFlush), [&](int64_t j, auto count) {
      const Floats across = load(factor + j, count);
      for (int l = 0; l < L; ++l) {
        ask_for(lines[l].grad + j, kAheadOfBlock);
        const Floats g = grad_of<kExtras>(r, lines[l], j, count);
        const Floats x = numerator_of<kExtras>(moment, lines[l], g, j, count);
        const Floats root = across * of_line[l], u = x * least(root, most);
        measured[l] += kept(u * u, count);
        if (!kCorrects) continue;
        // An infinite factor is that of an all-zero column, which the identity leaves out.
        const Floats without_clamp = x * (root > 3e38f ? Floats{} : root);
        counted[l] += kept(without_clamp * without_clamp, count);
      }
    });
    for (int l = 0; l < L; ++l) total += double(sum_of(measured[l]) - sum_of(counted[l]));
  }
  return total;
}

// 1 / sqrt(v) of the elements of a line: `of_line` times the factor of each, and at most so much.
struct Roots {
  const float* factor;
  float of_line, most;
};

// Where what apply writes beside the parameter lies; null where there is none of a kind.
template <class P>
struct Written {
  P* compensation;
  float* average;
  float* accumulator;
  const float* delta;  // what is subtracted from the parameter, if that is known already
};

// Random bits for a run of elements, if they are wanted, whose first is this one of the parameter.
struct Draws {
  bool wanted;
  RandomKey key;
  uint64_t element;
};

// Calls f(j, lanes, random bits from j = 0 on or null) for n elements. Bits are drawn for few of them at a time: while
// a core waits for memory, it draws those that come next.
template <class F>
FA_INLINE void for_each_drawn(const Draws& draws, int64_t n, F f) {
  RandomBits bits;
  const int64_t whole_blocks = kDrawnTogether - int64_t(draws.element % 8);
  for (int64_t begin = 0, end; begin < n; begin = end) {
    end = !draws.wanted ? n : least(n, begin + (begin == 0 ? whole_blocks : kDrawnTogether));
    const uint16_t* random =
        draws.wanted ? bits.of(draws.key, draws.element + uint64_t(begin), end - begin) - begin : nullptr;
    for_each_vector(begin, end, [&](int64_t j, auto lanes) { f(j, lanes, random); });
  }
}

// The numbers of the second sweep.
struct ApplyRule {
  GradRule grad;
  MomentRule moment;
  MomentumSite site;
  float decay, step;     // p = decay p - step u
  float by_clip, alpha;  // step is their product
  float average_momentum, average_rest;
  bool again;            // it is made good that a step has been another: `correction` in expected.h
};

// What has been stored.
template <class Lanes>
FA_INLINE Floats store_rounded(float* to, Floats value, const uint16_t*, int64_t j, Lanes lanes) {
  store(to + j, value, lanes);
  return value;
}

template <class Lanes>
FA_INLINE Floats store_rounded(uint16_t* to, Floats value, const uint16_t* random, int64_t j, Lanes lanes) {
  const Halves rounded =
      random == nullptr ? to_bfloat16(value) : to_bfloat16_stochastic(value, load_halves(random + j, lanes));
  store_halves(to + j, rounded, lanes);
  return from_bfloat16(rounded);
}

// What enters the first moment: the gradient, the update, or the step.
FA_INLINE Floats averaged_of(const ApplyRule& r, Floats g, Floats root) {
  if (r.site == kMomentumGrad) return g;
  return g * root * (r.site == kMomentumStep ? r.step : r.by_clip);
}

// What is subtracted from the parameter, by the new first moment.
FA_INLINE Floats delta_by(const ApplyRule& r, Floats old, Floats exp_avg, Floats root) {
  if (r.site == kMomentumGrad) return exp_avg * r.moment.numerator_scale * root * r.step;
  if (r.site == kMomentumStep) return r.again ? exp_avg - r.decay * old : exp_avg;
  return exp_avg * r.alpha;
}

template <class Lanes>
FA_INLINE Floats root_of(const Roots& roots, int64_t j, Lanes lanes) {
  return least(load(roots.factor + j, lanes) * roots.of_line, roots.most);
}

// What is subtracted from the parameter; the new first moment is stored on the way.
template <Extras kExtras, class P, class G, class Lanes>
FA_INLINE Floats delta_of(const ApplyRule& r, const Line<P, G>& line, const Roots& roots, int64_t j, Lanes lanes) {
  const Floats g = grad_of<kExtras>(r.grad, line, j, lanes), root = root_of(roots, j, lanes);
  if constexpr (kExtras == kAllExtras) {
    const Moment& m = line.exp_avg;
    if (m.at != nullptr) {
      m.ask(j, kAheadOfLine);
      const Floats old = m.read(j, lanes);
      const Floats next = m.next(r.moment, old, averaged_of(r, g, root));
      m.write(j, next, lanes);
      return delta_by(r, old, next, root);
    }
  }
  return g * root * r.step;
}

// The same of n elements of a line, from the beginning of a block on, whose first moment is in blocks.
template <class P, class G>
void deltas_of_blocks(ApplyRule r, Line<P, G> line, Blocks blocks, Roots roots, int64_t n, float* delta) {
  const bool is_new = r.again && r.site != kMomentumStep;  // rounding it again need not leave it alone
  for_each_block_of_line(n, [&](int64_t begin, auto lanes) {
    Floats root[kVectorsOfBlock], old[kVectorsOfBlock], m[kVectorsOfBlock];
    ask_for(blocks.units + begin, kAheadOfLine);
    read_block(blocks.units + begin, blocks.scales[begin / kBlock], lanes, old);
    for (int i = 0; i < kVectorsOfBlock; ++i) {
      const int64_t j = begin + i * kLanes;
      const auto here = lanes_of_block(lanes, i);
      ask_for(line.grad + j, kAheadOfLine);
      root[i] = root_of(roots, j, here);
      m[i] = kept(r.moment.next(old[i], averaged_of(r, grad_of<kAllExtras>(r.grad, line, j, here), root[i])), here);
    }
    if (!is_new) blocks.scales[begin / kBlock] = round_block(blocks.units + begin, lanes, m);
    for (int i = 0; i < kVectorsOfBlock; ++i) {
      store(delta + begin + i * kLanes, delta_by(r, old[i], m[i], root[i]), lanes_of_block(lanes, i));
    }
  });
}

// What a vector of the parameter was, and is.
struct Param {
  Floats read, written;
};

// p = decay p - delta where nothing else is stored.
template <Extras kExtras, class P, class G, class Lanes>
FA_INLINE Param apply_alone(const ApplyRule& r, const Line<P, G>& line, const Roots& roots, int64_t j, Lanes lanes) {
  ask_for(line.grad + j, kAheadOfLine);
  ask_for(line.param + j, kAheadOfLine);
  const Floats delta = delta_of<kExtras>(r, line, roots, j, lanes), p = load(line.param + j, lanes);
  return {p, store_rounded(line.param, fused(p, Floats{} + r.decay, -delta), nullptr, j, lanes)};
}

// The same of a line, with Σ p² of it before and after.
template <Extras kExtras, class P, class G>
void apply_and_square(const ApplyRule& r, const Line<P, G>& line, const Roots& roots, int64_t n, double* read,
                      double* written) {
  SquaresOfLine before, after;
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    for_each_vector_in_turn(begin, least(n, begin + kFlush), [&](int64_t j, auto lanes, auto number) {
      const Param p = apply_alone<kExtras>(r, line, roots, j, lanes);
      before.add(p.read, number);
      after.add(kept(p.written, lanes), number);
    });
    before.flush(), after.flush();
  }
  *read += before.total;
  *written += after.total;
}

// p = decay p - delta for a run of elements, with all that is stored beside it.
template <Extras kExtras, class P, class G>
void apply_line(ApplyRule r, Line<P, G> line, Written<P> to, Roots roots, Draws draws, int64_t n) {
  for_each_drawn(draws, n, [&](int64_t j, auto lanes, const uint16_t* random) {
    if constexpr (kExtras != kAllExtras) {
      apply_alone<kExtras>(r, line, roots, j, lanes);
    } else {
      ask_for(line.grad + j, kAheadOfLine);
      ask_for(line.param + j, kAheadOfLine);
      const Floats delta =
          to.delta != nullptr ? load(to.delta + j, lanes) : delta_of<kExtras>(r, line, roots, j, lanes);
      const Floats before = load(line.param + j, lanes);
      const Floats p = to.compensation != nullptr ? before + load(to.compensation + j, lanes) : before;
      const Floats value = fused(p, Floats{} + r.decay, -delta);
      const Floats stored = store_rounded(line.param, value, random, j, lanes);
      if (to.compensation != nullptr) {
        ask_for(to.compensation + j, kAheadOfLine);
        store(to.compensation + j, stored - stored == 0.0f ? value - stored : Floats{}, lanes);
      }
      if (to.accumulator != nullptr) store(to.accumulator + j, Floats{}, lanes);
      if (to.average != nullptr) {
        ask_for(to.average + j, kAheadOfLine);
        const Floats old = load(to.average + j, lanes);
        const Floats next = r.again ? fused(Floats{} + r.average_rest, stored - before, old)
                                    : fused(Floats{} + r.average_momentum, old, stored * r.average_rest);
        store(to.average + j, next, lanes);
      }
    }
  });
}

// The numbers that the loops over an unfactored tensor need.
struct VectorRule {
  float scale, beta2, rest, added, most;

  Floats var(Floats old, Floats g) const {
    return fused(Floats{} + rest, fused(g, g, Floats{} + added), old * beta2);  // new_moment of formulas.h
  }
};

// Adds Σ g², Σ p² if that is wanted, and Σ u².
template <bool kWithParam, class P, class G>
void sum_vector(const P* param, const G* grad, const float* var, const VectorRule& r, int64_t n, double* sums) {
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    Floats grad_sq{}, param_sq{}, update_sq{};
    for_each_vector(begin, least(n, begin + kFlush), [&](int64_t j, auto lanes) {
      ask_for(grad + j, kAheadOfLine);
      ask_for(var + j, kAheadOfLine);
      const Floats g = load(grad + j, lanes) * r.scale;
      const Floats u = g * least(inverse_root(r.var(load(var + j, lanes), g), lanes), r.most);
      grad_sq += g * g;
      update_sq += kept(u * u, lanes);
      if (!kWithParam) return;
      ask_for(param + j, kAheadOfLine);
      const Floats p = load(param + j, lanes);
      param_sq += p * p;
    });
    sums[0] += double(sum_of(grad_sq));
    sums[1] += double(sum_of(param_sq));
    sums[2] += double(sum_of(update_sq));
  }
}

// p = decay p - step u, and the new second moments.
template <class P, class G>
void apply_vector(P* param, const G* grad, float* var, const VectorRule& r, float decay, float step,
                  Draws draws, int64_t n) {
  for_each_drawn(draws, n, [&](int64_t j, auto lanes, const uint16_t* random) {
    ask_for(grad + j, kAheadOfLine);
    ask_for(param + j, kAheadOfLine);
    ask_for(var + j, kAheadOfLine);
    const Floats g = load(grad + j, lanes) * r.scale, v = r.var(load(var + j, lanes), g);
    store(var + j, v, lanes);
    const Floats p = load(param + j, lanes), u = g * least(inverse_root(v, lanes), r.most);
    store_rounded(param, fused(p, Floats{} + decay, -(u * step)), random, j, lanes);
  });
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_PLAIN_H
