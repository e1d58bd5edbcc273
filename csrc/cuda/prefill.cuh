// prefill: many queries a sequence. A block of threads takes 64 neighbouring queries of one query head over tiles of the
// keys that they attend: those of the cache, then the new ones. Sequences of few queries go by split_prefill.cuh.
#pragma once
#include "cuda/general.cuh"
#include "cuda/launch.h"
#include "cuda/operands.cuh"
#include "cuda/softmax.cuh"

namespace lserve::cuda {

// What is read of a sequence, all at once, as each answer takes as long as hundreds of instructions.
struct Lengths {
  int first_query, queries;  // rows of q
  int first_key, keys;       // rows of k and v
  int held, sealed;          // tokens and pages of the cache

  __device__ __forceinline__ Lengths(const PrefillArgs& a, int b)
      : first_query(a.cu_seqlens_q[b]),
        queries(a.cu_seqlens_q[b + 1] - first_query),
        first_key(a.cu_seqlens_k[b]),
        keys(a.cu_seqlens_k[b + 1] - first_key),
        held(a.context_lens ? a.context_lens[b] : 0),
        sealed(a.context_lens ? a.kv.sealed[b] : 0) {}

  __device__ __forceinline__ int start() const { return held + keys - queries; }  // the position of the first query
};

// Neighbouring queries of one sequence that attend the same entries.
struct QueryTile {
  Lengths of;           // their sequence
  int b, first, count;  // first: within the sequence's queries; count 0: there is no such tile
  int position;         // of the first query
  Divisor heads = 1;    // rows that a query has in the tile

  __device__ __forceinline__ int position_of(int row) const { return position + row / heads; }
};

// Queries of a head with a window or a list share a tile only within one page; those of a dense head, anywhere.
__host__ __device__ inline int tile_span(int32_t window, int64_t P) {
  return window == kDense ? kQueries : static_cast<int>(P);
}
__host__ __device__ inline int tiles_of_span(int span) { return (span + kQueries - 1) / kQueries; }

// Tiles before sequence b, of which `queries` belong to earlier sequences: an upper bound that follows from shapes.
__host__ __device__ inline int64_t tiles_before(int64_t b, int64_t queries, int span) {
  return queries * tiles_of_span(span) / span + 2 * tiles_of_span(span) * b;
}

// Of the grid. Dense heads need the first of the two, others the second.
inline int64_t query_tiles(const PrefillArgs& a) {
  const int64_t dense = tiles_before(a.kv.B, a.Nq, tile_span(kDense, a.kv.P));
  const int64_t others = tiles_before(a.kv.B, a.Nq, tile_span(0, a.kv.P));
  return dense > others ? dense : others;
}

// The sequence of a row of q: the last whose queries begin at or before it.
__device__ __forceinline__ int sequence_of(const PrefillArgs& a, int64_t row) {
  int b = 0;
  for (int end = static_cast<int>(a.kv.B); b + 1 < end;) {
    const int middle = (b + end) / 2;
    if (a.cu_seqlens_q[middle] <= row) b = middle;
    else end = middle;
  }
  return b;
}
__device__ __forceinline__ bool is_split(const PrefillArgs& a, int queries) { return a.workspace && queries <= kSplitQueries; }

__device__ __forceinline__ QueryTile query_tile(const PrefillArgs& a, int index, int32_t window) {
  const int span = tile_span(window, a.kv.P), per_span = tiles_of_span(span);
  int b = 0;  // the last sequence whose tiles begin at or before index
  for (int end = static_cast<int>(a.kv.B); b + 1 < end;) {
    const int middle = (b + end) / 2;
    if (tiles_before(middle, a.cu_seqlens_q[middle], span) <= index) b = middle;
    else end = middle;
  }
  const Lengths of(a, b);
  const int own = index - static_cast<int>(tiles_before(b, of.first_query, span)), start = of.start();
  const int origin = window == kDense ? start : start / span * span;  // spans are counted from here
  const int begin = origin + own / per_span * span, offset = own % per_span * kQueries;
  const int first = max(begin + offset, start);
  const int last = min(min(begin + offset + kQueries, begin + span), start + of.queries);
  return {of, b, first - start, is_split(a, of.queries) ? 0 : max(0, last - first), first};
}

// What the queries at [position, position + count) attend: the last of them decides, and the mask does the rest. All lanes of
// a warp ask together.
__device__ __forceinline__ Tokens prefill_tokens(const PrefillArgs& a, const QueryTile& tile, int h, int32_t window) {
  const int page = tile.position / a.kv.P, last = tile.position + tile.count - 1;
  const int32_t* list = nullptr;
  if (window == 0) {
    const int64_t row = page - tile.of.start() / a.kv.P;
    list = list_of(a.mask, tile.b, h) + min(row, a.list_rows - 1) * a.list_stride2;
  }
  // The newest P to 2P - 1 tokens before a query are unsealed when it is decoded, so always attended.
  const int64_t unsealed = window == kDense ? 0 : window == 0 ? page : max(page - 1, 0);
  const AttendedUnits e = attended(a.mask, window, list, page, last, a.kv.P, unsealed, WarpSearch{});
  const int end = tile.of.sealed * a.mask.page_units;  // of the sealed units
  const int64_t listed = WarpSearch{}(e.listed, [&](int64_t i) { return e.list[i] < end; });
  return {e, end, static_cast<int>(listed), a.mask.unit, last};
}

template <typename T>
__device__ __forceinline__ Sequence<T> prefill_sequence(const PrefillArgs& a, const QueryTile& tile, int h) {
  return {a.kv,
          tile.b,
          h,
          tile.of.held,
          static_cast<const T*>(a.k.data) + tile.of.first_key * a.k.stride0 + h * a.k.stride1,
          static_cast<const T*>(a.v.data) + tile.of.first_key * a.v.stride0 + h * a.v.stride1,
          a.k.stride0,
          a.v.stride0};
}

// 8 channels of neighbouring keys, which mostly are of one group.
template <int kD>
struct Run {
  static constexpr int kN = 8, kKeys = 4, kCount = cuda::kKeys / kKeys * kD / kN;  // so many to a tile
  int key, d;                                                                      // the first

