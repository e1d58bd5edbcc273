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

// ---- keys: how channels d, ... of row i are read, and multiplied with a query's

LSERVE_INLINE floats product(floats x, floats q) { return x * q; }

template <class X>
struct PlainKeys {
  using Stored = X;
  static constexpr int64_t kVectors = 1;  // [D] a row
  static constexpr int kTogether = 1;     // rows
  LSERVE_INLINE floats operator()(const X* row, int64_t, int64_t d) const { return load_part(row + d); }
};

// Codes on the grid of their group, as dequantize reads them.
struct GroupKeys {
  using Stored = uint8_t;
  static constexpr int64_t kVectors = 1;
  static constexpr int kTogether = 2;
  const ChannelGrid& grid;
  LSERVE_INLINE floats operator()(const uint8_t* row, int64_t, int64_t d) const {
    const floats x = load_part(row + d) * load_part(grid.step + d) + load_part(grid.low + d), high = load_part(grid.high + d);
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
  static constexpr int kTogether = 2;
  const TokenGrid* grid;
  LSERVE_INLINE floats operator()(const uint8_t* row, int64_t i, int64_t d) const {
    return load_part(row + d) * grid[i].step + grid[i].min;
  }
};

// Statistics [2, D] of a group: what a query could find there at best.
struct Bounds {
  floats low, high;
};
LSERVE_INLINE floats product(Bounds x, floats q) { return q * (q > 0 ? x.high : x.low); }  // the greater of the two

template <class X>
struct BoundKeys {
  using Stored = X;
  static constexpr int64_t kVectors = 2;
  static constexpr int kTogether = 1;
  int64_t D;
  LSERVE_INLINE Bounds operator()(const X* row, int64_t, int64_t d) const {
    return {load_part(row + d), load_part(row + D + d)};
  }
};

// Row after row, because the CPU's own prefetchers follow one stream better than several; but two rows of codes, which are
// short, because unpacking their grid binds. Two sums for each head hide the latency of an addition.
template <int Heads, class Keys>
LSERVE_INLINE void score_heads(const float* q, const Keys& keys, const void* const* rows, int64_t count, int64_t D, float* s) {
  using X = typename Keys::Stored;
  constexpr int C = columns(Heads), Together = Keys::kTogether, Parts = 2 / Together, R = std::max(4 / C, Together);
  const int64_t width = Keys::kVectors * D, ahead = rows_ahead<X>(width);
  for (int64_t i = 0; i < count; i += R) {
    floats total[R * C] = {};
    for (int first = 0; first < R; first += Together) {
      const X* row[Together];
      int64_t place[Together];
      for (int r = 0; r < Together; ++r) {
        place[r] = std::min(i + first + r, count - 1);
        row[r] = static_cast<const X*>(rows[place[r]]);
        prefetch<X>(rows[place[r] + ahead], width);
      }
      floats acc[Together][Heads][Parts] = {};
      for (int64_t d = 0; d < D; d += Parts * kLanes)
        for (int part = 0; part < Parts; ++part) {
          const int64_t channel = d + part * kLanes;
          decltype(keys(row[0], 0, channel)) x[Together];
          for (int r = 0; r < Together; ++r) x[r] = keys(row[r], place[r], channel);
          for (int g = 0; g < Heads; ++g) {
            const floats y = load_part(q + g * kMaxD + channel);
            for (int r = 0; r < Together; ++r) acc[r][g][part] += product(x[r], y);
          }
        }
      for (int r = 0; r < Together; ++r)
        for (int g = 0; g < Heads; ++g)
          total[(first + r) * C + g] = acc[r][g][0] + (Parts > 1 ? acc[r][g][Parts - 1] : floats{});
    }
    for (int j = 0; j < R * C; j += 4) store_quad(s + i * C + j, sums(total[j], total[j + 1], total[j + 2], total[j + 3]));
  }
}

// s [count, columns(heads)] = rows · q [heads, kMaxD], and up to 7 values more. rows [count], and kAhead to ask for.
template <class Keys>
LSERVE_CLONES static void score(int64_t heads, const float* q, Keys keys, const void* const* rows, int64_t count, int64_t D,
                                float* s) {
  switch (heads) {
    case 1: return score_heads<1>(q, keys, rows, count, D, s);
    case 2: return score_heads<2>(q, keys, rows, count, D, s);
    case 3: return score_heads<3>(q, keys, rows, count, D, s);
    default: return score_heads<4>(q, keys, rows, count, D, s);
  }
}

// ---- values

template <int Heads, int Parts, class X>
LSERVE_INLINE void add_columns(const float* w, const void* const* rows, int64_t d, int64_t count, float* acc) {
  constexpr int C = columns(Heads);
  floats sums[Heads][Parts];
  for (int g = 0; g < Heads; ++g)
    for (int v = 0; v < Parts; ++v) sums[g][v] = load_part(acc + g * kMaxD + d + v * kLanes);
  for (int64_t i = 0; i < count; ++i) {
    const X* row = static_cast<const X*>(rows[i]) + d;
    floats x[Parts];
    for (int v = 0; v < Parts; ++v) x[v] = load_part(row + v * kLanes);
    for (int g = 0; g < Heads; ++g)
      for (int v = 0; v < Parts; ++v) sums[g][v] += x[v] * w[i * C + g];
  }
  for (int g = 0; g < Heads; ++g)
    for (int v = 0; v < Parts; ++v) store_part(acc + g * kMaxD + d + v * kLanes, sums[g][v]);
}

// A few rows at a time, 1 KiB: more of them are more streams, fewer are more loads and stores of the sums.
template <int Heads, class X>
LSERVE_INLINE void add_heads(const float* w, const void* const* rows, int64_t count, int64_t D, float* acc) {
  constexpr int C = columns(Heads), Parts = Heads > 2 ? 2 : 4;  // 16 channels or more: D is a multiple of 16
  const int64_t ahead = rows_ahead<X>(D), block = std::clamp<int64_t>((int64_t{1} << 10) / (D * sizeof(X)), 2, 8);
  for (int64_t i = 0; i < count; i += block) {
    const int64_t some = std::min(block, count - i);
    for (int64_t r = 0; r < some; ++r) prefetch<X>(rows[i + r + ahead], D);
    int64_t d = 0;
    for (; d + Parts * kLanes <= D; d += Parts * kLanes) add_columns<Heads, Parts, X>(w + i * C, rows + i, d, some, acc);
    for (; d < D; d += 2 * kLanes) add_columns<Heads, 2, X>(w + i * C, rows + i, d, some, acc);
  }
}

// acc [heads, kMaxD] += w [count, columns(heads)] · rows, X each. rows [count], and kAhead to ask for.
template <class X>
LSERVE_CLONES static void add_rows(int64_t heads, const float* w, const void* const* rows, int64_t count, int64_t D,
                                   float* acc) {
  switch (heads) {
    case 1: return add_heads<1, X>(w, rows, count, D, acc);
    case 2: return add_heads<2, X>(w, rows, count, D, acc);
    case 3: return add_heads<3, X>(w, rows, count, D, acc);
    default: return add_heads<4, X>(w, rows, count, D, acc);
  }
}

}  // namespace lserve::cpu
