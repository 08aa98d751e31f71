// The third sweep, where Σ u² takes one: it reads g once all sums are known, and writes nothing.

#ifndef FUSED_ADAFACTOR_CUDA_THIRD_SWEEP_CUH
#define FUSED_ADAFACTOR_CUDA_THIRD_SWEEP_CUH

#include "factors.cuh"
#include "tiny.cuh"
#include "walk.cuh"

namespace fused_adafactor {

// 1 / sqrt(line / norm) of a line.
template <class M>
__device__ __forceinline__ M line_factor(const Job<M>& job, int64_t line, int64_t matrix) {
  const double* record = job.template in_scratch<double>(f::kMatrices) + matrix * f::kMatrixFields;
  return inverse_root(job.template in_scratch<M>(f::kLines)[line] / M(record[f::kMatrixNorm]));
}

// 1 / sqrt(v) of neighbours in a line, which has a factor of its own.
template <class T, class M>
__device__ __forceinline__ void inverse_roots(const Job<M>& job, M factor, int64_t matrix, int64_t column, bool here,
                                              M (&inverse_v)[T::kElements]) {
  const int64_t place = matrix * job.row[f::kCols] + column;
  const M* factors = job.template in_scratch<M>(f::kFactor);
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) inverse_v[i] = M(0);
  if (!here) return;
  if constexpr (T::kElements == 1) {
    inverse_v[0] = factors[place];
  } else {
    read_vector<From::kGlobal>(factors, DtypeOf<M>::value, place, inverse_v);
  }
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) inverse_v[i] *= factor;
}

// Σ u² of those lines of a slab for which it is not known, less what was counted for them.
template <class T, class M>
__device__ __noinline__ void measure_lines(int unit) {
  Shared<M>& shared = shared_of<M>();
  constexpr int N = T::kElements;
  const Job<M>& job = shared.job;
  const int64_t chunks = job.row[f::kChunks], rows = job.row[f::kRows], cols = job.row[f::kCols];
  const Lines lines = lines_of(job, unit / chunks);
  const Range columns = columns_of(job, unit % chunks);
  const M limit = job.numbers[f::kMostRoot];
  const int together = threads_of_block<T>(job);
  double total = 0;
  for (int64_t first = lines.begin; first < lines.end; first += lines.block) {
    const int64_t matrix = first / rows;
    const double* record = job.template in_scratch<double>(f::kMatrices) + matrix * f::kMatrixFields;
    const int clamp = int(record[f::kMatrixClamp]);
    const M largest = M(record[f::kMatrixLargest]);
    if (clamp != f::kEveryLine && clamp != f::kSomeLines) continue;
    const bool corrects = clamp == f::kSomeLines;
    for (Walk<T> walk(first, least(first + lines.block, lines.end), columns, together); walk.round(); walk.next()) {
      bool here = walk.here();
      const M line_var = here ? job.template in_scratch<M>(f::kLines)[walk.line()] : M(1);
      const M factor = here ? line_factor(job, walk.line(), matrix) : M(1);
      if (corrects) here = here && line_var > M(0) && factor * largest > limit;
      if (!__any_sync(kAllLanes, here)) continue;
      const Place at = {walk.place(cols).k, here ? N : 0};
      M g[N], inverse_v[N];
      read_grad<T>(job, job.factor, at, g);
      inverse_roots<T>(job, factor, matrix, walk.column(), here, inverse_v);
      Update<M, N> u;
      update_of<T>(shared, at, g, inverse_v, u);
      total += double(sum_of_squares(u.value));
      if (!corrects) continue;
      M num[N];
      numerator<T>(shared, at, g, num, u.exp_avg);
#pragma unroll
      for (int i = 0; i < N; ++i) num[i] = here && is_finite(inverse_v[i]) ? num[i] * inverse_v[i] : M(0);
      total -= double(sum_of_squares(num));  // the identity has left out all-zero columns
    }
  }
  total = of_block<Sum>(total, shared.reduced);
  if (is_first_thread()) {
    job.template in_scratch<double>(f::kSums)[unit * f::kUnitSums + f::kUnitUpdateSq] = total;
  }
}

// Σ u² of elements that have no lines, where the norm to clip by is known only now.
template <class T, class M>
__device__ __noinline__ void measure_flat(int unit) {
  Shared<M>& shared = shared_of<M>();
  constexpr int N = T::kElements;
  const Job<M>& job = shared.job;
  double total = 0;
  for (FlatWalk<T> walk(elements_of(job, unit)); walk.round(); walk.next()) {
    const Place at = walk.place();
    M g[N], inverse_v[N];
    read_grad<T>(job, job.factor, at, g);
    new_var<T>(job, at, g, inverse_v);
#pragma unroll
    for (int i = 0; i < N; ++i) inverse_v[i] = inverse_root(inverse_v[i]);
    Update<M, N> u;
    update_of<T>(shared, at, g, inverse_v, u);
    total += double(sum_of_squares(u.value));
  }
  total = of_block<Sum>(total, shared.reduced);
  if (is_first_thread()) {
    job.template in_scratch<double>(f::kSums)[unit * f::kUnitSums + f::kUnitUpdateSq] = total;
  }
}

// Gradients of tiny matrices, clipped, in shared memory, and the factors of these matrices.
template <class M>
__device__ __forceinline__ void read_tiny(Shared<M>& shared, const TinyWalk<M>& walk) {
  for (int first = 0; first < walk.count; first += kThreads) {
    const Place at = walk.place(first);
    M g[1];
    read_grad<TinyMatrices>(shared.job, shared.job.factor, at, g);
    if (at.count > 0) shared.tiny.grad[first + thread_number()] = g[0];
  }
  tiny_factors(shared, walk);
}

template <class M>
__device__ __noinline__ void measure_tiny(int unit) {
  Shared<M>& shared = shared_of<M>();
  const Job<M>& job = shared.job;
  double total = 0;
  for (TinyWalk<M> walk(job, elements_of(job, unit)); walk.round(); walk.next()) {
    read_tiny(shared, walk);
    for (int first = 0; first < walk.count; first += kThreads) {
      const Place at = walk.place(first);
      const int element = first + thread_number();
      const M g[1] = {at.count > 0 ? shared.tiny.grad[element] : M(0)};
      const M inverse_v[1] = {at.count > 0 ? tiny_inverse_root(shared, walk, element) : M(0)};
      Update<M, 1> u;
      update_of<TinyMatrices>(shared, at, g, inverse_v, u);
      total += double(u.value[0] * u.value[0]);
    }
  }
  total = of_block<Sum>(total, shared.reduced);
  if (is_first_thread()) {
    job.template in_scratch<double>(f::kSums)[unit * f::kUnitSums + f::kUnitUpdateSq] = total;
  }
}

// The third sweep of a unit, whatever its form.
template <class M>
__device__ __forceinline__ void measure_unit(Shared<M>& shared, int unit) {
  const Job<M>& job = shared.job;
  if (job.row[f::kForm] == f::kTiny) {
    measure_tiny<M>(unit);
  } else if (job.row[f::kForm] == f::kUnfactored) {
    with_alignment(job, [&](auto traits) { measure_flat<decltype(traits), M>(unit); });
  } else {
    with_alignment(job, [&](auto traits) { measure_lines<decltype(traits), M>(unit); });
  }
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_THIRD_SWEEP_CUH