  __device__ __forceinline__ explicit Run(int i) : key(i / (kD / kN) * kKeys), d(i % (kD / kN) * kN) {}

  // Of its i-th key; null: the key has a grid of its own.
  template <typename T>
  __device__ __forceinline__ const T* stats(const KeyTable& table, int i, int D) const {
    const T* const stats = static_cast<const T*>(table.stats[key + i]);
    return stats && d < D ? stats + d : nullptr;
  }
};

// What a thread will want first.
template <typename T, int kD, typename Crew>
__device__ __forceinline__ Bounds<T> first_bounds(const KeyTable& table, int D) {
  const int thread = Crew::thread();
  if (thread < Run<kD>::kCount)
    if (const T* const stats = Run<kD>(thread).template stats<T>(table, 0, D)) return Bounds<T>::load(stats, D);
  return {};
}

// Dequantises a tile of codes, once for all warps. bounds: as of first_bounds.
template <typename T, int kD, typename Crew, typename Tile>
__device__ __forceinline__ void dequantize_tile(SmemTile<uint8_t, kD> from_k, SmemTile<uint8_t, kD> from_v,
                                                const KeyTable& table, int D, Tile to_k, Tile to_v, Bounds<T> bounds) {
  using Run = Run<kD>;
  for (int j = Crew::thread(); j < Run::kCount; j += Crew::threads()) {
    const Run run(j);
    const T* const stats = run.template stats<T>(table, 0, D);
    const auto put = [](Tile to, int key, int d, const Vector<uint32_t, 4>& x) {
      store_vector(reinterpret_cast<uint32_t*>(to.at(key, d)), x);
    };
    if (stats && stats == run.template stats<T>(table, Run::kKeys - 1, D)) {
      if (j != static_cast<int>(Crew::thread())) bounds = Bounds<T>::load(stats, D);
      const GroupGrid<T> grid(bounds);
#pragma unroll
      for (int key = run.key; key < run.key + Run::kKeys; ++key)
        put(to_k, key, run.d, grid.dequantize(load_codes(from_k.at(key, run.d))));
    } else {
#pragma unroll 1
      for (int i = 0; i < Run::kKeys; ++i) {
        const int key = run.key + i;
        const Codes8 codes = load_codes(from_k.at(key, run.d));
        const T* const own = run.template stats<T>(table, i, D);
        put(to_k, key, run.d,
            own ? GroupGrid<T>(Bounds<T>::load(own, D)).dequantize(codes) : dequantize_8<T>(codes, table.k_grid[key]));
      }
    }
#pragma unroll
    for (int key = run.key; key < run.key + Run::kKeys; ++key)
      put(to_v, key, run.d, dequantize_8<T>(load_codes(from_v.at(key, run.d)), table.v_grid[key]));
  }
}

// A weight of 0 hides a later token from a query, but not its value if that is infinite: 0 * inf is NaN. Such values
// become 0 in the tile, after the queries that do attend them have taken them.
template <typename T, int kD, typename Crew, typename Tile>
__device__ __forceinline__ void take_infinite_values(Tile v, const KeyMask& keys, const QueryTile& tile,
                                                     OnlineSoftmax<T, kD>& softmax) {
  constexpr int kN = 8;                                                          // channels at a time
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % (kQueries / 16);  // of a tile of queries
  const auto hidden = [&](int key) { return keys.position[key] > tile.position && keys.position[key] != kMasked; };
  const auto is_finite = [](T value) { return static_cast<float>(value) - static_cast<float>(value) == 0.0f; };
  bool found = false;
  for (int j = Crew::thread(); j < kKeys * kD / kN; j += Crew::threads()) {
    const int key = j / (kD / kN), d = j % (kD / kN) * kN;
    if (!hidden(key)) continue;
    const Vector<T, kN> values = load_vector<T, kN>(v.at(key, d));
#pragma unroll
    for (int i = 0; i < kN; ++i) found |= !is_finite(values.value[i]);
  }
  if (!Crew::sync_or(found)) return;
  for (int key = 0; key < kKeys; ++key) {
    if (!hidden(key)) continue;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const T value = *v.at(key, n * 8 + lane % 4 * 2 + e % 2);
        const int query = tile.position_of(warp * 16 + lane / 4 + e / 2 * 8);
        if (keys.position[key] <= query && !is_finite(value)) softmax.out[n][e] += static_cast<float>(value);
      }
  }
  Crew::sync();
  for (int j = Crew::thread(); j < kKeys * kD; j += Crew::threads())
    if (hidden(j / kD) && !is_finite(*v.at(j / kD, j % kD))) *v.at(j / kD, j % kD) = T(0.0f);
  Tile::publish();
  Crew::sync();
}

