// decode: one query a sequence. A block of threads takes a query group over splits of the tokens that its kv head
// attends, and leaves (out, lse) of each in the workspace; combine_kernel folds them in order. Where a sequence is cut
// depends on its own tokens alone, so bits depend on neither the tables' width nor the rest of the batch.
#pragma once
#include "cuda/general.cuh"
#include "cuda/launch.h"
#include "cuda/merge.cuh"
#include "cuda/transposed.cuh"
#include "cuda/warp_pipeline.cuh"

namespace lserve::cuda {

// How the pools hold keys and values: in the model's dtype, or as codes whose keys lie on the grid of 16 neighbours'
// statistics or on one of their own.
enum class Storage { plain, int8_per_group, int8_per_token };

// Tokens of a split: chunks of kChunkTokens, in whole units.
__host__ __device__ inline int split_tokens(const Mask& mask, int tokens) {
  const int unit = static_cast<int>(mask.unit), size = static_cast<int>(kChunkTokens);
  return split_tokens(tokens, (unit < size ? size / unit : 1) * unit, kMaxSplits);
}

// The one of (b, h).
struct DecodeQuery : Queries<DecodeArgs> {
  using Queries::Queries;

  template <typename Search>
  __device__ __forceinline__ AttendedUnits units(Search search) const {
    return held > 0 ? Queries::units(held - 1, list, search) : AttendedUnits{};
  }
  // All lanes of a warp ask together. What is listed lies before what is local, and so is sealed.
  __device__ __forceinline__ Tokens tokens() const {
    const AttendedUnits e = units(WarpSearch{});
    return {e, sealed * a.mask.page_units, e.listed, a.mask.unit, held - 1};
  }
  // Whether this split has tokens, as far as can be told without the list: if not, there is nothing to look up.
  __device__ __forceinline__ bool may_have(int split) const {
    const AttendedUnits most = units([](int64_t entries, auto) { return entries; });
    const int tokens = most.count() * static_cast<int>(a.mask.unit), size = split_tokens(a.mask, tokens);
    return size > split_tokens(a.mask, 1) || split * size < tokens;  // longer splits may prove to be shorter ones
  }
};

// Asks for what is read one after the other: the list, and then the tables.
__device__ __forceinline__ void prefetch_tables(const DecodeArgs& a, int b, int h) {
  constexpr int kIds = 32;  // of a line
  const int warp = threadIdx.x / 32, first = threadIdx.x % 32 * kIds;
  const int32_t* const list = list_of(a.mask, b, h);
  if (warp == 0 && list && first < a.mask.K) prefetch(list + first);
  if (warp == 1 && first < a.kv.M) prefetch(blocks_of(a.kv, b, h) + first);
  if (warp == 2 && first < a.kv.M) prefetch(slots_of(a.kv, b, h) + first);
}

// ---- a split

// What the threads of a block share while they go through their splits.
template <typename T, int kD, Storage kStorage, bool kScattered>
struct DecodeMemory {
  static constexpr bool kGroups = kStorage == Storage::int8_per_group;
  static constexpr int kFloatStages = kStorage == Storage::plain && kD <= 128 ? kDecodeStages : kDecodeFewStages;
  using Floats = WarpPipeline<T, T, kD, kFloatStages, false, kScattered>;
  using Codes = WarpPipeline<T, uint8_t, kD, kDecodeCodeStages, kGroups, kScattered>;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRow = kD + 4;  // floats of a row of results: neighbouring rows in different banks
  static constexpr int larger(int a, int b) { return a > b ? a : b; }
  // One stretch of a warp serves both pipelines, one after the other; and then that of all, their results.
  static constexpr int kStageBytes = larger(kFloatStages * sizeof(typename Floats::Tile),
                                            kStorage == Storage::plain ? 0 : kDecodeCodeStages * sizeof(typename Codes::Tile));
  static constexpr int kData = larger(kWarps * kStageBytes, kWarps * kGroup * kRow * sizeof(float));
  static constexpr int kGrids = kGroups ? kWarps * 2 * kD : 0;  // floats
  static constexpr int kBytes = shared_bytes({kData, kWarps * kGroup * int(sizeof(float)), kWarps * kGroup * int(sizeof(float)),
                                              int(sizeof(Tokens)), kGrids * int(sizeof(float))});
  char* data;
  float *maxima, *sums;  // [kWarps, kGroup]
  Tokens* tokens;        // there, and not in registers, of which the loops need all
  float* grid;           // the warp's [2, kD], or null

