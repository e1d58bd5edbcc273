// Which slot a page lies in, where there are fewer slots than pages: the least recently used ones make room.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "kernels.h"

namespace lserve::cuda {

constexpr int kResolveThreads = 128;
constexpr int kResolveWarps = kResolveThreads / 32;
constexpr int kInUse = INT32_MAX;  // in the place of an age: no victim

// Whether a page is among the first `count` of an ascending list.
__device__ inline bool is_listed(const int32_t* list, int count, int32_t page) {
  int low = 0;
  for (int high = count; low < high;) {
    const int middle = (low + high) / 2;
    if (list[middle] < page) low = middle + 1;
    else high = middle;
  }
  return low < count && list[low] == page;
}

// The greatest of all threads' values, which are at least 0; `parts` [kResolveWarps] is shared.
__device__ inline int block_max(int value, int* parts) {
  for (int bits = 16; bits > 0; bits /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, bits));
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  for (int i = 0; i < kResolveWarps; ++i) value = max(value, parts[i]);
  return value;
}

// A block of threads a kv head of a sequence.
__global__ void __launch_bounds__(kResolveThreads) resolve_kernel(const __grid_constant__ ResolveArgs a) {
  const int64_t h = blockIdx.x, b = blockIdx.y;
  const int S = static_cast<int>(a.S), K = static_cast<int>(a.K);
  const int32_t* list = a.lists + b * a.list_stride0 + h * a.list_stride1;
  const int32_t* blocks = a.block_table + b * a.block_stride0 + h * a.block_stride1;
  const int32_t* slots = a.slots + b * a.slots_stride0 + h * a.slots_stride1;
  int32_t* table = a.slot_table + b * a.slot_stride0 + h * a.slot_stride1;
  int32_t* pages = a.slot_pages + b * a.pages_stride0 + h * a.pages_stride1;
  int32_t* last_use = a.last_use + b * a.use_stride0 + h * a.use_stride1;
  int32_t *src = a.src_ids + (b * a.H + h) * K, *dst = a.dst_ids + (b * a.H + h) * K;
  SharedMemory shared;
  int *parts = shared.take<int>(kResolveWarps), *age = shared.take<int>(S), *victims = shared.take<int>(S);

  int latest = 0;
  for (int s = threadIdx.x; s < S; s += kResolveThreads) latest = max(latest, last_use[s]);
  const int now = 1 + block_max(latest, parts);
  const int wanted = K > 0 && list[K - 1] >= 0 ? K : [&] {
    int low = 0;  // of the entries behind the last page, all of which are -1
    for (int high = K; low < high;) {
      const int middle = (low + high) / 2;
      if (list[middle] >= 0) low = middle + 1;
      else high = middle;
    }
    return low;
  }();
  for (int s = threadIdx.x; s < S; s += kResolveThreads) {
    const bool hit = pages[s] >= 0 && is_listed(list, wanted, pages[s]);
    age[s] = hit || slots[s] < 0 ? kInUse : pages[s] < 0 ? -1 : last_use[s];  // empty ones first
    if (hit) last_use[s] = now;
  }
  __syncthreads();
  for (int s = threadIdx.x; s < S; s += kResolveThreads) {
    if (age[s] == kInUse) continue;
    int before = 0;
    for (int other = 0; other < S; ++other) before += age[other] < age[s] || (age[other] == age[s] && other < s);
    victims[before] = s;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  for (int first = 0, taken = 0; first < K; first += 32) {
    const int i = first + static_cast<int>(threadIdx.x);
    const bool miss = i < wanted && table[list[i]] < 0;
    const unsigned misses = __ballot_sync(0xffffffffu, miss);
    if (miss) {
      const int s = victims[taken + __popc(misses & ((1u << threadIdx.x) - 1))];
      if (pages[s] >= 0) table[pages[s]] = -1;
      pages[s] = list[i], last_use[s] = now, table[list[i]] = slots[s];
    }
    if (i < K) src[i] = miss ? blocks[list[i]] : -1, dst[i] = miss ? table[list[i]] : -1;
    taken += __popc(misses);
  }
}

}  // namespace lserve::cuda
