// Which instantiation of the kernels made of tiles serves a call, and whether one does.
#pragma once
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"

namespace lserve::cuda {

// Calls body with the head dimension that tiles are padded to.
template <typename Body>
void with_head_dim(int64_t D, Body body) {
  if (D <= 64) return body(std::integral_constant<int, 64>{});
  if (D <= 96) return body(std::integral_constant<int, 96>{});
  if (D <= 128) return body(std::integral_constant<int, 128>{});
  return body(std::integral_constant<int, 256>{});
}

// Calls body with the channels that a thread moves at a time: 16 bytes of T where every row starts at a multiple of 16
// bytes (and then those of codes at a multiple of as many), else one.
template <typename T, typename Body>
void with_vectors(bool aligned, Body body) {
  if (aligned) return body(std::integral_constant<int, 16 / sizeof(T)>{});
  return body(std::integral_constant<int, 1>{});
}

// Whether every row starts at a multiple of 16 bytes, as cp.async wants it.
inline bool rows_aligned(const void* data, int64_t size, std::initializer_list<int64_t> strides) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t stride : strides) aligned = aligned && stride * size % 16 == 0;
  return aligned;
}

template <typename T>
bool rows_aligned(const View& x) {
  return rows_aligned(x.data, sizeof(T), {x.stride0, x.stride1, x.stride2});
}

template <typename T>
bool rows_aligned(const PagedKV& kv) {
  const int64_t size = kv.kv_dtype == Dtype::u8 ? 1 : sizeof(T);
  return rows_aligned(kv.k_pool, size, {kv.k_stride}) && rows_aligned(kv.v_pool, size, {kv.v_stride}) &&
         rows_aligned(kv.stats, sizeof(T), {kv.stats_stride}) && rows_aligned(kv.scales, sizeof(float), {kv.scales_stride}) &&
         rows_aligned(kv.residual_k, sizeof(T), {kv.residual_stride0, kv.residual_stride1}) &&
         rows_aligned(kv.residual_v, sizeof(T), {kv.residual_stride0, kv.residual_stride1});
}

}  // namespace lserve::cuda
