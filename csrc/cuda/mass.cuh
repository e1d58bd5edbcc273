// attention_mass: the softmax mass that the last T queries of a sequence put on every token. A block of threads owns 64
// neighbouring tokens, reads those that anybody attends once, and adds up over queries in order: no atomics, and what
// nobody attends is never read.
#pragma once
#include "cuda/general.cuh"
#include "cuda/operands.cuh"
#include "cuda/softmax.cuh"

namespace lserve::cuda {

constexpr int kMassQueries = 8;  // in shared memory at a time: each half of the threads takes every other one

// Which tokens a query attends, apart from the list.
struct Reach {
  int sink, local;  // units: below the one, or from the other on
  int position;     // and none after the query's own

  __device__ Reach(const MassArgs& a, int b, int32_t window, int position) : position(position) {
    const int units_per_page = static_cast<int>(a.kv.P) / static_cast<int>(a.mask.unit);
    const int64_t sealed = a.kv.sealed[b] * units_per_page;
    const AttendedUnits e = attended(a.mask, window, nullptr, list_local(a.mask, b), position, a.kv.P, sealed);
    sink = e.sink, local = e.local;
  }
};

__device__ __forceinline__ bool is_listed(const MassArgs& a, int b, int h, int unit) {
  const int32_t* const list = list_of(a.mask, b, h);
  if (!list || a.mask.windows[h] != 0) return false;
  const int64_t first = Bisection{}(a.mask.K, [&](int64_t i) { return list[i] >= 0 && list[i] < unit; });
  return first < a.mask.K && list[first] == unit;
}

// Whether any of the queries attends a token.
__device__ __forceinline__ bool is_attended(const MassArgs& a, int b, int h, int position, bool listed) {
  const int length = a.seq_lens[b], unit = position / static_cast<int>(a.mask.unit);
  if (position >= length) return false;
  // Windows move on with the queries: the oldest has the first local unit.
  const Reach oldest(a, b, a.mask.windows[h], max(0, length - static_cast<int>(a.T))),
      newest(a, b, a.mask.windows[h], length - 1);
  return unit < newest.sink || unit >= oldest.local || listed;
}

// The keys of a block.
struct MassKeys {
  const void *k[kKeys], *stats[kKeys];
  float2 k_grid[kKeys];
  int position[kKeys], unit[kKeys];  // kMasked: nobody attends it, or it is not held any more
  bool coded[kKeys], listed[kKeys];

