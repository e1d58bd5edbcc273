// prefill of few queries a sequence over a long cache, as in turns of a chat and in the verification of drafts: time goes
// into reading keys, as in decode. So the rows of a tile are all query heads that share them, and blocks of threads share
// the tokens, whose partial results are joined. Where a sequence is cut depends on its own tokens alone.
#pragma once
#include <algorithm>

#include "cuda/merge.cuh"
#include "cuda/prefill.cuh"

namespace lserve::cuda {

constexpr int kSplitHeads = kQueries / 4;  // that share keys, at most: a tile has room for 4 queries then

// Queries of a tile, and tiles of a sequence.
__host__ __device__ inline int queries_of_tile(int64_t G) { return kQueries / static_cast<int>(G); }
__host__ __device__ inline int tiles_of_span(int span, int64_t G) {
  const int queries = span < kSplitQueries ? span : kSplitQueries, size = queries_of_tile(G);
  return (queries + size - 1) / size;
}
inline int64_t split_tiles(const PrefillArgs& a) {
  const int P = static_cast<int>(a.kv.P), pages = (kSplitQueries - 2) / P + 2;  // that the queries may lie in
  return std::max(tiles_of_span(kSplitQueries, a.G), pages * tiles_of_span(P, a.G));
}

// Where the results of queries lie in a workspace, [rows, Hq]: as they do in q, or, where others stand among them,
// kSplitQueries to a sequence.
struct SplitQueries {
  __host__ __device__ static bool packed(const PrefillArgs& a) { return a.Nq <= kSplitQueries * a.kv.B; }
  __host__ __device__ static int64_t rows(const PrefillArgs& a) { return packed(a) ? a.Nq : kSplitQueries * a.kv.B; }
  __device__ static int64_t row(const PrefillArgs& a, const QueryTile& tile) {  // of its first query
    return (packed(a) ? tile.of.first_query : kSplitQueries * tile.b) + tile.first;
  }
};

// The tile `index` of sequence b, like query_tile's.
__device__ __forceinline__ QueryTile split_tile(const PrefillArgs& a, int b, int index, int32_t window) {
  const Lengths of(a, b);
  const int start = of.start(), P = static_cast<int>(a.kv.P), size = queries_of_tile(a.G);
  const int span = window == kDense ? kSplitQueries : P, per_span = tiles_of_span(span, a.G);
  const int origin = (window == kDense ? start : start / P * P) + index / per_span * span;
  const int first = max(origin, start) + index % per_span * size;
  const int last = min(min(first + size, origin + span), start + of.queries);
  return {of, b, first - start, is_split(a, of.queries) ? max(0, last - first) : 0, first, a.G};
}

template <typename T, int kD, bool kInt8>
__global__ void __launch_bounds__(kThreads, 2)
    split_prefill_kernel(const __grid_constant__ PrefillArgs a, const Partials partials) {
  join_stream();
  const int b = blockIdx.y, h = blockIdx.x % static_cast<int>(a.kv.H), D = static_cast<int>(a.kv.D);
  const int32_t window = a.mask.windows[h];
  const QueryTile tile = split_tile(a, b, blockIdx.x / static_cast<int>(a.kv.H), window);
  if (tile.count == 0) return;
  const Tokens tokens = prefill_tokens(a, tile, h, window);
  const int size = split_tokens(tokens.count, kSplitChunk, kPrefillSplits), split = blockIdx.z;
  const int first = split * size, last = min(first + size, tokens.count);
  if (first >= last) return;

  const PrefillMemory<T, kD, kInt8> memory{SharedMemory()};
  const int64_t first_row = tile.of.first_query + tile.first;
  const T* const queries = static_cast<const T*>(a.q.data) + first_row * a.q.stride0 + h * a.G * a.q.stride1;
  const int rows = tile.count * static_cast<int>(tile.heads);
  const auto row_of = [&, first_row = SplitQueries::row(a, tile)](int row) {  // of partial results
    return (first_row + row / tile.heads) * (a.kv.H * a.G) + h * a.G + row % tile.heads;
  };
  if (split == 0 && static_cast<int>(threadIdx.x) < rows)
    partials.counts[row_of(threadIdx.x)] = count_splits(tokens.count, size);
  load_queries<kQueries>(memory.q, D, [&](int row) {
    return row < rows ? queries + row / tile.heads * a.q.stride0 + row % tile.heads * a.q.stride1 : nullptr;
  });
  const auto softmax = attend_tile(memory, prefill_sequence<T>(a, tile, h), tile, tokens, first, last, D, a.scale * kLog2e);

  store_rows(softmax, threadIdx.x / 32 * 16, rows, D, partials.out, partials.lse,
             [&](int row) { return row_of(row) * partials.splits + split; });
}

// One block of threads for each row of results.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    join_prefill_kernel(const __grid_constant__ PrefillArgs a, const Partials partials) {
  join_stream();
  const int heads = static_cast<int>(a.kv.H * a.G), own = blockIdx.x / heads, head = blockIdx.x % heads;
  const bool packed = SplitQueries::packed(a);
  const int b = packed ? sequence_of(a, own) : own / kSplitQueries;
  const int first = a.cu_seqlens_q[b], queries = a.cu_seqlens_q[b + 1] - first;
  const int query = packed ? own - first : own % kSplitQueries;
  if (query < 0 || query >= queries || !is_split(a, queries)) return;
  const int64_t D = a.kv.D, row = (first + query) * static_cast<int64_t>(heads) + head;
  join_splits<kPrefillSplits>(partials, blockIdx.x, D, static_cast<T*>(a.out) + row * D, a.lse + row);
}

}  // namespace lserve::cuda
