// Which pages or tokens a query attends: scores of pages, and exact top-k.
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/convert.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tile_size.h"
#include "kernels.h"
#include "paged_kv.h"

namespace lserve::cuda {

// Unsigned integers in the order of floats, and back. A NaN without a sign comes after infinity.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// ---- scores of pages
//
// A group of statistics bounds q · k of all its keys by q+ · max + q- · min, where q+ has the positive channels of q and
// q- the others. On tensor cores that is one product of 2D channels: 16 query heads times 8 groups. The time goes into
// reading statistics, each of which is used once. They are copied in the background, so that how many are on their way
// depends on neither registers nor the compiler; each thread copies what it alone will read, and no barrier is needed.

constexpr int kStepGroups = kScoreThreads / 4;            // that a block of threads scores at a time: 8 a warp
constexpr int kScoreGroups = kScoreStages * kStepGroups;  // of a block of threads; those of a page if they are more

// Eight neighbouring channels. The order of channels within a product is free: when lane % 4 = c takes 8c to 8c + 7 of
// every 32 in both operands, words 0 and 1 are its fragment for one MMA, and words 2 and 3 for the next.
using Channels = Vector<uint32_t, 4>;

// The elements of a pair whose sign bit is set, NaN included, and zeros in the place of others.
__device__ __forceinline__ uint32_t negative(uint32_t pair) { return pair & (pair >> 15 & 0x00010001u) * 0xffffu; }

// Pages [first, first + count) of one (sequence, kv head), of which `sealed` have statistics.
struct PageTile {
  int64_t b, h, first;
  int count, sealed;

  __device__ PageTile(const PageScoresArgs& a, int pages) : b(blockIdx.z), h(blockIdx.y) {
    first = static_cast<int64_t>(blockIdx.x) * pages;
    count = static_cast<int>(min(a.M - first, static_cast<int64_t>(pages)));
    const int64_t end = a.sealed[b] * static_cast<int64_t>(!a.windows || a.windows[h] == 0);
    sealed = static_cast<int>(max(min(end - first, static_cast<int64_t>(count)), static_cast<int64_t>(0)));
  }

  __device__ const int32_t* blocks(const PageScoresArgs& a) const { return blocks_of(a, b, h) + first; }
  __device__ float* scores(const PageScoresArgs& a) const { return a.scores + (b * a.H + h) * a.M + first; }
  template <typename T>
  __device__ const T* query(const PageScoresArgs& a, int64_t head) const {
    return static_cast<const T*>(a.q.data) + b * a.q.stride0 + (h * a.G + head) * a.q.stride1;
  }
};

// Up to 16 query heads as fragments of both signs. The last head fills the rows that are left.
template <typename T, int kD>
struct SignedQueries {
  uint32_t plus[kD / 16][4], minus[kD / 16][4];

  __device__ __forceinline__ SignedQueries(const T* q, int64_t stride, int heads, int D) {  // [heads, D]
    const int row = threadIdx.x % 32 / 4, channel = threadIdx.x % 4 * 8;
#pragma unroll
    for (int i = 0; i < kD / 32; ++i) {
      Channels x[2] = {};  // of rows `row` and `row` + 8
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (32 * i + channel < D)
          x[r] = load_vector<uint32_t, 4>(
              reinterpret_cast<const uint32_t*>(q + min(row + 8 * r, heads - 1) * stride + 32 * i + channel));
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        const uint32_t pair = x[w % 2].value[w / 2];
        minus[2 * i + w / 4][w % 4] = negative(pair);
        plus[2 * i + w / 4][w % 4] = pair ^ negative(pair);
      }
    }
  }
};

