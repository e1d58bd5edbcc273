// prefill by wgmma. A block of threads takes 64 neighbouring queries of kHeads query heads that share a kv head, one a
// warpgroup, so that keys are copied once for all of them. The product of a tile's weights with its values runs while the
// logits of the next tile become weights.
#pragma once
#include "cuda/prefill.cuh"
#include "cuda/sm90/ptx.cuh"

namespace lserve::cuda::sm90 {

constexpr int kWarpgroup = 128;  // threads

// A tile as wgmma reads it: panels of 64 channels.
template <typename T, int kD>
struct Panels {
  static constexpr int kPanel = kKeys * 64, kTile = kD / 64 * kPanel;
  T* data;

  __device__ __forceinline__ T* at(int row, int element) const {
    return data + element / 64 * kPanel + row * 64 + (element % 64 / 8 ^ row % 8) * 8 + element % 8;
  }
  // Channels [16 step, 16 step + 16) of all keys; keys [16 step, 16 step + 16) of a panel.
  __device__ __forceinline__ const T* channels(int step) const { return data + step / 4 * kPanel + step % 4 * 16; }
  __device__ __forceinline__ const T* keys(int step, int panel) const { return data + panel * kPanel + step * 16 * 64; }

  __device__ __forceinline__ static void publish() { fence_for_wgmma(); }
};

// 16 queries of a warp as A operands, zeros from row `count` on and beyond channel D.
template <typename T, int kD>
struct QueryFragments {
  uint32_t a[kD / 16][4];

  __device__ __forceinline__ QueryFragments(const T* queries, int64_t stride, int count, int D) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kD / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i % 2 * 8, d = 16 * step + lane % 4 * 2 + i / 2 * 8;
        a[step][i] = row < count && d < D ? *reinterpret_cast<const uint32_t*>(queries + row * stride + d) : 0;
      }
  }
};

// The weights of 64 queries for 64 keys as A operands.
template <typename T>
struct Weights {
  uint32_t a[kKeys / 16][4];

  __device__ __forceinline__ void pack_from(const float (&s)[kKeys / 8][4]) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[step][i] = pack<T>(s[2 * step + i / 2][i % 2 * 2], s[2 * step + i / 2][i % 2 * 2 + 1]);
  }
};

template <typename T, int kD, int kHeads>
struct PrefillRings {
  static constexpr int kBlock = kHeads * kWarpgroup, kAhead = kHeads == 1 ? 1 : 2;
  // The tile before is still in use while the next is copied.
  using Values = Ring<T, T, kD, kAhead + 2, kAhead, kBlock, Panels>;
  using Codes = Ring<T, uint8_t, kD, kAhead + 1, kAhead, kBlock>;
  static constexpr int kTables = Values::kTables;
  static constexpr int kTile = Panels<T, kD>::kTile * sizeof(T);
  // One stretch serves the ring of values; or before it two tiles that codes are unpacked to in turn, and their ring.
  static constexpr int kUnpacked = 2 * 2 * kTile;
  template <bool kInt8>
  static constexpr int kData = kInt8 && kUnpacked + Codes::kBytes > Values::kBytes ? kUnpacked + Codes::kBytes : Values::kBytes;
};

