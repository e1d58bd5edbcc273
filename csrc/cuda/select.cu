#include "cuda/select.cuh"

#include <algorithm>

#include "cuda/dispatch.h"

namespace lserve::cuda {
namespace {

template <typename T, int kD>
void launch_page_scores(const PageScoresArgs& a, void* stream) {
  const int64_t pages = std::max<int64_t>(kScoreGroups / a.groups, 1);
  const dim3 grid((a.M + pages - 1) / pages, a.H, a.B);
  const int shared = shared_bytes({kScoreGroups * int(sizeof(int32_t)), kScoreGroups * int(sizeof(uint32_t)),
                                   kScoreStages * kD / 16 * kScoreThreads * int(sizeof(Channels))});
  launch("page_scores", page_scores_kernel<T, kD>, grid, kScoreThreads, shared, stream, a, pages);
}

template <typename T>
void launch_plain_page_scores(const PageScoresArgs& a, void* stream) {
  const int64_t pages = kScoreThreads / 32;
  const dim3 grid((a.M + pages - 1) / pages, a.H, a.B);
  launch("page_scores", plain_page_scores_kernel<T>, grid, kScoreThreads, stream, a);
}

template <typename Args>
void launch_select(const char* op, const Args& a, void* stream) {
  if (a.B == 0 || a.H == 0) return;
  const int shared = shared_bytes({4 * kBins * int(sizeof(int)), int(sizeof(Cut)), kSelectWarps * int(sizeof(int2))});
  launch(op, select_kernel<Args>, dim3(a.H, a.B), kSelectThreads, shared, stream, a);
}

}  // namespace

void page_scores(const PageScoresArgs& a, void* stream) {
  if (a.B == 0 || a.H == 0 || a.M == 0) return;
  with_dtype("page_scores", a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, float>) {
      if (rows_aligned<T>(a.q) && rows_aligned(a.stats, sizeof(T), {a.stats_stride}))
        return with_head_dim(a.D, [&](auto kD) { launch_page_scores<T, kD>(a, stream); });
    }
    launch_plain_page_scores<T>(a, stream);
  });
}

void select_pages(const SelectPagesArgs& a, void* stream) { launch_select("select_pages", a, stream); }

void select_tokens(const SelectTokensArgs& a, void* stream) { launch_select("select_tokens", a, stream); }

}  // namespace lserve::cuda
