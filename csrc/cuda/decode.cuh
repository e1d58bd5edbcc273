// decode: one query a sequence. A block of threads takes a query group over splits of the tokens that its kv head
// attends, and leaves (out, lse) of each in the workspace; combine_kernel folds them in order. Where a sequence is cut
// depends on its own tokens alone, so bits depend on neither the tables' width nor the rest of the batch.
#pragma once
#include "cuda/general.cuh"
#include "cuda/launch.h"
#include "cuda/merge.cuh"
#include "cuda/softmax.cuh"
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

__device__ __forceinline__ int count_splits(const Mask& mask, int tokens) {
  const int size = split_tokens(mask, tokens);
  return tokens == 0 ? 0 : (tokens + size - 1) / size;
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

// ---- operands of a warp's tile: keys [16, 16 channels] for S^T = K Q^T, and values [16 channels, 16] for O^T = V^T P^T

template <typename T, int kD>
struct FloatOperand {
  SmemTile<T, kD> k, v;

  __device__ __forceinline__ void keys(uint32_t (&a)[4], int step) const {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(a, k.at(lane % 16, 16 * step + lane / 16 * 8));
  }
  __device__ __forceinline__ void values(uint32_t (&a)[4], int step) const {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(a, v.at(lane / 16 * 8 + lane % 8, 16 * step + lane / 8 % 2 * 8));
  }
};

// Codes, dequantised in registers, two steps at a time: a lane gets four neighbouring channels of a key where it would
// get two and two, so the queries lie in that order, too; and of a value it gets channels 2 r and 2 r + 1, which become
// rows r and r + 8. See unpermute_channels.
template <typename T, int kD, bool kGroups>
struct Int8Operand {
  SmemTile<uint8_t, kD> k, v;
  const float* grid;  // [2, kD] with kGroups: minimum and step of the keys. Else keys stay codes, and logits are rescaled

  __device__ __forceinline__ void keys(uint32_t (&a)[2][4], int pair) const {
    const int lane = threadIdx.x % 32;
    uint32_t codes[4];  // of channels 4 (lane % 4) and on: keys 0 to 7, 8 to 15; then the next 16 channels
    ldmatrix_x4(codes, k.at(lane % 16, 32 * pair + lane / 16 * 16));
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      Vector<float, 4> min, width;
      if constexpr (kGroups) {
        const float* const from = grid + 32 * pair + 16 * step + lane % 4 * 4;
        min = load_vector<float, 4>(from), width = load_vector<float, 4>(from + kD);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t word = codes[2 * step + half];
          // Rounding to T brings what is past the maximum back to it.
          const auto key = [&](int i) { return fmaf(width.value[i], code_value(word, i), min.value[i]); };
          if constexpr (kGroups) a[step][half + i] = pack<T>(key(i), key(i + 1));
          else a[step][half + i] = code_pair<T>(word, i, i + 1);
        }
    }
  }

  __device__ __forceinline__ void values(uint32_t (&a)[2][4], int pair) const {
    const int lane = threadIdx.x % 32;
    uint32_t codes[4];  // bytes: two neighbouring channels of one key, then of the next key
    ldmatrix_x4_trans(codes, reinterpret_cast<const uint16_t*>(v.at(lane % 16, 32 * pair + lane / 16 * 16)));
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const uint32_t word = codes[2 * step + half];
          a[step][2 * half + odd] = code_pair<__half>(word, odd, 2 + odd);
        }
  }
};

// Queries as the other operand, [16 channels, 8], in registers for a whole split: row lane / 4, zeros where query(row) is
// null and beyond channel D.
template <typename T, int kD>
struct QueryOperand {
  uint32_t b[kD / 16][2];

  template <bool kCoded, typename Query>
  __device__ __forceinline__ void load(int D, Query query) {
    const int quad = threadIdx.x % 4;
    const T* const from = query(threadIdx.x % 32 / 4);
#pragma unroll
    for (int step = 0; step < kD / 16; ++step)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = 16 * step + (kCoded ? 4 * quad + 2 * i : 2 * quad + 8 * i);
        b[step][i] = from && d < D ? *reinterpret_cast<const uint32_t*>(from + d) : 0;
      }
  }

  // The sum of each query's channels, of queries 2 (lane % 4) and the next.
  __device__ __forceinline__ void totals(float (&total)[2]) const {
    float sum = 0;
#pragma unroll
    for (const auto& words : b)
#pragma unroll
      for (const uint32_t word : words) {
        const float2 x = unpack<T>(word);
        sum += x.x + x.y;
      }
    sum = over_quad(sum, [](float a, float b) { return a + b; });
    for (int e = 0; e < 2; ++e) total[e] = __shfl_sync(~0u, sum, (2 * (threadIdx.x % 4) + e) * 4);
  }
};