  __device__ explicit DecodeMemory(SharedMemory shared)
      : data(shared.take<char>(kData)),
        maxima(shared.take<float>(kWarps * kGroup)),
        sums(shared.take<float>(kWarps * kGroup)),
        tokens(shared.take<Tokens>(1)),
        grid(kGroups ? shared.take<float>(kGrids) + threadIdx.x / 32 * 2 * kD : nullptr) {}

  template <typename Pipeline>
  __device__ Pipeline pipeline() const {
    return {reinterpret_cast<typename Pipeline::Tile*>(data + threadIdx.x / 32 * kStageBytes)};
  }
};

// Minimum and step of the keys' group, once for the lanes that need them.
template <typename T, int kD>
__device__ __forceinline__ void expand_grid(const T* stats, float* grid) {
  for (int d = threadIdx.x % 32 * 4; d < kD; d += 128) {
    const auto low = load_vector<T, 4>(stats + d), high = load_vector<T, 4>(stats + kD + d);
    Vector<float, 4> min, step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      min.value[i] = static_cast<float>(low.value[i]);
      step.value[i] = narrow_step(min.value[i], static_cast<float>(high.value[i]));
    }
    store_vector(grid + d, min), store_vector(grid + kD + d, step);
  }
  __syncwarp();
}

// Attention over tokens [first, last): a warp takes every fourth tile. query(row): the first channel, or null.
template <typename T, int kD, Storage kStorage, bool kScattered, typename Query>
__device__ __forceinline__ TransposedSoftmax<T, kD> attend_split(const DecodeMemory<T, kD, kStorage, kScattered>& memory,
                                                                 const Sequence<T>& sequence, const Tokens& tokens, int first,
                                                                 int last, int D, float scale, Query query) {
  using Memory = DecodeMemory<T, kD, kStorage, kScattered>;
  const int lane = threadIdx.x % 32;
  TransposedSoftmax<T, kD> softmax;
  QueryOperand<T, kD> q;
  const auto mask = [&](float (&s)[4], uint32_t attended, auto logit) {  // s: q · k, become logits
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = lane / 4 + i / 2 * 8;
      s[i] = attended >> key & 1 ? logit(s[i], key, i % 2) * scale : -INFINITY;
    }
  };

  const int boundary = kStorage == Storage::plain ? first : max(first, min(last, tokens.sealed));
  if constexpr (kStorage != Storage::plain) {
    if (first < boundary) {
      q.template load<true>(D, query);
      float total[2] = {};  // of q: k = min + step * code gives q · k = min * total + step * q · code
      if (!Memory::kGroups) q.totals(total);
      memory.template pipeline<typename Memory::Codes>().run(sequence, tokens, first, boundary, D, [&](auto& stage) {
        if constexpr (Memory::kGroups) expand_grid<T, kD>(stage.stats, memory.grid);
        const Int8Operand<T, kD, Memory::kGroups> operand{stage.k(), stage.v(), memory.grid};
        float s[4] = {};
#pragma unroll
        for (int pair = 0; pair < kD / 32; ++pair) {
          uint32_t a[2][4];
          operand.keys(a, pair);
#pragma unroll
          for (int step = 0; step < 2; ++step) mma_m16n8k16<T>(s, a[step], q.b[2 * pair + step][0], q.b[2 * pair + step][1]);
        }
        mask(s, stage.attended, [&](float x, int key, int e) {
          return Memory::kGroups ? x : fmaf(stage.k_grid[key].x, x, stage.k_grid[key].y * total[e]);
        });
        softmax.update(s, {stage.v_grid[lane / 4], stage.v_grid[lane / 4 + 8]});
        uint32_t p[2];
        transpose_weights<__half>(s, p);
#pragma unroll
        for (int pair = 0; pair < kD / 32; ++pair) {
          uint32_t a[2][4];
          operand.values(a, pair);
#pragma unroll
          for (int step = 0; step < 2; ++step) mma_m16n8k16<__half>(softmax.out[2 * pair + step], a[step], p[0], p[1]);
        }
      });
      softmax.finish_codes();
      unpermute_channels(softmax);
    }
  }
  if (boundary < last) {
    q.template load<false>(D, query);
    memory.template pipeline<typename Memory::Floats>().run(sequence, tokens, boundary, last, D, [&](auto& stage) {
      const FloatOperand<T, kD> operand{stage.k(), stage.v()};
      float s[4] = {};
      uint32_t a[4], p[2];
#pragma unroll
      for (int step = 0; step < kD / 16; ++step) {
        operand.keys(a, step);
        mma_m16n8k16<T>(s, a, q.b[step][0], q.b[step][1]);
      }
      mask(s, stage.attended, [](float x, int, int) { return x; });
      softmax.update(s);
      transpose_weights<T>(s, p);
#pragma unroll
      for (int step = 0; step < kD / 16; ++step) {
        operand.values(a, step);
        mma_m16n8k16<T>(softmax.out[step], a, p[0], p[1]);
      }
    });
  }
  return softmax;
}

