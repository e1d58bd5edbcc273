// Which pages attention wants, and which slot each lies in, where there are fewer slots than pages: the least recently used
// ones make room.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "cuda/select.cuh"
#include "kernels.h"
#include "mask.h"
#include "paged_kv.h"

namespace lserve::cuda {

// A block of threads lists the pages of one (sequence, kv head). Each warp goes through a part of them twice: first it
// counts, which says where its own begin.
__global__ void __launch_bounds__(kSelectThreads) wanted_kernel(const __grid_constant__ WantedArgs a) {
  join_stream();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, h = blockIdx.x, b = blockIdx.y;
  const Mask& mask = a.mask;
  const int M = static_cast<int>(a.M);
  const int sealed = min(a.sealed[b], M), part = (sealed + kSelectThreads - 1) / kSelectThreads * 32;
  const int begin = warp * part, end = min(begin + part, sealed);
  const AttendedUnits e = attended(mask, b, h, max(a.first[b], 0), a.P, sealed);
  const int32_t* const blocks = blocks_of(a, b, h);
  int32_t* const pages = a.pages + (b * a.H + h) * a.M;
  SharedMemory shared;
  int2* const sums = shared.take<int2>(kSelectWarps);
  int* const total = shared.take<int>(1);

  const auto wants = [&](int page) {
    return __ballot_sync(~0u, page < end && blocks[page] >= 0 && wants_page(e, page, mask.page_units));
  };
  int own = 0;
  for (int first = begin; first < end; first += 32) own += __popc(wants(first + lane));
  int before = sum_before(make_int2(own, 0), sums).x;
  if (threadIdx.x == kSelectThreads - 1) *total = a.counts[b * a.H + h] = before + own;
  for (int first = begin; first < end; first += 32) {
    const unsigned found = wants(first + lane), mine = 1u << lane;
    if (found & mine) pages[before + __popc(found & (mine - 1))] = first + lane;
    before += __popc(found);
  }
  __syncthreads();
  for (int i = *total + static_cast<int>(threadIdx.x); i < M; i += kSelectThreads) pages[i] = -1;
}

// What an entry of a list wants.
struct Wanted {
  int block = -1;
  int32_t* slot = nullptr;  // in the table

  __device__ Wanted(const ResolveArgs& a, int64_t entry) {
    const int64_t b = entry / a.K / a.H, h = entry / a.K % a.H;
    const int32_t page = a.lists[b * a.list_stride0 + h * a.list_stride1 + entry % a.K];
    if (page < 0) return;
    block = blocks_of(a, b, h)[page], slot = slots_of(a, b, h) + page;
  }
  __device__ bool is_hit(const ResolveArgs& a) const { return slot && *slot >= 0 && a.slot_blocks[*slot] == block; }
  __device__ bool is_miss(const ResolveArgs& a) const { return slot && !is_hit(a); }
};

// One block of threads: all entries choose from the same slots. First, slots that are wanted are marked, and misses
// counted; each warp has a part of the entries. Then as many victims are picked, and the misses share them in order.
// Wanted pages beyond those to keep count as never used from then on.
__global__ void __launch_bounds__(kSelectThreads) resolve_kernel(const __grid_constant__ ResolveArgs a) {
  join_stream();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int entries = static_cast<int>(a.B * a.H * a.K), S = static_cast<int>(a.S);
  const int part = (entries + kSelectThreads - 1) / kSelectThreads * 32;
  const int begin = warp * part, end = min(begin + part, entries), now = a.clock[0] + 1;
  SharedMemory shared;
  int2* const sums = shared.take<int2>(kSelectWarps);
  int* const total = shared.take<int>(1);

  int2 own = make_int2(0, 0);  // misses, and all that are wanted
  for (int first = begin; first < end; first += 32) {
    const int entry = first + lane;
    bool miss = false, wants = false;
    if (entry < end) {
      const Wanted w(a, entry);
      wants = w.slot, miss = w.is_miss(a);
      if (w.slot && !miss) a.last_use[*w.slot] = now;
    }
    own.x += __popc(__ballot_sync(~0u, miss)), own.y += __popc(__ballot_sync(~0u, wants));
  }
  int2 before = sum_before(own, sums);
  if (threadIdx.x == kSelectThreads - 1) *total = before.x + own.x;
  __syncthreads();
  const int count = min(*total, S);
  const Choice<int32_t> c{a.last_use, 0, S, count, a.victims, count};
  write_picks(c, find_cut(c, shared), shared);
  __syncthreads();

  for (int first = begin; first < end; first += 32) {
    const int entry = first + lane;
    const unsigned lower = (1u << lane) - 1;
    bool miss = false, wants = false;
    int block = -1, slot = -1;
    if (entry < end) {
      const Wanted w(a, entry);
      wants = w.slot, miss = w.is_miss(a);
      if (miss) block = w.block;
      else if (wants) slot = *w.slot;
    }
    const unsigned misses = __ballot_sync(~0u, miss), all = __ballot_sync(~0u, wants);
    if (miss) {
      const int n = before.x + __popc(misses & lower);
      slot = n < count ? a.victims[n] : -1;
      if (slot >= 0) a.last_use[slot] = now;
    }
    if (slot >= 0 && before.y + __popc(all & lower) >= a.keep) a.last_use[slot] = 0;
    before.x += __popc(misses), before.y += __popc(all);
    if (entry < end) a.src_ids[entry] = block, a.dst_ids[entry] = miss ? slot : -1;
  }
  __syncthreads();  // until here tables and slots are those of before
  for (int entry = threadIdx.x; entry < entries; entry += kSelectThreads) {
    const int victim = a.dst_ids[entry];
    if (a.src_ids[entry] < 0) continue;
    *Wanted(a, entry).slot = victim;
    if (victim >= 0) a.slot_blocks[victim] = a.src_ids[entry];
  }
  if (threadIdx.x == 0) a.clock[0] = now;
}

}  // namespace lserve::cuda
