// merge_states: joins two partial attentions of the same queries.
#include "merge.h"

namespace lserve::cpu {
namespace {

template <class T>
void merge_typed(const MergeArgs& a) {
  parallel_for(a.rows, 64, [&](int64_t begin, int64_t end) {
    float x[kMaxD], y[kMaxD];
    for (int64_t row = begin; row < end; ++row) {
      const T *from_a = static_cast<const T*>(a.out_a) + row * a.D, *from_b = static_cast<const T*>(a.out_b) + row * a.D;
      for (int64_t d = 0; d < a.D; ++d) x[d] = to_float(from_a[d]), y[d] = to_float(from_b[d]);
      float lse = a.lse_a[row];
      merge(x, &lse, y, a.lse_b[row], a.D);
      T* out = static_cast<T*>(a.out) + row * a.D;
      for (int64_t d = 0; d < a.D; ++d) out[d] = from_float<T>(x[d]);
      a.lse[row] = lse;
    }
  });
}

}  // namespace

void merge_states(const MergeArgs& a) {
  dispatch(a.dtype, [&](auto t) { merge_typed<decltype(t)>(a); });
}

}  // namespace lserve::cpu