// The four warps' results, of equal keys in equal order, become one: out(row, d, value) and lse(row, value).
template <typename T, int kD, Storage kStorage, bool kScattered, typename Out, typename Lse>
__device__ __forceinline__ void join_warps(const DecodeMemory<T, kD, kStorage, kScattered>& memory,
                                           TransposedSoftmax<T, kD>& softmax, int rows, int D, Out out, Lse lse) {
  constexpr int kRow = DecodeMemory<T, kD, kStorage, kScattered>::kRow;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float *const maxima = memory.maxima, *const sums = memory.sums, *const results = reinterpret_cast<float*>(memory.data);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const auto add = [](float a, float b) { return a + b; };
    softmax.sum[e] = over_keys(softmax.sum[e], add);
    softmax.offset[e] = over_keys(softmax.offset[e], add);
    if (lane < 4) {
      maxima[warp * kGroup + 2 * lane + e] = softmax.max[e];
      sums[warp * kGroup + 2 * lane + e] = softmax.sum[e];
    }
  }
  __syncthreads();  // and no warp needs the memory for keys any more
  const auto total_of = [&](int row, float& largest) {
    largest = fmaxf(fmaxf(maxima[row], maxima[kGroup + row]), fmaxf(maxima[2 * kGroup + row], maxima[3 * kGroup + row]));
    if (largest == -INFINITY) largest = 0;
    float total = 0;
    for (int w = 0; w < 4; ++w) total += sums[w * kGroup + row] * exp2_approx(maxima[w * kGroup + row] - largest);
    return total;
  };
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = 2 * (lane % 4) + e;
    float largest;
    const float total = total_of(row, largest), share = exp2_approx(softmax.max[e] - largest) / (total == 0 ? 1 : total);
    float* const to = results + (warp * kGroup + row) * kRow + lane / 4;
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      to[16 * step] = (softmax.out[step][e] + softmax.offset[e]) * share;
      to[16 * step + 8] = (softmax.out[step][2 + e] + softmax.offset[e]) * share;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * kD; i += kThreads) {
    const int row = i / kD, d = i % kD;
    if (d >= D) continue;
    float x = 0;
    for (int w = 0; w < 4; ++w) x += results[(w * kGroup + row) * kRow + d];
    out(row, d, x);
  }
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    float largest;
    const float total = total_of(row, largest);
    lse(row, total == 0 ? -INFINITY : (largest + kHeadroom<T> + log2f(total)) * kLn2);
  }
}

// Blocks that an SM is to hold, by registers.
template <int kD>
constexpr int kBlocks = kD <= 128 ? 3 : 2;

