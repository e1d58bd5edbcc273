// Partial results of disjoint sets of keys become one: of the splits of a row, and of two sets.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/general.cuh"
#include "cuda/softmax.cuh"
#include "merge.h"

namespace lserve::cuda {

// Results of rows, each over splits of the tokens that it attends.
struct Partials {
  float* out;       // [rows, splits, D]
  float* lse;       // [rows, splits]
  int32_t* counts;  // [rows] splits that a row has
  int splits;       // at most, by the tables' width

  // A row's numbers in a workspace.
  static int64_t size(int64_t splits, int64_t D) { return splits * (D + 1) + 1; }
  Partials(float* workspace, int64_t rows, int64_t splits, int64_t D)
      : out(workspace),
        lse(out + rows * splits * D),
        counts(reinterpret_cast<int32_t*>(lse + rows * splits)),
        splits(static_cast<int>(splits)) {}
};

// Tokens of a split: chunks, as many as leave no more than `splits`.
__host__ __device__ inline int split_tokens(int tokens, int chunk, int splits) {
  const int chunks = (tokens + chunk - 1) / chunk;
  return (chunks + splits - 1) / splits * chunk;
}

// Splits of so many tokens, `size` each.
__host__ __device__ inline int count_splits(int tokens, int size) { return tokens == 0 ? 0 : (tokens + size - 1) / size; }

// The splits of a row, kMost at most, in order: out [D] and lse. By all threads of a block.
template <int kMost, typename T>
__device__ __forceinline__ void join_splits(const Partials& partials, int64_t row, int64_t D, T* out, float* lse) {
  const int splits = partials.splits == 0 ? 0 : partials.counts[row];
  const float *outs = partials.out + row * partials.splits * D, *lses = partials.lse + row * partials.splits;
  SharedMemory shared;
  float* const weights = shared.take<float>(kMost);
  float largest = -INFINITY;
  for (int i = threadIdx.x % 32; i < splits; i += 32) largest = fmaxf(largest, lses[i]);
  largest = over_warp(largest, [](float a, float b) { return fmaxf(a, b); });
  if (largest == -INFINITY) largest = 0;
  for (int i = threadIdx.x; i < splits; i += kThreads) weights[i] = exp2_approx((lses[i] - largest) * kLog2e);
  __syncthreads();
  float total = 0;
  for (int64_t d = threadIdx.x; d < D; d += kThreads) {
    float x = 0;
    total = 0;
#pragma unroll 16  // loads that do not wait for each other
    for (int i = 0; i < splits; ++i) total += weights[i], x += weights[i] * outs[i * D + d];
    out[d] = static_cast<T>(total == 0 ? 0.0f : x / total);
  }
  if (threadIdx.x == 0) *lse = total == 0 ? -INFINITY : largest + logf(total);
}

// Attention over two disjoint sets of keys from that over each, N channels a thread.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeArgs a) {
  join_stream();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, parts = a.D / N, row = i / parts;
  if (row >= a.rows) return;
  const Shares shares = shares_of(a.lse_a[row], a.lse_b[row]);
  const auto x = load_vector<T, N>(static_cast<const T*>(a.out_a) + i * N);
  const auto y = load_vector<T, N>(static_cast<const T*>(a.out_b) + i * N);
  Vector<T, N> out;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    // What has no weight is not read into the sum: it may be anything.
    const float from_a = shares.a == 0 ? 0.0f : shares.a * static_cast<float>(x.value[j]);
    const float from_b = shares.b == 0 ? 0.0f : shares.b * static_cast<float>(y.value[j]);
    out.value[j] = static_cast<T>(from_a + from_b);
  }
  store_vector(static_cast<T*>(a.out) + i * N, out);
  if (i % parts == 0) a.lse[row] = shares.lse;
}

}  // namespace lserve::cuda
