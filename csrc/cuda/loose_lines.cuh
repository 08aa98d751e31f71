// The same of lines whose elements lie anywhere, or are of float64: first along the lines, then, from a cache, across.

#ifndef FUSED_ADAFACTOR_CUDA_LOOSE_LINES_CUH
#define FUSED_ADAFACTOR_CUDA_LOOSE_LINES_CUH

#include "lines.cuh"

namespace fused_adafactor {

// Lines that a thread looks at together, where neighbours are not read together: what it has asked for at a time.
constexpr int kLinesOfThread = 4;

// The raw gradient of some lines in one column.
template <class M>
__device__ __forceinline__ void read_lines_loosely(Shared<M>& shared, const int (&line)[kLinesOfThread], int last,
                                                   int column, Place (&at)[kLinesOfThread],
                                                   M (&g)[kLinesOfThread]) {
  const Job<M>& job = shared.job;
  const Rounds& rounds = shared.rounds;
#pragma unroll
  for (int i = 0; i < kLinesOfThread; ++i) {
    const bool here = line[i] < last && column < rounds.width;
    at[i] = place_of<Loose>(rounds.first + line[i] * job.row[f::kCols] + column, here);
  }
  read_several(job, job.grad, f::kGradStrides, int(job.row[f::kGradDtype]), at, g);
#pragma unroll
  for (int i = 0; i < kLinesOfThread; ++i) {
    M own[1] = {g[i]};
    unscale<Loose>(job, at[i], own);
    g[i] = own[0];
  }
}

template <class M>
__device__ __forceinline__ M clipped(const Job<M>& job, M g) {
  M own[1] = {g};
  clip<Loose>(job, M(1), own);
  return own[0];
}

// Σ_j g² of some lines. A group of threads has a line, up to a warp of them, and several lines at a time. Returns what
// each thread has of Σ g² before values are clipped.
template <class M>
__device__ __forceinline__ double sum_along(Shared<M>& shared, int first, int together) {
  const Job<M>& job = shared.job;
  const Rounds& rounds = shared.rounds;
  const int lanes = rounds.group < kWarp ? rounds.group : kWarp, lane = thread_number() % lanes;
  const int groups = kThreads / lanes;
  double unclipped_sq = 0;
#pragma unroll 1
  for (int begin = 0; begin < together; begin += kLinesOfThread * groups) {
    int line[kLinesOfThread];
    M sum[kLinesOfThread] = {};
#pragma unroll
    for (int i = 0; i < kLinesOfThread; ++i) line[i] = first + begin + i * groups + thread_number() / lanes;
#pragma unroll 1
    for (int column = lane; column < rounds.width; column += lanes) {
      Place at[kLinesOfThread];
      M g[kLinesOfThread];
      read_lines_loosely(shared, line, first + together, column, at, g);
#pragma unroll
      for (int i = 0; i < kLinesOfThread; ++i) {
        // An Inf must not hide behind the clip.
        if (job.has(f::kValueClipSwitch)) unclipped_sq += double(g[i] * g[i]);
        const M own = clipped(job, g[i]);
        sum[i] = fused(own, own, sum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kLinesOfThread; ++i) {
      sum[i] = of_lanes<Sum>(sum[i], lanes);
      if (lane == 0 && line[i] < first + together) shared.lines.sums[line[i] - first] = sum[i];
    }
  }
  return unclipped_sq;
}

// Add some lines to the sums across them. A group of threads has all columns, and takes one line in as many as there
// are groups; what each thread has so far is in shared memory. Of more columns than there are threads, each thread has
// several, and what it has so far is where it goes.
template <class M>
__device__ __forceinline__ void sum_across(Shared<M>& shared, int first, int together, bool begins, M* to) {
  const Job<M>& job = shared.job;
  const Rounds& rounds = shared.rounds;
  const bool weighs = job.has(f::kWeighsSwitch);
  const int groups = kThreads / rounds.group;
#pragma unroll 1
  for (int first_column = 0; first_column < rounds.width; first_column += rounds.group) {
    const int column = first_column + thread_number() % rounds.group;
    M* const kept = groups > 1 ? shared.lines.columns + thread_number() : to + column;
    const int64_t to_weighted = groups > 1 ? kThreads : job.row[f::kCols];
    const bool here = column < rounds.width;
    M square = M(0), weighted = M(0);
    if (here && !begins) {
      square = kept[0];
      if (weighs) weighted = kept[to_weighted];
    }
#pragma unroll 1
    for (int begin = thread_number() / rounds.group; begin < together; begin += kLinesOfThread * groups) {
      int line[kLinesOfThread];
      Place at[kLinesOfThread];
      M g[kLinesOfThread];
#pragma unroll
      for (int i = 0; i < kLinesOfThread; ++i) line[i] = first + begin + i * groups;
      read_lines_loosely(shared, line, first + together, column, at, g);
#pragma unroll
      for (int i = 0; i < kLinesOfThread; ++i) {
        M own[1] = {clipped(job, g[i])}, num[1], exp_avg[1];
        square = fused(own[0], own[0], square);
        if (!weighs) continue;
        numerator<Loose>(shared, at[i], own, num, exp_avg);
        const M share = at[i].count > 0 ? shared.lines.weights[line[i] - first] : M(0);
        weighted = fused(num[0] * num[0], share, weighted);
      }
    }
    if (!here) continue;
    kept[0] = square;
    if (weighs) kept[to_weighted] = weighted;
  }
}

// The sums across the lines of a matrix, of all groups of threads, in their order.
template <class M>
__device__ __forceinline__ void store_across(Shared<M>& shared, M* to) {
  const Rounds& rounds = shared.rounds;
  const int64_t cols = shared.job.row[f::kCols];
  if (rounds.group == kThreads) return;  // they are there
  __syncthreads();
  for (int own = thread_number(); own < 2 * rounds.width; own += kThreads) {
    const int which = own < rounds.width ? 0 : 1, column = own - which * rounds.width;
    if (which == 1 && !shared.job.has(f::kWeighsSwitch)) continue;
    M total = M(0);
    for (int first = 0; first < kThreads; first += rounds.group) {
      total += shared.lines.columns[which * kThreads + first + column];
    }
    to[which * cols + column] = total;
  }
}

// The same where neighbours are not read together: first along the lines, then, from a cache, across them.
template <class M>
__device__ __noinline__ void sum_lines_loosely(int unit) {
  typedef Loose T;
  Shared<M>& shared = shared_of<M>();
  begin_rounds<T, 1, 1>(shared, unit);
  const Job<M>& job = shared.job;
  const Rounds& rounds = shared.rounds;
  const bool keeps = unit % int(job.row[f::kChunks]) == 0;
  double grad_sq = 0;
#pragma unroll 1
  for (int first_of_block = 0; first_of_block < rounds.length; first_of_block += rounds.block) {
    const int last = end_of_block(rounds, first_of_block);
    M* partial = partial_sums(job, unit, rounds.first_line + first_of_block);
#pragma unroll 1
    for (int first = first_of_block; first < last; first += kLinesOfRound) {
      const int together = last - first < kLinesOfRound ? last - first : kLinesOfRound;
      __syncthreads();  // before weights are overwritten that others still read
      grad_sq += sum_along(shared, first, together);
      __syncthreads();
      for (int own = thread_number(); own < together; own += kThreads) {
        const int64_t line = rounds.first_line + first + own;
        const void* old_lines = reinterpret_cast<const void*>(job.row[f::kLineVar]);
        const M total = shared.lines.sums[own], old = read_one<M>(old_lines, int(job.row[f::kMomentDtype]), line);
        if (!job.has(f::kValueClipSwitch)) grad_sq += double(total);
        shared.lines.weights[own] = finish_line(job, line, old, total, random_of_factor(job, line, false), keeps);
      }
      __syncthreads();
      sum_across(shared, first, together, first == first_of_block, partial);
    }
    store_across(shared, partial);
  }
  const double param_sq = job.has(f::kParamRmsSwitch) ? param_squares<T>(job, unit) : 0.0;
  store_sums(shared, unit, grad_sq, param_sq, 0.0);
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_LOOSE_LINES_CUH
