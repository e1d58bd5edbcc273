#include "cuda/sm90/prefill.cuh"

#include "cuda/dispatch.h"
#include "cuda/sm90/prefill.h"

namespace lserve::cuda::sm90 {
namespace {

template <typename T, int kD, bool kInt8>
void launch_tiles(const PrefillArgs& a, void* stream) {
  const dim3 grid(query_tiles(a), a.kv.H * ((a.G + kHeads - 1) / kHeads));
  launch("prefill", prefill_kernel<T, kD, kInt8>, grid, Roles<kInt8>::kThreads, PrefillMemory<T, kD, kInt8>::kBytes, stream, a);
}

template <typename T, int kD>
void launch_tiles(const PrefillArgs& a, void* stream) {
  if (a.kv.kv_dtype == Dtype::u8) launch_tiles<T, kD, true>(a, stream);
  else launch_tiles<T, kD, false>(a, stream);
}

}  // namespace

// A head that shares its keys with no other would leave half of a block idle. Accumulators of more than 128 channels would
// leave no registers.
bool prefill(const PrefillArgs& a, void* stream) {
  if (a.G == 1 || device_attribute("prefill", cudaDevAttrComputeCapabilityMajor) != 9) return false;
  bool done = false;
  with_dtype("prefill", a.kv.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, float>) {
      const bool aligned = rows_aligned<T>(a.q) && rows_aligned<T>(a.k) && rows_aligned<T>(a.v) && rows_aligned<T>(a.kv);
      done = aligned && a.scale > 0 && (a.kv.D <= 64 || (a.kv.D > 96 && a.kv.D <= 128));
      if (done && a.kv.D <= 64) launch_tiles<T, 64>(a, stream);
      else if (done) launch_tiles<T, 128>(a, stream);
    }
  });
  return done;
}

}  // namespace lserve::cuda::sm90
