// Host twin of <cuda_runtime.h>: what a kernel file needs of CUDA C++, on simt.h's machine.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt.h"

#undef __shared__
#undef __global__
#undef __device__
#undef __constant__
#undef __grid_constant__
#undef __forceinline__
#define __shared__ static
#define __global__
#define __device__
#define __forceinline__ inline
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)

// --- threads ---------------------------------------------------------------------------------------------------------

inline void __syncthreads(SIMT_HERE) { simt::barrier(0, 0, SIMT_SITE("__syncthreads")); }
inline int __syncthreads_and(int value, SIMT_HERE) { return simt::barrier_reduce(value, 0, SIMT_SITE("__syncthreads_and")); }
inline int __syncthreads_or(int value, SIMT_HERE) { return simt::barrier_reduce(value, 1, SIMT_SITE("__syncthreads_or")); }
inline int __syncthreads_count(int value, SIMT_HERE) {
  return simt::barrier_reduce(value, 2, SIMT_SITE("__syncthreads_count"));
}
inline void __syncwarp(unsigned mask = ~0u, SIMT_HERE) {
  simt::warp_operation(mask & simt::active_warp_mask(), nullptr, simt::run_nothing, SIMT_SITE("__syncwarp"));
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace simt {
template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Exchange exchange{0, 0, source};
  memcpy(&exchange.in, &value, sizeof(T));
  warp_operation(mask, &exchange, run_shuffle, site);
  memcpy(&value, &exchange.out, sizeof(T));
  return value;
}
inline unsigned ballot(unsigned mask, int predicate, Site site) {
  Exchange exchange{uint64_t(predicate != 0), 0, 0};
  warp_operation(mask, &exchange, run_ballot, site);
  return unsigned(exchange.out);
}
}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE) {
  int lane = simt::lane_id();
  return simt::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), SIMT_SITE("__shfl_sync"));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_HERE) {
  int lane = simt::lane_id(), source = lane ^ bits;
  return simt::shuffle(mask, value, source / width > lane / width ? lane : source, SIMT_SITE("__shfl_xor_sync"));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  int lane = simt::lane_id();
  return simt::shuffle(mask, value, lane % width < int(delta) ? lane : lane - int(delta), SIMT_SITE("__shfl_up_sync"));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  int lane = simt::lane_id();
  return simt::shuffle(mask, value, lane % width + int(delta) >= width ? lane : lane + int(delta),
                       SIMT_SITE("__shfl_down_sync"));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::ballot(mask, predicate, SIMT_SITE("__ballot_sync"));
}
inline int __any_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::ballot(mask, predicate, SIMT_SITE("__any_sync")) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::ballot(mask, !predicate, SIMT_SITE("__all_sync")) == 0;
}

// --- atomics: sequentially consistent here, relaxed on the device ------------------------------------------------------

namespace simt {
template <typename T, typename Function>
T atomic_update(T* address, Function function) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  auto* bits = reinterpret_cast<Bits*>(address);
  Bits old = __atomic_load_n(bits, __ATOMIC_ACQUIRE), changed;
  T value;
  do {
    memcpy(&value, &old, sizeof(T));
    T next = function(value);
    memcpy(&changed, &next, sizeof(T));
  } while (!__atomic_compare_exchange_n(bits, &old, changed, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
  return value;
}
}  // namespace simt
template <typename T, typename U>
T atomicAdd(T* p, U v) {
  return simt::atomic_update(p, [&](T x) { return T(x + T(v)); });
}
template <typename T, typename U>
T atomicMax(T* p, U v) {
  return simt::atomic_update(p, [&](T x) { return x < T(v) ? T(v) : x; });
}
template <typename T, typename U>
T atomicMin(T* p, U v) {
  return simt::atomic_update(p, [&](T x) { return T(v) < x ? T(v) : x; });
}
template <typename T, typename U>
T atomicOr(T* p, U v) {
  return simt::atomic_update(p, [&](T x) { return T(x | T(v)); });
}
template <typename T, typename U>
T atomicExch(T* p, U v) {
  return simt::atomic_update(p, [&](T) { return T(v); });
}
template <typename T, typename U, typename V>
T atomicCAS(T* p, U compare, V v) {
  return simt::atomic_update(p, [&](T x) { return x == T(compare) ? T(v) : x; });
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

using std::max;
using std::min;
template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline float __int_as_float(int x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline int __float_as_int(float x) {
  int y;
  memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  memcpy(&y, &x, 4);
  return y;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned s = selector >> (4 * i) & 15, byte = unsigned(bytes >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  float2 x = __bfloat1622float2(a), y = __bfloat1622float2(b), z = __bfloat1622float2(c);
  return __floats2bfloat162_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}

// --- the runtime ------------------------------------------------------------------------------------------------------

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  simt::launch(
      config->gridDim, config->blockDim, config->dynamicSmemBytes,
      [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->arguments); }, &call, sizeof(call));
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* const major = std::getenv("SIMT_MAJOR");                                      // of the architecture
  *value = attribute == cudaDevAttrMultiProcessorCount ? 1 : major ? std::atoi(major) : 9;  // a small GPU
  return cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  attributes->type = cudaMemoryTypeDevice;
  return cudaSuccess;
}
