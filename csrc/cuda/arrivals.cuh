// Rounds of lines on their way to a block's first sweep, through its stash.

#ifndef FUSED_ADAFACTOR_CUDA_ARRIVALS_CUH
#define FUSED_ADAFACTOR_CUDA_ARRIVALS_CUH

#include "shared.cuh"
#include "walk.cuh"

namespace fused_adafactor {

// Of the lines of a unit that are of one matrix. `kAhead` rounds are asked for before they are summed; a round's place is
// free again when every thread has its part of it in registers. The first rounds of a unit stay where there is room.
template <class T, int kVectors, int kTogether, class M>
class Arrivals {
 public:
  __device__ __forceinline__ Arrivals(Shared<M>& shared, int unit, Lines lines, Range columns, int group)
      : stash_(shared.stash), job_(shared.job), group_(group) {
    if constexpr (!T::kStashes) return;
    length_ = int(lines.end - lines.begin);
    width_ = int(columns.end - columns.begin);
    first_ = lines.begin * job_.row[f::kCols] + columns.begin;
    lines_ = kThreads / group * kTogether;
    const int round = lines_ * width_ * kSize, ring = kAhead * kTogether * kVectors * kThreads * T::kElements * kSize;
    there_ = length_ <= lines.block && stash_.bytes - stash_.end() >= ring;
    if (!there_) return;
    ring_ = stash_.bytes - ring;
    if (stash_.keeps && stash_.count < kMostHeld) {
      const int room = stash_.room(ring_, begin_), rounds = room / round;
      held_ = rounds * lines_ < length_ ? rounds * lines_ : length_;
    }
    unit_ = unit;
    for (int ahead = 0; ahead < kAhead; ++ahead) ask_for(ahead);
  }

  // Whether the gradient comes this way.
  __device__ __forceinline__ bool there() const { return T::kStashes && there_; }

  __device__ __forceinline__ void wait_for_round() {
    if (!there()) return;
    if constexpr (kBulkCopies) {
      const uint32_t number = stash_.rounds + uint32_t(round_);
      wait_for_bytes(stash_.arrivals + number % kAhead, number / kAhead % 2);
    } else {
      wait_for_own_copies();
    }
  }

  // Neighbours in a line of this round.
  template <int N>
  __device__ __forceinline__ void read(int line, int column, bool here, M (&g)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] = M(0);
    if constexpr (T::kStashes) {
      if (here) read_vector<false>(place(round_), kDtype, line * width_ + column, g);
    }
  }

  // Once all threads have read this round.
  __device__ __forceinline__ void ask_for_next() {
    if (!there()) return;
    ask_for(round_ + kAhead);
    ++round_;
  }

  // Tell what is kept of the unit; whether anything is.
  __device__ __forceinline__ bool end() {
    if (!there()) return false;
    __syncthreads();
    if (thread_number() == 0) {
      stash_.rounds += uint32_t(round_);
      if (held_ > 0) {
        Held& held = stash_.held[stash_.count++];
        held = {stash_.tensor, unit_, int32_t(job_.row[f::kWave]), begin_, begin_ + held_ * width_ * kSize, held_};
      }
    }
    return held_ > 0;
  }

 private:
  static constexpr int kDtype = T::kStashedDtype;
  static constexpr int kSize = kDtype == kFloat32 ? 4 : 2;

  // Where a round lies.
  __device__ __forceinline__ char* place(int round) const {
    const int first_line = round * lines_;
    const int ring_round = lines_ * width_ * kSize;
    return stash_.memory + (first_line < held_ ? begin_ + first_line * width_ * kSize : ring_ + round % kAhead * ring_round);
  }

  __device__ __forceinline__ void ask_for(int round) {
    const int line = round * lines_, count = length_ - line < lines_ ? length_ - line : lines_;
    const char* grad = static_cast<const char*>(job_.grad);
    const int64_t cols = job_.row[f::kCols];
    if constexpr (kBulkCopies) {
      if (count <= 0 || thread_number() != 0) return;
      uint64_t* barrier = stash_.arrivals + (stash_.rounds + uint32_t(round)) % kAhead;
      expect_bytes(barrier, count * width_ * kSize);
      if (width_ == cols) {
        copy_bulk(place(round), grad + (first_ + line * cols) * kSize, count * width_ * kSize, barrier);
        return;
      }
      for (int i = 0; i < count; ++i) {
        copy_bulk(place(round) + i * width_ * kSize, grad + (first_ + (line + i) * cols) * kSize, width_ * kSize, barrier);
      }
    } else {
      const int lane = thread_number() % group_;
      for (int i = thread_number() / group_; i < count; i += kThreads / group_) {
        for (int column = lane * T::kElements; column < width_; column += group_ * T::kElements) {
          const char* from = grad + (first_ + (line + i) * cols + column) * kSize;
          char* to = place(round) + (i * width_ + column) * kSize;
          for (int byte = 0; byte < T::kElements * kSize; byte += 16) copy_sixteen(to + byte, from + byte);
        }
      }
      end_of_own_copies();
    }
  }

  Stash& stash_;
  const Job<M>& job_;
  int group_;
  int length_ = 0, width_ = 0, lines_ = 1;  // of the unit; lines of a round
  int64_t first_ = 0;                       // element
  int ring_ = 0, begin_ = 0;                // bytes of the stash
  int held_ = 0;                            // lines that stay
  int round_ = 0, unit_ = 0;
  bool there_ = false;
};

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_ARRIVALS_CUH
