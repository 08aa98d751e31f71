// The first sweep: sums over the gradient and the parameter.

#ifndef FUSED_ADAFACTOR_CUDA_FIRST_SWEEP_CUH
#define FUSED_ADAFACTOR_CUDA_FIRST_SWEEP_CUH

#include "loose_lines.cuh"
#include "tiny.cuh"

namespace fused_adafactor {

// Sums over the elements of a slab of an unfactored tensor.
template <class T, class M>
__device__ __noinline__ void sum_flat(int unit) {
  Shared<M>& shared = shared_of<M>();
  const Job<M>& job = shared.job;
  const bool measures = T::has(job, f::kMeasuresSwitch) && !T::has(job, f::kNormClippedSwitch);
  const bool param_rms = T::has(job, f::kParamRmsSwitch);
  double grad_sq = 0, param_sq = 0, update_sq = 0;
  for (FlatWalk<T> walk(elements_of(job, unit)); walk.round(); walk.next()) {
    const Place at = walk.place();
    M g[T::kElements];
    read_unclipped<T>(job, at, g);
    grad_sq += double(sum_of_squares(g));
    if (param_rms) {
      M p[T::kElements];
      read<T>(job, f::kParam, f::kStrides, T::param_dtype(job), at, p);
      param_sq += double(sum_of_squares(p));
    }
    if (!measures) continue;
    clip<T>(job, M(1), g);
    M inverse_v[T::kElements];
    new_var<T>(job, at, g, inverse_v);
#pragma unroll
    for (int i = 0; i < T::kElements; ++i) inverse_v[i] = inverse_root(inverse_v[i]);
    Update<M, T::kElements> u;
    update_of<T>(shared, at, g, inverse_v, u);
    update_sq += double(sum_of_squares(u.value));
  }
  store_sums(shared, unit, grad_sq, param_sq, update_sq);
}

// The same of tiny matrices.
template <class M>
__device__ __noinline__ void sum_tiny(int unit) {
  Shared<M>& shared = shared_of<M>();
  typedef TinyMatrices T;
  const Job<M>& job = shared.job;
  const bool measures = job.has(f::kMeasuresSwitch) && !job.has(f::kNormClippedSwitch);
  const bool param_rms = job.has(f::kParamRmsSwitch);
  double grad_sq = 0, param_sq = 0, update_sq = 0;
  for (TinyWalk<M> walk(job, elements_of(job, unit)); walk.round(); walk.next()) {
    for (int first = 0; first < walk.count; first += kThreads) {
      const Place at = walk.place(first);
      M g[1], p[1];
      read_unclipped<T>(job, at, g);
      grad_sq += double(g[0] * g[0]);
      clip<T>(job, M(1), g);
      if (at.count > 0) shared.tiny.grad[first + thread_number()] = g[0];
      if (!param_rms) continue;
      read<T>(job, f::kParam, f::kStrides, T::param_dtype(job), at, p);
      param_sq += double(p[0] * p[0]);
    }
    if (!measures) continue;
    tiny_factors(shared, walk);
    for (int first = 0; first < walk.count; first += kThreads) {
      const Place at = walk.place(first);
      const int element = first + thread_number();
      const M g[1] = {at.count > 0 ? shared.tiny.grad[element] : M(0)};
      const M inverse_v[1] = {at.count > 0 ? tiny_inverse_root(shared, walk, element) : M(0)};
      Update<M, 1> u;
      update_of<T>(shared, at, g, inverse_v, u);
      update_sq += double(u.value[0] * u.value[0]);
    }
  }
  store_sums(shared, unit, grad_sq, param_sq, update_sq);
}

// The sums of a unit, whatever its form.
template <class M>
__device__ __forceinline__ void sum_unit(Shared<M>& shared, int unit) {
  const Job<M>& job = shared.job;
  if (job.row[f::kForm] == f::kTiny) return sum_tiny<M>(unit);
  if (job.row[f::kForm] == f::kUnfactored) {
    return with_alignment(job, [&](auto traits) { sum_flat<decltype(traits), M>(unit); });
  }
  with_traits<8>(job, [&](auto traits) {
    typedef decltype(traits) T;
    if constexpr (T::kElements == 1) {
      sum_lines_loosely<M>(unit);
    } else if (job.row[f::kChunk] <= kWidest / 2) {
      sum_lines<T, 1, 2, M>(unit);
    } else {
      sum_lines<T, 2, 1, M>(unit);
    }
  });
}

template <class M>
__device__ __forceinline__ void sum_chunk_of(Shared<M>& shared, int unit) {
  with_traits<8>(shared.job, [&](auto traits) { sum_chunk<decltype(traits), M>(unit); });
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_FIRST_SWEEP_CUH