template <typename T, int kD, bool kInt8, int kHeads>
__global__ void __launch_bounds__(kHeads* kWarpgroup, kHeads == 1 ? 2 : 1)
    prefill_kernel(const __grid_constant__ PrefillArgs a) {
  using Rings = PrefillRings<T, kD, kHeads>;
  using Tile = Panels<T, kD>;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16, G = static_cast<int>(a.G);
  const int parts = (G + kHeads - 1) / kHeads, h = blockIdx.y / parts, D = static_cast<int>(a.kv.D);
  const int own = blockIdx.y % parts * kHeads + threadIdx.x / kWarpgroup, head = h * G + own;
  const int32_t window = a.mask.windows[h];
  const QueryTile tile = query_tile(a, gridDim.x - 1 - blockIdx.x, window);  // the last tiles have most to do
  if (tile.count == 0) return;

  SharedMemory shared;
  char* const data = shared.take<char>(Rings::template kData<kInt8>);
  KeyTable* const tables = shared.take<KeyTable>(Rings::kTables);

  const Tokens tokens = prefill_tokens(a, tile, h, window);
  const Sequence<T> sequence = prefill_sequence<T>(a, tile.b, h);
  const T* const queries =
      static_cast<const T*>(a.q.data) + (a.cu_seqlens_q[tile.b] + tile.first + row) * a.q.stride0 + head * a.q.stride1;
  QueryFragments<T, kD> q(queries, a.q.stride0, own < G ? tile.count - row : 0, D);
  const float scale = a.scale * kLog2e;
  State<T, kD> state;
  Weights<T> weights;  // of the tile before,
  Tile values;         // and its values

  const auto add_values = [&] {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
#pragma unroll
      for (int panel = 0; panel < kD / 64; ++panel)
        wgmma_m64n64k16<T, true>(state.out, 8 * panel, weights.a[step], values.keys(step, panel), true);
    commit_wgmma();
  };
  const auto wait_for_values = [&] {
    wait_wgmma<0>();
    pin(state.out);
  };

  // first: there is no tile before. newest: some keys may be newer than some queries.
  const auto attend = [&](Tile k, Tile v, const KeyTable& table, auto first, auto newest, auto advance) {
    float s[kKeys / 8][4];
    pin(s);
    pin(q.a);
    if constexpr (!first.value) {
      pin(state.out);
      pin(weights.a);
    }
    fence_registers();
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) wgmma_m64n64k16<T, false>(s, 0, q.a[step], k.channels(step), step > 0);
    commit_wgmma();
    if constexpr (!first.value) add_values();
    wait_wgmma<first.value ? 0 : 1>();
    pin(s);

    const bool masked = max(table.newest[0], table.newest[1]) > tile.position;
#pragma unroll
    for (auto& fragment : s)
#pragma unroll
      for (float& x : fragment) x *= scale;
    if (masked) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (table.position[n * 8 + lane % 4 * 2 + e % 2] > tile.position + row + lane / 4 + e / 2 * 8) s[n][e] = -INFINITY;
    }
    float fade[2];
    state.template soften<kKeys>(s, fade);
    advance();  // its branches keep the compiler from waiting before it has computed the weights
    if constexpr (!first.value) wait_for_values();
    state.rescale(fade);
    if constexpr (newest.value)
      if (masked) take_infinite_values(v, table, tile, state);
    weights.pack_from(s);
    values = v;
  };
  const auto attend_last = [&] {
    pin(state.out);
    pin(weights.a);
    fence_registers();
    add_values();
    wait_for_values();
  };

  const int boundary = kInt8 ? tokens.sealed : 0;
  if constexpr (kInt8) {
    const typename Rings::Codes ring{
        reinterpret_cast<uint8_t*>(data + Rings::kUnpacked), tables, sequence, tokens, 0, boundary, D};
    const auto attend_codes = [&](int i, auto first) {
      const Tile k{reinterpret_cast<T*>(data + i % 2 * 2 * Rings::kTile)}, v{k.data + Tile::kTile};
      ring.wait();
      dequantize_tile<T, kD>(ring.keys(i), ring.values(i), ring.table_at(i), D, k, v);
      Tile::publish();
      __syncthreads();
      attend(k, v, ring.table_at(i), first, std::false_type{}, [&] { ring.advance(i); });  // older than all queries
    };
    ring.start();
    if (ring.tiles() > 0) {
      attend_codes(0, std::true_type{});
      for (int i = 1; i < ring.tiles(); ++i) attend_codes(i, std::false_type{});
      attend_last();
    }
    ring.finish();
  }
  const typename Rings::Values ring{reinterpret_cast<T*>(data), tables, sequence, tokens, boundary, tokens.count, D};
  const auto attend_tile = [&](int i, auto first) {
    ring.wait();
    attend(ring.keys(i), ring.values(i), ring.table_at(i), first, std::true_type{}, [&] { ring.advance(i); });
  };
  ring.start();
  if (ring.tiles() > 0) {
    attend_tile(0, std::true_type{});
    for (int i = 1; i < ring.tiles(); ++i) attend_tile(i, std::false_type{});
    attend_last();
  }
  ring.finish();
  if (own < G) store_rows(a, tile, head, row, state);
}

}  // namespace lserve::cuda::sm90
