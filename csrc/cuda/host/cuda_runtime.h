// CUDA on the host: what the kernels in csrc/cuda use of it, so that the same sources are tested without a GPU.
//
// Every thread of a block is a fiber, and so is every thread of every block that is there at a time; they take turns at
// barriers, at warp operations, and wherever a block waits for another one. The interleaving is always the same one,
// or another one for each FUSED_ADAFACTOR_EMULATED_SEED.

#ifndef FUSED_ADAFACTOR_CUDA_HOST_H
#define FUSED_ADAFACTOR_CUDA_HOST_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

// Where the fiber that runs is.
uint3 thread_index();
uint3 block_index();
dim3 blocks();
char* shared_memory();

void wait_for_block();
void wait_for_warp();
void let_others_run();

// Copies of 16 bytes, or of a multiple, from and to multiples of 16.
void copy_now(void* to, const void* from, size_t bytes);

// Those of a block that arrive when somebody waits for them, at a barrier that counts how often they have, and has been
// told first how many bytes there will be.
void expect_copies(uint64_t* barrier, int bytes);
void copy_later(void* to, const void* from, size_t bytes, uint64_t* barrier);
void wait_for_copies(uint64_t* barrier, unsigned parity);

uint64_t exchange(uint64_t value, unsigned lane);

template <class T>
T shuffled(T value, unsigned lane) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, lane);
  memcpy(&value, &bits, sizeof value);
  return value;
}

int launch(void (*kernel)(const void*), const void* argument, unsigned blocks, unsigned threads, size_t shared_bytes,
           bool together);

}  // namespace emulation

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define gridDim (::emulation::blocks())

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp(unsigned = 0xFFFFFFFFu) { emulation::wait_for_warp(); }
[[noreturn]] inline void __trap() { abort(); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulation::let_others_run(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffled(value, (threadIdx.x ^ unsigned(mask)) % 32);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::shuffled(value, unsigned(lane) % 32);
}
inline int __any_sync(unsigned, int mine) {
  for (int distance = 1; distance < 32; distance *= 2) mine |= __shfl_xor_sync(0xFFFFFFFFu, mine, distance);
  return mine;
}

inline int atomicAdd(int* at, int value) {
  const int old = *at;
  *at = old + value;
  return old;
}

template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T value) {
  *at = value;
}

#endif  // FUSED_ADAFACTOR_CUDA_HOST_H
