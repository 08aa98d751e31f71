// The one kernel: blocks take tickets in order, and each ticket is a run of items. And its launch.
//
// The same tickets, tables and sums as backends/triton/kernel.py, which docs/design/0004 describes; what is CUDA's own
// is in docs/design/0007.

#include "first_sweep.cuh"
#include "second_sweep.cuh"

namespace fused_adafactor {

// What an item is of, from the tables.
template <class M>
__device__ __forceinline__ void begin_job(Shared<M>& shared) {
  const CudaLaunch& launch = shared.launch;
  Job<M>& job = shared.job;
  const int tensor = shared.task.tensor;
  const int64_t* row = launch.table + int64_t(tensor) * f::kTensorFields;
  const int64_t rule = row[f::kRule];
  const double* numbers = launch.numbers + rule * f::kNumbers;
  for (int i = thread_number_anew(); i < f::kTensorFields; i += kThreads) job.row[i] = row[i];
  for (int i = thread_number_anew(); i < f::kNumbers; i += kThreads) job.numbers[i] = M(numbers[i]);
  if (is_first_thread()) {
    const int64_t* integers = launch.integers + rule * f::kIntegers;
    job.rule = numbers;
    job.seed = uint64_t(integers[f::kSeed]);
    job.step = uint32_t(integers[f::kStep]);
    job.grad = reinterpret_cast<const void*>(launch.grads[tensor]);
    job.factor = static_cast<const M*>(launch.factors)[tensor];
    job.scratch = static_cast<char*>(launch.scratch);
    job.outcome = launch.outcomes + int64_t(tensor) * f::kOutcomes;
    job.skip = launch.skips + tensor;
    job.progress = launch.counters + row[f::kProgress];
  }
  __syncthreads();
}

// Whether this is so for all threads; one of them looks, because others may be writing elsewhere.
template <class M, class F>
__device__ __forceinline__ bool seen_by_all(Shared<M>& shared, F look) {
  __syncthreads();
  if (is_first_thread()) shared.flag = look() ? 1 : 0;
  __syncthreads();
  return shared.flag != 0;
}

template <class M>
__device__ __forceinline__ bool is_skipped(Shared<M>& shared) {
  return seen_by_all(shared, [&] { return *shared.job.skip != 0; });
}

// Whether RMS(u) takes the third sweep.
template <class M>
__device__ __forceinline__ bool is_unknown(Shared<M>& shared) {
  return seen_by_all(shared, [&] { return shared.job.outcome[f::kUnknown] > 0; });
}

// Whether a block keeps the gradient of the unit, and applies it itself.
template <class M>
__device__ __forceinline__ bool is_held_elsewhere(Shared<M>& shared) {
  if (shared.launch.keeps == 0 || shared.task.from_stash) return false;
  const double* sums = shared.job.template in_scratch<double>(f::kSums) + int64_t(shared.task.unit) * f::kUnitSums;
  return seen_by_all(shared, [&] { return sums[f::kUnitHeld] > 0; });
}

// Wait for a counter of the tensor, where items wait for each other.
template <class M>
__device__ __forceinline__ void wait_for_counter(const Shared<M>& shared, int counter, int64_t value) {
  wait_for(shared.job.progress + counter, value, shared.launch.waits != 0);
}

template <class M>
__device__ __forceinline__ void count_up_counter(const Shared<M>& shared, int counter) {
  count_up(shared.job.progress + counter, shared.launch.waits != 0);
}

// Wait until the wave whose scratch this tensor takes over has been applied.
template <class M>
__device__ __forceinline__ void wait_for_place(const Shared<M>& shared) {
  const int64_t after = shared.job.row[f::kAfter];
  if (after >= 0) wait_for(shared.launch.counters + after, shared.job.row[f::kAfterCount], shared.launch.waits != 0);
}

template <class M>
__device__ __forceinline__ void wait_for_sums(const Shared<M>& shared) {
  if (shared.launch.joined == 0) wait_for_counter(shared, f::kStatsDone, shared.job.row[f::kUnits]);
}

// The item of the task.
template <class M>
__device__ __forceinline__ void run_item(Shared<M>& shared) {
  begin_job(shared);
  const Job<M>& job = shared.job;
  const Task& task = shared.task;
  switch (task.kind) {
    case f::kChunkKind:
      wait_for_place(shared);
      sum_chunk_of(shared, task.unit);
      count_up_counter(shared, f::kChunksDone + task.unit / int(job.row[f::kChunks]));
      break;
    case f::kStatsKind:
      wait_for_place(shared);
      if (job.row[f::kChunks] > 1) {
        wait_for_counter(shared, f::kChunksDone + task.unit / int(job.row[f::kChunks]), job.row[f::kChunks]);
      }
      sum_unit(shared, task.unit);
      count_up_counter(shared, f::kStatsDone);
      break;
    case f::kTotalKind:
      wait_for_counter(shared, f::kStatsDone, job.row[f::kUnits]);
      if (job.in_message(f::kSharedCrossSq) != nullptr) wait_for_counter(shared, f::kMergesDone, job.row[f::kMerges]);
      total<M>();
      break;
    case f::kShareKind:
      wait_for_sums(shared);
      share<M>(task.unit);
      count_up_counter(shared, f::kMergesDone);
      break;
    case f::kMergeKind:
      wait_for_sums(shared);
      merge<M>(task.unit);
      count_up_counter(shared, f::kMergesDone);
      break;
    case f::kFinalizeKind:
      wait_for_sums(shared);
      if (!knows_update(shared)) wait_for_counter(shared, f::kMergesDone, job.row[f::kMerges]);
      finalize<M>();
      count_up_counter(shared, f::kFinalized);
      if (!is_unknown(shared)) count_up_counter(shared, f::kMeasured);
      break;
    case f::kUpdateRmsKind:
      wait_for_counter(shared, f::kFinalized, 1);
      if (is_unknown(shared)) measure_unit(shared, task.unit);
      count_up_counter(shared, f::kRmsDone);
      break;
    case f::kMeasureKind:
      wait_for_counter(shared, f::kFinalized, 1);
      wait_for_counter(shared, f::kRmsDone, job.row[f::kUnits]);
      if (!is_unknown(shared)) break;
      measure<M>();
      count_up_counter(shared, f::kMeasured);
      break;
    case f::kSettleKind:
      settle<M>();
      count_up_counter(shared, f::kMeasured);
      break;
    case f::kApplyKind:
      wait_for_counter(shared, f::kMeasured, 1);
      if (!is_held_elsewhere(shared) && !is_skipped(shared)) apply_unit(shared, task.unit);
      count_up(shared.launch.counters + job.row[f::kWave], shared.launch.waits != 0);
      break;
    case f::kAccumulateKind:
    case f::kAverageKind:
      if (!is_skipped(shared)) idle_unit(job, task.unit, task.kind == f::kAccumulateKind);
      break;
  }
}

// The last wave whose second sweep begins before a ticket that begins with this item, as `tickets_of` orders them; the
// first sweep of a wave comes before the second one of the wave before it.
__device__ __forceinline__ int64_t wave_before(const CudaLaunch& launch, const int32_t* item) {
  const int64_t wave = launch.table[item[1] * int64_t(f::kTensorFields) + f::kWave];
  if (item[0] == f::kApplyKind) return wave;
  return item[0] == f::kChunkKind || item[0] == f::kStatsKind ? wave - 2 : wave - 1;
}

// The next ticket of this block, or none: then all that it keeps is due.
template <class M>
__device__ __forceinline__ void take_ticket(Shared<M>& shared) {
  const CudaLaunch& launch = shared.launch;
  Task& task = shared.task;
  int64_t ticket = launch.begin + task.item;  // the only one of a block, where nobody waits
  if (launch.waits != 0) ticket = int64_t(launch.begin) + atomicAdd(launch.counters + f::kNextTicket, 1);
  if (launch.waits != 0 ? ticket >= launch.end : task.state != Task::kBeginning) {
    task.state = Task::kEnding;
    task.wave = INT64_MAX;
    return;
  }
  task.state = Task::kTaking;
  task.item = launch.tickets[ticket];
  task.end = launch.tickets[ticket + 1];
  task.wave = wave_before(launch, launch.items + 3 * int64_t(task.item));
  shared.stash.keeps = launch.keeps != 0 && task.end - task.item == 1;  // else it is applied by this ticket
}

// What the block does next; one thread sees to it.
//
// Units that it keeps nobody else will apply, so they come before items that may wait for what comes after them. Then
// it is as if the block held their tickets: what they wait for has lower ones, and what waits for them higher ones.
template <class M>
__device__ __forceinline__ void next_task(Shared<M>& shared) {
  Task& task = shared.task;
  Stash& stash = shared.stash;
  if (task.from_stash) {
    --stash.count;
#pragma unroll 1
    for (int i = 0; i < stash.count; ++i) stash.held[i] = stash.held[i + 1];
  } else if (task.state == Task::kTaking) {
    ++task.item;
  }
  if (task.state == Task::kBeginning || (task.state == Task::kTaking && task.item == task.end)) take_ticket(shared);
  task.from_stash = stash.count > 0 && stash.held[0].wave <= task.wave;
  if (task.from_stash) {
    task.kind = f::kApplyKind;
    task.tensor = stash.held[0].tensor;
    task.unit = stash.held[0].unit;
  } else if (task.state == Task::kTaking) {
    const int32_t* what = shared.launch.items + 3 * int64_t(task.item);
    task.kind = what[0];
    task.tensor = what[1];
    task.unit = what[2];
  } else {
    task.kind = Task::kNothing;
  }
}

template <class M>
__device__ __forceinline__ void step(const CudaLaunch& launch, Shared<M>& shared) {
  if (is_first_thread()) {
    shared.launch = launch;
    shared.task.state = Task::kBeginning;
    shared.task.item = int32_t(blockIdx.x);
    shared.task.from_stash = false;
    shared.stash.bytes = launch.stash_bytes;
    shared.stash.count = 0;
    shared.stash.rounds = 0;
    for (int i = 0; i < kAhead; ++i) make_barrier(shared.stash.arrivals + i);
  }
  for (;;) {
    if (is_first_thread()) next_task(shared);
    __syncthreads();
    if (shared.task.kind == Task::kNothing) break;
    run_item(shared);
    __syncthreads();
  }
  if (launch.waits == 0) return;
  // The last block to leave sets all counters back, for the next launch.
  const bool last = seen_by_all(shared, [&] {
    __threadfence();
    return atomicAdd(launch.counters + f::kProgramsDone, 1) == int(gridDim.x) - 1;
  });
  if (!last) return;
  for (int i = thread_number_anew(); i < launch.counter_count; i += kThreads) launch.counters[i] = 0;
}

// Blocks of a multiprocessor hide each other's waits. Numbers of float64 take as many registers as there are.
constexpr int kBlocksOfProcessor = 2;

template <class M>
constexpr int kLeastBlocks = sizeof(M) == sizeof(float) ? kBlocksOfProcessor : 1;

template <class M>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<M>) run_tickets(const CudaLaunch launch) {
  step(launch, shared_of<M>());
}

}  // namespace fused_adafactor

#include "launch.cuh"
