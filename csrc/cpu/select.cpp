// Which pages or tokens a query attends: scores of pages, and exact top-k.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "../paged_kv.h"
#include "check.h"
#include "gemv.h"

namespace lserve::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kRows = 64;  // groups of a work unit, about

// Pages of one (sequence, kv head) that are scored together, and their groups' statistics.
struct Unit {
  int64_t b, h, count;             // count: groups
  std::vector<int64_t> pages;      // those that are held
  std::vector<const void*> stats;  // [count] rows [2, D], and kAhead that are read after them
};

// Scores of a unit's pages: the best of their groups, over all query heads. A NaN stays. s: somewhere to work.
template <class T>
void score_pages(const PageScoresArgs& a, const Unit& unit, float* q, float* s) {
  const T* queries = static_cast<const T*>(a.q.data) + unit.b * a.q.stride0 + unit.h * a.G * a.q.stride1;
  float* scores = a.scores + (unit.b * a.H + unit.h) * a.M;
  for (int64_t first = 0; first < a.G; first += kHeads) {
    const int64_t heads = std::min(kHeads, a.G - first), width = columns(heads);
    load_query(queries + first * a.q.stride1, a.q.stride1, heads, a.D, 1.0f, q);
    score(heads, q, BoundKeys<T>{a.D}, unit.stats.data(), unit.count, a.D, s);
    const float* row = s;
    for (const int64_t page : unit.pages)
      for (int64_t i = 0; i < a.groups; ++i, row += width)
        for (int64_t g = 0; g < heads; ++g) scores[page] = max_nan(scores[page], row[g]);
  }
}

// Unsigned keys in the order of floats. NaN counts as -inf, and -0 as 0. Returns the greatest.
LSERVE_CLONES uint32_t order(const float* values, int64_t n, uint32_t* keys) {
  uint32_t greatest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bit_cast<uint32_t>(values[i] == values[i] ? values[i] + 0.0f : -kInf);
    keys[i] = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
    greatest = std::max(greatest, keys[i]);
  }
  return greatest;
}

// Which of n keys something holds for, without a branch that would be guessed wrong: into out [n], and returns how many.
template <class Holds>
int64_t filter(const uint32_t* keys, int64_t n, Holds holds, uint32_t* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[found] = static_cast<uint32_t>(i);
    found += holds(keys[i]);
  }
  return found;
}

// Writes the `count` indices in [begin, end) of the greatest values, ascending, ties to the lower index; -1 from there
// on to `width`. Eleven bits of their keys leave few candidates for the least key that is taken.
void top(const float* values, int64_t begin, int64_t end, int64_t count, int64_t width, int32_t* out) {
  const int64_t n = std::max<int64_t>(end - begin, 0);
  count = std::min(count, n);
  std::fill(out + count, out + width, -1);
  if (count == n) return std::iota(out, out + count, static_cast<int32_t>(begin));
  if (count == 0) return;
  constexpr int kShift = 21;
  std::unique_ptr<uint32_t[]> keys(new uint32_t[n]), found(new uint32_t[n]);
  uint32_t histogram[1 << (32 - kShift)] = {}, bin = order(values + begin, n, keys.get()) >> kShift;
  for (int64_t i = 0; i < n; ++i) ++histogram[keys[i] >> kShift];
  int64_t ties = count;  // to take of the bin, and then of the keys equal to the least that is taken
  for (; histogram[bin] < ties; --bin) ties -= histogram[bin];
  const int64_t candidates = filter(keys.get(), n, [&](uint32_t k) { return k >> kShift == bin; }, found.get());
  for (int64_t i = 0; i < candidates; ++i) found[i] = keys[found[i]];
  uint32_t* const last = found.get() + ties - 1;
  std::nth_element(found.get(), last, found.get() + candidates, std::greater<>());
  const uint32_t least = *last;
  ties -= std::count_if(found.get(), last, [&](uint32_t k) { return k > least; });
  const int64_t taken = filter(keys.get(), n, [&](uint32_t k) { return k >= least; }, found.get());
  for (int64_t i = 0; i < taken; ++i)
    if (keys[found[i]] > least || ties-- > 0) *out++ = static_cast<int32_t>(begin + found[i]);
}

