// Rows of keys and values become operands E of a product: floats, or bfloat16.
#pragma once
#include "../quant.h"
#include "simd.h"

namespace lserve::cpu {

template <class T, class E>
LSERVE_CLONES static void load_row(const T* from, int64_t D, float scale, E* to) {
  if (std::is_same_v<T, E> && scale == 1.0f) {
    std::memcpy(to, from, D * sizeof(E));
    return;
  }
  for (int64_t d = 0; d < D; d += 16) store(to + d, load(from + d) * scale);
}

// The grid of a group of keys, channel by channel: unpacked once for all of its keys.
struct ChannelGrid {
  float low[kMaxD], step[kMaxD], high[kMaxD];
};

// stats [2, D]
template <class T>
LSERVE_CLONES static void load_grid(const T* stats, int64_t D, ChannelGrid& grid) {
  for (int64_t d = 0; d < D; d += 16) {
    const f32x16 low = load(stats + d), high = load(stats + D + d);
    store(grid.low + d, low);
    store(grid.step + d, high / 255.0f - low / 255.0f);  // quant_step, sixteen at a time
    store(grid.high + d, high);
  }
}

// K on its group's grid, clamped to the box.
template <class E>
LSERVE_CLONES static void load_codes(const uint8_t* codes, const ChannelGrid& grid, int64_t D, E* to) {
  for (int64_t d = 0; d < D; ++d) to[d] = from_float<E>(dequantize(codes[d], grid.low[d], grid.step[d], grid.high[d]));
}

template <class E>
LSERVE_CLONES static void load_codes(const uint8_t* codes, float step, float min, int64_t D, E* to) {
  for (int64_t d = 0; d < D; ++d) to[d] = from_float<E>(dequantize(codes[d], min, step));
}

}  // namespace lserve::cpu
