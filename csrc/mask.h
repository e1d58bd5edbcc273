// Which units (pages or tokens) a query attends: sink, list, local. Defined once for the CPU and CUDA.
#pragma once
#include "host_device.h"
#include "kernels.h"

namespace lserve {

// How many of n things something holds for, which holds for the first ones only.
struct Bisection {
  template <typename Holds>
  LSERVE_HD int64_t operator()(int64_t n, Holds holds) const {
    int64_t first = 0;
    for (int64_t end = n; first < end;) {
      const int64_t middle = (first + end) / 2;
      if (holds(middle)) first = middle + 1;
      else end = middle;
    }
    return first;
  }
};

// The units of one query, ascending. Unsealed pages are local. Positions, and so units, fit in 32 bits.
struct AttendedUnits {
  int32_t sink = 0, listed = 0, local = 0, end = 0;
  const int32_t* list = nullptr;

  LSERVE_HD int32_t count() const { return sink + listed + (end - local); }
  LSERVE_HD int32_t operator[](int32_t i) const {
    if (i < sink) return i;
#ifdef __CUDA_ARCH__  // entries may lie in shared memory, but what they point to does not
    if (i < sink + listed) return __ldg(list + i - sink);
#else
    if (i < sink + listed) return list[i - sink];
#endif
    return local + (i - sink - listed);
  }
};

// The list of a (sequence, kv head), in prefill its first row; null without lists.
LSERVE_HD const int32_t* list_of(const Mask& mask, int64_t b, int64_t h) {
  return mask.lists ? mask.lists + b * mask.list_stride0 + h * mask.list_stride1 : nullptr;
}

// The first local unit of a sequence's heads that follow a list.
LSERVE_HD int32_t list_local(const Mask& mask, int64_t b) { return mask.local_start ? mask.local_start[b] : 0; }

// Units of the query at position t of a head with this window. `list` and `list_local` serve window 0; `unsealed` is the
// first unit that is always attended.
template <typename Search = Bisection>
LSERVE_HD AttendedUnits attended(const Mask& mask, int32_t window, const int32_t* list, int64_t list_local, int64_t t,
                                 const Divisor& P, int64_t unsealed, Search search = {}) {
  const auto smaller = [](int64_t a, int64_t b) { return static_cast<int32_t>(a < b ? a : b); };
  const int32_t position = static_cast<int32_t>(t), reach = position / P - window + 1;
  AttendedUnits e;
  e.end = position / mask.unit + 1;
  const int64_t first = window == 0 ? list_local : reach > 0 ? static_cast<int64_t>(reach) * mask.page_units : 0;
  e.local = smaller(smaller(first, unsealed), e.end);
  e.sink = smaller(mask.sink * mask.page_units, e.local);
  if (window == 0 && list) {
    e.list = list;
    e.listed = static_cast<int32_t>(search(mask.K, [&](int64_t i) { return list[i] >= 0; }));
  }
  return e;
}

// Units of decode's query, at position t of a (sequence, kv head) with so many sealed pages.
template <typename Search = Bisection>
LSERVE_HD AttendedUnits attended(const Mask& mask, int64_t b, int64_t h, int64_t t, const Divisor& P, int64_t sealed,
                                 Search search = {}) {
  const int64_t unsealed = sealed * mask.page_units;
  return attended(mask, mask.windows[h], list_of(mask, b, h), list_local(mask, b), t, P, unsealed, search);
}

// Whether the query of these entries, or a later one of its head, reads a unit of a page of so many.
LSERVE_HD bool wants_page(const AttendedUnits& e, int64_t page, int64_t units) {
  const int64_t first = page * units, end = first + units;
  if (first < e.sink || end > e.local) return true;
  const int64_t next = Bisection{}(e.listed, [&](int64_t i) { return e.list[i] < first; });
  return next < e.listed && e.list[next] < end;
}

}  // namespace lserve
