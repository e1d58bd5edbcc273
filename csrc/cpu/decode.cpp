// decode: attention of one query a sequence over sink, list and local.
//
// A sequence's entries are cut every kChunkTokens tokens. A chunk is scored, normalised and kept as
// (out, lse); partials are then folded in list order. INT8 is not unpacked to memory: keys are read off their grid in
// registers, and V's grid is folded into the weights.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "chunk.h"
#include "merge.h"

namespace lserve::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// C columns [16 / C, C] become one row [C], which all rows then hold.
template <int C, class Fold>
LSERVE_INLINE f32x16 fold_columns(f32x16 x, Fold fold) {
  float lanes[16];
  store(lanes, x);
  for (int i = C; i < 16; ++i) lanes[i % C] = fold(lanes[i % C], lanes[i]);
  for (int i = C; i < 16; ++i) lanes[i] = lanes[i % C];
  return load(lanes);
}

// Scores s [count, C] become weights exp(s - max) over their sum, and their logarithm of the sum goes to lse [C].
// Writes up to 15 values more.
template <int C>
LSERVE_INLINE void soften_columns(float* s, int64_t count, float* lse) {
  const int64_t end = count * C, whole = (end + 15) / 16 * 16;
  std::fill(s + end, s + whole, -kInf);
  f32x16 high = splat(-kInf), total = {};
  for (int64_t i = 0; i < whole; i += 16) high = max(high, load(s + i));
  high = fold_columns<C>(high, [](float a, float b) LSERVE_LAMBDA { return a > b ? a : b; });
  // All -inf: weights 0, not exp(nan).
  const f32x16 shift = map([](floats x) LSERVE_LAMBDA { return x == -kInf ? floats{} : x; }, high);
  for (int64_t i = 0; i < whole; i += 16) {
    const f32x16 w = exp(load(s + i) - shift);
    store(s + i, w);
    total += w;
  }
  total = fold_columns<C>(total, [](float a, float b) LSERVE_LAMBDA { return a + b; });
  const f32x16 scale = map([](floats x) LSERVE_LAMBDA { return x == 0.0f ? floats{} : 1.0f / x; }, total);
  for (int64_t i = 0; i < whole; i += 16) store(s + i, load(s + i) * scale);
  for (int g = 0; g < C; ++g) lse[g] = total[g] == 0 ? -kInf : shift[g] + std::log(total[g]);
}

LSERVE_CLONES void soften(int64_t heads, float* s, int64_t count, float* lse) {
  switch (columns(heads)) {
    case 1: return soften_columns<1>(s, count, lse);
    case 2: return soften_columns<2>(s, count, lse);
    default: return soften_columns<4>(s, count, lse);
  }
}

// Σ w (min + step code) = Σ w min + Σ (w step) code: base [C] takes the first sum, and w [count, C] the steps.
template <int C>
LSERVE_INLINE void fold_steps(float* w, const TokenGrid* grid, int64_t count, float* base) {
  float sum[C] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int g = 0; g < C; ++g) {
      sum[g] += w[i * C + g] * grid[i].min;
      w[i * C + g] *= grid[i].step;
    }
  for (int g = 0; g < C; ++g) base[g] += sum[g];
}

LSERVE_CLONES void fold_grid(int64_t heads, float* w, const TokenGrid* grid, int64_t count, float* base) {
  switch (columns(heads)) {
    case 1: return fold_steps<1>(w, grid, count, base);
    case 2: return fold_steps<2>(w, grid, count, base);
    default: return fold_steps<4>(w, grid, count, base);
  }
}

// out [heads, D] = acc [heads, kMaxD] + base [heads]
LSERVE_CLONES void add_base(const float* acc, const float* base, int64_t heads, int64_t D, float* out) {
  for (int64_t g = 0; g < heads; ++g)
    for (int64_t d = 0; d < D; d += 16) store(out + g * D + d, load(acc + g * kMaxD + d) + base[g]);
}

// What one thread works with.
struct Scratch {
  Scratch(int64_t G, int64_t tokens) : q(new float[G * kMaxD]), s(new float[(tokens + 16) * kHeads]) {}
  std::unique_ptr<float[]> q;  // [G, kMaxD] query heads, scaled
  std::unique_ptr<float[]> s;  // [tokens, kHeads] scores, then weights
  float acc[kHeads * kMaxD], base[kHeads];
  ChannelGrid grid;
};

