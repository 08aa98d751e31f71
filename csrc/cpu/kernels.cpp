// The phases of the rule on slabs of lines. Compiled once per instruction set, in a namespace of its own (FA_ISA);
// the loops are plain enough for the compiler to vectorise, and sums are taken in an order that depends on the shape
// alone, so the bits do not depend on the number of threads.
//
// A line is a row of the matrix view, or a column of it where columns are contiguous and rows are not (Tensor::swapped).
// "line" statistics have one value per line, "cross" statistics one per position in a line. The second moment of a line
// is final as soon as the line has been read; the two-sweep identity (docs/rule.md) rests on that.

#include "apply.h"
#include "expected.h"
#include "kernels.h"
#include "statistics.h"

namespace fused_adafactor {
namespace FA_ISA {
namespace {

#define FA_BY_MATH(t, function, ...) \
  ((t).math_dtype == kFloat64 ? function<double>(__VA_ARGS__) : function<float>(__VA_ARGS__))

void stats(Tensor& t, const Rule& r, int64_t slab, void* scratch, ThreadBuffers& b) {
  FA_BY_MATH(t, stats_in, t, r, slab, scratch, b);
}
void merge(Tensor& t, int64_t part, void* scratch) { FA_BY_MATH(t, merge_in, t, part, scratch); }
void finalize(Tensor& t, const Rule& r, void* scratch) { FA_BY_MATH(t, finalize_in, t, r, scratch); }
void update_rms(Tensor& t, const Rule& r, int64_t slab, void* scratch, ThreadBuffers& b) {
  FA_BY_MATH(t, update_rms_in, t, r, slab, scratch, b);
}
void measure(Tensor& t, const Rule& r, void* scratch) { FA_BY_MATH(t, measure_in, t, r, scratch); }
void share(Tensor& t, const Rule& r, void* scratch, ThreadBuffers& b) { FA_BY_MATH(t, share_in, t, r, scratch, b); }
void settle(Tensor& t) { FA_BY_MATH(t, settle_in, t); }
void apply(Tensor& t, const Rule& r, int64_t strip, void* scratch, ThreadBuffers& b) {
  FA_BY_MATH(t, apply_in, t, r, strip, scratch, b);
  if (t.mirror != nullptr) publish_streamed();
}
void accumulate(Tensor& t, const Rule& r, int64_t slab, ThreadBuffers& b) {
  FA_BY_MATH(t, accumulate_in, t, r, slab, b);
  if (t.mirror != nullptr) publish_streamed();
}
void average(Tensor& t, const Rule& r, int64_t slab, ThreadBuffers& b) {
  FA_BY_MATH(t, average_in, t, r, slab, b);
  if (t.mirror != nullptr) publish_streamed();
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {expect, stats, merge, finalize, update_rms, measure, share, settle, apply, confirm, accumulate,
                         average};

}  // namespace FA_ISA
}  // namespace fused_adafactor
