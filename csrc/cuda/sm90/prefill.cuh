// prefill by wgmma. A block of threads takes 64 neighbouring queries of two query heads that share a kv head. Its first
// warpgroup copies keys and values, and turns codes into numbers; each of the others multiplies for one head. The product
// of a tile's weights with its values runs while the logits of the next tile become weights.
#pragma once
#include "cuda/launch.h"
#include "cuda/prefill.cuh"
#include "cuda/sm90/ptx.cuh"

namespace lserve::cuda::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kHeads = 2;   // of a block, that read the same keys: a warpgroup each
constexpr int kStages = 4;  // tiles at a time: consumers hold two, of one they take logits, of the one before they add values

// How a block shares its threads and registers. Unpacking codes takes two warpgroups as long as multiplying takes.
template <bool kInt8>
struct Roles {
  static constexpr int kProducers = (kInt8 ? 2 : 1) * kWarpgroup, kConsumers = kHeads * kWarpgroup;
  static constexpr int kThreads = kProducers + kConsumers;
  static constexpr int kProducerRegisters = kInt8 ? 72 : 56, kConsumerRegisters = kInt8 ? 184 : 224;  // of a thread
  // A block starts with as many registers a thread as fit, in eights, and who wants more than others gave waits for ever.
  static_assert(kProducers * kProducerRegisters + kConsumers * kConsumerRegisters <= 65536 / kThreads / 8 * 8 * kThreads);
};

enum NamedBarrier { kConsumersBarrier = 1, kProducersBarrier };  // 0 is that of __syncthreads

// A tile as wgmma reads it: panels of 64 channels.
template <typename T, int kD>
struct SwizzledTile {
  static constexpr int kPanel = kKeys * 64, kTile = kD / 64 * kPanel;
  T* data;

  __device__ __forceinline__ T* at(int row, int element) const {
    return data + element / 64 * kPanel + row * 64 + (element % 64 / 8 ^ row % 8) * 8 + element % 8;
  }
  // The first element of channels [16 step, 16 step + 16) of all keys; of keys [16 step, 16 step + 16) of a panel.
  __device__ __forceinline__ static constexpr int channels(int step) { return step / 4 * kPanel + step % 4 * 16; }
  __device__ __forceinline__ static constexpr int keys(int step, int panel) { return panel * kPanel + step * 16 * 64; }

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
struct Handover {
  uint64_t full[kStages], empty[kStages];

  __device__ void init(int producers, int consumers) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + i, producers);        // every thread has brought its part
      mbarrier_init(empty + i, consumers / 32);  // every warp has done with it
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

// The threads that copy, and those that multiply.
template <bool kInt8>
struct Producers {
  __device__ static uint32_t thread() { return threadIdx.x; }
  __device__ static constexpr int threads() { return Roles<kInt8>::kProducers; }
  __device__ static void sync() { sync_threads(kProducersBarrier, threads()); }
};
template <bool kInt8>
struct Consumers {
  __device__ static uint32_t thread() { return threadIdx.x - Roles<kInt8>::kProducers; }
  __device__ static constexpr int threads() { return Roles<kInt8>::kConsumers; }
  __device__ static void sync() { sync_threads(kConsumersBarrier, threads()); }
  __device__ static bool sync_or(bool x) { return sync_threads_or(kConsumersBarrier, threads(), x); }
};

template <typename T, int kD, bool kInt8>
struct PrefillMemory {
  using Tile = SwizzledTile<T, kD>;
  using Values = KvPipeline<T, T, kD, kStages, kStages - 1, Producers<kInt8>, SwizzledTile>;
  using Codes = KvPipeline<T, uint8_t, kD, kStages, kStages - 1, Producers<kInt8>>;
  static constexpr int kCodes = kInt8 ? Codes::kBytes : 0;
  static_assert(Codes::kTables <= Values::kTables);
  static constexpr int kBytes = shared_bytes(
      {Values::kBytes, kCodes, Values::kTables * int(sizeof(KeyTable)), kStages * int(sizeof(KeyMask)), int(sizeof(Handover))});
  T* data;           // [kStages, K and V, kTile]
  uint8_t* codes;    // of the pipeline that fills the first stages, if there are codes
  KeyTable* tables;  // of one pipeline after the other
  KeyMask* masks;    // [kStages]
  Handover& handover;

