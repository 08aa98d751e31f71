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

// Makes a device the current one, and the former one again in the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) error_ = cudaSetDevice(device);
  }
  ~CurrentDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = -1;
  cudaError_t error_;
};

template <class M>
cudaError_t put_on_stream(const CudaLaunch& launch, cudaStream_t stream) {
  const int32_t shared_bytes = shared_bytes_of(launch);
  const cudaError_t error =
      cudaFuncSetAttribute(run_tickets<M>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  run_tickets<M><<<unsigned(launch.programs), kThreads, size_t(shared_bytes), stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace fused_adafactor

extern "C" int32_t fused_adafactor_cuda_device(int32_t device, int32_t* processors, int32_t* shared_bytes,
                                               int32_t* blocks_per_processor) {
  using namespace fused_adafactor;
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  int32_t of_processor = 0, of_block = 0, reserved = 0;
  cudaError_t error = cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&of_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
  if (error != cudaSuccess) return error;
  // Shared memory of a processor is handed out in units of 1 KiB.
  const int32_t share = of_processor / kBlocksOfProcessor / 1024 * 1024 - reserved;
  const int32_t own = shared_size<float>() > shared_size<double>() ? shared_size<float>() : shared_size<double>();
  *shared_bytes = ((share < of_block ? share : of_block) - own) / kStashAlignment * kStashAlignment;
  *blocks_per_processor = kBlocksOfProcessor;
  return error;
}

extern "C" int32_t fused_adafactor_cuda_launch(const fused_adafactor::CudaLaunch* launch, int32_t device,
                                               void* stream) {
  using namespace fused_adafactor;
  if (launch->programs <= 0) return cudaSuccess;
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return launch->math_dtype == kFloat64 ? put_on_stream<double>(*launch, on) : put_on_stream<float>(*launch, on);
}

extern "C" const char* fused_adafactor_cuda_error(int32_t code) {
  static thread_local char text[256];
  const cudaError_t error = cudaError_t(code);
  snprintf(text, sizeof text, "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
  return text;
}

#endif

#endif  // FUSED_ADAFACTOR_CUDA_LAUNCH_CUH
