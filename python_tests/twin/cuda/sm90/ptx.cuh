// Host twin of csrc/cuda/sm90/ptx.cuh. Products are taken where the kernel waits for them, and not before: who changes an
// operand too early, or reads a result, finds out.
#pragma once
#include <deque>
#include <functional>
#include <vector>

#include "../ptx.cuh"

namespace simt {
using Products = std::vector<std::function<void()>>;
// Of every thread of the block: groups that have been committed, and at the end the one that has not.
inline std::deque<Products>& wgmma_groups() {
  static std::deque<Products> groups[1024];
  auto& own = groups[threadIdx.x];
  if (own.empty()) own.emplace_back();
  return own;
}
}  // namespace simt

namespace lserve::cuda::sm90 {

inline void fence_for_wgmma() {}

template <typename T, bool kRows, int N>
void wgmma_m64n64k16(float (&d)[N][4], int i, const uint32_t (&a)[4], const T* b, bool add, SIMT_HERE) {
  const simt::Site site = SIMT_SITE("wgmma");
  if ((uintptr_t)b % 16) simt::fail(site, "addresses must be 16-byte aligned");
  simt::wgmma_groups().back().push_back([=, &d, &a] {
    for (int n = 0; n < 8; ++n) {
      uint16_t fragment[4];
      for (int j = 0; j < 4; ++j) {
        const int k = simt::lane_id() % 4 * 2 + j / 2 * 8 + j % 2, column = n * 8 + simt::lane_id() / 4;
        uintptr_t element = (uintptr_t)b + (kRows ? k * 128 + column * 2 : column * 128 + k * 2);
        element ^= (element >> 7 & 7) << 4;
        if (!simt::is_shared((const void*)element, 2)) simt::fail(site, "the matrix is not in shared memory");
        memcpy(fragment + j, (const void*)element, 2);
      }
      uint32_t words[2];
      memcpy(words, fragment, sizeof(words));
      if (!add)
        for (float& x : d[i + n]) x = 0;
      mma_m16n8k16<T>(d[i + n], a, words[0], words[1], site.file, site.line);
    }
  });
}

inline void fence_registers() {}
template <typename Registers>
void pin(Registers&) {}

inline void compute_first(float) {}
inline void commit_wgmma() { simt::wgmma_groups().emplace_back(); }

template <int keep>
void wait_wgmma() {
  auto& groups = simt::wgmma_groups();
  while (groups.size() > keep + 1) {
    const simt::Products products = std::move(groups.front());  // other threads' turns may come meanwhile
    groups.pop_front();
    for (const auto& product : products) product();
  }
}

inline void mbarrier_init(uint64_t* barrier, int arrivals, SIMT_HERE) {
  simt::mbarrier_init(barrier, arrivals, SIMT_SITE("mbarrier_init"));
}
inline void mbarrier_arrive(uint64_t* barrier, SIMT_HERE) { simt::mbarrier_arrive(barrier, 0, SIMT_SITE("mbarrier_arrive")); }
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
