// Between the sweeps: what is known of matrices becomes the step size and RMS(u), here or over all processes.

#ifndef FUSED_ADAFACTOR_CUDA_FACTORS_CUH
#define FUSED_ADAFACTOR_CUDA_FACTORS_CUH

#include "merging.cuh"

namespace fused_adafactor {

template <class M>
__device__ __forceinline__ double sum_of_units(Shared<M>& shared, int field) {
  const double* sums = shared.job.template in_scratch<double>(f::kSums) + field;
  double total = 0;
  for (int64_t unit = thread_number(); unit < shared.job.row[f::kUnits]; unit += kThreads) {
    total += sums[unit * f::kUnitSums];
  }
  return of_block<Sum>(total, shared.reduced);
}

// What is known of a matrix once its parts are.
struct MatrixSums {
  double share = 0, grad_sq = 0, line_sum = 0, cross_sum = 0;
  double line_min = kInfinity, line_max = 0, cross_min = kInfinity, cross_max = 0;
};

// Σ row_var of a matrix whose rows are on several processes: it was summed up, or follows from two sums, in which it is
// linear.
template <class M>
__device__ __forceinline__ double sum_of_split_rows(const Job<M>& job, int64_t matrix) {
  const double sum = double(job.in_message(f::kSharedRowVarSum)[matrix]);
  const M* squares = job.in_message(f::kSharedRowSqSum);
  if (squares == nullptr) return sum;
  const double factor = double(job.factor), cols = double(job.row[f::kWholeCols]);
  const double grad_sq = double(squares[matrix]) * factor * factor +
                         double(job.row[f::kWholeRows]) * cols * job.rule[f::kAdded];
  return job.rule[f::kBeta2] * sum + job.rule[f::kRest2] * (job.rule[f::kSumMoments] > 0 ? grad_sq : grad_sq / cols);
}

// Mean of row_var, or its sum; rows are the lines unless the matrix lies the other way.
template <class M>
__device__ __forceinline__ M norm_of(const Job<M>& job, int64_t matrix, const MatrixSums& sums) {
  const bool swapped = job.row[f::kSwapped] != 0;
  double total = swapped ? sums.cross_sum : sums.line_sum;
  if (job.in_message(f::kSharedRowVarSum) != nullptr) total = sum_of_split_rows(job, matrix);
  const double count = double(job.row[swapped ? f::kWholeCols : f::kWholeRows]);
  const M mean = M(job.rule[f::kSumMoments] > 0 ? total : total / count), smallest = job.numbers[f::kLeastNorm];
  return mean < smallest ? smallest : mean;
}

// How far the clamp reaches, from the smallest and the largest second moments; a line of zeros is never clamped. Every
// line is measured, as if it were clamped, where the identity cannot be trusted or does not hold.
template <class M>
__device__ __forceinline__ f::Clamp clamp_of(const Job<M>& job, const MatrixSums& sums, M norm, double known) {
  const M limit = job.numbers[f::kMostRoot];
  // What is known is of all rows, so nothing that one process finds out can be put beside it.
  if (job.in_message(f::kSharedWeighted) != nullptr) return f::kNowhere;
  // The identity does not hold, or the sums were taken before their time; or there are no bounds.
  if (!job.has(f::kWeighsSwitch) || !is_finite(norm)) return f::kEveryLine;
  const M smallest_line = inverse_root(M(sums.line_max) / norm), largest_line = inverse_root(M(sums.line_min) / norm);
  const M smallest_factor = inverse_root(M(sums.cross_max)), largest_factor = inverse_root(M(sums.cross_min));
  const M largest = largest_line * largest_factor;
  f::Clamp clamp;
  if (limit < M(INFINITY)) {
    // What has been counted without the clamp is taken off again. Its rounding must be small.
    const double threshold = job.rule[f::kClipThreshold];
    const double numel = double(job.row[f::kRows] * job.row[f::kCols]);
    const bool trusted = known <= 16.0 * numel * threshold * threshold;
    clamp = smallest_line * largest_factor <= limit && trusted ? f::kSomeLines : f::kEveryLine;
    if (smallest_line * smallest_factor >= limit) {
      clamp = job.momentum() != kMomentumGrad ? f::kEverywhere : f::kEveryLine;  // else Σ num² is not known
    }
    if (largest <= limit) clamp = f::kNowhere;
    if (!is_finite(largest_line)) clamp = f::kEveryLine;
  } else {
    // Where a root is so large, g² can be lost below all range while u² counts.
    clamp = largest > job.numbers[f::kLossless] ? f::kEveryLine : f::kNowhere;
  }
  return clamp == f::kNowhere && !is_finite(known) ? f::kEveryLine : clamp;
}

// What is known of Σ u²; `unknown` tells whether any of it is not.
template <class M>
__device__ __forceinline__ double finalize_matrices(Shared<M>& shared, bool& unknown) {
  const Job<M>& job = shared.job;
  const int64_t batch = job.row[f::kBatch], parts = job.row[f::kParts];
  // Some lanes of a warp take a matrix.
  const int lanes = power_of_2(least(parts, kWarp)), together = kThreads / lanes, lane = thread_number() % lanes;
  double known = 0, missing = 0;
  for (int64_t first = 0; first < batch; first += together) {
    const int64_t matrix = first + thread_number() / lanes;
    MatrixSums sums;
    for (int64_t part = lane; part < parts && matrix < batch; part += lanes) {
      const double* record = record_of_part(job, matrix, part);
      sums.share += record[f::kPartShare];
      sums.grad_sq += record[f::kPartGradSq];
      sums.line_sum += record[f::kPartLineSum];
      sums.cross_sum += record[f::kPartCrossSum];
      sums.line_min = Smallest::of(sums.line_min, record[f::kPartLineMin]);
      sums.line_max = Largest::of(sums.line_max, record[f::kPartLineMax]);
      sums.cross_min = Smallest::of(sums.cross_min, record[f::kPartCrossMin]);
      sums.cross_max = Largest::of(sums.cross_max, record[f::kPartCrossMax]);
    }
    sums.share = of_lanes<Sum>(sums.share, lanes);
    sums.grad_sq = of_lanes<Sum>(sums.grad_sq, lanes);
    sums.line_sum = of_lanes<Sum>(sums.line_sum, lanes);
    sums.cross_sum = of_lanes<Sum>(sums.cross_sum, lanes);
    sums.line_min = of_lanes<Smallest>(sums.line_min, lanes);
    sums.line_max = of_lanes<Largest>(sums.line_max, lanes);
    sums.cross_min = of_lanes<Smallest>(sums.cross_min, lanes);
    sums.cross_max = of_lanes<Largest>(sums.cross_max, lanes);
    if (lane != 0 || matrix >= batch) continue;
    const M norm = norm_of(job, matrix, sums);
    double value = sums.share * double(norm);
    const f::Clamp clamp = clamp_of(job, sums, norm, value);
    const double limit = double(job.numbers[f::kMostRoot]);
    if (clamp == f::kEverywhere) value = sums.grad_sq * limit * limit;
    if (clamp != f::kEveryLine) known += value;
    if (clamp == f::kEveryLine || clamp == f::kSomeLines) missing = 1;
    double* record = job.template in_scratch<double>(f::kMatrices) + matrix * f::kMatrixFields;
    record[f::kMatrixNorm] = double(norm);
    record[f::kMatrixClamp] = double(clamp);
    record[f::kMatrixLargest] = double(inverse_root(M(sums.cross_min)));
  }
  unknown = of_block<Largest>(missing, shared.reduced) > 0;
  return of_block<Sum>(known, shared.reduced);
}

// Whether the sums of all processes have come.
template <class M>
__device__ __forceinline__ bool has_message(const Shared<M>& shared) {
  return shared.launch.joined != 0 && shared.job.has(f::kSplitSwitch);
}

// Whether Σ u² of all processes has, with the first of them: of the tensor's own sums nothing is left to be found out.
template <class M>
__device__ __forceinline__ bool knows_update(const Shared<M>& shared) {
  return has_message(shared) && shared.job.in_message(f::kSharedUpdateSq) != nullptr;
}

// A sum over the units of a tensor, or over all processes once it has come; every thread gets it.
template <class M>
__device__ __forceinline__ double sum_of_all(Shared<M>& shared, int of_unit, int in_message) {
  if (has_message(shared)) return double(*shared.job.in_message(in_message));
  return sum_of_units(shared, of_unit);
}

// RMS(u), and what follows from it.
template <class M>
__device__ __forceinline__ void set_clip(const Job<M>& job, double update_sq) {
  const double update_rms = sqrt(update_sq / double(job.row[f::kWholeNumel]));
  job.outcome[f::kUpdateRms] = update_rms;
  const double ratio = update_rms / job.rule[f::kClipThreshold];
  job.outcome[f::kByClip] = 1.0 / (ratio < 1.0 ? 1.0 : ratio);  // so that NaN stays
}

// What is known of Σ u²: it goes into the next message, or makes RMS(u) where that is all of it.
template <class M>
__device__ __forceinline__ void tell(const Shared<M>& shared, double update_sq) {
  const Job<M>& job = shared.job;
  M* message = job.in_message(has_message(shared) ? f::kSharedMeasuredSq : f::kSharedUpdateSq);
  if (message == nullptr) return set_clip(job, update_sq);
  *message = job.row[f::kSaysUpdateSq] != 0 ? M(update_sq) : M(0);
}

// Norms, clamps, what is known of Σ u², the step size, and whether the tensor is skipped. RMS(u) is unknown where it is
// wanted and the third sweep has to find it out. Of a part whose sums have not come, only Σ u² is of account.
template <class M>
__device__ __noinline__ void finalize() {
  Shared<M>& shared = shared_of<M>();
  const Job<M>& job = shared.job;
  const double grad_sq = sum_of_all(shared, f::kUnitGradSq, f::kSharedGradSq);
  double update_sq = 0;
  bool unknown = false;
  if (knows_update(shared)) {
    update_sq = double(*job.in_message(f::kSharedUpdateSq));
  } else if (job.row[f::kForm] == f::kFactored) {
    update_sq = finalize_matrices(shared, unknown);
  } else if (job.has(f::kNormClippedSwitch)) {
    unknown = true;  // nothing has been taken of a clipped gradient
  } else {
    update_sq = sum_of_units(shared, f::kUnitUpdateSq);
  }
  double param_sq = 0;
  if (job.has(f::kParamRmsSwitch)) param_sq = sum_of_all(shared, f::kUnitParamSq, f::kSharedParamSq);
  const bool measures = job.has(f::kMeasuresSwitch);
  if (!measures) unknown = false;
  if (is_first_thread()) {
    job.outcome[f::kGradSq] = grad_sq;
    if (job.has(f::kSkipsSwitch) && !is_finite(M(grad_sq))) *job.skip = 1;
    double alpha = job.rule[f::kRho];
    const double eps2 = job.rule[f::kEps2], decay = job.rule[f::kDecay];
    if (job.has(f::kParamRmsSwitch)) {
      const double param_rms = sqrt(param_sq / double(job.row[f::kWholeNumel]));
      job.outcome[f::kParamRms] = param_rms;
      const double scale = fabs(param_rms * (1.0 - (job.rule[f::kDecayBeforeRms] > 0 ? decay : 0.0)));
      if (!(eps2 < 0)) alpha = (scale < eps2 ? eps2 : scale) * alpha;
    }
    job.outcome[f::kAlpha] = alpha;
    job.outcome[f::kDecayed] = 1.0 - (decay + job.rule[f::kDecayOfAlpha] * alpha);
    job.outcome[f::kUpdateSq] = update_sq;
    job.outcome[f::kByClip] = 1.0;
    if (measures && !unknown) tell(shared, update_sq);
    job.outcome[f::kUnknown] = unknown ? 1.0 : 0.0;
  }
}

// RMS(u), or what is here of Σ u², once the third sweep is over.
template <class M>
__device__ __noinline__ void measure() {
  Shared<M>& shared = shared_of<M>();
  const double rest = sum_of_units(shared, f::kUnitUpdateSq);
  if (!is_first_thread()) return;
  const double update_sq = shared.job.outcome[f::kUpdateSq] + rest;
  tell(shared, update_sq < 0 ? 0.0 : update_sq);  // so that NaN stays
}

// RMS(u) from the second message, where that is what Σ u² has come with.
template <class M>
__device__ __noinline__ void settle() {
  const Job<M>& job = shared_of<M>().job;
  const M* update_sq = job.in_message(f::kSharedMeasuredSq);
  if (is_first_thread() && update_sq != nullptr) set_clip(job, double(*update_sq));
}

// Σ row_var of each matrix, or of the old ones and Σ g², into the message.
template <class M>
__device__ __forceinline__ void put_matrices(const Job<M>& job) {
  const int64_t batch = job.row[f::kBatch], parts = job.row[f::kParts];
  M* const row_var_sum = job.in_message(f::kSharedRowVarSum);
  M* const row_sq_sum = job.in_message(f::kSharedRowSqSum);
  if (row_var_sum == nullptr) return;
  // As in `finalize_matrices`.
  const int lanes = power_of_2(least(parts, kWarp)), together = kThreads / lanes, lane = thread_number() % lanes;
  for (int64_t first = 0; first < batch; first += together) {
    const int64_t matrix = first + thread_number() / lanes;
    double line_sum = 0, grad_sq = 0;
    for (int64_t part = lane; part < parts && matrix < batch; part += lanes) {
      const double* record = record_of_part(job, matrix, part);
      line_sum += record[f::kPartLineSum];
      grad_sq += record[f::kPartGradSq];
    }
    line_sum = of_lanes<Sum>(line_sum, lanes);
    grad_sq = of_lanes<Sum>(grad_sq, lanes);
    if (lane != 0 || matrix >= batch) continue;
    row_var_sum[matrix] = M(line_sum);
    if (row_sq_sum != nullptr) row_sq_sum[matrix] = M(grad_sq);
  }
}

// What the first sweep knows of a tensor as a whole, where something waits for it: the norm of all gradients, or a
// message.
template <class M>
__device__ __noinline__ void total() {
  Shared<M>& shared = shared_of<M>();
  const Job<M>& job = shared.job;
  const double grad_sq = sum_of_units(shared, f::kUnitGradSq), param_sq = sum_of_units(shared, f::kUnitParamSq);
  if (is_first_thread()) {
    job.outcome[f::kGradSq] = grad_sq;
    M* const sent_grad_sq = job.in_message(f::kSharedGradSq);
    M* const sent_param_sq = job.in_message(f::kSharedParamSq);
    if (sent_grad_sq != nullptr) *sent_grad_sq = M(grad_sq);
    if (sent_param_sq != nullptr) *sent_param_sq = M(param_sq);
  }
  put_matrices(job);
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_FACTORS_CUH
