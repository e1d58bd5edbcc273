// Host twin of csrc/cuda/ptx.cuh: the same names and signatures on simt.h's machine.
#pragma once
#include <cuda_runtime.h>

class SharedMemory {
 public:
  template <typename T>
  T* take(int count) {
    offset_ = (offset_ + 127) / 128 * 128;
    auto* array = static_cast<T*>(simt::shared_array(offset_, count * sizeof(T)));
    offset_ += count * sizeof(T);
    return array;
  }

 private:
  size_t offset_ = 0;
};

namespace simt {
SIMT_UNCOUNTED inline void touch(const void* p) {  // lets the sanitizers see a read of 16 bytes
  for (int i = 0; i < 4; ++i) (void)static_cast<const volatile uint32_t*>(p)[i];
}
}  // namespace simt

SIMT_UNCOUNTED inline void check_copy(const void* to, const void* from, bool pred, simt::Site site) {
  if ((uintptr_t)to % 16 || (pred && (uintptr_t)from % 16)) simt::fail(site, "addresses must be 16-byte aligned");
  if (pred && simt::is_shared(from, 16)) simt::fail(site, "the source lies in shared memory");
  *(uint4*)to = make_uint4(~0u, ~0u, ~0u, ~0u);  // until the wait: NaN; also the sanitizers' check of `to`
  if (pred) simt::touch(from);
}
inline void cp_async_16(void* to, const void* from, bool pred = true, SIMT_HERE) {
  check_copy(to, from, pred, SIMT_SITE("cp_async_16"));
  if (!simt::is_shared(to, 16)) simt::fail(SIMT_SITE("cp_async_16"), "the destination is not one shared array");
  simt::async_issue({to, from, 16, pred ? 16u : 0u});
}
inline void cp_async_commit() { simt::async_commit(); }
inline void prefetch(const void*) {}
template <int kKeep>
SIMT_UNCOUNTED void cp_async_wait() {
  simt::Copy copy;
  while (simt::async_complete(kKeep, &copy)) *(uint4*)copy.to = copy.read ? *(const uint4*)copy.from : uint4{0, 0, 0, 0};
}

namespace simt {
template <bool kTranspose>
SIMT_UNCOUNTED void ldmatrix(uint32_t (&r)[4], const void* row, Site site) {
  if ((uintptr_t)row % 16) fail(site, "row addresses must be 16-byte aligned");
  if (!is_shared(row, 16)) touch(row), fail(site, "the row is not in one shared array");
  Matrices m{row, {}};
  warp_operation(~0u, &m, run_ldmatrix, site);
  int lane = lane_id();
  for (int i = 0; i < 4; ++i) {
    if (!kTranspose) {
      r[i] = static_cast<const uint32_t*>(m.rows[8 * i + lane / 4])[lane % 4];
    } else {
      uint32_t low = static_cast<const uint16_t*>(m.rows[8 * i + lane % 4 * 2])[lane / 4];
      uint32_t high = static_cast<const uint16_t*>(m.rows[8 * i + lane % 4 * 2 + 1])[lane / 4];
      r[i] = high << 16 | low;
    }
  }
}
}  // namespace simt
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_HERE) {
  simt::ldmatrix<false>(r, row, SIMT_SITE("ldmatrix_x4"));
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SIMT_HERE) {
  simt::ldmatrix<true>(r, row, SIMT_SITE("ldmatrix_x4_trans"));
}

inline uint32_t transpose_8x8(uint32_t pair) {
  const int lane = threadIdx.x % 32, shift = lane / 4 % 2 * 16;
  uint32_t both = 0;
  for (int i = 0; i < 2; ++i) both |= (__shfl_sync(~0u, pair, (lane % 4 * 2 + i) * 4 + lane / 8) >> shift & 0xffff) << 16 * i;
  return both;
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE) {
  const uint32_t b[2] = {b0, b1};
  simt::Mma m{d, a, b, d};
  simt::warp_operation(~0u, &m, std::is_same_v<T, __half> ? simt::run_mma_f16 : simt::run_mma_bf16, SIMT_SITE("mma_m16n8k16"));
}
inline void join_stream() { simt::join_stream(); }
inline float log2_approx(float x) { return std::log2(x); }
inline float exp2_approx(float x) { return std::exp2(x); }
