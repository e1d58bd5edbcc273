// Where tables say that pages and tokens lie: the arithmetic of addresses, once for the CPU and CUDA.
#pragma once
#include "host_device.h"
#include "kernels.h"

namespace lserve {

// A (sequence, kv head)'s entry for page 0, before those of its other pages. Args: whatever has such a table.
template <typename Args>
LSERVE_HD const int32_t* blocks_of(const Args& a, int64_t b, int64_t h) {
  return a.block_table + b * a.block_stride0 + h * a.block_stride1;
}
template <typename Args>
LSERVE_HD auto slots_of(const Args& a, int64_t b, int64_t h) {
  return a.slot_table + b * a.slot_stride0 + h * a.slot_stride1;
}

// Elements of the residual buffer before the rows of a (sequence, kv head).
LSERVE_HD int64_t residual_of(const PagedKV& kv, int64_t b, int64_t h) {
  return b * kv.residual_stride0 + h * kv.residual_stride1;
}

// Where a token lies.
struct Place {
  bool sealed;          // in a page of the pools, else in the residual buffer
  int32_t block, slot;  // of a sealed page: that of its statistics, and that of its rows; block -1: it is not held any more
  int32_t row;          // of the page, or of the residual buffer
};

// sealed: whether the position's page is.
LSERVE_HD Place place_of(const PagedKV& kv, int64_t b, int64_t h, int32_t position, bool sealed) {
  const int32_t page = position / kv.P, row = position % kv.P;
  if (!sealed) return {false, 0, 0, page % 2 * static_cast<int32_t>(kv.P) + row};
  return {true, blocks_of(kv, b, h)[page], slots_of(kv, b, h)[page], row};
}

// (step, min) of a row's value, and of its key if that has a grid of its own.
LSERVE_HD float* value_grid(const PagedKV& kv, int64_t slot, int64_t row) {
  return kv.scales + slot * kv.scales_stride + 2 * row;
}
LSERVE_HD float* key_grid(const PagedKV& kv, int64_t slot, int64_t row) { return value_grid(kv, slot, kv.P + row); }

// Elements of the statistics before those of a row's group.
LSERVE_HD int64_t group_of(const PagedKV& kv, int64_t block, int32_t row) {
  return block * kv.stats_stride + row / kv.L * 2 * kv.D;
}

}  // namespace lserve
