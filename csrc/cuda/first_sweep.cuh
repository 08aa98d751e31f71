// The first sweep: sums over the gradient and the parameter.

#ifndef FUSED_ADAFACTOR_CUDA_FIRST_SWEEP_CUH
#define FUSED_ADAFACTOR_CUDA_FIRST_SWEEP_CUH

#include "rounds.cuh"
#include "tiny.cuh"
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

template <class M, int kElements>
__device__ __forceinline__ M sum_of_squares(const M (&x)[kElements]) {
  M sum = M(0);
#pragma unroll
  for (int i = 0; i < kElements; ++i) sum = fused(x[i], x[i], sum);
  return sum;
}

// Σ p² of a unit of lines; each thread's share.
template <class T, class M>
__device__ __forceinline__ double param_squares(const Job<M>& job, int64_t unit) {
  const int64_t chunks = job.row[f::kChunks];
  const Lines lines = lines_of(job, unit / chunks);
  double sum = 0;
  for (Walk<T> walk(lines.begin, lines.end, columns_of(job, unit % chunks)); walk.round(); walk.next()) {
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
  // Where gradients are clipped by a norm that is not known yet, what is summed is the raw gradient.
  if (!job.has(f::kNormClippedSwitch)) total = new_factor(job, old, total, job.row[f::kCols], random);
  if (keeps) job.template in_scratch<M>(f::kLines)[line] = total;
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
      if (finishes && !T::has(job, f::kNormClippedSwitch)) {
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

// Σ_j g² of some lines, each of which a warp takes. Returns what each thread has of Σ g² before values are clipped.
template <class M>
__device__ __forceinline__ double sum_along(Shared<M>& shared, int first, int together) {
  const Job<M>& job = shared.job;
  const Rounds& rounds = shared.rounds;
  double unclipped_sq = 0;
#pragma unroll 1
  for (int own = thread_number() / kWarp; own < together; own += kWarps) {
    M sum = M(0);
#pragma unroll 1
    for (int column = thread_number() % kWarp; column < rounds.width; column += kWarp) {
      const Place at = place_of<Loose>(rounds.first + (first + own) * job.row[f::kCols] + column, true);
      M g[1];
      read_unclipped<Loose>(job, at, g);
      if (job.has(f::kValueClipSwitch)) unclipped_sq += double(g[0] * g[0]);  // an Inf must not hide behind the clip
      clip<Loose>(job, M(1), g);
      sum = fused(g[0], g[0], sum);
    }
    sum = of_lanes<Sum>(sum, kWarp);
    if (thread_number() % kWarp == 0) shared.lines.sums[own] = sum;
  }
  return unclipped_sq;
}

// Add some lines to the sums across them; each thread has columns of its own.
template <class M>
__device__ __forceinline__ void sum_across(Shared<M>& shared, int first, int together, bool begins, M* to) {
  const Job<M>& job = shared.job;
  const Rounds& rounds = shared.rounds;
  const bool weighs = job.has(f::kWeighsSwitch);
#pragma unroll 1
  for (int first_column = 0; first_column < rounds.width; first_column += kThreads) {
    const int column = first_column + thread_number();
    const bool here = column < rounds.width;
    M square = M(0), weighted = M(0);
    if (here && !begins) {
      square = to[column];
      if (weighs) weighted = to[job.row[f::kCols] + column];
    }
#pragma unroll 1
    for (int own = 0; own < together; ++own) {
      const Place at = place_of<Loose>(rounds.first + (first + own) * job.row[f::kCols] + column, here);
      M g[1], num[1], exp_avg[1];
      read_grad<Loose>(job, M(1), at, g);
      square = fused(g[0], g[0], square);
      if (!weighs) continue;
      numerator<Loose>(shared, at, g, num, exp_avg);
      weighted = fused(num[0] * num[0], shared.lines.weights[own], weighted);
    }
    if (!here) continue;
    to[column] = square;
    if (weighs) to[job.row[f::kCols] + column] = weighted;
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
  }
  const double param_sq = job.has(f::kParamRmsSwitch) ? param_squares<T>(job, unit) : 0.0;
  store_sums(shared, unit, grad_sq, param_sq, 0.0);
}

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
