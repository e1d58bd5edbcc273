// The merge of two partial attentions.
#pragma once
#include "../merge.h"
#include "simd.h"

namespace lserve::cpu {

// (a [D], lse_a) becomes the attention over both key sets. What has no weight is not read into the sum: it may be anything.
LSERVE_CLONES static void merge(float* a, float* lse_a, const float* b, float lse_b, int64_t D) {
  const Shares shares = shares_of(*lse_a, lse_b);
  for (int64_t d = 0; d < D; d += 16) {
    const f32x16 from_a = shares.a == 0 ? f32x16{} : load(a + d) * shares.a;
    const f32x16 from_b = shares.b == 0 ? f32x16{} : load(b + d) * shares.b;
    store(a + d, from_a + from_b);
  }
  *lse_a = shares.lse;
}

}  // namespace lserve::cpu