// ---- softmax

// x over the eight lanes that hold the same queries.
template <typename Combine>
__device__ __forceinline__ float over_keys(float x, Combine combine) {
  for (int lanes = 4; lanes < 32; lanes *= 2) x = combine(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

// Attention of 8 queries over the keys that a warp has seen. A lane has of queries q = 2 (lane % 4) and q + 1, in C fragments:
// logits of keys lane / 4 and lane / 4 + 8, and outputs of channels lane / 4 and lane / 4 + 8 of every 16.
// Maxima and logits are in units of log2, sums are of this lane's keys.
template <typename T, int kD>
struct TransposedSoftmax {
  float out[kD / 16][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float offset[2] = {};                            // sum of weight * V's minimum
  float largest_code[2] = {-INFINITY, -INFINITY};  // maximum of the logarithms of weight * V's step

  // s: masked logits, become weights. What has been summed follows their maximum.
  __device__ __forceinline__ void update(float (&s)[4]) {
    float factor[2];
    weigh(s, factor);
    rescale(factor);
  }

  // The same for values that are codes, min + step * code, of which s become the weights: of float16 and at most 1, since
  // what has been summed follows a maximum of theirs. grid: (step, min) of this lane's keys.
  __device__ __forceinline__ void update(float (&s)[4], const float2 (&grid)[2]) {
    float weights[4], factor[2], base[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = s[i], s[i] += log2_approx(grid[i / 2].x);
    weigh(weights, factor);
#pragma unroll
    for (int e = 0; e < 2; ++e) offset[e] += weights[e] * grid[0].y + weights[2 + e] * grid[1].y;
    raise(largest_code, s, factor, base);
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = exp2_approx(s[i] - base[i % 2]);
    rescale(factor);
  }
  // After the last codes: from here on `out` follows the maximum of logits.
  __device__ __forceinline__ void finish_codes() {
    float factor[2];
#pragma unroll
    for (int e = 0; e < 2; ++e)
      factor[e] = largest_code[e] == -INFINITY ? 0.0f : exp2_approx(largest_code[e] - (max[e] + kHeadroom<T>));
    rescale(factor);
  }

 private:
  // Raises maxima to those of s, and says what has been summed must shrink by. base: the maxima, or 0 while nothing was
  // attended, so that weights are 0 and not NaN.
  __device__ __forceinline__ static void raise(float (&maxima)[2], const float (&s)[4], float (&factor)[2], float (&base)[2]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const auto larger = [](float a, float b) { return fmaxf(a, b); };
      const float largest = over_keys(fmaxf(maxima[e], fmaxf(s[e], s[e + 2])), larger);
      base[e] = largest == -INFINITY ? 0.0f : largest;
      factor[e] = exp2_approx(maxima[e] - base[e]);
      maxima[e] = largest;
    }
  }
  __device__ __forceinline__ void weigh(float (&s)[4], float (&factor)[2]) {
    float base[2];
    raise(max, s, factor, base);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float shift = base[e] + kHeadroom<T>;
      s[e] = exp2_approx(s[e] - shift), s[e + 2] = exp2_approx(s[e + 2] - shift);
      sum[e] = fmaf(sum[e], factor[e], s[e] + s[e + 2]), offset[e] *= factor[e];
    }
  }
  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
    if (!__any_sync(~0u, factor[0] != 1 || factor[1] != 1)) return;  // most tiles raise no maximum
#pragma unroll
    for (auto& x : out) x[0] *= factor[0], x[1] *= factor[1], x[2] *= factor[0], x[3] *= factor[1];
  }
};

// Weights of [16 keys, 8 queries] as an operand of the other product.
template <typename T>
__device__ __forceinline__ void transpose_weights(const float (&s)[4], uint32_t (&p)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) p[half] = transpose_8x8(pack<T>(s[2 * half], s[2 * half + 1]));
}

// Rows r and r + 8 that are channels 2 r and 2 r + 1 of every 16 become channels r and r + 8.
template <typename T, int kD>
__device__ __forceinline__ void unpermute_channels(TransposedSoftmax<T, kD>& softmax) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane / 4 % 2;
#pragma unroll
  for (auto& x : softmax.out) {
    float natural[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // queries i % 2, channels + 8 (i / 2)
      const int from = (lane / 8 + i / 2 * 4) * 4 + lane % 4;
      const float low = __shfl_sync(~0u, x[i % 2], from), high = __shfl_sync(~0u, x[2 + i % 2], from);
      natural[i] = odd ? high : low;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = natural[i];
  }
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
    partials.counts[row_of(threadIdx.x)] = count_splits(a.mask, found.count);
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
  if (blockIdx.z == 0 && threadIdx.x % 32 == 0) partials.counts[row] = count_splits(a.mask, tokens.count);
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
