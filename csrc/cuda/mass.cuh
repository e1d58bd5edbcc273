// attention_mass: the softmax mass that the last T queries of a sequence put on every token. A block of threads owns 64
// neighbouring tokens, reads those that anybody attends once, and adds up over queries in order: no atomics, and what
// nobody attends is never read.
#pragma once
#include "cuda/general.cuh"
#include "cuda/operands.cuh"
#include "cuda/softmax.cuh"

namespace lserve::cuda {

// Which tokens a query attends, apart from the list.
struct Reach {
  int sink, local;  // units: below the one, or from the other on
  int position;     // and none after the query's own
};

// The last T of (b, h).
struct MassQueries : Queries<MassArgs> {
  using Queries::Queries;

  __device__ __forceinline__ int start() const { return held - static_cast<int>(a.T); }  // the position of the first
  __device__ __forceinline__ Reach reach(int position) const {
    const AttendedUnits e = units(position, nullptr, Bisection{});
    return {e.sink, e.local, position};
  }
  __device__ __forceinline__ bool is_listed(int unit) const {
    if (!list || window != 0) return false;
    const int64_t first = Bisection{}(a.mask.K, [&](int64_t i) { return list[i] >= 0 && list[i] < unit; });
    return first < a.mask.K && list[first] == unit;
  }
  // Whether any of them attends a token.
  __device__ __forceinline__ bool attend(int position, bool listed) const {
    if (position >= held) return false;
    const int unit = position / a.mask.unit;
    // Windows move on with the queries: the oldest has the first local unit.
    return listed || unit < reach(held - 1).sink || unit >= reach(max(0, start())).local;
  }
  __device__ __forceinline__ bool is_sealed(int position) const { return position / a.kv.P < sealed; }
};

// The keys of a block.
struct MassKeys {
  const void *k[kKeys], *stats[kKeys];
  float2 k_grid[kKeys];
  int position[kKeys], unit[kKeys];  // kMasked: nobody attends it, or it is not held any more
  bool coded[kKeys], listed[kKeys];

  template <typename T>
  __device__ __forceinline__ void look_up(const Sequence<T>& sequence, const MassQueries& queries, int key, int at) {
    unit[key] = at / queries.a.mask.unit;
    listed[key] = queries.is_listed(unit[key]);
    Row row{};
    if (queries.attend(at, listed[key])) row = sequence.row(at, queries.is_sealed(at));
    position[key] = row.k ? at : kMasked;
    k[key] = row.k, stats[key] = row.stats, k_grid[key] = row.k_grid, coded[key] = row.coded;
  }
  __device__ __forceinline__ Codes8 codes(int key, int d) const { return load_codes(static_cast<const uint8_t*>(k[key]) + d); }
};

// Of a query and head: lse is in units of log2, and infinite where nothing is to be added. Without a query, position is -1.
struct alignas(16) MassRow {
  int sink, local, position;
  float lse;
};

// A thread's rows: one of every batch.
template <typename T>
struct MassRows {
  const MassQueries& all;
  const MassArgs& a;
  const int h, b, G;
  int token, head;  // of the next one; head: within the group
  float lse;

  __device__ __forceinline__ MassRows(const MassQueries& all, int h, int b)
      : all(all),
        a(all.a),
        h(h),
        b(b),
        G(static_cast<int>(a.G)),
        token(max(0, -all.start()) + threadIdx.x / a.G),
        head(threadIdx.x % a.G) {
    ask();
  }

