#include "cuda/merge.cuh"

#include "cuda/dispatch.h"

namespace lserve::cuda {

void merge_states(const MergeArgs& a, void* stream) {
  if (a.rows == 0) return;
  with_dtype("merge_states", a.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_vectors<T>(rows_aligned(a.out_a, 1, {}) && rows_aligned(a.out_b, 1, {}) && rows_aligned(a.out, 1, {}), [&](auto N) {
      const int64_t threads = a.rows * (a.D / N);
      launch("merge_states", merge_kernel<T, N>, (threads + kThreads - 1) / kThreads, kThreads, stream, a);
    });
  });
}

}  // namespace lserve::cuda
