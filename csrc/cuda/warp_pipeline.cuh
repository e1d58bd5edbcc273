// A pipeline of tiles for every warp of decode: no warp waits for another one while keys come.
#pragma once
#include "cuda/pipeline.cuh"

namespace lserve::cuda {

// A tile as it lies in memory, X is T or uint8_t for codes, and what turns codes into numbers.
template <typename T, typename X, int kD>
struct Stage {
  static constexpr bool kCoded = std::is_same_v<X, uint8_t>;
  static constexpr int kTile = kWarpKeys * SmemTile<X, kD>::kStride;
  alignas(16) X k_rows[kTile], v_rows[kTile];
  alignas(16) T stats[kCoded ? 2 * kD : 8];                             // minimum and maximum of the keys
  alignas(16) float2 k_grid[kCoded ? 16 : 2], v_grid[kCoded ? 16 : 2];  // (step, min) of each
  const void* rows[2][kWarpKeys];                                       // of tokens that are looked up one by one
  uint32_t attended;                                                    // a bit for each key

  __device__ SmemTile<X, kD> k() { return {k_rows}; }
  __device__ SmemTile<X, kD> v() { return {v_rows}; }
};

// Whether the 16 keys of a tile may lie in different pages. If not, their rows follow each other.
__host__ __device__ inline bool is_scattered(const Mask& mask) { return mask.unit % kWarpKeys != 0; }

// Copies tiles into shared memory, kStages - 1 ahead of their use.
//
//   pipeline.run(sequence, tokens, first, last, D, [&](auto& stage) { ... });
//
// calls the body with 16 of the tokens [first, last) at a time: those at 64 i + 16 warp.
template <typename T, typename X, int kD, int kStages, bool kGroups, bool kScattered>
struct WarpPipeline {
  using Tile = Stage<T, X, kD>;
  static constexpr bool kCoded = Tile::kCoded;
  Tile* stages;  // [kStages], the warp's own

  template <typename Body>
  __device__ __forceinline__ void run(const Sequence<T>& sequence, const Tokens& tokens, int first, int last, int D,
                                      Body body) const {
    const int lane = threadIdx.x % 32, start = first + threadIdx.x / 32 * kWarpKeys;
    const int tiles = (last - first + kKeys - 1) / kKeys;
    Next next{};
#pragma unroll 1
    for (int i = 1 - kStages; i < tiles; ++i) {
      cp_async_wait<kStages - 2>();
      __syncwarp();  // tile i has come, and no lane needs tile i - 1 any more
      if (const int coming = i + kStages - 1; coming < tiles) {
        if (!kScattered && coming % 32 == 0)  // of 32 tiles at once, one a lane
          next = look_up(sequence, tokens, start + (coming + lane) * kKeys, last);
        copy(sequence, tokens, start, last, D, coming, next);
      }
      cp_async_commit();
      if (i >= 0) body(stages[i % kStages]);
    }
    cp_async_wait<0>();
    __syncwarp();
  }

 private:
  // Of the lane's own tile, each lane having another of 32; or of its token, each lane having another of two tiles.
  struct Next {
    int rows;          // 32 times the first, and how many of them to read
    int slot;          // -1: the residual buffer
    int block, group;  // of statistics
    Row token;
  };

  __device__ __forceinline__ static int position_of(const Tokens& tokens, int token, int last) {
    if (token >= last) return kMasked;
    const int position = tokens.position(token);
    return position > tokens.last ? kMasked : position;
  }

  __device__ __forceinline__ void copy(const Sequence<T>& sequence, const Tokens& tokens, int start, int last, int D, int i,
                                       Next& next) const {
    if constexpr (kScattered) copy_tokens(sequence, tokens, start, last, D, i, next);
    else copy_rows(sequence, D, i, next);
  }

