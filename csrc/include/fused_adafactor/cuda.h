// The entry points of the CUDA library, and the record that Python hands to it: a plain C ABI, without a header of
// torch. fused_adafactor/backends/cuda.py fills the record field by field and in this order; kCudaAbiVersion changes
// with it, and with fields.h.

#ifndef FUSED_ADAFACTOR_CUDA_H
#define FUSED_ADAFACTOR_CUDA_H

#include <stdint.h>

namespace fused_adafactor {

constexpr int32_t kCudaAbiVersion = 2;

// One launch. Addresses are those of the device; the columns of the tables are in fields.h.
struct CudaLaunch {
  const int32_t* tickets;   // where the items of each ticket begin, and where those of the last one end
  const int32_t* items;     // (kind, tensor, unit) of each
  const int64_t* table;     // of tensors
  const int64_t* grads;     // address of the gradient of each tensor
  const double* numbers;    // of rules
  const int64_t* integers;  // of rules
  const void* factors;      // of each tensor, in the math dtype: clipping by a norm, known after the first sweep
  uint8_t* skips;           // of each tensor: nothing of it may be written; finalizing sets it too
  void* scratch;
  double* outcomes;
  int32_t* counters;        // all 0, and left so
  int32_t begin, end;       // tickets
  int32_t counter_count;
  int32_t programs;         // blocks of the grid
  int32_t waits;            // items wait for each other, and blocks take tickets in order; else each block has one
  int32_t joined;           // the first sweep was another launch
  int32_t math_dtype;       // kFloat32 or kFloat64
  int32_t stash_bytes;      // of shared memory, for gradients on their way to the first sweep; 0 for none
  int32_t keeps;            // some of them stay there for the second one, which is in this launch
};

}  // namespace fused_adafactor

#if defined(_WIN32)
#define FUSED_ADAFACTOR_EXPORT __declspec(dllexport)
#else
#define FUSED_ADAFACTOR_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {
FUSED_ADAFACTOR_EXPORT int32_t fused_adafactor_cuda_abi_version();
// 1 in the emulation: the memory of its "device" is the host's, and streams are of no account.
FUSED_ADAFACTOR_EXPORT int32_t fused_adafactor_cuda_is_host();
// Threads of a block.
FUSED_ADAFACTOR_EXPORT int32_t fused_adafactor_cuda_threads();
// What a device has: multiprocessors, the blocks that one of them holds, and the bytes of shared memory that the stash
// of each of these may take. Makes the kernels ready there, so it comes before any launch on the device. Returns a
// cudaError_t, 0 for success; another one where the library has no kernels for such a device.
FUSED_ADAFACTOR_EXPORT int32_t fused_adafactor_cuda_device(int32_t device, int32_t* processors, int32_t* shared_bytes,
                                                           int32_t* blocks_per_processor);
// Put a launch on a stream of a device; the current device is the same before and after. Returns a cudaError_t.
FUSED_ADAFACTOR_EXPORT int32_t fused_adafactor_cuda_launch(const fused_adafactor::CudaLaunch* launch, int32_t device,
                                                           void* stream);
// Name and text of an error code, never null.
FUSED_ADAFACTOR_EXPORT const char* fused_adafactor_cuda_error(int32_t code);
}

#endif  // FUSED_ADAFACTOR_CUDA_H
