#include "cuda/pages.cuh"

#include <algorithm>

#include "cuda/launch.h"

namespace lserve::cuda {
namespace {

constexpr int64_t kThreads = 256;

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// N channels a thread: 16 bytes where every row starts at a multiple of 16, else one.
template <typename T, int N>
void launch_page_stats(const PageStatsArgs& a, void* stream) {
  const int64_t groups = a.P / a.L, parts = a.D / N, rows = a.pages * groups;
  const int64_t rows_a_block = std::min(rows, std::max<int64_t>(kThreads / parts, 1));
  const dim3 grid((rows + rows_a_block - 1) / rows_a_block), block(parts, rows_a_block);
  launch("page_stats", page_stats_kernel<T, N>, grid, block, stream, static_cast<const T*>(a.k.data),
         static_cast<T*>(a.stats), a.k.stride0, a.k.stride1, a.pages, groups, a.L, a.D);
}

}  // namespace

void page_stats(const PageStatsArgs& a, void* stream) {
  if (a.pages == 0) return;
  with_dtype("page_stats", a.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = 16 / sizeof(T);
    const bool vectors = a.D % N == 0 && a.k.stride0 % N == 0 && a.k.stride1 % N == 0 && aligned(a.k.data, 16) &&
                         aligned(a.stats, 16);
    return vectors ? launch_page_stats<T, N>(a, stream) : launch_page_stats<T, 1>(a, stream);
  });
}

}  // namespace lserve::cuda
