// decode: one query a sequence. A block of threads takes a query group over splits of the tokens that its kv head
// attends, and leaves (out, lse) of each in the workspace; combine_kernel folds them in order. Where a sequence is cut
// depends on its own tokens alone, so bits depend on neither the tables' width nor the rest of the batch.
#pragma once
#include "cuda/attention.cuh"
#include "cuda/general.cuh"
#include "cuda/launch.h"

namespace lserve::cuda {

constexpr int kGroup = 16;  // query heads that share a pass over the keys: the rows of an MMA

constexpr int kMaxSplits = 64;

// How the pools hold keys and values: in the model's dtype, or as codes whose keys lie on the grid of 16 neighbours'
// statistics or on one of their own.
enum class Storage { plain, codes_of_groups, codes_of_tokens };

// Results of every query head over every split.
struct Partials {
  float* out;  // [B, Hq, splits, D]
  float* lse;  // [B, Hq, splits]
  int splits;  // at most, by the tables' width
};

// Tokens of a split: chunks of kChunkTokens, as many as leave no more than kMaxSplits.
__host__ __device__ inline int split_tokens(const Mask& mask, int tokens) {
  const int unit = static_cast<int>(mask.unit), size = static_cast<int>(kChunkTokens);
  const int chunk = (unit < size ? size / unit : 1) * unit, chunks = (tokens + chunk - 1) / chunk;
  return (chunks + kMaxSplits - 1) / kMaxSplits * chunk;
}

// What the query of (b, h) attends. All lanes of a warp ask together.
__device__ __forceinline__ Tokens decode_tokens(const DecodeArgs& a, int b, int h) {
  const int64_t t = a.seq_lens[b] - 1, sealed = a.kv.sealed[b];
  AttendedUnits e;
  if (t >= 0) e = attended(a.mask, b, h, t, a.kv.P, sealed, WarpSearch{});
  return Tokens(e, a.mask, a.kv.P, sealed, t, WarpSearch{});
}

// Keys and values as INT8 codes, dequantised in registers. A lane gets four neighbouring channels of 16, so q lies in
// the order of load_queries<kCoded>, and so do the channels of what is accumulated until State::natural_order.
template <typename T, int kD, bool kGroups>
struct Coded {
  static constexpr bool kCoded = true;
  Rows<uint8_t, kD> k, v;
  const T* grid;  // [2, kD] with kGroups: minimum and maximum of the keys. Else keys stay codes, and logits are rescaled

  __device__ __forceinline__ void keys(uint32_t (&b)[2][4], int key, int pair) const {
    const int lane = threadIdx.x % 32;
    uint32_t codes[4];  // of channels 4 (lane % 4) and on: keys 0 to 7, 8 to 15; then the next 16 channels
    ldmatrix_x4(codes, k.at(key + lane / 8 % 2 * 8 + lane % 8, 32 * pair + lane / 16 * 16));
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      float min[4], width[4];
      if (kGroups) {
        const T* low = grid + 32 * pair + 16 * step + lane % 4 * 4;
        const auto mins = load_vector<T, 4>(low), maxs = load_vector<T, 4>(low + kD);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          min[i] = static_cast<float>(mins.value[i]);
          width[i] = static_cast<float>(maxs.value[i]) * (1.0f / 255) - min[i] * (1.0f / 255);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = code_value(codes[2 * step + half], i);
          if (kGroups) x[i] = fmaf(width[i], x[i], min[i]);  // rounding to T brings what is past the maximum back to it
        }
        b[step][2 * half] = pack<T>(x[0], x[1]);
        b[step][2 * half + 1] = pack<T>(x[2], x[3]);
      }
    }
  }

  __device__ __forceinline__ void values(uint32_t (&b)[2][4], int key, int pair) const {
    const int lane = threadIdx.x % 32;
    uint32_t codes[4];  // bytes: two neighbouring channels of one key, then of the next key
    ldmatrix_x4_trans(codes,
                      reinterpret_cast<const uint16_t*>(v.at(key + lane / 8 % 2 * 8 + lane % 8, 32 * pair + lane / 16 * 16)));
#pragma unroll
    for (int block = 0; block < 2; ++block)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t word = codes[2 * block + half];
          b[block][2 * odd + half] = pack<T>(code_value(word, odd), code_value(word, 2 + odd));
        }
  }
};

