// Statistics of whole pages: the minimum and maximum of every group of tokens and channel.
#pragma once
#include <cstdint>

namespace lserve::cuda {

// N neighbouring channels, moved by one load or store.
template <typename T, int N>
struct alignas(N * sizeof(T)) Channels {
  T value[N];
};

// A thread walks the L tokens of one group for N of its channels, so that neighbouring threads read neighbouring
// bytes of a token. threadIdx.x counts the D/N parts of a row, and threadIdx.y the groups of a block.
//
// Comparisons are made in float32, which holds every T exactly, so the results are bits of k. As with torch.amin
// and torch.amax, one NaN in a group makes both NaN. Of equal zeros the first token's sign is kept.
template <typename T, int N>
__global__ void __launch_bounds__(256)
    page_stats_kernel(const T* __restrict__ k,  // [pages, P, D], page and token strides given
                      T* __restrict__ stats,    // [pages, P/L, 2, D]
                      int64_t k_page_stride, int64_t k_token_stride, int64_t pages, int64_t groups, int64_t L,
                      int64_t D) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;  // a group of all pages
  if (row >= pages * groups) return;
  const int64_t page = row / groups, group = row % groups;
  const int64_t channel = static_cast<int64_t>(threadIdx.x) * N;
  const T* token = k + page * k_page_stride + group * L * k_token_stride + channel;

  float min[N], max[N];
  const auto first = *reinterpret_cast<const Channels<T, N>*>(token);
#pragma unroll
  for (int i = 0; i < N; ++i) min[i] = max[i] = static_cast<float>(first.value[i]);
#pragma unroll 8
  for (int64_t t = 1; t < L; ++t) {
    const auto next = *reinterpret_cast<const Channels<T, N>*>(token + t * k_token_stride);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float x = static_cast<float>(next.value[i]);
      min[i] = x < min[i] || x != x ? x : min[i];
      max[i] = x > max[i] || x != x ? x : max[i];
    }
  }

  Channels<T, N> low, high;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    low.value[i] = static_cast<T>(min[i]);
    high.value[i] = static_cast<T>(max[i]);
  }
  T* out = stats + row * 2 * D + channel;
  *reinterpret_cast<Channels<T, N>*>(out) = low;
  *reinterpret_cast<Channels<T, N>*>(out + D) = high;
}

}  // namespace lserve::cuda
