#include "cuda/pages.cuh"

#include <algorithm>

#include "cuda/dispatch.h"

namespace lserve::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of threads that keep a link to host memory busy without taking the GPU from others, or a GPU's own memory.
constexpr int64_t kHostBlocks = 32, kDeviceBlocks = 1024;

bool on_host(const char* name, const void* pointer) {
  cudaPointerAttributes attributes{};
  check("gather_pages", cudaPointerGetAttributes(&attributes, pointer));
  if (attributes.type == cudaMemoryTypeUnregistered)
    throw std::runtime_error(std::string("lserve_ext::gather_pages: ") + name +
                             ": expected device memory or pinned host memory, got pageable host memory");
  return attributes.type == cudaMemoryTypeHost;
}

template <bool kMoments>
void stats_of_groups(const char* op, const PageStatsArgs& a, void* stream) {
  if (a.pages == 0) return;
  with_dtype(op, a.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_vectors<T>(rows_aligned<T>(a.k) && rows_aligned(a.stats, sizeof(T), {}), [&](auto N) {
      const int64_t rows = a.pages * (a.P / a.L), parts = a.D / N;
      const int64_t rows_a_block = std::min(rows, std::max<int64_t>(256 / parts, 1));
      launch(op, page_stats_kernel<T, N, kMoments>, ceil_div(rows, rows_a_block), dim3(parts, rows_a_block), stream, a);
    });
  });
}

}  // namespace

void page_stats(const PageStatsArgs& a, void* stream) { stats_of_groups<false>("page_stats", a, stream); }

void page_moments(const PageStatsArgs& a, void* stream) { stats_of_groups<true>("page_moments", a, stream); }

void quantize_kv(const QuantizeArgs& a, void* stream) {
  if (a.pages == 0) return;
  with_dtype("quantize_kv", a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = rows_aligned<T>(a.k) && rows_aligned<T>(a.v) && rows_aligned(a.stats, sizeof(T), {}) &&
                         rows_aligned(a.k_codes, 1, {}) && rows_aligned(a.v_codes, 1, {});
    with_vectors<T>(aligned, [&](auto N) { launch("quantize_kv", quantize_kernel<T, N>, a.pages, kPageThreads, stream, a); });
  });
}

void dequantize_kv(const DequantizeArgs& a, void* stream) {
  if (a.pages == 0) return;
  with_dtype("dequantize_kv", a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = rows_aligned(a.k_codes, 1, {}) && rows_aligned(a.v_codes, 1, {}) &&
                         rows_aligned(a.stats, sizeof(T), {}) && rows_aligned(a.k, 1, {}) && rows_aligned(a.v, 1, {});
    with_vectors<T>(aligned,
                    [&](auto N) { launch("dequantize_kv", dequantize_kernel<T, N>, a.pages, kPageThreads, stream, a); });
  });
}

void append_kv(const AppendArgs& a, void* stream) {
  if (a.N == 0 || a.kv.B == 0 || a.kv.H == 0) return;
  const int64_t blocks = append_blocks_before(a.kv.B, a.N, static_cast<int>(a.kv.P));
  with_dtype("append_kv", a.kv.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = rows_aligned<T>(a.k) && rows_aligned<T>(a.v) && rows_aligned<T>(a.kv) &&
                         rows_aligned(a.moments, sizeof(T), {a.moments_stride});
    with_vectors<T>(aligned, [&](auto N) {
      if (a.kv.residual_k) return launch("append_kv", append_kernel<T, N>, dim3(blocks, a.kv.H), kPageThreads, stream, a);
      const int64_t threads = 2 * a.N * threads_a_row<N>(a.kv);
      launch("append_kv", write_rows_kernel<T, N>, dim3(ceil_div(threads, kPageThreads), a.kv.H), kPageThreads, stream, a);
    });
  });
}

void gather_pages(const GatherArgs& a, void* stream) {
  if (a.count == 0 || a.bytes == 0 || a.src_rows == 0 || a.dst_rows == 0) return;
  const bool host = on_host("src", a.src) | on_host("dst", a.dst);
  const bool vectors = rows_aligned(a.src, 1, {a.src_stride, a.bytes}) && rows_aligned(a.dst, 1, {a.dst_stride});
  const int64_t parts = a.count * a.bytes / (vectors ? 16 : 1);
  const int64_t blocks = std::min(ceil_div(parts, 256), host ? kHostBlocks : kDeviceBlocks);
  if (vectors) launch("gather_pages", gather_kernel<uint4>, blocks, 256, stream, a);
  else launch("gather_pages", gather_kernel<uint8_t>, blocks, 256, stream, a);
}

}  // namespace lserve::cuda
