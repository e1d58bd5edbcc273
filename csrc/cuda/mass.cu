#include "cuda/mass.cuh"

#include "cuda/dispatch.h"

namespace lserve::cuda {

void attention_mass(const MassArgs& a, void* stream) {
  const int64_t tokens = a.kv.M * a.kv.P;
  if (tokens == 0 || a.kv.B == 0 || a.kv.H == 0) return;
  const dim3 grid((tokens + kKeys - 1) / kKeys, a.kv.H, a.kv.B);
  const bool int8 = a.kv.kv_dtype == Dtype::u8;
  const int keys = kKeys * static_cast<int>(a.kv.D + 1) * sizeof(float);
  const int shared = shared_bytes({keys, kMassQueries * kMaxChannels * int(sizeof(float)), kThreads * int(sizeof(float))});
  with_dtype("attention_mass", a.kv.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, float>) {
      if (rows_aligned<T>(a.q) && rows_aligned<T>(a.kv)) {
        return with_head_dim(a.kv.D, [&](auto kD) {
          const int rows = SmemTile<T, kD>::kStride * sizeof(T);
          const int tiles = shared_bytes({kKeys * rows, 2 * kMassRows * rows, int(sizeof(MassKeys)),
                                          2 * kThreads * int(sizeof(MassRow)), 2 * kThreads * int(sizeof(const T*))});
          const auto kernel = int8 ? mass_kernel<T, kD, true> : mass_kernel<T, kD, false>;
          launch("attention_mass", kernel, grid, kThreads, tiles, stream, a);
        });
      }
    }
    launch("attention_mass", general_mass_kernel<T>, grid, kThreads, shared, stream, a);
  });
}

}  // namespace lserve::cuda
