// The one kernel: blocks take tickets in order, and each ticket is a run of items. And its launch.
//
// The same tickets, tables and sums as backends/triton/kernel.py, which docs/design/0004 describes; what is CUDA's own
// is in docs/design/0007.

#include "second_sweep.cuh"

namespace fused_adafactor {

// What an item is of, from the tables.
template <class M>
__device__ __forceinline__ void begin_job(const CudaLaunch& launch, int tensor, Shared<M>& shared) {
  Job<M>& job = shared.job;
  const int64_t* row = launch.table + int64_t(tensor) * f::kTensorFields;
  const int64_t rule = row[f::kRule];
  const double* numbers = launch.numbers + rule * f::kNumbers;
  __syncthreads();  // the last item may still be read
  for (int i = thread_number(); i < f::kTensorFields; i += kThreads) job.row[i] = row[i];
  for (int i = thread_number(); i < f::kNumbers; i += kThreads) job.numbers[i] = M(numbers[i]);
  if (thread_number() == 0) {
    const int64_t* integers = launch.integers + rule * f::kIntegers;
    job.rule = numbers;
    job.seed = uint64_t(integers[f::kSeed]);
    job.step = uint32_t(integers[f::kStep]);
    job.grad = reinterpret_cast<const void*>(launch.grads[tensor]);
    job.factor = static_cast<const M*>(launch.factors)[tensor];
    job.scratch = static_cast<char*>(launch.scratch);
    job.outcome = launch.outcomes + int64_t(tensor) * f::kOutcomes;
    job.skip = launch.skips + tensor;
  }
  __syncthreads();
}

// Whether this is so for all threads; one of them looks, because others may be writing elsewhere.
template <class M, class F>
__device__ __forceinline__ bool seen_by_all(Shared<M>& shared, F look) {
  __syncthreads();
  if (thread_number() == 0) shared.flag = look() ? 1 : 0;
  __syncthreads();
  return shared.flag != 0;
}

template <class M>
__device__ __forceinline__ void run_item(const CudaLaunch& launch, int kind, int tensor, int64_t unit,
                                         Shared<M>& shared, const Held* held) {
  begin_job(launch, tensor, shared);
  const Job<M>& job = shared.job;
  int32_t* progress = launch.counters + job.row[f::kProgress];
  const int64_t units = job.row[f::kUnits], chunks = job.row[f::kChunks];
  const bool waits = launch.waits != 0, sweeps = launch.joined == 0;
  const auto wait_for_place = [&] {  // until the wave whose scratch this tensor takes over has been applied
    if (job.row[f::kAfter] >= 0) wait_for(launch.counters + job.row[f::kAfter], job.row[f::kAfterCount], waits);
  };
  const auto wait_for_sums = [&] {
    if (sweeps) wait_for(progress + f::kStatsDone, units, waits);
  };
  const auto skipped = [&] { return seen_by_all(shared, [&] { return *job.skip != 0; }); };
  const auto held_by_a_block = [&] {
    const double* sums = job.template in_scratch<double>(f::kSums) + unit * f::kUnitSums;
    return launch.stash_bytes > 0 && seen_by_all(shared, [&] { return sums[f::kUnitHeld] > 0; });
  };
  const auto unknown = [&] { return seen_by_all(shared, [&] { return job.outcome[f::kUnknown] > 0; }); };
  switch (kind) {
    case f::kChunkKind:
      wait_for_place();
      sum_chunk_of(shared, unit);
      count_up(progress + f::kChunksDone + unit / chunks, waits);
      break;
    case f::kStatsKind:
      wait_for_place();
      if (chunks > 1) wait_for(progress + f::kChunksDone + unit / chunks, chunks, waits);
      sum_unit(shared, unit);
      count_up(progress + f::kStatsDone, waits);
      break;
    case f::kTotalKind:
      wait_for(progress + f::kStatsDone, units, waits);
      total_grad_sq(shared);
      break;
    case f::kMergeKind:
      wait_for_sums();
      merge(shared, unit);
      count_up(progress + f::kMergesDone, waits);
      break;
    case f::kFinalizeKind: {
      wait_for_sums();
      wait_for(progress + f::kMergesDone, job.row[f::kMerges], waits);
      const bool measured = finalize(shared);
      count_up(progress + f::kFinalized, waits);
      if (measured) count_up(progress + f::kMeasured, waits);
      break;
    }
    case f::kUpdateRmsKind:
      wait_for(progress + f::kFinalized, 1, waits);
      if (unknown()) measure_unit(shared, unit);
      count_up(progress + f::kRmsDone, waits);
      break;
    case f::kMeasureKind:
      wait_for(progress + f::kFinalized, 1, waits);
      wait_for(progress + f::kRmsDone, units, waits);
      if (unknown()) {
        measure(shared);
        count_up(progress + f::kMeasured, waits);
      }
      break;
    case f::kApplyKind:
      wait_for(progress + f::kMeasured, 1, waits);
      if (held == nullptr && held_by_a_block()) break;
      if (!skipped()) apply_unit(shared, unit, held);
      count_up(launch.counters + job.row[f::kWave], waits);
      break;
    case f::kAccumulateKind:
    case f::kAverageKind:
      if (!skipped()) idle_unit(job, unit, kind == f::kAccumulateKind);
      break;
  }
}

// The last wave whose second sweep begins before a ticket that begins with this item, as `tickets_of` orders them; the
// first sweep of a wave comes before the second one of the wave before it.
__device__ __forceinline__ int64_t waves_due(const CudaLaunch& launch, const int32_t* item) {
  const int64_t wave = launch.table[item[1] * int64_t(f::kTensorFields) + f::kWave];
  if (item[0] == f::kApplyKind) return wave;
  return item[0] == f::kChunkKind || item[0] == f::kStatsKind ? wave - 2 : wave - 1;
}

// Apply the units that this block keeps, of waves up to this one.
//
// Nobody else will, so it is done before the block may wait for what comes after that. Then it is as if the block held
// their tickets: what they wait for has lower ones, and what waits for them has higher ones.
template <class M>
__device__ __forceinline__ void apply_held(const CudaLaunch& launch, int64_t wave, Shared<M>& shared) {
  Stash& stash = shared.stash;
  int done = 0;
  for (; done < stash.count && stash.held[done].wave <= wave; ++done) {
    const Held* held = stash.held + done;
    run_item(launch, f::kApplyKind, held->tensor, held->unit, shared, held);
  }
  if (done == 0) return;
  __syncthreads();
  if (thread_number() == 0) {
    stash.count -= done;
    for (int i = 0; i < stash.count; ++i) stash.held[i] = stash.held[i + done];
  }
  __syncthreads();
}

// The items of a ticket, one after the other.
template <class M>
__device__ __forceinline__ void run_ticket(const CudaLaunch& launch, int64_t ticket, Shared<M>& shared) {
  const int begin = launch.tickets[ticket], end = launch.tickets[ticket + 1];
  for (int item = begin; item < end; ++item) {
    const int32_t* what = launch.items + 3 * int64_t(item);
    if (item == begin && shared.stash.count > 0) apply_held(launch, waves_due(launch, what), shared);
    if (thread_number() == 0) {
      shared.stash.tensor = what[1];
      shared.stash.keeps = launch.waits != 0 && end - begin == 1;  // else it is applied by this ticket
    }
    run_item(launch, what[0], what[1], what[2], shared, nullptr);
  }
}

template <class M>
__device__ __forceinline__ void step(const CudaLaunch& launch, Shared<M>& shared, char* stash_memory) {
  if (thread_number() == 0) {
    shared.stash.memory = stash_memory;
    shared.stash.bytes = launch.stash_bytes;
    shared.stash.count = 0;
    shared.stash.rounds = 0;
    for (int i = 0; i < kAhead; ++i) make_barrier(shared.stash.arrivals + i);
  }
  __syncthreads();
  if (launch.waits == 0) return run_ticket(launch, launch.begin + blockIdx.x, shared);
  for (;;) {
    __syncthreads();
    if (thread_number() == 0) shared.ticket = launch.begin + atomicAdd(launch.counters + f::kNextTicket, 1);
    __syncthreads();
    const int64_t ticket = shared.ticket;
    if (ticket >= launch.end) break;
    run_ticket(launch, ticket, shared);
  }
  apply_held(launch, INT64_MAX, shared);
  // The last block to leave sets all counters back, for the next launch.
  const bool last = seen_by_all(shared, [&] {
    __threadfence();
    return atomicAdd(launch.counters + f::kProgramsDone, 1) == int(gridDim.x) - 1;
  });
  if (!last) return;
  for (int i = thread_number(); i < launch.counter_count; i += kThreads) launch.counters[i] = 0;
}

#if defined(FA_EMULATED)
char* shared_memory() { return emulation::shared_memory(); }
#else
extern __shared__ uint4 shared_words[];
__device__ __forceinline__ char* shared_memory() { return reinterpret_cast<char*>(shared_words); }
#endif

// Blocks of a multiprocessor hide each other's waits.
constexpr int kBlocksOfProcessor = 2;

template <class M>
__global__ void __launch_bounds__(kThreads, kBlocksOfProcessor) run_tickets(const CudaLaunch launch) {
  char* memory = shared_memory();
  step(launch, *reinterpret_cast<Shared<M>*>(memory), memory + shared_size<M>());
}

}  // namespace fused_adafactor

#include "launch.h"
