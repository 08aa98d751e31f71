// Between the sweeps: the sums of slabs become factors, and these the step size and RMS(u).

#ifndef FUSED_ADAFACTOR_CUDA_FACTORS_CUH
#define FUSED_ADAFACTOR_CUDA_FACTORS_CUH

#include "memory.cuh"
#include "shared.cuh"

namespace fused_adafactor {

constexpr double kInfinity = INFINITY;

template <class M>
__device__ __forceinline__ bool is_finite(M x) {
  return x - x == M(0);
}

template <class M>
__device__ __forceinline__ double* record_of_part(const Job<M>& job, int64_t matrix, int64_t part) {
  return job.template in_scratch<double>(f::kPartSums) + (matrix * job.row[f::kParts] + part) * f::kPartFields;
}

template <class M>
__device__ __forceinline__ double sum_of_units(Shared<M>& shared, int field) {
  const double* sums = shared.job.template in_scratch<double>(f::kSums) + field;
  double total = 0;
  for (int64_t unit = thread_number(); unit < shared.job.row[f::kUnits]; unit += kThreads) {
    total += sums[unit * f::kUnitSums];
  }
  return of_block<Sum>(total, shared.reduced);
}

// What the second moments of some lines of a matrix add up to.
template <class M>
__device__ __forceinline__ void finish_lines(Shared<M>& shared, int64_t matrix, int64_t part, bool norm_clipped) {
  const Job<M>& job = shared.job;
  const int64_t rows = job.row[f::kRows], length = job.row[f::kPartLines];
  const int64_t begin = least(part * length, rows), end = least(begin + length, rows);
  M* lines = job.template in_scratch<M>(f::kLines) + matrix * rows;
  double total = 0, smallest = kInfinity, largest = 0;
  for (int64_t line = begin + thread_number(); line < end; line += kThreads) {
    M x = lines[line];
    if (norm_clipped) {  // what was summed is the raw gradient: its norm was not known yet
      const int64_t element = matrix * rows + line;
      const void* line_var = reinterpret_cast<const void*>(job.row[f::kLineVar]);
      const M old = read_one<M>(line_var, int(job.row[f::kMomentDtype]), element);
      const uint32_t random = random_of_factor(job, element, false);
      x = new_factor(job, old, x * (job.factor * job.factor), job.row[f::kCols], random);
      lines[line] = x;
    }
    total += double(x);
    if (x > M(0) && double(x) < smallest) smallest = double(x);
    if (double(x) > largest) largest = double(x);
  }
  total = of_block<Sum>(total, shared.reduced);
  smallest = of_block<Smallest>(smallest, shared.reduced);
  largest = of_block<Largest>(largest, shared.reduced);
  if (!is_first_thread()) return;
  double* record = record_of_part(job, matrix, part);
  record[f::kPartLineSum] = total;
  record[f::kPartLineMin] = smallest;
  record[f::kPartLineMax] = largest;
}

// Add up the sums of the slabs of a matrix, of some columns, in an order that is always the same; new second moments
// across the lines, and what is known of them.
template <class M>
__device__ __noinline__ void merge(int item) {
  Shared<M>& shared = shared_of<M>();
  constexpr int kSet = 128;  // columns at a time: a warp takes every so manieth slab
  const Job<M>& job = shared.job;
  const int64_t parts = job.row[f::kParts], matrix = item / parts, part = item % parts;
  const int64_t cols = job.row[f::kCols], rows = job.row[f::kRows], slabs = job.row[f::kSlabsPerMatrix];
  const int64_t length = (cols + parts - 1) / parts, begin = least(part * length, cols);
  const int64_t end = least(begin + length, cols);
  const M* partial = job.template in_scratch<M>(f::kPartial) + 2 * matrix * slabs * cols;
  const bool weighs = job.has(f::kWeighsSwitch), norm_clipped = job.has(f::kNormClippedSwitch);
  const int thread = thread_number(), warp = thread / kWarp, lane = thread % kWarp;
  double shares = 0, cross_sum = 0, cross_min = kInfinity, cross_max = 0, grad_sq = 0;
  for (int64_t first = begin; first < end; first += kSet) {
    M own[2][kSet / kWarp] = {};
#pragma unroll 2
    for (int64_t slab = warp; slab < slabs; slab += kWarps) {
      const M* sums = partial + 2 * slab * cols + first + lane;
      const int left = int(least(end - first, kSet)) - lane;
#pragma unroll
      for (int i = 0; i < kSet / kWarp; ++i) {
        if (i * kWarp >= left) continue;
        own[0][i] += sums[i * kWarp];
        if (weighs) own[1][i] += sums[cols + i * kWarp];
      }
    }
    M total[2][(kSet + kThreads - 1) / kThreads];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kSet / kWarp; ++i) shared.merged[warp][i * kWarp + lane] = own[which][i];
      __syncthreads();
#pragma unroll
      for (int i = 0; i < (kSet + kThreads - 1) / kThreads; ++i) {
        const int place = i * kThreads + thread;
        total[which][i] = M(0);
        for (int w = 0; w < kWarps && place < kSet; ++w) total[which][i] += shared.merged[w][place];
      }
    }
#pragma unroll
    for (int i = 0; i < (kSet + kThreads - 1) / kThreads; ++i) {
      const int place = i * kThreads + thread;
      const int64_t column = first + place, element = matrix * cols + column;
      if (place >= kSet || column >= end) continue;
      M square = total[0][i];
      if (norm_clipped) square = square * (job.factor * job.factor);
      grad_sq += double(square);
      const void* cross_var = reinterpret_cast<const void*>(job.row[f::kCrossVar]);
      const M old = read_one<M>(cross_var, int(job.row[f::kMomentDtype]), element);
      const M cross = new_factor(job, old, square, rows, random_of_factor(job, element, true));
      if (cross > M(0)) {
        shares += double(total[1][i] / cross);
        if (double(cross) < cross_min) cross_min = double(cross);
      }
      cross_sum += double(cross);
      if (double(cross) > cross_max) cross_max = double(cross);
      job.template in_scratch<M>(f::kCross)[element] = cross;
      job.template in_scratch<M>(f::kFactor)[element] = inverse_root(cross);
    }
  }
  shares = of_block<Sum>(shares, shared.reduced);
  cross_sum = of_block<Sum>(cross_sum, shared.reduced);
  cross_min = of_block<Smallest>(cross_min, shared.reduced);
  cross_max = of_block<Largest>(cross_max, shared.reduced);
  grad_sq = of_block<Sum>(grad_sq, shared.reduced);
  if (is_first_thread()) {
    double* record = record_of_part(job, matrix, part);
    record[f::kPartShare] = shares;
    record[f::kPartCrossSum] = cross_sum;
    record[f::kPartCrossMin] = cross_min;
    record[f::kPartCrossMax] = cross_max;
    record[f::kPartGradSq] = grad_sq;
  }
  finish_lines(shared, matrix, part, norm_clipped);
}

