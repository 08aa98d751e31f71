// The first sweep over lines of matrices: sums along them and across, where neighbours are read together.

#ifndef FUSED_ADAFACTOR_CUDA_LINES_CUH
#define FUSED_ADAFACTOR_CUDA_LINES_CUH

#include "rounds.cuh"
#include "update.cuh"
#include "walk.cuh"

namespace fused_adafactor {

template <class M>
__device__ __forceinline__ void store_sums(Shared<M>& shared, int64_t unit, double grad_sq, double param_sq,
                                           double update_sq, bool held = false) {
  grad_sq = of_block<Sum>(grad_sq, shared.reduced);
  param_sq = of_block<Sum>(param_sq, shared.reduced);
  update_sq = of_block<Sum>(update_sq, shared.reduced);
  if (!is_first_thread()) return;
  double* sums = shared.job.template in_scratch<double>(f::kSums) + unit * f::kUnitSums;
  sums[f::kUnitGradSq] = grad_sq;
  sums[f::kUnitParamSq] = param_sq;
  sums[f::kUnitUpdateSq] = update_sq;
  sums[f::kUnitHeld] = held ? 1.0 : 0.0;
}

// Σ p² of a unit of lines; each thread's share.
template <class T, class M>
__device__ __forceinline__ double param_squares(const Job<M>& job, int64_t unit) {
  const int64_t chunks = job.row[f::kChunks];
  const Lines lines = lines_of(job, unit / chunks);
  double sum = 0;
  for (Walk<T> walk(lines.begin, lines.end, columns_of(job, unit % chunks), 1); walk.round(); walk.next()) {
    M p[T::kElements];
    read<T>(job, f::kParam, f::kStrides, T::param_dtype(job), walk.place(job.row[f::kCols]), p);
    sum += double(sum_of_squares(p));
  }
  return sum;
}

// Σ_j g² of the lines of a slab, over the columns of one chunk.
template <class T, class M>
__device__ __noinline__ void sum_chunk(int unit) {
  Shared<M>& shared = shared_of<M>();
  const Job<M>& job = shared.job;
  const int64_t chunks = job.row[f::kChunks], chunk = unit % chunks, cols = job.row[f::kCols];
  const Lines lines = lines_of(job, unit / chunks);
  const Range columns = columns_of(job, chunk);
  M* sums = job.template in_scratch<M>(f::kChunkSums) + chunk * job.row[f::kRows] * job.row[f::kBatch];
  // A warp takes a line.
  for (int64_t line = lines.begin + thread_number() / kWarp; line < lines.end; line += kWarps) {
    M sum = M(0);
    for (int64_t column = columns.begin; column < columns.end; column += kWarp * T::kElements) {
      const int64_t own = column + thread_number() % kWarp * T::kElements;
      M g[T::kElements];
      read_unclipped<T>(job, place_of<T>(line * cols + own, own < columns.end), g);
      clip<T>(job, M(1), g);
      sum += sum_of_squares(g);
    }
    sum = of_lanes<Sum>(sum, kWarp);
    if (thread_number() % kWarp == 0) sums[line] = sum;
  }
}

// Σ_j g² of a line, from those of the chunks of its columns.
template <class M>
__device__ __forceinline__ M sum_of_chunks(const Job<M>& job, int64_t line) {
  const M* sums = job.template in_scratch<M>(f::kChunkSums) + line;
  const int64_t lines = job.row[f::kRows] * job.row[f::kBatch];
  M total = M(0);
  for (int64_t chunk = 0; chunk < job.row[f::kChunks]; ++chunk) total += sums[chunk * lines];
  return total;
}

// Add up the sums of columns that a thread has for some of their lines, and store them. Threads of a group hold
// neighbouring columns, `kVectors` runs of them.
template <class T, int kVectors, class M>
__device__ __forceinline__ void store_columns(Shared<M>& shared, M (&sums)[kVectors][T::kElements], M* to) {
  constexpr int N = T::kElements;
  const int thread = thread_number(), group = shared.rounds.group, count = shared.rounds.width;
  const int lane = thread % group;
  if (group == kThreads) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = (v * group + lane) * N;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (column + i < count) to[column + i] = sums[v][i];
      }
    }
    return;
  }
  M* columns = shared.lines.columns;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      for (int distance = group; distance < kWarp; distance *= 2) {
        sums[v][i] += __shfl_xor_sync(kAllLanes, sums[v][i], distance);
      }
      columns[thread * N + i] = sums[v][i];
    }
    __syncthreads();
    // Where a group is a part of a warp, each of a warp's groups has the sum of all of them.
    const int step = group < kWarp ? kWarp : group;
    for (int own = thread; own < group * N; own += kThreads) {
      const int column = v * group * N + own;
      M total = M(0);
      for (int first = 0; first < kThreads; first += step) total += columns[first * N + own];
      if (column < count) to[column] = total;
    }
  }
}

