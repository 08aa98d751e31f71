// The entry points of the library, on the host. Part of step.cu.

#ifndef FUSED_ADAFACTOR_CUDA_LAUNCH_CUH
#define FUSED_ADAFACTOR_CUDA_LAUNCH_CUH

#include "shared.cuh"

namespace fused_adafactor {

inline int32_t shared_bytes_of(const CudaLaunch& launch) {
  return (launch.math_dtype == kFloat64 ? shared_size<double>() : shared_size<float>()) + launch.stash_bytes;
}

}  // namespace fused_adafactor

extern "C" int32_t fused_adafactor_cuda_abi_version() { return fused_adafactor::kCudaAbiVersion; }
extern "C" int32_t fused_adafactor_cuda_threads() { return fused_adafactor::kThreads; }

#if defined(FA_EMULATED)

#include <stdlib.h>

extern "C" int32_t fused_adafactor_cuda_is_host() { return 1; }

extern "C" int32_t fused_adafactor_cuda_device(int32_t, int32_t* processors, int32_t* shared_bytes,
                                               int32_t* blocks_per_processor) {
  const char* wanted = getenv("FUSED_ADAFACTOR_EMULATED_PROCESSORS");
  *processors = wanted != nullptr ? atoi(wanted) : 2;
  *shared_bytes = 32 * 1024;
  *blocks_per_processor = 2;
  return 0;
}

extern "C" int32_t fused_adafactor_cuda_launch(const fused_adafactor::CudaLaunch* launch, int32_t, void*) {
  using namespace fused_adafactor;
  const auto kernel = [](const void* argument) {
    const CudaLaunch& launch = *static_cast<const CudaLaunch*>(argument);
    launch.math_dtype == kFloat64 ? run_tickets<double>(launch) : run_tickets<float>(launch);
  };
  if (launch->programs <= 0) return 0;
  return emulation::launch(kernel, launch, unsigned(launch->programs), kThreads, size_t(shared_bytes_of(*launch)),
                           launch->waits != 0);
}

extern "C" const char* fused_adafactor_cuda_error(int32_t code) {
  return code == 0 ? "cudaSuccess: no error" : "the emulation knows no errors";
}

#else

#include <stdio.h>

extern "C" int32_t fused_adafactor_cuda_is_host() { return 0; }

namespace fused_adafactor {

// Makes a device the current one, and the former one again in the end. Neither is done for nothing: making a device the
// current one takes memory on it.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t device) {
    int current = -1;
    error_ = cudaGetDevice(&current);
    if (error_ != cudaSuccess || current == device) return;
    error_ = cudaSetDevice(device);
    if (error_ == cudaSuccess) before_ = current;
  }
  ~CurrentDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = -1;  // none: it has not been changed
  cudaError_t error_;
};

// What a call has returned. CUDA keeps an error until it is asked for, and other code of the process would take it for
// its own.
inline int32_t told(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Shared memory that a block may have, and multiprocessors. Asking takes no context on the device.
struct Limits {
  int32_t processors = 0, of_processor = 0, of_block = 0, reserved = 0;

  cudaError_t ask(int32_t device) {
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&of_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    return cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
  }

  // Of each of the blocks that a multiprocessor has at a time; it hands its memory out in units of 1 KiB.
  int32_t of_each() const {
    const int32_t share = of_processor / kBlocksOfProcessor / 1024 * 1024 - reserved;
    return share < of_block ? share : of_block;
  }
};

// Load a kernel on the current device, which fails where the library has none for it, and let each launch have as much
// shared memory as any may take: always the same number, so threads that do this at a time do not disturb each other.
template <class M>
cudaError_t make_ready(int32_t shared_bytes) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, run_tickets<M>);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(run_tickets<M>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

template <class M>
cudaError_t put_on_stream(CudaLaunch launch, cudaStream_t stream) {
  void* arguments[] = {&launch};
  return cudaLaunchKernel(run_tickets<M>, dim3(unsigned(launch.programs)), dim3(kThreads), arguments,
                          size_t(shared_bytes_of(launch)), stream);
}

}  // namespace fused_adafactor

extern "C" int32_t fused_adafactor_cuda_device(int32_t device, int32_t* processors, int32_t* shared_bytes,
                                               int32_t* blocks_per_processor) {
  using namespace fused_adafactor;
  Limits limits;
  cudaError_t error = limits.ask(device);
  if (error != cudaSuccess) return told(error);
  const CurrentDevice current(device);
  error = current.error();
  if (error == cudaSuccess) error = make_ready<float>(limits.of_each());
  if (error == cudaSuccess) error = make_ready<double>(limits.of_each());
  if (error != cudaSuccess) return told(error);
  const int32_t own = shared_size<float>() > shared_size<double>() ? shared_size<float>() : shared_size<double>();
  *processors = limits.processors;
  *shared_bytes = (limits.of_each() - own) / kStashAlignment * kStashAlignment;
  *blocks_per_processor = kBlocksOfProcessor;
  return cudaSuccess;
}

extern "C" int32_t fused_adafactor_cuda_launch(const fused_adafactor::CudaLaunch* launch, int32_t device,
                                               void* stream) {
  using namespace fused_adafactor;
  if (launch->programs <= 0) return cudaSuccess;
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return told(current.error());
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  // Its own return code, since the last error may be one of long ago.
  return told(launch->math_dtype == kFloat64 ? put_on_stream<double>(*launch, on) : put_on_stream<float>(*launch, on));
}

extern "C" const char* fused_adafactor_cuda_error(int32_t code) {
  static thread_local char text[256];
  const cudaError_t error = cudaError_t(code);
  snprintf(text, sizeof text, "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
  return text;
}

#endif

#endif  // FUSED_ADAFACTOR_CUDA_LAUNCH_CUH
