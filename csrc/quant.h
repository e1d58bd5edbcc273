// The INT8 grid, defined once for the CPU, CUDA and the tests (design: "one grid").
//
//   step = max/255 - min/255          float32; the two quotients keep huge ranges finite
//   code = round_half_even((x - min) / step), clamped to 0..255; 0 where step is 0
//   back = clamp(min + step * code, min, max), one fused multiply-add
//
// K's grid is the min and max of its group and channel, so a dequantised key stays in the box that page
// scores are computed from. V has a grid of its own per token.
#pragma once
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace lserve {

LSERVE_HD float quant_step(float min, float max) { return max / 255.0f - min / 255.0f; }

LSERVE_HD uint8_t quantize(float x, float min, float step) {
  // Halves, because x - min may overflow; fused by name, so that every compiler rounds alike. NaN goes to code 0.
  const float half = fmaf(x, 0.5f, -(min * 0.5f)) / step;
  const float code = rintf(half + half);
  return !(step > 0.0f) ? 0 : code >= 255.0f ? 255 : code > 0.0f ? static_cast<uint8_t>(code) : 0;
}

LSERVE_HD float dequantize(uint8_t code, float min, float step) { return fmaf(step, static_cast<float>(code), min); }

LSERVE_HD float dequantize(uint8_t code, float min, float step, float max) {
  const float x = dequantize(code, min, step);
  return x > max ? max : x;
}

}  // namespace lserve
