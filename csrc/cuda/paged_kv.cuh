// Where tokens lie: in the pools, in the residual buffer, or among a prompt's new ones.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/convert.cuh"
#include "cuda/tile_size.h"
#include "mask.h"
#include "paged_kv.h"

namespace lserve::cuda {

constexpr int kMasked = 0x7fffffff;  // the position of a key that nobody attends

// Key and value of one token. k is null if its page is not held any more.
struct Row {
  const void *k, *v;      // [D] T or codes
  const void* stats;      // [2, D] T: minimum and maximum of the key's group, if its codes lie on that grid
  float2 k_grid, v_grid;  // (step, min) of codes
  bool coded;
};

// What one (sequence, kv head) attends to: `held` tokens of the cache, then new ones.
template <typename T>
struct Sequence {
  const PagedKV& kv;
  int64_t b, h;
  int held;
  const T *new_k = nullptr, *new_v = nullptr;  // of the first new token
  int64_t new_k_stride = 0, new_v_stride = 0;  // of a token

  __device__ Row row(int position, bool sealed) const {
    Row row{};
    if (position >= held) {
      row.k = new_k + (position - held) * new_k_stride;
      row.v = new_v + (position - held) * new_v_stride;
      return row;
    }
    const Place place = place_of(kv, b, h, position, sealed);
    if (!place.sealed) {
      const int64_t at = residual_of(kv, b, h) + place.row * kv.D;
      row.k = static_cast<const T*>(kv.residual_k) + at;
      row.v = static_cast<const T*>(kv.residual_v) + at;
      return row;
    }
    if (place.block < 0) return row;
    const int64_t k_at = place.slot * kv.k_stride + place.row * kv.D, v_at = place.slot * kv.v_stride + place.row * kv.D;
    if (kv.kv_dtype != Dtype::u8) {
      row.k = static_cast<const T*>(kv.k_pool) + k_at;
      row.v = static_cast<const T*>(kv.v_pool) + v_at;
      return row;
    }
    row.coded = true;
    row.k = static_cast<const uint8_t*>(kv.k_pool) + k_at;
    row.v = static_cast<const uint8_t*>(kv.v_pool) + v_at;
    const float* const v_grid = value_grid(kv, place.slot, place.row);
    row.v_grid = make_float2(v_grid[0], v_grid[1]);
    if (kv.stats) {
      row.stats = static_cast<const T*>(kv.stats) + group_of(kv, place.block, place.row);
    } else {
      const float* const k_grid = key_grid(kv, place.slot, place.row);
      row.k_grid = make_float2(k_grid[0], k_grid[1]);
    }
    return row;
  }
};

// A warp's Bisection: probes that do not wait for each other, 32 to find a stretch, and all of a short one.
struct WarpSearch {
  template <typename Holds>
  __device__ __forceinline__ int64_t operator()(int64_t n, Holds holds) const {
    constexpr int kShort = 4 * 32;
    const int lane = threadIdx.x % 32;
    int first = 0, rest = static_cast<int>(n);
    while (rest > kShort) {
      const int stride = (rest + 31) / 32, probe = (lane + 1) * stride - 1;  // the last of the lane's stretch
      const int whole = __popc(__ballot_sync(~0u, probe < rest && holds(first + probe))) * stride;
      first += whole, rest = min(rest - whole, stride - 1);
    }
    bool found[kShort / 32];
#pragma unroll
    for (int i = 0; i < kShort / 32; ++i) found[i] = lane + 32 * i < rest && holds(first + lane + 32 * i);
#pragma unroll
    for (const bool own : found) first += __popc(__ballot_sync(~0u, own));
    return first;
  }
};

// What says which units the queries of (b, h) attend. A block reads it first and all at once, as each answer takes as long as
// hundreds of instructions. Args: decode's or attention_mass's.
template <typename Args>
struct Queries {
  const Args& a;
  const int32_t* list;
  int held, sealed, window, list_local;  // tokens, the newest query's own included; pages

  __device__ __forceinline__ Queries(const Args& a, int b, int h)
      : a(a),
        list(list_of(a.mask, b, h)),
        held(a.seq_lens[b]),
        sealed(a.kv.sealed[b]),
        window(a.mask.windows[h]),
        list_local(lserve::list_local(a.mask, b)) {}

  // Of the query at a position, with this list or null.
  template <typename Search>
  __device__ __forceinline__ AttendedUnits units(int position, const int32_t* list, Search search) const {
    const int64_t unsealed = static_cast<int64_t>(sealed) * a.mask.page_units;
    return attended(a.mask, window, list, list_local, position, a.kv.P, unsealed, search);
  }
};

// The tokens that a query attends, ascending and counted from 0: those of the pools, then those in the model's dtype.
struct Tokens {
  AttendedUnits entries;
  Divisor unit;       // tokens of an entry
  int last;           // the newest position that may be attended
  int count, sealed;  // tokens of all entries, of which the first `sealed` lie in sealed pages

  // Units before `end` lie in sealed pages, of those in the list the first `listed`.
  __device__ Tokens(const AttendedUnits& e, int end, int listed, const Divisor& unit, int last)
      : entries(e),
        unit(unit),
        last(last),
        count(e.count() * static_cast<int>(unit)),
        sealed((min(e.sink, end) + listed + max(min(e.end, end) - e.local, 0)) * static_cast<int>(unit)) {}

  __device__ bool is_sealed(int i) const { return i < sealed; }
  __device__ int position(int i) const {
    const int entry = i / unit, size = static_cast<int>(unit);
    return entries[entry] * size + (i - entry * size);
  }
};

}  // namespace lserve::cuda