// What is known of a matrix once its parts are.
struct MatrixSums {
  double share = 0, grad_sq = 0, line_sum = 0, cross_sum = 0;
  double line_min = kInfinity, line_max = 0, cross_min = kInfinity, cross_max = 0;
};

// Mean of row_var, or its sum; rows are the lines unless the matrix lies the other way.
template <class M>
__device__ __forceinline__ M norm_of(const Job<M>& job, const MatrixSums& sums) {
  const bool swapped = job.row[f::kSwapped] != 0;
  const double total = swapped ? sums.cross_sum : sums.line_sum;
  const double count = double(swapped ? job.row[f::kCols] : job.row[f::kRows]);
  const M mean = M(job.rule[f::kSumMoments] > 0 ? total : total / count), smallest = job.numbers[f::kLeastNorm];
  return mean < smallest ? smallest : mean;
}

// How far the clamp reaches, from the smallest and the largest second moments; a line of zeros is never clamped. Every
// line is measured, as if it were clamped, where the identity cannot be trusted or does not hold.
template <class M>
__device__ __forceinline__ f::Clamp clamp_of(const Job<M>& job, const MatrixSums& sums, M norm, double known) {
  const M limit = job.numbers[f::kMostRoot];
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
    const M norm = norm_of(job, sums);
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

// Σ g² of a tensor, before any clipping.
template <class M>
__device__ __forceinline__ double total_grad_sq(Shared<M>& shared) {
  const double total = sum_of_units(shared, f::kUnitGradSq);
  if (is_first_thread()) shared.job.outcome[f::kGradSq] = total;
  return total;
}

template <class M>
__device__ __forceinline__ void set_clip(const Job<M>& job, double update_sq) {
  const double update_rms = sqrt(update_sq / double(job.row[f::kNumel]));
  job.outcome[f::kUpdateRms] = update_rms;
  const double ratio = update_rms / job.rule[f::kClipThreshold];
  job.outcome[f::kByClip] = 1.0 / (ratio < 1.0 ? 1.0 : ratio);  // so that NaN stays
}

// Norms, clamps, what is known of Σ u², the step size, and whether the tensor is skipped. RMS(u) is unknown where it is
// wanted and the third sweep has to find it out.
template <class M>
__device__ __noinline__ void finalize() {
  Shared<M>& shared = shared_of<M>();
  const Job<M>& job = shared.job;
  const double grad_sq = total_grad_sq(shared);
  double update_sq = 0;
  bool unknown = false;
  if (job.row[f::kForm] == f::kFactored) {
    update_sq = finalize_matrices(shared, unknown);
  } else if (job.has(f::kNormClippedSwitch)) {
    unknown = true;  // nothing has been taken of a clipped gradient
  } else {
    update_sq = sum_of_units(shared, f::kUnitUpdateSq);
  }
  double param_sq = 0;
  if (job.has(f::kParamRmsSwitch)) param_sq = sum_of_units(shared, f::kUnitParamSq);
  const bool measures = job.has(f::kMeasuresSwitch);
  if (!measures) unknown = false;
  if (is_first_thread()) {
    if (job.has(f::kSkipsSwitch) && !is_finite(M(grad_sq))) *job.skip = 1;
    double alpha = job.rule[f::kRho];
    const double eps2 = job.rule[f::kEps2], decay = job.rule[f::kDecay];
    if (job.has(f::kParamRmsSwitch)) {
      const double param_rms = sqrt(param_sq / double(job.row[f::kNumel]));
      job.outcome[f::kParamRms] = param_rms;
      const double scale = fabs(param_rms * (1.0 - (job.rule[f::kDecayBeforeRms] > 0 ? decay : 0.0)));
      if (!(eps2 < 0)) alpha = (scale < eps2 ? eps2 : scale) * alpha;
    }
    job.outcome[f::kAlpha] = alpha;
    job.outcome[f::kDecayed] = 1.0 - (decay + job.rule[f::kDecayOfAlpha] * alpha);
    job.outcome[f::kUpdateSq] = update_sq;
    job.outcome[f::kByClip] = 1.0;
    if (measures && !unknown) set_clip(job, update_sq);
    job.outcome[f::kUnknown] = unknown ? 1.0 : 0.0;
  }
}

// RMS(u) once the third sweep is over.
template <class M>
__device__ __noinline__ void measure() {
  Shared<M>& shared = shared_of<M>();
  const double rest = sum_of_units(shared, f::kUnitUpdateSq);
  if (!is_first_thread()) return;
  const double update_sq = shared.job.outcome[f::kUpdateSq] + rest;
  set_clip(shared.job, update_sq < 0 ? 0.0 : update_sq);  // so that NaN stays
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_FACTORS_CUH
