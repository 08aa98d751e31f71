// The second sweep, which writes, and what stands for it where there is no update.

#ifndef FUSED_ADAFACTOR_CUDA_SECOND_SWEEP_CUH
#define FUSED_ADAFACTOR_CUDA_SECOND_SWEEP_CUH

#include "stash.cuh"
#include "third_sweep.cuh"

namespace fused_adafactor {

// Store avg ← momentum avg + (1 - momentum) p, p as it is stored; p becomes that in its own dtype.
template <class T, class M>
__device__ __forceinline__ void average(const Job<M>& job, Place at, M (&p)[T::kElements]) {
  M average[T::kElements];
  read<T>(job, f::kAverage, f::kStateStrides, DtypeOf<M>::value, at, average);
  const M momentum = job.numbers[f::kAverageMomentum], rest = job.numbers[f::kAverageRest];
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) average[i] = new_moment(average[i], p[i], momentum, rest);
  write<T>(job, f::kAverage, f::kStateStrides, DtypeOf<M>::value, at, average);
#pragma unroll
  for (int i = 0; i < T::kElements; ++i) p[i] = stored(average[i], T::param_dtype(job));
}

// p as it will be stored: rounded to nearest, or with the random bits of the elements' row-major indices.
template <class T, class M>
__device__ __forceinline__ void round_param(const Job<M>& job, Place at, M (&p)[T::kElements]) {
  if (!T::has(job, f::kStochasticSwitch)) {
#pragma unroll
    for (int i = 0; i < T::kElements; ++i) p[i] = stored(p[i], T::param_dtype(job));
    return;
  }
  const uint64_t index = at.count > 0 ? element_of<T>(job, at.k) : 0;
  if (T::kElements > 1 && T::has(job, f::kSplitSwitch) && !T::has(job, f::kWholeBlocksSwitch)) {
    round_apart<T>(job, f::kParamStream, index, p);
  } else {
    round_block<T>(job, f::kParamStream, index, p);
  }
}

// p ← round(decay p - delta), and the moments, of neighbouring elements.
template <class T, class M>
__device__ __forceinline__ void apply(Shared<M>& shared, Place at, const M (&g)[T::kElements],
                                      const M (&inverse_v)[T::kElements]) {
  constexpr int N = T::kElements;
  const Job<M>& job = shared.job;
  const int dtype = T::param_dtype(job), momentum = T::momentum(job);
  Update<M, N> u;
  update_of<T, true>(shared, at, g, inverse_v, u);
  M delta[N];
  if (momentum == kMomentumUpdate || momentum == kMomentumStep) {
    const M scale = momentum == kMomentumUpdate ? job.by_clip : job.alpha * job.by_clip;
    M value[N];
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = u.value[i] * scale;
    new_exp_avg<T>(shared, at, value, u.exp_avg);
#pragma unroll
    for (int i = 0; i < N; ++i) delta[i] = momentum == kMomentumUpdate ? job.alpha * u.exp_avg[i] : u.exp_avg[i];
  } else {
    const M scale = job.alpha * job.by_clip;
#pragma unroll
    for (int i = 0; i < N; ++i) delta[i] = u.value[i] * scale;
  }
  if (momentum != kNoMomentum) {
    const int kept = int(job.row[f::kExpAvgDtype]);
    if (kept == kBlocks) {
      write_blocks<T>(shared, at, u.exp_avg);
    } else {
      write<T>(job, f::kExpAvg, f::kStateStrides, kept, at, u.exp_avg);
    }
  }
  if (T::has(job, f::kAccumulatesSwitch)) {
    const M zero[N] = {};
    write<T>(job, f::kAccumulator, f::kStateStrides, DtypeOf<M>::value, at, zero);
  }
  const bool kahan = T::has(job, f::kKahanSwitch);
  M p[N], lost[N] = {};
  read<T, From::kLast>(job, f::kParam, f::kStrides, dtype, at, p);
  if (kahan) {
    read<T>(job, f::kCompensation, f::kStateStrides, dtype, at, lost);
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] += lost[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] = fused(job.decayed, p[i], -delta[i]);
  if (kahan) {
#pragma unroll
    for (int i = 0; i < N; ++i) lost[i] = p[i];
  }
  round_param<T>(job, at, p);
  const bool averages = T::has(job, f::kAveragesSwitch), overwrites = averages && job.numbers[f::kOverwrite] > M(0);
  if (kahan) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      // What was lost belongs to the value that is overwritten.
      lost[i] = is_finite(p[i]) && !overwrites ? lost[i] - p[i] : M(0);
    }
    write<T>(job, f::kCompensation, f::kStateStrides, dtype, at, lost);
  }
  if (!overwrites) write<T>(job, f::kParam, f::kStrides, dtype, at, p);
  if (!averages) return;
  average<T>(job, at, p);
  if (overwrites) write<T>(job, f::kParam, f::kStrides, dtype, at, p);
}

