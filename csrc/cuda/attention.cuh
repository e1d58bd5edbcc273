// The pieces that decode, prefill and attention_mass are made of: where tokens lie; and for the latter two tiles of 64 keys
// in shared memory, the ring that fills them, fragments for the tensor cores, and the state of an online softmax.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/convert.cuh"
#include "cuda/ptx.cuh"
#include "mask.h"

namespace lserve::cuda {

constexpr int kKeys = 64;           // of a tile
constexpr int kThreads = 128;       // of a block: four warps
constexpr int kNever = 0x7fffffff;  // the position of a key that nobody attends
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

// ---- where tokens lie

// Key and value of one token. k is null if its page is not held any more.
struct Row {
  const void *k, *v;      // [D] T or codes
  const void* stats;      // [2, D] T: minimum and maximum of the key's group, if its codes lie on that grid
  float2 k_grid, v_grid;  // (step, min) of codes
  bool coded;
};

// What one (sequence, kv head) attends to: `held` tokens of the cache, then new ones.
template <typename T>
struct Sequence {
  const PagedKV& kv;
  int64_t b, h;
  int held;
  const T *new_k = nullptr, *new_v = nullptr;  // of the first new token
  int64_t new_k_stride = 0, new_v_stride = 0;  // of a token

  __device__ Row row(int position) const {
    Row row{};
    if (position >= held) {
      row.k = new_k + (position - held) * new_k_stride;
      row.v = new_v + (position - held) * new_v_stride;
      return row;
    }
    const int P = static_cast<int>(kv.P), page = position / P, offset = position - page * P;
    if (page >= kv.sealed[b]) {
      const int64_t at = b * kv.residual_stride0 + h * kv.residual_stride1 + position % (2 * P) * kv.D;
      row.k = static_cast<const T*>(kv.residual_k) + at;
      row.v = static_cast<const T*>(kv.residual_v) + at;
      return row;
    }
    const int64_t block = kv.block_table[b * kv.block_stride0 + h * kv.block_stride1 + page];
    const int64_t slot = kv.slot_table[b * kv.slot_stride0 + h * kv.slot_stride1 + page];
    if (block < 0) return row;
    const int64_t k_at = slot * kv.k_stride + offset * kv.D, v_at = slot * kv.v_stride + offset * kv.D;
    if (kv.kv_dtype != Dtype::u8) {
      row.k = static_cast<const T*>(kv.k_pool) + k_at;
      row.v = static_cast<const T*>(kv.v_pool) + v_at;
      return row;
    }
    row.coded = true;
    row.k = static_cast<const uint8_t*>(kv.k_pool) + k_at;
    row.v = static_cast<const uint8_t*>(kv.v_pool) + v_at;
    const float* grid = kv.scales + slot * kv.scales_stride + 2 * offset;
    row.v_grid = make_float2(grid[0], grid[1]);
    if (kv.stats) {
      row.stats = static_cast<const T*>(kv.stats) + block * kv.stats_stride + offset / static_cast<int>(kv.L) * 2 * kv.D;
    } else {
      row.k_grid = make_float2(grid[2 * P], grid[2 * P + 1]);
    }
    return row;
  }
};

// A warp's Bisection: 32 probes at a time, each of which would otherwise wait for the one before.
struct WarpSearch {
  template <typename Holds>
  __device__ __forceinline__ int64_t operator()(int64_t n, Holds holds) const {
    int first = 0;
    for (int rest = static_cast<int>(n); rest > 0;) {
      const int stride = (rest + 31) / 32, probe = (threadIdx.x % 32 + 1) * stride - 1;  // the last of the lane's stretch
      const bool found = probe < rest && holds(first + probe);
      const int whole = __popc(__ballot_sync(~0u, found)) * stride;
      first += whole, rest = min(rest - whole, stride - 1);
    }
    return first;
  }
};

// The tokens that a query attends, ascending and counted from 0: those of the pools, then those in the model's dtype.
struct Tokens {
  AttendedUnits entries;
  int unit, last;     // tokens of an entry; the newest position that may be attended
  int count, sealed;  // tokens of all entries, of which the first `sealed` lie in sealed pages