// Channels 4c, 4c + 2 | 4c + 1, 4c + 3 of every 16, which lane c of a quad accumulates over codes, become 2c, 2c + 1 |
// 2c + 8, 2c + 9, which it accumulates over plain values.
template <typename T, int kD>
__device__ __forceinline__ void natural_order(State<T, kD>& state) {
  const int lane = threadIdx.x % 32, from = lane / 4 * 4 + lane % 4 / 2;
  const bool upper = lane % 2;  // of the four channels that the lane `from` holds
#pragma unroll
  for (int n = 0; n < kD / 8; n += 2)
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
      const float x[4] = {state.out[n][r], state.out[n + 1][r], state.out[n][r + 1], state.out[n + 1][r + 1]};
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float low = __shfl_sync(~0u, x[e], from + 2 * half), high = __shfl_sync(~0u, x[2 + e], from + 2 * half);
          state.out[n + half][r + e] = upper ? high : low;
        }
    }
}

template <typename T, int kD>
struct DecodeRings {
  using Codes = Ring<T, uint8_t, kD, kD <= 128 ? 4 : 2>;
  using Values = Ring<T, T, kD, kD <= 64 ? 4 : kD <= 96 ? 3 : 2>;
  static constexpr int kTables = 5;    // one more than stages
  static constexpr int kRow = kD + 4;  // floats of a row of results: neighbouring rows in different banks
  static constexpr int kResults = 4 * kGroup * kRow * sizeof(float);

  // One stretch serves both rings, one after the other, and then the warps' results.
  template <Storage kStorage>
  static constexpr int kRing = kStorage == Storage::plain || Values::kBytes > Codes::kBytes ? Values::kBytes : Codes::kBytes;
  template <Storage kStorage>
  static constexpr int kData = kRing<kStorage> > kResults ? kRing<kStorage> : kResults;
};

// Whether a block goes on to another split. With the most channels there are no registers for what a loop keeps.
template <int kD>
constexpr bool kGoesOn = kD <= 128;

// What the threads of a block share while they go through their splits.
template <typename T, int kD, Storage kStorage>
struct DecodeMemory {
  using Rings = DecodeRings<T, kD>;
  static constexpr int kGrids = kStorage == Storage::codes_of_groups ? Rings::Codes::kGrids : 0;
  static constexpr int kWarps = 4 * kGroup;  // floats
  static constexpr int kBytes = shared_bytes(
      {kGroup * Rows<T, kD>::kStride * int(sizeof(T)), Rings::kTables * int(sizeof(KeyTable)), Rings::template kData<kStorage>,
       kWarps * int(sizeof(float)), kWarps * int(sizeof(float)), kGrids * int(sizeof(T)), int(sizeof(Tokens))});
  Rows<T, kD> q;
  KeyTable* tables;
  char* data;            // of the rings, and then results [4, kGroup, kRow]
  float *maxima, *sums;  // [4, kGroup]
  Tokens* tokens;        // there, and not in registers, of which the loops need all
  T* grids;              // or null

  __device__ explicit DecodeMemory(SharedMemory shared)
      : q{shared.take<T>(kGroup * Rows<T, kD>::kStride)},
        tables(shared.take<KeyTable>(Rings::kTables)),
        data(shared.take<char>(Rings::template kData<kStorage>)),
        maxima(shared.take<float>(kWarps)),
        sums(shared.take<float>(kWarps)),
        tokens(shared.take<Tokens>(1)),
        grids(kGrids > 0 ? shared.take<T>(kGrids) : nullptr) {}
};

