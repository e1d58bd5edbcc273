#include "cuda/sm90/prefill.cuh"

#include "cuda/sm90/prefill.h"
#include "cuda/tiles.h"

namespace lserve::cuda::sm90 {
namespace {

template <typename T, int kD, bool kInt8, int kHeads>
void launch_tiles(const PrefillArgs& a, void* stream) {
  using Rings = PrefillRings<T, kD, kHeads>;
  const dim3 grid(query_tiles(a), a.kv.H * ((a.G + kHeads - 1) / kHeads));
  const int shared = shared_bytes({Rings::template kData<kInt8>, Rings::kTables * int(sizeof(KeyTable))});
  launch("prefill", prefill_kernel<T, kD, kInt8, kHeads>, grid, kHeads * kWarpgroup, shared, stream, a);
}

template <typename T, int kD>
void launch_tiles(const PrefillArgs& a, void* stream) {
  const bool int8 = a.kv.kv_dtype == Dtype::u8, pairs = a.G % 2 == 0;
  if (int8 && pairs) return launch_tiles<T, kD, true, 2>(a, stream);
  if (int8) return launch_tiles<T, kD, true, 1>(a, stream);
  if (pairs) return launch_tiles<T, kD, false, 2>(a, stream);
  launch_tiles<T, kD, false, 1>(a, stream);
}

}  // namespace

// Accumulators of more than 128 channels would leave no registers.
bool prefill(const PrefillArgs& a, void* stream) {
  if (device_attribute("prefill", cudaDevAttrComputeCapabilityMajor) != 9) return false;
  bool done = false;
  with_dtype("prefill", a.kv.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, float>) {
      const bool aligned = rows_aligned<T>(a.q) && rows_aligned<T>(a.k) && rows_aligned<T>(a.v) && rows_aligned<T>(a.kv);
      done = aligned && (a.kv.D <= 64 || (a.kv.D > 96 && a.kv.D <= 128));
      if (done && a.kv.D <= 64) launch_tiles<T, 64>(a, stream);
      else if (done) launch_tiles<T, 128>(a, stream);
    }
  });
  return done;
}

}  // namespace lserve::cuda::sm90
