// The merge of two partial attentions.
#pragma once
#include <cmath>
#include <limits>

#include "simd.h"

namespace lserve::cpu {

// (a [D], lse_a) becomes the attention over both key sets. Equal to (b, lse_b) where a attended nothing.
LSERVE_CLONES static void merge(float* a, float* lse_a, const float* b, float lse_b, int64_t D) {
  const float m = *lse_a > lse_b ? *lse_a : lse_b;
  if (m == -std::numeric_limits<float>::infinity()) return;
  const float wa = std::exp(*lse_a - m), wb = std::exp(lse_b - m), scale = 1.0f / (wa + wb);
  for (int64_t d = 0; d < D; d += 16) {
    const f32x16 low = wa == 0 ? f32x16{} : load(a + d) * (wa * scale), high = wb == 0 ? f32x16{} : load(b + d) * (wb * scale);
    store(a + d, low + high);
  }
  *lse_a = m + std::log(wa + wb);
}

}  // namespace lserve::cpu
