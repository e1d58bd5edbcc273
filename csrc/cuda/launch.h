// What every launcher shares: starting a kernel, and choosing its instantiation by dtype.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace lserve::cuda {

inline void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here, and must not be found again by the next CUDA call
  throw std::runtime_error(std::string("lserve_ext::") + op + ": " + cudaGetErrorString(error));
}

// What SharedMemory::take needs for arrays of these sizes.
constexpr int shared_bytes(std::initializer_list<int> arrays) {
  int bytes = 0;
  for (int size : arrays) bytes += (size + 127) / 128 * 128;
  return bytes;
}

// Of the current device.
inline int device_attribute(const char* op, cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(op, cudaGetDevice(&device));
  check(op, cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// A launch that fails throws with the op's name. Errors of a running kernel surface later, as with any CUDA op.
// From sm_90 on the launch overlaps the end of the kernel before (programmatic dependent launch), so that a step of many
// short kernels does not wait for each launch: kernels begin with join_stream.
template <typename... Params, typename... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, int shared, void* stream, Args... args) {
  if (shared > 48 * 1024)  // beyond that a kernel has to ask
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  if (device_attribute(op, cudaDevAttrComputeCapabilityMajor) >= 9) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute, config.numAttrs = 1;
  }
  check(op, cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

template <typename... Params, typename... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, void* stream, Args... args) {
  launch(op, kernel, grid, block, 0, stream, args...);
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