  __device__ explicit PrefillMemory(SharedMemory shared)
      : data(shared.take<T>(Values::kBytes / int(sizeof(T)))),
        codes(kInt8 ? shared.take<uint8_t>(kCodes) : nullptr),
        tables(shared.take<KeyTable>(Values::kTables)),
        masks(shared.take<KeyMask>(kStages)),
        handover(*shared.take<Handover>(1)) {}

  __device__ __forceinline__ Tile keys(int i) const { return {data + i % kStages * 2 * Tile::kTile}; }
  __device__ __forceinline__ Tile values(int i) const { return {data + (i % kStages * 2 + 1) * Tile::kTile}; }
  __device__ __forceinline__ KeyMask& mask(int i) const { return masks[i % kStages]; }
  __device__ __forceinline__ void set_mask(int i, const KeyMask& from) const {
    KeyMask& to = mask(i);
    if (threadIdx.x < kKeys) to.position[threadIdx.x] = from.position[threadIdx.x];
    if (threadIdx.x < 2) to.newest[threadIdx.x] = from.newest[threadIdx.x];
  }
};

// Fills the first stages from codes.
template <typename T, int kD>
__device__ __forceinline__ void produce_codes(const typename PrefillMemory<T, kD, true>::Codes& pipeline,
                                              const PrefillMemory<T, kD, true>& memory, int D) {
  pipeline.start();
  for (int i = 0; i < pipeline.tiles(); ++i) {
    const KeyTable& table = pipeline.table_at(i);
    const Bounds<T> bounds = first_bounds<T, kD, Producers<true>>(table, D);  // come while codes are waited for
    pipeline.wait();
    pipeline.advance(i);
    memory.handover.wait_empty(i);
    dequantize_tile<T, kD, Producers<true>>(pipeline.keys(i), pipeline.values(i), table, D, memory.keys(i), memory.values(i),
                                            bounds);
    memory.set_mask(i, table);
    SwizzledTile<T, kD>::publish();
    memory.handover.arrive_full(i);
  }
  pipeline.finish();
}

// Copies all tiles of a pipeline into the stages from `before` on.
template <typename Crew, typename Pipeline, typename Memory>
__device__ __forceinline__ void produce(const Pipeline& pipeline, const Memory& memory, int before) {
  const int tiles = pipeline.tiles();
  for (int i = 0; i <= tiles; ++i) {
    if (i < tiles) {
      if (i % Pipeline::kBatch == 0) {
        pipeline.look_up(i);
        Crew::sync();
      }
      memory.handover.wait_empty(before + i);
      pipeline.copy(i, memory.keys(before + i), memory.values(before + i));
      memory.set_mask(before + i, pipeline.table_at(i));
    }
    cp_async_commit();
    if (i > 0) {
      cp_async_wait<1>();  // the tile before has come
      Pipeline::Tile::publish();
      memory.handover.arrive_full(before + i - 1);
    }
  }
}

template <typename T, int kD, bool kInt8>
__global__ void __launch_bounds__(Roles<kInt8>::kThreads, 1) prefill_kernel(const __grid_constant__ PrefillArgs a) {
  join_stream();
  using Memory = PrefillMemory<T, kD, kInt8>;
  using Roles = Roles<kInt8>;
  using Consumers = Consumers<kInt8>;
  using Tile = SwizzledTile<T, kD>;
  const int G = static_cast<int>(a.G), parts = (G + kHeads - 1) / kHeads, h = blockIdx.y / parts;
  const int D = static_cast<int>(a.kv.D);
  const int32_t window = a.mask.windows[h];
  const QueryTile tile = query_tile(a, gridDim.x - 1 - blockIdx.x, window);  // the last tiles have most to do
  if (tile.count == 0) return;

  const Memory memory{SharedMemory()};
  auto& handover = memory.handover;
  if (threadIdx.x == 0) handover.init(Roles::kProducers, Roles::kConsumers);
  __syncthreads();

  const Tokens tokens = prefill_tokens(a, tile, h, window);
  const Sequence<T> sequence = prefill_sequence<T>(a, tile, h);
  const int boundary = kInt8 ? tokens.sealed : 0, coded = (boundary + kKeys - 1) / kKeys;  // tiles of codes
  const typename Memory::Values pipeline{memory.data, memory.tables, sequence, tokens, boundary, tokens.count, D};

  if (threadIdx.x < Roles::kProducers) {
    give_registers<Roles::kProducerRegisters>();
    if constexpr (kInt8) produce_codes<T, kD>({memory.codes, memory.tables, sequence, tokens, 0, boundary, D}, memory, D);
    produce<Producers<kInt8>>(pipeline, memory, coded);
  } else {
    take_registers<Roles::kConsumerRegisters>();
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16;
    const int own = blockIdx.y % parts * kHeads + Consumers::thread() / kWarpgroup, head = h * G + own;
    const int64_t first_row = tile.of.first_query + tile.first;
    const T* const queries = static_cast<const T*>(a.q.data) + (first_row + row) * a.q.stride0 + head * a.q.stride1;
    QueryFragments<T, kD> q(queries, a.q.stride0, own < G ? tile.count - row : 0, D);
    const float scale = a.scale * kLog2e;
    OnlineSoftmax<T, kD> softmax;
    Weights<T> weights;             // of the tile before,
    Panels<T> values{memory.data};  // and its values

    const auto add_values = [&] {
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step)
#pragma unroll
        for (int panel = 0; panel < kD / 64; ++panel)
          wgmma_m64n64k16<T, true>(softmax.out, 8 * panel, weights.a[step], values, Tile::keys(step, panel), true);
      commit_wgmma();
    };
    const auto wait_for_values = [&] {
      wait_wgmma<0>();
      pin(softmax.out);
    };

    const auto attend = [&](int i, auto first) {  // first: there is no tile before
      handover.wait_full(i);
      const Panels<T> keys(memory.keys(i).data);
      const KeyMask& mask = memory.mask(i);
      float s[kKeys / 8][4];
      pin(s);
      pin(q.a);
      if constexpr (!first.value) {
        pin(softmax.out);
        pin(weights.a);
      }
      fence_registers();
#pragma unroll
      for (int step = 0; step < kD / 16; ++step)
        wgmma_m64n64k16<T, false>(s, 0, q.a[step], keys, Tile::channels(step), step > 0);
      commit_wgmma();
      if constexpr (!first.value) add_values();
      wait_wgmma<first.value ? 0 : 1>();
      pin(s);

      const bool masked = max(mask.newest[0], mask.newest[1]) > tile.position;
      if (masked) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (mask.position[n * 8 + lane % 4 * 2 + e % 2] > tile.position + row + lane / 4 + e / 2 * 8) s[n][e] = -INFINITY;
      }
      float factor[2];
      softmax.template update<kKeys>(s, scale, factor);
      if constexpr (!first.value) {
        compute_first(softmax.sum[0] + softmax.sum[1]);  // weights are taken while the values of the tile before are multiplied
        wait_for_values();
        handover.arrive_empty(i - 1);
      }
      softmax.rescale(factor);
      if (masked) take_infinite_values<T, kD, Consumers>(memory.values(i), mask, tile, softmax);
      weights.pack_from(s);
      values = Panels<T>(memory.values(i).data);
    };
    // Equal in all lanes, as the compiler cannot see: where tiles lie is then computed once a warp.
    const int tiles = __shfl_sync(~0u, coded + pipeline.tiles(), 0);
    if (tiles > 0) {
      attend(0, std::true_type{});
      for (int i = 1; i < tiles; ++i) attend(i, std::false_type{});
      pin(softmax.out);
      pin(weights.a);
      fence_registers();
      add_values();
      wait_for_values();
    }
    if (own < G)
      store_rows(softmax, row, tile.count, D, static_cast<T*>(a.out), a.lse,
                 [&](int row) { return (first_row + row) * (a.kv.H * a.G) + head; });
  }
}

}  // namespace lserve::cuda::sm90
