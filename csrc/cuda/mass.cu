#include "cuda/mass.cuh"

#include "cuda/launch.h"

namespace lserve::cuda {

void attention_mass(const MassArgs& a, void* stream) {
  const int64_t tokens = a.kv.M * a.kv.P;
  if (tokens == 0 || a.kv.B == 0 || a.kv.H == 0) return;
  const dim3 grid((tokens + kKeys - 1) / kKeys, a.kv.H, a.kv.B);
  const int keys = kKeys * static_cast<int>(a.kv.D + 1) * sizeof(float);
  const int shared = shared_bytes({keys, kMassQueries * kMaxChannels * int(sizeof(float)), kThreads * int(sizeof(float))});
  with_dtype("attention_mass", a.kv.dtype,
             [&](auto zero) { launch("attention_mass", mass_kernel<decltype(zero)>, grid, kThreads, shared, stream, a); });
}

}  // namespace lserve::cuda
