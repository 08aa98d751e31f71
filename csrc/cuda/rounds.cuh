// Rounds of lines, in which a block sums a unit, and how their gradients come to it through its stash.

#ifndef FUSED_ADAFACTOR_CUDA_ROUNDS_CUH
#define FUSED_ADAFACTOR_CUDA_ROUNDS_CUH

#include "shared.cuh"
#include "walk.cuh"

namespace fused_adafactor {

template <class T>
constexpr int kStashedSize = T::kStashedDtype == kFloat32 ? 4 : 2;

// Set out for a unit of lines. The first rounds of those of one matrix stay in the stash where there is room.
template <class T, int kVectors, int kTogether, class M>
__device__ __forceinline__ void begin_rounds(Shared<M>& shared, int unit) {
  constexpr int N = T::kElements;
  if (is_first_thread()) {
    const Job<M>& job = shared.job;
    Rounds& rounds = shared.rounds;
    if (N > 1 && job.row[f::kChunk] > kWidest) __trap();  // nothing has room for it
    const int64_t chunks = job.row[f::kChunks];
    const Lines lines = lines_of(job, unit / chunks);
    const Range columns = columns_of(job, unit % chunks);
    const int64_t needed = (job.row[f::kChunk] + N * kVectors - 1) / (N * kVectors);
    // A round has no more lines than there are threads, also of lines that have nothing here.
    const int64_t fewest = most(threads_of_block<T>(job), kTogether);
    rounds.group = power_of_2(least(most(needed, fewest), kThreads));
    rounds.lines = kThreads / rounds.group * kTogether;
    rounds.first_line = lines.begin;
    rounds.first = lines.begin * job.row[f::kCols] + columns.begin;
    rounds.length = int(lines.end - lines.begin);
    rounds.block = int(lines.block);
    rounds.width = int(columns.end - columns.begin);
    rounds.held = 0;
    Stash& stash = shared.stash;
    const int size = kStashedSize<T>, round = rounds.lines * rounds.width * size;
    const int ring = kAhead * kTogether * kVectors * kThreads * N * size;
    rounds.ring = stash.bytes - ring;
    rounds.arrive =
        T::kStashes && rounds.width > 0 && rounds.length <= rounds.block && stash.end() <= rounds.ring;
    if (rounds.arrive && stash.keeps && stash.count < kMostHeld) {
      const int room = stash.room(rounds.ring, rounds.begin) / round * rounds.lines;
      rounds.held = room < rounds.length ? room : rounds.length;
    }
  }
  __syncthreads();
}

// Where a round lies in the stash.
template <class T, class M>
__device__ __forceinline__ char* round_at(const Shared<M>& shared, int round) {
  const Rounds& rounds = shared.rounds;
  const int line_bytes = rounds.width * kStashedSize<T>, first_line = round * rounds.lines;
  const int place = first_line < rounds.held ? rounds.begin + first_line * line_bytes
                                             : rounds.ring + round % kAhead * (rounds.lines * line_bytes);
  return stash_memory<M>() + place;
}

template <class M>
__device__ __forceinline__ uint32_t number_of_round(const Shared<M>& shared, int round) {
  return shared.stash.rounds + uint32_t(round);
}

// Have a round copied, if there is one. Its place is free: every thread has its part of the round before in registers.
template <class T, class M>
__device__ __forceinline__ void ask_for_round(Shared<M>& shared, int round) {
  constexpr int kSize = kStashedSize<T>;
  const Rounds& rounds = shared.rounds;
  const int line = round * rounds.lines, left = rounds.length - line, count = left < rounds.lines ? left : rounds.lines;
  const int64_t line_bytes = shared.job.row[f::kCols] * kSize;
  const char* from = static_cast<const char*>(shared.job.grad) + rounds.first * kSize + line * line_bytes;
  char* to = round_at<T>(shared, round);
  if constexpr (kBulkCopies) {
    if (count <= 0 || !is_first_thread()) return;
    uint64_t* barrier = shared.stash.arrivals + number_of_round(shared, round) % kAhead;
    const int bytes = rounds.width * kSize;
    expect_bytes(barrier, count * bytes);
    if (bytes == line_bytes) return copy_bulk(to, from, count * bytes, barrier);
    for (int i = 0; i < count; ++i) copy_bulk(to + i * bytes, from + i * line_bytes, bytes, barrier);
  } else {
    constexpr int N = T::kElements;
    for (int i = thread_number() / rounds.group; i < count; i += kThreads / rounds.group) {
      for (int c = thread_number() % rounds.group * N; c < rounds.width; c += rounds.group * N) {
#pragma unroll
        for (int byte = 0; byte < N * kSize; byte += 16) {
          copy_sixteen(to + (i * rounds.width + c) * kSize + byte, from + i * line_bytes + c * kSize + byte);
        }
      }
    }
    end_of_own_copies();
  }
}

template <class T, class M>
__device__ __forceinline__ void wait_for_round(Shared<M>& shared, int round) {
  if (!T::kStashes || !shared.rounds.arrive) return;
  if constexpr (kBulkCopies) {
    const uint32_t number = number_of_round(shared, round);
    wait_for_bytes(shared.stash.arrivals + number % kAhead, number / kAhead % 2);
  } else {
    wait_for_own_copies();
  }
}

// The gradient as it lies, of neighbours in a line of a round.
template <class T, class M>
__device__ __forceinline__ void read_of_round(const Shared<M>& shared, int round, int line, int column, Place at,
                                              M (&g)[T::kElements]) {
  if constexpr (T::kStashes) {
    if (shared.rounds.arrive) {
#pragma unroll
      for (int i = 0; i < T::kElements; ++i) g[i] = M(0);
      const int place = line * shared.rounds.width + column;
      if (at.count > 0) read_vector<From::kShared>(round_at<T>(shared, round), T::kStashedDtype, place, g);
      return;
    }
  }
  read_from<T>(shared.job, shared.job.grad, f::kGradStrides, T::grad_dtype(shared.job), at, g);
}

// Once all rounds have been summed: note what stays. Returns whether anything does.
template <class T, class M>
__device__ __forceinline__ bool end_rounds(Shared<M>& shared, int unit, int count) {
  const Rounds& rounds = shared.rounds;
  __syncthreads();
  if (!T::kStashes || !rounds.arrive) return false;
  if (is_first_thread()) {
    Stash& stash = shared.stash;
    stash.rounds += uint32_t(count);
    if (rounds.held > 0) {
      const int end = rounds.begin + rounds.held * rounds.width * kStashedSize<T>;
      const int32_t wave = int32_t(shared.job.row[f::kWave]);
      stash.held[stash.count] = {shared.task.tensor, unit, wave, rounds.begin, end, rounds.held};
      ++stash.count;
      // A unit that is kept is counted as applied twice: by this block, and by the one that has its ticket, which must
      // have read the mark before the wave's place in the scratch is another one's. Nobody counts before this: they
      // wait for the sums of this unit.
      atomicAdd(shared.launch.counters + wave, -1);
    }
  }
  return rounds.held > 0;
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_ROUNDS_CUH