// Four neighbouring results, as they are wanted.
template <typename T>
__device__ __forceinline__ void store_results(T* to, float a, float b, float c, float d) {
  if constexpr (std::is_same_v<T, float>) store_vector(to, Vector<float, 4>{{a, b, c, d}});
  else store_vector(reinterpret_cast<uint32_t*>(to), Vector<uint32_t, 2>{{pack<T>(a, b), pack<T>(c, d)}});
}

// The results of a warp's 16 rows, of which the first is `row` of its tile, for rows before `end`: to out [, D] and lse at
// at(row). Neighbouring lanes exchange pairs of channels, and so write whole sectors.
template <typename T, int kD, typename Out, typename At>
__device__ __forceinline__ void store_rows(const OnlineSoftmax<T, kD>& softmax, int row, int end, int D, Out* out, float* lse,
                                           At at) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane % 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = over_quad(softmax.sum[r], [](float a, float b) { return a + b; }), share = sum == 0 ? 0.0f : 1 / sum;
    const int own = row + lane / 4 + 8 * r;
    const int64_t to = at(min(own, end - 1));
#pragma unroll
    for (int n = 0; n < kD / 8; n += 2) {
      float keep[2], got[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float first = softmax.out[n][2 * r + i] * share, second = softmax.out[n + 1][2 * r + i] * share;
        keep[i] = odd ? second : first;
        got[i] = __shfl_xor_sync(~0u, odd ? first : second, 1);
      }
      const int d = (n + odd) * 8 + lane % 4 / 2 * 4;
      if (own < end && d < D)
        store_results(out + to * D + d, odd ? got[0] : keep[0], odd ? got[1] : keep[1], odd ? keep[0] : got[0],
                      odd ? keep[1] : got[1]);
    }
    if (own < end && lane % 4 == 0) lse[to] = sum == 0 ? -INFINITY : (softmax.max[r] + kHeadroom<T> + log2f(sum)) * kLn2;
  }
}

