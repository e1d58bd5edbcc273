// Where the tokens of an entry lie, and whether tables are sound: the CPU's reading of PagedKV.
#pragma once
#include <algorithm>

#include "../mask.h"
#include "../paged_kv.h"
#include "check.h"

namespace lserve::cpu {

// Tokens that lie one after another in one page: `count` rows from `position` on.
struct Run {
  int64_t position, count;
  bool floating;      // in the model's dtype, from the residual buffer or the new tokens
  const void *k, *v;  // [count, D]
  int64_t k_stride, v_stride;
  const void* stats;                 // [P/L, 2, D] of the page, if its codes lie on that grid
  const float *k_scales, *v_scales;  // (step, min) of the first token; k_scales null with stats
  int64_t offset;                    // of the first token in its page
};

inline int64_t width(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::u8 ? 1 : 2; }

inline const void* at(const void* base, int64_t element, int64_t width) {
  return static_cast<const char*>(base) + element * width;
}

// Rows of tokens [position, position + count) of one page that the cache holds. Count 0 if it was freed.
inline Run cached_run(const PagedKV& kv, int64_t b, int64_t h, int64_t position, int64_t count) {
  const Place place = place_of(kv, b, h, static_cast<int32_t>(position), position / kv.P < kv.sealed[b]);
  Run run{};
  run.position = position, run.count = count, run.offset = position % kv.P;
  run.k_stride = run.v_stride = kv.D;
  if (!place.sealed) {
    const int64_t row = residual_of(kv, b, h) + place.row * kv.D;
    run.floating = true;
    run.k = at(kv.residual_k, row, width(kv.dtype));
    run.v = at(kv.residual_v, row, width(kv.dtype));
    return run;
  }
  if (place.block < 0) {
    run.count = 0;
    return run;
  }
  run.floating = kv.kv_dtype != Dtype::u8;
  run.k = at(kv.k_pool, place.slot * kv.k_stride + place.row * kv.D, width(kv.kv_dtype));
  run.v = at(kv.v_pool, place.slot * kv.v_stride + place.row * kv.D, width(kv.kv_dtype));
  if (!run.floating) {
    run.v_scales = value_grid(kv, place.slot, place.row);
    if (kv.stats) run.stats = at(kv.stats, place.block * kv.stats_stride, width(kv.dtype));
    else run.k_scales = key_grid(kv, place.slot, place.row);
  }
  return run;
}

// ---- checks, before any work: kernels read tables without looking

inline void check_lengths(const std::string& op, const char* name, const PagedKV& kv, const int32_t* lengths) {
  const int64_t residual = kv.residual_k ? 2 * kv.P : 0;
  for (int64_t b = 0; b < kv.B; ++b) {
    if (lengths[b] < 0 || lengths[b] > kv.M * kv.P) fail_range((op + ": " + name).c_str(), lengths[b], 0, kv.M * kv.P, b);
    const int64_t least = std::max<int64_t>(0, (lengths[b] - residual + kv.P - 1) / kv.P);  // all but the residual buffer's
    if (kv.sealed[b] < least || kv.sealed[b] > kv.M) fail_range((op + ": sealed").c_str(), kv.sealed[b], least, kv.M, b);
  }
}

// Ascending, between sink and local, and nothing behind the first -1.
inline void check_list(const std::string& op, const Mask& mask, const AttendedUnits& e, int64_t b, int64_t h) {
  for (int64_t i = 0, last = e.sink - 1; i < e.listed; last = e.list[i++])
    if (e.list[i] <= last || e.list[i] >= e.local)
      fail_range((op + ": lists").c_str(), e.list[i], last + 1, e.local - 1, b, h, i);
  for (int64_t i = e.listed; e.list && i < mask.K; ++i)
    if (e.list[i] != -1) fail_range((op + ": lists").c_str(), e.list[i], -1, -1, b, h, i);
}

inline void check_entries(const std::string& op, const PagedKV& kv, const Mask& mask, const AttendedUnits& e, int64_t b,
                          int64_t h) {
  check_list(op, mask, e, b, h);
  const bool streaming = mask.windows[h] > 0 && mask.windows[h] < kDense;
  for (int64_t i = 0, checked = -1; i < e.count(); ++i) {
    const int64_t page = e[i] * mask.unit / kv.P;
    if (page >= kv.sealed[b]) break;
    if (page == checked) continue;
    checked = page;
    const int64_t block = blocks_of(kv, b, h)[page], slot = slots_of(kv, b, h)[page];
    const int64_t blocks = kv.stats ? kv.blocks : kDense;  // without statistics a block is only a name
    if (block < (streaming ? -1 : 0) || block >= blocks)
      fail_range((op + ": block_table").c_str(), block, streaming ? -1 : 0, blocks - 1, b, h, page);
    if (block >= 0 && (slot < 0 || slot >= kv.slots))
      fail_range((op + ": slot_table").c_str(), slot, 0, kv.slots - 1, b, h, page);
  }
}

inline void check_windows(const std::string& op, const Mask& mask, int64_t H) {
  for (int64_t h = 0; h < H; ++h) {
    if (mask.windows[h] < 0) fail_range((op + ": windows").c_str(), mask.windows[h], 0, kDense, h);
    if (mask.windows[h] == 0 && !mask.has_lists)
      throw std::runtime_error("lserve_ext::" + op + ": lists: expected page lists, because windows has a 0, got None");
  }
}

}  // namespace lserve::cpu