  // Rows that follow each other. Where, has been looked up for 32 tiles at once, one a lane.
  __device__ __forceinline__ void copy_rows(const Sequence<T>& sequence, int D, int i, const Next& next) const {
    const PagedKV& kv = sequence.kv;
    const int lane = threadIdx.x % 32, source = i % 32;
    const int rows = __shfl_sync(~0u, next.rows, source), slot = __shfl_sync(~0u, next.slot, source);
    const int first_row = rows >> 5, count = rows & 31;
    Tile& stage = stages[i % kStages];
    if (lane == 0) stage.attended = (1u << count) - 1;
    const X *k = static_cast<const X*>(kv.k_pool) + slot * kv.k_stride,
            *v = static_cast<const X*>(kv.v_pool) + slot * kv.v_stride;
    if (!kCoded && slot < 0) {
      const int64_t at = residual_of(kv, sequence.b, sequence.h);
      k = static_cast<const X*>(kv.residual_k) + at, v = static_cast<const X*>(kv.residual_v) + at;
    }
    k += first_row * D, v += first_row * D;
    copy_chunks(stage, D, [&](auto at, int element, bool of_values) {
      return Chunk{(of_values ? v : k) + (at.first * D + element) + at.ahead * D, at.row() < count};
    });
    if constexpr (kCoded) {  // weights of 0 must meet no NaN
      if (lane < 8) cp_async_16(stage.v_grid + 2 * lane, value_grid(kv, slot, first_row) + 4 * lane, count > 0);
      if (!kGroups && lane < 8) cp_async_16(stage.k_grid + 2 * lane, key_grid(kv, slot, first_row) + 4 * lane, count > 0);
    }
    if constexpr (kGroups) {
      const int block = __shfl_sync(~0u, next.block, source), group = __shfl_sync(~0u, next.group, source);
      const T* const stats = static_cast<const T*>(kv.stats) + block * kv.stats_stride + group * 2 * D;
      for (int j = lane; j < 2 * kD / 8; j += 32) {
        const int element = j % (kD / 8) * 8;
        cp_async_16(stage.stats + j * 8, stats + j / (kD / 8) * D + element, count > 0 && element < D);
      }
    }
  }

  // Nothing where nobody attends, or the page is not held any more.
  __device__ __forceinline__ static Next look_up(const Sequence<T>& sequence, const Tokens& tokens, int token, int last) {
    Next next{};
    const int position = position_of(tokens, token, last);
    if (position == kMasked) return next;
    const PagedKV& kv = sequence.kv;
    const Place place = place_of(kv, sequence.b, sequence.h, position, tokens.is_sealed(token));
    next.rows = place.row * 32 + min(tokens.last - position + 1, kWarpKeys);
    next.slot = place.sealed ? place.slot : -1;
    if (!place.sealed) return next;
    next.block = place.block;
    if (next.block < 0) return {};
    if (kGroups) next.group = place.row / kv.L;
    return next;
  }

  // 16 tokens. Those of two tiles are looked up together, a tile ahead of the first one's copy.
  __device__ __forceinline__ void copy_tokens(const Sequence<T>& sequence, const Tokens& tokens, int start, int last, int D,
                                              int i, Next& next) const {
    const int lane = threadIdx.x % 32, key = lane % kWarpKeys, half = i % 2;
    const auto look_up = [&](int tile) {
      const int token = start + (tile + lane / kWarpKeys) * kKeys + key, position = position_of(tokens, token, last);
      next.token = Row{};
      if (position != kMasked) next.token = sequence.row(position, tokens.is_sealed(token));
    };
    if (i == 0) look_up(0);
    Tile& stage = stages[i % kStages];
    const uint32_t attended = __ballot_sync(~0u, next.token.k != nullptr) >> half * kWarpKeys & 0xffff;
    if (lane == 0) stage.attended = attended;
    if (lane / kWarpKeys == half) {
      stage.rows[0][key] = next.token.k, stage.rows[1][key] = next.token.v;
      if constexpr (kCoded)
        stage.k_grid[key] = next.token.k_grid, stage.v_grid[key] = next.token.v_grid;  // zeros without a key
    }
    if (half == 1) look_up(i + 1);
    __syncwarp();
    copy_chunks(stage, D, [&](auto at, int element, bool of_values) {
      const X* const from = static_cast<const X*>(stage.rows[of_values][at.row()]);
      return Chunk{from ? from + element : from, from != nullptr};
    });
  }

  struct Chunk {
    const X* from;
    bool read;  // else zeros
  };

  // Zeros beyond channel D, too.
  template <typename ChunkOf>
  __device__ __forceinline__ static void copy_chunks(Tile& stage, int D, ChunkOf chunk_of) {
    constexpr int kChunk = SmemTile<X, kD>::kChunk, kChunks = kD / kChunk;
    for_chunks<kWarpKeys, kChunks, 32>(threadIdx.x % 32, [&](auto at) {
      const int element = at.chunk * kChunk;
#pragma unroll
      for (int of_values = 0; of_values < 2; ++of_values) {
        const Chunk chunk = chunk_of(at, element, of_values);
        cp_async_16((of_values ? stage.v() : stage.k()).at(at.row(), element), chunk.from, chunk.read && element < D);
      }
    });
  }
};

}  // namespace lserve::cuda
