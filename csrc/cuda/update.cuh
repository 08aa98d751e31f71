// The update of neighbouring elements: what every sweep computes, whatever the form of the tensor.

#ifndef FUSED_ADAFACTOR_CUDA_UPDATE_CUH
#define FUSED_ADAFACTOR_CUDA_UPDATE_CUH

#include "blocks.cuh"

namespace fused_adafactor {

template <class M, int kElements>
__device__ __forceinline__ M sum_of_squares(const M (&x)[kElements]) {
  M sum = M(0);
#pragma unroll
  for (int i = 0; i < kElements; ++i) sum = fused(x[i], x[i], sum);
  return sum;
}

// First moment after this step, as it will be read back.
template <class T, class M>
__device__ __forceinline__ void new_exp_avg(Shared<M>& shared, Place at, const M (&value)[T::kElements],
                                            M (&exp_avg)[T::kElements]) {
  const Job<M>& job = shared.job;
  const int dtype = int(job.row[f::kExpAvgDtype]);
  const M beta1 = job.numbers[f::kBeta1], rest = job.numbers[f::kRest1];
  if (dtype == kBlocks) {
    read_blocks<T>(job, at, exp_avg);
  } else {
    read<T>(job, f::kExpAvg, f::kStateStrides, dtype, at, exp_avg);
  }
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) exp_avg[i] = new_moment(exp_avg[i], value[i], beta1, rest);
  if (dtype == kBlocks) {
    round_to_blocks<T>(shared, at, exp_avg);
  } else {
#pragma unroll
    for (int i = 0; i < T::kElements; ++i) exp_avg[i] = stored(exp_avg[i], dtype);
  }
}

// An update, and what it leaves behind to be stored.
template <class M, int kElements>
struct Update {
  M value[kElements];    // u before clipping, 0 where there is no element
  M exp_avg[kElements];  // where momentum is on the gradient
};

// num and the new average of g: num is that average where momentum is on the gradient, or g.
template <class T, class M>
__device__ __forceinline__ void numerator(Shared<M>& shared, Place at, const M (&g)[T::kElements],
                                          M (&num)[T::kElements], M (&exp_avg)[T::kElements]) {
  if (T::momentum(shared.job) == kMomentumGrad) {
    new_exp_avg<T>(shared, at, g, exp_avg);
    const M scale = shared.job.numbers[f::kNumeratorScale];
#pragma unroll
    for (int i = 0; i < T::kElements; ++i) num[i] = exp_avg[i] * scale;
  } else {
#pragma unroll
    for (int i = 0; i < T::kElements; ++i) num[i] = g[i];
  }
}

// u before clipping, from g and 1 / sqrt(v). The sweep that applies it stores AMSGrad's maxima here, where they are
// known: no register has to keep them.
template <class T, bool kApplies = false, class M>
__device__ __forceinline__ void update_of(Shared<M>& shared, Place at, const M (&g)[T::kElements],
                                          const M (&inverse_v)[T::kElements], Update<M, T::kElements>& u) {
  const Job<M>& job = shared.job;
  numerator<T>(shared, at, g, u.value, u.exp_avg);
  const M limit = job.numbers[f::kMostRoot];
  if (T::has(job, f::kAmsgradSwitch)) {
    const int dtype = int(job.row[f::kMomentDtype]);
    const M scale = job.numbers[f::kAmsgradScale], eps1 = job.numbers[f::kEps1];
    M var_max[T::kElements];
    read<T>(job, f::kVarMax, f::kStateStrides, dtype, at, var_max);
#pragma unroll
    for (int i = 0; i < T::kElements; ++i) {
      const M inverse = at_most(inverse_v[i], limit);
      // To nearest: a maximum of values that are rounded at random would keep every one that came out too large.
      var_max[i] = stored(new_maximum(M(1) / (inverse * inverse), var_max[i]), dtype);
      u.value[i] = u.value[i] / (M(sqrt(var_max[i] * scale)) + eps1);
    }
    if constexpr (kApplies) write<T>(job, f::kVarMax, f::kStateStrides, dtype, at, var_max);
  } else {
#pragma unroll
    for (int i = 0; i < T::kElements; ++i) u.value[i] *= at_most(inverse_v[i], limit);
  }
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) u.value[i] = at.count > 0 ? u.value[i] : M(0);
}

// Unfactored second moments after this step, as they will be read back. There is no view: elements are numbered
// row-major.
template <class T, class M>
__device__ __forceinline__ void new_var(const Job<M>& job, Place at, const M (&g)[T::kElements],
                                        M (&var)[T::kElements]) {
  const int dtype = int(job.row[f::kMomentDtype]);
  read<T>(job, f::kVar, f::kStateStrides, dtype, at, var);
  const M added = job.numbers[f::kAdded], beta2 = job.numbers[f::kBeta2], rest = job.numbers[f::kRest2];
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) var[i] = new_moment(var[i], fused(g[i], g[i], added), beta2, rest);
  if (dtype == kBfloat16) {
    round_block<T>(job, f::kVarStream, job.has(f::kSplitSwitch) ? element_of<T>(job, at.k) : uint64_t(at.k), var);
  } else {
#pragma unroll
    for (int i = 0; i < T::kElements; ++i) var[i] = stored(var[i], dtype);
  }
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_UPDATE_CUH