// A thread that is woken for less costs more than it does.
int64_t rows_worth_a_thread(int64_t values) { return 1 + (1 << 12) / std::max<int64_t>(values, 1); }

}  // namespace

void page_scores(const PageScoresArgs& a) {
  const auto scored = [&](int64_t h) { return !a.windows || a.windows[h] == 0; };
  for (int64_t b = 0; b < a.B; ++b) {
    check_range("page_scores: sealed", a.sealed[b], 0, a.M, b);
    for (int64_t h = 0; h < a.H; ++h)
      for (int64_t p = 0; scored(h) && p < a.sealed[b]; ++p)
        check_range("page_scores: block_table", blocks_of(a, b, h)[p], -1, a.blocks - 1, b, h, p);
  }
  const int64_t pages = std::max<int64_t>(1, kRows / a.groups), units = (a.M + pages - 1) / pages;  // of a row of scores
  std::fill_n(a.scores, a.B * a.H * a.M, -kInf);
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto load = [&](int64_t index, Unit& unit) {
      unit.b = index / units / a.H, unit.h = index / units % a.H, unit.count = 0;
      unit.pages.clear();
      const int32_t* blocks = blocks_of(a, unit.b, unit.h);
      const int64_t begin = index % units * pages, end = std::min<int64_t>(begin + pages, a.sealed[unit.b]);
      for (int64_t p = begin; scored(unit.h) && p < end; ++p) {
        if (blocks[p] < 0) continue;
        unit.pages.push_back(p);
        const T* stats = static_cast<const T*>(a.stats) + blocks[p] * a.stats_stride;
        for (int64_t i = 0; i < a.groups; ++i) unit.stats[unit.count++] = stats + i * 2 * a.D;
      }
    };
    parallel_for(a.B * a.H * units, 1, [&](int64_t first, int64_t last) {
      Unit empty{};
      empty.stats.resize(pages * a.groups + kAhead);
      std::vector<float> q(kHeads * kMaxD), s((pages * a.groups + 8) * kHeads);
      in_turn(first, last, empty, empty, load, [&](int64_t, Unit& now, const Unit& next) {
        follow(now.stats, now.count, next.stats, next.count);
        score_pages<T>(a, now, q.data(), s.data());
      });
    });
  });
}

void select_pages(const SelectPagesArgs& a) {
  for (int64_t b = 0; b < a.B; ++b) {
    check_range("select_pages: seq_lens", a.seq_lens[b], 0, INT32_MAX, b);
    check_range("select_pages: sealed", a.sealed[b], 0, a.M, b);
  }
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t page = (a.seq_lens[b] + a.P - 1) / a.P - 1;  // of the query; -1 if the sequence is empty
    const int64_t window = std::min<int64_t>(page - a.local + 1, a.sealed[b]);
    a.local_start[b] = static_cast<int32_t>(std::max<int64_t>(window, 0));
  }
  parallel_for(a.B * a.H, rows_worth_a_thread(a.M), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      top(a.scores + i / a.H * a.score_stride0 + i % a.H * a.score_stride1, a.sink, a.local_start[i / a.H], a.K, a.K,
          a.pages + i * a.K);
  });
}

void select_tokens(const SelectTokensArgs& a) {
  for (int64_t b = 0; b < a.B; ++b) {
    check_range("select_tokens: seq_lens", a.seq_lens[b], 0, INT32_MAX, b);
    check_range("select_tokens: sealed", a.sealed[b], 0, a.width / a.P, b);
    check_range("select_tokens: counts", a.counts[b], 0, INT32_MAX, b);
  }
  const auto picks = [&](int64_t b) { return std::min<int64_t>(a.counts[b], a.K); };
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t n = a.seq_lens[b], residual = n - a.sealed[b] * a.P;
    a.local_start[b] = static_cast<int32_t>(std::max<int64_t>(n - std::max(picks(b), residual), 0));
  }
  parallel_for(a.B * a.H, rows_worth_a_thread(a.width), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      top(a.mass + i / a.H * a.mass_stride0 + i % a.H * a.mass_stride1, 0, a.local_start[i / a.H], picks(i / a.H), a.K,
          a.tokens + i * a.K);
  });
}

}  // namespace lserve::cpu
