#include "cuda/resolve.cuh"

#include "cuda/launch.h"

namespace lserve::cuda {

void wanted_pages(const WantedArgs& a, void* stream) {
  if (a.B == 0 || a.H == 0) return;
  const int shared = shared_bytes({kSelectWarps * int(sizeof(int2)), int(sizeof(int))});
  launch("wanted_pages", wanted_kernel, dim3(a.H, a.B), kSelectThreads, shared, stream, a);
}

void resolve_pages(const ResolveArgs& a, void* stream) {
  const int sums = kSelectWarps * int(sizeof(int2));
  const int shared = shared_bytes({sums, int(sizeof(int)), 4 * kBins * int(sizeof(int)), int(sizeof(Cut)), sums});
  launch("resolve_pages", resolve_kernel, 1, kSelectThreads, shared, stream, a);
}

}  // namespace lserve::cuda
