#include "cuda/prefill.cuh"

#include "cuda/sm90/prefill.h"
#include "cuda/tiles.h"

namespace lserve::cuda {
namespace {

template <typename T, int kD, bool kInt8>
void launch_tiles(const PrefillArgs& a, void* stream) {
  const dim3 grid(query_tiles(a), a.kv.H * a.G);
  launch("prefill", prefill_kernel<T, kD, kInt8>, grid, kThreads, PrefillMemory<T, kD, kInt8>::kBytes, stream, a);
}

template <typename T>
void launch_prefill(const PrefillArgs& a, void* stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (rows_aligned<T>(a.q) && rows_aligned<T>(a.k) && rows_aligned<T>(a.v) && rows_aligned<T>(a.kv)) {
      return with_head_dim(a.kv.D, [&](auto kD) {
        if (a.kv.kv_dtype == Dtype::u8) return launch_tiles<T, kD, true>(a, stream);
        return launch_tiles<T, kD, false>(a, stream);
      });
    }
  }
  const int64_t warps = kThreads / 32;
  const dim3 grid((a.Nq + warps - 1) / warps, a.kv.H * a.G);
  launch("prefill", general_prefill_kernel<T>, grid, kThreads, shared_bytes({kQueryBytes}), stream, a);
}

}  // namespace

void prefill(const PrefillArgs& a, void* stream) {
  if (a.Nq == 0 || a.kv.H == 0) return;
#ifdef LSERVE_SM90
  if (sm90::prefill(a, stream)) return;
#endif
  with_dtype("prefill", a.kv.dtype, [&](auto zero) { launch_prefill<decltype(zero)>(a, stream); });
}

}  // namespace lserve::cuda