template <typename T, int kD, Storage kStorage, bool kScattered>
__global__ void __launch_bounds__(kThreads, kBlocks<kD>)
    decode_kernel(const __grid_constant__ DecodeArgs a, const Partials partials) {
  const int b = blockIdx.y, parts = static_cast<int>(a.G + kGroup - 1) / kGroup, h = blockIdx.x / parts;
  const int head = static_cast<int>(h * a.G) + blockIdx.x % parts * kGroup;  // of the first query
  const int heads = min(kGroup, static_cast<int>((h + 1) * a.G) - head), D = static_cast<int>(a.kv.D);

  prefetch_tables(a, b, h);
  join_stream();
  const DecodeQuery own(a, b, h);
  if (blockIdx.z > 0 && !own.may_have(blockIdx.z)) return;
  const DecodeMemory<T, kD, kStorage, kScattered> memory{SharedMemory()};
  const T* const queries = static_cast<const T*>(a.q.data) + b * a.q.stride0 + head * a.q.stride1;
  const auto query = [&](int row) { return row < heads ? queries + row * a.q.stride1 : nullptr; };
  const Sequence<T> sequence{a.kv, b, h, own.held};
  const Tokens found = own.tokens(), &tokens = *memory.tokens;
  if (threadIdx.x == 0) *memory.tokens = found;
  __syncthreads();

  const auto row_of = [&](int row) { return b * (a.kv.H * a.G) + head + row; };
  if (blockIdx.z == 0 && static_cast<int>(threadIdx.x) < heads)
    partials.counts[row_of(threadIdx.x)] = count_splits(found.count, split_tokens(a.mask, found.count));
  for (int split = blockIdx.z;; split += gridDim.z) {
    const int size = split_tokens(a.mask, tokens.count), first = split * size, last = min(first + size, tokens.count);
    if (first >= last) return;
    TransposedSoftmax<T, kD> softmax =
        attend_split<T, kD, kStorage, kScattered>(memory, sequence, tokens, first, last, D, a.scale * kLog2e, query);
    const auto at = [&](int row) { return row_of(row) * partials.splits + split; };
    join_warps<T, kD, kStorage, kScattered>(
        memory, softmax, heads, D, [&](int row, int d, float x) { partials.out[at(row) * D + d] = x; },
        [&](int row, float x) { partials.lse[at(row)] = x; });
    __syncthreads();  // the next split needs the memory
  }
}

// The same without tensor cores: a warp for each query head.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    general_decode_kernel(const __grid_constant__ DecodeArgs a, const Partials partials) {
  join_stream();
  const int heads = static_cast<int>(a.kv.H * a.G), head = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  const int b = blockIdx.y, h = head / a.G, D = static_cast<int>(a.kv.D);
  if (head >= heads) return;
  const DecodeQuery own(a, b, h);
  const Tokens tokens = own.tokens();
  const int size = split_tokens(a.mask, tokens.count);
  const int64_t row = static_cast<int64_t>(b) * heads + head;
  if (blockIdx.z == 0 && threadIdx.x % 32 == 0) partials.counts[row] = count_splits(tokens.count, size);
  const float* const q = load_query(static_cast<const T*>(a.q.data) + b * a.q.stride0 + head * a.q.stride1, D);
  for (int split = blockIdx.z; split * size < tokens.count; split += gridDim.z) {
    const int first = split * size, last = min(first + size, tokens.count);
    const int64_t partial = row * partials.splits + split;
    const float lse = attend_warp(Sequence<T>{a.kv, b, h, own.held}, tokens, first, last, q, D, a.scale,
                                  [&](int d, float x) { partials.out[partial * D + d] = x; });
    if (threadIdx.x % 32 == 0) partials.lse[partial] = lse;
  }
}

// Joins a query head's splits. One block of threads for each row of [B, Hq].
template <typename T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ DecodeArgs a, const Partials partials) {
  join_stream();
  const int64_t D = a.kv.D, row = blockIdx.x;
  join_splits<kMaxSplits>(partials, row, D, static_cast<T*>(a.out) + row * D, a.lse + row);
}

}  // namespace lserve::cuda
