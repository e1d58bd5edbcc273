// Tiles of 64 keys in shared memory, and the pipeline that fills them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/paged_kv.cuh"
#include "cuda/ptx.cuh"

namespace lserve::cuda {

// SmemTile of kD elements in shared memory, an odd number of 16-byte chunks apart: ldmatrix meets no bank conflict.
template <typename X, int kD>
struct SmemTile {
  static constexpr int kChunk = 16 / sizeof(X);  // elements
  static constexpr int kStride = (kD / kChunk | 1) * kChunk;
  static constexpr int kTile = kKeys * kStride;
  X* data;

  __device__ __forceinline__ X* at(int row, int element) const { return data + row * kStride + element; }

  // Before the barrier between those who write a tile and those who read it.
  __device__ __forceinline__ static void publish() {}
};

// p + elements for a p that may be null: nothing is read from there then, and no instruction chooses.
template <typename X>
__device__ __forceinline__ const void* at_offset(const X* p, int elements) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + elements * sizeof(X));
}

// Where the keys of one tile stand in their sequence.
struct KeyMask {
  int position[kKeys];  // kMasked: not attended
  int newest[2];        // position of each half: beyond a query's own, and the tile must be masked
};

// What is known of the keys of one tile, a step ahead of the copies.
struct KeyTable : KeyMask {
  const void *k[kKeys], *v[kKeys];
  const void* stats[kKeys];
  float2 k_grid[kKeys], v_grid[kKeys];
};

// Who works on a tile together: all threads of a block.
struct Block {
  __device__ static uint32_t thread() { return threadIdx.x; }
  __device__ static constexpr int threads() { return kThreads; }
  __device__ static void sync() { __syncthreads(); }
  __device__ static bool sync_or(bool x) { return __syncthreads_or(x); }
};

// A thread's chunk of a tile with so many to a row, where those of the first thread is the j-th. `ahead` is a number that the
// compiler knows, so addresses of a thread's chunks differ by what it can compute once.
template <int kChunks, int kThreads>
struct ChunkAt {
  int first, ahead, chunk;

  __device__ __forceinline__ ChunkAt(int j, int thread) {
    if constexpr (kThreads % kChunks == 0) first = thread / kChunks, ahead = j / kChunks, chunk = thread % kChunks;
    else first = (j + thread) / kChunks, ahead = 0, chunk = (j + thread) % kChunks;
  }
  __device__ __forceinline__ int row() const { return first + ahead; }
};

// A thread's chunks of so many rows.
template <int kRows, int kChunks, int kThreads, typename Body>
__device__ __forceinline__ void for_chunks(int thread, Body body) {
  constexpr int kAll = kRows * kChunks;
#pragma unroll
  for (int j = 0; j < kAll; j += kThreads) {
    if (kAll % kThreads != 0 && j + thread >= kAll) break;
    body(ChunkAt<kChunks, kThreads>(j, thread));
  }
}

// Copies the tokens [first, last), 64 at a time, from wherever their rows lie into shared memory, kAhead tiles before their
// use. X is T, or uint8_t for codes.
//
//   pipeline.start();
//   for (int i = 0; i < pipeline.tiles(); ++i) {
//     pipeline.wait();
//     pipeline.advance(i);  // may come later: it overwrites tile i + kAhead - kStages
//     ... pipeline.keys(i), pipeline.values(i), pipeline.table_at(i) ...
//   }
//   pipeline.finish();
template <typename T, typename X, int kD, int kStages, int kAhead = kStages - 1, typename Crew = Block,
          template <typename, int> typename Layout = SmemTile>
struct KvPipeline {
  using Tile = Layout<X, kD>;
  static constexpr int kBytes = 2 * kStages * Tile::kTile * sizeof(X);
  static constexpr int kBatch = Crew::threads() / kKeys;  // tiles that are looked up together, before the first is copied
  static constexpr int power_of_two(int x) { return x <= 1 ? 1 : 2 * power_of_two((x + 1) / 2); }
  static constexpr int kTables = power_of_two(kAhead + 1 + kBatch);  // which are needed until a tile has been used
  X* data;                                                           // [kStages, K and V, kTile]
  KeyTable* table;                                                   // [kTables]
  const Sequence<T>& sequence;
  const Tokens& tokens;
  int first, last, D;

  __device__ __forceinline__ int tiles() const { return (last - first + kKeys - 1) / kKeys; }
  __device__ __forceinline__ Tile keys(int i) const { return {data + i % kStages * 2 * Tile::kTile}; }
  __device__ __forceinline__ Tile values(int i) const { return {data + (i % kStages * 2 + 1) * Tile::kTile}; }
  __device__ __forceinline__ KeyTable& table_at(int i) const { return table[i % kTables]; }

  __device__ __forceinline__ void start() const {
    for (int i = 0; i <= kAhead; i += kBatch) look_up(i);
    Crew::sync();
    for (int i = 0; i < kAhead; ++i) {
      if (i < tiles()) copy(i);
      cp_async_commit();
    }
  }
  // For the next tile. Nobody needs the one before any more.
  __device__ __forceinline__ void wait() const {
    cp_async_wait<kAhead - 1>();
    Tile::publish();
    Crew::sync();
  }
  __device__ __forceinline__ void advance(int i) const {
    if (i + kAhead < tiles()) copy(i + kAhead);
    cp_async_commit();
    if ((i + kAhead + 1) % kBatch == 0) look_up(i + kAhead + 1);
  }
  __device__ __forceinline__ void finish() const {
    cp_async_wait<0>();
    Crew::sync();
  }

  // Tiles [i, i + kBatch).
  __device__ __forceinline__ void look_up(int i) const {
    const int own = i + Crew::thread() / kKeys, key = Crew::thread() % kKeys, token = first + own * kKeys + key;
    if (own >= tiles()) return;
    KeyTable& t = table_at(own);
    int position = kMasked;
    if (token < last) {
      position = tokens.position(token);
      if (position > tokens.last) position = kMasked;
    }
    t.k[key] = t.v[key] = t.stats[key] = nullptr;
    if (position != kMasked) {
      const Row row = sequence.row(position, tokens.is_sealed(token));
      t.k[key] = row.k, t.v[key] = row.v, t.stats[key] = row.stats;
      t.k_grid[key] = row.k_grid, t.v_grid[key] = row.v_grid;
      if (!row.k) position = kMasked;
    }
    if (position == kMasked) t.v_grid[key] = t.k_grid[key] = make_float2(0, 0);  // weights of 0 must meet no NaN
    t.position[key] = position;
    int newest = position;
    for (int lanes = 16; lanes > 0; lanes /= 2) newest = max(newest, __shfl_xor_sync(~0u, newest, lanes));
    if (key % 32 == 0) t.newest[key / 32] = newest;
  }

  __device__ __forceinline__ void copy(int i) const { copy(i, keys(i), values(i)); }

  // Zeros where there is no key, and beyond channel D.
  __device__ __forceinline__ void copy(int i, Tile k, Tile v) const {
    constexpr int kChunk = 16 / sizeof(X), kChunks = kD / kChunk;
    const KeyTable& t = table_at(i);
    for_chunks<kKeys, kChunks, Crew::threads()>(Crew::thread(), [&](auto at) {
      const int row = at.row(), element = at.chunk * kChunk;
      const X *from_k = static_cast<const X*>(t.k[row]), *from_v = static_cast<const X*>(t.v[row]);
      const bool read = from_k && element < D;
      cp_async_16(k.at(row, element), at_offset(from_k, element), read);
      cp_async_16(v.at(row, element), at_offset(from_v, element), read);
    });
  }
};

}  // namespace lserve::cuda
