// Rows of keys and values become operands E of a product: floats, or bfloat16.
#pragma once
#include "../grid.h"
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

// K on its group's grid, clamped to the box: stats [2, D].
template <class T, class E>
LSERVE_CLONES static void load_codes(const uint8_t* codes, const T* stats, int64_t D, E* to) {
  for (int64_t d = 0; d < D; ++d) {
    const float low = to_float(stats[d]), high = to_float(stats[D + d]);
    to[d] = from_float<E>(grid_value(codes[d], low, grid_step(low, high), high));
  }
}

template <class E>
LSERVE_CLONES static void load_codes(const uint8_t* codes, float step, float min, int64_t D, E* to) {
  for (int64_t d = 0; d < D; ++d) to[d] = from_float<E>(grid_value(codes[d], min, step));
}

}  // namespace lserve::cpu
