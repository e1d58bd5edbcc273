// attention_mass: the softmax mass that the last T queries of a sequence put on every token. A block of threads owns 64
// neighbouring tokens, reads those that anybody attends once, and adds up over queries in order: no atomics, and what
// nobody attends is never read.
#pragma once
#include "cuda/general.cuh"

namespace lserve::cuda {

constexpr int kMassQueries = 8;  // in shared memory at a time: each half of the threads takes every other one

// Which tokens a query attends, apart from the list.
struct Reach {
  int64_t sink, local;  // units: below the one, or from the other on
  int position;         // and none after the query's own

  __device__ Reach(const MassArgs& a, int b, int32_t window, int position) : position(position) {
    const int units_per_page = static_cast<int>(a.kv.P) / static_cast<int>(a.rule.unit);
    const int64_t start = a.rule.local_start ? a.rule.local_start[b] : 0, sealed = a.kv.sealed[b] * units_per_page;
    const Entries e = entries(a.rule, window, nullptr, start, position, a.kv.P, sealed);
    sink = e.sink, local = e.local;
  }
};

__device__ __forceinline__ bool is_listed(const MassArgs& a, int b, int h, int64_t unit) {
  if (!a.rule.lists || a.rule.windows[h] != 0) return false;
  const int32_t* list = a.rule.lists + b * a.rule.list_stride0 + h * a.rule.list_stride1;
  int64_t first = 0;  // of the entries that are at least `unit`; the -1 after the last one count as such
  for (int64_t end = a.rule.K; first < end;) {
    const int64_t middle = (first + end) / 2;
    if (list[middle] >= 0 && list[middle] < unit) first = middle + 1;
    else end = middle;
  }
  return first < a.rule.K && list[first] == unit;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) mass_kernel(const __grid_constant__ MassArgs a) {
  const int key = threadIdx.x % kKeys, half = threadIdx.x / kKeys, h = blockIdx.y, b = blockIdx.z;
  const int position = blockIdx.x * kKeys + key, tokens = static_cast<int>(a.kv.M * a.kv.P);
  const int D = static_cast<int>(a.kv.D), G = static_cast<int>(a.G), length = a.seq_lens[b];
  const int first = max(0, length - static_cast<int>(a.T));  // the oldest query
  const int32_t window = a.rule.windows[h];

  const int64_t unit = position / static_cast<int>(a.rule.unit);
  const bool listed = is_listed(a, b, h, unit);
  const auto attends = [&](const Reach& reach) {
    return position <= reach.position && (unit < reach.sink || unit >= reach.local || listed);
  };
  bool wanted = false;
  if (position < length) {  // windows move on with the queries: the oldest has the first local unit
    const Reach oldest(a, b, window, first), newest(a, b, window, length - 1);
    wanted = unit < newest.sink || unit >= oldest.local || listed;
  }

  SharedMemory shared;
  const int stride = D + 1;  // every key in another bank
  float* const keys = shared.take<float>(kKeys * stride);
  float* const queries = shared.take<float>(kMassQueries * kMaxChannels);
  float* const sums = shared.take<float>(kThreads);
  Row row{};
  if (wanted) row = Sequence<T>{a.kv, b, h, length}.row(position);
  wanted = row.k != nullptr;
  for (int d = half; d < D; d += kThreads / kKeys) keys[key * stride + d] = wanted ? key_value<T>(row, d, D) : 0.0f;

  float sum = 0;
  if (__syncthreads_or(wanted)) {
    const int T_first = first - (length - static_cast<int>(a.T)), rows = static_cast<int>(a.T) * G;
    for (int i = T_first * G; i < rows; i += kMassQueries) {
      const int count = min(kMassQueries, rows - i);
      for (int j = threadIdx.x; j < count * D; j += kThreads) {
        const int t = (i + j / D) / G, g = (i + j / D) % G, d = j % D;
        const T* const q = static_cast<const T*>(a.q.data) + b * a.q.stride0 + t * a.q.stride1 + (h * G + g) * a.q.stride2;
        queries[j / D * kMaxChannels + d] = static_cast<float>(q[d]) * a.scale;
      }
      __syncthreads();
      for (int j = half; j < count; j += kThreads / kKeys) {
        const int t = (i + j) / G, g = (i + j) % G;
        const float lse = a.lse[(b * a.T + t) * (a.kv.H * G) + h * G + g];
        if (!wanted || lse == -INFINITY) continue;
        if (!attends(Reach(a, b, window, length - static_cast<int>(a.T) + t))) continue;
        float s = 0;
        for (int d = 0; d < D; ++d) s += queries[j * kMaxChannels + d] * keys[key * stride + d];
        sum += expf(s - lse);
      }
      __syncthreads();
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (half == 0 && position < tokens) a.mass[(b * a.kv.H + h) * tokens + position] = sums[key] + sums[kKeys + key];
}

}  // namespace lserve::cuda
