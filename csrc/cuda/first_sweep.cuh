// The first sweep: sums over the gradient and the parameter.

#ifndef FUSED_ADAFACTOR_CUDA_FIRST_SWEEP_CUH
#define FUSED_ADAFACTOR_CUDA_FIRST_SWEEP_CUH

#include "arrivals.cuh"
#include "tiny.cuh"
#include "walk.cuh"

namespace fused_adafactor {

template <class M>
__device__ __forceinline__ void store_sums(Shared<M>& shared, int64_t unit, double grad_sq, double param_sq,
                                           double update_sq, bool held = false) {
  grad_sq = of_block<Sum>(grad_sq, shared.reduced);
  param_sq = of_block<Sum>(param_sq, shared.reduced);
  update_sq = of_block<Sum>(update_sq, shared.reduced);
  if (thread_number() != 0) return;
  double* sums = shared.job.template in_scratch<double>(f::kSums) + unit * f::kUnitSums;
  sums[f::kUnitGradSq] = grad_sq;
  sums[f::kUnitParamSq] = param_sq;
  sums[f::kUnitUpdateSq] = update_sq;
  sums[f::kUnitHeld] = held ? 1.0 : 0.0;
}

template <class M, int kElements>
__device__ __forceinline__ M sum_of_squares(const M (&x)[kElements]) {
  M sum = M(0);
#pragma unroll
  for (int i = 0; i < kElements; ++i) sum = fused(x[i], x[i], sum);
  return sum;
}

// Σ p² of some columns of some lines; each thread's share.
template <class T, class M>
__device__ __forceinline__ double param_squares(const Job<M>& job, Lines lines, Range columns) {
  double sum = 0;
  for (Walk<T> walk(lines.begin, lines.end, columns); walk.round(); walk.next()) {
    M p[T::kElements];
    read<T>(job, f::kParam, f::kStrides, T::param_dtype(job), walk.place(job.row[f::kCols]), p);
    sum += double(sum_of_squares(p));
  }
  return sum;
}

// Σ_j g² of the lines of a slab, over the columns of one chunk.
template <class T, class M>
__device__ __noinline__ void sum_chunk(Shared<M>& shared, int64_t unit) {
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
__device__ __forceinline__ void store_columns(Shared<M>& shared, M (&sums)[kVectors][T::kElements], int group,
                                              int64_t count, M* to) {
  constexpr int N = T::kElements;
  const int thread = thread_number(), lane = thread % group;
  if (group == kThreads) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = (int64_t(v) * group + lane) * N;
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
      const int64_t column = int64_t(v) * group * N + own;
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
  // Where gradients are clipped by a norm that is not known yet, what is summed is the raw gradient.
  if (!job.has(f::kNormClippedSwitch)) total = new_factor(job, old, total, job.row[f::kCols], random);
  if (keeps) job.template in_scratch<M>(f::kLines)[line] = total;
  return total != M(0) ? M(1) / total : M(0);  // a line of zeros has no share
}

// Where the sums across the lines of a matrix go, of a slab.
template <class M>
__device__ __forceinline__ M* partial_sums(const Job<M>& job, int64_t slab, int64_t first_line, Range columns) {
  const int64_t per_matrix = job.row[f::kSlabsPerMatrix];
  const int64_t number = first_line / job.row[f::kRows] * per_matrix + slab % per_matrix;
  return job.template in_scratch<M>(f::kPartial) + 2 * number * job.row[f::kCols] + columns.begin;
}

// Sums over a slab of lines of matrices, along them and across; final second moments of lines.
//
// A group of threads has a line, each of them `kVectors` runs of neighbours, and `kTogether` lines at a time: a round.
template <class T, int kVectors, int kTogether, class M>
__device__ __noinline__ void sum_lines(Shared<M>& shared, int unit) {
  constexpr int N = T::kElements;
  const Job<M>& job = shared.job;
  const int chunks = int(job.row[f::kChunks]), chunk = unit % chunks, slab = unit / chunks;
  const Lines lines = lines_of(job, slab);
  const Range columns = columns_of(job, chunk);
  const int width = int(columns.end - columns.begin), length = int(lines.end - lines.begin), block = int(lines.block);
  const bool weighs = T::has(job, f::kWeighsSwitch);
  // Not fewer than hold a block of 8-bit numbers.
  const int group = power_of_2(most((job.row[f::kChunk] + N * kVectors - 1) / (N * kVectors), kBlock / N));
  const int together = kThreads / group, warps_of_group = group < kWarp ? 1 : group / kWarp;
  const int thread = thread_number(), lane = thread % group, own = thread / group;
  Arrivals<T, kVectors, kTogether, M> arrivals(shared, unit, lines, columns, group);
  double grad_sq = 0;
  for (int first_of_block = 0; first_of_block < length; first_of_block += block) {
    const int last = first_of_block + block < length ? first_of_block + block : length;
    M square[kVectors][N] = {}, weighted[kVectors][N] = {};
#pragma unroll 1
    for (int first = first_of_block; first < last; first += together * kTogether) {
      // A thread for each line finishes it: what it needs for that is on its way with the gradient.
      const bool finishes = thread < together * kTogether && first + thread < last;
      M old = M(0);
      uint32_t random = 0;
      if (finishes && !T::has(job, f::kNormClippedSwitch)) {
        const int64_t line = lines.begin + first + thread;
        old = read_one<M>(reinterpret_cast<const void*>(job.row[f::kLineVar]), int(job.row[f::kMomentDtype]), line);
        random = random_of_factor(job, line, false);
      }
      M g[kTogether][kVectors][N];
      arrivals.wait_for_round();
#pragma unroll
      for (int b = 0; b < kTogether; ++b) {
        const int line = first + b * together + own;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int column = (v * group + lane) * N;
          const bool here = line < last && column < width;
          const Place at = place_of<T>((lines.begin + line) * job.row[f::kCols] + columns.begin + column, here);
          if (arrivals.there()) {
            arrivals.read(line - first, column, here, g[b][v]);
          } else {
            read_from<T>(job, job.grad, f::kGradStrides, T::grad_dtype(job), at, g[b][v]);
          }
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
        sum = of_lanes<Sum>(sum, group < kWarp ? group : kWarp);
        if (lane % kWarp == 0) shared.lines.sums[(b * together + own) * warps_of_group + lane / kWarp] = sum;
      }
      __syncthreads();
      arrivals.ask_for_next();
      if (finishes) {
        M total = M(0);
        for (int warp = 0; warp < warps_of_group; ++warp) total += shared.lines.sums[thread * warps_of_group + warp];
        if (!T::has(job, f::kValueClipSwitch)) grad_sq += double(total);
        shared.lines.weights[thread] =
            finish_line(job, lines.begin + first + thread, old, total, random, chunk == 0);
      }
      __syncthreads();
#pragma unroll
      for (int b = 0; b < kTogether; ++b) {
        const int line = first + b * together + own;
        const M weight = shared.lines.weights[b * together + own];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
          for (int i = 0; i < N; ++i) square[v][i] = fused(g[b][v][i], g[b][v][i], square[v][i]);
          if (!weighs) continue;
          const int column = (v * group + lane) * N;
          const bool here = line < last && column < width;
          const Place at = place_of<T>((lines.begin + line) * job.row[f::kCols] + columns.begin + column, here);
          M num[N], exp_avg[N];
          numerator<T>(shared, at, g[b][v], num, exp_avg);
          const M share = here ? weight : M(0);
#pragma unroll
          for (int i = 0; i < N; ++i) weighted[v][i] = fused(num[i] * num[i], share, weighted[v][i]);
        }
      }
    }
    M* partial = partial_sums(job, slab, lines.begin + first_of_block, columns);
    store_columns<T, kVectors>(shared, square, group, width, partial);
    if (weighs) store_columns<T, kVectors>(shared, weighted, group, width, partial + job.row[f::kCols]);
  }
  const bool held = arrivals.end();
  const double param_sq = T::has(job, f::kParamRmsSwitch) ? param_squares<T>(job, lines, columns) : 0.0;
  store_sums(shared, unit, grad_sq, param_sq, 0.0, held);
}

// The same where neighbours are not read together: first along the lines, then, from a cache, across them.
template <class M>
__device__ __noinline__ void sum_lines_loosely(Shared<M>& shared, int64_t unit) {
  typedef Loose T;
  const Job<M>& job = shared.job;
  const int64_t chunks = job.row[f::kChunks], chunk = unit % chunks, slab = unit / chunks;
  const int64_t cols = job.row[f::kCols];
  const Lines lines = lines_of(job, slab);
  const Range columns = columns_of(job, chunk);
  const bool weighs = job.has(f::kWeighsSwitch), clips_values = job.has(f::kValueClipSwitch);
  const int thread = thread_number(), lane = thread % kWarp;
  const void* old_lines = reinterpret_cast<const void*>(job.row[f::kLineVar]);
  double grad_sq = 0;
  for (int64_t first_of_block = lines.begin; first_of_block < lines.end; first_of_block += lines.block) {
    const int64_t last = least(first_of_block + lines.block, lines.end);
    M* partial = partial_sums(job, slab, first_of_block, columns);
    for (int64_t first = first_of_block; first < last; first += kLinesOfRound) {
      const int together = int(least(kLinesOfRound, last - first));
      __syncthreads();  // before weights are overwritten that others still read
      for (int own = thread / kWarp; own < together; own += kWarps) {  // a warp takes a line
        M sum = M(0);
        for (int64_t column = columns.begin + lane; column < columns.end; column += kWarp) {
          M g[1];
          read_unclipped<T>(job, place_of<T>((first + own) * cols + column, true), g);
          if (clips_values) grad_sq += double(g[0] * g[0]);  // an Inf must not hide behind the clip
          clip<T>(job, M(1), g);
          sum = fused(g[0], g[0], sum);
        }
        sum = of_lanes<Sum>(sum, kWarp);
        if (lane == 0) shared.lines.sums[own] = sum;
      }
      __syncthreads();
      for (int own = thread; own < together; own += kThreads) {
        const int64_t line = first + own;
        const M total = shared.lines.sums[own], old = read_one<M>(old_lines, int(job.row[f::kMomentDtype]), line);
        if (!clips_values) grad_sq += double(total);
        const uint32_t random = random_of_factor(job, line, false);
        shared.lines.weights[own] = finish_line(job, line, old, total, random, chunk == 0);
      }
      __syncthreads();
      for (int64_t column = columns.begin + thread; column - thread < columns.end; column += kThreads) {
        const bool here = column < columns.end;
        M square = M(0), weighted = M(0);
        if (here && first > first_of_block) {
          square = partial[column - columns.begin];
          weighted = weighs ? partial[cols + column - columns.begin] : M(0);
        }
        for (int own = 0; own < together; ++own) {
          const Place at = place_of<T>((first + own) * cols + column, here);
          M g[1], num[1], exp_avg[1];
          read_grad<T>(job, M(1), at, g);
          square = fused(g[0], g[0], square);
          if (!weighs) continue;
          numerator<T>(shared, at, g, num, exp_avg);
          weighted = fused(num[0] * num[0], shared.lines.weights[own], weighted);
        }
        if (!here) continue;
        partial[column - columns.begin] = square;
        if (weighs) partial[cols + column - columns.begin] = weighted;
      }
    }
  }
  const double param_sq = job.has(f::kParamRmsSwitch) ? param_squares<T>(job, lines, columns) : 0.0;
  store_sums(shared, unit, grad_sq, param_sq, 0.0);
}

// Sums over the elements of a slab of an unfactored tensor.
template <class T, class M>
__device__ __noinline__ void sum_flat(Shared<M>& shared, int64_t unit) {
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
__device__ __noinline__ void sum_tiny(Shared<M>& shared, int64_t unit) {
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
__device__ __forceinline__ void sum_unit(Shared<M>& shared, int64_t unit) {
  const Job<M>& job = shared.job;
  if (job.row[f::kForm] == f::kTiny) return sum_tiny(shared, unit);
  if (job.row[f::kForm] == f::kUnfactored) {
    return with_alignment(job, [&](auto traits) { sum_flat<decltype(traits)>(shared, unit); });
  }
  with_traits<8>(job, [&](auto traits) {
    typedef decltype(traits) T;
    if constexpr (T::kElements == 1) {
      sum_lines_loosely(shared, unit);
    } else if (job.row[f::kChunk] <= kWidest / 2) {
      sum_lines<T, 1, 2>(shared, int(unit));
    } else {
      sum_lines<T, 2, 1>(shared, int(unit));
    }
  });
}

template <class M>
__device__ __forceinline__ void sum_chunk_of(Shared<M>& shared, int64_t unit) {
  with_traits<8>(shared.job, [&](auto traits) { sum_chunk<decltype(traits)>(shared, unit); });
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_FIRST_SWEEP_CUH