  template <typename T>
  __device__ __forceinline__ void look_up(const Sequence<T>& sequence, const MassArgs& a, int key, int at) {
    unit[key] = at / static_cast<int>(a.mask.unit);
    listed[key] = is_listed(a, sequence.b, sequence.h, unit[key]);
    Row row{};
    if (is_attended(a, sequence.b, sequence.h, at, listed[key])) row = sequence.row(at);
    position[key] = row.k ? at : kMasked;
    k[key] = row.k, stats[key] = row.stats, k_grid[key] = row.k_grid, coded[key] = row.coded;
  }
};

constexpr int kMassRows = 16;  // queries of a kv head's group, and of several tokens: the rows of an MMA

// One of them. lse is in units of log2, and infinite where nothing is to be added.
struct MassRow {
  int sink, local, position;
  float lse;
};

// Puts the keys of a tile into shared memory; zeros where there is none, and beyond channel D.
template <typename T, int kD, bool kInt8>
__device__ __forceinline__ void load_keys(const MassKeys& table, int D, SmemTile<T, kD> to) {
  constexpr int kN = 8;  // channels at a time
  for (int j = threadIdx.x; j < kKeys * kD / kN; j += kThreads) {
    const int key = j / (kD / kN), d = j % (kD / kN) * kN;
    Vector<uint32_t, kN / 2> k{};
    if (table.position[key] != kMasked && d < D) {
      const T* const stats = static_cast<const T*>(table.stats[key]);
      if (kInt8 && table.coded[key])
        k = key_of_codes<T>(static_cast<const uint8_t*>(table.k[key]) + d, stats ? stats + d : nullptr, D, table.k_grid[key]);
      else k = load_vector<uint32_t, kN / 2>(reinterpret_cast<const uint32_t*>(static_cast<const T*>(table.k[key]) + d));
    }
    store_vector(reinterpret_cast<uint32_t*>(to.at(key, d)), k);
  }
}

// A warp takes 16 keys of the block's, and 16 queries at a time.
template <typename T, int kD, bool kInt8>
__global__ void __launch_bounds__(kThreads, 6) mass_kernel(const __grid_constant__ MassArgs a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, h = blockIdx.y, b = blockIdx.z;
  const int tokens = static_cast<int>(a.kv.M * a.kv.P), D = static_cast<int>(a.kv.D), G = static_cast<int>(a.G);
  const int length = a.seq_lens[b], start = length - static_cast<int>(a.T);  // position of the first query
  const int32_t window = a.mask.windows[h];

  SharedMemory shared;
  const SmemTile<T, kD> keys{shared.take<T>(kKeys * SmemTile<T, kD>::kStride)},
      q{shared.take<T>(kMassRows * SmemTile<T, kD>::kStride)};
  MassKeys& table = *shared.take<MassKeys>(1);
  MassRow* const rows = shared.take<MassRow>(kMassRows);

  bool wanted = false;
  if (const int key = threadIdx.x, position = blockIdx.x * kKeys + key; key < kKeys) {
    table.look_up(Sequence<T>{a.kv, b, h, length}, a, key, position);
    wanted = table.position[key] != kMasked;
  }
  float sums[2][2] = {};
  if (__syncthreads_or(wanted)) {
    load_keys<T, kD, kInt8>(table, D, keys);
    const int count = static_cast<int>(a.T) * G;
    for (int first = max(0, -start) * G; first < count; first += kMassRows) {
      load_queries<kMassRows>(q, D, [&](int row) {
        const int i = first + row;
        const T* const from = static_cast<const T*>(a.q.data) + b * a.q.stride0 + i / G * a.q.stride1;
        return i < count ? from + (h * G + i % G) * a.q.stride2 : nullptr;
      });
      if (const int i = first + threadIdx.x; threadIdx.x < kMassRows) {
        MassRow row{0, 0, -1, INFINITY};
        if (i < count) {
          const Reach reach(a, b, window, start + i / G);
          const float lse = a.lse[(b * a.T + i / G) * (a.kv.H * G) + h * G + i % G];
          row = {reach.sink, reach.local, reach.position, lse == -INFINITY ? INFINITY : lse * kLog2e};
        }
        rows[threadIdx.x] = row;
      }
      __syncthreads();
      float s[2][4] = {};
      gemm_qk<16>(s, q, 0, KvOperand<T, kD>{keys, keys}, warp * 16);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const MassRow row = rows[lane / 4 + 8 * r];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = warp * 16 + n * 8 + lane % 4 * 2 + e, unit = table.unit[key];
            if (table.position[key] <= row.position && (unit < row.sink || unit >= row.local || table.listed[key]))
              sums[n][e] += exp2_approx(s[n][2 * r + e] * (a.scale * kLog2e) - row.lse);
          }
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = sums[n][e];
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      const int position = blockIdx.x * kKeys + warp * 16 + n * 8 + lane % 4 * 2 + e;
      if (lane < 4 && position < tokens) a.mass[(b * a.kv.H + h) * static_cast<int64_t>(tokens) + position] = sum;
    }
}

// The same without tensor cores.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) general_mass_kernel(const __grid_constant__ MassArgs a) {
  const int key = threadIdx.x % kKeys, half = threadIdx.x / kKeys, h = blockIdx.y, b = blockIdx.z;
  const int position = blockIdx.x * kKeys + key, tokens = static_cast<int>(a.kv.M * a.kv.P);
  const int D = static_cast<int>(a.kv.D), G = static_cast<int>(a.G), length = a.seq_lens[b];
  const int first = max(0, length - static_cast<int>(a.T));  // the oldest query
  const int32_t window = a.mask.windows[h];

  const int unit = position / static_cast<int>(a.mask.unit);
  const bool listed = is_listed(a, b, h, unit);
  const auto attends = [&](const Reach& reach) {
    return position <= reach.position && (unit < reach.sink || unit >= reach.local || listed);
  };
  bool wanted = is_attended(a, b, h, position, listed);

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
