// The sums of slabs, added up: they become second moments, or go into a message to other processes.

#ifndef FUSED_ADAFACTOR_CUDA_MERGING_CUH
#define FUSED_ADAFACTOR_CUDA_MERGING_CUH

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

// Columns, and lines, of a part of a matrix.
template <class M>
__device__ __forceinline__ Range columns_of_part(const Job<M>& job, int64_t part) {
  const int64_t cols = job.row[f::kCols], parts = job.row[f::kParts], length = (cols + parts - 1) / parts;
  const int64_t begin = least(part * length, cols);
  return {begin, least(begin + length, cols)};
}

template <class M>
__device__ __forceinline__ Range lines_of_part(const Job<M>& job, int64_t part) {
  const int64_t rows = job.row[f::kRows], length = job.row[f::kPartLines], begin = least(part * length, rows);
  return {begin, least(begin + length, rows)};
}

// What the second moments of some lines of a matrix add up to.
template <class M>
__device__ __forceinline__ void finish_lines(Shared<M>& shared, int64_t matrix, int64_t part) {
  const Job<M>& job = shared.job;
  const Range of_part = lines_of_part(job, part);
  const int64_t first = matrix * job.row[f::kRows];
  const M* sums = job.sums_of_lines() + first;
  M* lines = job.template in_scratch<M>(f::kLines) + first;
  const bool raw = job.has(f::kRawLinesSwitch);
  double total = 0, smallest = kInfinity, largest = 0;
  for (int64_t line = of_part.begin + thread_number(); line < of_part.end; line += kThreads) {
    M x = sums[line];
    if (raw) {  // what was summed is the raw gradient: its norm was not known yet, or it was not all of the line
      const int64_t element = first + line;
      const void* line_var = reinterpret_cast<const void*>(job.row[f::kLineVar]);
      const M old = read_one<M>(line_var, int(job.row[f::kMomentDtype]), element);
      const uint32_t random = random_of_factor(job, element, false);
      x = new_factor(job, old, x * (job.factor * job.factor), job.row[f::kWholeCols], random);
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

constexpr int kSet = 128;  // columns at a time: a warp takes every so manieth slab
constexpr int kOwnOfSet = (kSet + kThreads - 1) / kThreads;

// The number in a set of a thread's column, and whether there is one.
__device__ __forceinline__ int place_in_set(int i) { return i * kThreads + thread_number(); }

// Sums of a set of columns of a matrix over its slabs, Σ g² and those that are weighted, in an order that is always the
// same. A matrix that has no lines here has no sums.
template <class M>
__device__ __forceinline__ void sum_over_slabs(Shared<M>& shared, int64_t matrix, int64_t first, int64_t end,
                                               M (&total)[2][kOwnOfSet]) {
  const Job<M>& job = shared.job;
  const int64_t cols = job.row[f::kCols], per_matrix = job.row[f::kSlabsPerMatrix];
  const int64_t slabs = job.row[f::kRows] > 0 ? per_matrix : 0;
  const M* partial = job.template in_scratch<M>(f::kPartial) + 2 * matrix * per_matrix * cols;
  const bool weighs = job.has(f::kWeighsSwitch);
  const int thread = thread_number(), warp = thread / kWarp, lane = thread % kWarp;
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
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSet / kWarp; ++i) shared.merged[warp][i * kWarp + lane] = own[which][i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwnOfSet; ++i) {
      total[which][i] = M(0);
      for (int w = 0; w < kWarps && place_in_set(i) < kSet; ++w) total[which][i] += shared.merged[w][place_in_set(i)];
    }
  }
}

// A sum over all processes, or what is here where it is not taken.
template <class M>
__device__ __forceinline__ M of_all(const Job<M>& job, int field, int64_t element, M here) {
  const M* sums = job.in_message(field);
  return sums != nullptr ? sums[element] : here;
}

// New second moments across the lines of a matrix, of some columns, and what is known of them.
template <class M>
__device__ __noinline__ void merge(int item) {
  Shared<M>& shared = shared_of<M>();
  const Job<M>& job = shared.job;
  const int64_t parts = job.row[f::kParts], matrix = item / parts, part = item % parts, cols = job.row[f::kCols];
  const Range columns = columns_of_part(job, part);
  double shares = 0, cross_sum = 0, cross_min = kInfinity, cross_max = 0, grad_sq = 0;
  for (int64_t first = columns.begin; first < columns.end; first += kSet) {
    M total[2][kOwnOfSet];
    sum_over_slabs(shared, matrix, first, columns.end, total);
#pragma unroll
    for (int i = 0; i < kOwnOfSet; ++i) {
      const int64_t column = first + place_in_set(i), element = matrix * cols + column;
      if (place_in_set(i) >= kSet || column >= columns.end) continue;
      grad_sq += double(total[0][i]);
      M square = of_all(job, f::kSharedCrossSq, element, total[0][i]);
      if (job.has(f::kNormClippedSwitch)) square = square * (job.factor * job.factor);
      const void* cross_var = reinterpret_cast<const void*>(job.row[f::kCrossVar]);
      const M old = read_one<M>(cross_var, int(job.row[f::kMomentDtype]), element);
      const uint32_t random = random_of_factor(job, element, true);
      const M cross = new_factor(job, old, square, job.row[f::kWholeRows], random);
      if (cross > M(0)) {
        shares += double(of_all(job, f::kSharedWeighted, element, total[1][i]) / cross);
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
  finish_lines(shared, matrix, part);
}

// Put what is here of the sums of some columns of a matrix into the message, and keep what those of whole matrices are
// made of that go with them; see `total`.
template <class M>
__device__ __noinline__ void share(int item) {
  Shared<M>& shared = shared_of<M>();
  const Job<M>& job = shared.job;
  const int64_t parts = job.row[f::kParts], matrix = item / parts, part = item % parts, cols = job.row[f::kCols];
  const Range columns = columns_of_part(job, part), lines = lines_of_part(job, part);
  double grad_sq = 0, line_sum = 0;
  for (int64_t first = columns.begin; first < columns.end; first += kSet) {
    M total[2][kOwnOfSet];
    sum_over_slabs(shared, matrix, first, columns.end, total);
#pragma unroll
    for (int i = 0; i < kOwnOfSet; ++i) {
      const int64_t column = first + place_in_set(i), element = matrix * cols + column;
      if (place_in_set(i) >= kSet || column >= columns.end) continue;
      grad_sq += double(total[0][i]);
      job.in_message(f::kSharedCrossSq)[element] = total[0][i];
      M* weighted = job.in_message(f::kSharedWeighted);
      if (weighted != nullptr) weighted[element] = total[1][i];
    }
  }
  // Where Σ g² goes with it, Σ row_var follows from the old ones.
  const bool old = job.in_message(f::kSharedRowSqSum) != nullptr;
  for (int64_t line = lines.begin + thread_number(); line < lines.end; line += kThreads) {
    const int64_t element = matrix * job.row[f::kRows] + line;
    const void* line_var = reinterpret_cast<const void*>(job.row[f::kLineVar]);
    line_sum += double(old ? read_one<M>(line_var, int(job.row[f::kMomentDtype]), element)
                           : job.template in_scratch<M>(f::kLines)[element]);
  }
  grad_sq = of_block<Sum>(grad_sq, shared.reduced);
  line_sum = of_block<Sum>(line_sum, shared.reduced);
  if (!is_first_thread()) return;
  double* record = record_of_part(job, matrix, part);
  record[f::kPartGradSq] = grad_sq;
  record[f::kPartLineSum] = line_sum;
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_MERGING_CUH
