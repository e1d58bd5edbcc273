#include "cuda/decode.cuh"

#include <algorithm>

#include "cuda/dispatch.h"

namespace lserve::cuda {
namespace {

// Splits of the longest sequence that the tables allow, however many chunks the others have.
int64_t max_splits(const DecodeArgs& a) {
  const int64_t tokens = a.kv.M * a.kv.P, chunk = split_tokens(a.mask, 1);
  return std::min<int64_t>((tokens + chunk - 1) / chunk, kMaxSplits);
}

// Blocks that share the splits of one row: as many as the GPU holds four times over at most, so that it is evenly busy, the
// last ones do not come alone, and few of them find out that their sequence is too short.
int blocks_a_row(const Partials& partials, int64_t rows) {
  const int64_t wanted = 4 * 2 * device_attribute("decode", cudaDevAttrMultiProcessorCount);
  return static_cast<int>(std::clamp<int64_t>(wanted / rows, 1, partials.splits));
}

template <typename T, int kD, Storage kStorage, bool kScattered>
void launch_tiles(const DecodeArgs& a, const Partials& partials, void* stream) {
  const int64_t rows = a.kv.H * ((a.G + kGroup - 1) / kGroup);
  // Splits that every row has come before those that only long ones do.
  const dim3 grid(rows, a.kv.B, blocks_a_row(partials, rows * a.kv.B));
  launch("decode", decode_kernel<T, kD, kStorage, kScattered>, grid, kThreads,
         DecodeMemory<T, kD, kStorage, kScattered>::kBytes, stream, a, partials);
}

template <typename T>
void launch_splits(const DecodeArgs& a, const Partials& partials, void* stream) {
  if constexpr (!std::is_same_v<T, float>) {
    const bool int8 = a.kv.kv_dtype == Dtype::u8, groups = int8 && a.kv.stats;
    const bool scattered = is_scattered(a.mask);
    const bool fits = !groups || (a.kv.L % kWarpKeys == 0 && !scattered);  // a warp's keys must share a group
    if (fits && rows_aligned<T>(a.q) && rows_aligned<T>(a.kv)) {
      return with_head_dim(a.kv.D, [&](auto kD) {
        if (groups) return launch_tiles<T, kD, Storage::int8_per_group, false>(a, partials, stream);
        if (scattered && int8) return launch_tiles<T, kD, Storage::int8_per_token, true>(a, partials, stream);
        if (scattered) return launch_tiles<T, kD, Storage::plain, true>(a, partials, stream);
        if (int8) return launch_tiles<T, kD, Storage::int8_per_token, false>(a, partials, stream);
        return launch_tiles<T, kD, Storage::plain, false>(a, partials, stream);
      });
    }
  }
  const int64_t warps = kThreads / 32, rows = (a.kv.H * a.G + warps - 1) / warps;
  const dim3 grid(rows, a.kv.B, blocks_a_row(partials, rows * a.kv.B));
  launch("decode", general_decode_kernel<T>, grid, kThreads, shared_bytes({kQueryBytes}), stream, a, partials);
}

}  // namespace

int64_t decode_workspace(const DecodeArgs& a) { return a.kv.B * a.kv.H * a.G * Partials::size(max_splits(a), a.kv.D); }

void decode(const DecodeArgs& a, void* stream) {
  const int64_t rows = a.kv.B * a.kv.H * a.G, splits = max_splits(a);
  if (rows == 0) return;
  const Partials partials(a.workspace, rows, splits, a.kv.D);
  with_dtype("decode", a.kv.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (splits > 0) launch_splits<T>(a, partials, stream);
    const int shared = shared_bytes({kMaxSplits * int(sizeof(float))});
    launch("decode", combine_kernel<T>, rows, kThreads, shared, stream, a, partials);
  });
}

}  // namespace lserve::cuda
