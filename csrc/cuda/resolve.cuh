// Which slot a page lies in, where there are fewer slots than pages: the least recently used ones make room.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "cuda/select.cuh"
#include "kernels.h"

namespace lserve::cuda {

// What an entry of a list wants.
struct Wanted {
  int block = -1;
  int32_t* slot = nullptr;  // in the table

  __device__ Wanted(const ResolveArgs& a, int64_t entry) {
    const int64_t b = entry / a.K / a.H, h = entry / a.K % a.H;
    const int32_t page = a.lists[b * a.list_stride0 + h * a.list_stride1 + entry % a.K];
    if (page < 0) return;
    block = a.block_table[b * a.block_stride0 + h * a.block_stride1 + page];
    slot = a.slot_table + b * a.slot_stride0 + h * a.slot_stride1 + page;
  }
  __device__ bool is_hit(const ResolveArgs& a) const { return slot && *slot >= 0 && a.slot_blocks[*slot] == block; }
  __device__ bool is_miss(const ResolveArgs& a) const { return slot && !is_hit(a); }
};

// One block of threads: all entries choose from the same slots. First, slots that are wanted are marked, and misses
// counted; each warp has a part of the entries. Then as many victims are picked, and the misses share them in order.
__global__ void __launch_bounds__(kSelectThreads) resolve_kernel(const __grid_constant__ ResolveArgs a) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int entries = static_cast<int>(a.B * a.H * a.K), S = static_cast<int>(a.S);
  const int part = (entries + kSelectThreads - 1) / kSelectThreads * 32;
  const int begin = warp * part, end = min(begin + part, entries), now = a.clock[0] + 1;
  SharedMemory shared;
  int2* const sums = shared.take<int2>(kSelectWarps);
  int* const total = shared.take<int>(1);

  int own = 0;
  for (int first = begin; first < end; first += 32) {
    const int entry = first + lane;
    bool miss = false;
    if (entry < end) {
      const Wanted w(a, entry);
      miss = w.is_miss(a);
      if (w.slot && !miss) a.last_use[*w.slot] = now;
    }
    own += __popc(__ballot_sync(~0u, miss));
  }
  int before = sum_before(make_int2(own, 0), sums).x;
  if (threadIdx.x == kSelectThreads - 1) *total = before + own;
  __syncthreads();
  const int count = min(*total, S);
  const Choice<int32_t> c{a.last_use, 0, S, count, a.victims, count};
  write_picks(c, find_cut(c, shared), shared);
  __syncthreads();

  for (int first = begin; first < end; first += 32) {
    const int entry = first + lane;
    bool miss = false;
    int block = -1, victim = -1;
    if (entry < end) miss = Wanted(a, entry).is_miss(a);
    const unsigned misses = __ballot_sync(~0u, miss);
    if (miss) {
      const Wanted w(a, entry);
      const int n = before + __popc(misses & ((1u << lane) - 1));
      block = w.block, victim = n < count ? a.victims[n] : -1;
    }
    before += __popc(misses);
    if (entry < end) a.src_ids[entry] = block, a.dst_ids[entry] = victim;
  }
  __syncthreads();  // until here tables and slots are those of before
  for (int entry = threadIdx.x; entry < entries; entry += kSelectThreads) {
    const int victim = a.dst_ids[entry];
    if (a.src_ids[entry] < 0) continue;
    *Wanted(a, entry).slot = victim;
    if (victim >= 0) a.slot_blocks[victim] = a.src_ids[entry], a.last_use[victim] = now;
  }
  if (threadIdx.x == 0) a.clock[0] = now;
}

}  // namespace lserve::cuda
