// Which pages or tokens a query attends: scores of pages, and exact top-k.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "check.h"
#include "simd.h"

namespace lserve::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kUnit = 16;  // pages of a work unit: their statistics stay in the first two cache levels
constexpr int64_t kHeads = 4;  // query heads that share a loaded group

// The best score of a page's groups over Heads query heads: stats [groups, 2, D]. A NaN stays.
template <int Heads, class T>
LSERVE_INLINE float score_page(const float* q, const T* stats, int64_t groups, int64_t D) {
  float best = -kInf;
  for (int64_t i = 0; i < groups; ++i, stats += 2 * D) {
    f32x16 total[Heads] = {};
    for (int64_t d = 0; d < D; d += 16) {
      const f32x16 low = load(stats + d), high = load(stats + D + d);
      for (int g = 0; g < Heads; ++g) {
        const f32x16 x = load(q + g * kMaxD + d);  // x * (x > 0 ? high : low) is the greater of the two products
        total[g] += x * map([](floats x, floats l, floats h) LSERVE_LAMBDA { return x > 0 ? h : l; }, x, low, high);
      }
    }
    for (int g = 0; g < Heads; ++g) best = max_nan(best, sum(total[g]));
  }
  return best;
}

// scores[p] for pages [begin, end) of one (sequence, kv head), all of them sealed.
template <class T>
LSERVE_CLONES void score_pages(const PageScoresArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end) {
  const T* queries = static_cast<const T*>(a.q.data) + b * a.q.stride0 + h * a.G * a.q.stride1;
  const int32_t* blocks = a.block_table + b * a.block_stride0 + h * a.block_stride1;
  float* scores = a.scores + (b * a.H + h) * a.M;
  float q[kHeads * kMaxD];
  for (int64_t g = 0; g < a.G;) {
    const int64_t heads = std::min(kHeads, a.G - g);
    for (int64_t i = 0; i < heads; ++i)
      for (int64_t d = 0; d < a.D; d += 16) store(q + i * kMaxD + d, load(queries + (g + i) * a.q.stride1 + d));
    for (int64_t p = begin; p < end; ++p) {
      if (blocks[p] < 0) continue;
      const T* stats = static_cast<const T*>(a.stats) + blocks[p] * a.stats_stride;
      const float score = heads == 4   ? score_page<4>(q, stats, a.groups, a.D)
                          : heads == 3 ? score_page<3>(q, stats, a.groups, a.D)
                          : heads == 2 ? score_page<2>(q, stats, a.groups, a.D)
                                       : score_page<1>(q, stats, a.groups, a.D);
      scores[p] = max_nan(scores[p], score);
    }
    g += heads;
  }
}
template void score_pages<float>(const PageScoresArgs&, int64_t, int64_t, int64_t, int64_t);
template void score_pages<bf16>(const PageScoresArgs&, int64_t, int64_t, int64_t, int64_t);
template void score_pages<f16>(const PageScoresArgs&, int64_t, int64_t, int64_t, int64_t);

// Unsigned keys in the order of floats. NaN counts as -inf, and -0 as 0.
LSERVE_INLINE uint32_t key(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x != x ? -kInf : x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Writes the `count` indices in [begin, end) of the greatest values, ascending, ties to the lower index; -1 from there
// on to `width`. A radix select: three passes settle 11, 11 and 10 bits of the least key that is taken.
void top(const float* values, int64_t begin, int64_t end, int64_t count, int64_t width, int32_t* out) {
  uint32_t least = 0, settled = 0;
  int64_t ties = count;  // to take among the keys equal to `least` in the settled bits
  if (end - begin > count) {
    for (const auto& [shift, bins] : {std::pair{21, 2048u}, {10, 2048u}, {0, 1024u}}) {
      int64_t histogram[2048] = {};
      for (int64_t i = begin; i < end; ++i) {
        const uint32_t k = key(values[i]);
        if ((k & settled) == least) ++histogram[k >> shift & (bins - 1)];
      }
      uint32_t bin = bins - 1;
      for (; bin > 0 && histogram[bin] < ties; --bin) ties -= histogram[bin];
      least |= bin << shift;
      settled |= (bins - 1) << shift;
    }
  }
  int64_t n = 0;
  for (int64_t i = begin; i < end && n < count; ++i) {
    const uint32_t k = key(values[i]);
    if (settled == 0 || k > least || (k == least && ties-- > 0)) out[n++] = static_cast<int32_t>(i);
  }
  std::fill(out + n, out + width, -1);
}

}  // namespace

void page_scores(const PageScoresArgs& a) {
  const auto scored = [&](int64_t h) { return !a.windows || a.windows[h] == 0; };
  for (int64_t b = 0; b < a.B; ++b) {
    check_range("page_scores: sealed", a.sealed[b], 0, a.M, b);
    for (int64_t h = 0; h < a.H; ++h)
      for (int64_t p = 0; scored(h) && p < a.sealed[b]; ++p)
        check_range("page_scores: block_table", a.block_table[b * a.block_stride0 + h * a.block_stride1 + p], -1, a.blocks - 1,
                    b, h, p);
  }
  const int64_t units = (a.M + kUnit - 1) / kUnit;  // of a row of scores
  dispatch(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(a.B * a.H * units, 1, [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t row = unit / units, b = row / a.H, h = row % a.H;
        const int64_t begin = unit % units * kUnit, end = std::min(begin + kUnit, a.M);
        std::fill(a.scores + row * a.M + begin, a.scores + row * a.M + end, -kInf);
        if (scored(h)) score_pages<T>(a, b, h, begin, std::min<int64_t>(end, a.sealed[b]));
      }
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
  parallel_for(a.B * a.H, 1, [&](int64_t first, int64_t last) {
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
  parallel_for(a.B * a.H, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      top(a.mass + i / a.H * a.mass_stride0 + i % a.H * a.mass_stride1, 0, a.local_start[i / a.H], picks(i / a.H), a.K,
          a.tokens + i * a.K);
  });
}

}  // namespace lserve::cpu