// Write some second moments across the lines of a matrix.
template <class M>
__device__ __forceinline__ void write_across(const Job<M>& job, int64_t matrix, Range columns) {
  const int64_t first = matrix * job.row[f::kCols];
  const M* kept = job.template in_scratch<M>(f::kCross) + first;
  for (int64_t column = columns.begin + thread_number(); column < columns.end; column += kThreads) {
    write_one(reinterpret_cast<void*>(job.row[f::kCrossVar]), int(job.row[f::kMomentDtype]), first + column,
              kept[column]);
  }
}

// Write the second moments of the lines of a slab, and of the columns of matrices that begin in it.
template <class M>
__device__ __forceinline__ void write_factors(const Job<M>& job, int64_t slab, int64_t chunk, Lines lines,
                                              Range columns) {
  const int dtype = int(job.row[f::kMomentDtype]);
  const int64_t rows = job.row[f::kRows];
  if (rows == 0) return write_across(job, slab, columns);  // they are those of other processes' lines
  if (chunk == 0) {
    void* line_var = reinterpret_cast<void*>(job.row[f::kLineVar]);
    const M* kept = job.template in_scratch<M>(f::kLines);
    for (int64_t line = lines.begin + thread_number(); line < lines.end; line += kThreads) {
      write_one(line_var, dtype, line, kept[line]);
    }
  }
  for (int64_t matrix = (lines.begin + rows - 1) / rows; matrix * rows < lines.end; ++matrix) {
    write_across(job, matrix, columns);
  }
}

// Write a slab of lines of matrices, and what else the tensor owns of them. The gradients of its first lines may be in
// the stash.
template <class T, class M>
__device__ __noinline__ void apply_lines(int unit) {
  Shared<M>& shared = shared_of<M>();
  constexpr int N = T::kElements;
  const Job<M>& job = shared.job;
  const int64_t chunks = job.row[f::kChunks], chunk = unit % chunks, rows = job.row[f::kRows];
  const int64_t cols = job.row[f::kCols];
  const Lines lines = lines_of(job, unit / chunks);
  const Range columns = columns_of(job, chunk);
  const int64_t first_matrix = rows > 0 ? lines.begin / rows : 0;
  const bool several = lines.end - lines.begin > lines.block;
  const int held = T::kStashes && shared.task.from_stash ? shared.stash.held[0].lines : 0;
  for (Walk<T> walk(lines.begin, lines.end, columns, threads_of_block<T>(job)); walk.round(); walk.next()) {
    const bool here = walk.here();
    const Place at = walk.place(cols);
    M g[N] = {}, inverse_v[N];
    const int line = int(walk.line() - lines.begin);
    if (here && line < held) {
      if constexpr (T::kStashes) {
        const int64_t place = line * (columns.end - columns.begin) + walk.column() - columns.begin;
        read_vector<From::kShared>(stash_memory<M>() + shared.stash.held[0].begin, T::kStashedDtype, place, g);
      }
    } else {
      read_from<T, From::kLast>(job, job.grad, f::kGradStrides, T::grad_dtype(job), at, g);
    }
    unscale<T>(job, at, g);
    clip<T>(job, job.factor, g);
    int64_t matrix = first_matrix;
    if (several) matrix += uint32_t(line) / uint32_t(rows);
    const M factor = here ? line_factor(job, walk.line(), matrix) : M(0);
    inverse_roots<T>(job, factor, matrix, walk.column(), here, inverse_v);
    apply<T>(shared, at, g, inverse_v);
  }
  write_factors(job, unit / chunks, chunk, lines, columns);
}

// Write elements that have no lines, and what else the tensor owns of them.
template <class T, class M>
__device__ __noinline__ void apply_flat(int unit) {
  Shared<M>& shared = shared_of<M>();
  constexpr int N = T::kElements;
  const Job<M>& job = shared.job;
  for (FlatWalk<T> walk(elements_of(job, unit)); walk.round(); walk.next()) {
    const Place at = walk.place();
    M g[N], var[N], inverse_v[N];
    read_grad<T, From::kLast>(job, job.factor, at, g);
    new_var<T>(job, at, g, var);
#pragma unroll
    for (int i = 0; i < N; ++i) inverse_v[i] = inverse_root(var[i]);
    write<T>(job, f::kVar, f::kStateStrides, int(job.row[f::kMomentDtype]), at, var);
    apply<T>(shared, at, g, inverse_v);
  }
}