  template <typename Search = Bisection>
  __device__ Tokens(const AttendedUnits& e, const Mask& mask, int64_t P, int64_t sealed_pages, int64_t last, Search search = {})
      : entries(e), unit(static_cast<int>(mask.unit)), last(static_cast<int>(last)) {
    const int entries = e.count();
    const int end = static_cast<int>(sealed_pages) * (static_cast<int>(P) / unit);  // of the sealed units
    count = entries * unit;
    sealed = static_cast<int>(search(entries, [&](int i) { return e[i] < end; })) * unit;
  }

  __device__ int position(int i) const { return entries[i / unit] * unit + i % unit; }
};

// ---- tiles

// Rows of kD elements in shared memory, an odd number of 16-byte chunks apart: ldmatrix meets no bank conflict.
template <typename X, int kD>
struct Rows {
  static constexpr int kChunk = 16 / sizeof(X);  // elements
  static constexpr int kStride = (kD / kChunk | 1) * kChunk;
  static constexpr int kTile = kKeys * kStride;
  X* data;

  __device__ __forceinline__ X* at(int row, int element) const { return data + row * kStride + element; }

  // Before the barrier between those who write a tile and those who read it.
  __device__ __forceinline__ static void publish() {}
};

// What is known of the keys of one tile, a step ahead of the copies.
struct KeyTable {
  const void *k[kKeys], *v[kKeys];
  const void* stats[kKeys];
  float2 k_grid[kKeys], v_grid[kKeys];
  int position[kKeys];  // kNever: not attended
  int newest[2];        // position of each half: beyond a query's own, and the tile must be masked
};

// Copies the tokens [first, last), 64 at a time, from wherever their rows lie into shared memory, kAhead tiles before their
// use. X is T, or uint8_t for codes.
//
//   ring.start();
//   for (int i = 0; i < ring.tiles(); ++i) {
//     ring.wait();
//     ring.advance(i);  // may come later: it overwrites tile i + kAhead - kStages
//     ... ring.keys(i), ring.values(i), ring.table_at(i) ...
//   }
//   ring.finish();
template <typename T, typename X, int kD, int kStages, int kAhead = kStages - 1, int kBlock = kThreads,
          template <typename, int> typename Layout = Rows>
struct Ring {
  using Tile = Layout<X, kD>;
  static constexpr int kBytes = 2 * kStages * Tile::kTile * sizeof(X);
  static constexpr int kBatch = kBlock / kKeys;        // tiles that are looked up together, before the first is copied
  static constexpr int kTables = kAhead + 1 + kBatch;  // which are needed until a tile has been used
  X* data;                                             // [kStages, K and V, kTile]
  KeyTable* table;                                     // [kTables]
  const Sequence<T>& sequence;
  const Tokens& tokens;
  int first, last, D;

  __device__ __forceinline__ int tiles() const { return (last - first + kKeys - 1) / kKeys; }
  __device__ __forceinline__ Tile keys(int i) const { return {data + i % kStages * 2 * Tile::kTile}; }
  __device__ __forceinline__ Tile values(int i) const { return {data + (i % kStages * 2 + 1) * Tile::kTile}; }
  __device__ __forceinline__ KeyTable& table_at(int i) const { return table[i % kTables]; }

  __device__ __forceinline__ void start() const {
    for (int i = 0; i <= kAhead; i += kBatch) look_up(i);
    __syncthreads();
    for (int i = 0; i < kAhead; ++i) {
      if (i < tiles()) copy(i);
      cp_async_commit();
    }
  }
  // For the next tile. Nobody needs the one before any more.
  __device__ __forceinline__ void wait() const {
    cp_async_wait<kAhead - 1>();
    Tile::publish();
    __syncthreads();
  }
  __device__ __forceinline__ void advance(int i) const {
    if (i + kAhead < tiles()) copy(i + kAhead);
    cp_async_commit();
    if ((i + kAhead + 1) % kBatch == 0) look_up(i + kAhead + 1);
  }
  __device__ __forceinline__ void finish() const {
    cp_async_wait<0>();
    __syncthreads();
  }

