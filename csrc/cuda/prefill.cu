#include "cuda/prefill.cuh"

#include <algorithm>

#include "cuda/dispatch.h"
#include "cuda/sm90/prefill.h"
#include "cuda/split_prefill.cuh"

namespace lserve::cuda {
namespace {

template <typename T, int kD, bool kInt8>
void launch_tiles(const PrefillArgs& a, void* stream) {
  const dim3 grid(query_tiles(a), a.kv.H * a.G);
  launch("prefill", prefill_kernel<T, kD, kInt8>, grid, kThreads, PrefillMemory<T, kD, kInt8>::kBytes, stream, a);
}

template <typename T, int kD, bool kInt8>
void launch_splits(const PrefillArgs& a, const Partials& partials, void* stream) {
  const dim3 grid(a.kv.H * split_tiles(a), a.kv.B, partials.splits);
  const int shared = PrefillMemory<T, kD, kInt8>::kBytes;
  launch("prefill", split_prefill_kernel<T, kD, kInt8>, grid, kThreads, shared, stream, a, partials);
}

// Whether tiles can take the call. Their softmax looks for the largest product before it is scaled.
template <typename T>
bool fits_tiles(const PrefillArgs& a) {
  return !std::is_same_v<T, float> && a.scale > 0 && rows_aligned<T>(a.q) && rows_aligned<T>(a.k) && rows_aligned<T>(a.v) &&
         rows_aligned<T>(a.kv);
}

// Calls body with head dimension and kind of pools.
template <typename Body>
void with_pools(const PrefillArgs& a, Body body) {
  with_head_dim(a.kv.D, [&](auto kD) {
    if (a.kv.kv_dtype == Dtype::u8) return body(kD, std::true_type{});
    return body(kD, std::false_type{});
  });
}

template <typename T>
void launch_prefill(const PrefillArgs& a, void* stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (fits_tiles<T>(a)) return with_pools(a, [&](auto kD, auto kInt8) { launch_tiles<T, kD, kInt8>(a, stream); });
  }
  const int64_t warps = kThreads / 32;
  const dim3 grid((a.Nq + warps - 1) / warps, a.kv.H * a.G);
  launch("prefill", general_prefill_kernel<T>, grid, kThreads, shared_bytes({kQueryBytes}), stream, a);
}

// Splits of the longest sequence that the tables allow, with all new tokens.
int64_t max_splits(const PrefillArgs& a) {
  return std::min<int64_t>((a.kv.M * a.kv.P + a.Nk + kSplitChunk - 1) / kSplitChunk, kPrefillSplits);
}

// Sequences of few queries, and their results.
template <typename T>
void launch_split_prefill(const PrefillArgs& a, void* stream) {
  const int64_t rows = SplitQueries::rows(a) * a.kv.H * a.G;
  const Partials partials(a.workspace, rows, max_splits(a), a.kv.D);
  with_pools(a, [&](auto kD, auto kInt8) { launch_splits<T, kD, kInt8>(a, partials, stream); });
  const int shared = shared_bytes({kPrefillSplits * int(sizeof(float))});
  launch("prefill", join_prefill_kernel<T>, rows, kThreads, shared, stream, a, partials);
}

}  // namespace

// None where no sequence has few queries over a cache, or no tile can take them.
int64_t prefill_workspace(const PrefillArgs& a) {
  if (a.Nq == 0 || a.kv.H == 0 || !a.context_lens || a.G > kSplitHeads || (a.kv.B == 1 && a.Nq > kSplitQueries)) return 0;
  bool fits = false;
  with_dtype("prefill", a.kv.dtype, [&](auto zero) { fits = fits_tiles<decltype(zero)>(a); });
  if (!fits) return 0;
  return SplitQueries::rows(a) * a.kv.H * a.G * Partials::size(max_splits(a), a.kv.D);
}

void prefill(const PrefillArgs& a, void* stream) {
  if (a.Nq == 0 || a.kv.H == 0) return;
  if (a.workspace) {
    with_dtype("prefill", a.kv.dtype, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (!std::is_same_v<T, float>) launch_split_prefill<T>(a, stream);
    });
    if (a.Nq <= kSplitQueries) return;  // no sequence has more
  }
#ifdef LSERVE_SM90
  if (sm90::prefill(a, stream)) return;
#endif
  with_dtype("prefill", a.kv.dtype, [&](auto zero) { launch_prefill<decltype(zero)>(a, stream); });
}

}  // namespace lserve::cuda