// Attention over tokens [first, last): a warp takes 16 keys of every tile. query(row): the first channel, or null.
template <typename T, int kD, Storage kStorage, typename Query>
__device__ __forceinline__ State<T, kD> attend_split(const DecodeMemory<T, kD, kStorage>& memory, const Sequence<T>& sequence,
                                                     const Tokens& tokens, int first, int last, int D, float scale,
                                                     Query query) {
  using Rings = DecodeRings<T, kD>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto& q = memory.q;
  State<T, kD> state;

  const auto attend = [&](const auto& source, const KeyTable& table, auto logit) {
    float s[2][4] = {};
    state.template multiply<16>(s, q, 0, source, warp * 16);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = warp * 16 + n * 8 + lane % 4 * 2 + e % 2;
        s[n][e] = table.position[key] == kNever ? -INFINITY : logit(s[n][e], key, e / 2) * scale;
      }
    state.template soften<16>(s);
    if constexpr (std::decay_t<decltype(source)>::kCoded) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // v = min + step * code: the step goes into the weight
          const float2 grid = table.v_grid[warp * 16 + n * 8 + lane % 4 * 2 + e % 2];
          state.offset[e / 2] += s[n][e] * grid.y;
          s[n][e] *= grid.x;
        }
    }
    state.template add<16>(s, source, warp * 16);
  };

  const int boundary = kStorage == Storage::plain ? first : max(first, min(last, tokens.sealed));
  if constexpr (kStorage != Storage::plain) {
    constexpr bool kGroups = kStorage == Storage::codes_of_groups;
    if (first < boundary) {
      load_queries<kGroup, true>(q, D, query);
      typename Rings::Codes ring{reinterpret_cast<uint8_t*>(memory.data), memory.tables};
      float total[2] = {};  // of q: k = min + step * code gives q · k = min * total + step * q · code
      if (kGroups) {
        ring.grids = memory.grids;
      } else {
        __syncthreads();
        for (int d = lane % 4; d < kD; d += 4) {
          total[0] += static_cast<float>(*q.at(lane / 4, d));
          total[1] += static_cast<float>(*q.at(lane / 4 + 8, d));
        }
        for (float& x : total) x = over_quad(x, [](float a, float b) { return a + b; });
      }
      ring.run(sequence, tokens, first, boundary, D, [&](const auto& tile) {
        attend(Coded<T, kD, kGroups>{tile.k, tile.v, tile.grids + warp * 2 * kD}, tile.table, [&](float s, int key, int r) {
          return kGroups ? s : fmaf(tile.table.k_grid[key].x, s, tile.table.k_grid[key].y * total[r]);
        });
      });
      natural_order(state);
    }
  }
  if (boundary < last) {
    load_queries<kGroup, false>(q, D, query);
    const typename Rings::Values ring{reinterpret_cast<T*>(memory.data), memory.tables};
    ring.run(sequence, tokens, boundary, last, D,
             [&](const auto& tile) { attend(Plain<T, kD>{tile.k, tile.v}, tile.table, [](float s, int, int) { return s; }); });
  }
  return state;
}

// The four warps' states, of equal keys in equal order, become one: out(row, d, value) and lse(row, value).
template <typename T, int kD, Storage kStorage, typename Out, typename Lse>
__device__ __forceinline__ void join_warps(const DecodeMemory<T, kD, kStorage>& memory, State<T, kD>& state, int rows, int D,
                                           Out out, Lse lse) {
  using Rings = DecodeRings<T, kD>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float *const maxima = memory.maxima, *const sums = memory.sums, *const results = reinterpret_cast<float*>(memory.data);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto add = [](float a, float b) { return a + b; };
    state.sum[r] = over_quad(state.sum[r], add);
    state.offset[r] = over_quad(state.offset[r], add);
    if (lane % 4 == 0) {
      maxima[warp * kGroup + lane / 4 + 8 * r] = state.max[r];
      sums[warp * kGroup + lane / 4 + 8 * r] = state.sum[r];
    }
  }
  __syncthreads();
  const auto total_of = [&](int row, float& largest) {
    largest = fmaxf(fmaxf(maxima[row], maxima[kGroup + row]), fmaxf(maxima[2 * kGroup + row], maxima[3 * kGroup + row]));
    if (largest == -INFINITY) largest = 0;
    float total = 0;
    for (int w = 0; w < 4; ++w) total += sums[w * kGroup + row] * exp2_approx(maxima[w * kGroup + row] - largest);
    return total;
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    float largest;
    const float total = total_of(row, largest), share = exp2_approx(state.max[r] - largest) / (total == 0 ? 1 : total);
    float* const to = results + (warp * kGroup + row) * Rings::kRow + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n)
      *reinterpret_cast<float2*>(to + n * 8) =
          make_float2((state.out[n][2 * r] + state.offset[r]) * share, (state.out[n][2 * r + 1] + state.offset[r]) * share);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * D; i += kThreads) {
    const int row = i / D, d = i % D;
    float x = 0;
    for (int w = 0; w < 4; ++w) x += results[(w * kGroup + row) * Rings::kRow + d];
    out(row, d, x);
  }
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    float largest;
    const float total = total_of(row, largest);
    lse(row, total == 0 ? -INFINITY : (largest + kHeadroom<T> + log2f(total)) * kLn2);
  }
}