// Raises the best score of every page to those of up to 16 query heads over its groups.
template <typename T, int kD>
__device__ __forceinline__ void score_groups(const PageScoresArgs& a, const T* q, int heads,  // [heads, D]
                                             const int32_t* blocks,                           // [pages], shared
                                             uint32_t* best,                                  // [pages], shared, ordered
                                             Channels* ring,  // [kScoreStages, kD / 32, 2, kScoreThreads], shared
                                             int pages) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = lane % 4 * 8, D = static_cast<int>(a.D);
  const int groups_per_page = static_cast<int>(a.groups), groups = pages * groups_per_page;
  const T* const stats = static_cast<const T*>(a.stats);
  // Exact, since half a group is more than the rounding of so few, and cheaper than a division in each step.
  const float share = 1.0f / static_cast<float>(groups_per_page);
  const auto page_of = [&](int group) { return static_cast<int>((static_cast<float>(group) + 0.5f) * share); };
  const auto slot = [&](int step, int i, int bound) {  // of 32 channels; bound: 0 minimum, 1 maximum
    return ring + ((step % kScoreStages * (kD / 32) + i) * 2 + bound) * kScoreThreads + threadIdx.x;
  };

  const auto copy = [&](int step) {
    if (step * kStepGroups >= groups) return;
    const int group = step * kStepGroups + warp * 8 + lane / 4;
    const int page = page_of(group);
    const int64_t block = group < groups ? blocks[page] : -1;
    const T* const low = stats + max(block, int64_t{0}) * a.stats_stride + (group - page * groups_per_page) * (2 * D) + channel;
#pragma unroll
    for (int i = 0; i < kD / 32; ++i) {
      const bool read = block >= 0 && 32 * i + channel < D;
      cp_async_16(slot(step, i, 0), read ? low + 32 * i : stats, read);
      cp_async_16(slot(step, i, 1), read ? low + D + 32 * i : stats, read);
    }
  };
  for (int step = 0; step < kScoreStages; ++step) {
    copy(step);
    cp_async_commit();
  }

  const SignedQueries<T, kD> query(q, a.q.stride1, heads, D);
  for (int step = 0; step * kStepGroups < groups; ++step) {
    cp_async_wait<kScoreStages - 1>();
    float scores[4] = {};
#pragma unroll
    for (int i = 0; i < kD / 32; ++i) {
      const Channels low = *slot(step, i, 0), high = *slot(step, i, 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma_m16n8k16<T>(scores, query.plus[2 * i + half], high.value[2 * half], high.value[2 * half + 1]);
        mma_m16n8k16<T>(scores, query.minus[2 * i + half], low.value[2 * half], low.value[2 * half + 1]);
      }
    }
    copy(step + kScoreStages);
    cp_async_commit();

#pragma unroll
    for (int i = 0; i < 2; ++i) {                                               // a lane's two columns, over all rows
      const auto key = [](float x) { return ordered(x != x ? fabsf(x) : x); };  // a NaN stays
      uint32_t score = max(key(scores[i]), key(scores[i + 2]));
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) score = max(score, __shfl_xor_sync(~0u, score, lanes));
      const int group = step * kStepGroups + warp * 8 + lane % 4 * 2 + i, page = page_of(group);
      // An atomic maximum of integers gives the same in any order.
      if (lane < 4 && group < groups && blocks[page] >= 0) atomicMax(best + page, score);
    }
  }
  cp_async_wait<0>();
}

// A block of threads takes `pages` pages of one (sequence, kv head), whose groups its warps share. An infinite bound may
// make a page's score NaN, as 0 * inf is.
template <typename T, int kD>
__global__ void __launch_bounds__(kScoreThreads) page_scores_kernel(const __grid_constant__ PageScoresArgs a, int pages) {
  join_stream();
  const PageTile tile(a, pages);
  SharedMemory shared;
  int32_t* const blocks = shared.take<int32_t>(kScoreGroups);  // -1: nothing to score
  uint32_t* const best = shared.take<uint32_t>(kScoreGroups);
  Channels* const ring = shared.take<Channels>(kScoreStages * kD / 16 * kScoreThreads);
  if (static_cast<int>(threadIdx.x) < tile.count) {
    blocks[threadIdx.x] = tile.blocks(a)[threadIdx.x];
    best[threadIdx.x] = ordered(-INFINITY);
  }
  __syncthreads();
  for (int head = 0; head < a.G && tile.sealed > 0; head += kScoreHeads)
    score_groups<T, kD>(a, tile.query<T>(a, head), min(static_cast<int>(a.G) - head, kScoreHeads), blocks, best, ring,
                        tile.sealed);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < tile.count) tile.scores(a)[threadIdx.x] = from_ordered(best[threadIdx.x]);
}