  // Tiles [i, i + kBatch).
  __device__ __forceinline__ void look_up(int i) const {
    const int own = i + threadIdx.x / kKeys, key = threadIdx.x % kKeys, token = first + own * kKeys + key;
    if (own >= tiles()) return;
    KeyTable& t = table_at(own);
    int position = kNever;
    if (token < last) {
      position = tokens.position(token);
      if (position > tokens.last) position = kNever;
    }
    t.k[key] = t.v[key] = t.stats[key] = nullptr;
    if (position != kNever) {
      const Row row = sequence.row(position);
      t.k[key] = row.k, t.v[key] = row.v, t.stats[key] = row.stats;
      t.k_grid[key] = row.k_grid, t.v_grid[key] = row.v_grid;
      if (!row.k) position = kNever;
    }
    if (position == kNever) t.v_grid[key] = t.k_grid[key] = make_float2(0, 0);  // weights of 0 must meet no NaN
    t.position[key] = position;
    int newest = position;
    for (int lanes = 16; lanes > 0; lanes /= 2) newest = max(newest, __shfl_xor_sync(~0u, newest, lanes));
    if (key % 32 == 0) t.newest[key / 32] = newest;
  }

  // Zeros where there is no key, and beyond channel D.
  __device__ __forceinline__ void copy(int i) const {
    constexpr int kChunk = 16 / sizeof(X), kChunks = kD / kChunk;
    const KeyTable& t = table_at(i);
    const Tile k = keys(i), v = values(i);
#pragma unroll
    for (int j = 0; j < kKeys * kChunks; j += kBlock) {
      const int row = (j + threadIdx.x) / kChunks, element = (j + threadIdx.x) % kChunks * kChunk;
      const X *from_k = static_cast<const X*>(t.k[row]), *from_v = static_cast<const X*>(t.v[row]);
      const bool read = from_k && element < D;
      cp_async_16(k.at(row, element), read ? from_k + element : from_k, read);
      cp_async_16(v.at(row, element), read ? from_v + element : from_v, read);
    }
  }
};

// ---- fragments: B operands of two steps of 16 channels, for 16 keys

// Keys and values in T, as they lie.
template <typename T, int kD>
struct Plain {
  Rows<T, kD> k, v;

  // b[step]: channels of 32 pair + 16 step; words 0 and 1 for keys 0 to 7, words 2 and 3 for keys 8 to 15.
  __device__ __forceinline__ void keys(uint32_t (&b)[2][4], int key, int pair) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < 2; ++step)
      ldmatrix_x4(b[step], k.at(key + lane / 16 * 8 + lane % 8, 32 * pair + 16 * step + lane / 8 % 2 * 8));
  }

  // b[block]: channels of 32 pair + 16 block; words 0 and 1 for the first 8 of them, words 2 and 3 for the others.
  __device__ __forceinline__ void values(uint32_t (&b)[2][4], int key, int pair) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < 2; ++block)
      ldmatrix_x4_trans(b[block], v.at(key + lane % 16, 32 * pair + 16 * block + lane / 16 * 8));
  }
};

// ---- codes, dequantised for good: once for all warps

// 8 neighbouring channels of a key. stats: those of its group, from the same channel on; null: its grid is (step, min).
template <typename T>
__device__ __forceinline__ Vector<uint32_t, 4> key_of_codes(const uint8_t* codes, const T* stats, int D, float2 grid) {
  const auto words = load_vector<uint32_t, 2>(reinterpret_cast<const uint32_t*>(codes));
  Vector<T, 8> low, high;
  if (stats) low = load_global<T, 8>(stats), high = load_global<T, 8>(stats + D);
  Vector<uint32_t, 4> out;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    float x[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (stats) {
        grid.y = static_cast<float>(low.value[i + e]);
        grid.x = narrow_step(grid.y, static_cast<float>(high.value[i + e]));
      }
      // Rounding to T brings what is past the maximum back to it.
      x[e] = fmaf(grid.x, code_value(words.value[i / 4], i % 4 + e), grid.y);
    }
    out.value[i / 2] = pack<T>(x[0], x[1]);
  }
  return out;
}

// 8 neighbouring channels of a value on its grid, (step, min).
template <typename T>
__device__ __forceinline__ Vector<uint32_t, 4> value_of_codes(const uint8_t* codes, float2 grid) {
  return key_of_codes<T>(codes, nullptr, 0, grid);
}

// ---- queries

// Puts rows [0, kRows) of a tile of queries into shared memory, zeros where query(row) is null and beyond channel D.
template <int kRows, typename T, int kD, typename Query>
__device__ __forceinline__ void load_queries(Rows<T, kD> q, int D, Query query) {
  for (int j = threadIdx.x; j < kRows * kD / 16; j += kThreads) {
    const int row = j / (kD / 16), block = j % (kD / 16) * 16;
    const T* from = query(row);
    Vector<uint32_t, 4> low{}, high{};
    if (from && block < D) {
      low = load_vector<uint32_t, 4>(reinterpret_cast<const uint32_t*>(from + block));
      high = load_vector<uint32_t, 4>(reinterpret_cast<const uint32_t*>(from + block + 8));
    }
    store_vector(reinterpret_cast<uint32_t*>(q.at(row, block)), low);
    store_vector(reinterpret_cast<uint32_t*>(q.at(row, block + 8)), high);
  }
}

