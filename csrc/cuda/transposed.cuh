// Operands, products and softmax with keys as rows and 8 queries as columns: what decode does with a warp's tile of 16 keys.
// Keys are [16, 16 channels] for S^T = K Q^T, values [16 channels, 16] for O^T = V^T P^T.
#pragma once
#include "cuda/pipeline.cuh"
#include "cuda/softmax.cuh"

namespace lserve::cuda {

// ---- operands

template <typename T, int kD>
struct FloatOperand {
  SmemTile<T, kD> k, v;

  __device__ __forceinline__ void keys(uint32_t (&a)[4], int step) const {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(a, k.at(lane % 16, 16 * step + lane / 16 * 8));
  }
  __device__ __forceinline__ void values(uint32_t (&a)[4], int step) const {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(a, v.at(lane / 16 * 8 + lane % 8, 16 * step + lane / 8 % 2 * 8));
  }
};

// Codes, dequantised in registers, two steps at a time: a lane gets four neighbouring channels of a key where it would
// get two and two, so the queries lie in that order, too; and of a value it gets channels 2 r and 2 r + 1, which become
// rows r and r + 8. See unpermute_channels.
template <typename T, int kD, bool kGroups>
struct Int8Operand {
  SmemTile<uint8_t, kD> k, v;
  const float* grid;  // [2, kD] with kGroups: minimum and step of the keys. Else keys stay codes, and logits are rescaled

  __device__ __forceinline__ void keys(uint32_t (&a)[2][4], int pair) const {
    const int lane = threadIdx.x % 32;
    uint32_t codes[4];  // of channels 4 (lane % 4) and on: keys 0 to 7, 8 to 15; then the next 16 channels
    ldmatrix_x4(codes, k.at(lane % 16, 32 * pair + lane / 16 * 16));
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      Vector<float, 4> min, width;
      if constexpr (kGroups) {
        const float* const from = grid + 32 * pair + 16 * step + lane % 4 * 4;
        min = load_vector<float, 4>(from), width = load_vector<float, 4>(from + kD);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t word = codes[2 * step + half];
          // Rounding to T brings what is past the maximum back to it.
          const auto key = [&](int i) { return fmaf(width.value[i], code_value(word, i), min.value[i]); };
          if constexpr (kGroups) a[step][half + i] = pack<T>(key(i), key(i + 1));
          else a[step][half + i] = code_pair<T>(word, i, i + 1);
        }
    }
  }

  __device__ __forceinline__ void values(uint32_t (&a)[2][4], int pair) const {
    const int lane = threadIdx.x % 32;
    uint32_t codes[4];  // bytes: two neighbouring channels of one key, then of the next key
    ldmatrix_x4_trans(codes, reinterpret_cast<const uint16_t*>(v.at(lane % 16, 32 * pair + lane / 16 * 16)));
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const uint32_t word = codes[2 * step + half];
          a[step][2 * half + odd] = code_pair<__half>(word, odd, 2 + odd);
        }
  }
};

// Queries as the other operand, [16 channels, 8], in registers for a whole split: row lane / 4, zeros where query(row) is
// null and beyond channel D.
template <typename T, int kD>
struct QueryOperand {
  uint32_t b[kD / 16][2];

  template <bool kCoded, typename Query>
  __device__ __forceinline__ void load(int D, Query query) {
    const int quad = threadIdx.x % 4;
    const T* const from = query(threadIdx.x % 32 / 4);
#pragma unroll
    for (int step = 0; step < kD / 16; ++step)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = 16 * step + (kCoded ? 4 * quad + 2 * i : 2 * quad + 8 * i);
        b[step][i] = from && d < D ? *reinterpret_cast<const uint32_t*>(from + d) : 0;
      }
  }

  // The sum of each query's channels, of queries 2 (lane % 4) and the next.
  __device__ __forceinline__ void totals(float (&total)[2]) const {
    float sum = 0;
#pragma unroll
    for (const auto& words : b)
#pragma unroll
      for (const uint32_t word : words) {
        const float2 x = unpack<T>(word);
        sum += x.x + x.y;
      }
    sum = over_quad(sum, [](float a, float b) { return a + b; });
    for (int e = 0; e < 2; ++e) total[e] = __shfl_sync(~0u, sum, (2 * (threadIdx.x % 4) + e) * 4);
  }
};

// ---- softmax

