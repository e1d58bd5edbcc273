// Products of a few query heads with rows that are read once from memory: scores of keys, and sums of values.
//
// Scores stand row by row, s [rows, columns(heads)], so that one register holds those of several heads.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "unpack.h"

namespace lserve::cpu {

constexpr int64_t kHeads = 4;   // query heads that share a loaded row
constexpr int64_t kAhead = 64;  // rows between asking for one and using it, at most

constexpr int64_t columns(int64_t heads) { return heads == 3 ? 4 : heads; }

// Rows that are asked for before they are used: 4 KiB hide the latency of memory.
template <class X>
LSERVE_INLINE int64_t rows_ahead(int64_t width) {
  return std::clamp<int64_t>((int64_t{1} << 12) / (width * sizeof(X)), 4, kAhead);
}

template <class X>
LSERVE_INLINE void prefetch(const void* row, int64_t D) {
  for (int64_t byte = 0; byte < D * static_cast<int64_t>(sizeof(X)); byte += 64)
    __builtin_prefetch(static_cast<const char*>(row) + byte);
}

// rows [count] are followed by `next` [n]: to be asked for while these are used.
inline void follow(std::vector<const void*>& rows, int64_t count, const std::vector<const void*>& next, int64_t n) {
  const int64_t some = std::min(n, kAhead);
  std::copy_n(next.begin(), some, rows.begin() + count);
  if (count + some > 0) std::fill_n(rows.begin() + count + some, kAhead - some, rows[count + some - 1]);
}

// Units of work [first, last), each loaded while the one before it is about to be used: load(i, unit), and then
// use(i, unit, the next one). X has a count of rows, 0: none.
template <class X, class Load, class Use>
void in_turn(int64_t first, int64_t last, X now, X next, Load load, Use use) {
  load(first, next);
  for (int64_t i = first; i < last; ++i) {
    std::swap(now, next);
    next.count = 0;
    if (i + 1 < last) load(i + 1, next);
    use(i, now, next);
  }
}

// Query heads [G, kMaxD], scaled.
template <class T>
LSERVE_CLONES static void load_query(const T* q, int64_t stride, int64_t G, int64_t D, float scale, float* out) {
  for (int64_t g = 0; g < G; ++g)
    for (int64_t d = 0; d < D; d += 16) store(out + g * kMaxD + d, load(q + g * stride + d) * scale);
}

// ---- keys: how channels d, ... of row i are read, a register F of them, and multiplied with a query's

template <class F>
LSERVE_INLINE F product(F x, F q) {
  return x * q;
}

template <class X>
struct PlainKeys {
  using Stored = X;
  static constexpr int64_t kVectors = 1;  // [D] a row
  static constexpr bool kWide = true;     // whether wide registers, where there are any, are faster
  template <class F>
  LSERVE_INLINE F read(const X* row, int64_t, int64_t d) const {
    return load_part<F>(row + d);
  }
};

// Codes on the grid of their group, as dequantize reads them.
struct GroupKeys {
  using Stored = uint8_t;
  static constexpr int64_t kVectors = 1;
  static constexpr bool kWide = true;
  const ChannelGrid& grid;
  template <class F>
  LSERVE_INLINE F read(const uint8_t* row, int64_t, int64_t d) const {
    const F x = load_part<F>(row + d) * load_part<F>(grid.step + d) + load_part<F>(grid.low + d);
    const F high = load_part<F>(grid.high + d);
    return x > high ? high : x;
  }
};

// Codes on a grid for each token. Step and min are not taken out of the sum: with one huge channel q·min and
// step * (q·code) would cancel.
struct TokenGrid {
  float step, min;
};
struct TokenKeys {
  using Stored = uint8_t;
  static constexpr int64_t kVectors = 1;
  static constexpr bool kWide = true;
  const TokenGrid* grid;
  template <class F>
  LSERVE_INLINE F read(const uint8_t* row, int64_t i, int64_t d) const {
    return load_part<F>(row + d) * grid[i].step + grid[i].min;
  }
};

// Statistics [2, D] of a group: what a query could find there at best.
template <class F>
struct Bounds {
  F low, high;
};
template <class F>
LSERVE_INLINE F product(Bounds<F> x, F q) {
  return q * (q > 0 ? x.high : x.low);  // the greater of the two
}

template <class X>
struct BoundKeys {
  using Stored = X;
  static constexpr int64_t kVectors = 2;
  static constexpr bool kWide = false;
  int64_t D;
  template <class F>
  LSERVE_INLINE Bounds<F> read(const X* row, int64_t, int64_t d) const {
    return {load_part<F>(row + d), load_part<F>(row + D + d)};
  }
};

// Row after row, because the CPU's own prefetchers follow one stream better than several; but some rows of codes together,
// which are short, because unpacking their grid binds: as many as there are registers for. Two sums for each head hide the
// latency of an addition.
template <class F, int Heads, class Keys>
LSERVE_INLINE void score_heads(const float* q, const Keys& keys, const void* const* rows, int64_t count, int64_t D, float* s) {
  using X = typename Keys::Stored;
  constexpr int64_t lanes = kLanesOf<F>;
  constexpr int Together = sizeof(X) > 1 ? 1 : lanes > 8 ? 4 : 2, Parts = Together > 1 ? 1 : 2;
  constexpr int C = columns(Heads), R = std::max(4 / C, Together);
  const int64_t width = Keys::kVectors * D, ahead = rows_ahead<X>(width);
  for (int64_t i = 0; i < count; i += R) {
    F total[R * C] = {};
    for (int first = 0; first < R; first += Together) {
      const X* row[Together];
      int64_t place[Together];
      for (int r = 0; r < Together; ++r) {
        place[r] = std::min(i + first + r, count - 1);
        row[r] = static_cast<const X*>(rows[place[r]]);
        prefetch<X>(rows[place[r] + ahead], width);
      }
      F acc[Together][Heads][Parts] = {};
      const auto add = [&](int64_t channel, int part) LSERVE_LAMBDA {
        decltype(keys.template read<F>(row[0], 0, channel)) x[Together];
        for (int r = 0; r < Together; ++r) x[r] = keys.template read<F>(row[r], place[r], channel);
        for (int g = 0; g < Heads; ++g) {
          const F y = load_part<F>(q + g * kMaxD + channel);
          for (int r = 0; r < Together; ++r) acc[r][g][part] += product(x[r], y);
        }
      };
      int64_t d = 0;
      for (; d + Parts * lanes <= D; d += Parts * lanes)
        for (int part = 0; part < Parts; ++part) add(d + part * lanes, part);
      if (Parts * lanes > 16 && d < D) add(d, 0);  // D is a multiple of 16
      for (int r = 0; r < Together; ++r)
        for (int g = 0; g < Heads; ++g) total[(first + r) * C + g] = acc[r][g][0] + (Parts > 1 ? acc[r][g][Parts - 1] : F{});
    }
    for (int j = 0; j < R * C; j += 4) store_quad(s + i * C + j, sums(total[j], total[j + 1], total[j + 2], total[j + 3]));
  }
}

template <class F, class Keys>
LSERVE_INLINE void score_rows(int64_t heads, const float* q, Keys keys, const void* const* rows, int64_t count, int64_t D,
                              float* s) {
  switch (heads) {
    case 1: return score_heads<F, 1>(q, keys, rows, count, D, s);
    case 2: return score_heads<F, 2>(q, keys, rows, count, D, s);
    case 3: return score_heads<F, 3>(q, keys, rows, count, D, s);
    default: return score_heads<F, 4>(q, keys, rows, count, D, s);
  }
}

template <class Keys>
LSERVE_CLONES static void score_8(int64_t heads, const float* q, Keys keys, const void* const* rows, int64_t count, int64_t D,
                                  float* s) {
  score_rows<floats>(heads, q, keys, rows, count, D, s);
}
#ifdef LSERVE_AVX512
template <class Keys>
LSERVE_AVX512 static void score_16(int64_t heads, const float* q, Keys keys, const void* const* rows, int64_t count, int64_t D,
                                   float* s) {
  score_rows<wide_floats>(heads, q, keys, rows, count, D, s);
}
#endif

constexpr int64_t kScoresMore = 12;  // that may be written after the last

// s [count, columns(heads)] = rows · q [heads, kMaxD], and up to kScoresMore. rows [count], and kAhead to ask for.
template <class Keys>
void score(int64_t heads, const float* q, Keys keys, const void* const* rows, int64_t count, int64_t D, float* s) {
#ifdef LSERVE_AVX512
  if constexpr (Keys::kWide)
    if (has_avx512()) return score_16(heads, q, keys, rows, count, D, s);
#endif
  score_8(heads, q, keys, rows, count, D, s);
}

// ---- values

template <class F, int Heads, int Parts, class X>
LSERVE_INLINE void add_columns(const float* w, const void* const* rows, int64_t d, int64_t count, float* acc) {
  constexpr int C = columns(Heads);
  constexpr int64_t lanes = kLanesOf<F>;
  F sums[Heads][Parts];
  for (int g = 0; g < Heads; ++g)
    for (int v = 0; v < Parts; ++v) sums[g][v] = load_part<F>(acc + g * kMaxD + d + v * lanes);
  for (int64_t i = 0; i < count; ++i) {
    const X* row = static_cast<const X*>(rows[i]) + d;
    F x[Parts];
    for (int v = 0; v < Parts; ++v) x[v] = load_part<F>(row + v * lanes);
    for (int g = 0; g < Heads; ++g)
      for (int v = 0; v < Parts; ++v) sums[g][v] += x[v] * w[i * C + g];
  }
  for (int g = 0; g < Heads; ++g)
    for (int v = 0; v < Parts; ++v) store_part(acc + g * kMaxD + d + v * lanes, sums[g][v]);
}

// A few rows at a time, 1 KiB: more of them are more streams, fewer are more loads and stores of the sums.
template <class F, int Heads, class X>
LSERVE_INLINE void add_heads(const float* w, const void* const* rows, int64_t count, int64_t D, float* acc) {
  constexpr int64_t lanes = kLanesOf<F>;
  constexpr int C = columns(Heads), Parts = Heads > 2 && lanes < 16 ? 2 : 4, Rest = 16 / lanes;  // D is a multiple of 16
  const int64_t ahead = rows_ahead<X>(D), block = std::clamp<int64_t>((int64_t{1} << 10) / (D * sizeof(X)), 2, 8);
  for (int64_t i = 0; i < count; i += block) {
    const int64_t some = std::min(block, count - i);
    for (int64_t r = 0; r < some; ++r) prefetch<X>(rows[i + r + ahead], D);
    int64_t d = 0;
    for (; d + Parts * lanes <= D; d += Parts * lanes) add_columns<F, Heads, Parts, X>(w + i * C, rows + i, d, some, acc);
    for (; d < D; d += 16) add_columns<F, Heads, Rest, X>(w + i * C, rows + i, d, some, acc);
  }
}

template <class F, class X>
LSERVE_INLINE void add_any(int64_t heads, const float* w, const void* const* rows, int64_t count, int64_t D, float* acc) {
  switch (heads) {
    case 1: return add_heads<F, 1, X>(w, rows, count, D, acc);
    case 2: return add_heads<F, 2, X>(w, rows, count, D, acc);
    case 3: return add_heads<F, 3, X>(w, rows, count, D, acc);
    default: return add_heads<F, 4, X>(w, rows, count, D, acc);
  }
}

template <class X>
LSERVE_CLONES static void add_8(int64_t heads, const float* w, const void* const* rows, int64_t count, int64_t D, float* acc) {
  add_any<floats, X>(heads, w, rows, count, D, acc);
}
#ifdef LSERVE_AVX512
template <class X>
LSERVE_AVX512 static void add_16(int64_t heads, const float* w, const void* const* rows, int64_t count, int64_t D, float* acc) {
  add_any<wide_floats, X>(heads, w, rows, count, D, acc);
}
#endif

// acc [heads, kMaxD] += w [count, columns(heads)] · rows, X each. rows [count], and kAhead to ask for.
template <class X>
void add_rows(int64_t heads, const float* w, const void* const* rows, int64_t count, int64_t D, float* acc) {
#ifdef LSERVE_AVX512
  if (has_avx512()) return add_16<X>(heads, w, rows, count, D, acc);
#endif
  add_8<X>(heads, w, rows, count, D, acc);
}

}  // namespace lserve::cpu
