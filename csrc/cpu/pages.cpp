// Pages: statistics, INT8 codes, appending and copying.
//
// A page is read once from memory and then, from the first-level cache, a second time: for the grid, and for the
// codes. Loops that encode are plain ones, which compilers vectorise: the grid is defined for scalars (csrc/quant.h).
#include <algorithm>
#include <cstring>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../paged_kv.h"
#include "../quant.h"
#include "check.h"
#include "simd.h"

namespace lserve::cpu {
namespace {

// The rows of one page: the first `split` from one place, the rest from another. So a page is sealed straight from
// where its tokens lie, the residual buffer and the new keys.
template <class T>
struct Rows {
  const T* old;
  int64_t old_stride, split;
  const T* fresh;
  int64_t fresh_stride;

  LSERVE_INLINE const T* operator[](int64_t i) const {
    return i < split ? old + i * old_stride : fresh + (i - split) * fresh_stride;
  }
};

template <class T>
Rows<T> page_rows(const View& x, int64_t page) {
  return {nullptr, 0, 0, static_cast<const T*>(x.data) + page * x.stride0, x.stride1};
}

// Least and greatest of each lane. A NaN makes both NaN, as in torch.amin and torch.amax.
struct Bounds {
  f32x16 low, high, nan;

  LSERVE_INLINE explicit Bounds(f32x16 x) : low(x), high(x), nan(x) {}
  LSERVE_INLINE void add(f32x16 x) {
    low = min(x, low);
    high = max(x, high);
    nan = map([](floats x, floats n) LSERVE_LAMBDA { return x != x ? x : n; }, x, nan);
  }
  LSERVE_INLINE f32x16 least() const { return min_nan(low, nan); }
  LSERVE_INLINE f32x16 most() const { return max_nan(high, nan); }
};

// stats [P/L, 2, D]
template <class T>
LSERVE_CLONES void page_bounds(Rows<T> k, int64_t P, int64_t L, int64_t D, T* stats) {
  for (int64_t first = 0; first < P; first += L, stats += 2 * D)
    for (int64_t d = 0; d < D; d += 16) {
      Bounds bounds(load(k[first] + d));
      for (int64_t i = first + 1; i < first + L; ++i) bounds.add(load(k[i] + d));
      store(stats + d, bounds.least());
      store(stats + D + d, bounds.most());
    }
}

// moments [P/L, 2, D]: mean minus and plus a standard deviation.
template <class T>
LSERVE_CLONES void soft_bounds(Rows<T> k, int64_t P, int64_t L, int64_t D, T* moments) {
  const f32x16 count = splat(static_cast<float>(L));
  for (int64_t first = 0; first < P; first += L, moments += 2 * D)
    for (int64_t d = 0; d < D; d += 16) {
      f32x16 sum = splat(0.0f), squares = splat(0.0f);
      for (int64_t i = first; i < first + L; ++i) sum += load(k[i] + d);
      const f32x16 mean = sum / count;
      for (int64_t i = first; i < first + L; ++i) {
        const f32x16 off = load(k[i] + d) - mean;
        squares += off * off;
      }
      const f32x16 deviation = sqrt(squares / count);
      store(moments + d, mean - deviation);
      store(moments + D + d, mean + deviation);
    }
}

// K's codes on the grid of its group and channel: stats [P/L, 2, D].
template <class T>
LSERVE_CLONES void encode_channels(Rows<T> k, const T* stats, int64_t P, int64_t L, int64_t D, uint8_t* codes) {
  float low[kMaxD], step[kMaxD];
  for (int64_t first = 0; first < P; first += L, stats += 2 * D) {
    for (int64_t d = 0; d < D; ++d) {
      low[d] = to_float(stats[d]);
      step[d] = quant_step(low[d], to_float(stats[D + d]));
    }
    for (int64_t i = first; i < first + L; ++i, codes += D) {
      const T* row = k[i];
      for (int64_t d = 0; d < D; ++d) codes[d] = quantize(to_float(row[d]), low[d], step[d]);
    }
  }
}

// Codes on a grid per token: scales [P, 2] (step, min).
template <class T>
LSERVE_CLONES void encode_tokens(Rows<T> x, int64_t P, int64_t D, uint8_t* codes, float* scales) {
  for (int64_t i = 0; i < P; ++i) {
    Bounds bounds(load(x[i]));
    for (int64_t d = 16; d < D; d += 16) bounds.add(load(x[i] + d));
    const float low = min_nan(bounds.least()) + 0.0f;  // no zero has a sign
    scales[2 * i] = quant_step(low, max_nan(bounds.most()) + 0.0f);
    scales[2 * i + 1] = low;
  }
  for (int64_t i = 0; i < P; ++i, codes += D) {
    const T* row = x[i];
    const float step = scales[2 * i], low = scales[2 * i + 1];
    for (int64_t d = 0; d < D; ++d) codes[d] = quantize(to_float(row[d]), low, step);
  }
}

template <class T>
LSERVE_CLONES void decode_channels(const uint8_t* codes, const T* stats, int64_t P, int64_t L, int64_t D, T* k) {
  float low[kMaxD], high[kMaxD], step[kMaxD];
  for (int64_t first = 0; first < P; first += L, stats += 2 * D) {
    for (int64_t d = 0; d < D; ++d) {
      low[d] = to_float(stats[d]);
      high[d] = to_float(stats[D + d]);
      step[d] = quant_step(low[d], high[d]);
    }
    for (int64_t i = 0; i < L; ++i, codes += D, k += D)
      for (int64_t d = 0; d < D; ++d) k[d] = from_float<T>(dequantize(codes[d], low[d], step[d], high[d]));
  }
}

template <class T>
LSERVE_CLONES void decode_tokens(const uint8_t* codes, const float* scales, int64_t P, int64_t D, T* x) {
  for (int64_t i = 0; i < P; ++i, codes += D, scales += 2, x += D)
    for (int64_t d = 0; d < D; ++d) x[d] = from_float<T>(dequantize(codes[d], scales[1], scales[0]));
}

// scales [C, P, 2]: V's, and K's behind them when there are no statistics.
template <class T>
void encode_page(Rows<T> k, Rows<T> v, const T* stats, int64_t P, int64_t L, int64_t D, uint8_t* k_codes, uint8_t* v_codes,
                 float* scales) {
  encode_tokens(v, P, D, v_codes, scales);
  if (stats) encode_channels(k, stats, P, L, D, k_codes);
  else encode_tokens(k, P, D, k_codes, scales + 2 * P);
}

template <class T>
void copy_page(Rows<T> rows, int64_t P, int64_t D, T* out) {
  for (int64_t i = 0; i < P; ++i) std::memcpy(out + i * D, rows[i], D * sizeof(T));
}

// Explicit, as LSERVE_CLONES asks.
#define INSTANTIATE(T)                                                                       \
  template void page_bounds<T>(Rows<T>, int64_t, int64_t, int64_t, T*);                      \
  template void soft_bounds<T>(Rows<T>, int64_t, int64_t, int64_t, T*);                      \
  template void encode_channels<T>(Rows<T>, const T*, int64_t, int64_t, int64_t, uint8_t*);  \
  template void encode_tokens<T>(Rows<T>, int64_t, int64_t, uint8_t*, float*);               \
  template void decode_channels<T>(const uint8_t*, const T*, int64_t, int64_t, int64_t, T*); \
  template void decode_tokens<T>(const uint8_t*, const float*, int64_t, int64_t, T*);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(f16)
#undef INSTANTIATE

// What an append does to one sequence.
struct Span {
  int64_t before, after;   // tokens held
  int64_t first_row;       // of its new tokens in k and v
  int64_t seal, unsealed;  // pages [seal, unsealed) are sealed now or, without a residual buffer, get new tokens
  int64_t first_unit;      // such pages in the sequences before it, times H
};

std::vector<Span> plan(const AppendArgs& a) {
  const PagedKV& kv = a.kv;
  std::vector<Span> spans(kv.B);
  std::unordered_set<int64_t> taken;  // slots that this call writes
  int64_t units = 0;
  check_range("append_kv: cu_seqlens_k", a.cu_seqlens_k[0], 0, 0, 0);
  check_range("append_kv: cu_seqlens_k", a.cu_seqlens_k[kv.B], a.N, a.N, kv.B);
  for (int64_t b = 0; b < kv.B; ++b) {
    check_range("append_kv: cu_seqlens_k", a.cu_seqlens_k[b], 0, a.N, b);
    check_range("append_kv: cu_seqlens_k", a.cu_seqlens_k[b + 1], a.cu_seqlens_k[b], a.N, b + 1);
    const int64_t count = a.cu_seqlens_k[b + 1] - a.cu_seqlens_k[b], before = a.context_lens[b], after = before + count;
    check_range("append_kv: context_lens", before, 0, INT32_MAX - count, b);
    if (kv.residual_k)
      check_range("append_kv: sealed", kv.sealed[b], std::max<int64_t>(before / kv.P - 1, 0), before / kv.P, b);
    const int64_t seal = kv.residual_k ? kv.sealed[b] : before / kv.P;
    const int64_t unsealed = std::max(seal, kv.residual_k ? after / kv.P - 1 : count ? (after - 1) / kv.P + 1 : 0);
    if (unsealed > seal && unsealed > kv.M)
      throw std::runtime_error("lserve_ext::append_kv: slot_table: expected at least " + std::to_string(unsealed) +
                               " columns, got " + std::to_string(kv.M));
    spans[b] = {before, after, a.cu_seqlens_k[b], seal, unsealed, units};
    units += (unsealed - seal) * kv.H;
    for (int64_t h = 0; h < kv.H; ++h)
      for (int64_t p = seal; p < unsealed; ++p) {
        const int32_t slot = slots_of(kv, b, h)[p];
        check_range("append_kv: slot_table", slot, -1, kv.slots - 1, b, h, p);
        if (slot >= 0 && !taken.insert(slot).second)
          throw std::runtime_error("lserve_ext::append_kv: slot_table: expected a slot of its own for every page, got " +
                                   std::to_string(slot) + " for two that this call writes");
        if (slot < 0 || !(kv.stats || a.moments)) continue;
        const int32_t block = blocks_of(kv, b, h)[p];
        check_range("append_kv: block_table", block, 0, kv.blocks - 1, b, h, p);
      }
  }
  return spans;
}

template <class T>
void seal_page(const AppendArgs& a, const Span& s, int64_t b, int64_t h, int64_t p) {
  const PagedKV& kv = a.kv;
  const int64_t slot = slots_of(kv, b, h)[p];
  if (slot < 0) return;  // a streaming head's page that is already past
  const int64_t residual = residual_of(kv, b, h) + p % 2 * kv.P * kv.D;
  const int64_t split = std::clamp<int64_t>(s.before - p * kv.P, 0, kv.P);
  const int64_t row = s.first_row + p * kv.P + split - s.before;
  const auto rows = [&](const void* residual_x, const View& x) {
    return Rows<T>{static_cast<const T*>(residual_x) + residual, kv.D, split,
                   static_cast<const T*>(x.data) + row * x.stride0 + h * x.stride1, x.stride0};
  };
  const Rows<T> k = rows(kv.residual_k, a.k), v = rows(kv.residual_v, a.v);
  const int64_t block = blocks_of(kv, b, h)[p];
  T* const stats = kv.stats ? static_cast<T*>(kv.stats) + block * kv.stats_stride : nullptr;
  if (stats) page_bounds(k, kv.P, kv.L, kv.D, stats);
  if (a.moments) soft_bounds(k, kv.P, a.moments_group, kv.D, static_cast<T*>(a.moments) + block * a.moments_stride);
  if (kv.kv_dtype == Dtype::u8) {
    encode_page(k, v, stats, kv.P, kv.L, kv.D, static_cast<uint8_t*>(kv.k_pool) + slot * kv.k_stride,
                static_cast<uint8_t*>(kv.v_pool) + slot * kv.v_stride, kv.scales + slot * kv.scales_stride);
  } else {
    copy_page(k, kv.P, kv.D, static_cast<T*>(kv.k_pool) + slot * kv.k_stride);
    copy_page(v, kv.P, kv.D, static_cast<T*>(kv.v_pool) + slot * kv.v_stride);
  }
}

// Only tokens of unsealed pages are written. One token never overwrites the page that it seals: the half it is
// written to belongs to the page after that.
template <class T>
void write_residual(const AppendArgs& a, const Span& s, int64_t b, int64_t h) {
  const PagedKV& kv = a.kv;
  const int64_t residual = residual_of(kv, b, h);
  const auto write = [&](void* residual_x, const View& x, int64_t t) {
    std::memcpy(static_cast<T*>(residual_x) + residual + t % (2 * kv.P) * kv.D,
                static_cast<const T*>(x.data) + (s.first_row + t - s.before) * x.stride0 + h * x.stride1, kv.D * sizeof(T));
  };
  for (int64_t t = std::max(s.before, s.unsealed * kv.P); t < s.after; ++t) {
    write(kv.residual_k, a.k, t);
    write(kv.residual_v, a.v, t);
  }
}

// Without a residual buffer: the new tokens of a page into the pools.
template <class T>
void write_rows(const AppendArgs& a, const Span& s, int64_t b, int64_t h, int64_t p) {
  const PagedKV& kv = a.kv;
  const int64_t slot = slots_of(kv, b, h)[p];
  if (slot < 0) return;  // a streaming head's page that is already past
  for (int64_t t = std::max(s.before, p * kv.P); t < std::min(s.after, (p + 1) * kv.P); ++t) {
    const int64_t from = s.first_row + t - s.before, row = t - p * kv.P;
    const auto write = [&](const View& x, void* pool, int64_t stride, bool is_key) {
      const T* const token = static_cast<const T*>(x.data) + from * x.stride0 + h * x.stride1;
      if (kv.kv_dtype == Dtype::u8)
        encode_tokens(Rows<T>{token, 0, 1, nullptr, 0}, 1, kv.D, static_cast<uint8_t*>(pool) + slot * stride + row * kv.D,
                      is_key ? key_grid(kv, slot, row) : value_grid(kv, slot, row));
      else std::memcpy(static_cast<T*>(pool) + slot * stride + row * kv.D, token, kv.D * sizeof(T));
    };
    write(a.k, kv.k_pool, kv.k_stride, true);
    write(a.v, kv.v_pool, kv.v_stride, false);
  }
}

// Rows are copied in no order, so none may be written twice, or read and written.
void check_pairs(const GatherArgs& a) {
  const auto row = [](const void* base, int64_t id, int64_t stride) { return static_cast<const char*>(base) + id * stride; };
  std::vector<std::pair<const char*, int64_t>> written;  // rows, and their places in the list
  written.reserve(a.count);
  for (int64_t i = 0; i < a.count; ++i)
    if (a.src_ids[i] >= 0 && a.dst_ids[i] >= 0) written.emplace_back(row(a.dst, a.dst_ids[i], a.dst_stride), i);
  if (!std::is_sorted(written.begin(), written.end())) std::sort(written.begin(), written.end());
  for (size_t n = 1; n < written.size(); ++n)
    if (written[n].first == written[n - 1].first)
      throw std::runtime_error("lserve_ext::gather_pages: dst_ids: expected each row once, got " +
                               std::to_string(a.dst_ids[written[n].second]) + " again at [" +
                               std::to_string(written[n].second) + "]");
  if (written.empty() || written.back().first < row(a.src, 0, 0) ||
      written.front().first >= row(a.src, a.src_rows, a.src_stride))
    return;
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.src_ids[i] < 0 || a.dst_ids[i] < 0) continue;
    const std::pair<const char*, int64_t> from(row(a.src, a.src_ids[i], a.src_stride), 0);
    const auto found = std::lower_bound(written.begin(), written.end(), from);
    if (found != written.end() && found->first == from.first)
      throw std::runtime_error("lserve_ext::gather_pages: src_ids: expected rows that this call does not write, got " +
                               std::to_string(a.src_ids[i]) + " at [" + std::to_string(i) + "]");
  }
}

