// What every launcher shares: starting a kernel, and choosing its instantiation by dtype.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace lserve::cuda {

// A launch that fails throws with the op's name. Errors of a running kernel surface later, as with any CUDA op.
template <typename... Params, typename... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, void* stream, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here, and must not be found again by the next CUDA call
  throw std::runtime_error(std::string("lserve_ext::") + op + ": " + cudaGetErrorString(error));
}

// Calls body with a value of the C++ type that dtype names.
template <typename Body>
void with_dtype(const char* op, Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::f32: return body(float{});
    case Dtype::f16: return body(__half{});
    case Dtype::bf16: return body(__nv_bfloat16{});
    default: throw std::runtime_error(std::string("lserve_ext::") + op + ": expected a floating dtype");
  }
}

}  // namespace lserve::cuda
