// prefill by wgmma. A block of threads takes 64 neighbouring queries of two query heads that share a kv head. Its first
// warpgroup copies keys and values; each of the others multiplies for one head. The product of a tile's weights with its
// values runs while the logits of the next tile become weights.
#pragma once
#include "cuda/launch.h"
#include "cuda/prefill.cuh"
#include "cuda/sm90/ptx.cuh"

namespace lserve::cuda::sm90 {

constexpr int kWarpgroup = 128, kHeads = 2, kBlockThreads = (1 + kHeads) * kWarpgroup;
// Of a thread. Copying needs few, and gives the others to those who multiply.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
// A block starts with as many registers a thread as fit, in eights, and who wants more than others gave waits for ever.
static_assert(kProducerRegisters + kHeads * kConsumerRegisters <= (1 + kHeads) * (65536 / kBlockThreads / 8 * 8));

enum NamedBarrier { kConsumers = 1, kProducers, kEverybody };  // 0 is that of __syncthreads

// A tile as wgmma reads it: panels of 64 channels.
template <typename T, int kD>
struct SwizzledTile {
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

// How the producer and the consumers of a pipeline wait for each other, a barrier a stage.
template <int kStages>
struct Handover {
  uint64_t full[kStages], empty[kStages];

  __device__ void init() {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + i, kWarpgroup);                 // every producer has copied its part
      mbarrier_init(empty + i, kHeads * kWarpgroup / 32);  // every warp of the consumers has done with it
    }
  }
  __device__ void wait_full(int i) { mbarrier_wait(full + i % kStages, i / kStages % 2); }
  __device__ void wait_empty(int i) { mbarrier_wait(empty + i % kStages, (i / kStages + 1) % 2); }
  __device__ void arrive_full(int i) { mbarrier_arrive(full + i % kStages); }
  __device__ void arrive_empty(int i) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + i % kStages);
  }
};

// The threads that multiply.
struct Consumers {
  __device__ static int thread() { return threadIdx.x - kWarpgroup; }
  __device__ static constexpr int threads() { return kHeads * kWarpgroup; }
  __device__ static void sync() { sync_threads(kConsumers, threads()); }
  __device__ static bool sync_or(bool x) { return sync_threads_or(kConsumers, threads(), x); }
};

template <typename T, int kD, bool kInt8>
struct PrefillMemory {
  // Consumers hold two tiles: of one they take logits, of the one before they add values.
  static constexpr int kStages = 4, kCodeStages = 3;
  // A batch of tiles is looked up while consumers may still need the tables of those whose stages come next.
  using Values = KvPipeline<T, T, kD, kStages, kStages - 1, kWarpgroup, SwizzledTile>;
  using Codes = KvPipeline<T, uint8_t, kD, kCodeStages, kStages - 1, kWarpgroup>;
  // One stretch serves the tiles of values; or before them two tiles that codes are unpacked to in turn, and the codes.
  static constexpr int kTile = SwizzledTile<T, kD>::kTile * sizeof(T), kUnpacked = 2 * 2 * kTile;
  static constexpr int kCodeBytes = kUnpacked + Codes::kBytes;
  static constexpr int kData = kInt8 && kCodeBytes > Values::kBytes ? kCodeBytes : Values::kBytes;
  static constexpr int kBytes = shared_bytes(
      {kData, Values::kTables * int(sizeof(KeyTable)), int(sizeof(Handover<kStages>)), int(sizeof(Handover<kCodeStages>))});
  char* data;
  KeyTable* tables;
  Handover<kStages>& handover;
  Handover<kCodeStages>& code_handover;

  __device__ explicit PrefillMemory(SharedMemory shared)
      : data(shared.take<char>(kData)),
        tables(shared.take<KeyTable>(Values::kTables)),
        handover(*shared.take<Handover<kStages>>(1)),
        code_handover(*shared.take<Handover<kCodeStages>>(1)) {}
};

// Copies all tiles of a pipeline.
template <typename Pipeline, int kStages>
__device__ __forceinline__ void produce(const Pipeline& pipeline, Handover<kStages>& handover) {
  const int tiles = pipeline.tiles();
  for (int i = 0; i <= tiles; ++i) {
    if (i < tiles) {
      if (i % Pipeline::kBatch == 0) {
        pipeline.look_up(i);
        sync_threads(kProducers, kWarpgroup);
      }
      handover.wait_empty(i);
      pipeline.copy(i);
    }
    cp_async_commit();
    if (i > 0) {
      cp_async_wait<1>();  // the tile before has come
      Pipeline::Tile::publish();
      handover.arrive_full(i - 1);
    }
  }
}

