// Checks of values in tables, made before anything is written.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace lserve::cpu {

// Throws e.g. "lserve_ext::append_kv: slot_table: expected -1..63, got 99 at [0, 2, 5]".
template <class... Index>
[[noreturn, gnu::cold, gnu::noinline]] void fail_range(const char* what, int64_t value, int64_t low, int64_t high,
                                                       Index... index) {
  std::string at;
  ((at += (at.empty() ? "" : ", ") + std::to_string(index)), ...);
  const std::string expected = low > high    ? "nothing there"
                               : low == high ? std::to_string(low)
                                             : std::to_string(low) + ".." + std::to_string(high);
  throw std::runtime_error("lserve_ext::" + std::string(what) + ": expected " + expected + ", got " + std::to_string(value) +
                           " at [" + at + "]");
}

template <class... Index>
inline void check_range(const char* what, int64_t value, int64_t low, int64_t high, Index... index) {
  if (value < low || value > high) fail_range(what, value, low, high, index...);
}

}  // namespace lserve::cpu