// ---- softmax

template <typename Combine>
__device__ __forceinline__ float over_quad(float x, Combine combine) {  // the four lanes that hold a row
  x = combine(x, __shfl_xor_sync(~0u, x, 1));
  return combine(x, __shfl_xor_sync(~0u, x, 2));
}

// Weights are 2^-headroom at most, so that thousands of the largest values have a finite sum before it is divided by that
// of the weights. float16 needs none, whose values are small, and has no room for it.
template <typename T>
constexpr float kHeadroom = std::is_same_v<T, __nv_bfloat16> ? 16.0f : 0.0f;

// Attention of 16 queries over the keys seen so far. A lane holds rows lane / 4 and lane / 4 + 8, in C fragments.
// Maxima and logits are in units of log2, sums are of this lane's columns.
template <typename T, int kD>
struct State {
  float out[kD / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  // s[n] [16, 8 keys] = q · k, not scaled, of `Columns` keys from `key` on.
  template <int Columns, typename Source>
  __device__ __forceinline__ static void multiply(float (&s)[Columns / 8][4], Rows<T, kD> q, int row, const Source& source,
                                                  int key) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int pair = 0; pair < kD / 32; ++pair) {
      uint32_t a[2][4];
#pragma unroll
      for (int step = 0; step < 2; ++step) ldmatrix_x4(a[step], q.at(row + lane % 16, 32 * pair + 16 * step + lane / 16 * 8));
#pragma unroll
      for (int n = 0; n < Columns / 8; n += 2) {
        uint32_t b[2][4];
        source.keys(b, key + n * 8, pair);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          mma_m16n8k16<T>(s[n], a[step], b[step][0], b[step][1]);
          mma_m16n8k16<T>(s[n + 1], a[step], b[step][2], b[step][3]);
        }
      }
    }
  }

  // s: masked logits, become weights. fade: what `out` must shrink by, since their maximum rose.
  template <int Columns>
  __device__ __forceinline__ void soften(float (&s)[Columns / 8][4], float (&fade)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = max[r];
#pragma unroll
      for (int n = 0; n < Columns / 8; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      largest = over_quad(largest, [](float a, float b) { return fmaxf(a, b); });
      const float base = largest == -INFINITY ? 0.0f : largest;  // nothing attended yet: weights of 0, not of NaN
      const float shift = base + kHeadroom<T>;
      fade[r] = exp2_approx(max[r] - base);
      max[r] = largest, sum[r] *= fade[r];
#pragma unroll
      for (int n = 0; n < Columns / 8; ++n)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) sum[r] += s[n][e] = exp2_approx(s[n][e] - shift);
    }
  }
  __device__ __forceinline__ void rescale(const float (&fade)[2]) {
    if (!__any_sync(~0u, fade[0] != 1 || fade[1] != 1)) return;  // most tiles raise no maximum
#pragma unroll
    for (auto& x : out) x[0] *= fade[0], x[1] *= fade[0], x[2] *= fade[1], x[3] *= fade[1];
  }

  // out += weights · v
  template <int Columns, typename Source>
  __device__ __forceinline__ void add(const float (&w)[Columns / 8][4], const Source& source, int key) {
#pragma unroll
    for (int n = 0; n < Columns / 8; n += 2) {
      const uint32_t a[4] = {pack<T>(w[n][0], w[n][1]), pack<T>(w[n][2], w[n][3]), pack<T>(w[n + 1][0], w[n + 1][1]),
                             pack<T>(w[n + 1][2], w[n + 1][3])};
#pragma unroll
      for (int pair = 0; pair < kD / 32; ++pair) {
        uint32_t b[2][4];
        source.values(b, key + n * 8, pair);
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          mma_m16n8k16<T>(out[4 * pair + 2 * block], a, b[block][0], b[block][1]);
          mma_m16n8k16<T>(out[4 * pair + 2 * block + 1], a, b[block][2], b[block][3]);
        }
      }
    }
  }
};

}  // namespace lserve::cuda