template <typename T, int kD, bool kInt8>
__global__ void __launch_bounds__(kBlockThreads, 1) prefill_kernel(const __grid_constant__ PrefillArgs a) {
  using Memory = PrefillMemory<T, kD, kInt8>;
  using Tile = SwizzledTile<T, kD>;
  const int G = static_cast<int>(a.G), parts = (G + kHeads - 1) / kHeads, h = blockIdx.y / parts;
  const int D = static_cast<int>(a.kv.D);
  const int32_t window = a.mask.windows[h];
  const QueryTile tile = query_tile(a, gridDim.x - 1 - blockIdx.x, window);  // the last tiles have most to do
  if (tile.count == 0) return;

  const Memory memory{SharedMemory()};
  char* const data = memory.data;
  auto& handover = memory.handover;
  auto& code_handover = memory.code_handover;
  if (threadIdx.x == 0) handover.init(), code_handover.init();
  const auto sync_block = [] { sync_threads(kEverybody, kBlockThreads); };  // from wherever a warpgroup is
  sync_block();

  const Tokens tokens = prefill_tokens(a, tile, h, window);
  const Sequence<T> sequence = prefill_sequence<T>(a, tile.b, h);
  const int boundary = kInt8 ? tokens.sealed : 0;
  const typename Memory::Codes codes{
      reinterpret_cast<uint8_t*>(data + Memory::kUnpacked), memory.tables, sequence, tokens, 0, boundary, D};
  const typename Memory::Values pipeline{
      reinterpret_cast<T*>(data), memory.tables, sequence, tokens, boundary, tokens.count, D};

  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if constexpr (kInt8) {
      produce(codes, code_handover);
      sync_block();
    }
    produce(pipeline, handover);
  } else {
    take_registers<kConsumerRegisters>();
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16;
    const int own = blockIdx.y % parts * kHeads + Consumers::thread() / kWarpgroup, head = h * G + own;
    const T* const queries =
        static_cast<const T*>(a.q.data) + (a.cu_seqlens_q[tile.b] + tile.first + row) * a.q.stride0 + head * a.q.stride1;
    QueryFragments<T, kD> q(queries, a.q.stride0, own < G ? tile.count - row : 0, D);
    const float scale = a.scale * kLog2e;
    OnlineSoftmax<T, kD> softmax;
    Weights<T> weights;  // of the tile before,
    Tile values;         // and its values

    const auto add_values = [&] {
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step)
#pragma unroll
        for (int panel = 0; panel < kD / 64; ++panel)
          wgmma_m64n64k16<T, true>(softmax.out, 8 * panel, weights.a[step], values.keys(step, panel), true);
      commit_wgmma();
    };
    const auto wait_for_values = [&] {
      wait_wgmma<0>();
      pin(softmax.out);
    };

    // first: there is no tile before. newest: some keys may be newer than some queries. done(): the tile before is not needed
    // any more.
    const auto attend = [&](Tile k, Tile v, const KeyTable& table, auto first, auto newest, auto done) {
      float s[kKeys / 8][4];
      pin(s);
      pin(q.a);
      if constexpr (!first.value) {
        pin(softmax.out);
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
      float factor[2];
      softmax.template update<kKeys>(s, factor);
      if constexpr (!first.value) {
        compute_first(softmax.sum[0] + softmax.sum[1]);  // weights are taken while the values of the tile before are multiplied
        wait_for_values();
        done();
      }
      softmax.rescale(factor);
      if constexpr (newest.value)
        if (masked) take_infinite_values<T, kD, Consumers>(v, table, tile, softmax);
      weights.pack_from(s);
      values = v;
    };
    const auto attend_last = [&] {
      pin(softmax.out);
      pin(weights.a);
      fence_registers();
      add_values();
      wait_for_values();
    };

    if constexpr (kInt8) {
      const auto attend_codes = [&](int i, auto first) {
        const Tile k{reinterpret_cast<T*>(data + i % 2 * 2 * Memory::kTile)}, v{k.data + Tile::kTile};
        code_handover.wait_full(i);
        Consumers::sync();  // all have done with what lay in k and v
        dequantize_tile<T, kD, Consumers>(codes.keys(i), codes.values(i), codes.table_at(i), D, k, v);
        Tile::publish();
        Consumers::sync();
        attend(k, v, codes.table_at(i), first, std::false_type{}, [] {});  // older than all queries
        code_handover.arrive_empty(i);
      };
      if (codes.tiles() > 0) {
        attend_codes(0, std::true_type{});
        for (int i = 1; i < codes.tiles(); ++i) attend_codes(i, std::false_type{});
        attend_last();
      }
      sync_block();
    }
    const auto attend_tile = [&](int i, auto first) {
      handover.wait_full(i);
      attend(pipeline.keys(i), pipeline.values(i), pipeline.table_at(i), first, std::true_type{},
             [&] { handover.arrive_empty(i - 1); });
    };
    if (pipeline.tiles() > 0) {
      attend_tile(0, std::true_type{});
      for (int i = 1; i < pipeline.tiles(); ++i) attend_tile(i, std::false_type{});
      attend_last();
    }
    if (own < G) store_rows(a, tile, head, row, softmax);
  }
}

}  // namespace lserve::cuda::sm90
