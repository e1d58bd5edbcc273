// Attention over two disjoint sets of keys from that over each, once for the CPU and CUDA.
#pragma once
#include <math.h>

#include "host_device.h"

namespace lserve {

// What each set weighs in the attention over both, and its lse. Nothing, where no key was attended.
struct Shares {
  float a, b, lse;
};

LSERVE_HD Shares shares_of(float lse_a, float lse_b) {
  const float largest = lse_a > lse_b ? lse_a : lse_b;
  if (largest == -INFINITY) return {0, 0, largest};  // (-inf) - (-inf) is no number
  const float a = expf(lse_a - largest), b = expf(lse_b - largest), scale = 1.0f / (a + b);
  return {a * scale, b * scale, largest + logf(a + b)};
}

}  // namespace lserve
