#include "cuda/resolve.cuh"

#include "cuda/launch.h"

namespace lserve::cuda {

void resolve_pages(const ResolveArgs& a, void* stream) {
  if (a.B == 0 || a.H == 0) return;
  const int slots = static_cast<int>(a.S * sizeof(int));
  const int shared = shared_bytes({kResolveWarps * int(sizeof(int)), slots, slots});
  launch("resolve_pages", resolve_kernel, dim3(a.H, a.B), kResolveThreads, shared, stream, a);
}

}  // namespace lserve::cuda