// x over the eight lanes that hold the same queries.
template <typename Combine>
__device__ __forceinline__ float over_keys(float x, Combine combine) {
  for (int lanes = 4; lanes < 32; lanes *= 2) x = combine(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

// Attention of 8 queries over the keys that a warp has seen. A lane has of queries q = 2 (lane % 4) and q + 1, in C fragments:
// logits of keys lane / 4 and lane / 4 + 8, and outputs of channels lane / 4 and lane / 4 + 8 of every 16.
// Maxima and logits are in units of log2, sums are of this lane's keys.
template <typename T, int kD>
struct TransposedSoftmax {
  float out[kD / 16][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float offset[2] = {};                            // sum of weight * V's minimum
  float largest_code[2] = {-INFINITY, -INFINITY};  // maximum of the logarithms of weight * V's step

  // s: masked logits, become weights. What has been summed follows their maximum.
  __device__ __forceinline__ void update(float (&s)[4]) {
    float factor[2];
    weigh(s, factor);
    rescale(factor);
  }

  // The same for values that are codes, min + step * code, of which s become the weights: of float16 and at most 1, since
  // what has been summed follows a maximum of theirs. grid: (step, min) of this lane's keys.
  __device__ __forceinline__ void update(float (&s)[4], const float2 (&grid)[2]) {
    float weights[4], factor[2], base[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = s[i], s[i] += log2_approx(grid[i / 2].x);
    weigh(weights, factor);
#pragma unroll
    for (int e = 0; e < 2; ++e) offset[e] += weights[e] * grid[0].y + weights[2 + e] * grid[1].y;
    raise(largest_code, s, factor, base);
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = exp2_approx(s[i] - base[i % 2]);
    rescale(factor);
  }
  // After the last codes: from here on `out` follows the maximum of logits.
  __device__ __forceinline__ void finish_codes() {
    float factor[2];
#pragma unroll
    for (int e = 0; e < 2; ++e)
      factor[e] = largest_code[e] == -INFINITY ? 0.0f : exp2_approx(largest_code[e] - (max[e] + kHeadroom<T>));
    rescale(factor);
  }

 private:
  // Raises maxima to those of s, and says what has been summed must shrink by. base: the maxima, or 0 while nothing was
  // attended, so that weights are 0 and not NaN.
  __device__ __forceinline__ static void raise(float (&maxima)[2], const float (&s)[4], float (&factor)[2], float (&base)[2]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const auto larger = [](float a, float b) { return fmaxf(a, b); };
      const float largest = over_keys(fmaxf(maxima[e], fmaxf(s[e], s[e + 2])), larger);
      base[e] = largest == -INFINITY ? 0.0f : largest;
      factor[e] = exp2_approx(maxima[e] - base[e]);
      maxima[e] = largest;
    }
  }
  __device__ __forceinline__ void weigh(float (&s)[4], float (&factor)[2]) {
    float base[2];
    raise(max, s, factor, base);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float shift = base[e] + kHeadroom<T>;
      s[e] = exp2_approx(s[e] - shift), s[e + 2] = exp2_approx(s[e + 2] - shift);
      sum[e] = fmaf(sum[e], factor[e], s[e] + s[e + 2]), offset[e] *= factor[e];
    }
  }
  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
    if (!__any_sync(~0u, factor[0] != 1 || factor[1] != 1)) return;  // most tiles raise no maximum
#pragma unroll
    for (auto& x : out) x[0] *= factor[0], x[1] *= factor[1], x[2] *= factor[0], x[3] *= factor[1];
  }
};

// Weights of [16 keys, 8 queries] as an operand of the other product.
template <typename T>
__device__ __forceinline__ void transpose_weights(const float (&s)[4], uint32_t (&p)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) p[half] = transpose_8x8(pack<T>(s[2 * half], s[2 * half + 1]));
}

// Rows r and r + 8 that are channels 2 r and 2 r + 1 of every 16 become channels r and r + 8.
template <typename T, int kD>
__device__ __forceinline__ void unpermute_channels(TransposedSoftmax<T, kD>& softmax) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane / 4 % 2;
#pragma unroll
  for (auto& x : softmax.out) {
    float natural[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // queries i % 2, channels + 8 (i / 2)
      const int from = (lane / 8 + i / 2 * 4) * 4 + lane % 4;
      const float low = __shfl_sync(~0u, x[i % 2], from), high = __shfl_sync(~0u, x[2 + i % 2], from);
      natural[i] = odd ? high : low;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = natural[i];
  }
}

}  // namespace lserve::cuda