// out [G, D] and lse [G] of one chunk.
template <class T>
void decode_chunk(const DecodeArgs& a, const Chunk& chunk, int64_t b, int64_t h, Scratch& scratch, float* out, float* lse) {
  const int64_t D = a.kv.D, G = a.G;
  load_query(static_cast<const T*>(a.q.data) + b * a.q.stride0 + h * G * a.q.stride1, a.q.stride1, G, D, a.scale,
             scratch.q.get());
  for (int64_t first = 0; first < G; first += kHeads) {
    const int64_t heads = std::min(kHeads, G - first);
    float *s = scratch.s.get(), logs[kHeads];
    score_chunk<T>(chunk, heads, scratch.q.get() + first * kMaxD, D, scratch.grid, s);
    soften(heads, s, chunk.count, logs);
    std::copy_n(logs, heads, lse + first);
    std::fill_n(scratch.acc, heads * kMaxD, 0.0f);
    std::fill_n(scratch.base, kHeads, 0.0f);
    for (const auto& span : chunk.spans) {
      float* w = s + span.first * columns(heads);
      const void* const* rows = chunk.v.data() + span.first;
      if (span.floating) {
        add_rows<T>(heads, w, rows, span.count, D, scratch.acc);
      } else {
        fold_grid(heads, w, chunk.v_grid.data() + span.first, span.count, scratch.base);
        add_rows<uint8_t>(heads, w, rows, span.count, D, scratch.acc);
      }
    }
    add_base(scratch.acc, scratch.base, heads, D, out + first * D);
  }
}

template <class T>
void decode_typed(const DecodeArgs& a) {
  const PagedKV& kv = a.kv;
  const int64_t D = kv.D, G = a.G, heads = kv.B * kv.H, per_chunk = chunk_entries(a.mask);
  check_windows("decode", a.mask, kv.H);
  check_lengths("decode", "seq_lens", kv, a.seq_lens);
  std::vector<AttendedUnits> all(heads);
  std::vector<int64_t> first(heads + 1, 0);  // chunks before a (sequence, kv head)
  for (int64_t i = 0; i < heads; ++i) {
    const int64_t b = i / kv.H, h = i % kv.H, t = a.seq_lens[b] - 1;
    if (t >= 0) {
      if (list_local(a.mask, b) < 0) fail_range("decode: local_start", list_local(a.mask, b), 0, t, b);
      all[i] = attended(a.mask, b, h, t, kv.P, kv.sealed[b]);
      check_entries("decode", kv, a.mask, all[i], b, h);
    }
    first[i + 1] = first[i] + (all[i].count() + per_chunk - 1) / per_chunk;
  }

  const int64_t chunks = first[heads];
  std::unique_ptr<float[]> outs(new float[chunks * G * D]), lses(new float[chunks * G]);
  const auto head_of = [&](int64_t c) { return std::upper_bound(first.begin(), first.end(), c) - first.begin() - 1; };
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(G, chunk_tokens(a.mask));
    const Chunk empty(chunk_tokens(a.mask));
    const auto load = [&](int64_t c, Chunk& chunk) {
      const int64_t i = head_of(c), b = i / kv.H, from = (c - first[i]) * per_chunk;
      chunk.load(kv, a.mask, all[i], b, i % kv.H, from, std::min<int64_t>(from + per_chunk, all[i].count()), a.seq_lens[b] - 1);
    };
    in_turn(begin, end, empty, empty, load, [&](int64_t c, Chunk& now, const Chunk& next) {
      follow(now.k, now.count, now.v, now.count);
      follow(now.v, now.count, next.k, next.count);
      const int64_t i = head_of(c);
      decode_chunk<T>(a, now, i / kv.H, i % kv.H, scratch, outs.get() + c * G * D, lses.get() + c * G);
    });
  });

  const int64_t grain = 1 + (1 << 14) / (G * D);  // heads: a thread that is woken for less costs more than it does
  parallel_for(heads, grain, [&](int64_t begin, int64_t end) {
    float acc[kMaxD];
    for (int64_t row = begin * G; row < end * G; ++row) {
      const int64_t i = row / G, g = row % G;
      float lse = -kInf;
      std::fill_n(acc, D, 0.0f);
      for (int64_t c = first[i]; c < first[i + 1]; ++c) merge(acc, &lse, outs.get() + (c * G + g) * D, lses[c * G + g], D);
      T* out = static_cast<T*>(a.out) + row * D;
      for (int64_t d = 0; d < D; ++d) out[d] = from_float<T>(acc[d]);
      a.lse[row] = lse;
    }
  });
}

}  // namespace

void decode(const DecodeArgs& a) {
  dispatch(a.kv.dtype, [&](auto t) { decode_typed<decltype(t)>(a); });
}

}  // namespace lserve::cpu