// The same in float32, a warp a page: for float32 tensors, and for rows that do not start at multiples of 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kScoreThreads) plain_page_scores_kernel(const __grid_constant__ PageScoresArgs a) {
  join_stream();
  const PageTile tile(a, kScoreThreads / 32);
  const int page = threadIdx.x / 32, lane = threadIdx.x % 32, D = static_cast<int>(a.D);
  if (page >= tile.count) return;
  const int64_t block = page < tile.sealed ? tile.blocks(a)[page] : -1;
  float best = -INFINITY;
  for (int64_t group = 0; group < a.groups && block >= 0; ++group) {
    const T* const low = static_cast<const T*>(a.stats) + block * a.stats_stride + group * 2 * D;
    for (int64_t head = 0; head < a.G; ++head) {
      const T* const q = tile.query<T>(a, head);
      float score = 0;
      for (int d = lane; d < D; d += 32) {
        const float x = static_cast<float>(q[d]);  // the greater of the two products has the maximum if x > 0
        score = fmaf(x, static_cast<float>(low[x > 0 ? D + d : d]), score);
      }
      for (int lanes = 16; lanes > 0; lanes /= 2) score += __shfl_xor_sync(~0u, score, lanes);
      best = score > best || score != score ? score : best;  // a NaN stays
    }
  }
  if (lane == 0) tile.scores(a)[page] = best;
}

// ---- exact top-k
//
// A radix select: four passes over the candidates settle the least key that is picked, 8 bits at a time; then they are
// written in order. Counts are integers and places follow from them, so nothing depends on who comes first.

constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kBins = 256;

// What one block of threads picks from a row of values.
template <typename V>
struct Choice {
  const V* values;
  int begin, end;  // the candidates
  int count;       // that are picked, if there are as many
  int32_t* ids;    // out [width]: those picked, ascending, then -1
  int width;
};

// Where the line between picked and left lies. Picked are all keys that exceed `least` in the bits of `mask`, and the
// first `ties` of the `level` keys that equal it there.
struct Cut {
  uint32_t least, mask;
  int ties, level;

  __device__ bool is_above(uint32_t key) const { return (key & mask) > least; }
  __device__ bool is_level(uint32_t key) const { return (key & mask) == least; }
};

// The greatest keys are picked. Keys in the order of floats; NaN counts as -inf, and -0 as 0.
__device__ __forceinline__ uint32_t pick_key(float value) { return ordered(value != value ? -INFINITY : value + 0.0f); }
// Of integers from 0 on, the least ones.
__device__ __forceinline__ uint32_t pick_key(int32_t value) { return ~static_cast<uint32_t>(value); }

__device__ __forceinline__ Vector<float, 4> load_four(const float* x) { return load_global<float, 4>(x); }
__device__ __forceinline__ Vector<int32_t, 4> load_four(const int32_t* x) {  // which the kernel itself may have written
  return load_vector<int32_t, 4>(x);
}

constexpr int kFours = 4;  // that a thread asks for at once, as one block has to read all of a row

// Four neighbouring candidates, from a multiple of four on.
struct Four {
  uint32_t key[4];
  bool there[4];  // whether it is one

