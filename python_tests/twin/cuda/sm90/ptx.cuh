// Host twin of csrc/cuda/sm90/ptx.cuh. Products are taken where the kernel waits for them, and not before: who changes an
// operand too early, or reads a result, finds out.
#pragma once
#include "../ptx.cuh"

namespace lserve::cuda::sm90 {

inline void fence_for_wgmma() {}

template <typename T, bool kRows>
SIMT_UNCOUNTED void multiply(const simt::Product& p) {
  const uint32_t a[4] = {p.a[0], p.a[1], p.a[2], p.a[3]};
  for (int n = 0; n < 8; ++n) {
    uint16_t fragment[4];
    for (int j = 0; j < 4; ++j) {
      const int k = simt::lane_id() % 4 * 2 + j / 2 * 8 + j % 2, column = n * 8 + simt::lane_id() / 4;
      uintptr_t element = (uintptr_t)p.b + (kRows ? k * 128 + column * 2 : column * 128 + k * 2);
      element ^= (element >> 7 & 7) << 4;
      if (!simt::is_shared((const void*)element, 2)) simt::fail(p.site, "the matrix is not in shared memory");
      memcpy(fragment + j, (const void*)element, 2);
    }
    uint32_t words[2];
    memcpy(words, fragment, sizeof(words));
    float (&d)[4] = p.d[n];
    if (!p.add)
      for (float& x : d) x = 0;
    mma_m16n8k16<T>(d, a, words[0], words[1], p.site.file, p.site.line);
  }
}

template <typename T>
struct Panels {
  const T* first;

  explicit Panels(const T* data) : first(data) {}
};

template <typename T, bool kRows, int N>
void wgmma_m64n64k16(float (&d)[N][4], int i, const uint32_t (&a)[4], Panels<T> b, int element, bool add, SIMT_HERE) {
  const simt::Site site = SIMT_SITE("wgmma");
  if ((uintptr_t)b.first % 1024) simt::fail(site, "panels must start at multiples of 1024 bytes");
  if (element % 8) simt::fail(site, "addresses must be 16-byte aligned");
  simt::product_issue({d + i, a, b.first + element, add, site, multiply<T, kRows>});
}

inline void fence_registers() {}
template <typename Registers>
void pin(Registers&) {}

inline void compute_first(float) {}
inline void commit_wgmma() { simt::product_commit(); }

template <int keep>
void wait_wgmma() {
  simt::Product product;
  while (simt::product_complete(keep, &product)) product.run(product);
}

inline void mbarrier_init(uint64_t* barrier, int arrivals, SIMT_HERE) {
  simt::mbarrier_init(barrier, arrivals, SIMT_SITE("mbarrier_init"));
}
inline void mbarrier_arrive(uint64_t* barrier, SIMT_HERE) { simt::mbarrier_arrive(barrier, SIMT_SITE("mbarrier_arrive")); }
inline void mbarrier_wait(uint64_t* barrier, int parity, SIMT_HERE) {
  simt::mbarrier_wait(barrier, parity, SIMT_SITE("mbarrier_wait"));
}

inline void sync_threads(int id, int threads, SIMT_HERE) { simt::barrier(id, threads, SIMT_SITE("sync_threads")); }
inline bool sync_threads_or(int id, int threads, bool x, SIMT_HERE) {
  static bool any[16];  // a block at a time
  const simt::Site site = SIMT_SITE("sync_threads_or");
  if (x) __atomic_store_n(any + id, true, __ATOMIC_RELAXED);
  simt::barrier(id, threads, site);
  const bool result = __atomic_load_n(any + id, __ATOMIC_RELAXED);
  simt::barrier(id, threads, site);
  __atomic_store_n(any + id, false, __ATOMIC_RELAXED);
  simt::barrier(id, threads, site);
  return result;
}

template <int registers>
void give_registers() {}
template <int registers>
void take_registers() {}

}  // namespace lserve::cuda::sm90
