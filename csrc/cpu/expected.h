// RMS(p) without a read of p: Σ p² of the strips of a matrix, summed up while the last step wrote them. Part of
// kernels.cpp.
//
// Nobody can tell for certain that p has not been written since. So the last sweep sums up what it reads as well, in the
// same order: if that has the same bits, the step was the right one, whatever has happened to p. If not, the parameter is
// moved by the difference of two steps, and all that the step has stored with it. They have been rounded once more then,
// at the size of the step that was taken: where that was too large by far, what it has rounded away is lost. So it is only
// done for who asks for it (param_rms="expected"), and Python warns. Before the sums are trusted they must have been right
// a few times, and many times after a surprise.

#ifndef FUSED_ADAFACTOR_CPU_EXPECTED_H
#define FUSED_ADAFACTOR_CPU_EXPECTED_H

#include "apply.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

constexpr int32_t kTrusted = 2;   // steps in a row in which sums must have been right
constexpr int32_t kWary = -100;   // where that is counted from after a surprise

inline double sum_of_slabs(const Tensor& t, const double* strips) {
  double sum = 0;
  for (int64_t slab = 0; slab < t.slabs; ++slab) sum += sum_of_strips(t, strips, slab);
  return sum;
}

// Before the first sweep: whether p is read in it.
inline void expect(Tensor& t, const Rule& r) {
  ExpectedSums& e = t.expected;
  e.surprised = 0;
  // Where it was not finite, a step cannot be made good.
  e.trusted = sums_param(t, r) && e.known && e.confirmed >= kTrusted && is_finite(sum_of_slabs(t, e.written));
}

// What makes of p = d p - s u, the step that was taken, p = d' p - s' u, the right one: another step. The first moment
// has been taken already, by s where it is that of steps.
inline ApplyRule correction(const ApplyRule& taken, ApplyRule right) {
  const bool of_steps = right.site == kMomentumStep;
  const float ratio = taken.decay == 0.0f ? 1.0f : right.decay / taken.decay;
  right.step -= of_steps ? taken.step : ratio * taken.step;
  right.alpha -= ratio * taken.alpha;
  right.decay = ratio;
  right.moment.beta1 = 1.0f;
  if (!of_steps) right.moment.rest = 0.0f;
  right.again = true;
  return right;
}

inline void correct(Tensor& t, const Rule& r, void* scratch) {
  const double clip = clip_of(t, r);
  const ApplyRule taken = apply_rule(t, r, clip);
  set_alpha(t, r, sum_of_slabs(t, t.expected.read));
  const ApplyRule right = apply_rule(t, r, clip), rule = correction(taken, right);
  if (right.step == taken.step && right.alpha == taken.alpha && right.decay == taken.decay) return;
  for (int64_t strip = 0; strip < t.slabs * t.strips; ++strip) {
    const Matrix<float> m = Sums<float>(t, scratch).matrix(t, matrix_of(t, strip / t.strips));
    apply_and_square_lines(t, r, rule, m, strip_of(t, strip), strip);
  }
  if (t.mirror != nullptr) publish_streamed();
}

// After the last strip: whether the parameter was what the step has taken it for.
inline void confirm(Tensor& t, const Rule& r, void* scratch) {
  ExpectedSums& e = t.expected;
  if (t.skip) return;
  if (!sums_param(t, r)) {  // in this step: it takes over the average
    e.known = 0;
    return;
  }
  const bool surprised = e.surprised != 0;
  if (e.known) e.confirmed = surprised ? kWary : e.confirmed < kTrusted ? e.confirmed + 1 : kTrusted;
  e.known = 1;
  if (surprised && e.trusted) correct(t, r, scratch);
}

}  // namespace
}  // namespace FA_ISA
}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CPU_EXPECTED_H