template <class M>
__device__ __noinline__ void apply_tiny(int unit) {
  Shared<M>& shared = shared_of<M>();
  const Job<M>& job = shared.job;
  for (TinyWalk<M> walk(job, elements_of(job, unit)); walk.round(); walk.next()) {
    read_tiny(shared, walk);
    for (int first = 0; first < walk.count; first += kThreads) {
      const Place at = walk.place(first);
      const int element = first + thread_number();
      const M g[1] = {at.count > 0 ? shared.tiny.grad[element] : M(0)};
      const M inverse_v[1] = {at.count > 0 ? tiny_inverse_root(shared, walk, element) : M(0)};
      apply<TinyMatrices>(shared, at, g, inverse_v);
    }
    write_tiny_factors(shared, walk);
  }
}

// The second sweep of a unit, whatever its form.
template <class M>
__device__ __forceinline__ void apply_unit(Shared<M>& shared, int unit) {
  Job<M>& job = shared.job;
  // What finalizing has found out, which another block may have done.
  if (is_first_thread()) {
    job.alpha = M(job.outcome[f::kAlpha]);
    job.by_clip = M(job.outcome[f::kByClip]);
    job.decayed = M(job.outcome[f::kDecayed]);
  }
  __syncthreads();
  if (job.row[f::kForm] == f::kTiny) {
    apply_tiny<M>(unit);
  } else if (job.row[f::kForm] == f::kUnfactored) {
    with_alignment(job, [&](auto traits) { apply_flat<decltype(traits), M>(unit); });
  } else {
    with_traits<4>(job, [&](auto traits) { apply_lines<decltype(traits), M>(unit); });
  }
}

// Elements of a slab, whatever its form; the first unit of a slab takes them all.
template <class M>
__device__ __forceinline__ Range elements_of_unit(const Job<M>& job, int64_t unit) {
  const int64_t chunks = job.row[f::kChunks];
  const Range elements = elements_of(job, unit / chunks);
  return {elements.begin, unit % chunks == 0 ? elements.end : elements.begin};
}

// Move the EMA of the weights where there is no update.
template <class T, class M>
__device__ __forceinline__ void average_alone(const Job<M>& job, Place at) {
  const int dtype = T::param_dtype(job);
  M p[T::kElements];
  read<T>(job, f::kParam, f::kStrides, dtype, at, p);
  average<T>(job, at, p);
  if (!(job.numbers[f::kOverwrite] > M(0))) return;
  write<T>(job, f::kParam, f::kStrides, dtype, at, p);
  if (!T::has(job, f::kKahanSwitch)) return;
  const M zero[T::kElements] = {};  // it belongs to the value that was overwritten
  write<T>(job, f::kCompensation, f::kStateStrides, dtype, at, zero);
}

// Between two updates: add a slab of g to the accumulator where `accumulates`, and move the EMA of the weights.
template <class T, class M>
__device__ __noinline__ void idle_slab(int unit, bool accumulates) {
  const Job<M>& job = shared_of<M>().job;
  for (FlatWalk<T> walk(elements_of_unit(job, unit)); walk.round(); walk.next()) {
    const Place at = walk.place();
    if (accumulates) {
      M g[T::kElements], sum[T::kElements];
      read_from<T, From::kLast>(job, job.grad, f::kGradStrides, T::grad_dtype(job), at, g);
      read<T>(job, f::kAccumulator, f::kStateStrides, DtypeOf<M>::value, at, sum);
      const M scale = job.numbers[f::kGradScale];
#pragma unroll
      for (int i = 0; i < T::kElements; ++i) sum[i] = sum[i] + g[i] * scale;
      write<T>(job, f::kAccumulator, f::kStateStrides, DtypeOf<M>::value, at, sum);
    }
    if (T::has(job, f::kAveragesSwitch)) average_alone<T>(job, at);
  }
}

template <class M>
__device__ __forceinline__ void idle_unit(const Job<M>& job, int unit, bool accumulates) {
  with_alignment(job, [&](auto traits) { idle_slab<decltype(traits), M>(unit, accumulates); });
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_SECOND_SWEEP_CUH