  // For the number that takes longest to come.
  __device__ __forceinline__ void ask() {
    lse = token < a.T ? a.lse[(b * a.T + token) * (a.kv.H * G) + h * G + head] : -INFINITY;
  }
  __device__ __forceinline__ void put(MassRow* rows, const T** queries) {
    const bool there = token < a.T;
    const Reach reach = all.reach(all.start() + token);
    const T* const query =
        static_cast<const T*>(a.q.data) + b * a.q.stride0 + token * a.q.stride1 + (h * G + head) * a.q.stride2;
    const MassRow own{reach.sink, reach.local, there ? reach.position : -1, lse == -INFINITY ? INFINITY : lse * kLog2e};
    rows[threadIdx.x] = own;  // all 16 bytes at once
    queries[threadIdx.x] = there ? query : nullptr;
    token += kThreads / a.G, head += kThreads % a.G;
    if (head >= G) ++token, head -= G;
  }
};

// Brings the keys of a tile into shared memory, those that are no codes in the background; zeros where there is none, and
// beyond channel D. A thread takes 8 channels of neighbouring keys. grouped: codes lie on the grids of groups.
template <typename T, int kD, bool kInt8>
__device__ __forceinline__ void load_keys(const MassKeys& table, bool grouped, int D, SmemTile<T, kD> to) {
  constexpr int kN = 8, kRun = kD < 128 ? 4 : 8;
  for_chunks<kKeys / kRun, kD / kN, kThreads>(threadIdx.x, [&](auto at) {
    const int first = at.row() * kRun, d = at.chunk * kN;
    Codes8 codes[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int key = first + i;
      if (kInt8 && table.coded[key] && d < D) codes[i] = table.codes(key, d);
      else cp_async_16(to.at(key, d), at_offset(static_cast<const T*>(table.k[key]), d), table.k[key] && d < D);
    }
    if (!kInt8 || d >= D) return;
    const auto put = [&](int key, const Vector<uint32_t, 4>& k) {
      store_vector(reinterpret_cast<uint32_t*>(to.at(key, d)), k);
    };
    const auto stats = [&](int i) { return static_cast<const T*>(table.stats[first + i]); };
    if (!grouped) {
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        if (table.coded[first + i]) put(first + i, dequantize_8<T>(codes[i], table.k_grid[first + i]));
    } else if (stats(0) && stats(0) == stats(kRun - 1)) {  // of one group, as keys mostly are
      const GroupGrid<T> grid(Bounds<T>::load(stats(0) + d, D));
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        if (table.coded[first + i]) put(first + i, grid.dequantize(codes[i]));
    } else {
#pragma unroll 1
      for (int i = 0; i < kRun; ++i)
        if (table.coded[first + i])
          put(first + i, GroupGrid<T>(Bounds<T>::load(stats(i) + d, D)).dequantize(table.codes(first + i, d)));
    }
  });
}

// A warp's 16 keys in registers, as gemm_qk wants them.
template <typename T, int kD>
struct HeldKeys {
  uint32_t b[kD / 32][2][4];