// What the threads of a block share.
template <typename T, int kD, bool kInt8>
struct PrefillMemory {
  using Codes = KvPipeline<T, uint8_t, kD, kPrefillStages>;
  using Values = KvPipeline<T, T, kD, kPrefillStages>;
  static constexpr int kTile = SmemTile<T, kD>::kTile * sizeof(T), kCodeBytes = Codes::kBytes + 2 * kTile;
  // One stretch serves the pipeline of values, or before it the pipeline of codes and the tile that they are unpacked to.
  static constexpr int kData = kInt8 && kCodeBytes > Values::kBytes ? kCodeBytes : Values::kBytes;
  static constexpr int kQueryElements = kQueries * SmemTile<T, kD>::kStride;
  static constexpr int kBytes = shared_bytes({kQueryElements * int(sizeof(T)), Values::kTables * int(sizeof(KeyTable)), kData});
  SmemTile<T, kD> q;
  KeyTable* tables;
  char* data;

  __device__ explicit PrefillMemory(SharedMemory shared)
      : q{shared.take<T>(kQueryElements)}, tables(shared.take<KeyTable>(Values::kTables)), data(shared.take<char>(kData)) {}
};

// Attention of a tile of queries, which lie in shared memory, over its tokens [first, last).
template <typename T, int kD, bool kInt8>
__device__ __forceinline__ OnlineSoftmax<T, kD> attend_tile(const PrefillMemory<T, kD, kInt8>& memory,
                                                            const Sequence<T>& sequence, const QueryTile& tile,
                                                            const Tokens& tokens, int first, int last, int D, float scale) {
  using Memory = PrefillMemory<T, kD, kInt8>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  OnlineSoftmax<T, kD> softmax;
  const auto attend = [&](const KvOperand<T, kD>& source, const KeyTable& table, auto newest) {
    float s[kKeys / 8][4] = {};
    gemm_qk<kKeys>(s, memory.q, warp * 16, source, 0);
    const bool masked = max(table.newest[0], table.newest[1]) > tile.position;
    if (masked) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int query = tile.position_of(warp * 16 + lane / 4 + e / 2 * 8);
          if (table.position[n * 8 + lane % 4 * 2 + e % 2] > query) s[n][e] = -INFINITY;
        }
    }
    float factor[2];
    softmax.template update<kKeys>(s, scale, factor);
    softmax.rescale(factor);
    if constexpr (newest.value)
      if (masked) take_infinite_values<T, kD, Block>(source.v, table, tile, softmax);
    gemm_pv<kKeys>(softmax.out, s, source, 0);
  };

  const int boundary = kInt8 ? max(first, min(last, tokens.sealed)) : first;
  if constexpr (kInt8) {
    const typename Memory::Codes pipeline{
        reinterpret_cast<uint8_t*>(memory.data), memory.tables, sequence, tokens, first, boundary, D};
    const SmemTile<T, kD> k{reinterpret_cast<T*>(memory.data + Memory::Codes::kBytes)};
    const SmemTile<T, kD> v{reinterpret_cast<T*>(memory.data + Memory::Codes::kBytes + Memory::kTile)};
    pipeline.start();
    for (int i = 0; i < pipeline.tiles(); ++i) {
      const Bounds<T> bounds = first_bounds<T, kD, Block>(pipeline.table_at(i), D);  // come while codes are waited for
      pipeline.wait();
      pipeline.advance(i);
      dequantize_tile<T, kD, Block>(pipeline.keys(i), pipeline.values(i), pipeline.table_at(i), D, k, v, bounds);
      __syncthreads();
      attend({k, v}, pipeline.table_at(i), std::false_type{});  // sealed: older than all queries
    }
    pipeline.finish();
  }
  const typename Memory::Values pipeline{reinterpret_cast<T*>(memory.data), memory.tables, sequence, tokens, boundary, last, D};
  pipeline.start();
  for (int i = 0; i < pipeline.tiles(); ++i) {
    pipeline.wait();
    pipeline.advance(i);
    attend({pipeline.keys(i), pipeline.values(i)}, pipeline.table_at(i), std::true_type{});
  }
  pipeline.finish();
  return softmax;
}