// What a thread does with the sum of a line: its new second moment, and its weight in Σ u².
template <class M>
__device__ __forceinline__ M finish_line(const Job<M>& job, int64_t line, M old, M total, uint32_t random, bool keeps) {
  if (job.row[f::kChunks] > 1) total = sum_of_chunks(job, line);
  // Raw ones are not clipped yet, by a norm that is not known, or other processes have other parts of them.
  if (!job.has(f::kRawLinesSwitch)) total = new_factor(job, old, total, job.row[f::kWholeCols], random);
  if (keeps) job.sums_of_lines()[line] = total;
  return total != M(0) ? M(1) / total : M(0);  // a line of zeros has no share
}

// Where the sums across the lines of a matrix go, of a unit.
template <class M>
__device__ __forceinline__ M* partial_sums(const Job<M>& job, int64_t unit, int64_t first_line) {
  const int64_t per_matrix = job.row[f::kSlabsPerMatrix], chunks = job.row[f::kChunks];
  const int64_t number = first_line / job.row[f::kRows] * per_matrix + unit / chunks % per_matrix;
  return job.template in_scratch<M>(f::kPartial) + 2 * number * job.row[f::kCols] + unit % chunks * job.row[f::kChunk];
}

__device__ __forceinline__ int warps_of(int group) { return group < kWarp ? 1 : group / kWarp; }

// The end of the lines of a matrix.
__device__ __forceinline__ int end_of_block(const Rounds& rounds, int first) {
  return first + rounds.block < rounds.length ? first + rounds.block : rounds.length;
}

template <class T, class M>
__device__ __forceinline__ Place place_in_round(const Shared<M>& shared, int first_of_block, int line, int column) {
  const Rounds& rounds = shared.rounds;
  const bool here = line < end_of_block(rounds, first_of_block) && column < rounds.width;
  return place_of<T>(rounds.first + line * shared.job.row[f::kCols] + column, here);
}