  __device__ __forceinline__ HeldKeys(SmemTile<T, kD> tile, int key) {
#pragma unroll
    for (int pair = 0; pair < kD / 32; ++pair) KvOperand<T, kD>{tile, tile}.keys(b[pair], key, pair);
  }
  __device__ __forceinline__ void keys(uint32_t (&to)[2][4], int, int pair) const {
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[step][i] = b[pair][step][i];
  }
};

// A warp takes 16 keys of the block's, and 16 queries at a time, while the next 16 come.
template <typename T, int kD, bool kInt8>
__global__ void __launch_bounds__(kThreads, kD <= 128 ? 5 : 4) mass_kernel(const __grid_constant__ MassArgs a) {
  join_stream();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, h = blockIdx.y, b = blockIdx.z;
  const int tokens = static_cast<int>(a.kv.M * a.kv.P), D = static_cast<int>(a.kv.D);

  using Tile = SmemTile<T, kD>;
  SharedMemory shared;
  const Tile keys{shared.take<T>(kKeys * Tile::kStride)};
  T* const queries = shared.take<T>(2 * kMassRows * Tile::kStride);
  MassKeys& table = *shared.take<MassKeys>(1);
  MassRow* const rows = shared.take<MassRow>(2 * kThreads);
  const T** const sources = shared.take<const T*>(2 * kThreads);
  const auto queries_of = [&](int step) { return Tile{queries + step % 2 * (kMassRows * Tile::kStride)}; };
  const auto row_of = [](int step) { return step % (2 * kMassBatch) * kMassRows; };

  const MassQueries all(a, b, h);
  MassRows<T> own(all, h, b);
  bool wanted = false;
  if (const int key = threadIdx.x, position = blockIdx.x * kKeys + key; key < kKeys) {
    table.look_up(Sequence<T>{a.kv, b, h, all.held}, all, key, position);
    wanted = table.position[key] != kMasked;
  }
  own.put(rows, sources);
  float sums[2][2] = {};
  if (__syncthreads_or(wanted)) {
    const auto fetch = [&](int step) {
      for_chunks<kMassRows, kD / 8, kThreads>(threadIdx.x, [&](auto at) {
        const int row = at.row(), d = at.chunk * 8;
        const T* const from = sources[row_of(step) + row];
        cp_async_16(queries_of(step).at(row, d), at_offset(from, d), from && d < D);
      });
      cp_async_commit();
    };

    fetch(0);
    load_keys<T, kD, kInt8>(table, a.kv.stats != nullptr, D, keys);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const HeldKeys<T, kD> held(keys, warp * 16);
    int positions[2][2], units[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = warp * 16 + n * 8 + lane % 4 * 2 + e;
        positions[n][e] = table.position[key];
        units[n][e] = table.listed[key] ? -1 : table.unit[key];  // what is listed is attended like a sink
      }

    const int steps = (static_cast<int>(min(a.T, int64_t{all.held}) * a.G) + kMassRows - 1) / kMassRows;
    for (int step = 0; step < steps; ++step) {
      const bool next_batch = step % kMassBatch == 0 && step + kMassBatch < steps;
      if (next_batch) own.ask();
      if (step + 1 < steps) fetch(step + 1);
      float s[2][4] = {};
      gemm_qk<16>(s, queries_of(step), 0, held, 0);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const MassRow row = rows[row_of(step) + lane / 4 + 8 * r];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (positions[n][e] <= row.position && (units[n][e] < row.sink || units[n][e] >= row.local))
              sums[n][e] += exp2_approx(s[n][2 * r + e] * (a.scale * kLog2e) - row.lse);
      }
      if (next_batch) own.put(rows + row_of(step + kMassBatch), sources + row_of(step + kMassBatch));
      cp_async_wait<0>();
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
  join_stream();
  const int key = threadIdx.x % kKeys, half = threadIdx.x / kKeys, h = blockIdx.y, b = blockIdx.z;
  const int position = blockIdx.x * kKeys + key, tokens = static_cast<int>(a.kv.M * a.kv.P);
  const int D = static_cast<int>(a.kv.D), G = static_cast<int>(a.G);
  const MassQueries all(a, b, h);
  const int unit = position / a.mask.unit;
  const bool listed = all.is_listed(unit);
  const auto attends = [&](const Reach& reach) {
    return position <= reach.position && (unit < reach.sink || unit >= reach.local || listed);
  };
  bool wanted = all.attend(position, listed);

  SharedMemory shared;
  const int stride = D + 1;  // every key in another bank
  float* const keys = shared.take<float>(kKeys * stride);
  float* const queries = shared.take<float>(kMassQueries * kMaxChannels);
  float* const sums = shared.take<float>(kThreads);
  Row row{};
  if (wanted) row = Sequence<T>{a.kv, b, h, all.held}.row(position, all.is_sealed(position));
  wanted = row.k != nullptr;
  for (int d = half; d < D; d += kThreads / kKeys) keys[key * stride + d] = wanted ? key_value<T>(row, d, D) : 0.0f;

  float sum = 0;
  if (__syncthreads_or(wanted)) {
    const int rows = static_cast<int>(a.T) * G;
    for (int i = max(0, -all.start()) * G; i < rows; i += kMassQueries) {
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
        if (!attends(all.reach(all.start() + t))) continue;
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
