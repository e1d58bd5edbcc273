// What an online softmax remembers of the keys seen so far.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/ptx.cuh"

namespace lserve::cuda {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

template <typename Combine>
__device__ __forceinline__ float over_quad(float x, Combine combine) {  // the four lanes that hold a row
  x = combine(x, __shfl_xor_sync(~0u, x, 1));
  return combine(x, __shfl_xor_sync(~0u, x, 2));
}

// Weights are 2^-headroom at most, so that thousands of the largest values have a finite sum before it is divided by that
// of the weights. float16 needs none, whose values are small, and has no room for it.
template <typename T>
constexpr float kHeadroom = std::is_same_v<T, __nv_bfloat16> ? 16.0f : 0.0f;

// Attention of 16 queries over the keys seen so far. A lane holds rows lane / 4 and lane / 4 + 8, in C fragments.
// Maxima and logits are in units of log2, sums are of this lane's columns.
template <typename T, int kD>
struct OnlineSoftmax {
  float out[kD / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  // s: masked logits before `scale`, which is positive; become weights. factor: what `out` must shrink by, since their
  // maximum rose.
  template <int Columns>
  __device__ __forceinline__ void update(float (&s)[Columns / 8][4], float scale, float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < Columns / 8; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      largest = fmaxf(max[r], scale * over_quad(largest, [](float a, float b) { return fmaxf(a, b); }));
      const float base = largest == -INFINITY ? 0.0f : largest;  // nothing attended yet: weights of 0, not of NaN
      const float shift = base + kHeadroom<T>;
      factor[r] = exp2_approx(max[r] - base);
      max[r] = largest, sum[r] *= factor[r];
#pragma unroll
      for (int n = 0; n < Columns / 8; ++n)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) sum[r] += s[n][e] = exp2_approx(fmaf(s[n][e], scale, -shift));
    }
  }
  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
    if (!__any_sync(~0u, factor[0] != 1 || factor[1] != 1)) return;  // most tiles raise no maximum
#pragma unroll
    for (auto& x : out) x[0] *= factor[0], x[1] *= factor[0], x[2] *= factor[1], x[3] *= factor[1];
  }
};

}  // namespace lserve::cuda