// Runs body(page) for all pages, on all threads.
template <class Body>
void for_pages(int64_t pages, Body body) {
  parallel_for(pages, 1, [&](int64_t begin, int64_t end) {
    for (int64_t page = begin; page < end; ++page) body(page);
  });
}

}  // namespace

void page_stats(const PageStatsArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_pages(a.pages, [&](int64_t page) {
      page_bounds(page_rows<T>(a.k, page), a.P, a.L, a.D, static_cast<T*>(a.stats) + page * (a.P / a.L) * 2 * a.D);
    });
  });
}

void page_moments(const PageStatsArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_pages(a.pages, [&](int64_t page) {
      soft_bounds(page_rows<T>(a.k, page), a.P, a.L, a.D, static_cast<T*>(a.stats) + page * (a.P / a.L) * 2 * a.D);
    });
  });
}

void quantize_kv(const QuantizeArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = a.stats ? 1 : 2;  // C
    for_pages(a.pages, [&](int64_t page) {
      const T* stats = a.stats ? static_cast<const T*>(a.stats) + page * (a.P / a.L) * 2 * a.D : nullptr;
      encode_page(page_rows<T>(a.k, page), page_rows<T>(a.v, page), stats, a.P, a.L, a.D, a.k_codes + page * a.P * a.D,
                  a.v_codes + page * a.P * a.D, a.scales + page * rows * a.P * 2);
    });
  });
}