// Two blocks share an SM: the rings leave no room for more.
template <typename T, int kD, Storage kStorage>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const __grid_constant__ DecodeArgs a, const Partials partials) {
  allow_next_kernel();
  const int b = blockIdx.z, parts = static_cast<int>(a.G + kGroup - 1) / kGroup, h = blockIdx.y / parts;
  const int head = static_cast<int>(h * a.G) + blockIdx.y % parts * kGroup;  // of the first query
  const int heads = min(kGroup, static_cast<int>((h + 1) * a.G) - head), D = static_cast<int>(a.kv.D);

  const DecodeMemory<T, kD, kStorage> memory{SharedMemory()};
  const T* const queries = static_cast<const T*>(a.q.data) + b * a.q.stride0 + head * a.q.stride1;
  const auto query = [&](int row) { return row < heads ? queries + row * a.q.stride1 : nullptr; };
  const Sequence<T> sequence{a.kv, b, h, a.seq_lens[b]};
  const Tokens found = decode_tokens(a, b, h), &tokens = *memory.tokens;
  if (threadIdx.x == 0) *memory.tokens = found;
  __syncthreads();

  for (int split = blockIdx.x;; split += gridDim.x) {
    const int size = split_tokens(a.mask, tokens.count), first = split * size, last = min(first + size, tokens.count);
    if (first >= last) return;
    State<T, kD> state = attend_split<T, kD, kStorage>(memory, sequence, tokens, first, last, D, a.scale * kLog2e, query);
    const auto at = [&](int row) { return (b * (a.kv.H * a.G) + head + row) * partials.splits + split; };
    join_warps<T, kD, kStorage>(
        memory, state, heads, D, [&](int row, int d, float x) { partials.out[at(row) * D + d] = x; },
        [&](int row, float x) { partials.lse[at(row)] = x; });
    if (!kGoesOn<kD>) return;
    __syncthreads();  // the next split needs the memory
  }
}

// The same without tensor cores: a warp for each query head.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    general_decode_kernel(const __grid_constant__ DecodeArgs a, const Partials partials) {
  allow_next_kernel();
  const int heads = static_cast<int>(a.kv.H * a.G), head = blockIdx.y * (kThreads / 32) + threadIdx.x / 32;
  const int b = blockIdx.z, h = head / static_cast<int>(a.G), D = static_cast<int>(a.kv.D);
  if (head >= heads) return;
  const Tokens tokens = decode_tokens(a, b, h);
  const int size = split_tokens(a.mask, tokens.count);
  const float* const q = load_query(static_cast<const T*>(a.q.data) + b * a.q.stride0 + head * a.q.stride1, D);
  for (int split = blockIdx.x; split * size < tokens.count; split += gridDim.x) {
    const int first = split * size, last = min(first + size, tokens.count);
    const int64_t partial = (static_cast<int64_t>(b) * heads + head) * partials.splits + split;
    const float lse = attend_warp(Sequence<T>{a.kv, b, h, a.seq_lens[b]}, tokens, first, last, q, D, a.scale,
                                  [&](int d, float x) { partials.out[partial * D + d] = x; });
    if (threadIdx.x % 32 == 0) partials.lse[partial] = lse;
  }
}

// Joins a query head's splits, in order. One block of threads for each row of [B, Hq].
template <typename T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ DecodeArgs a, const Partials partials) {
  const int heads = static_cast<int>(a.kv.H * a.G), b = blockIdx.x / heads, h = blockIdx.x % heads / static_cast<int>(a.G);
  const int64_t D = a.kv.D, row = blockIdx.x;
  const int tokens = decode_tokens(a, b, h).count, size = split_tokens(a.mask, tokens);
  const int splits = tokens == 0 ? 0 : (tokens + size - 1) / size;  // kMaxSplits at most
  const float *outs = partials.out + row * partials.splits * D, *lses = partials.lse + row * partials.splits;
  SharedMemory shared;
  float* const weights = shared.take<float>(kMaxSplits);

  wait_for_last_kernel();
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
    static_cast<T*>(a.out)[row * D + d] = static_cast<T>(total == 0 ? 0.0f : x / total);
  }
  if (threadIdx.x == 0) a.lse[row] = total == 0 ? -INFINITY : largest + logf(total);
}

// Attention over two disjoint sets of keys from that over each: a warp for each row.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= a.rows) return;
  const float lse_a = a.lse_a[row], lse_b = a.lse_b[row], largest = fmaxf(lse_a, lse_b);
  const float shift = largest == -INFINITY ? 0.0f : largest;  // (-inf) - (-inf) is no number
  const float w_a = expf(lse_a - shift), w_b = expf(lse_b - shift), total = w_a + w_b;
  for (int64_t d = threadIdx.x % 32; d < a.D; d += 32) {
    const float x = static_cast<float>(static_cast<const T*>(a.out_a)[row * a.D + d]);
    const float y = static_cast<float>(static_cast<const T*>(a.out_b)[row * a.D + d]);
    // What has no weight is not read into the sum: it may be anything.
    const float sum = (w_a == 0 ? 0.0f : w_a / total * x) + (w_b == 0 ? 0.0f : w_b / total * y);
    static_cast<T*>(a.out)[row * a.D + d] = static_cast<T>(sum);
  }
  if (threadIdx.x % 32 == 0) a.lse[row] = total == 0 ? -INFINITY : shift + logf(total);
}

}  // namespace lserve::cuda
