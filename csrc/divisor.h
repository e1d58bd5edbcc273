// Division by what stays the same for a whole call: a multiplication, where a GPU's own division takes 20 instructions.
#pragma once
#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace lserve {

// A size by which numbers from 0 to 2^31 - 1 are divided. With 2^shift the next power of two, the multiplier exceeds
// 2^(31 + shift) / value by at most 1, which is too little to carry any such number past a whole quotient
// (Granlund and Montgomery, 1994).
struct Divisor {
  int64_t value = 1;
  uint32_t multiplier = (1u << 31) + 1, shift = 0;

  Divisor() = default;
  LSERVE_HD constexpr Divisor(int64_t value) : value(value), multiplier(0) {
    if (value < 1 || value > INT32_MAX) return;  // there is nothing to divide, or less than one of it
    while (int64_t{1} << shift < value) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << (31 + shift)) / value) + 1;
  }
  LSERVE_HD constexpr operator int64_t() const { return value; }
};

template <typename Int, typename = std::enable_if_t<std::is_integral_v<Int>>>
LSERVE_HD constexpr Int operator/(Int n, const Divisor& by) {
  if constexpr (sizeof(Int) > sizeof(int32_t)) return n / by.value;
  else return static_cast<Int>((uint64_t{2 * static_cast<uint32_t>(n)} * by.multiplier >> 32) >> by.shift);
}

template <typename Int, typename = std::enable_if_t<std::is_integral_v<Int>>>
LSERVE_HD constexpr Int operator%(Int n, const Divisor& by) {
  return n - n / by * static_cast<Int>(by.value);
}

constexpr bool divides(int32_t by) {
  for (const int32_t n : {0, 1, by - 1, by, INT32_MAX / by * by - 1, INT32_MAX / by * by, INT32_MAX})
    if (n / Divisor(by) != n / by || n % Divisor(by) != n % by) return false;
  return true;
}
static_assert(divides(1) && divides(2) && divides(3) && divides(7) && divides(48) && divides(64) && divides(641) &&
              divides(65'537) && divides((1 << 30) - 1) && divides(1 << 30) && divides((1 << 30) + 1) && divides(INT32_MAX));

}  // namespace lserve