template <typename T, int kD, bool kInt8>
__global__ void __launch_bounds__(kThreads, 2) prefill_kernel(const __grid_constant__ PrefillArgs a) {
  join_stream();
  const int head = blockIdx.y, h = head / a.G, D = static_cast<int>(a.kv.D);
  const int32_t window = a.mask.windows[h];
  const QueryTile tile = query_tile(a, gridDim.x - 1 - blockIdx.x, window);  // the last tiles have most to do
  if (tile.count == 0) return;

  const PrefillMemory<T, kD, kInt8> memory{SharedMemory()};
  const int64_t first_row = tile.of.first_query + tile.first;
  const T* const queries = static_cast<const T*>(a.q.data) + first_row * a.q.stride0 + head * a.q.stride1;
  load_queries<kQueries>(memory.q, D, [&](int row) { return row < tile.count ? queries + row * a.q.stride0 : nullptr; });
  const Tokens tokens = prefill_tokens(a, tile, h, window);
  const auto softmax = attend_tile(memory, prefill_sequence<T>(a, tile, h), tile, tokens, 0, tokens.count, D, a.scale * kLog2e);
  store_rows(softmax, threadIdx.x / 32 * 16, tile.count, D, static_cast<T*>(a.out), a.lse,
             [&](int row) { return (first_row + row) * (a.kv.H * a.G) + head; });
}

// The same without tensor cores: a warp for each query of each query head.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) general_prefill_kernel(const __grid_constant__ PrefillArgs a) {
  join_stream();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int head = blockIdx.y, h = head / a.G, D = static_cast<int>(a.kv.D);
  if (row >= a.Nq) return;
  const int b = sequence_of(a, row);
  const Lengths of(a, b);
  const int first = static_cast<int>(row - of.first_query);
  const QueryTile tile{of, b, first, 1, of.start() + first};
  const Tokens tokens = prefill_tokens(a, tile, h, a.mask.windows[h]);
  const float* const q = load_query(static_cast<const T*>(a.q.data) + row * a.q.stride0 + head * a.q.stride1, D);
  T* const out = static_cast<T*>(a.out) + (row * gridDim.y + head) * D;
  const float lse = attend_warp(prefill_sequence<T>(a, tile, h), tokens, 0, tokens.count, q, D, a.scale,
                                [&](int d, float x) { out[d] = static_cast<T>(x); });
  if (threadIdx.x % 32 == 0) a.lse[row * gridDim.y + head] = lse;
}

}  // namespace lserve::cuda
