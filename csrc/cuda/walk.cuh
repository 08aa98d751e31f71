// How a block's threads go through elements, all of them together: every thread takes part in every round.

#ifndef FUSED_ADAFACTOR_CUDA_WALK_CUH
#define FUSED_ADAFACTOR_CUDA_WALK_CUH

#include "memory.cuh"

namespace fused_adafactor {

// Some columns of some lines, line after line, whatever their length: all threads are at work. A line takes a multiple of
// `together` threads, which have something of it together.
template <class T>
class Walk {
 public:
  __device__ __forceinline__ Walk(int64_t begin, int64_t end, Range columns, int together)
      : line_(begin), end_(end), columns_(columns) {
    constexpr int N = T::kElements;
    const int needed = int(most((columns.end - columns.begin + N - 1) / N, 1));  // a part may have lines of nothing
    per_line_ = (needed + together - 1) / together * together;
    lines_on_ = kThreads / per_line_;
    rest_on_ = kThreads % per_line_;
    line_ += thread_number() / per_line_;
    rest_ = thread_number() % per_line_;
    rounds_ = ((end - begin) * per_line_ + kThreads - 1) / kThreads;
  }

  __device__ __forceinline__ bool round() const { return rounds_ > 0; }

  __device__ __forceinline__ void next() {
    --rounds_;
    line_ += lines_on_;
    rest_ += rest_on_;
    if (rest_ >= per_line_) {
      rest_ -= per_line_;
      ++line_;
    }
  }

  __device__ __forceinline__ int64_t line() const { return line_; }
  __device__ __forceinline__ int64_t column() const { return columns_.begin + rest_ * T::kElements; }
  __device__ __forceinline__ bool here() const { return line_ < end_ && column() < columns_.end; }
  __device__ __forceinline__ Place place(int64_t cols) const { return place_of<T>(line_ * cols + column(), here()); }

 private:
  int64_t line_, end_, rounds_;
  Range columns_;
  int per_line_, lines_on_, rest_on_, rest_;
};

// Elements of no lines.
template <class T>
class FlatWalk {
 public:
  __device__ __forceinline__ explicit FlatWalk(Range elements) : first_(elements.begin), end_(elements.end) {}

  __device__ __forceinline__ bool round() const { return first_ < end_; }
  __device__ __forceinline__ void next() { first_ += kThreads * T::kElements; }
  __device__ __forceinline__ Place place() const {
    const int64_t k = first_ + thread_number() * T::kElements;
    return place_of<T>(k, k < end_);
  }

 private:
  int64_t first_, end_;
};

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_WALK_CUH
