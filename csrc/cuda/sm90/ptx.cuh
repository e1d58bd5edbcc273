// Products by the four warps of a warpgroup together, and how warpgroups wait for each other, on sm_90a alone.
#pragma once
#include "cuda/ptx.cuh"

namespace lserve::cuda::sm90 {

// What this thread has written into shared memory becomes visible to wgmma: before the barrier between them.
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// The 32 registers of a thread's d, from d[i] on.
#define LSERVE_SUMS(d, i)                                                                                               \
  "+f"(d[i + 0][0]), "+f"(d[i + 0][1]), "+f"(d[i + 0][2]), "+f"(d[i + 0][3]), "+f"(d[i + 1][0]), "+f"(d[i + 1][1]),     \
      "+f"(d[i + 1][2]), "+f"(d[i + 1][3]), "+f"(d[i + 2][0]), "+f"(d[i + 2][1]), "+f"(d[i + 2][2]), "+f"(d[i + 2][3]), \
      "+f"(d[i + 3][0]), "+f"(d[i + 3][1]), "+f"(d[i + 3][2]), "+f"(d[i + 3][3]), "+f"(d[i + 4][0]), "+f"(d[i + 4][1]), \
      "+f"(d[i + 4][2]), "+f"(d[i + 4][3]), "+f"(d[i + 5][0]), "+f"(d[i + 5][1]), "+f"(d[i + 5][2]), "+f"(d[i + 5][3]), \
      "+f"(d[i + 6][0]), "+f"(d[i + 6][1]), "+f"(d[i + 6][2]), "+f"(d[i + 6][3]), "+f"(d[i + 7][0]), "+f"(d[i + 7][1]), \
      "+f"(d[i + 7][2]), "+f"(d[i + 7][3])

// Panels that follow each other in shared memory, from a multiple of 1024 bytes on: 64 rows of 64 elements each.
template <typename T>
struct Panels {
  uint32_t first;  // the lower half of a descriptor

  __device__ __forceinline__ explicit Panels(const T* data)
      : first(uint32_t{1} << 16 | (shared_address(data) & 0x3ffff) >> 4) {}
};

// d [64, 64] = a [64, 16] b [16, 64], or with `add` += : of each warp 16 rows, d[i + n] being the fragment of mma_m16n8k16
// for columns 8 n and on. b lies in a panel whose 16-byte chunks are permuted within a row, chunk c of row r at c ^ r % 8.
// kRows: b's rows lie in 16 of a panel's rows, and `element` is the first; else its columns lie in all 64, 16 elements of
// each, and `element` is the first of the first row as if nothing were permuted.
//
// It runs in the background, from commit_wgmma on; until wait_wgmma nobody touches a or d.
template <typename T, bool kRows, int N>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[N][4], int i, const uint32_t (&a)[4], Panels<T> b, int element,
                                                bool add) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  const uint64_t matrix = kSwizzle128 | kEightRows | (b.first + element * int(sizeof(T)) / 16);
#define LSERVE_WGMMA(type)                                                 \
  asm volatile(                                                            \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                     \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type          \
      " "                                                                  \
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"            \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, " \
      "{%32,%33,%34,%35}, %36, add, 1, 1, %38;\n}\n"                       \
      : LSERVE_SUMS(d, i)                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix), "r"(static_cast<int>(add)), "n"(static_cast<int>(kRows)))
  if constexpr (std::is_same_v<T, __half>) LSERVE_WGMMA("f16");
  else LSERVE_WGMMA("bf16");
#undef LSERVE_WGMMA
}

// Before the first product that reads or adds to registers which this thread has written. Naming them keeps the compiler,
// too, from writing them later.
__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void pin(float (&d)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i += 8) asm volatile("" : LSERVE_SUMS(d, i)::"memory");
}
template <int N>
__device__ __forceinline__ void pin(uint32_t (&a)[N][4]) {
#pragma unroll
  for (auto& x : a) asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])::"memory");
}

// Has the compiler compute x, which is not negative, before what follows: it would wait first and compute then. It leaves
// the order alone across a branch that something could depend on.
__device__ __forceinline__ void compute_first(float x) {
  if (x < 0) __nanosleep(0);
}

__device__ __forceinline__ void commit_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits for all but the newest `keep` groups.
template <int keep>
__device__ __forceinline__ void wait_wgmma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(keep) : "memory");
}
#undef LSERVE_SUMS

// ---- barriers in shared memory. A phase ends with the last arrival; phases are told apart by their parity, 0 first.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
// Waits for the end of a phase of this parity. The phase before the first one counts as ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@done bra ended;\nbra "
      "again;\nended:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- some of a block's threads. id: 1 to 15

__device__ __forceinline__ void sync_threads(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ bool sync_threads_or(int id, int threads, bool x) {
  int any;
  asm volatile("{\n.reg .pred in, out;\nsetp.ne.b32 in, %3, 0;\nbar.red.or.pred out, %1, %2, in;\nselp.b32 %0, 1, 0, out;\n}\n"
               : "=r"(any)
               : "r"(id), "r"(threads), "r"(static_cast<int>(x))
               : "memory");
  return any;
}

// The warpgroup gives registers back, or gets some: a multiple of 8.
template <int registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(registers));
}

}  // namespace lserve::cuda::sm90