  Four() = default;
  // `end`: of those that are wanted, the candidates' at most.
  template <typename V>
  __device__ __forceinline__ Four(const Choice<V>& c, int first, int end) {
    Vector<V, 4> x{};
    const bool aligned = reinterpret_cast<uintptr_t>(c.values) % sizeof(x) == 0;
    if (aligned && first + 4 <= end) x = load_four(c.values + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      there[i] = c.begin <= first + i && first + i < end;
      if (!(aligned && first + 4 <= end) && there[i]) x.value[i] = c.values[first + i];
      key[i] = pick_key(x.value[i]);
    }
  }
};

// Counts the candidates level with the cut by the 8 bits above `shift`.
template <typename V>
__device__ __forceinline__ void count_bins(const Choice<V>& c, const Cut& cut, int shift, int* bins) {  // [kBins], shared
  constexpr int kStride = 4 * kSelectThreads;
  for (int first = c.begin / 4 * 4 + 4 * static_cast<int>(threadIdx.x); first < c.end; first += kFours * kStride) {
    Four fours[kFours];
#pragma unroll
    for (int n = 0; n < kFours; ++n) fours[n] = Four(c, first + n * kStride, c.end);
#pragma unroll
    for (const Four& four : fours)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (four.there[i] && cut.is_level(four.key[i])) atomicAdd(bins + (four.key[i] >> shift & (kBins - 1)), 1);
  }
}

// One warp finds the bin in which the last pick lies, and moves the cut there.
__device__ __forceinline__ void settle(const int* bins, const Cut& cut, int shift, Cut* settled) {
  const int lane = threadIdx.x % 32, top = kBins - 1 - 8 * lane;  // each lane has 8 bins, the first lane the highest
  int own = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) own += bins[top - (i + lane / 4) % 8];  // lanes that share a bank each in its turn
  int through = own;                                                  // keys in the bins of this lane and of those before it
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int before = __shfl_up_sync(~0u, through, lanes);
    if (lane >= lanes) through += before;
  }
  int ties = cut.ties - (through - own);
  if (ties <= 0 || ties > own) return;  // the bin is another lane's
  int bin = top;
  for (; bins[bin] < ties; --bin) ties -= bins[bin];
  *settled = {cut.least | static_cast<uint32_t>(bin) << shift, cut.mask | (kBins - 1u) << shift, ties, bins[bin]};
}

// All threads get the cut that leaves `count` picks.
template <typename V>
__device__ __forceinline__ Cut find_cut(const Choice<V>& c, SharedMemory& shared) {
  int* const bins = shared.take<int>(4 * kBins);  // of every pass
  Cut* const settled = shared.take<Cut>(1);
  for (int i = threadIdx.x; i < 4 * kBins; i += kSelectThreads) bins[i] = 0;
  __syncthreads();
  Cut cut{0, 0, c.count, c.end - c.begin};
  for (int shift = 24; shift >= 0 && 0 < cut.ties && cut.ties < cut.level; shift -= 8) {
    int* const own = bins + shift / 8 * kBins;
    count_bins(c, cut, shift, own);
    __syncthreads();
    if (threadIdx.x < 32) settle(own, cut, shift, settled);
    __syncthreads();
    cut = *settled;
  }
  return cut;
}

// Sums over the warps before this one.
__device__ __forceinline__ int2 sum_before(int2 own, int2* sums) {  // [kSelectWarps], shared
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) sums[warp] = own;
  __syncthreads();
  int2 sum = lane < warp ? sums[lane] : make_int2(0, 0);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum.x += __shfl_xor_sync(~0u, sum.x, lanes);
    sum.y += __shfl_xor_sync(~0u, sum.y, lanes);
  }
  return sum;
}

