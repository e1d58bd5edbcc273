#include "cuda/decode.cuh"

#include <algorithm>

#include "cuda/tiles.h"

namespace lserve::cuda {
namespace {

// Splits of the longest sequence that the tables allow, however many chunks the others have.
int64_t max_splits(const DecodeArgs& a) {
  const int64_t tokens = a.kv.M * a.kv.P, chunk = split_tokens(a.rule, 1);
  return std::min<int64_t>((tokens + chunk - 1) / chunk, kMaxSplits);
}

template <typename T, int kD, Storage kStorage>
void launch_tiles(const DecodeArgs& a, const Partials& partials, void* stream) {
  using Rings = DecodeRings<T, kD>;
  const int64_t parts = (a.G + kGroup - 1) / kGroup;
  const dim3 grid(partials.splits, a.kv.H * parts, a.kv.B);
  const int warps = 4 * kGroup * sizeof(float);
  const int shared = shared_bytes({kGroup * Rows<T, kD>::kStride * int(sizeof(T)), Rings::kTables * int(sizeof(KeyTable)),
                                   Rings::template kData<kStorage>, warps, warps,
                                   kStorage == Storage::codes_of_groups ? Rings::Codes::kGrids * int(sizeof(T)) : 0});
  launch("decode", decode_kernel<T, kD, kStorage>, grid, kThreads, shared, stream, a, partials);
}

template <typename T>
void launch_splits(const DecodeArgs& a, const Partials& partials, void* stream) {
  if constexpr (!std::is_same_v<T, float>) {
    const bool int8 = a.kv.kv_dtype == Dtype::u8, groups = int8 && a.kv.stats;
    // 16 keys of a tile must share a group: they lie in one page then, too.
    const bool fits = !groups || (a.kv.L % 16 == 0 && a.rule.unit == a.kv.P);
    if (fits && rows_aligned<T>(a.q) && rows_aligned<T>(a.kv)) {
      return with_head_dim(a.kv.D, [&](auto kD) {
        if (groups) return launch_tiles<T, kD, Storage::codes_of_groups>(a, partials, stream);
        if (int8) return launch_tiles<T, kD, Storage::codes_of_tokens>(a, partials, stream);
        return launch_tiles<T, kD, Storage::plain>(a, partials, stream);
      });
    }
  }
  const int64_t warps = kThreads / 32;
  const dim3 grid(partials.splits, (a.kv.H * a.G + warps - 1) / warps, a.kv.B);
  launch("decode", general_decode_kernel<T>, grid, kThreads, shared_bytes({kQueryBytes}), stream, a, partials);
}

}  // namespace

int64_t decode_workspace(const DecodeArgs& a) { return a.kv.B * a.kv.H * a.G * max_splits(a) * (a.kv.D + 1); }

void decode(const DecodeArgs& a, void* stream) {
  const int64_t rows = a.kv.B * a.kv.H * a.G, splits = max_splits(a);
  if (rows == 0) return;
  const Partials partials{a.workspace, a.workspace + rows * splits * a.kv.D, static_cast<int>(splits)};
  with_dtype("decode", a.kv.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (splits > 0) launch_splits<T>(a, partials, stream);
    launch("decode", combine_kernel<T>, rows, kThreads, stream, a, partials);
  });
}

void merge_states(const MergeArgs& a, void* stream) {
  if (a.rows == 0) return;
  const int64_t warps = kThreads / 32;
  with_dtype("merge_states", a.dtype, [&](auto zero) {
    launch("merge_states", merge_kernel<decltype(zero)>, (a.rows + warps - 1) / warps, kThreads, stream, a);
  });
}

}  // namespace lserve::cuda
