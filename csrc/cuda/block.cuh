// A block of threads: what they add up together, and how blocks wait for each other.

#ifndef FUSED_ADAFACTOR_CUDA_BLOCK_CUH
#define FUSED_ADAFACTOR_CUDA_BLOCK_CUH

#include <cuda_runtime.h>
#include <stdint.h>

#include "fused_adafactor/formulas.h"

namespace fused_adafactor {

#if defined(FA_EMULATED_THREADS)
constexpr int kThreads = FA_EMULATED_THREADS;
#elif defined(FA_EMULATED)
constexpr int kThreads = 64;  // two warps: a fiber each
#else
constexpr int kThreads = 256;
#endif
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ int thread_number() { return int(threadIdx.x); }

// The same, looked up each time: no register holds it, nor what follows from it, in between.
__device__ __forceinline__ int thread_number_anew() {
#if defined(FA_EMULATED)
  return thread_number();
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

// Whether this is the thread that acts for the block.
__device__ __forceinline__ bool is_first_thread() { return thread_number_anew() == 0; }

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ __forceinline__ int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The smallest power of 2 that is no less.
__device__ __forceinline__ int power_of_2(int64_t size) {
  int power = 1;
  while (power < size) power *= 2;
  return power;
}

// What many threads combine their numbers by.
struct Sum {
  template <class A>
  static __device__ __forceinline__ A of(A a, A b) {
    return a + b;
  }
};
struct Smallest {
  template <class A>
  static __device__ __forceinline__ A of(A a, A b) {
    return b < a ? b : a;
  }
};
struct Largest {
  template <class A>
  static __device__ __forceinline__ A of(A a, A b) {
    return b > a ? b : a;
  }
};

// Of `lanes` neighbours of a warp, a power of 2; each of them gets the same number.
template <class Way, class A>
__device__ __forceinline__ A of_lanes(A value, int lanes) {
  for (int distance = 1; distance < lanes; distance *= 2) {
    value = Way::of(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Of all threads, in an order that is always the same; every thread gets it. `spare` has room for one of each warp.
template <class Way>
__device__ __forceinline__ double of_block(double value, double* spare) {
  value = of_lanes<Way>(value, kWarp);
  __syncthreads();
  if (thread_number() % kWarp == 0) spare[thread_number() / kWarp] = value;
  __syncthreads();
  double all = spare[0];
  for (int warp = 1; warp < kWarps; ++warp) all = Way::of(all, spare[warp]);
  return all;
}

// Reads a counter, and whatever was written before it was counted up.
__device__ __forceinline__ int32_t read_counter(const int32_t* counter) {
#if defined(FA_EMULATED)
  return *counter;
#else
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
#endif
}

// Wait until a counter is there; who counts it up holds a lower ticket, and is running.
__device__ __forceinline__ void wait_for(const int32_t* counter, int64_t value, bool waits) {
  if (waits && is_first_thread()) {
    while (read_counter(counter) < value) __nanosleep(64);
  }
  __syncthreads();
}

// Tell the others that all of this block has stored what they wait for.
__device__ __forceinline__ void count_up(int32_t* counter, bool waits) {
  __syncthreads();
  if (waits && is_first_thread()) {
    __threadfence();
    atomicAdd(counter, 1);
  }
}

}  // namespace fused_adafactor

#endif  // FUSED_ADAFACTOR_CUDA_BLOCK_CUH