// Writes the picks in ascending order. Each warp takes a part of the candidates, and goes through it twice: what the
// parts before it hold above the cut and level with it says where its own picks go, and which of its ties are picked.
template <typename V>
__device__ __forceinline__ void write_picks(const Choice<V>& c, const Cut& cut, SharedMemory& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kStride = 4 * 32;
  const int start = c.begin / 4 * 4, part = (c.end - start + 4 * kSelectThreads - 1) / (4 * kSelectThreads) * kStride;
  const int begin = start + warp * part, end = min(begin + part, c.end);
  // Calls visit(first, above, level) with four neighbouring candidates a lane, and which lanes' i-th are above and level.
  const auto walk = [&](auto visit) {
    for (int first = begin; first < end; first += kFours * kStride) {
      Four fours[kFours];
#pragma unroll
      for (int n = 0; n < kFours; ++n) fours[n] = Four(c, first + n * kStride + 4 * lane, end);
#pragma unroll
      for (int n = 0; n < kFours; ++n) {
        uint32_t above[4], level[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          above[i] = __ballot_sync(~0u, fours[n].there[i] && cut.is_above(fours[n].key[i]));
          level[i] = __ballot_sync(~0u, fours[n].there[i] && cut.is_level(fours[n].key[i]));
        }
        visit(first + n * kStride + 4 * lane, above, level);
      }
    }
  };
  const auto count = [](const uint32_t (&lanes)[4], uint32_t of) {
    return __popc(lanes[0] & of) + __popc(lanes[1] & of) + __popc(lanes[2] & of) + __popc(lanes[3] & of);
  };

  int2 own = make_int2(0, 0);
  walk([&](int, const auto& above, const auto& level) { own.x += count(above, ~0u), own.y += count(level, ~0u); });
  const int2 sum = sum_before(own, shared.take<int2>(kSelectWarps));

  int above_before = sum.x, level_before = sum.y;
  walk([&](int first, const auto& above, const auto& level) {
    const uint32_t mine = 1u << lane, lower = mine - 1;
    int place = above_before + count(above, lower), tie = level_before + count(level, lower);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (above[i] & mine || (level[i] & mine && tie < cut.ties)) c.ids[place + min(tie, cut.ties)] = first + i;
      place += (above[i] & mine) != 0, tie += (level[i] & mine) != 0;
    }
    above_before += count(above, ~0u), level_before += count(level, ~0u);
  });
  for (int i = min(c.count, c.end - c.begin) + static_cast<int>(threadIdx.x); i < c.width; i += kSelectThreads) c.ids[i] = -1;
}

// Pages between the sink and the window that is local for the newest token; unsealed pages are local too.
__device__ __forceinline__ Choice<float> choice(const SelectPagesArgs& a, int64_t b, int64_t h) {
  const int page = (a.seq_lens[b] - 1) / static_cast<int>(a.P), K = static_cast<int>(a.K);  // page: the query's
  const int end = max(min(page - static_cast<int>(a.local) + 1, a.sealed[b]), 0);
  return {a.scores + b * a.score_stride0 + h * a.score_stride1,
          static_cast<int>(min(a.sink, static_cast<int64_t>(end))),
          end,
          K,
          a.pages + (b * a.H + h) * K,
          K};
}

// As many tokens are local as are picked; unsealed tokens are local too.
__device__ __forceinline__ Choice<float> choice(const SelectTokensArgs& a, int64_t b, int64_t h) {
  const int tokens = a.seq_lens[b], residual = tokens - a.sealed[b] * static_cast<int>(a.P), K = static_cast<int>(a.K);
  const int picks = max(min(a.counts[b], K), 0), end = max(tokens - max(picks, residual), 0);
  return {a.mass + b * a.mass_stride0 + h * a.mass_stride1, 0, end, picks, a.tokens + (b * a.H + h) * K, K};
}

// Picks of one (sequence, kv head): what select_pages and select_tokens have in common.
template <typename Args>
__global__ void __launch_bounds__(kSelectThreads) select_kernel(const __grid_constant__ Args a) {
  join_stream();
  const int64_t h = blockIdx.x, b = blockIdx.y;
  const Choice<float> c = choice(a, b, h);
  if (h == 0 && threadIdx.x == 0) a.local_start[b] = c.end;
  if (c.width == 0) return;
  SharedMemory shared;
  write_picks(c, find_cut(c, shared), shared);
}

}  // namespace lserve::cuda