void dequantize_kv(const DequantizeArgs& a) {
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = a.stats ? 1 : 2;
    for_pages(a.pages, [&](int64_t page) {
      const int64_t at = page * a.P * a.D;
      const float* scales = a.scales + page * rows * a.P * 2;
      T *k = static_cast<T*>(a.k) + at, *v = static_cast<T*>(a.v) + at;
      decode_tokens(a.v_codes + at, scales, a.P, a.D, v);
      if (!a.stats) return decode_tokens(a.k_codes + at, scales + 2 * a.P, a.P, a.D, k);
      const T* stats = static_cast<const T*>(a.stats) + page * (a.P / a.L) * 2 * a.D;
      decode_channels(a.k_codes + at, stats, a.P, a.L, a.D, k);
    });
  });
}

// Seals first and writes rows of the residual buffer second: a page must be sealed before newer tokens overwrite its rows.
void append_kv(const AppendArgs& a) {
  const std::vector<Span> spans = plan(a);
  const PagedKV& kv = a.kv;
  if (spans.empty()) return;
  const Span& last = spans.back();
  const int64_t units = last.first_unit + (last.unsealed - last.seal) * kv.H;
  dispatch(kv.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_pages(units, [&](int64_t unit) {
      const auto after =
          std::upper_bound(spans.begin(), spans.end(), unit, [](int64_t u, const Span& s) { return u < s.first_unit; });
      const Span& s = *(after - 1);
      const int64_t i = unit - s.first_unit;  // heads first: their rows lie side by side
      const auto write = kv.residual_k ? seal_page<T> : write_rows<T>;
      write(a, s, &s - spans.data(), i % kv.H, s.seal + i / kv.H);
    });
    if (!kv.residual_k) return;
    parallel_for(kv.B * kv.H, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) write_residual<T>(a, spans[i / kv.H], i / kv.H, i % kv.H);
    });
  });
}

void gather_pages(const GatherArgs& a) {
  for (int64_t i = 0; i < a.count; ++i) {
    check_range("gather_pages: src_ids", a.src_ids[i], -1, a.src_rows - 1, i);
    check_range("gather_pages: dst_ids", a.dst_ids[i], -1, a.dst_rows - 1, i);
  }
  check_pairs(a);
  if (a.bytes == 0) return;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, a.bytes));
  parallel_for(a.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (a.src_ids[i] >= 0 && a.dst_ids[i] >= 0)
        std::memmove(static_cast<char*>(a.dst) + a.dst_ids[i] * a.dst_stride,
                     static_cast<const char*>(a.src) + a.src_ids[i] * a.src_stride, a.bytes);
  });
}

}  // namespace lserve::cpu