// Sums over a slab of lines of matrices, along them and across; final second moments of lines.
//
// A group of threads has a line, each of them `kVectors` runs of neighbours, and `kTogether` lines at a time: a round.
template <class T, int kVectors, int kTogether, class M>
__device__ __noinline__ void sum_lines(int unit) {
  Shared<M>& shared = shared_of<M>();
  constexpr int N = T::kElements;
  begin_rounds<T, kVectors, kTogether>(shared, unit);
  const Job<M>& job = shared.job;
  const Rounds& rounds = shared.rounds;
  const int thread = thread_number();
  if (T::kStashes && rounds.arrive) {
    for (int ahead = 0; ahead < kAhead; ++ahead) ask_for_round<T>(shared, ahead);
  }
  double grad_sq = 0;
  int round = 0;
#pragma unroll 1
  for (int first_of_block = 0; first_of_block < rounds.length; first_of_block += rounds.block) {
    M square[kVectors][N] = {}, weighted[kVectors][N] = {};
#pragma unroll 1
    for (int first = first_of_block; first < end_of_block(rounds, first_of_block); first += rounds.lines) {
      // A thread for each line finishes it: what it needs for that is on its way with the gradient.
      const bool finishes = thread < rounds.lines && first + thread < end_of_block(rounds, first_of_block);
      M old = M(0);
      uint32_t random = 0;
      if (finishes && !T::has(job, f::kRawLinesSwitch)) {
        const int64_t line = rounds.first_line + first + thread;
        old = read_one<M>(reinterpret_cast<const void*>(job.row[f::kLineVar]), int(job.row[f::kMomentDtype]), line);
        random = random_of_factor(job, line, false);
      }
      M g[kTogether][kVectors][N];
      wait_for_round<T>(shared, round);
#pragma unroll
      for (int b = 0; b < kTogether; ++b) {
        const int line = b * (kThreads / rounds.group) + thread / rounds.group;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int column = (v * rounds.group + thread % rounds.group) * N;
          const Place at = place_in_round<T>(shared, first_of_block, first + line, column);
          read_of_round<T>(shared, round, line, column, at, g[b][v]);
          unscale<T>(job, at, g[b][v]);
        }
      }
#pragma unroll
      for (int b = 0; b < kTogether; ++b) {
        M sum = M(0);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          // An Inf must not hide behind the clip.
          if (T::has(job, f::kValueClipSwitch)) grad_sq += double(sum_of_squares(g[b][v]));
          clip<T>(job, M(1), g[b][v]);
          sum += sum_of_squares(g[b][v]);
        }
        sum = of_lanes<Sum>(sum, rounds.group < kWarp ? rounds.group : kWarp);
        const int line = b * (kThreads / rounds.group) + thread / rounds.group, lane = thread % rounds.group;
        if (lane % kWarp == 0) shared.lines.sums[line * warps_of(rounds.group) + lane / kWarp] = sum;
      }
      __syncthreads();
      if (T::kStashes && rounds.arrive) ask_for_round<T>(shared, round + kAhead);
      if (finishes) {
        const int warps = warps_of(rounds.group);
        M total = M(0);
        for (int warp = 0; warp < warps; ++warp) total += shared.lines.sums[thread * warps + warp];
        if (!T::has(job, f::kValueClipSwitch)) grad_sq += double(total);
        const bool keeps = unit % int(job.row[f::kChunks]) == 0;
        shared.lines.weights[thread] =
            finish_line(job, rounds.first_line + first + thread, old, total, random, keeps);
      }
      __syncthreads();
#pragma unroll
      for (int b = 0; b < kTogether; ++b) {
        const int line = b * (kThreads / rounds.group) + thread / rounds.group;
        const M weight = shared.lines.weights[line];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
          for (int i = 0; i < N; ++i) square[v][i] = fused(g[b][v][i], g[b][v][i], square[v][i]);
          if (!T::has(job, f::kWeighsSwitch)) continue;
          const int column = (v * rounds.group + thread % rounds.group) * N;
          const Place at = place_in_round<T>(shared, first_of_block, first + line, column);
          M num[N], exp_avg[N];
          numerator<T>(shared, at, g[b][v], num, exp_avg);
          const M share = at.count > 0 ? weight : M(0);
#pragma unroll
          for (int i = 0; i < N; ++i) weighted[v][i] = fused(num[i] * num[i], share, weighted[v][i]);
        }
      }
      ++round;
    }
    M* partial = partial_sums(job, unit, rounds.first_line + first_of_block);
    store_columns<T, kVectors>(shared, square, partial);
    if (T::has(job, f::kWeighsSwitch)) store_columns<T, kVectors>(shared, weighted, partial + job.row[f::kCols]);
  }
  const bool held = end_rounds<T>(shared, unit, round);
  const double param_sq = T::has(job, f::kParamRmsSwitch) ? param_squares<T>(job, unit) : 0.0;
  store_sums(shared, unit, grad_sq, param_sq, 0.0, held);
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_LINES_CUH
