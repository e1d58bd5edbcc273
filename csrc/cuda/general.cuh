// Attention without tensor cores, in float32: for float32 tensors, and for what the tiles cannot take (rows that do not
// start at multiples of 16 bytes, groups of statistics that 16 keys do not fit in). A warp takes one query; its lanes
// take 32 keys for the logits, and 32 channels for the values.
#pragma once
#include "cuda/paged_kv.cuh"
#include "cuda/ptx.cuh"
#include "quant.h"

namespace lserve::cuda {

constexpr int kMaxChannels = 256;
// Values are summed before they are divided by the sum of weights. Scaled down by a power of two, which changes no bit of
// the result, thousands of the largest values still have a finite sum.
constexpr float kScaledValue = 0x1p-24f;

template <typename T>
__device__ __forceinline__ float key_value(const Row& row, int d, int D) {
  if (!row.coded) return static_cast<float>(static_cast<const T*>(row.k)[d]);
  const uint8_t code = static_cast<const uint8_t*>(row.k)[d];
  if (!row.stats) return dequantize(code, row.k_grid.y, row.k_grid.x);
  const float min = static_cast<float>(static_cast<const T*>(row.stats)[d]);
  const float max = static_cast<float>(static_cast<const T*>(row.stats)[D + d]);
  return dequantize(code, min, quant_step(min, max), max);
}

// q · k of one key. q [D] in shared memory.
template <typename T>
__device__ __forceinline__ float dot(const float* q, const Row& row, int D) {
  float sum = 0;
  for (int d = 0; d < D; ++d) sum += q[d] * key_value<T>(row, d, D);
  return sum;
}

template <typename Combine>
__device__ __forceinline__ float over_warp(float x, Combine combine) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = combine(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

// Attention of one query over tokens [first, last): out(d, value) for every channel, and the result is lse.
template <typename T, typename Out>
__device__ float attend_warp(const Sequence<T>& sequence, const Tokens& tokens, int first, int last, const float* q, int D,
                             float scale, Out out) {
  const int lane = threadIdx.x % 32;
  float largest = -INFINITY, total = 0, sums[kMaxChannels / 32] = {};
  for (int base = first; base < last; base += 32) {
    Row row{};
    int position = kMasked;
    if (base + lane < last) position = tokens.position(base + lane);
    if (position <= tokens.last) row = sequence.row(position, tokens.is_sealed(base + lane));
    const float s = row.k ? dot<T>(q, row, D) * scale : -INFINITY;

    const float before = largest;
    largest = fmaxf(largest, over_warp(s, [](float a, float b) { return fmaxf(a, b); }));
    const float shift = largest == -INFINITY ? 0.0f : largest, factor = expf(before - shift), w = expf(s - shift);
    total *= factor;
#pragma unroll
    for (float& sum : sums) sum *= factor;
    for (int i = 0; i < 32 && base + i < last; ++i) {
      const uint64_t v = __shfl_sync(~0u, reinterpret_cast<uint64_t>(row.v), i);
      const int coded = __shfl_sync(~0u, static_cast<int>(row.coded), i);
      const float weight = __shfl_sync(~0u, w, i), step = __shfl_sync(~0u, row.v_grid.x, i);
      const float min = __shfl_sync(~0u, row.v_grid.y, i);
      total += weight;  // in the order of the values, so that values of 1 give 1
      if (!v) continue;
#pragma unroll
      for (int c = 0; c < kMaxChannels / 32; ++c) {
        const int d = c * 32 + lane;
        if (d < D)
          sums[c] += weight * ((coded ? dequantize(reinterpret_cast<const uint8_t*>(v)[d], min, step)
                                      : static_cast<float>(reinterpret_cast<const T*>(v)[d])) *
                               kScaledValue);
      }
    }
  }
  const float share = total == 0 ? 0.0f : 1 / total;
#pragma unroll
  for (int c = 0; c < kMaxChannels / 32; ++c)
    if (c * 32 + lane < D) out(c * 32 + lane, sums[c] * share * (1 / kScaledValue));
  return total == 0 ? -INFINITY : (largest == -INFINITY ? 0.0f : largest) + logf(total);
}

// The warp's query as floats in shared memory.
template <typename T>
__device__ __forceinline__ const float* load_query(const T* from, int D) {
  SharedMemory shared;
  float* const q = shared.take<float>(kThreads / 32 * kMaxChannels) + threadIdx.x / 32 * kMaxChannels;
  for (int d = threadIdx.x % 32; d < D; d += 32) q[d] = static_cast<float>(from[d]);
  __syncwarp();
  return q;
}
constexpr int kQueryBytes = kThreads / 32 * kMaxChannels * sizeof(float);

}  // namespace lserve::cuda
